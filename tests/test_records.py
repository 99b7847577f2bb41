"""Finished datasets: as many records as were written, and JSON that is only read."""

import json
import os
import sys

import numpy as np
import pytest
from conftest import run

from fmbseg_jax.data import example, records, tfrecord
from fmbseg_jax.data.tfrecord import RecordError, ShardWriter, find_shards, shard_name
from fmbseg_jax.errors import UserError


def features(name, value=1.0):
    return example.PatchFeatures(
        np.full((4, 3), value, np.float16),
        np.zeros(4, np.uint16),
        np.asarray([2, 2], np.int32),
        name,
    )


@pytest.fixture
def dataset(tmp_path):
    """Two shards of three records."""
    for shard in range(2):
        name = shard_name("patch_features", "train", shard, 2)
        with ShardWriter(tmp_path / name) as writer:
            for i in range(3):
                writer.write(example.encode(features(f"{shard}{i}.png")))
    vision = {"source": "somewhere", "hash": "0"}
    metadata = {"words": ["sky"], "vision": vision}
    example.write_metadata(tmp_path, example.PatchFeatures, [3, 3], 1, metadata)
    return tmp_path


def rewrite(path, keep):
    """A shard that is whole by its CRCs, but holds only some of its records."""
    source = tfrecord.RecordSource([path])
    kept = [source[i] for i in keep]
    with ShardWriter(path) as writer:
        for record in kept:
            writer.write(record)


def test_a_dataset_opens(dataset):
    opened = records.open_records(dataset)
    assert len(opened) == 6
    assert opened.counts == [3, 3]
    assert example.kept_as(dataset) == "float16"


@pytest.mark.parametrize("keep", [[], [0, 1], [0, 1, 2, 2]])
def test_more_or_fewer_records_than_were_written(dataset, keep):
    path = find_shards(dataset)[1]
    rewrite(path, keep)
    with pytest.raises(RecordError, match=rf"{path.name} has {len(keep)} of the 3 records"):
        records.open_records(dataset)


def test_more_or_fewer_shards_than_were_written(dataset):
    first, second = find_shards(dataset)
    second.unlink()
    first.rename(dataset / shard_name("patch_features", "train", 0, 1))
    with pytest.raises(RecordError, match="has 1 shards; its dataset_info.json describes 2"):
        records.open_records(dataset)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dataset_info.json", lambda text: text[:40], "dataset_info.json is damaged"),
        ("dataset_info.json", lambda text: text.replace("shardLengths", "more"), "shardLengths"),
        ("dataset_info.json", lambda text: "[1]", "it is no object"),
        ("dataset_info.json", lambda text: "[" * 100_000, "is damaged"),
        ("features.json", lambda text: text.replace("float16", "float17"), "kept as .float17."),
        ("features.json", lambda text: "{}", "it lacks featuresDict"),
        ("metadata.json", lambda text: "nothing", "metadata.json is damaged"),
    ],
)
def test_damaged_descriptions(dataset, name, change, message):
    (dataset / name).write_text(change((dataset / name).read_text()))
    with pytest.raises(UserError, match=message):
        example.read_metadata(dataset)
        records.open_records(dataset)
        example.kept_as(dataset)


def test_a_class_that_a_dataset_names_is_not_imported(dataset, tmp_path, monkeypatch):
    (tmp_path / "hostile.py").write_text("class Features:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = dataset / "features.json"
    description = json.loads(path.read_text())
    description["pythonClassName"] = "hostile.Features"
    description["featuresDict"]["features"]["patches"]["pythonClassName"] = "hostile.Features"
    path.write_text(json.dumps(description))
    example.read_metadata(dataset)
    assert example.kept_as(dataset) == "float16"
    assert len(records.open_records(dataset)) == 6
    assert "hostile" not in sys.modules


def test_programs_refuse_emptied_shards_and_mend_their_own(world, tmp_path):
    world.pseudo_labels(tmp_path, count=6)
    flags = [*world.flags, f"--workdir={tmp_path}"]
    run("fmbseg_jax.features", *flags)
    whole = [path.read_bytes() for path in find_shards(tmp_path / "features")]
    rewrite(find_shards(tmp_path / "features")[0], [0, 1, 2])
    refused = run("train.py", *flags, check=False)
    assert refused.returncode == 1
    assert "00000-of-00002 has 3 of the 4 records that were written" in refused.stdout
    assert "cut short: made again" in run("fmbseg_jax.features", *flags).stdout
    assert [path.read_bytes() for path in find_shards(tmp_path / "features")] == whole
    rewrite(find_shards(tmp_path / "pseudo_labels")[1], [])
    for program in (["fmbseg_jax.features"], ["train.py", "--config.train.features=online"]):
        refused = run(program[0], *flags, *program[1:], check=False)
        assert refused.returncode == 1
        assert "00001-of-00002 has 0 of the 2 records that were written" in refused.stdout


def test_a_pipe_in_the_place_of_a_shard_is_told(tmp_path):
    os.mkfifo(tmp_path / tfrecord.shard_name("a", "train", 0, 1))
    with pytest.raises(tfrecord.RecordError, match="is not a file"):
        tfrecord.find_shards(tmp_path)
