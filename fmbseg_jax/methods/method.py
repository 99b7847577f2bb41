"""What a method is: windows of an image → unit vectors in the space of text, one for each patch."""

from __future__ import annotations

from typing import Any, Protocol

from jaxtyping import Array, Float, UInt8


class PatchMethod(Protocol):
    """What a `Segmenter` needs of a method."""

    params: Any

    @property
    def patch(self) -> int:
        """Side of a patch, in pixels."""

    @property
    def fingerprint(self) -> str:
        """Differs between any two methods whose features may differ."""

    def apply(self, params: Any, windows: UInt8[Array, "b s s 3"]) -> Float[Array, "b h w D"]:
        """Pure, to be jitted; `params` are `self.params`, perhaps on another device."""
