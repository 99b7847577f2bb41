"""The project's own method: an aligner, trained upon a frozen vision encoder (section 3.3)."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmbseg_jax.encoders import loading
from fmbseg_jax.encoders.patches import encode
from fmbseg_jax.nn import aligner


class Aligned:
    """A frozen vision encoder, and the aligner that was trained upon it."""

    def __init__(self, model: dict[str, Any], vision: str, compute: str = "float32"):
        """Loads the encoder; the aligner's parameters come by `use`.

        Args:
          model: what an export's model.json holds.
          vision: source of the encoder.
          compute: what it multiplies in, "float32" or "bfloat16".
        """
        self._model = model
        self._vision, self._vision_params = loading.load_vision(vision, compute)
        self._aligner = aligner.create(**model["aligner"])
        self.params: Any = None

    @property
    def patch(self) -> int:
        return self._vision.spec.patch

    @property
    def shapes(self) -> Any:
        """Of the aligner's parameters, without any array."""
        some = jnp.zeros((1, 4, self._vision.spec.transformer.width), jnp.float32)
        return jax.eval_shape(self._aligner.init, jax.random.key(0), some)["params"]

    def use(self, params: Any) -> None:
        """Takes these parameters of the aligner."""
        self.params = {"vision": self._vision_params, "aligner": params}

    @property
    def fingerprint(self) -> str:
        leaves = jax.tree.leaves(self.params["aligner"])
        digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves))
        digest.update(repr((self._model["aligner"], self._model["vision"]["hash"])).encode())
        return digest.hexdigest()

    def apply(self, params: Any, windows: Array) -> Array:
        patches = encode(self._vision, params["vision"], windows)
        aligned = self._aligner.apply({"params": params["aligner"]}, patches)
        h, w = windows.shape[1] // self.patch, windows.shape[2] // self.patch
        return aligned.reshape(windows.shape[0], h, w, -1)
