"""The log-sum-exp over pairs at small temperatures, where each row needs a shift of its own.

No symmetry is used: the exponential that serves a row may underflow for its column.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from fmbseg_jax.nn.similarity import product, sum_dtype
from fmbseg_jax.parallel import ring


class _Blocks(NamedTuple):
    """Vectors in blocks of rows, filled up with invalid ones."""

    z: Float[Array, "blocks rows D"]
    valid: Float[Array, "blocks rows"]
    """1 or 0."""
    sums: Float[Array, "blocks rows"]
    """lse_i, in the backward pass; inf where there is no other."""
    slopes: Float[Array, "blocks rows"]
    """g_i, in the backward pass."""

    @classmethod
    def of(cls, z: Array, valid: Array, block_size: int, *more: Array) -> _Blocks:
        count = max(1, -(-len(z) // block_size))
        rows = -(-len(z) // count)

        def split(x: Array) -> Array:
            padding = [(0, count * rows - len(x))] + [(0, 0)] * (x.ndim - 1)
            return jnp.pad(x, padding).reshape(count, rows, *x.shape[1:])

        weights = valid.astype(sum_dtype(z))
        sums, slopes = more or (weights, weights)
        return cls(*map(split, (z, weights, sums, slopes)))

    @property
    def columns(self) -> _Blocks:
        """All rows in one."""
        return _Blocks(*(x.reshape(-1, *x.shape[2:]) for x in self))


def sums(z, valid, temperature, block_size, axis_name):  # type: ignore[no-untyped-def]
    """As `pairs.logsumexp`."""
    blocks = _Blocks.of(z, valid, block_size)

    def sums_of(theirs: _Blocks, own: bool) -> Array:
        keys = theirs.columns

        def rows(i: Array) -> Array:
            similarity = _similarities(blocks, i, keys, temperature, own)
            return jax.nn.logsumexp(jnp.where(keys.valid > 0, similarity, -jnp.inf), axis=1)

        return jax.lax.map(rows, jnp.arange(len(blocks.z), dtype=jnp.int32))

    def meet(sums: Array, theirs: _Blocks) -> Array:
        return jnp.logaddexp(sums, sums_of(theirs, own=False))

    return ring.ring(sums_of(blocks, own=True), blocks, meet, axis_name).reshape(-1)[: len(z)]


def gradient(z, valid, sums, slopes, temperature, block_size, axis_name):  # type: ignore[no-untyped-def]
    """Of Σ_i g_i lse_i with regard to Z, from `sums` = lse and `slopes` = g."""
    finite = jnp.where(jnp.isfinite(sums), sums, jnp.inf)  # its exponentials are 0
    blocks = _Blocks.of(z, valid, block_size, finite, slopes)

    def gradient_of(theirs: _Blocks, own: bool) -> Array:
        keys = theirs.columns

        def rows(i: Array) -> Array:
            similarity = _similarities(blocks, i, keys, temperature, own)
            as_row = jnp.exp(similarity - blocks.sums[i][:, None]) * blocks.slopes[i][:, None]
            as_column = jnp.exp(similarity - keys.sums) * keys.slopes
            as_row = jnp.where(keys.valid > 0, as_row, 0)
            as_column = jnp.where(blocks.valid[i][:, None] > 0, as_column, 0)
            return product(as_row + as_column, keys.z)

        return jax.lax.map(rows, jnp.arange(len(blocks.z), dtype=jnp.int32))

    def meet(result: Array, theirs: _Blocks) -> Array:
        return result + gradient_of(theirs, own=False)

    result = ring.ring(gradient_of(blocks, own=True), blocks, meet, axis_name)
    return result.reshape(-1, z.shape[1])[: len(z)] / temperature


def _similarities(blocks: _Blocks, i: Array, keys: Any, temperature: float, own: bool) -> Array:
    """s_ij of the rows blocks[i]; -inf where j is i."""
    similarity = product(blocks.z[i], keys.z.T) / temperature
    if not own:
        return similarity
    rows = blocks.z.shape[1]
    same = (i * rows + jnp.arange(rows))[:, None] == jnp.arange(len(keys.z))
    return jnp.where(same, -jnp.inf, similarity)
