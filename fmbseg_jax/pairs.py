"""The log-sum-exp over all pairs of a batch, in memory linear in the batch, on one device or many.

s_ij = z_i · z_j / τ is symmetric, and both passes use it: a block of pairs computed once serves
its rows and its columns. On several devices the vectors go round a ring, half-way, and what they
collect as columns goes back to where they came from.

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

_BLOCK = 512
"""Rows: 512 × 5,120 float32 are 10 MB, which stay in a CPU's cache."""

_SHIFTABLE = 0.03
"""From this temperature on exp(s - 1/τ) of unit vectors is in float32's range, whatever s: one
exponential serves row and column. Below, each row is shifted by its own maximum, computed whole."""


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
    make = _shifted if temperature >= _SHIFTABLE else _row_by_row
    sums = make(z, valid, temperature, block_size, axis_name)
    return sums, (z, valid, sums)


def _backward(temperature, block_size, axis_name, residuals, gradient):  # type: ignore[no-untyped-def]
    make = _shifted_gradient if temperature >= _SHIFTABLE else _row_by_row_gradient
    z, valid, sums = residuals
    result = make(z, valid, sums, gradient, temperature, block_size, axis_name)
    return result.astype(z.dtype), np.zeros(valid.shape, jax.dtypes.float0)


_logsumexp.defvjp(_forward, _backward)


# Where one shift serves all pairs: each block of pairs is computed once.


def _shifted(z, valid, temperature, block_size, axis_name):  # type: ignore[no-untyped-def]
    size, blocks = len(z), _Blocks.of(z, block_size, valid)
    between = functools.partial(_sums_between, blocks, temperature=temperature)
    sums = _half_ring(_own_sums(blocks, temperature), blocks, between, axis_name)
    return _log(sums.reshape(-1)[:size]) + 1 / temperature


def _shifted_gradient(z, valid, sums, gradient, temperature, block_size, axis_name):  # type: ignore[no-untyped-def]
    size = len(z)
    share = jnp.where(jnp.isfinite(sums), gradient * jnp.exp(1 / temperature - sums), 0)
    blocks = _Blocks.of(z, block_size, valid, share)
    between = functools.partial(_gradient_between, blocks, temperature=temperature)
    result = _half_ring(_own_gradient(blocks, temperature), blocks, between, axis_name)
    return result.reshape(-1, z.shape[1])[:size] / temperature


