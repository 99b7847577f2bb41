"""Segmenter: images and words → label maps."""

from __future__ import annotations

import collections
import functools
import hashlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmbseg_jax import config as config_lib
from fmbseg_jax import sliding, windows
from fmbseg_jax.classes import Classes
from fmbseg_jax.data import images
from fmbseg_jax.dense import Dense
from fmbseg_jax.errors import UserError
from fmbseg_jax.models import weights
from fmbseg_jax.similarity import similarities
from fmbseg_jax.text import text_features
from fmbseg_jax.vocabulary import read_templates

Key = TypeVar("Key")


class Prepared(NamedTuple):
    """An image, ready for the encoder."""

    resized: np.ndarray
    """uint8 [H, W, 3]."""
    layout: sliding.Layout


class Segmented(NamedTuple, Generic[Key]):
    """What was found in one image."""

    key: Key
    labels: np.ndarray
    """uint16 [H, W], class of each pixel."""
    refined: np.ndarray | None
    """The same after PAMR, with `eval.pamr`."""


class _Waiting(NamedTuple, Generic[Key]):
    """An image whose label map the device may still be working on."""

    key: Key
    windows: int
    found: sliding.Found
    refined: sliding.Found | None

    def segmented(self, classes: Classes) -> Segmented[Key]:
        labels, refined = (
            classes.labels(one.labels, one.best) if one else None
            for one in (self.found, self.refined)
        )
        assert labels is not None
        return Segmented(self.key, labels, refined)


