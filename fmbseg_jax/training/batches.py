"""Records of patch features → batches, shuffled, in an order that a seed fixes, resumable.

grain reads; the iterator's state goes into the checkpoint, so that a run that goes on sees the same
batches as one that was never stopped.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import grain
import numpy as np

from fmbseg_jax.errors import UserError
from fmbseg_jax.vocabulary import IGNORE

Iterator: TypeAlias = grain.DatasetIterator


Example = dict[str, np.ndarray]
"""What one image gives to a batch: labels int32 [n], and patches [n, d] or pixels [H, W, 3]."""


class TrainBatches:
    """Batches for training: examples with a first axis b.

    Every image comes once in each epoch. Where the images do not fill the last batch, or the batch
    the devices, images without a label stand in: they take no part in the loss.

    Args:
      count: images.
      read: the example of image i.
      seed: fixes the order.
      batch_size: images in a batch, over all processes.
      epochs: passes over the images.
      multiple: batches are filled up to a multiple of it, the number of devices.
      process: (index, count) of this process; each reads its share of every batch.
      threads: images read at once; speed, not results.
    """

    def __init__(
        self,
        count: int,
        read: Callable[[int], Example],
        *,
        seed: int,
        batch_size: int,
        epochs: int,
        multiple: int = 1,
        process: tuple[int, int] = (0, 1),
        threads: int = 16,
    ):
        index, processes = process
        total, size = count * epochs, -(-batch_size // multiple) * multiple // processes
        self.steps = -(-total // batch_size)
        order = grain.MapDataset.range(count).seed(seed).shuffle().repeat(epochs)
        pool = ThreadPoolExecutor(threads)

        def example(step: int, place: int) -> Example | None:
            position = step * batch_size + place
            return read(int(order[position])) if place < batch_size and position < total else None

        def batch(step: int) -> Example:
            places = range(index * size, (index + 1) * size)
            return _stacked(list(pool.map(functools.partial(example, step), places)), read)

        # One element a step: its state is the same for however many devices and processes.
        self._batches = grain.MapDataset.range(self.steps).map(batch)

    def __iter__(self) -> Iterator:
        ahead = grain.ReadOptions(num_threads=_AHEAD, prefetch_buffer_size=_AHEAD)
        return iter(self._batches.to_iter_dataset(ahead))


class Reader:
    """Takes batches from an iterator, and can give up waiting for one."""

    def __init__(self, iterator: Iterator):
        self._iterator, self._before = iterator, iterator.get_state()

    def next(self, given_up: Callable[[], bool]) -> Example | None:
        """The next batch; None where `given_up`, asked now and then, is True before it is there.

        After None no more can be taken; the state is that before the batch.
        """
        answer: queue.SimpleQueue[tuple[Example | None, BaseException | None]] = queue.SimpleQueue()

        def take() -> None:
            try:
                answer.put((next(self._iterator), None))
            except BaseException as error:  # raised where it is waited for
                answer.put((None, error))

        threading.Thread(target=take, daemon=True).start()
        while True:
            try:
                batch, error = answer.get(timeout=_ASKED_AGAIN)
            except queue.Empty:
                if given_up():
                    return None
                continue
            if error:
                raise error
            self._before = self._iterator.get_state()
            return batch

    def get_state(self) -> Any:
        """The iterator's state after the last batch that was taken."""
        return self._before


_ASKED_AGAIN = 0.2  # s
_AHEAD = 2
"""Batches that are put together while the device has another."""


def _stacked(examples: Sequence[Example | None], read: Callable[[int], Example]) -> Example:
    """The examples as one batch; in place of None an image without a label."""
    like = next((example for example in examples if example), None) or read(0)
    size = len(examples)
    batch = {name: np.zeros((size, *value.shape), value.dtype) for name, value in like.items()}
    batch["labels"][:] = IGNORE
    for i, example in enumerate(examples):
        for name, value in (example or {}).items():
            if value.shape != like[name].shape:
                raise UserError(
                    f"The records hold {name} of several shapes, {like[name].shape} and "
                    f"{value.shape}; make the features of all images with one features.size."
                )
            batch[name][i] = value
    return batch
