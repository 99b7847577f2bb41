"""Images: find, decode, resize, normalise."""

from __future__ import annotations

import io
import os
import platform
import threading
from collections.abc import Iterator, Sequence
from pathlib import PurePath, PurePosixPath
from typing import Any

import fsspec
import numpy as np
from etils import epath
from PIL import Image, ImageOps

from fmbseg_jax.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".avif")
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "AVIF")
"""What Pillow may open: pictures, whatever a file is called, and no PostScript."""
_OTHERS = (".heic", ".heif", ".jp2", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".psd")
"""Photographs, too, which Pillow cannot open; a folder that has some is told so."""
LONGEST = 65_000
"""Longest side of an image, in pixels; a JPEG, and a matrix that resizes, have room for it."""
LONG_SIDE = 2048
"""Longest side of a resized image, as in the evaluation protocol (mmseg's `img_scale`)."""


class ImageError(UserError):
    """A file is not an image that can be read; the message says why."""


def find_images(folder: epath.PathLike) -> list[str]:
    """Paths of all images under `folder`, relative to it, with forward slashes, sorted.

    Prints how many photographs are left out because of their kind.
    """
    if not exists(folder):
        raise UserError(f"No folder of images at {folder}. Give the path of an existing folder.")
    folder = epath.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; give the folder that it is in.")
    files = sorted(_remote_files(folder) if is_remote(folder) else _files(folder))
    visible = [name for name in files if not PurePosixPath(name).name.startswith(".")]
    names = [name for name in visible if name.lower().endswith(EXTENSIONS)]
    others = [name for name in visible if name.lower().endswith(_OTHERS)]
    fault = f"{len(others)} files cannot be read, such as {others[0]}" if others else ""
    if not names:
        raise UserError(
            f"No images in {folder}. Looked for {', '.join(EXTENSIONS)} there and in its folders."
            + f" {fault}: convert them to JPEG." * bool(others)
        )
    if others:
        print(f"{folder}: {fault}; they are left out. Convert them to JPEG.")
    return names


def _files(folder: epath.Path) -> Iterator[str]:
    for root, _, files in os.walk(folder, followlinks=True):
        for file in files:
            yield PurePath(root, file).relative_to(folder).as_posix()


def _remote_files(folder: epath.Path) -> Iterator[str]:
    """By one listing of the store; epath's own walk forgets which store it is in."""
    filesystem, root = fsspec.url_to_fs(str(folder))
    for path in filesystem.find(root):
        yield path.removeprefix(root).lstrip("/")


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is in a store such as gs:// or s3://."""
    return "://" in str(path)


def exists(path: epath.PathLike) -> bool:
    """Whether there is such a file or folder; raises UserError where its store cannot be asked."""
    try:
        return epath.Path(path).exists()
    except Exception as error:  # each store has its own kinds
        raise UserError(
            f"{path} cannot be reached ({type(error).__name__}: {error}). Give a folder, gs:// (which "
            "needs `pip install gcsfs`) or s3:// (`pip install s3fs`), and have your credentials set."
        ) from None


def png_names(names: Sequence[str]) -> dict[str, str]:
    """By image, the name of a PNG that mirrors it: `sub/a.jpg` → `sub/a.png`.

    Raises:
      UserError: two images would share one.
    """
    owners: dict[str, str] = {}
    for name in names:
        target = PurePosixPath(name).with_suffix(".png").as_posix()
        if other := owners.get(target):
            raise UserError(f"{other} and {name} would both have {target}. Rename one.")
        owners[target] = name
    return {name: target for target, name in owners.items()}


def inside(name: str, source: str) -> str:
    """A name that others have written, `sub/a.jpg`; refused where it leads out of its folder.

    Args:
      source: where it was read, for the message.
    """
    parts = name.replace("\\", "/").split("/")
    if not name.strip() or ".." in parts or parts[0] == "" or "\0" in name:
        raise UserError(
            f"{source} names the image {name!r}, which may lie outside its folder. Names are "
            "relative, such as sub/a.jpg; do not use files of people you do not trust."
        )
    return name


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


def pixels(image: Image.Image) -> np.ndarray:
    """A Pillow image → uint8 [H, W, 3], RGB, upright; transparency and depth as in `decode`."""
    if max(image.size) > LONGEST:
        raise ValueError(f"it is {max(image.size)} pixels long; {LONGEST} are possible")
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _scale_to_8_bits(np.asarray(image))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _scale_to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Grey levels of 16 bits (or any range, for 32) → uint8 [H, W, 3]."""
    top = 65535 if pixels.max(initial=0) > 255 else 255
    grey = np.clip(pixels.astype(np.float64) * (255 / max(top, pixels.max(initial=0))), 0, 255)
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


def write_atomically(path: epath.PathLike, data: bytes) -> None:
    """Writes a file that appears under its name only when it is whole."""
    path = epath.Path(path)
    unfinished = incomplete(path)
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            if not is_remote(path):
                file.flush()
                os.fsync(file.fileno())  # else a power cut may leave an empty file under the name
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def incomplete(path: epath.Path) -> epath.Path:
    """The name of a file while this thread writes it."""
    writer = f"{platform.node()}-{os.getpid()}-{threading.get_ident()}"
    return path.with_name(f"{path.name}.{writer}.incomplete")
