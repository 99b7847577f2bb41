"""What people pass as an image, made into pixels; or a message that says what to pass instead."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from fmbseg_jax.data import deep, images
from fmbseg_jax.errors import Notice, UserError
from fmbseg_jax.io import machine

ImageLike = np.ndarray | Image.Image | str | os.PathLike
"""uint8 [H, W, 3] in RGB, a Pillow image, or the path of an image file."""


def image(given: ImageLike, reading: images.Reading = images.USUAL) -> np.ndarray:
    """An image in any form → uint8 [H, W, 3], RGB.

    Files and Pillow images are turned upright, and what is transparent is laid over white.

    Raises:
      UserError: it is none; the message says what to pass.
      ImageError: the file cannot be read.
    """
    if isinstance(given, (str, os.PathLike)):
        return _file(Path(given), reading)
    if isinstance(given, Image.Image):
        if deep.is_deep(given):
            _tell_of_deep(reading)
        try:
            return images.pixels(given, reading)
        except (OSError, ValueError) as error:  # opened, but cut short
            machine.let_through(error)
            raise images.ImageError(f"The Pillow image cannot be read: {error}") from None
    try:
        array = np.asarray(given)
    except (ValueError, TypeError):  # lists of several lengths
        array = np.asarray(None)
    if advice := _advice(array):
        raise UserError(
            "An image is a uint8 array [H, W, 3], RGB in [0, 255], a Pillow image or a path; got "
            f"{array.dtype} {list(array.shape)}. {advice}"
        )
    return np.ascontiguousarray(array)


def _file(path: Path, reading: images.Reading) -> np.ndarray:
    if not os.path.isfile(path):
        kind = "is a folder" if os.path.isdir(path) else "is not there"
        raise UserError(f"The image {path} {kind}. Give the path of an image file.")
    data = path.read_bytes()
    if images.is_deep(data, path.name):
        _tell_of_deep(reading)
    try:
        return images.decode(data, reading, path.name)
    except images.ImageError as error:
        raise images.ImageError(f"{path} {error}") from None


def _tell_of_deep(reading: images.Reading) -> None:
    """By the warnings of Python, which show the same words once."""
    told = reading.of_deep(1, "").removeprefix("1 image, , has")
    warnings.warn(f"Some images have{told}", Notice, stacklevel=1)


def _advice(array: np.ndarray) -> str:
    """What to pass in place of an array; "" where it is an image."""
    if array.dtype == object or array.dtype.kind not in "buif":
        several = array.ndim > 0 and array.size > 0
        return "It holds no numbers." + " segment_batch takes several images." * several
    if not array.size:
        return "It is empty."
    if max(array.shape, default=0) > images.LONGEST:
        return f"A side has up to {images.LONGEST} pixels."
    return _advice_on_shape(array.shape) or _advice_on_values(array)


def _advice_on_shape(shape: tuple[int, ...]) -> str:
    if len(shape) == 4:
        return "These are several images: pass one, image[0], or all of them to segment_batch."
    if len(shape) == 2:
        return "It is grey: pass np.repeat(image[..., None], 3, axis=2)."
    if len(shape) != 3:
        return "Pass an array of three axes: rows, columns, RGB."
    if shape[2] == 3:
        return ""
    if shape[0] in (1, 3, 4):
        return "Its channels come first: pass np.moveaxis(image, 0, -1)."
    if shape[2] == 4:
        return "Its fourth channel is opacity: pass image[..., :3], or Image.fromarray(image)."
    if shape[2] == 1:
        return "It is grey: pass np.repeat(image, 3, axis=2)."
    return f"Choose three of its {shape[2]} channels."


def _advice_on_values(array: np.ndarray) -> str:
    if array.dtype == np.uint8:
        return ""
    low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        return "It holds values that are not finite."
    if low < 0:
        return f"Its values go from {low:g} to {high:g}: pass it as it was before normalisation."
    if high <= 1 and array.dtype.kind in "bf":
        return "Its values lie in [0, 1]: pass (image * 255).round().astype(np.uint8)."
    if high <= 255:
        return "Its values lie in [0, 255]: pass image.round().astype(np.uint8)."
    return f"Its values go up to {high:g}: pass (image / {high:g} * 255).round().astype(np.uint8)."
