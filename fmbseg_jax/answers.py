"""What the web page shows, without the page: an image and words → pictures, legend, files."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fmbseg_jax import colours, figures
from fmbseg_jax.data import files, images, label_maps
from fmbseg_jax.errors import UserError
from fmbseg_jax.segmenter import Segmenter
from fmbseg_jax.vocabulary import IGNORE, check_words

_MOST_WORDS, _LONGEST = 500, 16_384


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

    def __init__(self, segmenter: Segmenter, folder: Path):
        """Takes a folder for label maps; the largest image is that of the segmenter."""
        self._segmenter, self._folder = segmenter, folder
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
        image, listed = self._read(path), split(words)
        with open(path or "", "rb") as file:
            is_deep = images.is_deep(file, path or "")
        labels = self._segmenter.segment(image, listed, threshold or None)
        counts = np.bincount(labels[labels != IGNORE], minlength=len(listed))
        palette = colours.palette(len(listed))
        return Answer(
            figures.overlay(image, labels, len(listed), opacity),
            {listed[i]: counts[i] / labels.size for i in np.argsort(-counts, kind="stable")},
            1 - counts.sum() / labels.size,
            {word: "#" + bytes(colour).hex() for word, colour in zip(listed, palette, strict=True)},
            self._save(labels, palette),
            self._reading.of_deep(int(is_deep), Path(path or "").name),
        )

    def similarity(self, path: str | None, word: str) -> tuple[np.ndarray, float, float]:
        """The similarity of each pixel with a word, as in the paper's Figure 3.

        Returns:
          A picture uint8 [H, W, 3], dark where it is lowest and bright where it is highest, and
          these two values.
        """
        image = self._read(path)
        found = self._segmenter.similarities(image, split(word))[..., 0]
        grey = image.mean(-1, keepdims=True)
        picture = 0.75 * figures.heat_map(found) + 0.25 * grey
        return picture.astype(np.uint8), float(found.min()), float(found.max())

    def _read(self, path: str | None) -> np.ndarray:
        if not path:
            raise UserError("Drop an image on the page first.")
        data = Path(path).read_bytes()
        height, width = images.size(data, path)  # by the header: nothing is decoded yet
        most = self._reading.megapixels
        if width * height > most * 1_000_000 or max(width, height) > _LONGEST:
            raise UserError(
                f"This image has {width} x {height} pixels; this page takes up to {most} million, "
                f"and {_LONGEST} a side. Make it smaller, or start the page with a larger "
                "--max_megapixels."
            )
        try:
            return images.decode(data, self._reading, path)
        except images.ImageError as error:
            raise UserError(f"This image {error}. Try a JPEG or PNG.") from None

    def _save(self, labels: np.ndarray, palette: np.ndarray) -> Path:
        """A file of its own for each label map, by its contents."""
        small = labels.astype(np.uint16)
        data = label_maps.encode_coloured(small, palette, colours.UNLABELLED)
        path = self._folder / hashlib.sha256(data).hexdigest()[:16] / "labels.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, data)
        return path


def split(words: str) -> tuple[str, ...]:
    """Words as people type them: "sky, grass" or a line each."""
    parts = [part.strip() for part in words.replace("\n", ",").split(",")]
    listed = [part for part in parts if part]
    if not listed:
        raise UserError("Type some words, separated by commas: sky, grass, sail boat.")
    if len(listed) > _MOST_WORDS:
        raise UserError(f"That are {len(listed)} words; this page takes up to {_MOST_WORDS}.")
    return check_words(listed, "This list of words")
