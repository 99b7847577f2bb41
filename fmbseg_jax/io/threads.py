"""Threads that work beside the program: so many at once, and in so much memory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grain


class Room:
    """Memory that threads share: images of so many pixels at once, or a larger one alone."""

    def __init__(self, pixels: int):
        self._free, self._changed = pixels, threading.Condition()
        self._all = pixels

    @contextlib.contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Waits until there is room; whoever has some must not wait for others to get theirs."""
        pixels = min(pixels, self._all)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


class Writers:
    """Threads that write while the program goes on; a failure stops it."""

    def __init__(self, count: int, done: Callable[[], Any]):
        """done: called, in order, when something has been written."""
        self._count, self._done = count, done
        self._pool, self._waiting = ThreadPoolExecutor(count), list[Future[None]]()

    def submit(self, write: Callable[..., None], *given: Any) -> None:
        """Writes in the background, unless much is waiting: then for the first of it."""
        self._waiting.append(self._pool.submit(write, *given))
        while len(self._waiting) > self._count:
            self._finish_one()

    def _finish_one(self) -> None:
        self._waiting.pop(0).result()
        self._done()

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with self._pool:  # waits for what is being written
            while self._waiting and kind is None:
                self._finish_one()


def in_order(count: int, read: Callable[[int], Any], threads: int) -> Iterable[Any]:
    """read(0), read(1), ..., up to `threads` of them at once, ahead of whoever takes them."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return grain.MapDataset.range(count).map(read).to_iter_dataset(options)
