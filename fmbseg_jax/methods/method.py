"""Models that give every patch of an image a unit vector in CLIP's text space."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from fmbseg_jax.data import images
from fmbseg_jax.encoders import identity, loading
from fmbseg_jax.encoders.patches import encode
from fmbseg_jax.nn import aligner as aligners
from fmbseg_jax.nn.aligner import unit


class Dense(Protocol):
    """What a `Segmenter` needs of a model."""

    params: Any

    @property
    def patch(self) -> int:
        """Side of a patch, in pixels."""

    @property
    def fingerprint(self) -> str:
        """Differs between any two models whose features may differ."""

    def apply(self, params: Any, windows: UInt8[Array, "b s s 3"]) -> Float[Array, "b h w D"]:
        """Pure, to be jitted; `params` are `self.params`, perhaps on another device."""


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
        self._aligner = aligners.create(**model["aligner"])
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


class ClipPatches:
    """CLIP's own patches, from the value projection of its last block (MaskCLIP's way).

    The paper's baseline (section 3.1, Figure 3): nothing is trained.
    """

    def __init__(self, source: str, compute: str = "float32"):
        self._module, params = loading.load_clip_vision(source, compute)
        self.params: Any = params
        self._hash = identity.content_hash(source)

    @property
    def patch(self) -> int:
        return self._module.spec.patch

    @property
    def fingerprint(self) -> str:
        return f"CLIP's patches {self._hash}"

    def apply(self, params: Any, windows: Array) -> Array:
        spec = self._module.spec
        normal = images.normalise(windows, spec.mean, spec.std)
        return unit(self._module.apply({"params": params}, normal).patches)
