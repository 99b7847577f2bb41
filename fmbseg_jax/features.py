"""Program: records of images and labels → records of patch features and patch labels.

    fmbseg features --config=configs/toy.py --workdir=work/toy

Reads WORKDIR/pseudo_labels, runs the frozen vision encoder over every image, and writes one shard
of WORKDIR/features for each shard there. Run again to continue: a shard that is there stays, unless
the labels or the encoder that it was made from have changed. Batches are split over the devices of
a host, shards are divided between hosts: start it on each (docs/pods.md).
"""

from __future__ import annotations

import collections
import functools
import itertools
import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import Array

from fmbseg_jax.config import Config, flatten
from fmbseg_jax.data import example
from fmbseg_jax.data.records import open_records
from fmbseg_jax.data.tfrecord import RecordError, RecordSource, ShardWriter, shard_name
from fmbseg_jax.encoders import identity
from fmbseg_jax.encoders.patches import PatchEncoder, encode
from fmbseg_jax.errors import UserError
from fmbseg_jax.io import files
from fmbseg_jax.io.threads import in_order
from fmbseg_jax.parallel import agreement, hosts, mesh
from fmbseg_jax.runs import program, workfolder
from fmbseg_jax.runs.progress import progress
from fmbseg_jax.training import batches


def write_features(config: Config, workdir: epath.Path) -> None:
    """Runs the stage: WORKDIR/pseudo_labels → WORKDIR/features."""
    source = workdir / "pseudo_labels"
    metadata = example.read_metadata(source)
    example.check_deep(metadata, config.data.deep)
    inputs = open_records(source).paths
    folder = workdir / "features"
    before = _made_from(_record(folder, 0)).get("vision", "")
    vision = identity.describe(config.models.vision, before)
    options = config.features
    made_by = {
        "vision": vision["hash"],
        "deep": config.data.deep,
        **{name: getattr(options, name) for name in ("size", "compute", "dtype")},
    }
    shards = [_Shard(folder, i, len(inputs), path, made_by) for i, path in enumerate(inputs)]
    mine = shards[jax.process_index() :: jax.process_count()]
    missing = [shard for shard in mine if not shard.done]
    if changed := sum(shard.path.exists() for shard in missing):
        print(
            f"{changed} shards in {folder} came from other labels, weights or settings, or are cut "
            "short: made again."
        )
    if missing:
        total, to_do = (sum(shard.size for shard in some) for some in (mine, missing))
        frozen = _Frozen(config, len(metadata["words"]))
        records = frozen.records(RecordSource([shard.labelled for shard in missing]))
        with progress(total, "features", total - to_do) as bar:
            for shard in missing:
                with shard.writer() as writer:
                    for record in itertools.islice(records, shard.size):
                        writer.write(record)
                        bar.update()
        print(frozen.speed())
    agreement.wait_for_all("features")
    if told := config.data.reading.of_deep(*metadata.get("deep", (0, ""))):
        print(told)
    if jax.process_index() == 0:
        _finish(config, folder, [shard.path for shard in shards], vision, metadata)


class _Shard:
    """A shard of features, and what it has to be made from."""

    def __init__(
        self,
        folder: epath.Path,
        index: int,
        count: int,
        labelled: epath.Path,
        made_by: dict[str, Any],
    ):
        self.path = folder / shard_name(
            example.dataset_name(example.PatchFeatures), "train", index, count
        )
        self.labelled = labelled
        source = RecordSource([labelled])
        self.size = len(source)
        self._facts = {"labels": source.digest, **made_by}
        self._record = _record(folder, index)

    @property
    def done(self) -> bool:
        made = {"deep": "file"} | _made_from(self._record)  # older ones lack "deep"
        if made != self._facts or not self.path.exists():
            return False
        try:
            return len(RecordSource([self.path])) == self.size
        except RecordError:  # damaged: made again
            return False

    def writer(self) -> ShardWriter:
        """What it is made from is on disk before it gets its name; so the old one goes first."""
        self.path.unlink(missing_ok=True)
        self._record.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(self._record, json.dumps(self._facts).encode())
        return ShardWriter(self.path)


def _record(folder: epath.Path, index: int) -> epath.Path:
    """Where it is written down what a shard is made from."""
    return folder / "progress" / f"{index:05d}.json"


