"""A finished dataset: what the JSON files in its folder say, and as many records as they say.

The folder may be another person's. Its JSON is read here and not by tensorflow-datasets, which
imports and calls whatever class `features.json` names.
"""

from __future__ import annotations

import re
from typing import Any

from etils import epath

from fmbseg_jax.data.tfrecord import RecordError, RecordSource, find_shards
from fmbseg_jax.errors import UserError
from fmbseg_jax.io import texts
from fmbseg_jax.io.files import exists

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


def read_json(path: epath.Path, form: Any) -> dict[str, Any]:
    """A JSON file of a dataset; raises UserError where it is not there, or not of a form."""
    if not path.exists():
        raise UserError(f"{path.parent} has no {path.name}. {_ADVICE}")
    return texts.read_json(path, form, _ADVICE)


_ADVICE = "Run the stage that writes it again; it keeps the records that are there."


def dtype_of(folder: epath.PathLike, name: str) -> str:
    """What `features.json` says that the numbers of a feature are, such as "patches"."""
    form = {"featuresDict": {"features": {name: {"tensor": {"dtype": str}}}}}
    described = read_json(epath.Path(folder) / "features.json", form)
    return described["featuresDict"]["features"][name]["tensor"]["dtype"]


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
    """Records of each shard, as they were written."""
    form = {"splits": [{"name": str, "shardLengths": [str]}]}  # numbers as text, as tfds has them
    splits = {part["name"]: part["shardLengths"] for part in read_json(path, form)["splits"]}
    lengths = splits.get(split)
    if lengths is None or not all(re.fullmatch("[0-9]{1,18}", length) for length in lengths):
        fault = f"it has no shardLengths of split {split!r}, or they are no numbers"
        raise UserError(f"{path} is damaged: {fault}. {_ADVICE}")
    return [int(length) for length in lengths]
