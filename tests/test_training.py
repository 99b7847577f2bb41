"""The trainer: batches, the step, one device and eight, and what a resumed run sees."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fmbseg_jax import config
from fmbseg_jax.data import example, tfrecord
from fmbseg_jax.errors import UserError
from fmbseg_jax.nn import aligner as aligners
from fmbseg_jax.parallel.mesh import data_mesh, distribute, replicate
from fmbseg_jax.sharing import exports
from fmbseg_jax.training import checkpoint
from fmbseg_jax.training import step as training
from fmbseg_jax.training.batches import TrainBatches
from fmbseg_jax.vocabulary import IGNORE


@pytest.fixture
def source(tmp_path):
    """Seven records; every patch of record i holds i."""
    path = tmp_path / tfrecord.shard_name("patch_features", "train", 0, 1)
    with tfrecord.ShardWriter(path) as writer:
        for i in range(7):
            patches, grid = np.full((4, 3), i, np.float16), np.asarray([2, 2], np.int32)
            record = example.PatchFeatures(patches, np.full(4, i, np.uint16), grid, f"{i}.png")
            writer.write(example.encode(record))
    return tfrecord.RecordSource([path])


def batches_of(source, **options):
    def read(i):
        features = example.decode_patch_features(source[i])
        return {"patches": features.patches, "labels": features.labels.astype(np.int32)}

    return TrainBatches(len(source), read, **options)


def seen(batches):
    """The images of each batch, by number; fillers left out."""
    return [[int(row[0]) for row in batch["labels"] if row[0] != IGNORE] for batch in batches]


def test_every_image_comes_once_in_an_epoch(source):
    batches = batches_of(source, seed=0, batch_size=3, epochs=2)
    order = seen(batches)
    assert len(order) == batches.steps == 5
    assert [len(batch) for batch in order] == [3, 3, 3, 3, 2]
    flat = sum(order, [])
    assert sorted(flat[:7]) == sorted(flat[7:]) == list(range(7))
    assert flat[:7] != flat[7:]
    assert order == seen(batches_of(source, seed=0, batch_size=3, epochs=2))
    assert order != seen(batches_of(source, seed=1, batch_size=3, epochs=2))


def test_batches_are_filled_to_the_devices(source):
    batch = next(iter(batches_of(source, seed=0, batch_size=5, epochs=1, multiple=8)))
    assert batch["patches"].shape == (8, 4, 3)
    assert np.all(batch["labels"][5:] == IGNORE)
    assert not np.any(batch["patches"][5:])


def test_processes_share_a_batch(source):
    whole = seen(batches_of(source, seed=0, batch_size=4, epochs=2))
    parts = [
        seen(batches_of(source, seed=0, batch_size=4, epochs=2, process=(i, 2))) for i in (0, 1)
    ]
    for step, images in enumerate(whole):
        assert parts[0][step] + parts[1][step] == images
    assert len(whole[-1]) == 2
    four = [
        list(batches_of(source, seed=0, batch_size=4, epochs=2, process=(i, 4))) for i in range(4)
    ]
    assert {len(batches) for batches in four} == {4}, "also those with no image in the last batch"
    assert {batch["patches"].shape for batches in four for batch in batches} == {(1, 4, 3)}
    three = [
        seen(batches_of(source, seed=0, batch_size=4, epochs=2, multiple=3, process=(i, 3)))
        for i in range(3)
    ]
    assert [sum(parts, []) for parts in zip(*three, strict=True)] == whole


def objective(kind="block", mesh=None, **changes):
    train = config.Train(**{"heads": 2, **changes})
    described = {"kind": kind, "output": 6, "mlp_ratio": 2, "heads": 2}
    return training.objective(train, described, 10, mesh=mesh)


def batch_of(images, seed=0):
    random = np.random.default_rng(seed)
    labels = random.integers(0, 5, (images, 9)).astype(np.int32)
    labels[random.random(labels.shape) < 0.3] = IGNORE
    labels[-1] = IGNORE
    return {"patches": random.normal(size=(images, 9, 8)).astype(np.float16), "labels": labels}


def unit_text():
    text = np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32)
    return jnp.asarray(text / np.linalg.norm(text, axis=1, keepdims=True))


def one_device():
    return jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))


def trained(goal, batch, mesh, steps=3):
    """Params and the loss after a few steps on one batch."""
    state = replicate(mesh, training.create_state(goal, 0, 8))
    text = replicate(mesh, unit_text())
    for _ in range(steps):
        distributed = distribute(mesh, batch)
        state, metrics = training.train_step(state, distributed, text, {}, objective=goal)
    assert len(distributed["patches"].sharding.device_set) == mesh.size
    return jax.device_get(state.params), {name: float(value) for name, value in metrics.items()}


def assert_same(ours, theirs, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), ours, theirs)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("linear", {}),
        ("mlp", {"balanced": False}),
        ("block", {"patches_per_image": 4}),
        ("mlp", {"images_per_pass": 2, "patches_per_image": 7}),
    ],
)
def test_eight_devices_train_as_one(kind, changes):
    eight, batch = data_mesh(), batch_of(24)
    many, metrics = trained(objective(kind, mesh=eight, **changes), batch, eight)
    one, alone = trained(objective(kind, **changes), batch, one_device())
    assert metrics == pytest.approx(alone, rel=1e-5)
    assert_same(many, one)


def test_passes_change_no_result():
    batch = batch_of(8)
    whole, metrics = trained(objective("block"), batch, one_device())
    parts, alone = trained(objective("block", images_per_pass=3), batch, one_device())
    assert alone == pytest.approx(metrics, rel=1e-5)
    assert_same(parts, whole, 1e-6)


def test_drawn_patches():
    """So many of each image, labelled ones first, others in each step; all of them is all."""
    batch = batch_of(3)
    batch["labels"][0] = [IGNORE] * 7 + [1, 2]
    aligned = jnp.arange(27, dtype=jnp.float32).reshape(3, 9, 1)
    draws = []
    for seed in (0, 1):
        patches, labels = training._draw(
            aligned, jnp.asarray(batch["labels"]), 2, jax.random.key(seed), None
        )
        assert patches.shape == (3, 2, 1)
        np.testing.assert_array_equal(
            labels, batch["labels"].reshape(-1)[patches[..., 0].astype(int)]
        )
        assert set(patches[0, :, 0].astype(int).tolist()) == {7, 8}
        draws.append(np.sort(patches[1, :, 0]).tolist())
    assert draws[0] != draws[1]
    goals = [objective("mlp", patches_per_image=count) for count in (0, 9, 4)]
    losses = [trained(goal, batch, one_device(), steps=1)[1]["loss"] for goal in goals]
    assert losses[0] == losses[1] != losses[2]


def test_bfloat16_stays_near_and_keeps_float32_parameters():
    batch = batch_of(4)
    exact, metrics = trained(objective("block"), batch, one_device())
    rounded, near = trained(objective("block", compute="bfloat16"), batch, one_device())
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded)} == {np.dtype("float32")}
    assert near["loss"] != metrics["loss"]
    assert near["loss"] == pytest.approx(metrics["loss"], rel=2e-2)
    assert_same(rounded, exact, 2e-2)


@pytest.mark.parametrize("loss", ["tsupcon", "supcon", "prototype"])
def test_training_learns(loss):
    goal, batch = objective("mlp", loss=loss, optimizer="adamw", peak_lr=0.02), batch_of(6)
    batch["patches"][..., 0] += 3 * np.where(batch["labels"] == IGNORE, 0, batch["labels"])
    state, history = training.create_state(goal, 0, 8), []
    for _ in range(10):
        state, metrics = training.train_step(state, batch, unit_text(), {}, objective=goal)
        history.append(metrics)
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["accuracy"] > history[0]["accuracy"]
    assert int(state.step) == 10


def test_filler_images_change_nothing():
    goal, batch = objective(), batch_of(4)
    filled = {
        "patches": np.concatenate([batch["patches"], np.zeros((3, 9, 8), np.float16)]),
        "labels": np.concatenate([batch["labels"], np.full((3, 9), IGNORE, np.int32)]),
    }
    results = []
    for given in (batch, filled):
        state = training.create_state(goal, 0, 8)
        state, metrics = training.train_step(state, given, unit_text(), {}, objective=goal)
        results.append((jax.device_get(state.params), float(metrics["loss"])))
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), results[0][0], results[1][0]
    )


def test_a_batch_without_labels_moves_nothing():
    goal, batch = objective(momentum=0.0), batch_of(2)
    batch["labels"][:] = IGNORE
    state = training.create_state(goal, 0, 8)
    before = jax.device_get(state.params)
    state, metrics = training.train_step(state, batch, unit_text(), {}, objective=goal)
    assert metrics["loss"] == 0
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.params))


def test_accumulation_is_refused_with_the_reason():
    command = ["train.py", "--config=configs/toy.py", "--workdir=w"]
    refused = run(*command, "--config.train.accumulate=4", check=False)
    assert "the pairs between the smaller ones would be missing" in refused.stdout
    assert "--config.train.images_per_pass" in refused.stdout


def test_schedule():
    rate = training.schedule(config.Train(peak_lr=2.0, warmup=0.1), 100)
    np.testing.assert_allclose(
        [rate(0), rate(5), rate(10), rate(55), rate(100)], [0, 1, 2, 1, 0], atol=1e-6
    )
    assert np.isfinite(training.schedule(config.Train(), 1)(0))


def test_decay_spares_norms_and_biases():
    train = config.Train(weight_decay=0.5, momentum=0.0, clip_norm=0.0, peak_lr=1.0, warmup=0.01)
    tx = training.optimizer(train, 100)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    state = tx.init(params)
    zero = jax.tree.map(jnp.zeros_like, params)
    for _ in range(2):  # the first step of the warm-up has rate 0
        updates, state = tx.update(zero, state, params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new["kernel"], 0.5)
    np.testing.assert_allclose(new["bias"], 1)


def test_unit_has_no_nan_gradient_at_zero():
    gradient = jax.grad(lambda x: aligners.unit(x).sum())(jnp.zeros((2, 3)))
    np.testing.assert_array_equal(gradient, 0)
    with pytest.raises(UserError, match="train.heads = 3 does not divide"):
        aligners.create("block", output=4, mlp_ratio=2, heads=3).init(
            jax.random.key(0), jnp.zeros((1, 2, 8))
        )


def test_a_checkpoint_restores_state_and_batches(source, tmp_path):
    goal = objective()
    batches = batches_of(source, seed=3, batch_size=2, epochs=3)
    expected = seen(batches)
    iterator, state = iter(batches), training.create_state(goal, 0, 8)
    for _ in range(4):
        next(iterator)
    state, _ = training.train_step(state, batch_of(2), unit_text(), {}, objective=goal)
    saved = checkpoint.Checkpoints(tmp_path / "checkpoints")
    saved.save(4, state, iterator)
    saved.close()

    again = training.create_state(goal, 1, 8)
    (tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()  # a save that a kill cut short
    restored, there = checkpoint.Checkpoints(tmp_path / "checkpoints").restore(again, batches)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(restored))
    assert seen(there) == expected[4:]


def _checkpoints(folder, source, steps):
    batches = batches_of(source, seed=3, batch_size=2, epochs=3)
    iterator = iter(batches)
    saved = checkpoint.Checkpoints(folder, keep=9)
    for step in range(1, steps + 1):
        next(iterator)
        values = np.random.default_rng(step).normal(size=4096).astype(np.float32)
        saved.save(step, {"x": jnp.asarray(values)}, iterator, 0.1 * step)
    saved.close()
    return batches, lambda step: np.random.default_rng(step).normal(size=4096).astype(np.float32)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax
def test_a_flipped_bit_in_any_file_of_a_checkpoint(source, tmp_path, capfd):
    """Never other numbers in silence: it is set aside, or what was read is what was saved."""
    batches, values = _checkpoints(tmp_path / "whole", source, 2)
    files = [path for path in (tmp_path / "whole" / "2").rglob("*") if path.is_file()]
    assert len(files) > 5
    taken = set()
    for i, path in enumerate(files):
        folder = tmp_path / str(i)
        shutil.copytree(tmp_path / "whole", folder)
        damaged = folder / path.relative_to(tmp_path / "whole")
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 4
        damaged.write_bytes(bytes(data))
        try:
            opened = checkpoint.Checkpoints(folder, keep=9)
            restored, _ = opened.restore({"x": jnp.zeros(4096)}, batches)
        except UserError as error:
            assert "is of another architecture" in str(error), path  # its shapes are what changed
            continue
        step = opened.last
        np.testing.assert_array_equal(restored["x"], values(step))
        taken.add(step)
        assert (folder / "2.damaged").exists() == (step == 1), path
        assert ("the checkpoint of step 2 is damaged" in capfd.readouterr().err) == (step == 1)
        opened.close()
    assert taken == {1, 2}


def test_when_all_checkpoints_are_damaged_the_training_begins_anew(source, tmp_path, capfd):
    batches, values = _checkpoints(tmp_path / "all", source, 2)
    for path in (tmp_path / "all").glob("[12]/state/**/*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:500] + bytes(len(path.read_bytes()) - 500))
    opened = checkpoint.Checkpoints(tmp_path / "all", keep=9)
    state = {"x": jnp.full(4096, 3.0)}
    restored, iterator = opened.restore(state, batches)
    np.testing.assert_array_equal(restored["x"], state["x"])
    assert opened.last is None
    assert "before it there is the beginning" in capfd.readouterr().err
    opened.save(1, state, iterator, 0.5)
    opened.close()
    assert {p.name for p in (tmp_path / "all").iterdir()} >= {"1", "1.damaged", "2.damaged"}
    opened = checkpoint.Checkpoints(tmp_path / "all", keep=9)
    np.testing.assert_array_equal(opened.restore_best(state)["x"], state["x"])


def test_checkpoints_without_a_digest_are_taken(source, tmp_path):
    """Those of version 0.1 have none."""
    batches, values = _checkpoints(tmp_path / "old", source, 1)
    shutil.rmtree(tmp_path / "old" / "1" / "digest")
    restored, _ = checkpoint.Checkpoints(tmp_path / "old").restore({"x": jnp.zeros(4096)}, batches)
    np.testing.assert_array_equal(restored["x"], values(1))


def test_the_last_checkpoints_and_the_best_stay(source, tmp_path):
    batches = batches_of(source, seed=3, batch_size=2, epochs=3)
    iterator, state = iter(batches), {"x": jnp.zeros(2)}
    saved = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=2)
    assert saved.last is saved.best is None
    for step, score in enumerate([0.1, 0.9, None, 0.2, 0.3], 1):
        saved.save(step, {"x": jnp.full(2, float(step))}, iterator, score)
    saved.close()
    again = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=2)
    assert (again.last, again.best) == (5, 2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("?")) == ["2", "4", "5"]
    np.testing.assert_array_equal(again.restore_best(state)["x"], 2)
    again.save(6, state, iterator, 0.1)
    again.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("?")) == ["2", "5", "6"]
    other = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=2, score="miou")
    assert other.best == 6, "scores of another kind do not count"


def test_the_program_exports_what_it_trained(with_features, world):
    output = run(
        "train.py", *world.flags, f"--workdir={with_features}", "--config.train.temperature=0.3"
    ).stdout
    assert "The aligner is in" in output
    lines = [json.loads(line) for line in (with_features / "metrics" / "train.jsonl").open()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    model = exports.read_model(with_features / "export")
    assert model["steps"] == 8
    assert model["images"] == 10
    assert model["config"]["train.epochs"] == 4
    assert model["config"]["train.temperature"] == 0.3
    assert "sail boat" in (with_features / "export" / "README.md").read_text()
    assert list((with_features / "metrics").glob("events.out.tfevents.*"))
    with pytest.raises(UserError, match="is no exported aligner"):
        exports.read_model(with_features)


def test_other_features_are_refused(with_features, world, tmp_path):
    """A checkpoint of aligner and batches is of these features; others do not continue it."""
    for name in ("features", "checkpoints"):
        shutil.copytree(with_features / name, tmp_path / name)
    shard = tfrecord.find_shards(tmp_path / "features")[0]
    first = tfrecord.RecordSource([shard])[0]
    with tfrecord.ShardWriter(shard) as writer:
        for _ in range(4):
            writer.write(first)
    refused = run("train.py", *world.flags, f"--workdir={tmp_path}", check=False)
    assert refused.returncode == 1
    assert "was made from something else:\n  features:" in refused.stdout
    shutil.rmtree(tmp_path / "checkpoints")
    run("train.py", *world.flags, f"--workdir={tmp_path}")


def test_an_export_of_eight_devices_loads_on_one(tmp_path):
    params = replicate(data_mesh(), {"kernel": jnp.arange(6.0).reshape(2, 3)})
    encoder = {"source": "", "hash": ""}
    model = {"vision": encoder, "clip": encoder, "words": [], "images": 0, "config": {}}
    model["aligner"] = {"kind": "linear", "output": 1, "mlp_ratio": 1, "heads": 1}
    exports.save_export(tmp_path / "export", exports.Export(params, model), "")
    code = f"""
