"""Runs that stop: killed, told to, by a full disk, by a loss that diverges; and go on elsewhere."""

import json
import random
import re
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from conftest import run, start, wait_until

from fmbseg_jax.training import checkpoint

LONG = (
    "--config.train.epochs=150", "--config.train.checkpoint_every=10",
    "--config.train.log_every=10", "--config.train.patches_per_image=20",
)  # fmt: skip


@pytest.fixture(scope="module")
def long(with_features, world, tmp_path_factory):
    """A run of 300 steps that nothing stopped."""
    workdir = tmp_path_factory.mktemp("long")
    command = ["train.py", *world.flags, *LONG]
    run(*command, f"--workdir={begin(workdir, with_features)}")
    return workdir


def begin(workdir, with_features):
    workdir.mkdir(exist_ok=True)
    (workdir / "features").symlink_to(with_features / "features")
    return workdir


def lines(workdir):
    path = workdir / "metrics" / "train.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(process, workdir, step):
    """Returns when the run has logged a step."""
    reached = wait_until(
        lambda: any(line["step"] >= step for line in lines(workdir)), process, every=0.01
    )
    assert reached, process.stdout.read()


def params(workdir):
    folder = workdir / "export" / "params"
    with checkpoint.ocp.StandardCheckpointer() as checkpointer:
        return jax.device_get(checkpointer.restore(folder))


CONTINUED = re.compile(r"Continuing from the checkpoint of step (\d+)")


