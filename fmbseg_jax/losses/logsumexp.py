"""The log-sum-exp over all pairs of a batch, in memory linear in the batch, on one device or many.

s_ij = z_i · z_j / τ is symmetric, and both passes use it: pairs computed once serve their rows and
their columns. The blocks of a device's vectors stand in a circle; each meets itself and the half of
the circle that follows, so that every two meet once. The devices do the same (`rings.half_ring`).

Backward: ∂/∂Z Σ_i g_i lse_i = W Z / τ with W_ij = exp(s_ij) (g_i exp(-lse_i) + g_j exp(-lse_j)).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from fmbseg_jax.losses import logsumexp_by_row
from fmbseg_jax.nn.similarity import product, sum_dtype
from fmbseg_jax.parallel import ring

_BLOCK = 320
"""Rows: with half of the paper's 5,120 patches they make 3 MB, which stay in a CPU's cache."""

_STRIPS = 3
"""Of a block with the half that follows: fewer are faster, and hold more of the vectors twice."""

_SHIFTABLE = 0.03
"""From this temperature on exp(s - 1/τ) of unit vectors is in float32's range, whatever s: one
exponential serves row and column. Below, each row is shifted by its own maximum (pairs_by_row)."""


def logsumexp(
    vectors: Float[Array, "M D"],
    valid: Bool[Array, " M"],
    temperature: float,
    block_size: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, " M"]:
    """log Σ_{j≠i, valid j} exp(z_i · z_j / τ) for each vector i; -inf where there is no other.

    Args:
      vectors: z, of unit length; with `axis_name` this device's share.
      valid: which take part.
      temperature: τ.
      block_size: rows of the matrix of pairs computed at once.
      axis_name: of the mesh that `vectors` are split over, under `jax.shard_map`.
    """
    return _logsumexp(vectors, valid, float(temperature), block_size or _BLOCK, axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _logsumexp(z, valid, temperature, block_size, axis_name):  # type: ignore[no-untyped-def]
    return _forward(z, valid, temperature, block_size, axis_name)[0]


def _forward(z, valid, temperature, block_size, axis_name):  # type: ignore[no-untyped-def]
    make = _sums if temperature >= _SHIFTABLE else logsumexp_by_row.sums
    sums = make(z, valid, temperature, block_size, axis_name)
    return sums, (z, valid, sums)


def _backward(temperature, block_size, axis_name, residuals, gradient):  # type: ignore[no-untyped-def]
    make = _gradient if temperature >= _SHIFTABLE else logsumexp_by_row.gradient
    z, valid, sums = residuals
    result = make(z, valid, sums, gradient, temperature, block_size, axis_name)
    return result.astype(z.dtype), np.zeros(valid.shape, jax.dtypes.float0)


_logsumexp.defvjp(_forward, _backward)


class _Vectors(NamedTuple):
    """What the pairs are made of."""

    z: Float[Array, "m D"]
    valid: Float[Array, " m"]
    """1 or 0."""
    share: Float[Array, " m"]
    """g_i exp(1/τ - lse_i), in the backward pass."""

    def window(self, start: Array, size: int) -> _Vectors:
        return _Vectors(*(jax.lax.dynamic_slice_in_dim(x, start, size) for x in self))

    def padded(self, size: int) -> _Vectors:
        def pad(x: Array) -> Array:
            return jnp.pad(x, [(0, size - len(x))] + [(0, 0)] * (x.ndim - 1))

        return _Vectors(*map(pad, self))


_Meeting = Callable[[_Vectors, _Vectors, Array | None], tuple[Array, Array]]
"""From rows, columns and, where the first columns are the rows themselves, a factor of these pairs,
to what the rows get and what the columns get."""


def _sums(z, valid, temperature, block_size, axis_name):  # type: ignore[no-untyped-def]
    weights = valid.astype(sum_dtype(z))

    def meet(rows: _Vectors, columns: _Vectors, own: Array | None) -> tuple[Array, Array]:
        pairs = _exponentials(rows, columns, temperature, own)
        return pairs @ columns.valid, rows.valid @ pairs

    vectors = _Vectors(z, weights, weights)
    sums = _everybody(vectors, meet, _zeros_of(weights), block_size, axis_name)
    return jnp.where(sums > 0, jnp.log(jnp.where(sums > 0, sums, 1)), -jnp.inf) + 1 / temperature


def _gradient(z, valid, sums, gradient, temperature, block_size, axis_name):  # type: ignore[no-untyped-def]
    weights = valid.astype(sum_dtype(z))
    share = jnp.where(jnp.isfinite(sums), gradient * jnp.exp(1 / temperature - sums), 0)

    def meet(rows: _Vectors, columns: _Vectors, own: Array | None) -> tuple[Array, Array]:
        shares = rows.share[:, None] * columns.valid + rows.valid[:, None] * columns.share
        pairs = _exponentials(rows, columns, temperature, own) * shares
        return product(pairs, columns.z), product(pairs.T, rows.z)

    vectors = _Vectors(z, weights, share)
    start = _zeros_of(z).astype(weights.dtype)
    return _everybody(vectors, meet, start, block_size, axis_name) / temperature


def _exponentials(
    rows: _Vectors, columns: _Vectors, temperature: float, own: Array | None
) -> Array:
    """exp(s_ij - 1/τ), times the factor of a block's own pairs."""
    pairs = jnp.exp((product(rows.z, columns.z.T) - 1) / temperature)
    if own is None:
        return pairs
    # Padded, not pairs.at[...].multiply: at that XLA of jaxlib 0.11 crashes under shard_map.
    return pairs * jnp.pad(own, [(0, 0), (0, pairs.shape[1] - len(own))], constant_values=1)


