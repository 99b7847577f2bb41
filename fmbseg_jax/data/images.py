"""Images: decode, resize, normalise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from fmbseg_jax.config.reading import USUAL, Reading
from fmbseg_jax.data import deep, opening, tiffs
from fmbseg_jax.errors import UserError
from fmbseg_jax.io import machine

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".tif", ".tiff", ".webp",
    ".gif", ".pbm", ".pgm", ".ppm", ".pnm", ".tga", ".avif",
)  # fmt: skip
LONGEST = 60_000
"""Longest side of an image, in pixels; a JPEG has room for it, and for a legend."""
LONG_SIDE = 2048
"""Longest side of a resized image, as in the evaluation protocol (mmseg's `img_scale`)."""


class ImageError(UserError):
    """A file is not an image that can be read; the message says why."""


def decode(data: bytes, reading: Reading = USUAL, name: str = "") -> np.ndarray:
    """Any image file that Pillow reads → uint8 [H, W, 3], RGB, upright (EXIF rotation applied).

    Transparent pixels are laid over white; more than 8 bits are scaled to 8, not cut off.

    Args:
      name: of the file: TGA is told by it alone.

    Raises:
      ImageError: the data is not an image, is cut short, is too large, or is one that would come
        out wrong, such as one of many channels.
    """
    try:
        if fault := tiffs.fault(data):
            raise ValueError(fault)
        with _opened(data, name) as file:
            return _pixels(file, data, reading)
    except Exception as error:  # Pillow's readers raise many kinds on damaged files
        machine.let_through(error, name or "an image")
        raise ImageError(f"cannot be read: {str(error) or type(error).__name__}") from None


def decode_named(data: bytes, reading: Reading, name: str) -> np.ndarray:
    """As `decode`, where an error is not caught: it says which image it is."""
    try:
        return decode(data, reading, name)
    except ImageError as error:
        raise ImageError(f"The image {name} {error}.") from None


def _opened(data: bytes, name: str) -> Image.Image:
    try:
        return opening.opened(data, name)
    except ValueError:
        if known := tiffs.description(data):
            raise ValueError(known) from None
        raise


def size(data: bytes, name: str = "") -> tuple[int, int]:
    """(height, width) of an image file, by its header; (0, 0) where it cannot be read."""
    try:
        with opening.opened(data, name) as file:
            return file.height, file.width
    except Exception as error:  # `decode` says why
        machine.let_through(error, name or "an image")
        return 0, 0


def is_deep(file: bytes | BinaryIO, name: str = "") -> bool:
    """Whether an image file, its data or itself, has more than 8 bits a channel, by its header."""
    try:
        with opening.opened(file, name) as image:
            return deep.is_deep(image)
    except Exception as error:  # `decode` says why
        machine.let_through(error, name or "an image")
        return False


def pixels(image: Image.Image, reading: Reading = USUAL) -> np.ndarray:
    """A Pillow image → uint8 [H, W, 3], RGB, upright; transparency and depth as in `decode`.

    Of 16 bits in colour Pillow itself keeps 8 as soon as the image is decoded; so one that is not
    is left like that, and what it was opened from is read again.
    """
    if isinstance(image, TiffImageFile) and (fault := tiffs.fault_of(image.tag_v2)):
        raise ValueError(fault)
    data = b""
    if deep.is_deep(image) and opening.raw_mode(image):
        if not isinstance(image, ImageFile.ImageFile) or not image.fp or not image.format:
            raise ValueError("it was closed before it was decoded")
        frame, place = image.tell(), image.fp.tell()
        image.fp.seek(0)
        data = image.fp.read()
        image.fp.seek(place)
        image = opening.opened(data, kinds=(image.format,))
        if frame:
            image.seek(frame)
    return _pixels(image, data, reading)


def _pixels(image: Image.Image, data: bytes, reading: Reading) -> np.ndarray:
    """As `pixels`; `data` are the file's."""
    _check_size(image.width, image.height, reading)
    if deep.is_deep(image):
        return deep.to_8_bits(deep.levels(image, data), reading.deep)
    step = opening.GREY_STEPS.get(opening.raw_mode(image), 1)
    image.load()
    if image.info.pop(opening.OPAQUE, False):
        image = image.convert(image.mode.removesuffix("A"))
    image = ImageOps.exif_transpose(image)
    if isinstance(image.info.get("transparency"), int):
        image.info["transparency"] *= step
    if image.mode == "La":  # opacity multiplied in: Pillow converts it to this one alone
        image = image.convert("LA")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _check_size(width: int, height: int, reading: Reading) -> None:
    if max(width, height) > LONGEST:
        raise ValueError(f"it is {max(width, height)} pixels long; {LONGEST} are possible")
    if width * height > reading.megapixels * 1_000_000:
        megapixels = math.ceil(width * height / 1e6)
        raise ValueError(
            f"it has {megapixels} megapixels ({width} x {height}), and the limit is "
            f"{reading.megapixels}; {reading.prefix}max_megapixels={megapixels} raises it, where "
            "there is memory for that"
        )


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
