"""The losses against a float64 numpy version written straight from the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmbseg_jax import losses
from fmbseg_jax.vocabulary import IGNORE


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def batch(seed, size, width, num_words, ignored=0.2):
    rng = np.random.default_rng(seed)
    patches, text = (unit(rng.normal(size=(n, width))) for n in (size, num_words))
    labels = rng.integers(0, num_words, size)
    labels[rng.random(size) < ignored] = IGNORE
    return patches, labels, text


def image_term(i, z, y, tau):
    """Equation 4."""
    others = sum(np.exp(z[i] @ z[j] / tau) for j in range(len(z)) if j != i)
    same = [line for line in range(len(z)) if y[line] == y[i]]
    return np.mean([-z[i] @ z[line] / tau + np.log(others) for line in same])


def text_term(k, z, y, t, tau):
    """Equations 2 and 3."""
    members = [i for i in range(len(z)) if y[i] == k]
    terms = []
    for i in members:
        words = sum(np.exp(z[i] @ word / tau) for word in t)
        others = sum(np.exp(z[i] @ z[j] / tau) for j in range(len(z)) if j != i)
        terms.append(-z[i] @ t[k] / tau + np.log(words + others))
    return np.mean(terms) if members else 0.0


def reference(name, z, y, t, tau, weight):
    z, y = z[y != IGNORE], y[y != IGNORE]
    if name == "supcon":
        z, y = np.concatenate([z, t]), np.concatenate([y, np.arange(len(t))])
        terms = [image_term(i, z, y, tau) for i in range(len(z))]
        return (sum(terms[: -len(t)]) + weight * sum(terms[-len(t) :])) / len(z)
    text_terms = sum(text_term(k, z, y, t, tau) for k in range(len(t)))
    if name == "prototype":
        return weight * text_terms / len(t)
    image_terms = sum(image_term(i, z, y, tau) for i in range(len(z)))
    return (weight * text_terms + image_terms) / (len(z) + len(t))


def numerical_gradient(function, z, step=1e-5):
    gradient = np.zeros_like(z)
    for index in np.ndindex(z.shape):
        up, down = z.copy(), z.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


@pytest.mark.parametrize("name", losses.LOSSES)
@pytest.mark.parametrize(
    ("tau", "weight", "block_size"), [(1.0, 1.0, None), (0.1, 3.0, 4), (0.07, 1.0, 7)]
)
def test_values_and_gradients(name, tau, weight, block_size):
    z, y, t = batch(seed=3, size=18, width=5, num_words=4)
    y[y == 3] = 1  # a word without a patch

    def ours(z):
        return losses.LOSSES[name](
            z, jnp.asarray(y), jnp.asarray(t), temperature=tau, text_weight=weight,
            block_size=block_size,
        )  # fmt: skip

    expected = reference(name, z, y, t, tau, weight)
    slope = numerical_gradient(lambda z: reference(name, z, y, t, tau, weight), z)
    value, gradient = jax.jit(jax.value_and_grad(ours))(jnp.asarray(z, jnp.float32))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, atol=1e-5 * np.abs(slope).max(), rtol=1e-4)
    with jax.enable_x64(True):
        value, gradient = jax.jit(jax.value_and_grad(ours))(jnp.asarray(z, jnp.float64))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, slope, atol=1e-6 * np.abs(slope).max(), rtol=1e-5)


def in_float32(name, y, t):
    y, t = jnp.asarray(y), jnp.asarray(t, jnp.float32)
    function = jax.jit(jax.value_and_grad(lambda z: losses.LOSSES[name](z, y, t, temperature=0.1)))
    return lambda z: function(jnp.asarray(z, jnp.float32))


@pytest.mark.parametrize("name", losses.LOSSES)
def test_ignored_patches_take_no_part(name):
    z, y, t = batch(seed=5, size=40, width=6, num_words=5)
    kept = y != IGNORE
    other = np.where(kept[:, None], z, unit(np.random.default_rng(0).normal(size=z.shape)))
    value, gradient = in_float32(name, y, t)(z)
    assert value == in_float32(name, y, t)(other)[0]
    assert not np.any(gradient[~kept])
    np.testing.assert_allclose(value, in_float32(name, y[kept], t)(z[kept])[0], rtol=1e-6)


@pytest.mark.parametrize("name", losses.LOSSES)
@pytest.mark.parametrize("labelled", [0, 1])
def test_no_or_one_labelled_patch(name, labelled):
    z, y, t = batch(seed=7, size=9, width=4, num_words=3, ignored=2)
    y[:labelled] = 1
    value, gradient = in_float32(name, y, t)(z)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    if not labelled:
        assert value == 0
        assert not np.any(gradient)


def test_memory_is_linear_in_the_patches():
    """The compiled step holds a block of rows, never the whole M × M matrix."""
    size = 8192
    z = jax.ShapeDtypeStruct((size, 32), jnp.float32)
    y = jax.ShapeDtypeStruct((size,), jnp.int32)
    t = jax.ShapeDtypeStruct((10, 32), jnp.float32)
    step = jax.jit(
        jax.grad(lambda z, y, t: losses.tsupcon(z, y, t, temperature=0.1, block_size=256))
    )
    used = step.lower(z, y, t).compile().memory_analysis().temp_size_in_bytes
    assert used < size * size * 4 / 4
