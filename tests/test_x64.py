"""JAX_ENABLE_X64=1, which other programs may need: the same numbers, of the same dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from fmbseg_jax import config, losses
from fmbseg_jax.parallel.mesh import distribute, replicate
from fmbseg_jax.segmentation import layout as sliding
from fmbseg_jax.segmentation import pamr
from fmbseg_jax.training import step
from fmbseg_jax.vocabulary import IGNORE

RNG = np.random.default_rng(0)


def unit(*shape):
    x = RNG.normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def both(function):
    """What a function gives without and with 64 bits, checked to be of the same dtypes."""
    plain = jax.device_get(function())
    with jax.enable_x64(True):
        wide = jax.device_get(function())
    dtypes = [[x.dtype for x in jax.tree.leaves(tree)] for tree in (plain, wide)]
    assert dtypes[0] == dtypes[1]
    return plain, wide


def close(plain, wide):
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(wide), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "temperature"), [("tsupcon", 1.0), ("supcon", 0.005)])
def test_losses(name, temperature):
    patches, text = unit(30, 8), unit(4, 8)
    labels = np.asarray([*range(4)] * 7 + [IGNORE, 0], np.int32)

    def value_and_gradient():
        given = jnp.asarray(labels), jnp.asarray(text)

        def loss(z):
            return losses.LOSSES[name](z, *given, temperature=temperature)

        return jax.jit(jax.value_and_grad(loss))(jnp.asarray(patches))

    close(*both(value_and_gradient))


def test_a_step_of_training():
    options = config.Train()
    options.patches_per_image, options.balanced = 5, True
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",))
    described = {"kind": "linear", "output": 6, "mlp_ratio": 2, "heads": 2}
    goal = step.objective(options, described, 3, mesh=mesh)
    patches, text = unit(2, 9, 4).astype(np.float16), unit(3, 6)
    labels = np.asarray([[0, 1, 2, 0, IGNORE, 1, 2, 0, 1]] * 2, np.int32)

    def steps():
        state = replicate(mesh, step.create_state(goal, 0, 4))
        batch = distribute(mesh, {"patches": patches, "labels": labels})
        given = replicate(mesh, text)
        for _ in range(2):
            state, metrics = step.train_step(state, batch, given, {}, objective=goal)
        return state, metrics["loss"]

    close(*both(steps))


def test_label_maps_and_their_refinement():
    layout = sliding.Layout((40, 56), 32, 16, (4, 4), (60, 70))
    similarities = RNG.normal(size=(layout.count, 4, 4, 3)).astype(np.float32)
    image = RNG.integers(0, 256, (40, 56, 3), np.uint8)

    def label_maps():
        given = jnp.asarray(similarities)
        plain = layout.segment(given, with_best=True)
        refined = layout.segment_refined(given, image, 2, with_best=True)
        return [(found.labels, found.best) for found in (plain, refined)]

    (plain, refined), wide = both(label_maps)
    close((plain[1], refined[1]), [best for _, best in wide])
    for (labels, _), (others, _) in zip((plain, refined), wide, strict=True):
        assert np.mean(labels == others) > 0.999
    index = pamr.around((5, 5), (6, 6))
    assert [rows.dtype for rows in index] == [np.int32] * 2
