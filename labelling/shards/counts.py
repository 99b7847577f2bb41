"""What is counted over the images of a dataset: a shard's counts go to disk, and are added up."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from fmbseg_jax.data import images
from fmbseg_jax.data.example import PseudoLabel
from fmbseg_jax.errors import UserError
from fmbseg_jax.io import texts
from fmbseg_jax.vocabulary import IGNORE

_FORM = {
    **dict.fromkeys(("images", "records", "bytes", "words", "wordless"), int),
    **dict.fromkeys(("pixels", "labelled", "deep"), int),
    "by_word": {str: int},
    "skipped": [(str, str)],
    "deep_example": str,
}
"""In JSON."""


@dataclasses.dataclass
class Counts:
    """Sums over images, in integers."""

    images: int = 0
    records: int = 0
    bytes: int = 0
    words: int = 0
    wordless: int = 0
    """Images in which no word was found."""
    pixels: int = 0
    labelled: int = 0
    """Pixels with a word."""
    by_word: dict[str, int] = dataclasses.field(default_factory=dict)
    """Images in which a word was found, by its index, a string as JSON wants it."""
    skipped: list[list[str]] = dataclasses.field(default_factory=list)
    """Name and reason of each image left out."""
    deep: int = 0
    """Images of more than 8 bits a channel."""
    deep_example: str = ""
    """Name of one of them."""

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Counts:
        """The counts that were written; raises UserError where they cannot be counts."""
        known = {field.name for field in dataclasses.fields(cls)}
        counts = cls(**{name: value for name, value in facts.items() if name in known})
        written = dataclasses.asdict(counts)
        numbers = [value for value in written.values() if isinstance(value, int)]
        if (
            facts.keys() - known
            or texts.fault(written, _FORM)
            or min(*numbers, *counts.by_word.values()) < 0
            or counts.images != counts.records + len(counts.skipped)
            or counts.labelled > counts.pixels
            or max(counts.wordless, counts.deep, *counts.by_word.values()) > counts.records
        ):
            raise UserError("These are no counts of images.")
        return counts

    def add(self, label: PseudoLabel, size: int) -> None:
        """Counts a record of `size` bytes."""
        if images.is_deep(label.image, label.filename):
            self.deep, self.deep_example = self.deep + 1, self.deep_example or label.filename
        found = label.found if len(label.found) else np.setdiff1d(label.labels, [IGNORE])
        self.images += 1
        self.records += 1
        self.bytes += size
        self.words += len(found)
        self.wordless += len(found) == 0
        self.by_word = dict(Counter(self.by_word) + Counter(map(str, found.tolist())))
        self.pixels += label.labels.size
        self.labelled += int(np.count_nonzero(label.labels != IGNORE))

    def skip(self, name: str, reason: str) -> None:
        """Counts an image without a record."""
        self.images += 1
        self.skipped.append([name, reason])

    def __add__(self, other: Counts) -> Counts:
        names = {field.name for field in dataclasses.fields(self)} - {"by_word", "deep_example"}
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        by_word = dict(Counter(self.by_word) + Counter(other.by_word))
        return Counts(**sums, by_word=by_word, deep_example=self.deep_example or other.deep_example)

    def images_by_word(self, words: Sequence[str]) -> dict[str, int]:
        """In how many images each word was found, the most frequent first."""
        counts = {word: self.by_word.get(str(i), 0) for i, word in enumerate(words)}
        return dict(sorted(counts.items(), key=lambda one: -one[1]))

    @property
    def skipped_names(self) -> list[str]:
        """The images left out."""
        return [name for name, _ in self.skipped]

    @property
    def coverage(self) -> float:
        """Share of the pixels that have a word."""
        return self.labelled / max(self.pixels, 1)

    def reasons(self, most: int = 10) -> str:
        """A line for each skipped image, up to `most`."""
        lines = [f"  {name} {reason}" for name, reason in self.skipped[:most]]
        return "\n".join(lines + ["  ..."] * (len(self.skipped) > most))
