"""Label maps: the word index of each pixel, IGNORE where there is none; on disk a PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from fmbseg_jax.data import opening
from fmbseg_jax.data.images import EXTENSIONS, LONGEST, USUAL, Reading, decode_named
from fmbseg_jax.errors import UserError
from fmbseg_jax.io import machine, spelling
from fmbseg_jax.io.files import read_file
from fmbseg_jax.vocabulary import IGNORE

_MOST = USUAL.megapixels * 1_000_000


def path(folder: Path, name: str) -> Path:
    """Where the label map of the image `name` lies, whether that has a file's ending or not."""
    stem, dot, ending = name.rpartition(".")
    return folder / f"{stem if dot + ending.lower() in EXTENSIONS else name}.png"


def find(folder: Path, name: str) -> Path:
    """As `path`, in the spelling of the file that is there; see `spelling.beside`."""
    return spelling.beside(folder, path(Path(), name).as_posix())


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


def decode(data: bytes, source: str, most: int = _MOST) -> np.ndarray:
    """The inverse of `encode`.

    Args:
      source: the name of its image, for the message.
      most: the most pixels that it may have, those of its image.

    Raises:
      UserError: it is no PNG of one channel, damaged, or too large.
    """
    return _values(data, f"The label map of {source}", most).astype(np.uint16)


def read(file: str | Path, num_words: int, megapixels: int = USUAL.megapixels) -> np.ndarray:
    """Any label PNG, grey (1 to 16 bits) or palette → uint16 [H, W]; 255 of 8 bits is IGNORE.

    Args:
      megapixels: the most that it may have, as its image.

    Raises:
      UserError: as `read_values`, or the map has an index of `num_words` or more.
    """
    labels = read_values(file, megapixels)
    if labels.dtype == np.uint8:
        labels = np.where(labels == 255, IGNORE, labels.astype(np.uint16))
    wrong = labels[(labels != IGNORE) & (labels >= num_words)]
    if wrong.size:
        raise UserError(
            f"The label map {file} has the index {int(wrong.flat[0])}; {num_words} words allow 0 "
            f"to {num_words - 1}, and {IGNORE} (255 in 8 bits) for no word."
        )
    return labels.astype(np.uint16)


def read_values(file: str | Path, megapixels: int = USUAL.megapixels) -> np.ndarray:
    """Any PNG of one channel → its values [H, W], uint8, or uint16 where it has 16 bits.

    Upright, should it have an EXIF rotation.

    Raises:
      UserError: there is no such file, it is no PNG, is damaged, too large, or has several
        channels.
    """
    return _values(read_bytes(file), f"The label map {file}", megapixels * 1_000_000)


def read_bytes(file: str | Path) -> bytes:
    """The bytes of a label map; raises UserError where there are none to be read."""
    try:
        return read_file(file)
    except FileNotFoundError:
        raise UserError(f"No label map at {file}.") from None
    except OSError as error:
        raise UserError(f"The label map {file} cannot be read: {error.strerror}.") from None


def png(data: bytes, source: str, most: int = _MOST) -> Image.Image:
    """A PNG that is not decoded yet; others lose values, or hold more than one image.

    Args:
      source: what it is, for the message.
      most: the most pixels that it may have: a small file may claim to be a huge map.

    Raises:
      UserError: it is something else.
    """
    kind = opening.kind(data[: opening.HEAD])
    if kind and kind != "PNG":
        lossy = ", which changes values" * (kind in ("JPEG", "WEBP", "AVIF"))
        raise UserError(
            f"{source} cannot be read: it is a {kind} file{lossy}, whatever its name. Save label "
            "maps as PNG where they are made; a lossy one cannot be converted back."
        )
    try:
        image = opening.opened(data, kinds=("PNG",))
    except (ValueError, OSError) as error:
        machine.let_through(error, source)
        raise UserError(f"{source} cannot be read: {error}.") from None
    if max(image.size) > LONGEST:
        raise UserError(f"{source} is {max(image.size)} pixels long; {LONGEST} are possible.")
    if image.width * image.height > most:
        raise UserError(
            f"{source} has {image.width} × {image.height} pixels, more than the {most:,} that its "
            "image may have."
        )
    if image.width * image.height > _MOST_IN_A_BYTE * len(data):
        raise UserError(
            f"{source} cannot be read: it says that it is {image.width} × {image.height} pixels, "
            f"which its {len(data):,} bytes cannot hold."
        )
    return image


_MOST_IN_A_BYTE = 8 * 1032
"""Pixels of a PNG, of a bit each, in a byte: deflate packs up to 1032 bytes into one."""


def _values(data: bytes, source: str, most: int) -> np.ndarray:
    with png(data, source, most) as image:
        mode, lies_in = image.mode, opening.raw_mode(image)
        _check_channels(image, source)
        try:
            values = np.asarray(ImageOps.exif_transpose(image))
        except Exception as error:  # Pillow's readers raise many kinds on damaged files
            machine.let_through(error, source)
            raise UserError(f"{source} cannot be read: {error}") from None
    if mode.startswith("I"):
        return values.astype(np.uint16)
    return values.astype(np.uint8) // np.uint8(opening.GREY_STEPS.get(lies_in, 1))


def _check_channels(image: Image.Image, source: str) -> None:
    if image.mode in ("1", "L", "P") or image.mode.startswith("I"):
        return
    advice = "A map of colours has to be converted first."
    if image.mode == "RGB" and opening.raw_mode(image) == "RGB" and _is_grey(image):
        advice = "Its three channels are equal: save one of them."
    elif image.mode in ("LA", "RGBA"):
        advice = "Save it without opacity; a map of colours has to be converted to indices first."
    raise UserError(
        f"{source} has mode {image.mode}; expected one channel that holds indices, grey or "
        f"palette. {advice}"
    )


def _is_grey(image: Image.Image) -> bool:
    try:
        colours = np.asarray(image)
    except Exception as error:  # damaged, too
        machine.let_through(error)
        return False
    return bool(np.all(colours == colours[..., :1]))


def image_of(labels: np.ndarray, data: bytes, name: str, reading: Reading) -> np.ndarray:
    """The image file that a label map is of, uint8 [H, W, 3]; raises UserError for another size."""
    image = decode_named(data, reading, name)
    if fault := size_fault(labels, image.shape[:2], name):
        raise UserError(f"The label map {fault}")
    return image


def size_fault(labels: np.ndarray, size: Sequence[int], image: str | Path) -> str:
    """How a label map [H, W] differs in size from its image; "" where it does not.

    Args:
      size: (height, width) of the image, upright.
      image: its name.
    """
    (height, width), there = labels.shape, (int(size[0]), int(size[1]))
    if (height, width) == there:
        return ""
    told = (
        f"is {width} × {height} pixels, its image {image} {there[1]} × {there[0]} (upright). A "
        "label map has the size of its image."
    )
    if (width, height) == there:
        told += " Is the image turned by its EXIF data? Turn the label map as well."
    return told
