"""Words → unit text features, the prototypes t_k of section 3.3."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fmbseg_jax.models import encoders
from fmbseg_jax.models.aligner import unit
from fmbseg_jax.vocabulary import TEMPLATE, prompts

_BATCH = 32  # sentences encoded at once
_ROUND = 8  # lengths are rounded up to a multiple, so that few shapes are compiled


class TextFeatures:
    """CLIP's text tower, ready to turn words into features; remembers what it has encoded."""

    def __init__(self, source: str):
        self.module, self._params, self._tokenizer = encoders.load_text(source)
        self._encode = jax.jit(lambda params, ids: unit(self.module.apply({"params": params}, ids)))
        self._known: dict[tuple[str, str], np.ndarray] = {}

    @property
    def width(self) -> int:
        """D, width of the text space."""
        return self.module.spec.output

    def __call__(self, words: Sequence[str], template: str = TEMPLATE) -> np.ndarray:
        """Unit features float32 [K, D] of the words, each put into the template."""
        new = [word for word in dict.fromkeys(words) if (word, template) not in self._known]
        for start in range(0, len(new), _BATCH):
            batch = new[start : start + _BATCH]
            for word, feature in zip(batch, self._features(batch, template), strict=True):
                self._known[word, template] = feature
        return np.stack([self._known[word, template] for word in words])

    def _features(self, words: Sequence[str], template: str) -> np.ndarray:
        sentences = prompts(words, template)
        ids = self._tokenizer(sentences, truncation=True, max_length=self.module.spec.length)
        longest = max(len(row) for row in ids["input_ids"])
        length = min(-(-longest // _ROUND) * _ROUND, self.module.spec.length)
        padded = np.full((_BATCH, length), self.module.spec.end, np.int32)
        for i, row in enumerate(ids["input_ids"]):
            padded[i, : len(row)] = row
        return np.asarray(self._encode(self._params, jnp.asarray(padded)))[: len(words)]


@functools.cache
def text_features(source: str) -> TextFeatures:
    """One `TextFeatures` for each source in a process."""
    return TextFeatures(source)
