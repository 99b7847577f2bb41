"""Image files, opened by their header: of kinds that are safe, and whatever their size."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from typing import BinaryIO

from PIL import (  # noqa: F401 - each registers its reader
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TgaImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "AVIF")
"""What Pillow may open: pictures, whatever a file is called, and no PostScript."""
_BY_NAME = {".tga": "TGA", ".dib": "DIB"}
"""Kinds that their first bytes do not tell: only of files that are called so."""
GREY_STEPS = {"L;2": 85, "L;4": 17}
"""By how the pixels of a grey PNG lie: Pillow spreads them over 0 to 255 by this factor."""
OPAQUE = "fmbseg_opaque"
"""In `info` of an image whose fourth channel, if it has one, means nothing."""
HEAD = 16
"""Bytes that tell a kind."""


def kind(head: bytes) -> str:
    """The format of a file by its first `HEAD` bytes, such as "JPEG"; "" for none of `FORMATS`."""
    return next((name for name in FORMATS if _accepts(name, head)), "")


def opened(data: bytes | BinaryIO, name: str = "", kinds: Sequence[str] = FORMATS) -> Image.Image:
    """An image file whose pixels are not decoded yet.

    `Image.open` has a limit on pixels that is one variable of the whole process. To raise it for
    one caller would raise it for all threads, and in no other process. The readers behind it have
    no limit, so they are called here, and whoever decodes checks the size first.

    Args:
      data: of the file, or the file itself, of which the header alone is read then.
      name: of the file; its ending tells what the data do not.

    Raises:
      ValueError: it is none of `kinds`.
    """
    ending = name[name.rfind(".") :].lower() if "." in name else ""
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    head = stream.read(18)
    for one in (*kinds, *([_BY_NAME[ending]] if ending in _BY_NAME else [])):
        if not _accepts(one, head[:HEAD]):
            continue
        stream.seek(0)
        try:
            file = (_Tiff if one == "TIFF" else Image.OPEN[one][0])(stream, name)
        except (SyntaxError, IndexError, TypeError, struct.error):  # those of `Image.open`
            continue
        if one == "TGA" and not head[17] & 15:  # its fourth channel is no opacity
            file.info[OPAQUE] = True
        return file
    kinds_told = [name for name, known in _TOLD.items() if known(head)]
    if kinds_told:
        raise ValueError(f"a {kinds_told[0]} file, whatever its name; convert it to JPEG or PNG")
    raise ValueError("not an image file, or damaged at its start")


_TOLD = {
    "HEIC": lambda head: head[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc"),
    "JPEG 2000": lambda head: head[4:8] == b"jP  ",
    "JPEG XL": lambda head: head[:2] == b"\xff\x0a" or head[4:8] == b"JXL ",
    "Photoshop": lambda head: head[:4] == b"8BPS",
}
"""Kinds that are not read, by their first bytes."""


class _Tiff(TiffImagePlugin.TiffImageFile):
    """A TIFF; Pillow's own class asks for the limit a second time when it decodes."""

    def load_prepare(self) -> None:
        if self._im is None:
            self.im = Image.core.new(self.mode, self._tile_size)
        ImageFile.ImageFile.load_prepare(self)


def raw_mode(file: Image.Image) -> str:
    """How the pixels lie in a file that is not decoded yet, such as "RGB;16B"; "" once they are."""
    tiles = file.tile if isinstance(file, ImageFile.ImageFile) else []
    if not tiles or not tiles[0][3]:
        return ""
    given = tiles[0][3]
    return given if isinstance(given, str) else str(given[0])


def read_as(file: Image.Image, mode: str) -> None:
    """Has the pixels of a file, not decoded yet, unpacked as if they lay in it in another way."""
    assert isinstance(file, ImageFile.ImageFile)
    file.tile = [
        tile._replace(args=mode if isinstance(tile.args, str) else (mode, *(tile.args or ())[1:]))
        for tile in file.tile
    ]


def _accepts(kind: str, head: bytes) -> bool:
    accepts = Image.OPEN[kind][1]
    try:
        return accepts is None or accepts(head) is True  # a string: known, but not built in
    except (IndexError, struct.error):  # of a file of a few bytes
        return False
