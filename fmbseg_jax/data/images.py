"""Images: decode, resize, normalise."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from fmbseg_jax.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".avif")
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "AVIF")
"""What Pillow may open: pictures, whatever a file is called, and no PostScript."""
LONGEST = 60_000
"""Longest side of an image, in pixels; a JPEG has room for it, and for a legend."""
LONG_SIDE = 2048
"""Longest side of a resized image, as in the evaluation protocol (mmseg's `img_scale`)."""


class ImageError(UserError):
    """A file is not an image that can be read; the message says why."""


def decode(data: bytes) -> np.ndarray:
    """Any image file that Pillow reads → uint8 [H, W, 3], RGB, upright (EXIF rotation applied).

    Transparent pixels are laid over white; 16-bit images are scaled to 8 bits, not cut off.

    Raises:
      ImageError: the data is not an image, is cut short, or is too large to be one.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            return pixels(file)
    except MemoryError:  # not the file's fault
        raise
    except Exception as error:  # Pillow's readers raise many kinds on damaged files
        reason = str(error) or type(error).__name__
        if "cannot identify" in reason:  # it would show the address of a buffer
            reason = "not an image file, or damaged at its start"
        raise ImageError(f"cannot be read: {reason}") from None


def count_pixels(data: bytes) -> int:
    """Pixels of an image file, by its header; 0 where it cannot be read."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            return file.width * file.height
    except Exception:  # `decode` says why
        return 0


def pixels(image: Image.Image) -> np.ndarray:
    """A Pillow image → uint8 [H, W, 3], RGB, upright; transparency and depth as in `decode`."""
    if max(image.size) > LONGEST:
        raise ValueError(f"it is {max(image.size)} pixels long; {LONGEST} are possible")
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _scale_to_8_bits(np.asarray(image))
    if image.mode == "La":  # opacity multiplied in: Pillow converts it to this one alone
        image = image.convert("LA")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _scale_to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Grey levels → uint8 [H, W, 3]: of 16 bits by their range; of others, 0 to the largest.

    In 32 bits, and in floating point, files hold anything; up to 1, 255 or 65535 is usual.
    """
    if not np.isfinite(pixels).all():
        raise ValueError("it holds values that are not finite")
    largest = pixels.max(initial=0)
    usual = [65535] if pixels.dtype == np.uint16 else [255, 65535]
    usual = [1, *usual] if pixels.dtype.kind == "f" else usual
    top = next((top for top in usual if largest <= top), largest)
    grey = np.clip(pixels.astype(np.float64) * (255 / top), 0, 255)
    return np.repeat(np.round(grey).astype(np.uint8)[..., None], 3, axis=-1)


def resized_shape(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Size (H, W) with the short side at `short_side`, the ratio kept, the long side ≤ LONG_SIDE.

    Where both cannot hold (ratios over 4.6 at 448) the ratio gives way: no side is ever shorter
    than `short_side`, so that a window always fits, and memory is bounded for any image.
    """
    scale = min(short_side / min(height, width), max(LONG_SIDE, short_side) / max(height, width))
    return (
        max(short_side, int(height * scale + 0.5)),
        max(short_side, int(width * scale + 0.5)),
    )


def resize(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] → uint8 [*shape, 3], bilinear (antialiased when it shrinks)."""
    if image.shape[:2] == tuple(shape):
        return image
    height, width = shape
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def resize_plain(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] → uint8 [*shape, 3], bilinear without antialiasing, as OpenCV and mmcv do it.

    Half-pixel centres; borders repeat; rounded.
    """
    if image.shape[:2] == tuple(shape):
        return image
    mixed = image.astype(np.float32)
    for axis, outputs in enumerate(shape):
        inputs = mixed.shape[axis]
        centre = np.clip((np.arange(outputs) + 0.5) * (inputs / outputs) - 0.5, 0, inputs - 1)
        below = np.floor(centre).astype(int)
        part = (centre - below).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        low = np.take(mixed, below, axis)
        mixed = low + part * (np.take(mixed, np.minimum(below + 1, inputs - 1), axis) - low)
    return np.round(mixed).astype(np.uint8)


def resize_labels(labels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Label map [H, W] → [*shape], nearest (each pixel's centre decides)."""
    rows, columns = (
        np.minimum((np.arange(n) + 0.5) * (m / n), m - 1).astype(int)
        for n, m in zip(shape, labels.shape, strict=True)
    )
    return labels[rows[:, None], columns]


def normalise(images: Any, mean: Sequence[float], std: Sequence[float]) -> Any:
    """uint8 [..., 3] in [0, 255] → float32 [..., 3]: scaled to [0, 1], minus mean, over std.

    Takes numpy and jax arrays, and returns the same kind.
    """
    scale = np.float32(255) * np.asarray(std, np.float32)
    return (images - np.float32(255) * np.asarray(mean, np.float32)) / scale
