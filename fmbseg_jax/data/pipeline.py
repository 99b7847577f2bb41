"""Records of patch features → batches, shuffled, in an order that a seed fixes, resumable.

grain reads; the iterator's state goes into the checkpoint, so that a run that goes on sees the same
batches as one that was never stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from fmbseg_jax.data.example import decode_patch_features
from fmbseg_jax.data.tfrecord import RecordSource
from fmbseg_jax.errors import UserError
from fmbseg_jax.vocabulary import IGNORE

Iterator = grain.DatasetIterator


class TrainBatches:
    """Batches for training: dicts of patches float16 [b, n, d] and labels int32 [b, n].

    Every image comes once in each epoch. Where the images do not fill the last batch, or the batch
    the devices, images without a label stand in: they take no part in the loss.

    Args:
      source: the records.
      seed: fixes the order.
      batch_size: images in a batch, over all processes.
      epochs: passes over the images.
      multiple: batches are filled up to a multiple of it, the number of devices.
      process: (index, count) of this process; each reads its share of every batch.
    """

    def __init__(
        self,
        source: RecordSource,
        *,
        seed: int,
        batch_size: int,
        epochs: int,
        multiple: int = 1,
        process: tuple[int, int] = (0, 1),
    ):
        index, count = process
        if batch_size % count:
            raise UserError(
                f"train.batch_size = {batch_size} is not a multiple of the {count} processes."
            )
        self.steps = -(-len(source) * epochs // batch_size)
        size = -(-batch_size // multiple) * multiple // count
        order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(epochs)
        batches = order.batch(batch_size, batch_fn=lambda records: records[index::count])
        self._dataset = batches.map(lambda records: _read(source, records, size))

    def __iter__(self) -> Iterator:
        return iter(self._dataset.to_iter_dataset(grain.ReadOptions(num_threads=4)))


def save_position(batches: Iterator) -> Any:
    """Where an iterator stands, as an argument for Orbax to save."""
    return grain.checkpoint.CheckpointSave(batches)


def restore_position(batches: Iterator) -> Any:
    """An argument for Orbax that moves the iterator to where it stood."""
    return grain.checkpoint.CheckpointRestore(batches)


def _read(source: RecordSource, records: Sequence[int], size: int) -> dict[str, np.ndarray]:
    """The examples of a batch, filled up to `size` with images without a label."""
    examples = [decode_patch_features(source[int(i)]) for i in records]
    shape = (examples[0] if examples else decode_patch_features(source[0])).patches.shape
    batch = {
        "patches": np.zeros((size, *shape), np.float16),
        "labels": np.full((size, shape[0]), IGNORE, np.int32),
    }
    for i, example in enumerate(examples):
        if example.patches.shape != shape:
            raise UserError(
                f"The records hold patches of several shapes, {shape} and {example.patches.shape}; "
                "make the features of all images with one features.size."
            )
        batch["patches"][i], batch["labels"][i] = example.patches, example.labels
    return batch
