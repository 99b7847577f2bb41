"""Segmenter: images and words → label maps."""

from __future__ import annotations

import collections
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np
from jax import Array

from fmbseg_jax import config as config_lib
from fmbseg_jax.data import inputs
from fmbseg_jax.data.images import Reading
from fmbseg_jax.data.inputs import ImageLike
from fmbseg_jax.encoders.text_features import text_features
from fmbseg_jax.errors import NotFiniteError, UserError
from fmbseg_jax.methods.method import PatchMethod
from fmbseg_jax.segmentation import batching
from fmbseg_jax.segmentation import layout as sliding
from fmbseg_jax.segmentation import similarities as comparing
from fmbseg_jax.segmentation.image_features import Looker, Prepared
from fmbseg_jax.segmentation.similarities import Compared
from fmbseg_jax.vocabulary import read_templates
from fmbseg_jax.vocabulary.classes import Background, Classes, Words

Key = TypeVar("Key")


class Segmentation(NamedTuple):
    """What was found in one image."""

    labels: np.ndarray
    """int32 [H, W], index into the words; IGNORE (65535) where the background is."""
    scores: np.ndarray
    """float32 [H, W], cosine similarity with that word, in [-1, 1]; of the background, with the
    best of its words, or of all words where a threshold decides."""


class Segmented(NamedTuple, Generic[Key]):
    """What was found in one of many images."""

    key: Key
    labels: np.ndarray
    """uint16 [H, W], class of each pixel."""
    refined: np.ndarray | None
    """The same after PAMR, with `eval.pamr`."""
    scores: np.ndarray | None
    """float32 [H, W], similarity of the best word (after PAMR, with that), where asked for."""
    compared: Array
    """[n, h, w, T], similarities of its windows with the words."""

    @property
    def final(self) -> np.ndarray:
        """Labels, refined where that is asked for."""
        return self.labels if self.refined is None else self.refined


class _Waiting(NamedTuple, Generic[Key]):
    """An image whose label map the device may still be working on."""

    key: Key
    windows: int
    compared: Compared
    found: sliding.Found
    refined: sliding.Found | None

    def segmented(self, classes: Classes) -> Segmented[Key]:
        labels, refined = (
            classes.labels(one.labels, one.best) if one else None
            for one in (self.found, self.refined)
        )
        assert labels is not None
        scores = (self.refined or self.found).best
        return Segmented(self.key, labels, refined, scores, self.compared.similarities)


