"""FMbSeg in JAX: semantic segmentation of any image by any words, learnt without annotation.

`labelling/` (PyTorch) writes pseudo labels with CLIP and SAM; `features` runs the frozen vision
encoder over them; `training` fits the aligner; `evaluation` scores it; `segmenter` puts it to work.
Reading the package from `data/` to `metrics` is following the data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Segmenter", "load"]

if TYPE_CHECKING:
    from fmbseg_jax.loading import load
    from fmbseg_jax.segmenter import Segmenter


def __getattr__(name: str) -> Any:
    if name in __all__:  # on first use: stage 1 imports this package without jax
        from fmbseg_jax import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
