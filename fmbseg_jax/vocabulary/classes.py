"""The classes that pixels are sorted into, and the words that stand for each."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping, Sequence

import numpy as np

from fmbseg_jax.errors import UserError
from fmbseg_jax.vocabulary import IGNORE, check_words, synonyms

Words = Sequence[str] | Mapping[str, str | Sequence[str]]
"""K words, or by name of the class its synonyms: `["sky"]`, `{"couch": ["sofa", "couch"]}`. In a
list, "sofa;couch" is a class with two synonyms."""
Background = Sequence[str] | float | None
"""Words that stand for the background, or the cosine similarity below which a pixel is that."""


@dataclasses.dataclass(frozen=True)
class Classes:
    """K classes: each pixel takes that of the most similar of T words."""

    words: tuple[str, ...]
    """What pixels are compared with, T."""
    index: tuple[int, ...]
    """The class that each word stands for, or `background`; the words of one lie together."""
    names: tuple[str, ...]
    """Of the classes, K."""
    background: int = IGNORE
    """What pixels of no class get: class 0 where the background is a class, else IGNORE."""
    threshold: float | None = None
    """Pixels that are less similar than this to every word are background."""

    @classmethod
    def of(cls, words: Words, background: Background = None) -> Classes:
        """A class for each word, of which the best synonym stands for it; see `Segmenter.segment`.

        Raises:
          UserError: a word is empty, there twice, or no string; the threshold is no cosine.
        """
        names, groups = _named(words)
        threshold, others = _background(background)
        checked = check_words((*groups, *others), "the words with those of the background")
        index = (*range(len(groups)), *(IGNORE for _ in others))
        pairs = [
            (word, i) for i, group in zip(index, checked, strict=True) for word in synonyms(group)
        ]
        compared, index = zip(*pairs, strict=True)
        return cls(compared, index, names or checked[: len(groups)], IGNORE, threshold)

    def labels(self, most_similar: np.ndarray, best: np.ndarray | None = None) -> np.ndarray:
        """Index of the most similar word, [H, W] → uint16 [H, W], its class.

        Args:
          best: its similarity; needed with a threshold.
        """
        found = np.asarray(self.index, np.uint16)[most_similar]
        if self.threshold is None:
            return found
        assert best is not None
        return np.where(best < self.threshold, np.uint16(self.background), found)


def _named(words: Words) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the classes, () where each is its word, and the words of each, joined by ";"."""
    if not isinstance(words, Mapping):
        return (), check_words(words, "the list of words")
    groups = [
        some if isinstance(some, str) else ";".join(check_words(some, f"{name!r}"))
        for name, some in words.items()
    ]
    return tuple(words), check_words(groups, "the list of words")


def _background(given: Background) -> tuple[float | None, tuple[str, ...]]:
    """The threshold and the words of the background."""
    if given is None:
        return None, ()
    if not isinstance(given, numbers.Real):  # which NumPy's numbers are, too
        return None, check_words(given, "the list of background words")  # type: ignore[arg-type]
    if isinstance(given, bool) or not -1 <= float(given) <= 1:
        raise UserError(
            f"The background's threshold is a cosine similarity, from -1 to 1; got {given!r}."
        )
    return float(given), ()