class _Blocks(NamedTuple):
    """Vectors in blocks of rows, filled up with invalid ones."""

    z: Float[Array, "blocks rows D"]
    valid: Float[Array, "blocks rows"]
    """1 or 0."""
    share: Float[Array, "blocks rows"]
    """g_i exp(1/τ - lse_i), in the backward pass."""

    @classmethod
    def of(cls, z: Array, block_size: int, valid: Array, share: Array | None = None) -> _Blocks:
        count = -(-len(z) // min(block_size, len(z)))
        rows = -(-len(z) // count)

        def split(x: Array) -> Array:
            padding = [(0, count * rows - len(x))] + [(0, 0)] * (x.ndim - 1)
            return jnp.pad(x, padding).reshape(count, rows, *x.shape[1:])

        weights = valid.astype(_sum_dtype(z))
        return cls(split(z), split(weights), split(weights if share is None else share))


def _exponentials(a: Array, b: Array, temperature: float) -> Array:
    """exp(s_ij - 1/τ) of rows a and columns b."""
    return jnp.exp((product(a, b.T) - 1) / temperature)


def _own_sums(blocks: _Blocks, temperature: float) -> Array:
    """Σ_{j≠i} exp(s_ij - 1/τ) over this device's vectors: [blocks, rows]."""
    z, valid, _ = blocks

    def diagonal(i: Array) -> Array:
        apart = 1 - jnp.eye(z.shape[1])
        return (_exponentials(z[i], z[i], temperature) * apart) @ valid[i]

    def add(sums: Array, pair: Array) -> tuple[Array, None]:
        i, j = pair
        block = _exponentials(z[i], z[j], temperature)
        return sums.at[i].add(block @ valid[j]).at[j].add(valid[i] @ block), None

    sums = jax.lax.map(diagonal, jnp.arange(len(z)))
    return jax.lax.scan(add, sums, _pairs(len(z)))[0]


def _sums_between(mine: _Blocks, theirs: _Blocks, temperature: float) -> tuple[Array, Array]:
    """What rows of mine get from theirs, and theirs from mine: [blocks, rows] each."""
    keys, valid = theirs.z.reshape(-1, theirs.z.shape[-1]), theirs.valid.reshape(-1)

    def rows(columns: Array, block: tuple[Array, Array]) -> tuple[Array, Array]:
        z, own = block
        exponentials = _exponentials(z, keys, temperature)
        return columns + own @ exponentials, exponentials @ valid

    columns, sums = jax.lax.scan(rows, _zeros_of(valid), (mine.z, mine.valid))
    return sums, columns.reshape(theirs.valid.shape)


def _own_gradient(blocks: _Blocks, temperature: float) -> Array:
    """W Z over this device's vectors: [blocks, rows, D]."""
    z = blocks.z

    def diagonal(i: Array) -> Array:
        apart = 1 - jnp.eye(z.shape[1])
        return product(_weights(blocks, i, blocks, i, temperature) * apart, z[i])

    def add(result: Array, pair: Array) -> tuple[Array, None]:
        i, j = pair
        weights = _weights(blocks, i, blocks, j, temperature)
        rows, columns = product(weights, z[j]), product(weights.T, z[i])
        return result.at[i].add(rows).at[j].add(columns), None

    result = jax.lax.map(diagonal, jnp.arange(len(z)))
    return jax.lax.scan(add, result, _pairs(len(z)))[0]


def _gradient_between(mine: _Blocks, theirs: _Blocks, temperature: float) -> tuple[Array, Array]:
    """What W Z gives mine through theirs, and theirs through mine: [blocks, rows, D] each."""
    whole = _Blocks(*(x.reshape(1, -1, *x.shape[2:]) for x in theirs))

    def rows(columns: Array, i: Array) -> tuple[Array, Array]:
        weights = _weights(mine, i, whole, 0, temperature)
        columns = columns + product(weights.T, mine.z[i])
        return columns, product(weights, whole.z[0])

    start = _zeros_of(whole.z[0]).astype(_sum_dtype(whole.z))
    columns, result = jax.lax.scan(rows, start, jnp.arange(len(mine.z)))
    return result, columns.reshape(theirs.z.shape)


def _weights(a: _Blocks, i: Any, b: _Blocks, j: Any, temperature: float) -> Array:
    """W_ij of rows a[i] and columns b[j]."""
    exponentials = _exponentials(a.z[i], b.z[j], temperature)
    shares = a.share[i][:, None] * b.valid[j] + a.valid[i][:, None] * b.share[j]
    return exponentials * shares


def _pairs(count: int) -> Array:
    """All i < j below count: int32 [pairs, 2]."""
    return jnp.asarray(np.stack(np.triu_indices(count, 1), axis=-1), jnp.int32)


def _half_ring(
    mine: Array, blocks: _Blocks, between: Callable[..., Any], axis_name: str | None
) -> Array:
    """Has every two devices meet once; adds what each collected as the other's columns.

    Args:
      mine: what this device has from itself, [blocks, rows, ...].
      blocks: its vectors, which travel.
      between: from another's blocks to what its pairs with ours give us, and give it.
    """
    if axis_name is None:
        return mine
    devices = jax.lax.axis_size(axis_name)
    send = functools.partial(_send, devices=devices, axis_name=axis_name)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        mine, travelling = carry
        theirs, columns = send(travelling, 1)
        rows, more = between(theirs)
        return (mine + rows, (theirs, columns + more)), None

    half = (devices - 1) // 2
    start = mine, (blocks, jnp.zeros_like(mine))
    (mine, (theirs, columns)), _ = jax.lax.scan(step, start, None, length=half)
    mine = mine + send(columns, -half)
    if devices % 2 == 0:  # opposite devices meet twice: each takes its rows
        mine = mine + between(send(theirs, 1))[0]
    return mine


def _send(tree: Any, shift: int, *, devices: int, axis_name: str) -> Any:
    """Everybody's to the device `shift` further."""
    route = [(i, (i + shift) % devices) for i in range(devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, route), tree)


# Where each row needs a shift of its own.


def _row_by_row(z, valid, temperature, block_size, axis_name):  # type: ignore[no-untyped-def]
    size, blocks = len(z), _Blocks.of(z, block_size, valid)

    def sums_of(theirs: _Blocks, own: bool) -> Array:
        def rows(i: Array) -> Array:
            return jax.nn.logsumexp(_similarities(blocks, i, theirs, own, temperature), axis=1)

        return jax.lax.map(rows, jnp.arange(len(blocks.z)))

    def meet(sums: Array, theirs: _Blocks) -> Array:
        return jnp.logaddexp(sums, sums_of(theirs, own=False))

    sums = _ring(sums_of(blocks, own=True), blocks, meet, axis_name)
    return sums.reshape(-1)[:size]


def _row_by_row_gradient(z, valid, sums, gradient, temperature, block_size, axis_name):  # type: ignore[no-untyped-def]
    size = len(z)
    finite = jnp.where(jnp.isfinite(sums), sums, jnp.inf)  # its exponentials are 0
    blocks = _Blocks.of(z, block_size, valid, finite)
    slopes = _Blocks.of(z, block_size, valid, gradient).share

    def gradient_of(theirs: Any, own: bool) -> Array:
        keys, their_slopes = theirs

        def rows(i: Array) -> Array:
            similarity = _similarities(blocks, i, keys, own, temperature)
            as_row = jnp.exp(similarity - blocks.share[i][:, None]) * slopes[i][:, None]
            similarity = _similarities(blocks, i, keys, own, temperature, columns=False)
            as_column = jnp.exp(similarity - keys.share.reshape(-1)) * their_slopes.reshape(-1)
            as_column = jnp.where(blocks.valid[i][:, None] > 0, as_column, 0)
            return product(as_row + as_column, keys.z.reshape(-1, keys.z.shape[-1]))

        return jax.lax.map(rows, jnp.arange(len(blocks.z)))

    def meet(result: Array, theirs: Any) -> Array:
        return result + gradient_of(theirs, own=False)

    mine = blocks, slopes
    result = _ring(gradient_of(mine, own=True), mine, meet, axis_name)
    return result.reshape(-1, z.shape[1])[:size] / temperature


def _similarities(
    blocks: _Blocks, i: Array, theirs: _Blocks, own: bool, temperature: float, columns: bool = True
) -> Array:
    """s_ij of the rows blocks[i]; -inf where j is i or, with `columns`, invalid."""
    keys = theirs.z.reshape(-1, theirs.z.shape[-1])
    similarity = product(blocks.z[i], keys.T) / temperature
    masked = jnp.zeros_like(similarity, bool)
    if columns:
        masked |= theirs.valid.reshape(-1) == 0
    if own:
        rows = blocks.z.shape[1]
        masked |= (i * rows + jnp.arange(rows))[:, None] == jnp.arange(len(keys))
    return jnp.where(masked, -jnp.inf, similarity)


def _ring(mine: Array, theirs: Any, meet: Callable[..., Array], axis_name: str | None) -> Array:
    """Takes everybody's past every device."""
    if axis_name is None:
        return mine
    devices = jax.lax.axis_size(axis_name)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        mine, theirs = carry
        theirs = _send(theirs, 1, devices=devices, axis_name=axis_name)
        return (meet(mine, theirs), theirs), None

    return jax.lax.scan(step, (mine, theirs), None, length=devices - 1)[0][0]


def _log(x: Array) -> Array:
    return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1)), -jnp.inf)


def _zeros_of(x: Array) -> Array:
    """Zeros that differ from device to device where x does, as `shard_map` wants it of carries."""
    return jnp.zeros_like(x) * x


def _sum_dtype(x: Array) -> Any:
    return jnp.promote_types(jnp.float32, x.dtype)


def product(a: Array, b: Array) -> Array:
    """A matrix product in the dtype of b, summed in float32 or more."""
    return jnp.matmul(a.astype(b.dtype), b, preferred_element_type=_sum_dtype(b))
