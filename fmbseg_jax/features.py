"""Program: records of images and labels → records of patch features and patch labels.

    python -m fmbseg_jax.features --config=FILE --workdir=DIR

Reads WORKDIR/pseudo_labels, runs the frozen vision encoder over every image, and writes one shard
of WORKDIR/features for each shard there. Run again to continue: a shard that is there stays, unless
the labels or the encoder that it was made from have changed. Batches are split over the devices of
a host, shards are divided between hosts.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmbseg_jax import logs, program, sharding, workfolder
from fmbseg_jax.config import Config, flatten
from fmbseg_jax.data import example, images, pipeline
from fmbseg_jax.data.tfrecord import RecordSource, ShardWriter, find_shards, shard_name
from fmbseg_jax.models import weights
from fmbseg_jax.patches import PatchEncoder, encode


def write_features(config: Config, workdir: Path) -> None:
    """Runs the stage: WORKDIR/pseudo_labels → WORKDIR/features."""
    source = workdir / "pseudo_labels"
    metadata = example.read_metadata(source)
    inputs = find_shards(source)
    folder = workdir / "features"
    folder.mkdir(exist_ok=True)
    vision = {"source": config.models.vision, "hash": weights.content_hash(config.models.vision)}
    shards = [
        _Shard(folder, i, len(inputs), RecordSource([path]), vision["hash"])
        for i, path in enumerate(inputs)
    ]
    mine = shards[jax.process_index() :: jax.process_count()]
    missing = [shard for shard in mine if not shard.done]
    if changed := sum(shard.path.exists() for shard in missing):
        print(f"{changed} shards in {folder} came from other labels or weights: made again.")
    if missing:
        total, to_do = (sum(len(shard.labelled) for shard in some) for some in (mine, missing))
        frozen = _Frozen(config, len(metadata["words"]))
        with logs.progress(total, "features", total - to_do) as bar:
            for shard in missing:
                with shard.writer() as writer:
                    for features in frozen.features(shard.labelled):
                        writer.write(example.encode(features))
                        bar.update()
        print(frozen.speed())
    sharding.wait_for_all("features")
    if jax.process_index() == 0:
        _finish(config, folder, [shard.path for shard in shards], vision, metadata)


class _Shard:
    """A shard of features, and what it has to be made from."""

    def __init__(self, folder: Path, index: int, count: int, labelled: RecordSource, vision: str):
        self.path = folder / shard_name(
            example.dataset_name(example.PatchFeatures), "train", index, count
        )
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
    kind = {"float16": example.PatchFeatures, "int8": example.Int8PatchFeatures}
    example.write_metadata(folder, kind[config.features.dtype], sizes, num_bytes, ours)
    print(f"{sum(sizes)} images' patch features are in {folder}")


class _Frozen:
    """The encoder over records: images are decoded ahead by threads, batches have one shape."""

    def __init__(self, config: Config, num_words: int):
        options, self._words = config.features, num_words
        self._encoder = PatchEncoder(config.models.vision, options.size, options.compute)
        self._mesh = sharding.local_mesh()
        self._params = sharding.replicate(self._mesh, self._encoder.params)
        self._apply = jax.jit(functools.partial(_halves, self._encoder.module))
        self._batch = -(-options.batch_size // self._mesh.size) * self._mesh.size
        self._threads, self._int8 = options.threads, options.dtype == "int8"
        self._images, self._seconds, self._waited = 0, 0.0, 0.0

    def features(
        self, records: RecordSource
    ) -> Iterator[example.PatchFeatures | example.Int8PatchFeatures]:
        """One record of features for each record of labels, in order."""

        def read(i: int) -> tuple[str, pipeline.Example]:
            labelled = example.decode_pseudo_label(records[i])
            return labelled.filename, self._encoder.prepare(labelled, self._words)

        start = time.monotonic()
        prepared = iter(pipeline.in_order(len(records), read, self._threads))
        running: tuple[Array, list[tuple[str, pipeline.Example]]] | None = None
        for _ in range(-(-len(records) // self._batch)):
            batch = self._next(prepared, running[0] if running else None)
            pixels = np.zeros((self._batch, *batch[0][1]["pixels"].shape), np.uint8)
            for i, (_, one) in enumerate(batch):
                pixels[i] = one["pixels"]  # what is left of the last batch stays black
            computed = self._apply(self._params, sharding.distribute(self._mesh, pixels))
            if running:
                yield from self._fetch(*running)
            running = computed, batch
        if running:
            yield from self._fetch(*running)
        self._seconds += time.monotonic() - start

    def _next(self, prepared: Iterator[Any], running: Array | None) -> list[Any]:
        """The next images. If by then the device is done with those before, it has waited."""
        start = time.monotonic()
        batch = [one for _, one in zip(range(self._batch), prepared, strict=False)]
        if running is None or running.is_ready():  # type: ignore[attr-defined]
            self._waited += time.monotonic() - start
        return batch

    def _fetch(
        self, computed: Array, batch: list[tuple[str, pipeline.Example]]
    ) -> Iterator[example.PatchFeatures | example.Int8PatchFeatures]:
        grid = np.asarray([self._encoder.side] * 2, np.int32)
        for patches, (name, one) in zip(np.asarray(computed), batch, strict=False):
            features = example.PatchFeatures(patches, one["labels"], grid, name)
            yield example.quantise(features) if self._int8 else features
        self._images += len(batch)

    def speed(self) -> str:
        """Images a second, and the share of the time in which the device had nothing to do."""
        return (
            f"{self._images / self._seconds:.1f} images/s; the device waited for images "
            f"{self._waited / self._seconds:.0%} of the time"
        )


def _halves(module: Any, params: Any, pixels: Array) -> Array:
    return encode(module, params, pixels).astype(jnp.float16)


def main() -> None:
    sharding.start_hosts()
    config, workdir = CONFIG.value, Path(WORKDIR.value)
    example.read_metadata(workdir / "pseudo_labels")  # a mistyped folder is not made
    if jax.process_index() == 0:
        workfolder.claim(workdir, config, ("models", "features"))
    write_features(config, workdir)


if __name__ == "__main__":
    CONFIG, WORKDIR = program.define_config()
    program.run(main)
