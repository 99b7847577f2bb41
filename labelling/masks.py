"""Masks of an image on the host, one bit a pixel: a hundred of 12 megapixels are 150 MB."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Masks:
    """m masks of H × W pixels."""

    bits: np.ndarray
    """uint8 [m, H, ceil(W / 8)], as numpy.packbits packs rows."""
    width: int
    """W."""

    @classmethod
    def pack(cls, masks: np.ndarray) -> Masks:
        """bool [m, H, W]."""
        return cls(np.packbits(masks, axis=-1), masks.shape[-1])

    @classmethod
    def empty(cls, size: tuple[int, int]) -> Masks:
        """None, of an image of size (H, W)."""
        return cls(np.zeros((0, size[0], -(-size[1] // 8)), np.uint8), size[1])

    @classmethod
    def join(cls, parts: Sequence[Masks]) -> Masks:
        """Of one image; at least one part, which may be empty."""
        return cls(np.concatenate([part.bits for part in parts]), parts[0].width)

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, chosen: Any) -> Masks:
        """By a bool or integer array over the masks."""
        return Masks(self.bits[chosen], self.width)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.bits.shape[1], self.width

    def rows(self, rows: slice) -> np.ndarray:
        """Some rows of all masks: bool [m, r, W]."""
        return _unpack(self.bits[:, rows], self.width)

    def unions(self, starts: np.ndarray, rows: slice) -> np.ndarray:
        """Which pixels any mask of a group covers, bool [g, r, W]; groups begin at `starts` [g]."""
        return _unpack(np.bitwise_or.reduceat(self.bits[:, rows], starts, axis=0), self.width)

    def union(self) -> np.ndarray:
        """Which pixels any mask covers: bool [H, W]."""
        return _unpack(np.bitwise_or.reduce(self.bits, axis=0), self.width)

    def areas(self) -> np.ndarray:
        """Pixels of each mask: int64 [m]."""
        return np.bitwise_count(self.bits).sum((1, 2), dtype=np.int64)


def _unpack(bits: np.ndarray, width: int) -> np.ndarray:
    return np.unpackbits(bits, axis=-1, count=width).view(bool)