def _everybody(
    vectors: _Vectors, meet: _Meeting, zeros: Array, block_size: int, axis_name: str | None
) -> Array:
    """What the vectors get from all pairs, of this device and the others."""
    mine = _among(vectors, meet, zeros, block_size)

    def others(theirs: _Vectors) -> tuple[Array, Array]:
        return _between(vectors, theirs, meet, zeros, block_size)

    return ring.half_ring(mine, vectors, others, axis_name)


def _among(vectors: _Vectors, meet: _Meeting, zeros: Array, block_size: int) -> Array:
    """What the vectors get from the pairs among themselves."""
    size = len(vectors.z)
    group = -(-(_blocks(size, block_size)[0] + 1) // (2 * _STRIPS))
    count = 2 * _STRIPS * group - 1  # odd: the half that follows a block is the same for all
    rows, reach = -(-size // count), (group - 1) * -(-size // count)
    circle = jax.tree.map(lambda x: _wrapped(x, reach), vectors.padded(count * rows))
    own = (1 - jnp.eye(rows, dtype=zeros.dtype)) / 2  # a block meets itself as rows and as columns

    def step(result: Array, i: Array) -> tuple[Array, None]:
        block = circle.window(i * rows, rows)

        def add(result: Array, strip: Any, own: Array | None = None) -> tuple[Array, None]:
            start = (i + strip * group) % count * rows
            to_block, to_strip = meet(block, circle.window(start, group * rows), own)
            return _added(_added(result, start, to_strip), i * rows, to_block), None

        result, _ = add(result, 0, own)
        return jax.lax.scan(add, result, jnp.arange(1, _STRIPS, dtype=jnp.int32))

    length = count * rows
    result = jnp.pad(zeros, [(0, length + reach - size)] + [(0, 0)] * (zeros.ndim - 1))
    result = jax.lax.scan(step, result, jnp.arange(count, dtype=jnp.int32))[0]
    return result[:length].at[:reach].add(result[length:])[:size]


def _between(
    mine: _Vectors, theirs: _Vectors, meet: _Meeting, zeros: Array, block_size: int
) -> tuple[Array, Array]:
    """What mine get from the pairs with theirs, and theirs from mine."""
    size = len(mine.z)
    count, rows = _blocks(size, block_size)
    padded = mine.padded(count * rows)

    def step(to_theirs: Array, i: Array) -> tuple[Array, Array]:
        to_rows, more = meet(padded.window(i * rows, rows), theirs, None)
        return to_theirs + more, to_rows

    to_theirs, to_mine = jax.lax.scan(step, zeros, jnp.arange(count, dtype=jnp.int32))
    return to_mine.reshape(-1, *zeros.shape[1:])[:size], to_theirs


def _blocks(size: int, block_size: int) -> tuple[int, int]:
    """Number of blocks, and rows of each."""
    count = max(1, -(-size // block_size))
    return count, -(-size // count)


def _wrapped(x: Array, size: int) -> Array:
    return jnp.concatenate([x, x[:size]])


def _added(x: Array, start: Array, part: Array) -> Array:
    """x[start : start + len(part)] += part"""
    sums = jax.lax.dynamic_slice_in_dim(x, start, len(part)) + part
    return jax.lax.dynamic_update_slice_in_dim(x, sums, start, 0)


def _zeros_of(x: Array) -> Array:
    """Zeros that differ from device to device where x does, as `shard_map` wants it of carries."""
    return jnp.zeros_like(x) * x
