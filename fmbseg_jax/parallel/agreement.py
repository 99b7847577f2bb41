"""What the processes of a run agree on: one does it for all, all wait, numbers are added up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from fmbseg_jax.errors import UserError
from fmbseg_jax.runs import workfolder


def wait_for_all(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def hold(folder: epath.PathLike) -> Iterator[None]:
    """`workfolder.hold`, by one process for all of them."""
    with contextlib.ExitStack() as stack:
        by_the_first(lambda: stack.enter_context(workfolder.hold(folder)))
        yield


def same_for_all(value: Any) -> Any:
    """Process 0's array or number, in every process."""
    return value if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(value)


def of_all(number: int) -> list[int]:
    """What each process gives."""
    if jax.process_count() == 1:
        return [number]
    return [int(x) for x in multihost_utils.process_allgather(np.int32(number))]


def together(act: Callable[[], Any]) -> None:
    """Every process does its own; where one raises UserError, all do."""
    failed: UserError | None = None
    try:
        act()
    except UserError as error:
        failed = error
    others = of_all(int(failed is not None))
    if any(others):
        which = others.index(1)
        raise failed or UserError(f"Process {which} has stopped; its output says why.")


def sum_of_all(counts: np.ndarray) -> np.ndarray:
    """The sum over processes of int64 arrays, exact."""
    if jax.process_count() == 1:
        return counts
    halves = np.stack([counts >> 31, counts & (1 << 31) - 1]).astype(np.int32)  # jax has no int64
    high, low = multihost_utils.process_allgather(halves).astype(np.int64).sum(0)
    return (high << 31) + low


def by_the_first(act: Callable[[], Any]) -> None:
    """Process 0 does it; where that raises UserError, all processes do."""
    together(act if jax.process_index() == 0 else lambda: None)
