"""FMbSeg in JAX: semantic segmentation of any image by any words, learnt without annotation.

`labelling/` (PyTorch) writes pseudo labels with CLIP and SAM; `features` runs the frozen vision
encoder over them; `training` fits the aligner; `evaluation` scores it; `segmenter` puts it to work.
Reading the package from `data/` to `metrics` is following the data.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["IGNORE", "Segmenter", "UserError", "load"]

if TYPE_CHECKING:
    from fmbseg_jax.errors import UserError
    from fmbseg_jax.loading import load
    from fmbseg_jax.segmenter import Segmenter
    from fmbseg_jax.vocabulary import IGNORE

_WHERE = {
    "IGNORE": "vocabulary",
    "UserError": "errors",
    "Segmenter": "segmenter",
    "load": "loading",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:  # on first use: stage 1 imports this package without jax
        return getattr(importlib.import_module(f"fmbseg_jax.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
