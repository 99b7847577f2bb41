"""PAMR, pixel-adaptive mask refinement (Araslanov and Roth, CVPR 2020): no parameters, no training.

Each pixel takes the mean of its neighbours' similarities, weighted by how alike their colours are:
w = softmax over neighbours of -mean over channels of |x_j - x_i| / (0.1 σ_i), where σ_i is the
deviation of the colours around i. Neighbours lie at several distances; beyond the border the
nearest pixel stands in. Published results use 10 iterations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

DILATIONS = (1, 2, 4, 8, 12, 24)
"""Distances of the neighbours, in pixels."""
_REACH = max(DILATIONS)
_EIGHT = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
_NEIGHBOURS = [(d * y, d * x) for d in DILATIONS for y, x in _EIGHT]

Index: TypeAlias = tuple[Int[Array, "h_around"], Int[Array, "w_around"]]
"""For every row of an image and `_REACH` more on either side, the row that stands there; and the
same of columns."""


def around(size: Sequence[int], canvas: Sequence[int]) -> Index:
    """The index of an image (H, W) that lies in the corner of a canvas (h, w)."""
    rows, columns = (
        jnp.clip(jnp.arange(-_REACH, long + _REACH, dtype=jnp.int32), 0, length - 1)
        for length, long in zip(size, canvas, strict=True)
    )
    return rows, columns


@jax.jit
def affinity(image: Float[Array, "h w 3"], index: Index) -> Float[Array, "n h w"]:
    """The weights of each pixel's neighbours; they sum to 1 over the first axis."""
    planes = image.transpose(2, 0, 1)
    wide = _widened(planes, index)
    others = [_shifted(wide, *step) for step in _NEIGHBOURS]
    # The window of every dilation counts its centre.
    count, centres = 9 * len(DILATIONS), len(DILATIONS)
    mean = (sum(others) + centres * planes) / count
    squares = sum((other - mean) ** 2 for other in others) + centres * (planes - mean) ** 2
    scale = 1e-8 + 0.1 * jnp.sqrt(squares / (count - 1))
    unlike = [jnp.mean(jnp.abs(other - planes) / scale, axis=0) for other in others]
    return jax.nn.softmax(-jnp.stack(unlike), axis=0)


def refine(
    similarities: Float[Array, "c h w"],
    weights: Float[Array, "n h w"],
    index: Index,
    iterations: int,
) -> Float[Array, "c h w"]:
    """`iterations` weighted means over the neighbours."""

    def once(_: int, masks: Array) -> Array:
        wide = _widened(masks, index)
        terms = zip(weights, _NEIGHBOURS, strict=True)
        return sum(
            (weight * _shifted(wide, *step) for weight, step in terms), jnp.zeros((), masks.dtype)
        )

    return jax.lax.fori_loop(0, iterations, once, similarities)


def _widened(planes: Array, index: Index) -> Array:
    """[c, h, w] → with the nearest pixel of the image wherever there is none, on all sides."""
    rows, columns = index
    return jnp.take(jnp.take(planes, rows, axis=1), columns, axis=2)


def _shifted(wide: Array, y: int, x: int) -> Array:
    """[c, h, w]: of each pixel the one `y` below and `x` to the right."""
    height, width = (size - 2 * _REACH for size in wide.shape[1:])
    return wide[:, _REACH + y : _REACH + y + height, _REACH + x : _REACH + x + width]
