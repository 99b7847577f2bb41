"""The classes of a benchmark, and how its background is found."""

from __future__ import annotations

from collections.abc import Sequence

from fmbseg_jax.config import Eval
from fmbseg_jax.datasets import published
from fmbseg_jax.datasets.folder import Benchmark
from fmbseg_jax.errors import UserError
from fmbseg_jax.vocabulary import check_words, parse_words
from fmbseg_jax.vocabulary.classes import Classes


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
