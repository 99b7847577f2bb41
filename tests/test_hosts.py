"""Several processes: who joins whom, and that together they train as one."""

import json
import os
import signal
import socket

import jax
import numpy as np
import pytest
from conftest import run, start
from test_restarts import begin, lines, params, wait_for

from fmbseg_jax.errors import UserError
from fmbseg_jax.parallel import agreement, hosts
from fmbseg_jax.training import checkpoint

TWO_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
FOUR_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
FLAGS = "--config.train.batch_size=6", "--config.train.patches_per_image=20"


def start_two(*command, fresh=False):
    """The same command in two processes that know of each other by flags."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [*command, f"--coordinator={address}", "--processes=2"]
    return [start(*command, f"--process={i}", fresh=fresh, **TWO_DEVICES) for i in range(2)]


def finish(hosts):
    outputs = [host.communicate(timeout=300)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(outputs)
    return outputs


def test_two_processes_with_two_devices_train_as_one_with_four(with_features, world, tmp_path):
    folders = [begin(tmp_path / name, with_features) for name in ("two [1]*", "one")]
    command = ["train.py", *world.flags, *FLAGS]
    outputs = finish(start_two(*command, f"--workdir={folders[0]}", fresh=True))
    assert [output.count("The aligner is in") for output in outputs] == [1, 0]
    assert "step/s" not in outputs[1]
    run(*command, f"--workdir={folders[1]}", **FOUR_DEVICES)
    both = [lines(folder) for folder in folders]
    for ours, theirs in zip(*both, strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    ours, theirs = map(params, folders)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


def test_one_of_two_processes_is_told_to_stop(with_features, world, tmp_path):
    """Both stop after the same step, with one checkpoint; one process goes on from it."""
    workdir = begin(tmp_path / "work", with_features)
    command = ["train.py", *world.flags, *FLAGS, f"--workdir={workdir}"]
    command += ["--config.train.epochs=3000", "--config.train.checkpoint_every=5000"]
    hosts = start_two(*command)
    wait_for(hosts[0], workdir, 5)
    hosts[1].send_signal(signal.SIGTERM)
    outputs = finish(hosts)
    step = checkpoint.Checkpoints(workdir / "checkpoints").last
    assert f"stopped after step {step}; its checkpoint is saved" in outputs[0]
    alone = start(*command)
    wait_for(alone, workdir, step + 20)
    alone.kill()
    assert f"Continuing from the checkpoint of step {step}." in alone.communicate()[0]
    assert [line["step"] for line in lines(workdir)][: step + 20] == list(range(1, step + 21))


def test_two_processes_fine_tune_and_measure(with_features, world, tmp_path):
    """What one process reads, the other has; what stops the first stops both, soon."""
    first, second = (begin(tmp_path / name, with_features) for name in ("first", "second"))
    run("train.py", *world.flags, f"--workdir={first}")
    command = [
        "train.py", *world.flags, f"--workdir={second}",
        f"--config.train.start_from={first / 'export'}", "--config.train.epochs=2",
        f"--config.train.validate_on={with_features}", "--config.train.validate_images=2",
    ]  # fmt: skip
    finish(start_two(*command))
    assert 0 <= lines(second)[-1]["miou"] <= 1
    hosts = start_two(*command, "--config.train.peak_lr=0.2")
    outputs = [host.communicate(timeout=60)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [1, 1]
    assert "train.peak_lr: 0.3 there, 0.2 now" in outputs[0]
    assert "Process 0 has stopped; its output says why" in outputs[1]


def test_two_processes_evaluate_as_one(with_features, world, tmp_path):
    """Each image once; what they count adds up; one that was there already is not done again."""
    from toyworld import scenes

    annotated = scenes.write_folder(tmp_path / "annotated", "test", 5)
    trained = begin(tmp_path / "one", with_features)
    flags = [*world.flags, f"--config.eval.folder={annotated}", "--config.train.epochs=1"]
    run("train.py", *flags, f"--workdir={trained}")
    one = ["evaluate.py", *flags, f"--model={trained / 'export'}"]
    outputs = finish(start_two(*one, f"--workdir={tmp_path / 'two'}"))
    assert "the aligner" in outputs[0] and "mIoU" not in outputs[1]
    run(*one, f"--workdir={trained}")
    first, second = (
        json.loads((folder / "evaluation" / "annotated.json").read_text())["systems"]
        for folder in (trained, tmp_path / "two")
    )
    assert first == second
    counts = tmp_path / "two" / "evaluation" / "counts" / "annotated"
    lines = [len((counts / f"aligner.{i}.jsonl").read_text().splitlines()) for i in range(2)]
    assert lines == [4, 3]  # of five images, and a line that says whose they are
    again = run(*one, f"--workdir={tmp_path / 'two'}").stdout
    assert "5/5" in again
    assert len((counts / "aligner.0.jsonl").read_text().splitlines()) == 4


def test_counts_of_several_processes_are_exact(monkeypatch):
    """Counts beyond 32 bits go as two halves."""
    ours, theirs = (np.asarray([[value, 5]], np.int64) for value in (3 << 40, (1 << 33) - 1))

    def gather(halves):
        assert halves.dtype == np.int32
        other = np.stack([theirs >> 31, theirs & (1 << 31) - 1]).astype(np.int32)
        return np.stack([halves, other])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(agreement.multihost_utils, "process_allgather", gather)
    np.testing.assert_array_equal(agreement.sum_of_all(ours), ours + theirs)


@pytest.fixture
def joined(monkeypatch):
    """What jax.distributed is asked for; no cluster in the environment."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "JAX_NUM", "JAX_PROCESS", "JAX_COORD")):
            monkeypatch.delenv(name)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given: calls.append(given))
    return calls


SRUN = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "flags", "expected"),
    [
        ({}, ("", 0, -1), []),
        ({}, ("a:1", 2, 0), [("a:1", 2, 0)]),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "b:1",
                "JAX_NUM_PROCESSES": "3",
                "JAX_PROCESS_ID": "2",
            },
            ("", 0, -1),
            [("b:1", 3, 2)],
        ),
        (SRUN | {"SLURM_NTASKS": "2"}, ("", 0, -1), [()]),
        (SRUN | {"SLURM_NTASKS": "1"}, ("", 0, -1), []),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, ("", 0, -1), []),  # sbatch without srun
        ({"OMPI_COMM_WORLD_SIZE": "4"}, ("", 0, -1), [()]),
        ({"JAX_PLATFORMS": "tpu"}, ("", 0, -1), [()]),
        ({"JAX_PLATFORMS": ""}, ("", 0, -1), [()]),
    ],
)
def test_who_joins_whom(monkeypatch, joined, environment, flags, expected):
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    monkeypatch.setattr(hosts, "_has_tpu", lambda: True)
    for name, value in ({"JAX_PLATFORMS": "cpu"} | environment).items():
        monkeypatch.setenv(name, value)
    hosts.start_hosts(*flags)
    assert joined == expected


def test_half_told_hosts_are_refused(monkeypatch, joined):
    with pytest.raises(UserError, match="give --processes, --process too"):
        hosts.start_hosts("somewhere:1234", 0, -1)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")

    def unreachable():
        raise RuntimeError("DEADLINE_EXCEEDED")

    monkeypatch.setattr(jax.distributed, "initialize", unreachable)
    with pytest.raises(UserError, match="cannot be joined: DEADLINE_EXCEEDED\n.*docs/pods.md"):
        hosts.start_hosts("", 0, -1)
