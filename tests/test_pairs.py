"""The log-sum-exp over pairs, and the losses on it: any shape, any temperature, any devices."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from test_losses import batch, reference, unit

from fmbseg_jax import losses
from fmbseg_jax.losses import logsumexp as pairs
from fmbseg_jax.vocabulary import IGNORE


def exact(z, valid, tau):
    """In float64, with the matrix."""
    similarity = z.astype(np.float64) @ z.astype(np.float64).T / tau
    np.fill_diagonal(similarity, -np.inf)
    similarity[:, ~valid] = -np.inf
    with np.errstate(divide="ignore"):
        return np.logaddexp.reduce(similarity, axis=1)


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    size=st.integers(1, 60),
    width=st.integers(1, 9),
    block_size=st.sampled_from([1, 7, 16, 512]),
    tau=st.sampled_from([0.01, 0.03, 0.07, 1.0, 100.0]),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 5),
)
def test_any_shape_and_temperature(size, width, block_size, tau, ignored, seed):
    random = np.random.default_rng(seed)
    z = unit(random.normal(size=(size, width))).astype(np.float32)
    valid = random.random(size) >= ignored
    logsumexp = jax.jit(pairs.logsumexp, static_argnums=(2, 3))
    ours = logsumexp(jnp.asarray(z), jnp.asarray(valid), tau, block_size)
    expected = exact(z, valid, tau)
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(expected))
    finite = np.isfinite(expected)
    scale = max(1, 1 / tau)
    np.testing.assert_allclose(ours[finite], expected[finite], rtol=1e-5, atol=2e-6 * scale)


@pytest.mark.parametrize("tau", [0.01, 0.03, 0.1, 100.0])
def test_gradients_at_extreme_temperatures(tau):
    """Against W Z / τ in float64."""
    random = np.random.default_rng(1)
    z, slopes = unit(random.normal(size=(30, 5))), random.normal(size=30)
    valid = random.random(30) > 0.2
    slopes[~valid] = 0
    pairs_of = np.exp(z @ z.T / tau - exact(z, valid, tau)[:, None]) * valid
    np.fill_diagonal(pairs_of, 0)
    weights = slopes[:, None] * pairs_of
    expected = (weights + weights.T) @ z / tau

    def total(z):
        return jnp.sum(pairs.logsumexp(z, jnp.asarray(valid), tau, 7) * slopes)

    ours = jax.jit(jax.grad(total))(jnp.asarray(z, jnp.float32))
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())


def test_sums_stay_exact_where_a_fixed_shift_would_underflow():
    """At τ = 0.01 opposite vectors have s = -100: exp(s - 100) is nothing in float32."""
    z = np.eye(4, dtype=np.float32)[[0, 1, 1]] * np.float32([[1], [1], [-1]])
    ours = pairs.logsumexp(jnp.asarray(z), jnp.ones(3, bool), 0.01)
    np.testing.assert_allclose(ours, [np.log(2), 0, 0], atol=1e-6)


@hypothesis.settings(max_examples=8, deadline=None)
@hypothesis.given(
    name=st.sampled_from(sorted(losses.LOSSES)),
    size=st.integers(2, 24),
    num_words=st.integers(1, 6),
    tau=st.sampled_from([0.01, 0.1, 100.0]),
    seed=st.integers(0, 5),
)
def test_losses_of_any_shape(name, size, num_words, tau, seed):
    z, y, t = batch(seed, size, 5, num_words)
    hypothesis.assume((y != IGNORE).sum() > 1)
    expected = reference(name, z, y, t, tau, 2.0)
    arrays = jnp.asarray(z, jnp.float32), jnp.asarray(y), jnp.asarray(t, jnp.float32)
    loss = functools.partial(losses.LOSSES[name], temperature=tau, text_weight=2.0, block_size=5)
    ours = jax.jit(loss)(*arrays)
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("labels", ["one class", "each its own"])
@pytest.mark.parametrize("num_words", [1, 1203])
def test_one_class_and_every_patch_its_own(labels, num_words):
    z, y, t = batch(0, 12, 5, num_words, ignored=0)
    y = np.zeros(12, int) if labels == "one class" else np.arange(12) % num_words
    for name in losses.LOSSES:
        arrays = jnp.asarray(z, jnp.float32), jnp.asarray(y), jnp.asarray(t, jnp.float32)
        ours = jax.jit(functools.partial(losses.LOSSES[name], temperature=0.1))(*arrays)
        expected = reference(name, z, y, t, 0.1, 1.0)
        np.testing.assert_allclose(ours, expected, rtol=1e-4)


def on_devices(loss, count):
    mesh = Mesh(np.asarray(jax.devices()[:count]), ("data",))
    split, same = PartitionSpec("data"), PartitionSpec()
    loss = functools.partial(loss, axis_name="data")
    return jax.shard_map(loss, mesh=mesh, in_specs=(split, split, same), out_specs=same)


@pytest.mark.parametrize(
    ("name", "count", "tau"),
    [("tsupcon", count, tau) for count in (1, 2, 3, 8) for tau in (0.1, 0.01)]
    + [("supcon", 8, 0.1), ("prototype", 8, 0.1)],
)
def test_many_devices_give_the_loss_of_one(name, count, tau):
    """Labels unevenly spread, and a device without any; odd and even rings."""
    z, y, t = batch(1, 48, 6, 4)
    y[:6], y[12:30] = IGNORE, 2
    arrays = jnp.asarray(z, jnp.float32), jnp.asarray(y), jnp.asarray(t, jnp.float32)
    loss = functools.partial(losses.LOSSES[name], temperature=tau, text_weight=3.0, block_size=5)
    value, gradient = jax.jit(jax.value_and_grad(loss))(*arrays)
    many = jax.jit(jax.value_and_grad(on_devices(loss, count)))
    other, slope = many(*arrays)
    np.testing.assert_allclose(other, value, rtol=1e-5)
    np.testing.assert_allclose(slope, gradient, atol=1e-5 * np.abs(gradient).max())


def test_bfloat16_vectors_are_summed_in_float32():
    z, y, t = batch(2, 40, 16, 3)
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in (z, t)]
    ours = losses.tsupcon(arrays[0], jnp.asarray(y), arrays[1], temperature=0.1)
    rounded = [np.asarray(x, np.float64) for x in arrays]
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(
        ours, reference("tsupcon", rounded[0], y, rounded[1], 0.1, 1.0), rtol=1e-2
    )
    gradient = jax.grad(lambda z: losses.tsupcon(z, jnp.asarray(y), arrays[1], temperature=0.1))
    assert jax.jit(gradient)(arrays[0]).dtype == jnp.bfloat16
