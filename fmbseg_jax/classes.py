"""The classes that pixels are sorted into, and the words that stand for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from fmbseg_jax.config import Eval
from fmbseg_jax.data import published
from fmbseg_jax.data.benchmarks import Benchmark
from fmbseg_jax.errors import UserError
from fmbseg_jax.vocabulary import check_words, parse_words, synonyms


@dataclasses.dataclass(frozen=True)
class Classes:
    """K classes: each pixel takes that of the most similar of T words."""

    words: tuple[str, ...]
    """What pixels are compared with, T."""
    index: tuple[int, ...]
    """The class that each word stands for; no class lies between two words of another."""
    names: tuple[str, ...]
    """Of the classes, K."""
    threshold: float | None = None
    """Pixels that are less similar than this to every word are class 0."""

    @classmethod
    def of(cls, names: Sequence[str]) -> Classes:
        """Each name a class; of `sofa;couch` the better one stands for it."""
        checked = check_words(names, "the list of words")
        pairs = [(word, i) for i, name in enumerate(checked) for word in synonyms(name)]
        words, index = zip(*pairs, strict=True)
        return cls(words, index, checked)

    def labels(self, most_similar: np.ndarray, best: np.ndarray | None = None) -> np.ndarray:
        """Index of the most similar word, [H, W] → uint16 [H, W], its class.

        Args:
          best: its similarity; needed with a threshold.
        """
        found = np.asarray(self.index, np.uint16)[most_similar]
        if self.threshold is None:
            return found
        assert best is not None
        return np.where(best < self.threshold, np.uint16(0), found)

    def best(self, similarities: np.ndarray) -> np.ndarray:
        """With the words, [H, W, T] → with the classes, [H, W, K]: each with its best word."""
        first = np.searchsorted(self.index, np.arange(len(self.names)))
        return np.maximum.reduceat(similarities, first, axis=-1)


def with_background(
    names: Sequence[str], rule: str, words: Sequence[str] = (), threshold: float = 0.0
) -> Classes:
    """Classes of which the first is what is none of the others.

    Args:
      names: of the classes, the background first.
      rule: "words", the best of `words` stands for the background; "threshold", it is what no class
        reaches the threshold at; "none", its own name is a word like any other.
      words: for the rule "words"; those that are a class themselves are left out.
      threshold: cosine similarity, for that rule.
    """
    names = tuple(names)
    if rule == "none":
        return Classes.of(names)
    others = Classes.of(names[1:])
    index = tuple(i + 1 for i in others.index)
    if rule == "threshold":
        if not threshold:
            raise UserError(
                "eval.background=threshold needs the cosine similarity below which a pixel is "
                "background: --config.eval.threshold=0.2, for example."
            )
        return Classes(others.words, index, names, threshold)
    known = {word.lower() for word in others.words}
    stand_ins = tuple(word for word in words if word.lower() not in known)
    if not stand_ins:
        raise UserError(f"Every background word is a class itself: {', '.join(words)}.")
    checked = check_words(stand_ins + others.words, "background words")
    return Classes(checked, (0,) * len(stand_ins) + index, names)


def of_benchmark(protocol: Eval, benchmark: Benchmark) -> Classes:
    """The classes of a benchmark; its background is found as the protocol says."""
    names, rule = benchmark.words, background_rule(protocol, benchmark)
    if protocol.classes:
        names = parse_words(protocol.classes)
        if len(names) != len(benchmark.words):
            raise UserError(
                f"eval.classes={protocol.classes} has {len(names)} names; {benchmark.name} has "
                f"{len(benchmark.words)} classes."
            )
    words = _background_words(protocol) if rule == "words" else ()
    return with_background(names, rule, words, protocol.threshold)


def _background_words(protocol: Eval) -> tuple[str, ...]:
    if protocol.background_words == "background26":
        return published.background_words()
    if protocol.background_words == "stuff91":
        return published.stuff_words()
    return parse_words(protocol.background_words)


def background_rule(protocol: Eval, benchmark: Benchmark) -> str:
    """ "words", "threshold" or "none"; "none" too where no class is the background."""
    if not benchmark.published:
        return "none" if protocol.background == "auto" else protocol.background
    own = benchmark.published.background
    if own is None:
        return "none"
    return own if protocol.background == "auto" else protocol.background
