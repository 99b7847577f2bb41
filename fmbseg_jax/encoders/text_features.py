"""Words → unit text features, the prototypes t_k of section 3.3."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmbseg_jax.encoders import identity, loading
from fmbseg_jax.errors import NotFiniteError
from fmbseg_jax.io.files import remove_abandoned, write_atomically
from fmbseg_jax.parallel.forks import check_process
from fmbseg_jax.vocabulary import TEMPLATE, prompts, synonyms

_BATCH = 8  # sentences encoded at once: of one new word, little is padding
_KEPT = 20_000  # sentences in memory; those of a visitor's page would else grow without end
_ROUND = 8  # lengths are rounded up to a multiple, so that few shapes are compiled


class TextFeatures:
    """CLIP's text tower, ready to turn words into features.

    Features are kept in memory, and on disk by the hash of the weights and of the sentence, in
    $FMBSEG_CACHE or ~/.cache/fmbseg_jax, where there is a home folder. The tower is loaded when a
    sentence is new. Threads may share one.
    """

    def __init__(self, source: str):
        self._source, self._lock = source, threading.Lock()
        self._process = os.getpid()
        cache, content = _cache_folder(), identity.content_hash(source)
        self._folder = cache / "sentences" / content if cache else None
        self._known: dict[str, np.ndarray] = {}

    @functools.cached_property
    def width(self) -> int:
        """D, width of the text space."""
        return loading.text_spec(self._source).output

    def __call__(
        self, words: Sequence[str], template: str | Sequence[str] = TEMPLATE, *, plain: bool = False
    ) -> np.ndarray:
        """Unit features float32 [K, D] of the words, each put into the template.

        Of several templates the features are made unit length, averaged, and made so again (as in
        SCLIP and its family); with `plain` they are averaged as they come from CLIP (as in TCL). A
        word with synonyms, `sofa;couch`, gets the mean of their features, at unit length again.
        """
        check_process(self._process)
        templates = [template] if isinstance(template, str) else template
        names = [synonyms(word) for word in words]
        sentences = {
            name: [prompts([name], one)[0] for one in templates] for some in names for name in some
        }
        wanted = dict.fromkeys(sum(sentences.values(), []))
        with self._lock:  # the tokenizer is not for several threads
            self._look_up(wanted)
            known = {sentence: self._known[sentence] for sentence in wanted}
            while len(self._known) > _KEPT:
                del self._known[next(iter(self._known))]

        def feature(name: str) -> np.ndarray:
            found = np.stack([known[sentence] for sentence in sentences[name]])
            return _unit(np.mean(found if plain else _unit(found), axis=0))

        means = [np.mean([feature(name) for name in some], axis=0) for some in names]
        return _unit(np.stack(means)).astype(np.float32)

    def _look_up(self, sentences: Iterable[str]) -> None:
        """Afterwards `_known` has them all."""
        new = [sentence for sentence in sentences if not self._remembered(sentence)]
        for start in range(0, len(new), _BATCH):
            batch = new[start : start + _BATCH]
            for sentence, feature in zip(batch, self._encode(batch), strict=True):
                self._remember(sentence, feature)

    @functools.cached_property
    def _tower(self) -> tuple[loading.TextEncoder, Any, Any, Any]:
        module, params, tokenizer = loading.load_text(self._source)
        apply = jax.jit(lambda params, ids: module.apply({"params": params}, ids))
        return module, params, tokenizer, apply

    def _encode(self, sentences: Sequence[str]) -> np.ndarray:
        module, params, tokenizer, apply = self._tower
        rows = tokenizer(sentences)
        longest = max(map(len, rows))
        length = min(-(-longest // _ROUND) * _ROUND, module.spec.length)
        padded = np.full((_BATCH, length), module.spec.end, np.int32)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        features = np.asarray(apply(params, jnp.asarray(padded)))[: len(rows)]
        if not np.isfinite(features).all():
            raise NotFiniteError.of(f"The text encoder of {self._source}", "float32")
        return features

    def _path(self, folder: Path, sentence: str) -> Path:
        return folder / f"{hashlib.sha256(sentence.encode()).hexdigest()[:32]}.feature"

    def _remembered(self, sentence: str) -> bool:
        """Whether the feature is in memory, after a look at the disk."""
        if sentence not in self._known:
            if self._folder is None:
                return False
            try:
                feature = _unsealed(self._path(self._folder, sentence), self.width)
            except OSError:
                return False
            if feature is None:
                return False
            self._known[sentence] = feature
        return True

    def _remember(self, sentence: str, feature: np.ndarray) -> None:
        self._known[sentence] = feature
        if self._folder is None:
            return
        with contextlib.suppress(OSError):  # a cache that is not written costs time, not results
            write_atomically(self._path(self._made_folder, sentence), _sealed(feature))

    @functools.cached_property
    def _made_folder(self) -> Path:
        """The folder, made, without what killed processes have left unfinished there."""
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self._folder, alone=False)
        return self._folder


def _sealed(feature: np.ndarray) -> bytes:
    """A feature float32 [D] as it is kept on disk: a digest of its bytes, and these."""
    data = np.asarray(feature, "<f4").tobytes()
    return _digest(data) + data


def _unsealed(path: Path, width: int) -> np.ndarray | None:
    """A feature float32 [width] of the disk; None where it is not what was written."""
    contents = path.read_bytes()
    seal, data = contents[:_SEAL], contents[_SEAL:]
    if len(data) != 4 * width or _digest(data) != seal:
        return None
    return np.frombuffer(data, "<f4").astype(np.float32)


_SEAL = 16  # bytes of the digest


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:_SEAL]


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def _cache_folder() -> Path | None:
    """None where there is no home folder: then features are kept in memory alone."""
    if given := os.environ.get("FMBSEG_CACHE"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "fmbseg_jax"
    except RuntimeError:
        return None


def text_features(source: str) -> TextFeatures:
    """One `TextFeatures` in a process for each source, as long as its files are the same."""
    return _text_features(source, identity.content_hash(source))


@functools.cache
def _text_features(source: str, content: str) -> TextFeatures:
    return TextFeatures(source)
