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
      threads: batches read at once; speed, not results.
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
        self.steps = -(-count * epochs // batch_size)
        size = -(-batch_size // multiple) * multiple // processes
        order = grain.MapDataset.range(count).seed(seed).shuffle().repeat(epochs)
        batches = order.batch(batch_size, batch_fn=lambda images: images[index::processes])
        self._options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        self._dataset = batches.map(lambda images: _filled(read, images, size))

    def __iter__(self) -> Iterator:
        return iter(self._dataset.to_iter_dataset(self._options))


def save_position(batches: Iterator) -> Any:
    """Where an iterator stands, as an argument for Orbax to save."""
    return grain.checkpoint.CheckpointSave(batches)


def restore_position(batches: Iterator) -> Any:
    """An argument for Orbax that moves the iterator to where it stood."""
    return grain.checkpoint.CheckpointRestore(batches)


def _filled(read: Callable[[int], Example], images: Sequence[int], size: int) -> Example:
    """The examples of a batch, filled up to `size` with images without a label."""
    examples = [read(int(i)) for i in images]
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
