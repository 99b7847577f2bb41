"""What is counted over the images of a dataset: a shard's counts go to disk, and are added up."""

from __future__ import annotations

import dataclasses

import numpy as np

from fmbseg_jax.data.example import PseudoLabel
from fmbseg_jax.vocabulary import IGNORE


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
    skipped: list[list[str]] = dataclasses.field(default_factory=list)
    """Name and reason of each image left out."""

    def add(self, label: PseudoLabel, size: int) -> None:
        """Counts a record of `size` bytes."""
        words = len(label.found) or len(np.setdiff1d(label.labels, [IGNORE]))
        self.images += 1
        self.records += 1
        self.bytes += size
        self.words += words
        self.wordless += words == 0
        self.pixels += label.labels.size
        self.labelled += int(np.count_nonzero(label.labels != IGNORE))

    def skip(self, name: str, reason: str) -> None:
        """Counts an image without a record."""
        self.images += 1
        self.skipped.append([name, reason])

    def __add__(self, other: Counts) -> Counts:
        names = [field.name for field in dataclasses.fields(self)]
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in names})

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
