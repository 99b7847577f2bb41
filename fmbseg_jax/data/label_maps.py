"""Label maps: the word index of each pixel, IGNORE where there is none; on disk a PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fmbseg_jax.data.images import EXTENSIONS, FORMATS
from fmbseg_jax.errors import UserError
from fmbseg_jax.vocabulary import IGNORE


def path(folder: Path, name: str) -> Path:
    """Where the label map of the image `name` lies, whether that has a file's ending or not."""
    stem, dot, ending = name.rpartition(".")
    return folder / f"{stem if dot + ending.lower() in EXTENSIONS else name}.png"


def encode(labels: np.ndarray) -> bytes:
    """uint16 [H, W] → a 16-bit grey PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(labels, np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def encode_coloured(labels: np.ndarray, colours: np.ndarray, unlabelled: Sequence[int]) -> bytes:
    """uint16 [H, W] → a PNG of the same indices that viewers show in colours, 255 for IGNORE.

    Of more than 255 words, a 16-bit grey one, as `encode`.

    Args:
      colours: uint8 [K, 3], of all words.
      unlabelled: the colour of IGNORE.
    """
    if len(colours) > 255:
        return encode(labels)
    image = Image.fromarray(np.where(labels == IGNORE, 255, labels).astype(np.uint8))
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)], table[255] = colours, unlabelled
    image.putpalette(table.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def decode(data: bytes, source: str) -> np.ndarray:
    """The inverse of `encode`.

    Args:
      source: where it was read, for the message.

    Raises:
      UserError: it is no PNG, or damaged.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            return np.asarray(image).astype(np.uint16)
    except Exception as error:  # Pillow's readers raise many kinds on damaged files
        raise UserError(f"The label map of {source} cannot be read: {error}") from None


def read(file: str | Path, num_words: int) -> np.ndarray:
    """Any label PNG, grey (8 or 16 bits) or palette → uint16 [H, W]; 255 of 8 bits is IGNORE.

    Raises:
      UserError: as `read_values`, or the map has an index of `num_words` or more.
    """
    labels = read_values(file)
    if labels.dtype == np.uint8:
        labels = np.where(labels == 255, IGNORE, labels.astype(np.uint16))
    wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels >= num_words))]
    if wrong.size:
        raise UserError(
            f"The label map {file} has the index {int(wrong.flat[0])}; {num_words} words allow 0 "
            f"to {num_words - 1}, and {IGNORE} (255 in 8 bits) for no word."
        )
    return labels.astype(np.uint16)


def read_values(file: str | Path) -> np.ndarray:
    """Any PNG of one channel → its values [H, W], uint8 where it has 8 bits.

    Raises:
      UserError: there is no such file, it cannot be read, or has several channels.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            mode, values = image.mode, np.asarray(image)
    except FileNotFoundError:
        raise UserError(f"No label map at {file}.") from None
    except Exception as error:  # Pillow's readers raise many kinds on damaged files
        raise UserError(f"The label map {file} cannot be read: {error}") from None
    if mode not in ("L", "P") and not mode.startswith("I"):
        raise UserError(
            f"The label map {file} has mode {mode}; expected one channel of 8 or 16 bits that "
            "holds indices. A map of colours has to be converted first."
        )
    return values
