"""FMbSeg in JAX: semantic segmentation of any image by any words, learnt without annotation.

`labelling/` (PyTorch) writes pseudo labels with CLIP and SAM; `encoders/` look at images,
`training/` fits the aligner, `evaluation/` scores it, `segmentation/` puts it to work, `sharing/`
passes it on. On top lie the programs alone: features, train, evaluate, segment, export, app.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["IGNORE", "Segmenter", "UserError", "load"]

if TYPE_CHECKING:
    from fmbseg_jax.errors import UserError
    from fmbseg_jax.segmentation.segmenter import Segmenter
    from fmbseg_jax.sharing.loading import load
    from fmbseg_jax.vocabulary import IGNORE

_WHERE = {
    "IGNORE": "vocabulary",
    "UserError": "errors",
    "Segmenter": "segmentation.segmenter",
    "load": "sharing.loading",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:  # on first use: stage 1 imports this package without jax
        return getattr(importlib.import_module(f"fmbseg_jax.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
