"""The frozen vision encoder over labelled images: patch features, and the word of each patch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import flax.linen as nn
import numpy as np
from jax import Array
from jaxtyping import Float

from fmbseg_jax.data import images, label_maps
from fmbseg_jax.encoders import loading
from fmbseg_jax.errors import UserError
from fmbseg_jax.vocabulary import IGNORE

if TYPE_CHECKING:  # it brings tensorflow_datasets, which segmenting does without
    from fmbseg_jax.data.example import PseudoLabel


class PatchEncoder:
    """A frozen vision encoder, and what has to be done to an image before it."""

    def __init__(self, source: str, size: int, compute: str = "float32"):
        """Loads the encoder.

        Args:
          source: folder or hub id.
          size: images are resized to size × size pixels.
          compute: "float32" or "bfloat16".
        """
        self.module, self.params = loading.load_vision(source, compute)
        self.size, patch = size, self.module.spec.patch
        if size % patch:
            raise UserError(
                f"features.size = {size} is not a multiple of the encoder's patch of {patch} "
                "pixels."
            )
        self.side = size // patch

    def prepare(
        self, labelled: PseudoLabel, num_words: int, reading: images.Reading
    ) -> dict[str, np.ndarray]:
        """pixels uint8 [size, size, 3] and labels int32 [n], row by row, of one image."""
        square = (self.size, self.size)
        image = label_maps.image_of(labelled.labels, labelled.image, labelled.filename, reading)
        labels = images.resize_labels(labelled.labels, square)
        return {
            "pixels": images.resize(image, square),
            "labels": patch_labels(labels, (self.side, self.side), num_words).reshape(-1),
        }


def encode(module: nn.Module, params: Any, pixels: Array) -> Float[Array, "b n d"]:
    """uint8 [b, H, W, 3] → patch features, float32; pure, to be jitted."""
    normal = images.normalise(pixels, module.spec.mean, module.spec.std)
    patches = module.apply({"params": params}, normal).patches
    return patches.reshape(patches.shape[0], -1, patches.shape[-1])


def patch_labels(labels: np.ndarray, grid: tuple[int, int], num_words: int) -> np.ndarray:
    """The word of each patch: that of most of its labelled pixels.

    Args:
      labels: uint16 [H, W], word index or IGNORE, with H and W multiples of the grid's h and w.
      grid: (h, w).
      num_words: K.

    Returns:
      uint16 [h, w]; IGNORE where most of a patch's pixels are unlabelled. Of words with as many
      pixels the first in the list wins.
    """
    (h, w), (height, width) = grid, labels.shape
    cells = labels.reshape(h, height // h, w, width // w).transpose(0, 2, 1, 3).reshape(h * w, -1)
    present = np.unique(cells[cells != IGNORE])  # few words of many: count only those
    if np.any(present >= num_words):
        raise UserError(f"A label map holds word {present.max()}, of {num_words} words.")
    counts = np.stack([(cells == word).sum(1) for word in present] or [np.zeros(h * w)], axis=1)
    best = np.append(present, np.uint16(IGNORE))[counts.argmax(1)]
    most_unlabelled = counts.sum(1) * 2 < cells.shape[1]
    return np.where(most_unlabelled, np.uint16(IGNORE), best).astype(np.uint16).reshape(h, w)
