"""Records of patch features → batches, shuffled, in an order that a seed fixes, resumable.

grain reads; the iterator's state goes into the checkpoint, so that a run that goes on sees the same
batches as one that was never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grain
import jax
import numpy as np
from etils import epath

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
        total, size = count * epochs, -(-batch_size // multiple) * multiple // processes
        self.steps = -(-total // batch_size)
        order = grain.MapDataset.range(count).seed(seed).shuffle().repeat(epochs)

        def example(i: int) -> Example:
            step, place = divmod(i, size)
            place += index * size
            position = step * batch_size + place
            return read(int(order[position])) if place < batch_size and position < total else {}

        self._examples = grain.MapDataset.range(self.steps * size).map(example)
        self._read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + size)
        self._size, self._stack = size, lambda examples: _stacked(examples, read)

    def __iter__(self) -> Iterator:
        examples = self._examples.to_iter_dataset(self._read)
        batches = examples.batch(self._size, batch_fn=self._stack)
        # A thread puts the next batch together while the device has this one.
        return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=1))

    def move(self, batches: Iterator, step: int) -> None:
        """Moves an iterator to where it stands after `step` steps."""
        batches.set_state({"next_index": step * self._size})  # type: ignore[attr-defined]


def save_position(batches: Iterator) -> Any:
    """Where an iterator stands, as an argument for Orbax to save."""
    return grain.checkpoint.CheckpointSave(batches)


def restore_position(batches: Iterator, folder: epath.Path) -> Any | None:
    """An argument for Orbax that moves the iterator to where it stood.

    None where `folder`, in which Orbax keeps it, is of another number of processes.
    """
    name = f"process_{jax.process_index()}-of-{jax.process_count()}.json"
    return grain.checkpoint.CheckpointRestore(batches) if (folder / name).exists() else None


def _stacked(examples: Sequence[Example], read: Callable[[int], Example]) -> Example:
    """The examples as one batch; in place of an empty one an image without a label."""
    like = next((example for example in examples if example), None) or read(0)
    size = len(examples)
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
