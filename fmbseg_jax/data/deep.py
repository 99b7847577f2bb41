"""Images of more than 8 bits a channel: what their files hold, and 8 bits made of it."""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from fmbseg_jax.data import tiffs
from fmbseg_jax.data.opening import opened, raw_mode, read_as

_AT_ONCE = 1 << 20  # pixels in floating point: of large images all would take gigabytes
_OTHER_ORDER = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}


class Levels(NamedTuple):
    """The values of an image, upright."""

    values: np.ndarray
    """int or float [H, W, 1] (grey) or [H, W, 3] (RGB)."""
    top: int
    """The largest value that their type holds; 0 for floating point, which holds 0 to 1."""
    opacity: np.ndarray | None = None
    """float32 [H, W, 1] in [0, 1]."""
    inverted: bool = False
    """Whether the lowest value is white."""


def is_deep(file: Image.Image) -> bool:
    """Whether an image, open and perhaps not decoded yet, has more than 8 bits a channel."""
    return _is_grey(file) or is_packed(file)


def is_packed(file: Image.Image) -> bool:
    """Whether its colours have 16 bits, of which Pillow would keep 8: it is not decoded yet.

    Of inks (CMYK) 8 bits are kept, of the 16 that the type has: they are shares by themselves.
    """
    return file.mode in ("RGB", "RGBA") and (";16" in raw_mode(file) or _pnm_top(file) > 255)


def _is_grey(file: Image.Image) -> bool:
    return file.mode.startswith("I") or file.mode == "F"


def levels(file: Image.Image, data: bytes) -> Levels:
    """What a deep image holds.

    Args:
      file: the image, as `opened` or decoded.
      data: what it was opened from.
    """
    if _is_grey(file):
        return _grey(file)
    if _pnm_top(file):
        return _pnm_colours(file)
    if raw_mode(file).startswith("LA"):
        read_as(file, "RGBA")  # the 4 bytes of grey and opacity, high and low
        grey, opacity = np.split(_pairs(_array(file)), 2, axis=-1)
        return Levels(grey, 65535, _share(opacity))
    frame = file.tell()
    values = _array(file).astype(np.uint16) << 8 | _low_bytes(data, frame)
    key = file.info.get("transparency")
    if values.shape[-1] == 4:
        return Levels(values[..., :3], 65535, _share(values[..., 3:]))
    if key is None:
        return Levels(values, 65535)
    opaque = np.any(values != key, axis=-1, keepdims=True)
    return Levels(values, 65535, opaque.astype(np.float32))


def _low_bytes(data: bytes, frame: int) -> np.ndarray:
    """uint8, the bytes that Pillow drops of 16 bits: those that it keeps in the other order."""
    file = opened(data)
    if frame:
        file.seek(frame)
    mode = raw_mode(file)
    read_as(file, mode[:-1] + _OTHER_ORDER[mode[-1]])
    return _array(file)


def _grey(file: Image.Image) -> Levels:
    top, inverted, unsigned, scale = 0, False, False, _pnm_top(file)
    if isinstance(file, TiffImageFile):
        top, inverted = tiffs.largest(file), tiffs.is_inverted(file)
        unsigned = tiffs.is_unsigned_32(file)
        _in_native_order(file)
    values, key = _array(file)[..., None], file.info.get("transparency")
    if unsigned:
        values = values.view(np.uint32)
    if scale:  # Pillow has multiplied
        values, top = np.round(values * (scale / 65535)).astype(np.int32), scale
    if not top and values.dtype.kind != "f":
        top = int(np.iinfo(values.dtype).max)
    opacity = (values != key).astype(np.float32) if isinstance(key, int) else None
    return Levels(values, top, opacity, inverted)


def _in_native_order(file: Image.Image) -> None:
    """Mends how a compressed TIFF is unpacked: its bytes come from libtiff in native order."""
    tiles = file.tile  # type: ignore[attr-defined]
    native = {"I;16BS": "I;16S", "I;32BS": "I;32S", "F;32BF": "F;32F"}
    if (
        tiles
        and tiles[0][0] == "libtiff"
        and sys.byteorder == "little"
        and raw_mode(file) in native
    ):
        read_as(file, native[raw_mode(file)])


def _pnm_top(file: Image.Image) -> int:
    """The largest value of a PGM or PPM, where Pillow scales by it; else 0."""
    tiles = getattr(file, "tile", [])
    if file.format == "PPM" and tiles and tiles[0][0] in ("ppm", "ppm_plain"):
        return int(tiles[0][3][1])
    if file.format == "PPM" and raw_mode(file) == "I;16B":
        return 65535
    return 0


def _pnm_colours(file: Image.Image) -> Levels:
    """The colours of a PPM, read as a grey image three times as wide, of which 16 bits are kept."""
    top, (width, height) = _pnm_top(file), file.size
    file._mode, file._size = "I", (3 * width, height)
    file.tile = [  # type: ignore[attr-defined]
        tile._replace(extents=(0, 0, 3 * width, height), args=("I", top))
        for tile in file.tile  # type: ignore[attr-defined]
    ]
    values = np.round(np.asarray(file) * (top / 65535)).astype(np.uint16)
    return Levels(values.reshape(height, width, 3), top)


def _pairs(high_and_low: np.ndarray) -> np.ndarray:
    """uint8 [..., 2 n] → uint16 [..., n]."""
    return high_and_low[..., ::2].astype(np.uint16) << 8 | high_and_low[..., 1::2]


def _array(file: Image.Image) -> np.ndarray:
    """Decodes an image, upright."""
    pixels = np.asarray(ImageOps.exif_transpose(file))
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def _share(opacity: np.ndarray) -> np.ndarray:
    return opacity.astype(np.float32) / 65535


def to_8_bits(levels: Levels, by: str) -> np.ndarray:
    """Values → uint8 [H, W, 3], over white where they are transparent.

    Args:
      by: "file": from the lowest to the highest value that is seen, in any channel; "type": from 0
        to the largest value of the type, of floating point 1.

    Raises:
      ValueError: values are not finite, or outside of the type's range.
    """
    values, opacity = levels.values, levels.opacity
    low, high = _type_range(levels) if by == "type" else _range(levels)
    grey = np.empty((*values.shape[:2], 3), np.uint8)
    rows = max(1, _AT_ONCE // values.shape[1])
    for top in range(0, len(values), rows):
        strip = slice(top, top + rows)
        share = np.clip((values[strip].astype(np.float64) - low) / ((high - low) or 1), 0, 1)
        share = 1 - share if levels.inverted else share
        if opacity is not None:
            share = share * opacity[strip] + (1 - opacity[strip])
        grey[strip] = np.round(255 * share)
    return grey


def _range(levels: Levels) -> tuple[float, float]:
    """The lowest and the highest value of the pixels that are not wholly transparent."""
    if not np.isfinite(levels.values).all():
        raise ValueError("it holds values that are not finite")
    seen = levels.values
    if levels.opacity is not None:
        seen = seen[levels.opacity[..., 0] > 0]
    return (float(seen.min()), float(seen.max())) if seen.size else (0.0, 1.0)


def _type_range(levels: Levels) -> tuple[float, float]:
    low, high = _range(levels)
    top = levels.top or 1
    if low < 0 or high > top:
        raise ValueError(
            f"it holds values from {low:g} to {high:g}; deep=type scales from 0 to {top}, which "
            "these exceed: take deep=file"
        )
    return 0.0, float(top)