class Segmenter:
    """A model and a text encoder, ready for any image and words.

    segmenter = fmbseg_jax.load("work/toy/export")
    labels = segmenter.segment(image, ["sky", "grass", "sail boat"])
    """

    def __init__(self, dense: Dense, clip: str, protocol: config_lib.Eval):
        """Raises UserError where windows are not made of whole patches.

        Args:
          dense: the model.
          clip: source of the CLIP whose text space the model's features are in.
          protocol: sizes, windows and templates.
        """
        self.dense, self._eval = dense, protocol
        self._text, self._text_hash = text_features(clip), weights.content_hash(clip)
        if protocol.window % dense.patch:
            raise UserError(
                f"eval.window = {protocol.window} is not a multiple of the encoder's patch of "
                f"{dense.patch} pixels."
            )
        self._templates = read_templates(protocol.template)
        self._encode: Any = jax.jit(dense.apply)
        self._placed: tuple[Any, dict[Any, Any]] = (None, {})
        _SEGMENTERS.add(self)

    @property
    def refines(self) -> bool:
        """Whether label maps are also refined by PAMR."""
        return self._eval.pamr > 0

    @property
    def fingerprint(self) -> str:
        """Differs between any two segmenters whose label maps may differ."""
        elsewhere = {"batch_size", "folder", "data", "template"}
        protocol = {k: v for k, v in vars(self._eval).items() if k not in elsewhere}
        facts = repr((self.dense.fingerprint, self._text_hash, protocol, self._templates))
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    def segment(self, image: np.ndarray, words: Sequence[str]) -> np.ndarray:
        """The most similar word of each pixel.

        Args:
          image: uint8 [H, W, 3], RGB.
          words: K words or phrases.

        Returns:
          int32 [H, W], indices into `words`.
        """
        one = self.prepare(image)
        (found,) = self.label_maps([("", one)], Classes.of(words), self._room(one))
        return (found.labels if found.refined is None else found.refined).astype(np.int32)

    def similarities(self, image: np.ndarray, words: Sequence[str]) -> np.ndarray:
        """Cosine similarity of each pixel with each word, float32 [H, W, K], in [-1, 1]."""
        one, classes = self.prepare(image), Classes.of(words)
        ((_, _, found),) = self._similarities([("", one)], classes, self._room(one))
        return classes.best(np.asarray(one.layout.stitch(found)))

    def _room(self, one: Prepared) -> int:
        """The batch for the windows of one image: a power of two, so that few are compiled."""
        return min(self._eval.batch_size, 1 << (one.layout.count - 1).bit_length())

    def prepare(self, image: np.ndarray) -> Prepared:
        """Resizes an image, uint8 [H, W, 3] in RGB, and lays out its windows."""
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UserError(
                f"An image is a uint8 array [H, W, 3], RGB in [0, 255]; got {image.dtype} "
                f"{list(image.shape)}. fmbseg_jax.data.images.decode reads any image file so."
            )
        protocol, (height, width) = self._eval, image.shape[:2]
        resize = images.resize if protocol.antialias else images.resize_plain
        resized = resize(image, images.resized_shape(height, width, protocol.short_side))
        side = protocol.window // self.dense.patch
        layout = sliding.Layout(
            resized.shape[:2], protocol.window, protocol.stride, (side, side), (height, width)
        )
        return Prepared(resized, layout)

    def label_maps(
        self, prepared: Iterable[tuple[Key, Prepared]], classes: Classes, batch_size: int = 0
    ) -> Iterator[Segmented[Key]]:
        """Segments any number of images, in order.

        The windows of several images share a batch, and the devices of this host take batches in
        turn; results come late enough for all of them to have something to do.

        Args:
          batch_size: in place of that of the protocol.
        """
        batch_size = batch_size or self._eval.batch_size
        enough = 2 * batch_size * len(jax.local_devices())
        with_best = classes.threshold is not None
        waiting: collections.deque[_Waiting[Key]] = collections.deque()
        for key, one, found in self._similarities(prepared, classes, batch_size):
            refined = None
            if self.refines:
                refined = one.layout.segment_refined(
                    found, one.resized, self._eval.pamr, with_best=with_best
                )
            labels = one.layout.segment(found, with_best=with_best)
            waiting.append(_Waiting(key, one.layout.count, labels, refined))
            while sum(other.windows for other in waiting) > enough:
                yield waiting.popleft().segmented(classes)
        while waiting:
            yield waiting.popleft().segmented(classes)

    def _similarities(
        self, prepared: Iterable[tuple[Key, Prepared]], classes: Classes, batch_size: int
    ) -> Iterator[tuple[Key, Prepared, Array]]:
        """With each image the similarities of its windows with the words, [n, h, w, T]."""
        devices = jax.local_devices()
        plain = self._eval.average == "plain"
        text = self._text(classes.words, self._templates, plain=plain)
        text_on = functools.cache(lambda device: jax.device_put(text, device))

        def run(number: int, batch: np.ndarray) -> Array:
            device = devices[number % len(devices)]
            return self._encode(self._params_on(device), jax.device_put(batch, device))

        items = (((key, one), one.layout.windows(one.resized)) for key, one in prepared)
        for encoded in windows.encode(items, batch_size, run):
            (device,) = encoded.batches[-1].devices()
            batches = [jax.device_put(batch, device) for batch in encoded.batches]
            if len(batches) == 1:  # or each number of windows would be compiled twice
                batches *= 2
            yield *encoded.key, _compare(batches, encoded.index, text_on(device))

    def _params_on(self, device: Any) -> Any:
        """The model's parameters, copied to a device once."""
        if self._placed[0] is not self.dense.params:
            self._placed = self.dense.params, {}
        copies = self._placed[1]
        if device not in copies:
            copies[device] = jax.device_put(self.dense.params, device)
        return copies[device]


def _with_words(batches: list[Array], index: Array, text: Array) -> Array:
    """Similarities with the words of one image's windows, picked out of their batches."""
    size = len(batches[0])
    picked = batches[0][index % size]
    for i, batch in enumerate(batches[1:], 1):
        here = (index // size == i)[:, None, None, None]
        picked = jnp.where(here, batch[index % size], picked)
    return similarities(picked, text)


_compare: Any = jax.jit(_with_words)


def compiled() -> int:
    """How many programs segmenters have compiled, each for one shape on one device."""
    encoders = sum(segmenter._encode._cache_size() for segmenter in _SEGMENTERS)
    return encoders + _compare._cache_size() + sliding.compiled()


_SEGMENTERS: weakref.WeakSet[Segmenter] = weakref.WeakSet()
