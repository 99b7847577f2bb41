"""Program: records of images and labels → records of patch features and patch labels.

    python -m fmbseg_jax.features --config=FILE --workdir=DIR

Reads WORKDIR/pseudo_labels, runs the frozen vision encoder over every image, and writes one shard
of WORKDIR/features for each shard there. Run again to continue: a shard that is there stays, unless
the labels or the encoder that it was made from have changed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Float

from fmbseg_jax import logs, program, workfolder
from fmbseg_jax.config import Config, flatten
from fmbseg_jax.data import images
from fmbseg_jax.data.example import (
    PatchFeatures,
    PseudoLabel,
    dataset_name,
    decode_pseudo_label,
    encode,
    read_metadata,
    write_metadata,
)
from fmbseg_jax.data.tfrecord import RecordSource, ShardWriter, find_shards, shard_name
from fmbseg_jax.errors import UserError
from fmbseg_jax.models import encoders, weights
from fmbseg_jax.vocabulary import IGNORE


def patch_labels(labels: np.ndarray, grid: tuple[int, int], num_words: int) -> np.ndarray:
    """The word of each patch: that of most of its labelled pixels.

    Args:
      labels: uint16 [H, W], word index or IGNORE, with H and W multiples of the grid's h and w.
      grid: (h, w).
      num_words: K.

    Returns:
      uint16 [h, w]; IGNORE where most of a patch's pixels are unlabelled. Of words with as many
      pixels the first in the list wins.
    """
    (h, w), (height, width) = grid, labels.shape
    cells = labels.reshape(h, height // h, w, width // w).transpose(0, 2, 1, 3).reshape(h * w, -1)
    present = np.unique(cells[cells != IGNORE])  # few words of many: count only those
    if np.any(present >= num_words):
        raise UserError(f"A label map holds word {present.max()}, of {num_words} words.")
    counts = np.stack([(cells == word).sum(1) for word in present] or [np.zeros(h * w)], axis=1)
    best = np.append(present, np.uint16(IGNORE))[counts.argmax(1)]
    most_unlabelled = counts.sum(1) * 2 < cells.shape[1]
    return np.where(most_unlabelled, np.uint16(IGNORE), best).astype(np.uint16).reshape(h, w)


def write_features(config: Config, workdir: Path) -> None:
    """Runs the stage: WORKDIR/pseudo_labels → WORKDIR/features."""
    source = workdir / "pseudo_labels"
    metadata = read_metadata(source)
    inputs = find_shards(source)
    folder = workdir / "features"
    folder.mkdir(exist_ok=True)
    vision = {"source": config.models.vision, "hash": weights.content_hash(config.models.vision)}
    shards = [
        _Shard(folder, i, len(inputs), RecordSource([path]), vision["hash"])
        for i, path in enumerate(inputs)
    ]
    missing = [shard for shard in shards if not shard.done]
    if changed := sum(shard.path.exists() for shard in missing):
        print(f"{changed} shards in {folder} came from other labels or weights: made again.")
    if missing:
        total, to_do = (sum(len(shard.labelled) for shard in some) for some in (shards, missing))
        encoder = _Encoder(config)
        with logs.progress(total, "features", total - to_do) as bar:
            for shard in missing:
                with shard.writer() as writer:
                    for example in encoder.examples(shard.labelled, len(metadata["words"])):
                        writer.write(encode(example))
                        bar.update()
    _finish(config, folder, [shard.path for shard in shards], vision, metadata)


class _Shard:
    """A shard of features, and what it has to be made from."""

    def __init__(self, folder: Path, index: int, count: int, labelled: RecordSource, vision: str):
        self.path = folder / shard_name(dataset_name(PatchFeatures), "train", index, count)
        self.labelled = labelled
        self._facts = {"labels": labelled.digest, "vision": vision}
        self._record = folder / "progress" / f"{index:05d}.json"

    @property
    def done(self) -> bool:
        if not (self.path.exists() and self._record.exists()):
            return False
        return json.loads(self._record.read_text()) == self._facts

    def writer(self) -> ShardWriter:
        """What it is made from is on disk before it gets its name; so the old one goes first."""
        self.path.unlink(missing_ok=True)
        self._record.parent.mkdir(exist_ok=True)
        images.write_atomically(self._record, json.dumps(self._facts).encode())
        return ShardWriter(self.path)


def _finish(
    config: Config,
    folder: Path,
    shards: list[Path],
    vision: dict[str, str],
    metadata: dict[str, Any],
) -> None:
    sizes = [len(RecordSource([path])) for path in shards]
    num_bytes = sum(path.stat().st_size for path in shards)
    stage = {
        name: value
        for name, value in flatten(config).items()
        if name == "models.vision" or name.startswith("features.")
    }
    made_by = metadata.get("config", {}) | stage  # of the labels, what was true when they were made
    ours = {"words": metadata["words"], "vision": vision, "config": made_by}
    write_metadata(folder, PatchFeatures, sizes, num_bytes, ours)
    print(f"{sum(sizes)} images' patch features are in {folder}")


class _Encoder:
    """The frozen vision encoder over records, in batches of one shape."""

    def __init__(self, config: Config):
        self._size, self._batch = config.features.size, config.features.batch_size
        module, self._params = encoders.load_vision(config.models.vision)
        self._spec = module.spec
        if self._size % self._spec.patch:
            raise UserError(
                f"features.size = {self._size} is not a multiple of the encoder's patch of "
                f"{self._spec.patch} pixels."
            )
        self._apply = jax.jit(functools.partial(_patches, module))

    def examples(self, records: RecordSource, num_words: int) -> Iterator[PatchFeatures]:
        """One record of features for each record of labels, in order."""
        side = self._size // self._spec.patch
        for start in range(0, len(records), self._batch):
            stop = min(start + self._batch, len(records))
            labelled = [decode_pseudo_label(records[i]) for i in range(start, stop)]
            for example, patches in zip(labelled, self._features(labelled), strict=True):
                square = images.resize_labels(example.labels, (self._size, self._size))
                labels = patch_labels(square, (side, side), num_words)
                yield PatchFeatures(
                    patches,
                    labels.reshape(-1),
                    np.asarray([side, side], np.int32),
                    example.filename,
                )

    def _features(self, examples: list[PseudoLabel]) -> np.ndarray:
        shape = (self._size, self._size)
        pixels = np.zeros((self._batch, *shape, 3), np.uint8)  # the last batch is filled up
        for i, example in enumerate(examples):
            pixels[i] = images.resize(images.decode(example.image), shape)
        return np.asarray(self._apply(self._params, pixels), np.float16)[: len(examples)]


def _patches(module: encoders.VisionEncoder, params: Any, pixels: Array) -> Float[Array, "b n d"]:
    normal = images.normalise(pixels, module.spec.mean, module.spec.std)
    patches = module.apply({"params": params}, normal).patches
    return patches.reshape(patches.shape[0], -1, patches.shape[-1])


def main() -> None:
    config, workdir = CONFIG.value, Path(WORKDIR.value)
    read_metadata(workdir / "pseudo_labels")  # a mistyped folder is not made
    write_features(config, workfolder.claim(workdir, config, ("models", "features")))


if __name__ == "__main__":
    CONFIG, WORKDIR = program.define_config()
    program.run(main)
