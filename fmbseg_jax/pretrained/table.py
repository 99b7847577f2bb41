"""What each parameter is called in a published file: complete in both directions.

A table maps our parameter's path to the tensor's name there and to how its layout changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

_Shape = tuple[int, ...]


class Layout(NamedTuple):
    """How a tensor is laid out in the published file, and how ours comes of it."""

    published: Callable[[_Shape], _Shape]
    """From our shape to theirs."""
    convert: Callable[[np.ndarray], np.ndarray]
    """From their tensor to ours."""


KEEP = Layout(lambda ours: ours, lambda tensor: tensor)
FLAT = Layout(lambda ours: (1, 1, *ours), lambda tensor: tensor[0, 0])
ROWS = Layout(lambda ours: (1, *ours), lambda tensor: tensor[0])
# torch's Linear holds [out, in], its Conv2d [out, in, h, w]; ours [in, out] and [h, w, in, out].
TRANSPOSE = Layout(lambda ours: ours[::-1], lambda tensor: tensor.T)
CONV = Layout(
    lambda ours: (ours[3], ours[2], *ours[:2]), lambda tensor: tensor.transpose(2, 3, 1, 0)
)


def _part(index: int, count: int) -> Layout:
    """One of several matrices, or biases, that lie on top of each other in one tensor."""
    return Layout(
        lambda ours: (count * ours[-1], *ours[:-1]),
        lambda tensor: np.split(tensor, count)[index].T,
    )


Entries = dict[str, tuple[str, Layout]]


@dataclasses.dataclass(frozen=True)
class Table:
    """Our path → (their name, its layout); `unused` matches names left out on purpose."""

    entries: Entries
    unused: str
    prefix: str = ""
    """What all names may begin with: in a model with a head on top of the tower."""


def joined(ours: str, names: Sequence[str], theirs: str) -> Entries:
    """Layers that are one in the published file, in the order of their rows."""
    entries: Entries = {}
    for i, name in enumerate(names):
        part = _part(i, len(names))
        entries[f"{ours}/{name}/kernel"] = (f"{theirs}.weight", part)
        entries[f"{ours}/{name}/bias"] = (f"{theirs}.bias", part)
    return entries


def dense(ours: str, theirs: str) -> Entries:
    return {
        f"{ours}/kernel": (f"{theirs}.weight", TRANSPOSE),
        f"{ours}/bias": (f"{theirs}.bias", KEEP),
    }


def norm(ours: str, theirs: str) -> Entries:
    return {
        f"{ours}/scale": (f"{theirs}.weight", KEEP),
        f"{ours}/bias": (f"{theirs}.bias", KEEP),
    }
