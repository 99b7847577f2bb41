"""MaskCLIP (Zhou et al. 2022): CLIP's own patches, by the values of its last block."""

from __future__ import annotations

from typing import Any

from jax import Array

from fmbseg_jax.data import images
from fmbseg_jax.encoders import identity, loading
from fmbseg_jax.nn.aligner import unit


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
