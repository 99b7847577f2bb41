"""Patch labels, and the program that writes patch features."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from conftest import run

from fmbseg_jax import features
from fmbseg_jax.data import example, images, tfrecord
from fmbseg_jax.errors import UserError
from fmbseg_jax.vocabulary import IGNORE


def test_a_patch_takes_the_label_of_most_of_its_labelled_pixels():
    i = IGNORE
    cases = {
        "one word": ([[3, 3], [3, 3]], 3),
        "most": ([[3, 5], [5, 5]], 5),
        "half unlabelled": ([[i, i], [5, 3]], 3),
        "most unlabelled": ([[i, i], [i, 5]], i),
        "all unlabelled": ([[i, i], [i, i]], i),
        "tie": ([[7, 2], [2, 7]], 2),
    }
    labels = np.concatenate([np.asarray(cell, np.uint16) for cell, _ in cases.values()], axis=1)
    ours = features.patch_labels(labels, (1, len(cases)), 8)
    assert dict(zip(cases, ours[0], strict=True)) == {name: e for name, (_, e) in cases.items()}
    assert ours.dtype == np.uint16


def test_patch_labels_equal_a_loop():
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, (40, 24)).astype(np.uint16)
    labels[random.random(labels.shape) < 0.4] = IGNORE
    ours = features.patch_labels(labels, (5, 3), 4)
    for y in range(5):
        for x in range(3):
            cell = labels[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].ravel()
            kept = cell[cell != IGNORE]
            expected = np.bincount(kept).argmax() if len(kept) * 2 >= len(cell) else IGNORE
            assert ours[y, x] == expected
    with pytest.raises(UserError, match="word 3, of 3 words"):
        features.patch_labels(labels, (5, 3), 3)


def records(folder):
    return tfrecord.RecordSource(tfrecord.find_shards(folder))


def test_the_features_are_the_encoders(with_features, world):
    """Against PyTorch, on the image that is in the record; every record, also of a short batch."""
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(world.root / "dinov2").eval()
    inputs, outputs = records(with_features / "pseudo_labels"), records(with_features / "features")
    assert len(inputs) == len(outputs) == 10
    for i in range(10):
        label = example.decode_pseudo_label(inputs[i])
        patches = example.decode_patch_features(outputs[i])
        pixels = images.resize(images.decode(label.image), (70, 70))
        normal = images.normalise(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        with torch.no_grad():
            batch = torch.from_numpy(normal.transpose(2, 0, 1)[None].astype(np.float32))
            expected = model(batch).last_hidden_state[0, 1:].numpy()
        assert patches.filename == label.filename
        assert patches.grid.tolist() == [5, 5]
        np.testing.assert_allclose(patches.patches, expected, atol=4e-3 * np.abs(expected).max())
        square = images.resize_labels(label.labels, (70, 70))
        np.testing.assert_array_equal(
            patches.labels, features.patch_labels(square, (5, 5), 16).ravel()
        )


def test_only_missing_shards_are_made(with_features, world):
    shards = tfrecord.find_shards(with_features / "features")
    before = {shard: (shard.read_bytes(), shard.stat().st_mtime_ns) for shard in shards}
    shards[1].unlink()
    run("fmbseg_jax.features", *world.flags, f"--workdir={with_features}")
    for shard, (data, time) in before.items():
        assert shard.read_bytes() == data
        assert (shard.stat().st_mtime_ns == time) == (shard != shards[1])


def test_features_follow_their_labels(with_features, world, tmp_path):
    """Other labels in the place of those that a shard was made from: it is made again, it alone."""
    shutil.copytree(with_features, tmp_path / "w")
    labels, made = (tfrecord.find_shards(tmp_path / "w" / n) for n in ("pseudo_labels", "features"))
    source = tfrecord.RecordSource([labels[1]])
    relabelled = [example.decode_pseudo_label(source[i]) for i in range(4)]
    with tfrecord.ShardWriter(labels[1]) as writer:
        for record in relabelled:
            other = dataclasses.replace(record, labels=np.zeros_like(record.labels))
            writer.write(example.encode(other))
    before = [shard.stat().st_mtime_ns for shard in made]
    output = run("fmbseg_jax.features", *world.flags, f"--workdir={tmp_path / 'w'}").stdout
    assert "1 shards" in output and "other labels" in output
    assert [shard.stat().st_mtime_ns == t for shard, t in zip(made, before, strict=True)] == [
        True, False, True,
    ]  # fmt: skip
    again = example.decode_patch_features(tfrecord.RecordSource([made[1]])[0])
    assert not again.labels.any()


def test_errors(with_features, world, tmp_path):
    nothing = run("fmbseg_jax.features", *world.flags, f"--workdir={tmp_path}", check=False)
    assert nothing.returncode == 1
    assert "holds no finished dataset" in nothing.stdout
    assert "Traceback" not in nothing.stdout
    changed = [*world.flags, f"--workdir={with_features}", "--config.features.size=140"]
    refused = run("fmbseg_jax.features", *changed, check=False)
    assert "features.size: 70 there, 140 now" in refused.stdout
    uneven = run(
        "fmbseg_jax.features", *world.flags, "--config.features.size=71",
        f"--workdir={_copy(with_features, tmp_path)}", check=False,
    )  # fmt: skip
    assert "features.size = 71 is not a multiple of the encoder's patch of 14" in uneven.stdout


def _copy(with_features, tmp_path):
    shutil.copytree(with_features / "pseudo_labels", tmp_path / "copy" / "pseudo_labels")
    return tmp_path / "copy"
