"""A segmenter for given words and one size of image, as a program that runs without this package.

`jax.export` writes it as StableHLO, with all weights in it. Any number of images at once, on a CPU,
an NVIDIA GPU or a TPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flatbuffers.builder import BuilderSizeError
from jax import Array

from fmbseg_jax.errors import UserError
from fmbseg_jax.methods.method import PatchMethod
from fmbseg_jax.nn.similarity import similarities
from fmbseg_jax.segmentation.layout import Layout
from fmbseg_jax.vocabulary.classes import Classes

PLATFORMS = "cpu", "cuda", "tpu"


def similarity_function(
    dense: PatchMethod, layout: Layout, text: np.ndarray, classes: Classes
) -> Callable[[Array], Array]:
    """uint8 [b, H, W, 3] → float32 [b, H, W, K], as `Segmenter.similarities`, without resizing.

    Args:
      layout: of the windows in an image of H × W.
      text: float32 [T, D], of the words of `classes`.
    """
    side = layout.window
    rows, columns = layout.starts
    members = [
        [i for i, label in enumerate(classes.index) if label == k]
        for k in range(len(classes.names))
    ]

    def function(images: Array) -> Array:
        windows = [images[:, y : y + side, x : x + side] for y in rows for x in columns]
        features = dense.apply(dense.params, jnp.concatenate(windows))
        compared = similarities(features, jnp.asarray(text))
        by_window = compared.reshape(len(windows), images.shape[0], *compared.shape[1:])
        pixels = jax.vmap(layout.stitch, in_axes=1)(by_window)
        return jnp.stack([pixels[..., np.asarray(some)].max(-1) for some in members], axis=-1)

    return function


def serialise(
    function: Callable[[Array], Array],
    size: tuple[int, int],
    platforms: Sequence[str] = PLATFORMS,
) -> bytes:
    """The function of images [b, *size, 3], for any b, as `jax.export.deserialize` reads it.

    Raises:
      UserError: the weights are too large for the format.
    """
    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *size, 3), jnp.uint8)
    exported = jax.export.export(jax.jit(function), platforms=platforms)(images)
    try:
        return bytes(exported.serialize())
    except BuilderSizeError:
        raise UserError(
            "The model is over the 2 GB that a StableHLO file holds. --compute=bfloat16 halves it."
        ) from None
