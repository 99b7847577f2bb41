"""The contract between the stages: PseudoLabel and PatchFeatures as tf.train.Example records.

A dataset folder is laid out so that `tensorflow_datasets.builder_from_directory(folder)` opens it:
TFRecord shards, `features.json` and `dataset_info.json`; the words and the config that made it are
in its `metadata.json`. TensorFlow is not needed for writing or for reading.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from fmbseg_jax.data import images, label_maps, records
from fmbseg_jax.data.tfrecord import RecordSource
from fmbseg_jax.errors import UserError
from fmbseg_jax.io import machine
from fmbseg_jax.io.files import inside, write_atomically
from fmbseg_jax.vocabulary import IGNORE


def _none(*shape: int, dtype: type = np.float32) -> Any:
    return dataclasses.field(default_factory=lambda: np.zeros(shape, dtype))


@dataclasses.dataclass(frozen=True)
class PseudoLabel:
    """An image and the word of each of its pixels: what stage 1 writes (paper, section 3.2).

    An image annotated by people is the same record without what follows `labels`.
    """

    image: bytes
    """The file as it was: JPEG, PNG, or whatever Pillow reads."""
    filename: str
    """Path of the image, relative to the folder it came from."""
    labels: np.ndarray
    """uint16 [H, W], word index or IGNORE, in the upright orientation (EXIF applied)."""
    found: np.ndarray = _none(0, dtype=np.uint16)
    """uint16 [f], the words found in the image."""
    votes: np.ndarray = _none(0, dtype=np.int32)
    """int32 [f], crops that voted for each of `found`; -1 where the user gave the word."""
    mask_words: np.ndarray = _none(0, dtype=np.uint16)
    """uint16 [m], the word of each mask."""
    mask_scores: np.ndarray = _none(0)
    """float32 [m], SAM's confidence (predicted IoU) in each mask."""
    mask_stages: np.ndarray = _none(0, dtype=np.uint8)
    """uint8 [m], 11 for a mask of stage 1.1, 12 for one of stage 1.2."""
    points: np.ndarray = _none(0, 2)
    """float32 [p, 2], query points of stage 1.1, (x, y) in pixels of the upright image."""
    point_words: np.ndarray = _none(0, dtype=np.uint16)
    """uint16 [p], the word each query point stands for."""


@dataclasses.dataclass(frozen=True)
class PatchFeatures:
    """The frozen encoder's patch features of an image, and the word of each patch."""

    patches: np.ndarray
    """float16 [n, d], row by row."""
    labels: np.ndarray
    """uint16 [n], word index or IGNORE."""
    grid: np.ndarray
    """int32 [2], (h, w) with h · w = n."""
    filename: str


@dataclasses.dataclass(frozen=True)
class Int8PatchFeatures:
    """PatchFeatures at half the size: each patch is `scale` times a vector of int8."""

    patches: np.ndarray
    """int8 [n, d], row by row; the greatest of each row is 127 or -127."""
    scale: np.ndarray
    """float32 [n]."""
    labels: np.ndarray
    """uint16 [n], word index or IGNORE."""
    grid: np.ndarray
    """int32 [2], (h, w) with h · w = n."""
    filename: str


def quantise(features: PatchFeatures) -> Int8PatchFeatures:
    """Rounds each patch to 8 bits; its cosine with what it was stays above 0.999."""
    _check_features(features)
    patches = features.patches.astype(np.float32)
    scale = np.maximum(np.abs(patches).max(axis=1), 1e-12) / 127
    rounded = np.round(patches / scale[:, None]).astype(np.int8)
    return Int8PatchFeatures(rounded, scale, features.labels, features.grid, features.filename)


def restore(features: Int8PatchFeatures) -> PatchFeatures:
    """The inverse of `quantise`, but for its rounding."""
    with np.errstate(over="ignore", invalid="ignore"):  # a scale of others: see `is_finite`
        patches = (features.patches * features.scale[:, None]).astype(np.float16)
    return PatchFeatures(patches, features.labels, features.grid, features.filename)


@functools.cache
def _features(kind: type) -> tfds.features.FeaturesDict:
    def tensor(shape: tuple[int | None, ...], dtype: Any) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")

    text = tfds.features.Text()
    raw = tfds.features.Tensor(shape=(), dtype=np.object_)
    if kind in (PatchFeatures, Int8PatchFeatures):
        patches: dict[str, Any] = {"patches": tensor((None, None), np.float16)}
        if kind is Int8PatchFeatures:
            patches["patches"] = tensor((None, None), np.int8)
            patches["scale"] = tensor((None,), np.float32)
        return tfds.features.FeaturesDict(
            {
                **patches,
                "labels": tensor((None,), np.uint16),
                "grid": tensor((2,), np.int32),
                "filename": text,
            }
        )
    return tfds.features.FeaturesDict(
        {
            "image": raw,
            "filename": text,
            "labels": raw,  # 16-bit PNG: a tenth of the raw array
            "found": tensor((None,), np.uint16),
            "votes": tensor((None,), np.int32),
            "mask_words": tensor((None,), np.uint16),
            "mask_scores": tensor((None,), np.float32),
            "mask_stages": tensor((None,), np.uint8),
            "points": tensor((None, 2), np.float32),
            "point_words": tensor((None,), np.uint16),
        }
    )


