"""What the web page shows, without the page: an image and words → pictures, legend, files."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fmbseg_jax.data import images, label_maps
from fmbseg_jax.errors import UserError
from fmbseg_jax.io import files
from fmbseg_jax.io.threads import Room
from fmbseg_jax.outputs import colours, overlays
from fmbseg_jax.segmentation.segmenter import Segmenter
from fmbseg_jax.vocabulary import IGNORE, check_words, synonyms

_LONGEST = 16_384  # pixels of a side
_MOST_NAMES, _LONGEST_NAME = 500, 200  # of all words and their synonyms together; letters of one
_PIXELS = 64_000_000  # of the images that are looked at at once, together
_KEPT = 600  # seconds; by then the page has taken a label map to where it serves it


class Answer(NamedTuple):
    """What was found in an image."""

    picture: np.ndarray
    """uint8 [H, W, 3], the image in the colours of its words."""
    shares: dict[str, float]
    """By word, the share of the pixels that it has; the largest first."""
    background: float
    """Share of the pixels that no word has."""
    colours: dict[str, str]
    """By word, as "#4c7cd2"."""
    file: Path
    """The label map, a PNG."""
    note: str = ""
    """What was done to the image, where that is unusual."""


class Answers:
    """A segmenter behind a page: many people at once, whatever they upload and type."""

    def __init__(self, segmenter: Segmenter, uploads: Path, folder: Path):
        """The largest image is that of the segmenter.

        Args:
          uploads: the folder that images come from. A visitor may send any path: what lies
            elsewhere is not read.
          folder: for label maps; one that nobody can ask the page for.
        """
        self._segmenter, self._uploads, self._folder = segmenter, uploads.resolve(), folder
        self._room = Room(_PIXELS)
        self._reading = dataclasses.replace(segmenter.reading, prefix="--")

    def segment(self, path: str | None, words: str, opacity: float, threshold: float) -> Answer:
        """Segments an uploaded image.

        Args:
          words: separated by commas or lines.
          opacity: of the colours, in [0, 1].
          threshold: similarity below which a pixel is background; 0 for no background.

        Raises:
          UserError: there is no image, it cannot be read or is too large, or there are no words.
        """
        listed = split(words)
        for name, value in (("Opacity", opacity), ("Background", threshold)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise UserError(f"{name} is a number from 0 to 1; got {str(value)[:30]}.")
        palette = colours.palette(len(listed))
        with self._opened(path) as (image, note):
            labels = self._segmenter.segment(image, listed, threshold or None)
            counts = np.bincount(labels[labels != IGNORE], minlength=len(listed))
            return Answer(
                overlays.overlay(image, labels, len(listed), opacity),
                {listed[i]: counts[i] / labels.size for i in np.argsort(-counts, kind="stable")},
                1 - counts.sum() / labels.size,
                {w: "#" + bytes(colour).hex() for w, colour in zip(listed, palette, strict=True)},
                self._save(labels, palette),
                note,
            )

    def similarity(self, path: str | None, word: str) -> tuple[np.ndarray, float, float]:
        """The similarity of each pixel with a word, as in the paper's Figure 3.

        Returns:
          A picture uint8 [H, W, 3], dark where it is lowest and bright where it is highest, and
          these two values.
        """
        words = split(word)
        with self._opened(path) as (image, _):
            found = self._segmenter.similarities(image, words)[..., 0]
            grey = image.mean(-1, keepdims=True)
            picture = 0.75 * overlays.heat_map(found) + 0.25 * grey
            return picture.astype(np.uint8), float(found.min()), float(found.max())

    @contextlib.contextmanager
    def _opened(self, path: str | None) -> Iterator[tuple[np.ndarray, str]]:
        """An uploaded image, and what is said of it; large ones wait for each other."""
        data = self._read(path)
        height, width = images.size(data, path or "")  # by the header: nothing is decoded yet
        most = self._reading.megapixels
        for limit, over in (
            (f"{most} million", width * height > most * 1_000_000),
            (f"{_LONGEST} a side", max(width, height) > _LONGEST),
        ):
            if over:
                raise UserError(
                    f"This image has {width} x {height} pixels; this page takes up to {limit}. "
                    "Make it smaller."
                )
        name = Path(path or "").name
        note = self._reading.of_deep(int(images.is_deep(data, name)), name)
        with self._room.take(height * width):
            try:
                image = images.decode(data, self._reading, name)
            except images.ImageError as error:
                raise UserError(f"This image {error}. Try a JPEG or PNG.") from None
            yield image, note

    def _read(self, path: str | None) -> bytes:
        """The bytes of a regular file among the uploads, and of no other."""
        if not path:
            raise UserError("Drop an image on the page first.")
        try:
            file = Path(path).resolve(strict=True)
            if file.is_relative_to(self._uploads) and stat.S_ISREG(file.stat().st_mode):
                return file.read_bytes()
        except (OSError, ValueError, RuntimeError):  # gone, no path at all, or a circle of links
            pass
        raise UserError("This image is not here any more: drop it on the page again.")

    def _save(self, labels: np.ndarray, palette: np.ndarray) -> Path:
        """A file for each label map, under a name that nobody can guess."""
        for old in self._folder.glob("*"):
            with contextlib.suppress(OSError):  # another thread was sooner
                if time.time() - old.stat().st_mtime > _KEPT:
                    shutil.rmtree(old, ignore_errors=True)
        small = labels.astype(np.uint16)
        data = label_maps.encode_coloured(small, palette, colours.UNLABELLED)
        path = self._folder / secrets.token_hex(16) / "labels.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, data)
        return path


def split(words: str) -> tuple[str, ...]:
    """Words as people type them: "sky, grass" or a line each."""
    if len(words) > _MOST_NAMES * _LONGEST_NAME:  # not even looked at
        raise UserError(f"These are {len(words):,} letters; the page takes {_MOST_NAMES} words.")
    parts = [part.strip() for part in words.replace("\n", ",").split(",")]
    listed = [part for part in parts if part]
    if not listed:
        raise UserError("Type some words, separated by commas: sky, grass, sail boat.")
    names = [name for part in listed for name in synonyms(part)]
    if len(names) > _MOST_NAMES:
        raise UserError(
            f"These are {len(names)} words, with their synonyms; the page takes {_MOST_NAMES}."
        )
    if longest := [name for name in names if len(name) > _LONGEST_NAME]:
        raise UserError(
            f"The word {longest[0][:30]!r}... has {len(longest[0])} letters; the page takes "
            f"{_LONGEST_NAME}."
        )
    return check_words(listed, "This list of words")
