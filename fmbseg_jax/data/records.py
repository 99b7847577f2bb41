"""A finished dataset: what the JSON files in its folder say, and as many records as they say.

The folder may be another person's. Its JSON is read here and not by tensorflow-datasets, which
imports and calls whatever class `features.json` names.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from etils import epath

from fmbseg_jax.data.files import exists
from fmbseg_jax.data.tfrecord import RecordError, RecordSource, find_shards
from fmbseg_jax.errors import UserError

_MADE_BY = {"pseudo_labels": "labelling", "features": "fmbseg_jax.features"}


def check_finished(folder: epath.PathLike) -> None:
    """Raises UserError where a folder holds no dataset that was written to its end."""
    folder = epath.Path(folder)
    if not exists(folder / "dataset_info.json"):
        raise UserError(
            f"{folder} holds no finished dataset (no dataset_info.json). Run the stage that writes "
            f"it to its end: python -m {_MADE_BY.get(folder.name, 'labelling')} with the same "
            "--config and --workdir."
        )


def read_json(path: epath.Path) -> dict[str, Any]:
    """A JSON file of a dataset; raises UserError where it is none, or no object."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(_damaged(path, str(error))) from None
    if not isinstance(value, dict):
        raise UserError(_damaged(path, "it holds no object"))
    return value


def dtype_of(folder: epath.PathLike, name: str) -> np.dtype:
    """What `features.json` says that the numbers of a feature are, such as "patches"."""
    path = epath.Path(folder) / "features.json"
    try:
        feature = read_json(path)["featuresDict"]["features"][name]
        return np.dtype(str(feature["tensor"]["dtype"]))
    except (KeyError, TypeError) as error:
        raise UserError(_damaged(path, f"it describes no tensor {name!r}: {error!r}")) from None


def open_records(folder: epath.PathLike, split: str = "train") -> RecordSource:
    """All records of a finished dataset, in order.

    Raises:
      UserError: it is not finished, or `dataset_info.json` is damaged.
      RecordError: a shard is missing, damaged, or has not as many records as were written.
    """
    check_finished(folder)
    paths = find_shards(folder, split)
    lengths = _shard_lengths(epath.Path(folder) / "dataset_info.json", split)
    if len(lengths) != len(paths):
        raise RecordError(
            f"{folder} has {len(paths)} shards; its dataset_info.json describes {len(lengths)}. "
            "Run the stage that writes them again."
        )
    records = RecordSource(paths)
    for path, there, written in zip(paths, records.counts, lengths, strict=True):
        if there != written:
            raise RecordError(
                f"{path} has {there} of the {written} records that were written: it was emptied, "
                "cut or replaced. Delete it and run the stage that writes it again, which makes "
                "only what is missing."
            )
    return records


def _shard_lengths(path: epath.Path, split: str) -> list[int]:
    try:
        splits = {part["name"]: part["shardLengths"] for part in read_json(path)["splits"]}
        return [int(length) for length in splits[split]]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        fault = f"it has no shardLengths of split {split!r}: {error!r}"
        raise UserError(_damaged(path, fault)) from None


def _damaged(path: epath.Path, fault: str) -> str:
    return (
        f"{path} is damaged ({fault}). Run the stage that writes it again; it keeps the records "
        "that are there."
    )
