"""Numbers that are not finite: what half precision, or a damaged file, makes of a model."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fmbseg_jax.errors import NotFiniteError


def check_finite(model: str, dtype: torch.dtype, tensors: Iterable[torch.Tensor]) -> None:
    """Raises NotFiniteError where a number is NaN or infinite; waits for the device once.

    Args:
      model: its name, for the message: "CLIP", "SAM".
      dtype: what it multiplied in.
    """
    # A sum of float32 keeps every NaN and infinity, and holds no mask as large as the numbers.
    sums = [tensor.sum(dtype=torch.float32) for tensor in tensors]
    if sums and not torch.stack(sums).isfinite().all():
        raise NotFiniteError.of(model, str(dtype).removeprefix("torch."), "label.compute")
