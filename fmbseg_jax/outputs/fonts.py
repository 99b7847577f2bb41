"""Text of any alphabet in pictures: each letter from a font that has it.

ASCII is drawn in Pillow's own font, which has no more. Else it is DejaVu Sans, which comes with
matplotlib (Latin, Greek, Cyrillic, Vietnamese, Hebrew, Arabic, ...), and for what that lacks a font
of the system. All stand on one line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fontTools.ttLib import TTFont
from PIL import ImageDraw, ImageFont

from fmbseg_jax.io import machine

_FOLDERS = (
    "~/.local/share/fonts", "~/.fonts", "~/Library/Fonts", "/usr/local/share/fonts",
    "/usr/share/fonts", "/Library/Fonts", "/System/Library/Fonts",
)  # fmt: skip
_ENDINGS = ".ttf", ".otf", ".ttc", ".otc"
_FIRST = (
    "notosanscjk", "notosans", "sourcehansans", "wqy", "droidsansfallback", "pingfang", "hiragino",
    "applesdgothic", "arialunicode",
)  # fmt: skip
_BLANK = "lastresort", "adobeblank"  # have every letter, as a box
_LAST = "bold", "italic", "oblique", "black", "thin", "light", "mono", "serif", "condensed"
_DEJAVU = 0.92
"""DejaVu's letters are larger than others of the same size."""


@dataclasses.dataclass(frozen=True)
class _Face:
    """A font file; of a collection, the first font."""

    path: Path
    scale: float = 1.0

    @functools.cached_property
    def letters(self) -> frozenset[int]:
        """Code points that it can draw; none of a file that cannot be used."""
        return _letters(self.path)


@functools.cache
def _letters(path: Path) -> frozenset[int]:
    try:
        with TTFont(path, fontNumber=0, lazy=True) as font:
            outlined = {"glyf", "CFF ", "CFF2"} & set(font.keys())  # not bitmaps of one size
            letters = frozenset(font.getBestCmap() or ()) if outlined else frozenset()
        ImageFont.truetype(path, 12)  # whether Pillow can use it, too
        return letters
    except PermissionError:
        return frozenset()
    except Exception as error:  # damaged, or no font: it has many kinds
        machine.let_through(error, path)
        return frozenset()


