"""Sliding windows: their layout, and the two small matrices that stitch them into the image.

The protocol upsamples the similarities of each window to its pixels, adds the windows up, divides
by how many overlap, and resizes the result to the image. Each step is linear, and acts on rows and
columns apart: a grid of windows overlaps (rows) × (columns). So the whole is A · L · Bᵀ for each
word, with the similarities L of all windows side by side, and no window is ever held in pixels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8, UInt16

from fmbseg_jax.nn.similarity import bilinear
from fmbseg_jax.segmentation import pamr


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

    def stitch(self, similarities: Float[Array, "n h w K"]) -> Float[Array, "H W K"]:
        """Similarities of the windows → similarities of the output's pixels."""
        down, right = self.matrices
        grid = _side_by_side(similarities, self._shape)
        return _stitch(jnp.asarray(down), jnp.asarray(right), grid)

    def segment(self, similarities: Float[Array, "n h w K"], *, with_best: bool = False) -> Found:
        """Similarities of the windows → the most similar word of each pixel of the output.

        Goes through the words a few at a time and keeps the best: [H', W', K] is never held. What
        is compiled depends on the number of windows, and on the output's size rounded up.

        Args:
          with_best: keep how similar it is, too.
        """
        (down, right), tall = self.matrices, self._tall
        grid = _words_first(similarities, self._shape, tall)
        if tall:
            down, right = right, down
        height, width = len(down), len(right)
        right = _filled(right, _ROUND)
        rows = -(-height // _ROUND) * _ROUND
        strip = max(_ROUND, min(rows, _STRIP // len(right) // _ROUND * _ROUND))
        strips = _filled(down, strip).reshape(-1, strip, down.shape[1])
        labels, best = _most_similar(jnp.asarray(strips), jnp.asarray(right), grid)
        return Found(labels, best if with_best else None, (height, width), tall)

    def segment_refined(
        self,
        similarities: Float[Array, "n h w K"],
        image: UInt8[np.ndarray, "H W 3"],
        iterations: int,
        *,
        with_best: bool = False,
    ) -> Found:
        """The same, with the similarities refined by PAMR at the size of the resized image.

        Args:
          image: the resized image.
        """
        tall = self._tall
        grid = _words_first(similarities, self._shape, tall)
        axes = [
            _stitch_matrix(self.window, self.stride, patches, size)
            for patches, size in zip(self.grid, self.image, strict=True)
        ]
        to_output = [bilinear(*sizes) for sizes in zip(self.image, self.output, strict=True)]
        if tall:
            axes, to_output, image = axes[::-1], to_output[::-1], image.transpose(1, 0, 2)
        height, width = (len(one) for one in to_output)
        sizes = [len(axis) for axis in axes]
        axes = [_filled(axis, _ROUND) for axis in axes]
        canvas = [len(axis) for axis in axes]
        to_output = [_filled(_filled(one, _ROUND).T, _ROUND).T for one in to_output]
        pixels = np.zeros((*canvas, 3), np.float32)
        pixels[: sizes[0], : sizes[1]] = image
        index = pamr.around(sizes, canvas)
        weights = pamr.affinity(jnp.asarray(pixels), index)
        labels, best = _most_similar_refined(
            axes, to_output, index, grid, weights, iterations=iterations
        )
        return Found(labels, best if with_best else None, (height, width), tall)

    @property
    def _tall(self) -> bool:
        """Tall images are laid on their side, so that fewer shapes are compiled."""
        return self.image[0] > self.image[1]

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        """(rows of windows, columns of windows, h, w)."""
        rows, columns = self.starts
        return (len(rows), len(columns), *self.grid)


@dataclasses.dataclass
class Found:
    """The most similar word of each pixel, still with the device."""

    _labels: UInt16[Array, "*s y x"]
    """In strips of rows, [s, y, x], or whole."""
    _best: Float[Array, "*s y x"] | None
    _size: tuple[int, int]
    _tall: bool

    @property
    def labels(self) -> UInt16[np.ndarray, "H W"]:
        """Index of the word."""
        return self._upright(self._labels)

    @property
    def best(self) -> Float[np.ndarray, "H W"] | None:
        """Its similarity, where that was asked for."""
        return None if self._best is None else self._upright(self._best)

    def _upright(self, of: Array) -> np.ndarray:
        height, width = self._size
        kept = np.asarray(of).reshape(-1, of.shape[-1])[:height, :width]
        return kept.T if self._tall else kept


_WORDS = 8  # compared at once
_ROUND = 128  # sizes are rounded up to a multiple of it
_STRIP = 1 << 21  # pixels of a strip of rows: 64 MB of similarities


@functools.partial(jax.jit, static_argnames="shape")
def _side_by_side(similarities: Array, shape: tuple[int, int, int, int]) -> Array:
    """[n, h, w, K] → one grid, [rows · h, columns · w, K]."""
    rows, columns, h, w = shape
    grid = similarities.reshape(*shape, -1).transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * h, columns * w, -1)


@functools.partial(jax.jit, static_argnames=("shape", "tall"))
def _words_first(similarities: Array, shape: tuple[int, int, int, int], tall: bool) -> Array:
    """The grid as [K, r, c]; of a tall image [K, c, r]."""
    grid = _side_by_side(similarities, shape)
    return grid.transpose(2, 1, 0) if tall else grid.transpose(2, 0, 1)


@jax.jit
def _stitch(down: Array, right: Array, grid: Array) -> Array:
    return jnp.einsum("yr,rck,xc->yxk", down, grid, right, precision=_EXACT)


@jax.jit
def _most_similar(strips: Array, right: Array, grid: Array) -> tuple[Array, Array]:
    """A [s, y, r], B [x, c], L [K, r, c] → the best word's index and similarity, [s, y, x]."""

    def strip(down: Array) -> tuple[Array, Array]:
        shape = (down.shape[0], right.shape[0])
        return _best(grid, shape, lambda some: _sandwich(down, some, right))

    return jax.lax.map(strip, strips)


@functools.partial(jax.jit, static_argnames="iterations")
def _most_similar_refined(
    axes: Sequence[Array],
    to_output: Sequence[Array],
    index: pamr.Index,
    grid: Array,
    weights: Array,
    *,
    iterations: int,
) -> tuple[Array, Array]:
    def of(some: Array) -> Array:
        stitched = _sandwich(axes[0], some, axes[1])
        refined = pamr.refine(stitched, weights, index, iterations)
        return _sandwich(to_output[0], refined, to_output[1])

    return _best(grid, (len(to_output[0]), len(to_output[1])), of)


def compiled() -> int:
    """How many programs have been compiled here, for one shape on one device each."""
    programs: list[Any] = [_words_first, _most_similar, _most_similar_refined, pamr.affinity]
    return sum(program._cache_size() for program in programs)


def _sandwich(down: Array, grid: Array, right: Array) -> Array:
    """A L Bᵀ of some words at once."""
    return jnp.matmul(down, jnp.matmul(grid, right.T, precision=_EXACT), precision=_EXACT)


_EXACT = jax.lax.Precision.HIGHEST


def _best(
    grid: Array, shape: tuple[int, int], similarities: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """Over all words of the grid [K, r, c], the index uint16 and value of the highest similarity.

    Args:
      shape: (y, x) of the result.
      similarities: of some words, [·, r, c] → [·, y, x].
    """
    words = len(grid)
    at_once = min(_WORDS, words)
    grid = jnp.pad(grid, ((0, -words % at_once), (0, 0), (0, 0)))

    def compare(found: tuple[Array, Array], some: tuple[Array, Array]) -> tuple[Any, None]:
        (labels, best), (first, part) = found, some
        for i, similarity in enumerate(similarities(part)):
            better = (similarity > best) & (first + i < words)
            labels = jnp.where(better, jnp.uint16(first + i), labels)
            best = jnp.where(better, similarity, best)
        return (labels, best), None

    start = jnp.zeros(shape, jnp.uint16), jnp.full(shape, -jnp.inf, jnp.float32)
    firsts = jnp.arange(0, len(grid), at_once, dtype=jnp.int32)
    parts = grid.reshape(-1, at_once, *grid.shape[1:])
    return jax.lax.scan(compare, start, (firsts, parts))[0]


def _filled(matrix: np.ndarray, multiple: int) -> np.ndarray:
    """With rows of zeros below, up to a multiple."""
    return np.pad(matrix, ((0, -len(matrix) % multiple), (0, 0)))


def _starts(size: int, window: int, stride: int) -> np.ndarray:
    assert size >= window, (size, window)
    count = -(-(size - window) // stride) + 1
    return np.minimum(np.arange(count) * stride, size - window)


@functools.lru_cache(64)  # photographs of one camera have one size
def _axis_matrix(window: int, stride: int, grid: int, image: int, output: int) -> np.ndarray:
    """Patches of all windows along one axis → output pixels along it."""
    return bilinear(image, output) @ _stitch_matrix(window, stride, grid, image)


def _stitch_matrix(window: int, stride: int, grid: int, image: int) -> np.ndarray:
    """Patches of all windows along one axis → pixels of the resized image along it."""
    starts = _starts(image, window, stride)
    upsample = bilinear(grid, window)
    placed = np.zeros((image, len(starts), grid), np.float32)
    overlaps = np.zeros((image, 1, 1), np.float32)
    for i, start in enumerate(starts):
        placed[start : start + window, i] += upsample
        overlaps[start : start + window] += 1
    return (placed / overlaps).reshape(image, -1)
