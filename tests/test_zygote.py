"""What is forked is what would have been started."""

import os
import signal
import subprocess
import sys
import unittest.mock

import pytest
import zygote
from conftest import run, start, wait_until

SEEN = """
import os, random, signal, sys, threading
import __main__
print(__name__, __file__, __main__.__file__, __spec__ and __spec__.name, sys.argv, sys.orig_argv)
print(sys.path, os.getcwd(), sys.executable, sys.flags)
set_by_libraries = "TF_CPP_MIN_LOG_LEVEL", "TPU_SKIP_MDS_QUERY"
print(*(item for item in sorted(os.environ.items()) if item[0] not in set_by_libraries), sep="\\n")
print(os.getppid(), os.getpgrp(), os.getsid(0), os.umask(0), sorted(os.listdir("/proc/self/fd")))
print([signal.getsignal(number) for number in range(1, 32)], threading.active_count())
print([stream.encoding for stream in (sys.stdin, sys.stdout, sys.stderr)], sys.stdout.isatty())
print([name for name in sys.modules if name.split(".")[0] in ("fmbseg_jax", "labelling", "train")])
sys.stdout.flush()
exec(sys.argv[1])
"""
ENDS = {
    "pass": 0,
    "sys.exit(3)": 3,
    "sys.exit('why')": 1,
    "1 / 0": 1,
    "os._exit(4)": 4,
    "raise KeyboardInterrupt": -signal.SIGINT,
    "os.kill(os.getpid(), 2); threading.Event().wait(60)": -signal.SIGINT,
    "os.kill(os.getpid(), 15)": -signal.SIGTERM,
    "os.kill(os.getpid(), 9)": -signal.SIGKILL,
    "import atexit; atexit.register(print, 'the end'); print('unflushed')": 0,
}


@pytest.fixture
def seen(tmp_path):
    (tmp_path / "seen.py").write_text(SEEN)

    def seen(popen, end, *command):
        process = popen(
            [sys.executable, *command, end, "--flag=1"], cwd=tmp_path, text=True,
            env=os.environ | {"XLA_FLAGS": end}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        output = process.communicate(timeout=300)[0]
        frames = output.splitlines()  # of a traceback: those of the program
        return process.returncode, [line for line in frames if not line.startswith("  ")]

    return seen


@pytest.mark.parametrize("command", [("seen.py",), ("-m", "seen")])
@pytest.mark.parametrize("end", ENDS)
def test_a_fork_is_as_a_start(seen, end, command):
    code, output = seen(zygote.Popen, end, *command)
    assert (code, output) == seen(subprocess.Popen, end, *command)
    assert code == ENDS[end], output
    assert len(output) > 5, output


def test_forks_share_no_randomness_and_have_devices_of_their_own(tmp_path):
    (tmp_path / "draw.py").write_text(
        "import os, random, numpy, jax\nfrom jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "assert len(os.listdir('/proc/self/task')) == 1\n"
        "print(random.random(), numpy.random.rand(), jax.device_count())\n"
    )
    drawn = []
    for count in (1, 3):
        flags = f"--xla_force_host_platform_device_count={count}"
        *some, devices = run(tmp_path / "draw.py", XLA_FLAGS=flags).stdout.split()
        assert int(devices) == count
        drawn += some
    assert len(set(drawn)) == 4


def test_another_environment_is_another_process(monkeypatch):
    """Libraries read most of it when they are imported."""
    monkeypatch.setattr(zygote, "_running", {})
    monkeypatch.setattr(zygote, "Zygote", lambda environment: unittest.mock.Mock())
    one = zygote._zygote({"JAX_ENABLE_X64": "0", "XLA_FLAGS": "a"})
    assert zygote._zygote({"JAX_ENABLE_X64": "0", "XLA_FLAGS": "b"}) is one
    one.close.assert_not_called()
    assert zygote._zygote({"JAX_ENABLE_X64": "1", "XLA_FLAGS": "a"}) is not one
    one.close.assert_called_once()


def test_a_program_that_hangs_is_told(tmp_path, monkeypatch):
    (tmp_path / "hang.py").write_text("import time; print('begun', flush=True); time.sleep(600)")
    monkeypatch.setattr("conftest._LIMIT", 15)  # s, in which it has to begin
    with pytest.raises(AssertionError, match=r"It hangs: .*hang.py'\]\nbegun"):
        run(tmp_path / "hang.py")
    process = start(tmp_path / "hang.py")
    with pytest.raises(AssertionError, match="It hangs"):
        wait_until(lambda: False, process)
    assert process.wait(timeout=60) == -signal.SIGKILL
