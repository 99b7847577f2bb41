"""Masks and similarities → label map."""

import numpy as np
import pytest
import torch

from fmbseg_jax.vocabulary import IGNORE
from labelling import compose as module
from labelling.compose import most_similar, pixel_similarities
from labelling.masks import Masks


def compose(masks, *others):
    return module.compose(Masks.pack(masks), *others)


def _random(seed=0, masks=7, size=(37, 53), grid=(5, 6), words=4):
    rng = np.random.default_rng(seed)
    return (
        rng.random((masks, *size)) < 0.3,
        rng.integers(0, words, masks),
        rng.normal(size=(*grid, words)).astype(np.float32),
    )


def _to_pixels(similarities, size):
    grid = torch.from_numpy(similarities).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(grid, size, mode="bilinear")[0].numpy()


@pytest.mark.parametrize("size", [(37, 53), (3, 2), (1, 400), (400, 1)])
def test_bilinear_as_torch(size):
    similarities = _random(grid=(5, 6))[2]
    strips = list(pixel_similarities(similarities, size))
    assert [rows.start for rows, _ in strips][0] == 0 and strips[-1][0].stop == size[0]
    values = np.concatenate([values for _, values in strips], axis=1)
    np.testing.assert_allclose(values, _to_pixels(similarities, size), atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_similarity_pixel_by_pixel(seed):
    masks, mask_words, similarities = _random(seed)
    labels = compose(masks, mask_words, similarities, "similarity")
    values = _to_pixels(similarities, masks.shape[1:])
    for y, x in np.ndindex(labels.shape):
        covering = {mask_words[i] for i in range(len(masks)) if masks[i, y, x]}
        expected = max(covering, key=lambda word: values[word, y, x]) if covering else IGNORE
        assert labels[y, x] == expected, (y, x)
    assert (labels == IGNORE).any() and labels.dtype == np.uint16


@pytest.mark.parametrize("seed", range(3))
def test_area_is_painting_larger_masks_first(seed):
    masks, mask_words, similarities = _random(seed)
    expected = np.full(masks.shape[1:], IGNORE)
    for i in sorted(range(len(masks)), key=lambda i: -masks[i].sum()):
        expected[masks[i]] = mask_words[i]
    np.testing.assert_array_equal(compose(masks, mask_words, similarities, "area"), expected)


def test_of_equal_areas_the_later_is_on_top():
    masks = np.ones((3, 2, 2), bool)
    labels = compose(masks, np.array([0, 2, 1]), np.zeros((1, 1, 3), np.float32), "area")
    assert (labels == 1).all()


def test_of_equal_similarities_the_lower_word_wins():
    masks = np.ones((3, 2, 2), bool)
    labels = compose(masks, np.array([2, 1, 2]), np.zeros((1, 1, 3), np.float32), "similarity")
    assert (labels == 1).all()


@pytest.mark.parametrize("combine", ["similarity", "area"])
def test_strips_do_not_matter(combine, monkeypatch):
    arguments = _random()
    whole = compose(*arguments, combine)
    monkeypatch.setattr(module, "_STRIP_BYTES", 1000)
    assert len(list(pixel_similarities(arguments[2], (37, 53)))) > 5
    np.testing.assert_array_equal(compose(*arguments, combine), whole)


@pytest.mark.parametrize("combine", ["similarity", "area"])
def test_no_masks(combine):
    none = np.zeros((0, 4, 5), bool), np.zeros(0, int), np.zeros((2, 2, 0), np.float32)
    assert (compose(*none, combine) == IGNORE).all()


def test_most_similar_leaves_nothing_out():
    similarities = _random()[2]
    labels = most_similar(similarities, (37, 53))
    np.testing.assert_array_equal(labels, _to_pixels(similarities, (37, 53)).argmax(0))
