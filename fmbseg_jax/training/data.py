"""What the aligner is trained on: cached patch features, or images that the encoder sees anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fmbseg_jax.config import Config, flatten
from fmbseg_jax.data.example import (
    PatchFeatures,
    check_deep,
    is_finite,
    kept_as,
    read_metadata,
    read_patch_features,
    read_pseudo_label,
)
from fmbseg_jax.data.records import open_records
from fmbseg_jax.data.tfrecord import RecordSource
from fmbseg_jax.encoders import identity
from fmbseg_jax.encoders.patches import PatchEncoder
from fmbseg_jax.errors import UserError
from fmbseg_jax.training.batches import Example
from fmbseg_jax.vocabulary import IGNORE


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Examples by number, and where they come from."""

    count: int
    read: Callable[[int], Example]
    """Example i: labels, and patches or, where there is an encoder, pixels."""
    width: int
    """d, channels of a patch."""
    digest: str
    """Differs between data that differ."""
    metadata: dict[str, Any]
    """words, vision (source, hash, perhaps revision), and the config that made them."""
    encoder: PatchEncoder | None = None
    """The frozen encoder that has to run in every step."""


def open_cached(workdir: Path, threads: int = 1) -> TrainingData:
    """WORKDIR/features, whatever encoder and program they come from.

    Args:
      threads: records read at once.

    Raises:
      UserError: no image has a labelled patch, or the first ones are damaged.
    """
    records, metadata = _open(workdir / "features")
    if "vision" not in metadata:
        raise UserError(
            f"{workdir / 'features' / 'metadata.json'} lacks vision: source and hash of the "
            "encoder that made the features (docs/data.md)."
        )
    dtype, num_words = kept_as(workdir / "features"), len(metadata["words"])

    def read(i: int) -> Example:
        features = read_patch_features(records, i, dtype, num_words)
        with records.naming(i):
            _check_finite(features)
        return {"patches": features.patches, "labels": features.labels.astype("int32")}

    check_labelled(len(records), read, threads, workdir / "features")
    width = read(0)["patches"].shape[1]
    return TrainingData(len(records), read, width, records.digest, metadata)


def _check_finite(features: PatchFeatures) -> None:
    if not is_finite(features.patches):
        raise UserError(
            f"The features of {features.filename} are not finite: they hold NaN, or numbers beyond "
            "65504, where float16 ends. Make them again by an encoder that gives none, or set "
            "train.features to online, which keeps no features."
        )


def check_labelled(count: int, read: Callable[[int], Example], threads: int, folder: Path) -> None:
    """Raises UserError where no patch of any example has a word; reads until one has.

    Such a training would move nothing, and export the random numbers that it began with.
    """

    def labelled(i: int) -> bool:
        return bool((read(i)["labels"] != IGNORE).any())

    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, count, threads):
            if any(pool.map(labelled, range(start, min(start + threads, count)))):
                return
    raise UserError(
        f"No patch of the {count} images in {folder} has a label: there is nothing to learn from. "
        "Labels are indices into the words; 65535 is no label. See the summary of the labelling: "
        "which words it found, and in how many images."
    )


def open_online(config: Config, workdir: Path) -> TrainingData:
    """WORKDIR/pseudo_labels: the encoder runs in the training step."""
    records, made = _open(workdir / "pseudo_labels")
    check_deep(made, config.data.deep)
    if told := config.data.reading.of_deep(*made.get("deep", (0, ""))):
        print(told)
    options, source = config.features, config.models.vision
    encoder = PatchEncoder(source, options.size, options.compute)

    def read(i: int) -> Example:
        with records.naming(i):
            record = read_pseudo_label(records, i, len(made["words"]))
            prepared = encoder.prepare(record, len(made["words"]), config.data.reading)
        return {**prepared, "labels": prepared["labels"].astype("int32")}

    check_labelled(len(records), read, options.threads, workdir / "pseudo_labels")
    used = "data.deep", "features.size", "features.compute"
    ours = {name: value for name, value in flatten(config).items() if name in used}
    vision = identity.describe(source)
    metadata = {
        "words": made["words"],
        "vision": vision,
        "config": made.get("config", {}) | ours | {"models.vision": source},
    }
    width = encoder.module.spec.transformer.width
    digest = f"{records.digest} {vision['hash']}"
    digest += " by type" if config.data.deep == "type" else ""
    return TrainingData(len(records), read, width, digest, metadata, encoder)


def _open(folder: Path) -> tuple[RecordSource, dict[str, Any]]:
    metadata, records = read_metadata(folder), open_records(folder)
    if not len(records):
        raise UserError(f"{folder} holds no image. See the summary of the labelling.")
    return records, metadata
