"""Patches × words → similarities → pixels (section 3.3, "Deployment")."""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Float


def similarities(patches: Float[Array, "*s D"], text: Float[Array, "K D"]) -> Float[Array, "*s K"]:
    """Cosine similarity of each patch with each word; both are unit vectors."""
    return patches @ text.T


def bilinear(inputs: int, outputs: int) -> np.ndarray:
    """Matrix float32 [outputs, inputs] of bilinear interpolation along one axis.

    As torch's `F.interpolate(mode="bilinear", align_corners=False)`: half-pixel centres, borders
    repeat, no antialiasing.
    """
    centre = np.clip((np.arange(outputs) + 0.5) * (inputs / outputs) - 0.5, 0, inputs - 1)
    below = np.floor(centre).astype(int)
    above = np.minimum(below + 1, inputs - 1)
    part = (centre - below).astype(np.float32)
    matrix = np.zeros((outputs, inputs), np.float32)
    np.add.at(matrix, (np.arange(outputs), below), 1 - part)
    np.add.at(matrix, (np.arange(outputs), above), part)
    return matrix
