"""A cache of what was made last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """What was made last, by key, up to a number of bytes; the newest always stays.

    Threads that ask for one key at once wait for the one that makes it.
    """

    def __init__(self, capacity: int, size: Callable[[Value], int]):
        """Starts empty.

        Args:
          capacity: in bytes.
          size: of a value, in bytes.
        """
        self._capacity, self._size = capacity, size
        self._lock = threading.Lock()
        self._futures: OrderedDict[Hashable, Future[Value]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key; `make` is called where it is not there, and may raise."""
        with self._lock:
            future = self._futures.get(key)
            missing = future is None
            if future is None:
                future = self._futures[key] = Future()
            self._futures.move_to_end(key)
        if missing:
            try:
                future.set_result(make())
            except BaseException as error:
                with self._lock:
                    self._futures.pop(key, None)
                future.set_exception(error)
            else:
                self._shrink()
        return future.result()

    def _shrink(self) -> None:
        with self._lock:
            made = [key for key, future in self._futures.items() if future.done()]
            total = sum(self._size(self._futures[key].result()) for key in made)
            for key in made[:-1]:
                if total <= self._capacity:
                    return
                total -= self._size(self._futures.pop(key).result())