import jax, jax.numpy as jnp
from fmbseg_jax.sharing import exports
template = {{"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}}
kernel = exports.load_export({str(tmp_path / "export")!r}, template)["kernel"]
print(len(jax.devices()), kernel.sum(), len(kernel.devices()))
"""
    (tmp_path / "load.py").write_text(code)
    output = run(tmp_path / "load.py", PYTHONPATH=str(ROOT)).stdout
    assert output.splitlines()[-1] == "1 15.0 1"


def test_tensorboard_reads_the_log(with_features, world, tmp_path):
    """Its own reader; steps that a killed run had logged, and a later one does again, come once."""
    (tmp_path / "features").symlink_to(with_features / "features")
    command = ["train.py", *world.flags, f"--workdir={tmp_path}", "--config.train.log_every=2"]
    run(*command)
    shutil.rmtree(tmp_path / "checkpoints" / "8")
    shutil.rmtree(tmp_path / "export")
    run(*command)
    events = EventAccumulator(str(tmp_path / "metrics")).Reload()
    names = {
        "loss", "accuracy", "gradient_norm", "learning_rate", "step_time", "data_wait",
        "images_per_second", "patches_per_second",
    }  # fmt: skip
    assert names <= set(events.Tags()["scalars"])
    lines = [json.loads(line) for line in (tmp_path / "metrics" / "train.jsonl").open()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    scalars = events.Scalars("loss")
    assert [scalar.step for scalar in scalars] == [2, 4, 6, 8]
    assert [scalar.value for scalar in scalars] == pytest.approx([line["loss"] for line in lines])
    assert lines[0]["learning_rate"] == pytest.approx(0.3)
    assert lines[-1]["images_per_second"] * lines[-1]["step_time"] == pytest.approx(5)


def test_validation_while_training(with_features, world, tmp_path):
    """Every so many steps, and at the end; what it measures is what evaluate.py would."""
    from toyworld import scenes

    annotated = scenes.write_folder(tmp_path / "annotated", "test", 3)
    (tmp_path / "features").symlink_to(with_features / "features")
    command = ["train.py", *world.flags, f"--workdir={tmp_path}"]
    given = {"validate_on": annotated, "validate_every": 3, "checkpoint_every": 100, "keep": 1}
    output = run(
        *command, *(f"--config.train.{name}={value}" for name, value in given.items()),
        "--config.train.export=best",
    ).stdout  # fmt: skip
    assert "mIoU=" in output
    lines = [json.loads(line) for line in (tmp_path / "metrics" / "train.jsonl").open()]
    measured = {line["step"]: line["miou"] for line in lines if "miou" in line}
    assert list(measured) == [3, 6, 8]
    best = max(measured, key=measured.get)
    assert exports.read_model(tmp_path / "export")["steps"] == best
    assert checkpoint.Checkpoints(tmp_path / "checkpoints").best == best
    run("evaluate.py", *world.flags, f"--workdir={tmp_path}", f"--config.eval.folder={annotated}")
    found = json.loads((tmp_path / "evaluation" / "annotated.json").read_text())["systems"]
    confused = [value or 0 for value in found["aligner"]["iou"].values()]
    assert np.mean(confused) == pytest.approx(measured[best], abs=0.02)

    shutil.rmtree(tmp_path / "checkpoints")
    run(*command, f"--config.train.validate_on={with_features}", "--config.train.validate_images=2")
    lines = [json.loads(line) for line in (tmp_path / "metrics" / "train.jsonl").open()]
    assert 0 <= lines[-1]["miou"] <= 1
    refused = run(*command, f"--config.train.validate_on={tmp_path / 'none'}", check=False)
    assert "is no annotated folder" in refused.stdout


def test_fine_tuning_starts_from_an_export(with_features, world, tmp_path):
    """On other pseudo labels, with other words; what does not fit is refused."""
    first = tmp_path / "first"
    first.mkdir()
    (first / "features").symlink_to(with_features / "features")
    run("train.py", *world.flags, f"--workdir={first}")
    other = tmp_path / "other"
    shutil.copytree(with_features / "features", other / "features")
    metadata = json.loads((other / "features" / "metadata.json").read_text())
    metadata["words"] = [f"{word} again" for word in metadata["words"]] + ["moon"]
    (other / "features" / "metadata.json").write_text(json.dumps(metadata))
    start = f"--config.train.start_from={first / 'export'}"
    still = ["--config.train.peak_lr=1e-9", "--config.train.epochs=1"]
    run("train.py", *world.flags, f"--workdir={other}", start, *still)
    assert exports.read_model(other / "export")["words"][-1] == "moon"
    with checkpoint.ocp.StandardCheckpointer() as reader:
        ours, theirs = (reader.restore(w / "export" / "params") for w in (other, first))
    assert_same(jax.device_get(ours), jax.device_get(theirs), 1e-7)

    command = ["train.py", *world.flags, f"--workdir={tmp_path / 'refused'}", start]
    (tmp_path / "refused").mkdir()
    (tmp_path / "refused" / "features").symlink_to(other / "features")
    shape = run(*command, "--config.train.mlp_ratio=2", check=False).stdout
    assert "hidden.kernel: [48, 192] there, [48, 96] here" in shape
    metadata["vision"]["hash"] = "another"
    (other / "features" / "metadata.json").write_text(json.dumps(metadata))
    assert "was trained with the vision encoder" in run(*command, check=False).stdout