class Font:
    """Letters of any alphabet, at one size in pixels."""

    def __init__(self, size: int):
        self._size = size
        self._base: Any = ImageFont.load_default(size)
        self._opened: dict[Path, Any] = {}

    def length(self, text: str) -> float:
        """Width in pixels."""
        return sum(font.getlength(part) for font, part in self._runs(text))

    def draw(
        self,
        draw: ImageDraw.ImageDraw,
        at: tuple[float, float],
        text: str,
        ink: str | tuple[int, int, int],
        anchor: str = "la",
    ) -> None:
        """Draws a line of text.

        Args:
          at: (x, y) in pixels of the anchor.
          anchor: as Pillow's: l, m or r, and a (top of the letters), m or s (the line they stand
            on), of Pillow's own font.
        """
        runs = self._runs(text)
        if len(runs) == 1 and runs[0][0] is self._base:
            draw.text(at, text, ink, self._base, anchor)
            return
        x, line = self._start(at, text, anchor)
        for font, part in runs:
            draw.text((x, line), part, ink, font, "ls")
            x += font.getlength(part)

    def box(
        self, draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str
    ) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) around a text whose anchor "la" is `at`, in pixels."""
        runs = self._runs(text)
        if len(runs) == 1 and runs[0][0] is self._base:
            return draw.textbbox(at, text, self._base)
        x, line = self._start(at, text, "la")
        boxes = []
        for font, part in runs:
            boxes.append(draw.textbbox((x, line), part, font, "ls"))
            x += font.getlength(part)
        x0, y0, x1, y1 = zip(*boxes, strict=True)
        return min(x0), min(y0), max(x1), max(y1)

    def _start(self, at: tuple[float, float], text: str, anchor: str) -> tuple[float, float]:
        """(x, y) where the text begins, on the line that its letters stand on."""
        above, below = self._base.getmetrics()
        x = at[0] - self.length(text) * {"l": 0, "m": 0.5, "r": 1}[anchor[0]]
        return x, at[1] + {"a": above, "m": (above - below) / 2, "s": 0}[anchor[1]]

    def _runs(self, text: str) -> list[tuple[Any, str]]:
        """Parts of the text, each with its font."""
        if text.isascii():
            return [(self._base, text)]
        return [(self._truetype(face), part) for face, part in split(text)]

    def _truetype(self, face: _Face | None) -> Any:
        if face is None:
            return self._base
        if face.path not in self._opened:
            size = self._size * face.scale
            self._opened[face.path] = ImageFont.truetype(face.path, size)
        return self._opened[face.path]


def split(text: str) -> list[tuple[_Face | None, str]]:
    """A text's parts, as long as can be, each with the face that draws it; one for all, if any has.

    Letters that no font here has are told of once, and drawn as boxes.
    """
    text = unicodedata.normalize("NFC", text)
    faces = _faces(frozenset(letter for letter in text if _visible(letter)))
    if not faces:
        return [(None, text)]
    parts: list[tuple[_Face | None, str]] = []
    for letter in text:
        last = parts[-1][0] if parts else None
        face = last
        if _visible(letter) and not (last and ord(letter) in last.letters):
            face = next((face for face in faces if ord(letter) in face.letters), faces[0])
        if parts and face is last:
            parts[-1] = (face, parts[-1][1] + letter)
        else:
            parts.append((face or faces[0], letter))
    return parts


def _visible(letter: str) -> bool:
    """Whether a font has to have it; accents, joiners and the like go with what they follow."""
    return unicodedata.category(letter) not in ("Mn", "Me", "Cc", "Cf", "Zs")


@functools.lru_cache(1024)
def _faces(letters: frozenset[str]) -> Sequence[_Face]:
    """The faces that have these letters; one alone, where that has all of them."""
    wanted = {ord(letter) for letter in letters}
    chosen: list[_Face] = []
    missing = set(wanted)
    for face in _known():
        if missing & face.letters:
            if wanted <= face.letters:
                return (face,)
            chosen.append(face)
            missing -= face.letters
        if not missing:
            break
    for code in sorted(missing):
        _tell(unicodedata.name(chr(code), "?").split()[0])
    return tuple(chosen) or _own()


def _known() -> Iterator[_Face]:
    yield from _own()
    yield from _installed()  # asked for where they are needed: listing them takes a moment


def _own() -> tuple[_Face, ...]:
    """DejaVu Sans, where matplotlib is; it is not imported, which would take a second."""
    found = importlib.util.find_spec("matplotlib")
    if found is None or found.origin is None:
        return ()
    path = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    return (_Face(path, _DEJAVU),) if path.is_file() else ()


@functools.cache
def _installed() -> tuple[_Face, ...]:
    """The fonts of the system, those that draw plain letters of many alphabets first."""
    fonts = {path for path in _listed() if path.suffix.lower() in _ENDINGS}
    drawing = [path for path in fonts if not path.name.lower().lstrip(".").startswith(_BLANK)]
    return tuple(map(_Face, sorted(drawing, key=_order)))


def _listed() -> list[Path]:
    """Files of fonts: those of fontconfig, where it is, else those in the usual folders."""
    if program := shutil.which("fc-list"):
        command = [program, "--format", "%{file}\n"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            listed = subprocess.run(command, capture_output=True, check=False, timeout=30).stdout
            if listed.strip():
                return [Path(os.fsdecode(line)) for line in listed.splitlines()]
    folders = [Path(os.path.expanduser(folder)) for folder in _FOLDERS]
    return [path for folder in folders if folder.is_dir() for path in folder.rglob("*")]


def _order(path: Path) -> tuple[Any, ...]:
    name = path.name.lower().replace("-", "").replace(" ", "")
    family = next((i for i, first in enumerate(_FIRST) if name.startswith(first)), len(_FIRST))
    return sum(word in name for word in _LAST), family, path.name, str(path)


@functools.cache
def _tell(script: str) -> None:
    """Once for each script."""
    package = "fonts-noto-cjk" if script in _CJK else "fonts-noto-core"
    print(
        f"No font here has the letters of some words ({script}): they are boxes in pictures. "
        f"Install one that has, such as Debian's {package}.",
        file=sys.stderr,
    )


_CJK = "CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "FULLWIDTH", "IDEOGRAPHIC"
