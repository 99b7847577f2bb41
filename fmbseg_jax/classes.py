"""The classes that pixels are sorted into, and the words that stand for each."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping, Sequence

import numpy as np

from fmbseg_jax.config import Eval
from fmbseg_jax.data import published
from fmbseg_jax.data.benchmarks import Benchmark
from fmbseg_jax.errors import UserError
from fmbseg_jax.vocabulary import IGNORE, check_words, parse_words, synonyms

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
        return Classes(others.words, index, names, 0, threshold)
    known = {word.lower() for word in others.words}
    stand_ins = tuple(word for word in words if word.lower() not in known)
    if not stand_ins:
        raise UserError(f"Every background word is a class itself: {', '.join(words)}.")
    checked = check_words(stand_ins + others.words, "background words")
    return Classes(checked, (0,) * len(stand_ins) + index, names, 0)


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
