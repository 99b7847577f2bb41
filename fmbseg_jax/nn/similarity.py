"""Patches × words → similarities → pixels (section 3.3, "Deployment")."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def similarities(patches: Float[Array, "*s D"], text: Float[Array, "K D"]) -> Float[Array, "*s K"]:
    """Cosine similarity of each patch with each word; both are unit vectors."""
    exact = jax.lax.Precision.HIGHEST if text.dtype == jnp.float32 else None
    return jnp.matmul(patches, text.T, precision=exact)


def product(a: Float[Array, "n m"], b: Float[Array, "m k"]) -> Float[Array, "n k"]:
    """a b in the dtype of b, summed in float32 or more; float32 is not rounded (TF32, bfloat16)."""
    exact = jax.lax.Precision.HIGHEST if b.dtype == jnp.float32 else None
    return jnp.matmul(a.astype(b.dtype), b, precision=exact, preferred_element_type=sum_dtype(b))


def sum_dtype(x: Array) -> Any:
    """What numbers like x are summed in."""
    return jnp.promote_types(jnp.float32, x.dtype)


def bilinear(inputs: int, outputs: int) -> np.ndarray:
    """Matrix float32 [outputs, inputs] of bilinear interpolation along one axis.

    As torch's `F.interpolate(mode="bilinear", align_corners=False)`: half-pixel centres, borders
    repeat, no antialiasing.
    """
    centre = np.clip((np.arange(outputs) + 0.5) * (inputs / outputs) - 0.5, 0, inputs - 1)
    below = np.floor(centre).astype(int)
    above = np.minimum(below + 1, inputs - 1)
    part = (centre - below).astype(np.float32)
    matrix = np.zeros((outputs, inputs), np.float32)
    np.add.at(matrix, (np.arange(outputs), below), 1 - part)
    np.add.at(matrix, (np.arange(outputs), above), part)
    return matrix
