"""Progress bars, of which process 0 alone speaks."""

from __future__ import annotations

import jax
from tqdm import tqdm


def progress(total: int, description: str, initial: int = 0, unit: str = "image") -> tqdm:
    """A progress bar with time left; silent in all processes but the first."""
    return tqdm(
        total=total, initial=initial, desc=f"{description:<10}", unit=f" {unit}",
        disable=jax.process_index() > 0, dynamic_ncols=True, smoothing=0.1,
    )  # fmt: skip
