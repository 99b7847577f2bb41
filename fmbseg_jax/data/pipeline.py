"""Records of patch features → batches, shuffled, in an order that a seed fixes, resumable.

grain reads; the iterator's state goes into the checkpoint, so that a run that goes on sees the same
batches as one that was never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grain
import numpy as np

from fmbseg_jax.errors import UserError
from fmbseg_jax.vocabulary import IGNORE

Iterator = grain.DatasetIterator


Example = dict[str, np.ndarray]
"""What one image contributes to a batch: labels int32 [n], and patches [n, d] or pixels [H, W, 3]."""


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
        if batch_size % processes:
            raise UserError(
                f"train.batch_size = {batch_size} is not a multiple of the {processes} processes."
            )
        total, share = count * epochs, batch_size // processes
        self.steps = -(-total // batch_size)
        order = grain.MapDataset.range(count).seed(seed).shuffle().repeat(epochs)

        def example(i: int) -> Example:
            step, place = divmod(i, share)
            position = step * batch_size + index * share + place
            return read(int(order[position])) if position < total else _NOTHING

        size = -(-batch_size // multiple) * multiple // processes
        self._examples = grain.MapDataset.range(self.steps * share).map(example)
        self._read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + share)
        self._share, self._stack = share, lambda examples: _stacked(examples, size, read)

    def __iter__(self) -> Iterator:
        examples = self._examples.to_iter_dataset(self._read)
        batches = examples.batch(self._share, batch_fn=self._stack)
        # A thread puts the next batch together while the device has this one.
        return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=1))


_NOTHING: Example = {}
"""In place of an image, after the last one."""


def save_position(batches: Iterator) -> Any:
    """Where an iterator stands, as an argument for Orbax to save."""
    return grain.checkpoint.CheckpointSave(batches)


def restore_position(batches: Iterator) -> Any:
    """An argument for Orbax that moves the iterator to where it stood."""
    return grain.checkpoint.CheckpointRestore(batches)


def _stacked(examples: Sequence[Example], size: int, read: Callable[[int], Example]) -> Example:
    """The examples as one batch, filled up to `size` with images without a label."""
    examples = [example for example in examples if example]
    like = examples[0] if examples else read(0)
    batch = {name: np.zeros((size, *value.shape), value.dtype) for name, value in like.items()}
    batch["labels"][:] = IGNORE
    for i, example in enumerate(examples):
        for name, value in example.items():
            if value.shape != like[name].shape:
                raise UserError(
                    f"The records hold {name} of several shapes, {like[name].shape} and "
                    f"{value.shape}; make the features of all images with one features.size."
                )
            batch[name][i] = value
    return batch


def in_order(count: int, read: Callable[[int], Any], threads: int) -> Iterable[Any]:
    """read(0), read(1), ..., up to `threads` of them at once, ahead of whoever takes them."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return grain.MapDataset.range(count).map(read).to_iter_dataset(options)