def _made_from(record: epath.Path) -> dict[str, Any]:
    """What a shard was made from; nothing where that is not known, so that it is made again."""
    try:
        return workfolder.recorded(record, {"vision?": str}, "")
    except UserError:
        return {}


def _finish(
    config: Config,
    folder: epath.Path,
    shards: list[epath.Path],
    vision: dict[str, str],
    metadata: dict[str, Any],
) -> None:
    sizes = [len(RecordSource([path])) for path in shards]
    num_bytes = sum(path.stat().length for path in shards)
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
    """The encoder over records, in batches of one shape.

    Threads decode the images ahead of the device, and turn what comes from it into records behind
    it: two batches are with the device at any time, so that it need not wait for either.
    """

    def __init__(self, config: Config, num_words: int):
        options, self._words, self._reading = config.features, num_words, config.data.reading
        self._encoder = PatchEncoder(config.models.vision, options.size, options.compute)
        self._mesh = mesh.local_mesh()
        self._params = mesh.replicate(self._mesh, self._encoder.params)
        self._apply = jax.jit(functools.partial(_halves, self._encoder.module))
        self._batch = -(-options.batch_size // self._mesh.size) * self._mesh.size
        self._threads, self._int8 = options.threads, options.dtype == "int8"
        self._images, self._start, self._idle = 0, 0.0, 0.0

    def records(self, labelled: RecordSource) -> Iterator[bytes]:
        """One record of features for each record of labels, in order."""

        def read(i: int) -> tuple[str, batches.Example]:
            with labelled.naming(i):
                record = example.read_pseudo_label(labelled, i, self._words)
                return record.filename, self._encoder.prepare(record, self._words, self._reading)

        self._start = time.monotonic()
        prepared = iter(in_order(len(labelled), read, self._threads))
        with ThreadPoolExecutor(_WRITERS) as pool:
            jobs: collections.deque[Future[tuple[float, list[bytes]]]] = collections.deque()
            for _ in range(-(-len(labelled) // self._batch)):
                batch = list(itertools.islice(prepared, self._batch))
                pixels = np.zeros((self._batch, *batch[0][1]["pixels"].shape), np.uint8)
                for i, (_, one) in enumerate(batch):
                    pixels[i] = one["pixels"]  # what is left of the last batch stays black
                split = mesh.distribute(self._mesh, pixels)
                if jobs and jobs[-1].done():
                    self._idle += time.monotonic() - jobs[-1].result()[0]
                computed = self._apply(self._params, split)
                jobs.append(pool.submit(self._encoded, computed, batch))
                self._images += len(batch)
                if len(jobs) > _WRITERS:
                    yield from jobs.popleft().result()[1]
            for job in jobs:
                yield from job.result()[1]

    def _encoded(
        self, computed: Array, batch: list[tuple[str, batches.Example]]
    ) -> tuple[float, list[bytes]]:
        """When the device was done with a batch, and its records."""
        computed.block_until_ready()
        done = time.monotonic()
        grid = np.asarray([self._encoder.side] * 2, np.int32)
        records = []
        for patches, (name, one) in zip(np.asarray(computed), batch, strict=False):
            features = example.PatchFeatures(patches, one["labels"], grid, name)
            records.append(example.encode(example.quantise(features) if self._int8 else features))
        return done, records

    def speed(self) -> str:
        """Images a second, and the share of the time in which the device had nothing to do."""
        seconds = time.monotonic() - self._start
        return (
            f"{self._images / seconds:.1f} images/s; the device waited for images "
            f"{self._idle / seconds:.0%} of the time"
        )


_WRITERS = 2


def _halves(module: Any, params: Any, pixels: Array) -> Array:
    return encode(module, params, pixels).astype(jnp.float16)


def main() -> None:
    hosts.start_hosts(*(flag.value for flag in HOSTS))
    config, workdir = CONFIG.value, epath.Path(WORKDIR.value)
    example.read_metadata(workdir / "pseudo_labels")  # a mistyped folder is not made
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # with several hosts JAX takes it for itself
    used = "data.deep", "models.vision", "features"
    with agreement.hold(workdir / "features"):
        agreement.by_the_first(
            lambda: workfolder.claim(workdir, config, used, "features/*.tfrecord-*")
        )
        write_features(config, workdir)


if __name__ == "__main__":
    CONFIG, WORKDIR = program.define_config()
    HOSTS = program.define_hosts()
    program.run(main)
