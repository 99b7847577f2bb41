"""Where a patch is: learned position embeddings on any grid, and rotary ones."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Rotation(NamedTuple):
    """Rotary positions: cosines and sines of each token's angles (Su et al. 2021)."""

    cos: Float[Array, "t c"]
    sin: Float[Array, "t c"]

    def __call__(self, x: Float[Array, "b t h c"]) -> Float[Array, "b t h c"]:
        """Turns channel i and channel i + c/2 of each head by the token's angle."""
        first, second = jnp.split(x, 2, axis=-1)
        turned = jnp.concatenate([-second, first], axis=-1)
        return (x * self.cos[:, None] + turned * self.sin[:, None]).astype(x.dtype)


def resize_positions(
    positions: Float[Array, "n d"], grid: tuple[int, int], antialias: bool = False
) -> Float[Array, "m d"]:
    """Position embeddings of a square grid → those of `grid` = (h, w), row by row."""
    side = round(positions.shape[0] ** 0.5)
    if grid == (side, side):
        return positions
    square = positions.reshape(side, side, -1)
    down, right = (bicubic(side, n, antialias) for n in grid)
    resized = jnp.einsum("hi,wj,ijd->hwd", down, right, square)
    return resized.reshape(grid[0] * grid[1], -1)


def rotary(grid: tuple[int, int], prefix: int, channels: int, theta: float) -> Rotation:
    """DINOv3's rotary positions: angles of a patch's centre (y, x), each in [-1, 1] of the image.

    Args:
      grid: (h, w) of patches.
      prefix: tokens before the patches, which are not turned.
      channels: of a head; a quarter of them is the number of frequencies.
      theta: the base of the frequencies.
    """
    centres = [(np.arange(n, dtype=np.float32) + 0.5) / n * 2 - 1 for n in grid]
    places = np.stack(np.meshgrid(*centres, indexing="ij"), -1).reshape(-1, 2, 1)
    frequencies = theta ** -np.arange(0, 1, 4 / channels, dtype=np.float32)
    angles = np.tile((2 * np.pi * places * frequencies).reshape(len(places), -1), 2)
    angles = np.concatenate([np.zeros((prefix, channels), np.float32), angles])
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def bicubic(inputs: int, outputs: int, antialias: bool = False) -> np.ndarray:
    """Matrix float32 [outputs, inputs] of torch's bicubic interpolation (a = -0.75).

    With `antialias` a is -0.5, and when it shrinks the kernel widens, as Pillow's does.

    `jax.image.resize` has a = -0.5. Sample points are half-pixel centres, borders repeat.
    """
    if antialias:
        return _antialiased(inputs, outputs)
    a = np.float32(-0.75)
    half = np.float32(0.5)  # float32 throughout, as torch: its rounding is part of the result
    centre = (np.arange(outputs, dtype=np.float32) + half) * np.float32(inputs / outputs) - half
    first = np.floor(centre).astype(np.int32) - 1
    matrix = np.zeros((outputs, inputs), np.float32)
    for tap in range(4):
        distance = np.abs(centre - (first + tap).astype(np.float32))
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        column = np.clip(first + tap, 0, inputs - 1)
        np.add.at(matrix, (np.arange(outputs), column), np.where(distance <= 1, near, far))
    return matrix


def _antialiased(inputs: int, outputs: int) -> np.ndarray:
    scale = inputs / outputs
    stretch = max(scale, 1.0)
    matrix = np.zeros((outputs, inputs))
    for i in range(outputs):
        centre = (i + 0.5) * scale
        first = max(int(centre - 2 * stretch + 0.5), 0)
        taps = np.arange(first, min(int(centre + 2 * stretch + 0.5), inputs))
        weights = _keys((taps + 0.5 - centre) / stretch)
        matrix[i, taps] = weights / weights.sum()
    return matrix.astype(np.float32)


def _keys(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    """The cubic convolution kernel (Keys 1981)."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))
