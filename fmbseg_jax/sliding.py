"""Sliding windows: their layout, and the two small matrices that stitch them into the image.

The protocol upsamples the similarities of each window to its pixels, adds the windows up, divides
by how many overlap, and resizes the result to the image. Each step is linear, and acts on rows and
columns apart: a grid of windows overlaps (rows) × (columns). So the whole is A · L · Bᵀ for each
word, with the similarities L of all windows side by side, and no window is ever held in pixels.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fmbseg_jax.similarity import bilinear


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the windows of one image lie, and how their similarities become its pixels.

    Windows start every `stride` pixels; the last one is shifted inside.
    """

    image: tuple[int, int]
    """(H, W) of the resized image, neither shorter than the window."""
    window: int
    stride: int
    grid: tuple[int, int]
    """(h, w) of patches in a window."""
    output: tuple[int, int]
    """(H', W') of the label map: the original image's size."""

    @property
    def starts(self) -> tuple[np.ndarray, np.ndarray]:
        """First rows and first columns of the windows, in pixels."""
        rows, columns = (_starts(size, self.window, self.stride) for size in self.image)
        return rows, columns

    @property
    def count(self) -> int:
        """n, the number of windows."""
        rows, columns = self.starts
        return len(rows) * len(columns)

    def windows(self, image: np.ndarray) -> np.ndarray:
        """[H, W, 3] → [n, window, window, 3], row by row."""
        rows, columns = self.starts
        side = self.window
        return np.stack([image[y : y + side, x : x + side] for y in rows for x in columns])

    @property
    def matrices(self) -> tuple[np.ndarray, np.ndarray]:
        """A float32 [H', rows · h] and B float32 [W', columns · w]."""
        down, right = (
            _axis_matrix(self.window, self.stride, grid, image, output)
            for grid, image, output in zip(self.grid, self.image, self.output, strict=True)
        )
        return down, right

    def side_by_side(self, similarities: Float[Array, "n h w K"]) -> Float[Array, "r c K"]:
        """The windows' similarities in one grid, [rows · h, columns · w, K]."""
        rows, columns = self.starts
        (h, w), words = self.grid, similarities.shape[-1]
        grid = similarities.reshape(len(rows), len(columns), h, w, words)
        return grid.transpose(0, 2, 1, 3, 4).reshape(len(rows) * h, len(columns) * w, words)

    def stitch(self, similarities: Float[Array, "n h w K"]) -> Float[Array, "H W K"]:
        """Similarities of the windows → similarities of the output's pixels."""
        down, right = self.matrices
        return _stitch(jnp.asarray(down), jnp.asarray(right), self.side_by_side(similarities))

    def segment(self, similarities: Float[Array, "n h w K"]) -> Int[Array, "H W"]:
        """Similarities of the windows → the most similar word of each output pixel, int32.

        Works in strips of rows: [H', W', K] of a large image and many words is never held.
        """
        down, right = self.matrices
        height, width = self.output
        words = similarities.shape[-1]
        strip = max(1, min(height, _STRIP // (width * words)))
        padded = np.pad(down, ((0, -height % strip), (0, 0)))
        strips = jnp.asarray(padded.reshape(-1, strip, down.shape[1]))
        labels = _argmax(strips, jnp.asarray(right), self.side_by_side(similarities))
        return labels.reshape(-1, width)[:height]


_STRIP = 1 << 22  # similarities held at once: 16 MB


@jax.jit
def _stitch(down: Array, right: Array, grid: Array) -> Array:
    return jnp.einsum("yr,rck,xc->yxk", down, grid, right)


@jax.jit
def _argmax(strips: Array, right: Array, grid: Array) -> Array:
    wide = jnp.einsum("rck,xc->rxk", grid, right)

    def strip_labels(down: Array) -> Array:
        return jnp.argmax(jnp.einsum("yr,rxk->yxk", down, wide), axis=-1).astype(jnp.int32)

    return jax.lax.map(strip_labels, strips)


def _starts(size: int, window: int, stride: int) -> np.ndarray:
    assert size >= window, (size, window)
    count = -(-(size - window) // stride) + 1
    return np.minimum(np.arange(count) * stride, size - window)


@functools.lru_cache(64)  # photographs of one camera have one size
def _axis_matrix(window: int, stride: int, grid: int, image: int, output: int) -> np.ndarray:
    """Patches of all windows along one axis → output pixels along it."""
    starts = _starts(image, window, stride)
    upsample = bilinear(grid, window)
    placed = np.zeros((image, len(starts), grid), np.float32)
    overlaps = np.zeros((image, 1, 1), np.float32)
    for i, start in enumerate(starts):
        placed[start : start + window, i] += upsample
        overlaps[start : start + window] += 1
    return bilinear(image, output) @ (placed / overlaps).reshape(image, -1)
