"""What a training begins with: records that are somebody's own, with and without labels."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import run

from fmbseg_jax.config import unflatten
from fmbseg_jax.data import example, tfrecord
from fmbseg_jax.errors import UserError
from fmbseg_jax.training import data as training_data
from fmbseg_jax.vocabulary import IGNORE

COUNT, SHARDS = 6, 2


def records(labelled=(), odd=()):
    """Patch features; image i has a label at its last patch if it is in `labelled`."""
    for i in range(COUNT):
        patches = np.random.default_rng(i).normal(size=(4, 3)).astype(np.float16)
        labels = np.full(4, IGNORE, np.uint16)
        labels[-1] = i % 2 if i in labelled else IGNORE
        for place, value in dict(odd).items():
            if place == i:
                patches[2, 1] = value
        yield example.PatchFeatures(patches, labels, np.array([2, 2], np.int32), f"{i}.png")


def write(folder, examples, monkeypatch, dtype="float16"):
    """A dataset as another program may write it: numbers are not checked."""
    monkeypatch.setattr(example, "_check_features", lambda features: None)
    folder.mkdir(parents=True)
    examples, each = list(examples), COUNT // SHARDS
    for i in range(SHARDS):
        name = tfrecord.shard_name("patch_features", "train", i, SHARDS)
        with tfrecord.ShardWriter(folder / name) as writer:
            for one in examples[i * each : (i + 1) * each]:
                writer.write(example.encode(one))
    metadata = {"words": ["sky", "grass"], "vision": {"source": "theirs", "hash": "1"}}
    kind = type(examples[0])
    example.write_metadata(folder, kind, [each] * SHARDS, 1, metadata)


@pytest.mark.parametrize("threads", [1, 4, 16])
def test_features_without_a_label_are_refused(tmp_path, monkeypatch, threads):
    write(tmp_path / "features", records(), monkeypatch)
    with pytest.raises(UserError, match="No patch of the 6 images in .*features has a label"):
        training_data.open_cached(tmp_path, threads)


@pytest.mark.parametrize("place", [0, 3, 5])
@pytest.mark.parametrize("threads", [1, 4])
def test_one_labelled_patch_among_others_is_enough(tmp_path, monkeypatch, place, threads):
    write(tmp_path / "features", records([place]), monkeypatch)
    data = training_data.open_cached(tmp_path, threads)
    assert [(data.read(i)["labels"] != IGNORE).sum() for i in range(6)] == [
        int(i == place) for i in range(6)
    ]


def test_only_a_few_records_are_read_where_labels_are_usual(tmp_path, monkeypatch):
    write(tmp_path / "features", records(range(COUNT)), monkeypatch)
    read, decode = [], example.decode_patch_features
    monkeypatch.setattr(
        example, "decode_patch_features", lambda *given: read.append(1) or decode(*given)
    )
    training_data.open_cached(tmp_path, 2)
    assert len(read) <= 3


def test_the_program_trains_nothing_without_a_label(world, tmp_path, monkeypatch):
    write(tmp_path / "features", records(), monkeypatch)
    refused = run("train.py", *world.flags, f"--workdir={tmp_path}", check=False)
    assert refused.returncode == 1 and "there is nothing to learn from" in refused.stdout
    assert not (tmp_path / "export").exists() and not (tmp_path / "metrics").exists()


def test_pseudo_labels_without_a_label_are_refused_online(world, tmp_path):
    world.pseudo_labels(tmp_path, count=4)
    (shard,) = tfrecord.find_shards(tmp_path / "pseudo_labels")
    source = tfrecord.RecordSource([shard])
    made = [example.decode_pseudo_label(record) for record in source]
    config = unflatten({"models.vision": str(world.root / "dinov2"), "features.size": 70})
    assert training_data.open_online(config, tmp_path).count == 4

    def rewrite(labels_of):
        with tfrecord.ShardWriter(shard) as writer:
            for one in made:
                labels = labels_of(np.full_like(one.labels, IGNORE))
                writer.write(example.encode(dataclasses.replace(one, labels=labels)))

    rewrite(lambda labels: labels)
    with pytest.raises(UserError, match="No patch of the 4 images in .*pseudo_labels has a label"):
        training_data.open_online(config, tmp_path)

    def one_corner(labels):
        labels[0, 0] = 1  # at no patch's centre
        return labels

    rewrite(one_corner)
    with pytest.raises(UserError, match="No patch of the 4 images"):
        training_data.open_online(config, tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_record_that_is_not_finite_is_named(tmp_path, monkeypatch, value):
    write(tmp_path / "features", records(range(COUNT), {4: value}), monkeypatch)
    data = training_data.open_cached(tmp_path)
    data.read(3)
    message = r"features.*-00001-of-00002, record 1: The features of 4\.png are not finite"
    with pytest.raises(UserError, match=message):
        data.read(4)


def test_the_program_names_the_record_that_is_not_finite(world, tmp_path, monkeypatch):
    write(tmp_path / "features", records(range(COUNT), {5: np.nan}), monkeypatch)
    refused = run("train.py", *world.flags, f"--workdir={tmp_path}", check=False)
    assert refused.returncode == 1 and ", record 2: The features of 5.png" in refused.stdout
    assert "peak_lr" not in refused.stdout


def test_the_record_with_a_word_that_is_not_there_is_named(tmp_path, monkeypatch):
    examples = list(records(range(COUNT)))
    examples[4].labels[0] = 2
    write(tmp_path / "features", examples, monkeypatch)
    data = training_data.open_cached(tmp_path)
    with pytest.raises(UserError, match=r"-00001-of-00002, record 1: 4\.png has word index 2;"):
        data.read(4)


def test_features_of_another_type_are_refused(tmp_path, monkeypatch):
    write(tmp_path / "features", records(range(COUNT)), monkeypatch)
    path = tmp_path / "features" / "features.json"
    facts = json.loads(path.read_text())
    facts["featuresDict"]["features"]["patches"]["tensor"]["dtype"] = "float32"
    path.write_text(json.dumps(facts))
    with pytest.raises(UserError, match="kept as 'float32'; they are kept as float16 or int8"):
        training_data.open_cached(tmp_path)
