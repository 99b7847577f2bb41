"""Patch labels, and the program that writes patch features."""

import dataclasses
import io
import json
import os
import shutil
import socket
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, program, run
from PIL import Image

from fmbseg_jax import config
from fmbseg_jax.data import example, images, tfrecord
from fmbseg_jax.encoders import patches
from fmbseg_jax.errors import UserError
from fmbseg_jax.vocabulary import IGNORE
from toyworld import scenes


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
    ours = patches.patch_labels(labels, (1, len(cases)), 8)
    assert dict(zip(cases, ours[0], strict=True)) == {name: e for name, (_, e) in cases.items()}
    assert ours.dtype == np.uint16


def test_patch_labels_equal_a_loop():
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, (40, 24)).astype(np.uint16)
    labels[random.random(labels.shape) < 0.4] = IGNORE
    ours = patches.patch_labels(labels, (5, 3), 4)
    for y in range(5):
        for x in range(3):
            cell = labels[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].ravel()
            kept = cell[cell != IGNORE]
            expected = np.bincount(kept).argmax() if len(kept) * 2 >= len(cell) else IGNORE
            assert ours[y, x] == expected
    with pytest.raises(UserError, match="word 3, of 3 words"):
        patches.patch_labels(labels, (5, 3), 3)


def test_images_are_read_as_they_were_for_their_labels(world):
    """What scales more than 8 bits comes from the config, for features and training alike."""
    values, file = np.arange(4900, dtype=np.uint16).reshape(70, 70), io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    labelled = example.PseudoLabel(file.getvalue(), "a.png", np.zeros((70, 70), np.uint16))
    encoder = patches.PatchEncoder(str(world.root / "dinov2"), 70)
    for by, highest in (("file", 4899), ("type", 65535)):
        pixels = encoder.prepare(labelled, 1, config.Data(deep=by).reading)["pixels"]
        np.testing.assert_array_equal(pixels[..., 0], np.round(values / highest * 255))
    wide = io.BytesIO()
    Image.new("1", (1001, 1000)).save(wide, "PNG")
    labelled = example.PseudoLabel(wide.getvalue(), "w.png", np.zeros((1000, 1001), np.uint16))
    with pytest.raises(
        UserError, match="The image w.png cannot be read: .* the limit is 1; --conf"
    ):
        encoder.prepare(labelled, 1, config.Data(max_megapixels=1).reading)


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
        made = example.decode_patch_features(outputs[i])
        pixels = images.resize(images.decode(label.image), (70, 70))
        normal = images.normalise(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        with torch.no_grad():
            batch = torch.from_numpy(normal.transpose(2, 0, 1)[None].astype(np.float32))
            expected = model(batch).last_hidden_state[0, 1:].numpy()
        assert made.filename == label.filename
        assert made.grid.tolist() == [5, 5]
        np.testing.assert_allclose(made.patches, expected, atol=4e-3 * np.abs(expected).max())
        square = images.resize_labels(label.labels, (70, 70))
        np.testing.assert_array_equal(made.labels, patches.patch_labels(square, (5, 5), 16).ravel())


def test_only_missing_shards_are_made(with_features, world):
    shards = tfrecord.find_shards(with_features / "features")
    before = {shard: (shard.read_bytes(), os.stat(shard).st_mtime_ns) for shard in shards}
    shards[1].unlink()
    run("fmbseg_jax.features", *world.flags, f"--workdir={with_features}")
    for shard, (data, time) in before.items():
        assert shard.read_bytes() == data
        assert (os.stat(shard).st_mtime_ns == time) == (shard != shards[1])


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
    before = [os.stat(shard).st_mtime_ns for shard in made]
    output = run("fmbseg_jax.features", *world.flags, f"--workdir={tmp_path / 'w'}").stdout
    assert "1 shards" in output and "came from other labels" in output
    assert [os.stat(shard).st_mtime_ns == t for shard, t in zip(made, before, strict=True)] == [
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


def test_a_refused_run_leaves_nothing_to_set_back(with_features, world, tmp_path):
    """What was made decides what is refused, not what was tried."""
    workdir = _copy(with_features, tmp_path)
    for wrong, message in [
        ("--config.features.size=71", "not a multiple"),
        ("--config.models.vision=no/such/folder", "No model at"),
    ]:
        flags = [*world.flags, wrong, f"--workdir={workdir}"]
        assert message in run("fmbseg_jax.features", *flags, check=False).stdout
    run("fmbseg_jax.features", *world.flags, f"--workdir={workdir}")
    recorded = json.loads((workdir / "config.json").read_text())
    assert recorded["features"]["features.size"] == 70
    assert "models.clip" not in recorded["features"]  # not its business
    flags = [*world.flags, f"--workdir={workdir}"]
    wrong = run(
        "train.py", *flags, "--config.train.aligner=block", "--config.train.heads=5", check=False
    )
    assert "train.heads" in wrong.stdout
    patches = run("train.py", *flags, "--config.eval.window=64", check=False)
    assert "eval.window = 64 is not a multiple of 14 pixels" in patches.stdout
    run("train.py", *flags)
    refused = run("train.py", *flags, "--config.train.peak_lr=0.5", check=False)
    assert "train.peak_lr: 0.3 there, 0.5 now" in refused.stdout
    shutil.rmtree(workdir / "checkpoints")
    run("train.py", *flags, "--config.train.peak_lr=0.5")


def test_settings_that_the_config_does_not_remember(with_features, world, tmp_path):
    """Features copied from another work folder, of another dtype: made again, not relabelled."""
    shutil.copytree(with_features / "pseudo_labels", tmp_path / "pseudo_labels")
    shutil.copytree(with_features / "features", tmp_path / "features")
    flags = [*world.flags, f"--workdir={tmp_path}", "--config.features.dtype=int8"]
    output = run("fmbseg_jax.features", *flags).stdout
    assert "3 shards" in output and "other labels, weights or settings" in output
    assert example.kept_as(tmp_path / "features") == "int8"
    assert example.decode_patch_features(records(tmp_path / "features")[0], "int8").grid.tolist()


def _copy(with_features, tmp_path):
    shutil.copytree(with_features / "pseudo_labels", tmp_path / "copy" / "pseudo_labels")
    return tmp_path / "copy"


def test_int8_keeps_the_directions():
    """Cosines between patches before and after: 8 bits' worth, far within the 1 % promised."""
    random = np.random.default_rng(0)
    raw = random.normal(size=(500, 96)) * np.exp(random.normal(size=(500, 1)))
    raw[:, 3] *= 30  # encoders have a few channels that are far louder than the rest
    before = example.PatchFeatures(
        raw.astype(np.float16), np.zeros(500, np.uint16), np.asarray([20, 25], np.int32), "a.png"
    )
    record = example.encode(example.quantise(before))
    after = example.decode_patch_features(record, "int8")
    a, b = (x.patches.astype(np.float64) for x in (before, after))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert (1 - cosine).max() < 1e-3
    assert len(record) < 0.6 * len(example.encode(before))
    zero = dataclasses.replace(before, patches=np.zeros((500, 96), np.float16))
    assert not example.restore(example.quantise(zero)).patches.any()


def test_int8_features_train(with_features, world, tmp_path):
    shutil.copytree(with_features / "pseudo_labels", tmp_path / "pseudo_labels")
    flags = [*world.flags, "--config.features.dtype=int8", f"--workdir={tmp_path}"]
    output = run("fmbseg_jax.features", *flags).stdout
    assert "images/s; the device waited for images" in output
    shards = [tfrecord.find_shards(folder / "features") for folder in (with_features, tmp_path)]
    size, half = (sum(path.stat().length for path in some) for some in shards)
    assert half < 0.65 * size
    for ours, theirs in zip(*map(tfrecord.RecordSource, shards), strict=True):
        a, b = (
            example.decode_patch_features(ours).patches.astype(np.float64),
            example.decode_patch_features(theirs, "int8").patches.astype(np.float64),
        )
        np.testing.assert_allclose(a, b, atol=np.abs(a).max() / 120)
    run("train.py", *flags)
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(tmp_path / "features"))
    assert builder.info.features["patches"].np_dtype == np.int8


def test_eight_devices_give_the_features_of_one(with_features, world, tmp_path):
    """Ten images, batches filled up to eight."""
    shutil.copytree(with_features / "pseudo_labels", tmp_path / "pseudo_labels")
    eight = "--xla_force_host_platform_device_count=8"
    run("fmbseg_jax.features", *world.flags, f"--workdir={tmp_path}", XLA_FLAGS=eight)
    for ours, theirs in zip(
        records(with_features / "features"), records(tmp_path / "features"), strict=True
    ):
        a, b = (example.decode_patch_features(record) for record in (ours, theirs))
        assert a.filename == b.filename
        np.testing.assert_array_equal(a.labels, b.labels)
        np.testing.assert_allclose(a.patches, b.patches, atol=4e-3 * np.abs(a.patches).max())


def test_online_features_train_the_same(with_features, world, tmp_path):
    """The encoder in the step, and its features from disk: the same losses, up to float16."""
    losses = {}
    for kind in ("cached", "online"):
        workdir = tmp_path / kind
        shutil.copytree(with_features / "pseudo_labels", workdir / "pseudo_labels")
        if kind == "cached":
            shutil.copytree(with_features / "features", workdir / "features")
        run("train.py", *world.flags, f"--workdir={workdir}", f"--config.train.features={kind}")
        lines = (workdir / "metrics" / "train.jsonl").read_text().splitlines()
        losses[kind] = [json.loads(line)["loss"] for line in lines]
    assert len(losses["cached"]) == len(losses["online"]) > 0
    np.testing.assert_allclose(losses["online"], losses["cached"], rtol=2e-3)
    model = json.loads((tmp_path / "online" / "export" / "model.json").read_text())
    assert model["vision"]["hash"]


def test_features_of_another_encoder_train(world, tmp_path):
    """The script in docs/data.md writes records of its own; the aligner does not care."""
    text = (ROOT / "docs" / "data.md").read_text()
    script = text.split("```python\n")[1].split("```")[0]
    assert len([line for line in script.splitlines() if line]) <= 20
    (tmp_path / "own.py").write_text(script)
    scenes.write_folder(tmp_path / "scenes", "train", 6)
    run(tmp_path / "own.py", tmp_path / "scenes", tmp_path / "w" / "features", PYTHONPATH=str(ROOT))
    flags = [*world.flags, "--config.train.aligner=linear", f"--workdir={tmp_path / 'w'}"]
    run("train.py", *flags)
    model = json.loads((tmp_path / "w" / "export" / "model.json").read_text())
    assert model["vision"] == {"source": "mean-colours", "hash": "none"}
    shutil.rmtree(tmp_path / "w")
    (tmp_path / "own.py").write_text(
        script.replace("(8, 8)).reshape(64)", "(8, 8)).reshape(64) // 60000 * 9 + 16")
    )
    run(tmp_path / "own.py", tmp_path / "scenes", tmp_path / "w" / "features", PYTHONPATH=str(ROOT))
    refused = run("train.py", *flags, check=False)
    assert ".png has word index 16; there are 15 words" in refused.stdout


def test_two_processes_share_the_shards(with_features, world, tmp_path):
    """Each writes its own shards; together they give the dataset of one."""
    shutil.copytree(with_features / "pseudo_labels", tmp_path / "pseudo_labels")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = program("fmbseg_jax.features", *world.flags, f"--workdir={tmp_path}")
    hosts = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {
                "XLA_FLAGS": "", "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i),
            },
        )
        for i in range(2)
    ]  # fmt: skip
    outputs = [host.communicate(timeout=300)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(outputs)
    assert sum("images' patch features are in" in output for output in outputs) == 1
    ours, theirs = (tfrecord.find_shards(w / "features") for w in (tmp_path, with_features))
    assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]