class Segmenter:
    """A model and a text encoder, ready for any image and words.

    segmenter = fmbseg_jax.load("work/toy/export")
    labels = segmenter.segment("photo.jpg", ["sky", "grass", "sail boat"])

    Threads may share one. What the model has seen in the last images, and the features of words,
    are kept: other words for the same image cost a comparison, not a look at the image.
    """

    def __init__(self, dense: PatchMethod, clip: str, clip_hash: str, protocol: config_lib.Eval):
        """Raises UserError where windows are not made of whole patches.

        Args:
          dense: the model.
          clip: source of the CLIP whose text space the model's features are in.
          clip_hash: what its values are known by, as `identity.content_hash` gives it.
          protocol: sizes, windows and templates.
        """
        self.dense, self._eval = dense, protocol
        self._text, self._text_hash = text_features(clip), clip_hash
        self._templates = read_templates(protocol.template)
        self._looker = Looker(dense, protocol)
        self._text_of: Any = functools.lru_cache(16)(self._text_on)

    def __reduce__(self) -> Any:
        raise TypeError(
            "A Segmenter cannot be pickled or copied: it holds arrays on devices and compiled "
            "programs. Send the path of its export to the other process, and call "
            "fmbseg_jax.load(path) there."
        )

    @property
    def reading(self) -> Reading:
        """How image files are read."""
        return self._looker.reading

    @property
    def refines(self) -> bool:
        """Whether label maps are also refined by PAMR."""
        return self._eval.pamr > 0

    @property
    def window(self) -> int:
        """Side of the sliding window, in pixels of the resized image."""
        return self._eval.window

    @property
    def protocol(self) -> dict[str, Any]:
        """Beside the weights, what label maps depend on: fields of `Eval`, and the templates."""
        elsewhere = {"batch_size", "folder", "data", "template", "max_megapixels"}
        fields = {k: v for k, v in vars(self._eval).items() if k not in elsewhere}
        if fields["deep"] == "file":  # results of version 0.1 do not say it, and go on
            del fields["deep"]
        return {**fields, "templates": list(self._templates)}

    @property
    def weights_hash(self) -> str:
        """Hash of all weights."""
        return _hash((self.dense.fingerprint, self._text_hash))

    @property
    def fingerprint(self) -> str:
        """Differs between any two segmenters whose label maps may differ."""
        return _hash((self.weights_hash, self.protocol))

    def segment(self, image: ImageLike, words: Words, background: Background = None) -> np.ndarray:
        """The most similar word of each pixel.

        Args:
          image: uint8 [H, W, 3] in RGB, a Pillow image, or the path of an image file.
          words: K words or phrases; as a dict, `{"couch": ["sofa", "couch"]}`, K classes by their
            names, each with synonyms of which the best one counts.
          background: None, where every pixel is one of the words; words for what is none of them,
            `["wall", "floor"]`; or the cosine similarity that the best word has to reach, 0.2.

        Returns:
          int32 [H, W], indices into `words`; IGNORE (65535) where the background is.

        Raises:
          UserError: what was passed is no image, or no words; the message says what to pass.
        """
        labels, _ = self._found(image, Classes.of(words, background), with_scores=False)
        return labels

    def segment_with_scores(
        self, image: ImageLike, words: Words, background: Background = None
    ) -> Segmentation:
        """As `segment`, and how similar each pixel is to its word."""
        labels, scores = self._found(image, Classes.of(words, background), with_scores=True)
        assert scores is not None
        return Segmentation(labels, scores)

    def segment_batch(
        self, images: Iterable[ImageLike], words: Words, background: Background = None
    ) -> Iterator[Segmentation]:
        """As `segment_with_scores` for many images of any sizes, in order, as they get done.

        The windows of several images share a batch, and all devices of this host take part.
        """
        if isinstance(images, ImageLike) and getattr(images, "ndim", 3) == 3:
            raise UserError("segment_batch takes several images: pass [image], or call segment.")
        return self._batch(images, Classes.of(words, background))

    def _batch(self, images: Iterable[ImageLike], classes: Classes) -> Iterator[Segmentation]:
        prepared = ((i, self.prepare(image)) for i, image in enumerate(images))
        for found in self.label_maps(prepared, classes, with_scores=True):
            assert found.scores is not None
            yield Segmentation(found.final.astype(np.int32), found.scores)

    def similarities(self, image: ImageLike, words: Words) -> np.ndarray:
        """Cosine similarity of each pixel with each word, float32 [H, W, K], in [-1, 1].

        Of a class with synonyms, that of the best.
        """
        classes = Classes.of(words)
        looked = self._looker.look(inputs.image(image, self.reading))
        compared = self._compare(looked.encoded, classes)
        self._check(compared)
        return comparing.by_pixel(looked.prepared.layout, compared.similarities, classes)

    def _found(
        self, image: ImageLike, classes: Classes, *, with_scores: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Labels int32 [H, W] of one image, refined where results are, and their scores."""
        one, encoded = self._looker.look(inputs.image(image, self.reading))
        with_best = with_scores or classes.threshold is not None
        compared = self._compare(encoded, classes)
        found = self._refined(one, compared.similarities, with_best)
        found = found or one.layout.segment(compared.similarities, with_best=with_best)
        self._check(compared)
        return classes.labels(found.labels, found.best).astype(np.int32), found.best

    def _refined(self, one: Prepared, compared: Array, with_best: bool) -> sliding.Found | None:
        """What PAMR makes of an image, where it is asked for."""
        if not self.refines:
            return None
        return one.layout.segment_refined(
            compared, one.resized, self._eval.pamr, with_best=with_best
        )

    def text(self, words: Sequence[str]) -> np.ndarray:
        """Unit features of words, float32 [T, D], by the protocol's templates."""
        return self._text(words, self._templates, plain=self._eval.average == "plain")

    def layout(self, size: tuple[int, int]) -> sliding.Layout:
        """Of the windows in an image of (H, W) pixels that is taken as it is, not resized."""
        return self._looker.layout(size, size)

    def prepare(self, image: ImageLike) -> Prepared:
        """An image, resized and laid out in windows, for `label_maps`."""
        return self._looker.prepare(image)

    def label_maps(
        self,
        prepared: Iterable[tuple[Key, Prepared]],
        classes: Classes,
        *,
        with_scores: bool = False,
    ) -> Iterator[Segmented[Key]]:
        """Segments any number of images, in order.

        The windows of several images share a batch, and the devices of this host take batches in
        turn; results come late enough for all of them to have something to do.
        """
        enough = 2 * self._eval.batch_size * len(jax.local_devices())
        with_best = with_scores or classes.threshold is not None
        waiting: collections.deque[_Waiting[Key]] = collections.deque()
        for encoded in self._looker.each(prepared):
            key, one = encoded.key
            compared = self._compare(encoded, classes)
            refined = self._refined(one, compared.similarities, with_best)
            found = one.layout.segment(compared.similarities, with_best=with_best)
            waiting.append(_Waiting(key, one.layout.count, compared, found, refined))
            while sum(other.windows for other in waiting) > enough:
                yield self._finished(waiting.popleft(), classes)
        while waiting:
            yield self._finished(waiting.popleft(), classes)

    def _finished(self, waiting: _Waiting[Key], classes: Classes) -> Segmented[Key]:
        self._check(waiting.compared)
        return waiting.segmented(classes)

    def _check(self, compared: Compared) -> None:
        """Raises NotFiniteError where NaN would make the first word of every pixel."""
        if not compared.finite:
            raise NotFiniteError.of("The model", self._eval.compute)

    def _compare(self, encoded: batching.Encoded[Any], classes: Classes) -> Compared:
        """An image's windows, compared with the words."""
        return comparing.compare(encoded, lambda device: self._text_of(classes.words, device))

    def _text_on(self, words: tuple[str, ...], device: Any) -> Array:
        return jax.device_put(self.text(words), device)


def _hash(facts: Any) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def compiled(segmenters: Iterable[Segmenter]) -> int:
    """How many programs these have compiled, each for one shape on one device."""
    encoders = sum(segmenter._looker.compiled for segmenter in segmenters)
    return encoders + comparing.compiled() + sliding.compiled()
