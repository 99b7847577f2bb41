"""Stitching, interpolation and counting against plain PyTorch and numpy loops."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from fmbseg_jax import metrics, sliding
from fmbseg_jax.similarity import bilinear
from fmbseg_jax.vocabulary import IGNORE


@pytest.mark.parametrize("sizes", [(8, 64), (64, 8), (7, 50), (50, 7), (1, 5), (5, 1), (6, 6)])
def test_bilinear_is_torchs(sizes):
    inputs, outputs = sizes
    signal = np.random.default_rng(0).normal(size=inputs).astype(np.float32)
    theirs = interpolate(torch.from_numpy(signal)[None, None], size=outputs, mode="linear")
    np.testing.assert_allclose(bilinear(inputs, outputs) @ signal, theirs[0, 0].numpy(), atol=1e-5)


def plain(layout, similarities):
    """The protocol as it is written: upsample each window, add, divide, resize."""
    total = torch.zeros(similarities.shape[-1], *layout.image)
    count = torch.zeros(layout.image)
    rows, columns = layout.starts
    side = layout.window
    for i, (y, x) in enumerate((y, x) for y in rows for x in columns):
        window = torch.from_numpy(similarities[i]).permute(2, 0, 1)[None]
        total[:, y : y + side, x : x + side] += interpolate(
            window, size=(side, side), mode="bilinear"
        )[0]
        count[y : y + side, x : x + side] += 1
    assert count.min() > 0
    return interpolate((total / count)[None], size=layout.output, mode="bilinear")[0].permute(
        1, 2, 0
    )


LAYOUTS = [
    sliding.Layout((64, 64), 64, 32, (8, 8), (64, 64)),
    sliding.Layout((64, 101), 64, 32, (8, 8), (50, 79)),
    sliding.Layout((130, 64), 64, 40, (4, 4), (300, 147)),
    sliding.Layout((64, 64), 64, 32, (8, 8), (1, 1)),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_matrices_stitch_as_the_protocol_does(layout):
    random = np.random.default_rng(1)
    similarities = random.normal(size=(layout.count, *layout.grid, 5)).astype(np.float32)
    expected = plain(layout, similarities).numpy()
    stitched = np.asarray(layout.stitch(jnp.asarray(similarities)))
    np.testing.assert_allclose(stitched, expected, atol=1e-5)
    labels = np.asarray(layout.segment(jnp.asarray(similarities)))
    assert labels.shape == layout.output
    assert np.mean(labels == expected.argmax(-1)) > 0.999


def test_strips_change_nothing(monkeypatch):
    layout = LAYOUTS[2]
    similarities = np.random.default_rng(2).normal(size=(layout.count, *layout.grid, 5))
    similarities = jnp.asarray(similarities, jnp.float32)
    whole = np.asarray(layout.segment(similarities))
    monkeypatch.setattr(sliding, "_STRIP", 147 * 5 * 7)  # seven rows: the last strip is not full
    np.testing.assert_array_equal(np.asarray(layout.segment(similarities)), whole)


def test_windows_cover_the_image():
    layout = sliding.Layout((70, 101), 64, 32, (8, 8), (70, 101))
    image = np.arange(70 * 101 * 3).reshape(70, 101, 3)
    windows = layout.windows(image)
    assert windows.shape == (layout.count, 64, 64, 3)
    np.testing.assert_array_equal(windows[-1], image[-64:, -64:])
    assert set(windows.ravel()) == set(image.ravel())


def test_confusion_matrix_equals_a_loop():
    random = np.random.default_rng(3)
    labels, predictions = random.integers(0, 7, (2, 31, 17))
    labels[random.random(labels.shape) < 0.3] = IGNORE
    expected = np.zeros((7, 7), int)
    for label, prediction in zip(labels.ravel(), predictions.ravel(), strict=True):
        if label != IGNORE:
            expected[label, prediction] += 1
    ours = metrics.confusion_matrix(predictions, labels, 7)
    np.testing.assert_array_equal(ours, expected)


def test_counts_beyond_float32():
    """2^24 + 1 pixels: a float32 count would stop one short."""
    labels = np.zeros((1 << 24) + 1, np.int32)
    assert metrics.confusion_matrix(labels, labels, 1)[0, 0] == (1 << 24) + 1


def test_iou():
    confusion = np.asarray([[6, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    confusion[0, 3] = 1  # predicted, never labelled: 0, not absent
    np.testing.assert_allclose(metrics.iou(confusion), [6 / 10, 3 / 6, np.nan, 0])
    np.testing.assert_allclose(metrics.mean_iou(confusion), (0.6 + 0.5 + 0) / 3)
    assert np.isnan(metrics.mean_iou(np.zeros((3, 3), int)))
