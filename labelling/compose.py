"""Masks and dense similarities → label map. Pure numpy, deterministic, bounded in memory.

Similarities live on the patch grid [h, w] and are brought to pixels bilinearly, pixel centre to
pixel centre, in strips of rows: a map of all words at full resolution is never held.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fmbseg_jax.vocabulary import IGNORE
from labelling.masks import Masks

_STRIP_BYTES = 1 << 26


def compose(
    masks: Masks, mask_words: np.ndarray, similarities: np.ndarray, combine: str
) -> np.ndarray:
    """Gives each pixel the word of one of the masks that cover it; IGNORE where there is none.

    Args:
      masks: m masks of H × W pixels.
      mask_words: int [m], index into the last axis of `similarities`.
      similarities: float32 [h, w, f], patches by words.
      combine: "similarity": the covering mask's word that is most similar to the pixel wins (of
        equals, the lower index). "area": the smallest covering mask wins, as if larger ones were
        painted first (of equals, the later one).

    Returns:
      uint16 [H, W], indices into the last axis of `similarities`.
    """
    labels = np.full(masks.size, IGNORE, np.uint16)
    if not len(masks):
        return labels
    if combine == "area":
        order = np.lexsort((-np.arange(len(masks)), masks.areas()))
        masks = masks[order]
        for rows in _strips(masks.size, len(masks)):
            candidates = masks.rows(rows)
            winner = mask_words[order][candidates.argmax(0)]
            labels[rows] = np.where(candidates.any(0), winner, IGNORE)
        return labels
    order = np.argsort(mask_words, kind="stable")
    present, starts = np.unique(mask_words[order], return_index=True)
    masks = masks[order]
    for rows, values in pixel_similarities(similarities[..., present], masks.size):
        covered = masks.unions(starts, rows)
        winner = present[np.where(covered, values, -np.inf).argmax(0)]
        labels[rows] = np.where(covered.any(0), winner, IGNORE)
    return labels


def most_similar(similarities: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The most similar word of each pixel: float32 [h, w, K] → uint16 [H, W], nothing left out."""
    labels = np.empty(shape, np.uint16)
    for rows, values in pixel_similarities(similarities, shape):
        labels[rows] = values.argmax(0)
    return labels


def pixel_similarities(
    similarities: np.ndarray, shape: tuple[int, int]
) -> Iterator[tuple[slice, np.ndarray]]:
    """Bilinear: float32 [h, w, K] → strips (rows, float32 [K, r, W]) of the map [H, W]."""
    height, width, words = *shape, similarities.shape[-1]
    left, right, across = _neighbours(similarities.shape[1], width)
    above, below, down = _neighbours(similarities.shape[0], height)
    grid = np.ascontiguousarray(similarities.transpose(2, 0, 1), np.float32)
    for rows in _strips(shape, 4 * words):
        weight = down[rows, None]
        lines = grid[:, above[rows]] * (1 - weight) + grid[:, below[rows]] * weight
        yield rows, lines[..., left] * (1 - across) + lines[..., right] * across


def _neighbours(cells: int, pixels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two cells next to each pixel's centre [pixels], and the share of the second."""
    centre = np.clip((np.arange(pixels) + 0.5) * (cells / pixels) - 0.5, 0, cells - 1)
    first = centre.astype(np.int64)
    return first, np.minimum(first + 1, cells - 1), (centre - first).astype(np.float32)


def _strips(shape: tuple[int, int], bytes_per_pixel: int) -> Iterator[slice]:
    height, width = shape
    rows = max(1, _STRIP_BYTES // (width * bytes_per_pixel))
    for top in range(0, height, rows):
        yield slice(top, min(top + rows, height))