@functools.cache
def _serializer(kind: type) -> ExampleSerializer:
    return ExampleSerializer(_features(kind).get_serialized_info())


def encode(example: PseudoLabel | PatchFeatures | Int8PatchFeatures) -> bytes:
    """The bytes of a tf.train.Example; the same example gives the same bytes."""
    kind: type = type(example)
    if not isinstance(example, PseudoLabel):
        _check_features(example)
    values = {field.name: getattr(example, field.name) for field in dataclasses.fields(example)}
    if kind is PseudoLabel:
        values["labels"] = label_maps.encode(values["labels"])
    proto = _serializer(kind).get_tf_example(_features(kind).encode_example(values))
    return proto.SerializeToString(deterministic=True)


def _check_features(features: PatchFeatures | Int8PatchFeatures) -> None:
    """Raises UserError for arrays that are not what the fields say: they may be a user's own."""
    _check_shapes(features)
    numbers = features.patches if isinstance(features, PatchFeatures) else features.scale
    if not is_finite(numbers):
        raise UserError(
            f"The features of {features.filename} hold numbers that are infinite or NaN: float16 "
            "ends at 65504. Is the encoder damaged? train.features=online keeps no features, and "
            "does without float16."
        )


def _check_shapes(features: PatchFeatures | Int8PatchFeatures) -> None:
    """Raises UserError for arrays of other types or shapes than the fields say."""
    dtype = np.float16 if isinstance(features, PatchFeatures) else np.int8
    n = len(features.patches)
    described: list[tuple[str, np.ndarray, type, str, bool]] = [
        ("patches", features.patches, dtype, "n, d", features.patches.ndim == 2),
        ("labels", features.labels, np.uint16, f"{n}", features.labels.shape == (n,)),
        ("grid", features.grid, np.int32, "2", features.grid.shape == (2,)),
    ]
    if isinstance(features, Int8PatchFeatures):
        good = features.scale.shape == (n,)
        described.append(("scale", features.scale, np.float32, f"{n}", good))
    faults = [
        f"{name} {value.dtype}{list(value.shape)}, expected {expected.__name__}[{shape}]"
        for name, value, expected, shape, good in described
        if value.dtype != expected or not good
    ]
    height, width = features.grid.tolist() if not faults else (n, 1)
    if min(height, width) < 0 or height * width != n:
        faults = [f"a grid of {[height, width]} with {n} patches"]
    if faults:
        raise UserError(f"The features of {features.filename} hold {'; '.join(faults)}.")


def is_finite(numbers: np.ndarray) -> bool:
    """Whether no number of an array is NaN or infinite."""
    if numbers.dtype == np.float16:  # by its bits: `np.isfinite` takes 15 times as long
        return int((numbers.view(np.uint16) & 0x7FFF).max(initial=0)) < 0x7C00
    return bool(np.isfinite(numbers).all())


def decode_pseudo_label(record: bytes) -> PseudoLabel:
    """The inverse of `encode`; raises UserError where the record is no whole PseudoLabel."""
    values = _values(PseudoLabel, record)
    values["labels"] = _decoded_labels(values)
    label = PseudoLabel(**values)
    for names in (("found", "votes"), ("mask_words", "mask_scores", "mask_stages"),
                  ("points", "point_words")):  # fmt: skip
        if len({len(values[name]) for name in names}) > 1:
            raise UserError(f"{', '.join(names)} of {label.filename} have different lengths.")
    return label


def _decoded_labels(values: dict[str, Any]) -> np.ndarray:
    """The label map of a record, which may have no more pixels than its image says it has."""
    height, width = images.size(values["image"], values["filename"])
    most = {"most": height * width} if height else {}  # reading the image says what is wrong
    return label_maps.decode(values["labels"], values["filename"], **most)


def decode_patch_features(record: bytes, kept_as: str = "float16") -> PatchFeatures:
    """The inverse of `encode`, of records kept as "float16" or "int8".

    Raises:
      UserError: the record is no whole PatchFeatures. Its numbers may still be NaN.
    """
    if kept_as == "int8":
        features = Int8PatchFeatures(**_values(Int8PatchFeatures, record))
        _check_shapes(features)
        return restore(features)
    whole = PatchFeatures(**_values(PatchFeatures, record))
    _check_shapes(whole)
    return whole


