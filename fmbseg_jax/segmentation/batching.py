"""Windows of several images in batches of one size, so that one shape is compiled for all."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import numpy as np
from jax import Array

Key = TypeVar("Key")


@dataclasses.dataclass
class Encoded(Generic[Key]):
    """What became of one image's windows."""

    key: Key
    batches: list[Array]
    """Those that hold a window of this image, each [batch, ...]."""
    index: np.ndarray
    """int32 [n]: where its windows lie in the batches, one after the other."""


def encode(
    images: Iterable[tuple[Key, np.ndarray]], size: int, run: Callable[[int, np.ndarray], Array]
) -> Iterator[Encoded[Key]]:
    """Runs all windows of all images, `size` at once.

    Args:
      images: by image its key and its windows, [n, ...] with any n ≥ 1.
      run: number and windows of a batch, [size, ...], to an array [size, ...]. The last batch is
        filled up with zeros.

    Yields:
      The images, in order, each as soon as its last window has been given to `run`.
    """
    waiting: collections.deque[tuple[Key, int, int]] = collections.deque()  # first, one past last
    batches: dict[int, Array] = {}
    rest, count, done = np.zeros(0), 0, 0

    def finished() -> Iterator[Encoded[Key]]:
        while waiting and waiting[0][2] <= done * size:
            key, first, end = waiting.popleft()
            needed = range(first // size, (end - 1) // size + 1)
            for old in [number for number in batches if number < needed[0]]:
                del batches[old]
            index = np.arange(first, end, dtype=np.int32) - needed[0] * size
            yield Encoded(key, [batches[number] for number in needed], index)

    for key, windows in images:
        waiting.append((key, count, count + len(windows)))
        count += len(windows)
        rest = np.concatenate([rest, windows]) if len(rest) else windows
        while len(rest) >= size:
            batches[done], rest = run(done, rest[:size]), rest[size:]
            done += 1
        yield from finished()
    if len(rest):
        filled = np.zeros((size, *rest.shape[1:]), rest.dtype)
        filled[: len(rest)] = rest
        batches[done] = run(done, filled)
        done += 1
        yield from finished()
