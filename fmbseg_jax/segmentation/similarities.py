"""Features of an image's windows × words → similarities, of its windows and of its pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmbseg_jax.nn.similarity import similarities
from fmbseg_jax.segmentation.batching import Encoded
from fmbseg_jax.segmentation.layout import Layout
from fmbseg_jax.vocabulary.classes import Classes


class Compared(NamedTuple):
    """An image's windows, compared with T words."""

    similarities: Array
    """[n, h, w, T]."""
    finite: Array
    """bool [], whether none of them is NaN or infinite."""


def compare(encoded: Encoded[Any], text_on: Callable[[Any], Array]) -> Compared:
    """Compares an image's windows with T words.

    Args:
      text_on: the words' features [T, D] on a device.
    """
    (device,) = encoded.batches[-1].devices()
    batches = [jax.device_put(batch, device) for batch in encoded.batches]
    if len(batches) == 1:  # or each number of windows would be compiled twice
        batches *= 2
    return _compare(batches, encoded.index, text_on(device))


def by_pixel(
    layout: Layout, compared: Array, classes: Classes, dtype: Any = np.float32
) -> np.ndarray:
    """Similarities of an image's windows with the words, [n, h, w, T], to those of its pixels with
    the classes, [H, W, K]: each with its best word."""
    found = np.full((*layout.output, len(classes.names)), -1, dtype)
    for i in range(0, len(classes.words), _AT_ONCE):
        some = np.asarray(layout.stitch(compared[..., i : i + _AT_ONCE]))
        for label, similarity in zip(classes.index[i:], np.moveaxis(some, -1, 0), strict=False):
            if label < len(classes.names):
                np.maximum(found[..., label], similarity.astype(dtype), out=found[..., label])
    return found


_AT_ONCE = 8  # words brought to the pixels; all of them, in float32, would be twice the result


def _with_words(batches: list[Array], index: Array, text: Array) -> Compared:
    """One image's windows, picked out of their batches, compared with the words."""
    size = len(batches[0])
    picked = batches[0][index % size]
    for i, batch in enumerate(batches[1:], 1):
        here = (index // size == i)[:, None, None, None]
        picked = jnp.where(here, batch[index % size], picked)
    found = similarities(picked, text)
    return Compared(found, jnp.all(jnp.isfinite(found)))


_compare: Any = jax.jit(_with_words)


def compiled() -> int:
    """How many programs have been compiled here, for one shape on one device each."""
    return _compare._cache_size()