def last_saved(workdir):
    """Step of the last checkpoint that is not cut short; 0 without any."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def assert_identical(workdir, other):
    """To the last bit, and with the same log."""
    jax.tree.map(np.testing.assert_array_equal, params(workdir), params(other))
    ours, theirs = (
        [{name: line[name] for name in ("step", "loss", "accuracy")} for line in lines(folder)]
        for folder in (workdir, other)
    )
    assert ours == theirs


def test_twenty_kills_leave_no_trace(long, with_features, world, tmp_path):
    """Every other one at any moment, also while it loads; the rest when it has come further."""
    begin(tmp_path, with_features)
    command = ["train.py", *world.flags, *LONG, f"--workdir={tmp_path}"]
    begun = time.monotonic()
    process = start(*command)
    wait_for(process, tmp_path, 10)
    process.kill()
    process.wait()
    loading, moments = time.monotonic() - begun, random.Random(0)
    saved, continued = last_saved(tmp_path), set()
    for i in range(20):
        process = start(*command)
        if i % 2:
            wait_until(lambda: last_saved(tmp_path) > saved, process, every=0.01)  # noqa: B023
            time.sleep(moments.uniform(0, 0.3))
        else:
            time.sleep(moments.uniform(0, 1.2) * loading)
        process.send_signal(signal.SIGKILL)
        output = process.communicate()[0]
        assert process.returncode in (-signal.SIGKILL, 0), output
        assert "error" not in output.lower(), output
        if found := CONTINUED.search(output):
            assert int(found[1]) == saved
            continued.add(saved)
        saved = last_saved(tmp_path)
        if process.returncode == 0:  # it was done: from the start again
            assert_identical(tmp_path, long)
            for name in ("checkpoints", "metrics", "export"):
                shutil.rmtree(tmp_path / name)
            saved = 0
    assert len(continued) > 5
    run(*command)
    assert_identical(tmp_path, long)


@pytest.mark.parametrize(
    ("number", "code", "devices"), [(signal.SIGTERM, 0, 1), (signal.SIGINT, 130, 8)]
)
def test_told_to_stop(number, code, devices, long, with_features, world, tmp_path):
    """It saves the step it is at, says so, and goes on from there, on one device."""
    begin(tmp_path, with_features)
    command = ["train.py", *world.flags, *LONG, f"--workdir={tmp_path}"]
    flags = f"--xla_force_host_platform_device_count={devices}"
    process = start(*command, XLA_FLAGS=flags)
    wait_for(process, tmp_path, 20)
    process.send_signal(number)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == code, output
    step = int(re.search(r"after step (\d+); its checkpoint is saved", output)[1])
    assert step >= 20
    assert checkpoint.Checkpoints(tmp_path / "checkpoints").last == step
    assert not (tmp_path / "export").exists()
    assert f"Continuing from the checkpoint of step {step}." in run(*command).stdout
    if devices == 1:
        assert_identical(tmp_path, long)
    else:
        ours, theirs = lines(tmp_path)[-1], lines(long)[-1]
        assert ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)


def test_a_loss_that_diverges_stops_the_run(with_features, world, tmp_path):
    begin(tmp_path, with_features)
    wild = ["--config.train.peak_lr=1e30", "--config.train.clip_norm=0"]
    command = ["train.py", *world.flags, f"--workdir={tmp_path}", *wild]
    stopped = run(*command, "--config.train.checkpoint_every=1", check=False)
    assert stopped.returncode == 1
    found = re.search(
        r"diverged at step (\d+): loss .*, learning rate (\S+)\. (.*)\.", stopped.stdout
    )
    step = int(found[1])
    assert float(found[2]) > 1e28
    assert f"The last good checkpoint is of step {step - 1}" in found[3]
    assert checkpoint.Checkpoints(tmp_path / "checkpoints").last == step - 1
    assert not (tmp_path / "export").exists()


def test_a_full_disk_stops_nothing(long, with_features, world, tmp_path):
    """Neither checkpoints nor the log: both are told of, and catch up when there is room."""
    disk, fill = tmp_path / "disk", tmp_path / "disk" / "fill"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk]).returncode:
        pytest.skip("no permission to mount a tmpfs")
    process = None
    try:
        begin(disk, with_features)
        with (tmp_path / "output").open("w") as output:
            process = start("train.py", *world.flags, *LONG, f"--workdir={disk}", stdout=output)
        wait_for(process, disk, 50)
        with pytest.raises(OSError, match="No space left"), fill.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        told = re.compile(
            r"ERROR: a checkpoint could not be saved in .*No space left on device.* Make room.\n"
            r"The last good one is of step \d+; the training goes on"
        )
        said = wait_until(lambda: told.search((tmp_path / "output").read_text()), process, 0.05)
        assert said, (tmp_path / "output").read_text()
        fill.unlink()
        assert process.wait(timeout=120) == 0, (tmp_path / "output").read_text()
        assert_identical(disk, long)
    finally:
        if process:
            process.kill()
            process.wait()
        subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_full_to_the_end(with_features, world, tmp_path):
    """Checkpoint, log and export: each is told of in a sentence, and the next run makes them."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "none", disk]).returncode:
        pytest.skip("no permission to mount a tmpfs")
    try:
        begin(disk, with_features)
        command = ["train.py", *world.flags, f"--workdir={disk}"]
        stopped = run(*command, check=False)
        assert stopped.returncode == 1 and "Traceback" not in stopped.stdout
        told = r"(?m)^error: \[Errno 28\] No space left on device: '.*'\. Make room\."
        assert len(re.findall(told, stopped.stdout)) == 1, stopped.stdout
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        run(*command)
        assert (disk / "export" / "model.json").exists()
        assert [line["step"] for line in lines(disk)][-1] == 8
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_checkpoint_of_another_architecture_is_refused(with_features, world, tmp_path):
    begin(tmp_path, with_features)
    command = ["train.py", *world.flags, f"--workdir={tmp_path}"]
    run(*command)
    (tmp_path / "config.json").unlink()  # what would refuse it before
    other = run(*command, "--config.train.mlp_ratio=2", check=False)
    assert other.returncode == 1
    assert "is of another architecture" in other.stdout
    assert "params.hidden.kernel: [48, 192] there, [48, 96] here" in other.stdout


def test_told_to_stop_while_a_batch_is_read(with_features, world, tmp_path):
    """A disk that does not answer: the step before is saved, not the one that is waited for."""
    begin(tmp_path, with_features)
    slow = """
import runpy, sys, time
from fmbseg_jax.training import batches as pipeline
stacked, read = pipeline._stacked, []
def slow(*given):
    read.append(given)
    time.sleep(0 if len(read) <= 5 else 20)
    return stacked(*given)
pipeline._stacked = slow
sys.path[0] = "."
runpy.run_path("train.py", run_name="__main__")
"""
    (tmp_path / "slow.py").write_text(slow)
    command = [tmp_path / "slow.py", *world.flags, *LONG, "--config.train.log_every=1"]
    process = start(*command, f"--workdir={tmp_path}")
    wait_for(process, tmp_path, 5)
    told = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output = ""
    while "stopped after step 5; its checkpoint is saved" not in output:
        line = process.stdout.readline()
        assert line, output
        output += line
    assert time.monotonic() - told < 15
    assert last_saved(tmp_path) == 5
    process.communicate(timeout=120)
    assert process.returncode == 0
