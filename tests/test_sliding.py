"""Stitching, interpolation and counting against plain PyTorch and numpy loops."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from fmbseg_jax.evaluation import metrics
from fmbseg_jax.nn.similarity import bilinear
from fmbseg_jax.segmentation import layout as sliding
from fmbseg_jax.segmentation import pamr
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
    labels = layout.segment(jnp.asarray(similarities)).labels
    assert labels.shape == layout.output
    assert np.mean(labels == expected.argmax(-1)) > 0.999


def test_strips_change_nothing(monkeypatch):
    layout = LAYOUTS[2]
    similarities = np.random.default_rng(2).normal(size=(layout.count, *layout.grid, 5))
    similarities = jnp.asarray(similarities, jnp.float32)
    whole = layout.segment(similarities, with_best=True)
    monkeypatch.setattr(sliding, "_STRIP", 1)
    in_strips = layout.segment(similarities, with_best=True)
    assert in_strips._labels.shape[0] > whole._labels.shape[0] == 1
    np.testing.assert_array_equal(in_strips.labels, whole.labels)
    np.testing.assert_array_equal(in_strips.best, whole.best)


@pytest.mark.parametrize("words", [1, 7, 8, 9, 21])
def test_the_best_of_any_number_of_words(words):
    """Words come eight at a time; what fills up the last eight never wins."""
    layout = LAYOUTS[1]
    random = np.random.default_rng(words)
    similarities = -1 - random.random((layout.count, *layout.grid, words)).astype(np.float32)
    found = layout.segment(jnp.asarray(similarities), with_best=True)
    stitched = np.asarray(layout.stitch(jnp.asarray(similarities)))
    assert np.mean(found.labels == stitched.argmax(-1)) > 0.9999
    np.testing.assert_allclose(found.best, stitched.max(-1), atol=1e-5)


def slow_pamr(image, masks, iterations):
    """As it is written: all neighbours of one pixel after the other."""
    height, width = image.shape[:2]

    def around(y, x, centre):
        for d in (1, 2, 4, 8, 12, 24):
            for dy in (-d, 0, d):
                for dx in (-d, 0, d):
                    if centre or (dy, dx) != (0, 0):
                        yield min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)

    weights = {}
    for y in range(height):
        for x in range(width):
            nine = np.asarray([image[at] for at in around(y, x, True)], np.float64)
            eight = np.asarray([image[at] for at in around(y, x, False)], np.float64)
            alike = -(np.abs(eight - image[y, x]) / (1e-8 + 0.1 * nine.std(0, ddof=1))).mean(1)
            weights[y, x] = np.exp(alike - alike.max()) / np.exp(alike - alike.max()).sum()
    for _ in range(iterations):
        masks = np.stack(
            [
                [
                    weights[y, x] @ np.asarray([masks[at] for at in around(y, x, False)])
                    for x in range(width)
                ]
                for y in range(height)
            ]
        )
    return masks


def test_pamr_equals_a_slow_loop():
    random = np.random.default_rng(4)
    image = random.integers(0, 256, (13, 29, 3)).astype(np.float32)
    masks = random.normal(size=(13, 29, 3))
    expected = slow_pamr(image, masks, 3)
    index = pamr.around((13, 29), (16, 40))
    canvas = np.zeros((16, 40, 3), np.float32)
    canvas[:13, :29] = image
    padded = np.zeros((3, 16, 40), np.float32)
    padded[:, :13, :29] = masks.transpose(2, 0, 1)
    weights = pamr.affinity(jnp.asarray(canvas), index)
    np.testing.assert_allclose(np.asarray(weights).sum(0), 1, atol=1e-5)
    ours = np.asarray(pamr.refine(jnp.asarray(padded), weights, index, 3))
    np.testing.assert_allclose(ours[:, :13, :29].transpose(1, 2, 0), expected, atol=1e-5)


@pytest.mark.parametrize("layout", [LAYOUTS[1], LAYOUTS[2]])
def test_refined_similarities_are_stitched_refined_and_resized(layout):
    random = np.random.default_rng(5)
    similarities = random.normal(size=(layout.count, *layout.grid, 5)).astype(np.float32)
    image = random.integers(0, 256, (*layout.image, 3)).astype(np.uint8)
    small = dataclasses.replace(layout, output=layout.image)
    stitched = plain(small, similarities).numpy()
    refined = slow_pamr(image.astype(np.float32), stitched, 2)
    planes = torch.from_numpy(refined).permute(2, 0, 1)[None]
    expected = interpolate(planes, size=layout.output, mode="bilinear")[0].argmax(0).numpy()
    found = layout.segment_refined(jnp.asarray(similarities), image, 2)
    assert np.mean(found.labels == expected) > 0.999
    assert np.mean(layout.segment(jnp.asarray(similarities)).labels == expected) < 0.95


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