def _values(kind: type, record: bytes) -> dict[str, Any]:
    """By field, what a record holds; the label map is not decoded yet."""
    try:
        values = _features(kind).deserialize_example_np(record)
        if missing := [name for name, value in values.items() if value is None]:
            raise ValueError(f"it has no {', '.join(missing)}")
        values["filename"] = values["filename"].decode()
    except Exception as error:  # protobuf and tfds have many kinds for bytes that changed
        machine.let_through(error)
        raise UserError(f"It is no {kind.__name__}: {error or type(error).__name__}.") from None
    values["filename"] = inside(values["filename"], "A record")
    return values


def read_pseudo_label(source: RecordSource, index: int, num_words: int = IGNORE) -> PseudoLabel:
    """A record of a dataset; raises RecordError, with its place, where it is damaged."""
    with source.naming(index, "Delete this shard and run the stage that wrote it again."):
        label = decode_pseudo_label(source[index])
        _check_words(label, num_words)
    return label


def read_patch_features(
    source: RecordSource, index: int, kept_as: str, num_words: int = IGNORE
) -> PatchFeatures:
    """As `read_pseudo_label`."""
    with source.naming(index, "Delete this shard and run the stage that wrote it again."):
        features = decode_patch_features(source[index], kept_as)
        _check_words(features, num_words)
    return features


def _check_words(record: PseudoLabel | PatchFeatures, num_words: int) -> None:
    highest = record.labels[record.labels != IGNORE].max(initial=0)
    if highest >= num_words:
        raise UserError(
            f"{record.filename} has word index {highest}; there are {num_words} words. Labels are "
            f"indices into the words, or {IGNORE}."
        )


def write_metadata(
    folder: epath.PathLike,
    kind: type,
    shard_records: list[int],
    num_bytes: int,
    metadata: dict[str, Any],
    split: str = "train",
) -> None:
    """Writes features.json, dataset_info.json and metadata.json beside the shards of a dataset.

    Args:
      kind: PseudoLabel, PatchFeatures or Int8PatchFeatures; the dataset is named after it.
      shard_records: the number of records in each shard, in order.
      num_bytes: of all records.
      metadata: what made the dataset, JSON types only: words; config, if there was one; of
        features, vision, the encoder's source and hash.
    """
    if kind is not PseudoLabel and not {"source", "hash"} <= metadata.get("vision", {}).keys():
        raise UserError(
            f'The metadata of {folder} needs "vision": {{"source": ..., "hash": ...}}, which tell '
            "encoders apart; see docs/data.md."
        )
    name = dataset_name(kind)
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name=__name__
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=_features(kind),
        description=(kind.__doc__ or "").splitlines()[0],
        metadata=tfds.core.MetadataDict(metadata),
    )
    template = tfds.core.ShardedFileTemplate(
        dataset_name=name, data_dir=str(folder), split=split, filetype_suffix="tfrecord"
    )
    info.set_file_format("tfrecord")
    info.set_splits(
        tfds.core.splits.SplitDict(
            [
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=shard_records,
                    num_bytes=num_bytes,
                    filename_template=template,
                )
            ]
        )
    )
    # dataset_info.json comes last: a folder that has it is finished, wherever a run is killed.
    with tempfile.TemporaryDirectory() as written:
        info.write_to_directory(written)
        for file in sorted(Path(written).iterdir(), key=lambda f: f.name == "dataset_info.json"):
            write_atomically(epath.Path(folder) / file.name, file.read_bytes())


def kept_as(folder: epath.PathLike) -> str:
    """What the patches of a finished dataset of features are kept as: "float16" or "int8"."""
    found = records.dtype_of(folder, "patches")
    if found not in _KINDS:
        raise UserError(
            f"{epath.Path(folder) / 'features.json'} says that patches are kept as {found!r}; they "
            f"are kept as {' or '.join(_KINDS)} (docs/data.md). Make them again so."
        )
    return found


_KINDS = {"float16": PatchFeatures, "int8": Int8PatchFeatures}


def dataset_name(kind: type) -> str:
    """The name in the shards' file names."""
    return "pseudo_labels" if kind is PseudoLabel else "patch_features"


def check_deep(metadata: dict[str, Any], deep: str) -> None:
    """Raises UserError where images would be scaled otherwise than they were for their labels.

    Args:
      metadata: of the pseudo labels.
      deep: the field `data.deep` now.
    """
    then = metadata["config"].get("data.deep", deep)
    if then != deep:
        raise UserError(
            f"The pseudo labels were made with data.deep={then!r}; now it is {deep!r}. Give "
            f"--config.data.deep={then}, or label anew."
        )


def read_metadata(folder: epath.PathLike) -> dict[str, Any]:
    """What `write_metadata` was given as `metadata`; raises where the dataset is not finished."""
    records.check_finished(folder)
    return {"config": {}, **records.read_json(epath.Path(folder) / "metadata.json", _METADATA)}


_METADATA = {
    "words": [str],
    "config?": {"label.template?": str, "data.deep?": str},
    "vision?": {"source": str, "hash": str},
    "deep?": (int, str),
}
