"""Images → features of all their windows, on every device; what was seen last is kept."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax import Array

from fmbseg_jax import config as config_lib
from fmbseg_jax.data import images, inputs
from fmbseg_jax.data.inputs import ImageLike
from fmbseg_jax.errors import UserError
from fmbseg_jax.methods.method import PatchMethod
from fmbseg_jax.parallel.forks import check_process
from fmbseg_jax.segmentation import batching
from fmbseg_jax.segmentation import layout as sliding
from fmbseg_jax.segmentation.cache import Recent

Key = TypeVar("Key")
RECENT_BYTES = 1 << 28
"""Room for what the model has seen in the last images: some 80 windows of 448 pixels."""


class Prepared(NamedTuple):
    """An image, ready for the encoder."""

    resized: np.ndarray
    """uint8 [H, W, 3]."""
    layout: sliding.Layout


class Looked(NamedTuple):
    """An image that the model has looked at, whatever words it may be compared with."""

    prepared: Prepared
    encoded: batching.Encoded[str]

    @property
    def size(self) -> int:
        """Bytes that it holds on to."""
        patches = sum(batch.nbytes for batch in self.encoded.batches)
        return patches + self.prepared.resized.nbytes


class _Placed:
    """The model's parameters by device, and the images that it has looked at last."""

    def __init__(self, params: Any):
        self.params = params
        self.recent: Recent[Looked] = Recent(RECENT_BYTES, lambda looked: looked.size)
        self._copies: dict[Any, Any] = {}
        self._lock = threading.Lock()

    def on(self, device: Any) -> Any:
        """The parameters, copied to a device once."""
        with self._lock:
            if device not in self._copies:
                self._copies[device] = jax.device_put(self.params, device)
            return self._copies[device]


class Looker:
    """A model that looks at images, before there are any words. Threads may share one."""

    def __init__(self, dense: PatchMethod, protocol: config_lib.Eval):
        """Raises UserError where windows are not made of whole patches."""
        if protocol.window % dense.patch:
            raise UserError(
                f"eval.window = {protocol.window} is not a multiple of the encoder's patch of "
                f"{dense.patch} pixels."
            )
        self._dense, self._eval = dense, protocol
        self._encode: Any = jax.jit(dense.apply)
        self._placed, self._lock = _Placed(dense.params), threading.Lock()
        self.reading = dataclasses.replace(protocol.reading, prefix="eval.")
        self._process = os.getpid()

    @property
    def compiled(self) -> int:
        """How many programs have been compiled, one for each shape and device."""
        return self._encode._cache_size()

    def prepare(self, given: ImageLike) -> Prepared:
        """Resizes an image and lays out its windows."""
        image = inputs.image(given, self.reading)
        protocol, (height, width) = self._eval, image.shape[:2]
        resize = images.resize if protocol.antialias else images.resize_plain
        resized = resize(image, images.resized_shape(height, width, protocol.short_side))
        return Prepared(resized, self.layout(resized.shape[:2], (height, width)))

    def layout(self, image: tuple[int, int], output: tuple[int, int]) -> sliding.Layout:
        """Of the windows in a resized image; `output` is the size of its label map."""
        window, side = self._eval.window, self._eval.window // self._dense.patch
        return sliding.Layout(image, window, self._eval.stride, (side, side), output)

    def look(self, image: np.ndarray) -> Looked:
        """What the model sees in an image [H, W, 3]; of the last ones, what it has seen."""
        placed = self._now()

        def look() -> Looked:
            one = self.prepare(image)
            # A power of two, so that few batches are compiled for single images.
            room = min(self._eval.batch_size, 1 << (one.layout.count - 1).bit_length())
            (encoded,) = batching.encode([("", one.layout.windows(one.resized))], room, self._run)
            return Looked(one, encoded)

        digest = hashlib.blake2b(image.data, digest_size=16).digest()
        return placed.recent.get((image.shape, digest), look)

    def each(
        self, prepared: Iterable[tuple[Key, Prepared]]
    ) -> Iterator[batching.Encoded[tuple[Key, Prepared]]]:
        """Looks at any number of images, in order; their windows share batches."""
        items = (((key, one), one.layout.windows(one.resized)) for key, one in prepared)
        return batching.encode(items, self._eval.batch_size, self._run)

    def _run(self, number: int, batch: np.ndarray) -> Array:
        """Features [b, h, w, D] of a batch of windows; the devices take batches in turn."""
        devices = jax.local_devices()
        device = devices[number % len(devices)]
        return self._encode(self._now().on(device), jax.device_put(batch, device))

    def _now(self) -> _Placed:
        """What belongs to the model's present parameters; validation exchanges them."""
        check_process(self._process)
        with self._lock:  # threads that come first are to share it
            if self._placed.params is not self._dense.params:
                self._placed = _Placed(self._dense.params)
            return self._placed
