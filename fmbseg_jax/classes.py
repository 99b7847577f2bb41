"""The classes that pixels are sorted into, and the words that stand for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from fmbseg_jax.config import Eval
from fmbseg_jax.data import published
from fmbseg_jax.data.benchmarks import Benchmark
from fmbseg_jax.errors import UserError
from fmbseg_jax.vocabulary import check_words, parse_words


@dataclasses.dataclass(frozen=True)
class Classes:
    """K classes: each pixel takes that of the most similar of T words."""

    words: tuple[str, ...]
    """What pixels are compared with, T."""
    index: tuple[int, ...]
    """The class that each word stands for."""
    names: tuple[str, ...]
    """Of the classes, K."""
    threshold: float | None = None
    """Pixels that are less similar than this to every word are class 0."""

    @classmethod
    def of(cls, words: Sequence[str]) -> Classes:
        """Each word a class of its own."""
        checked = check_words(words, "the list of words")
        return cls(checked, tuple(range(len(checked))), checked)

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
    others = names[1:]
    if rule == "threshold":
        if not threshold:
            raise UserError(
                "eval.background=threshold needs the cosine similarity below which a pixel is "
                "background: --config.eval.threshold=0.2, for example."
            )
        return Classes(others, tuple(range(1, len(names))), names, threshold)
    known = {name.lower() for name in others}
    stand_ins = tuple(word for word in words if word.lower() not in known)
    if not stand_ins:
        raise UserError(f"Every background word is a class itself: {', '.join(words)}.")
    index = (0,) * len(stand_ins) + tuple(range(1, len(names)))
    return Classes(check_words(stand_ins + others, "background words"), index, names)


def of_benchmark(protocol: Eval, benchmark: Benchmark) -> Classes:
    """The classes of a benchmark; its background is found as the protocol says."""
    rule = background_rule(protocol, benchmark)
    lists = {"background26": published.background_words, "stuff91": published.stuff_words}
    given = protocol.background_words
    words = lists[given]() if given in lists else parse_words(given)
    return with_background(benchmark.words, rule, words, protocol.threshold)


def background_rule(protocol: Eval, benchmark: Benchmark) -> str:
    """ "words", "threshold" or "none"; "none" too where no class is the background."""
    if not benchmark.published or not benchmark.has_background:
        return "none"
    return benchmark.published.background if protocol.background == "auto" else protocol.background
