"""Programs of ours without the seconds that their imports take: forked, not started.

A process beside pytest imports the libraries once. For each program it forks a child, which becomes
`python -m NAME ...` or `python FILE.py ...` in all that can be seen from inside and outside:
folder, environment, arguments, streams, parent, signals and exit code. It has imported nothing of
ours. Two things are as no fresh interpreter has them: LIBRARIES are there also if a program forgot
to import them, and all forks have one order of sets of strings (PYTHONHASHSEED). So each program
has tests that start it the usual way, too.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LIBRARIES = (
    "jax", "jax.experimental.multihost_utils", "jaxlib.mlir.dialects.mhlo", "flax.linen", "optax",
    "orbax.checkpoint", "grain", "tensorflow_datasets", "google_crc32c", "safetensors.numpy",
    "tensorboard.summary.writer.event_file_writer", "ml_collections.config_flags", "jaxtyping",
    "etils.epath", "tqdm", "PIL.ImageDraw", "PIL.ImageFont", "PIL.PngImagePlugin",
    "PIL.JpegImagePlugin", "torch", "safetensors.torch", "transformers.models.auto",
    "transformers.models.auto.tokenization_auto", "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
)  # fmt: skip

LATE = {"XLA_FLAGS", "PYTEST_CURRENT_TEST"}
"""Variables that no library reads before it is used; by all others, a process is of its own."""

_PR_SET_CHILD_SUBREAPER = 36


class Popen(subprocess.Popen):
    """As subprocess.Popen, for `[python, "-m", NAME, ...]` and `[python, FILE.py, ...]`."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        pipes = rest[3:9]  # p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite
        given = enumerate((pipes[0], pipes[3], pipes[5]))
        streams = [pipe if pipe >= 0 else number for number, pipe in given]
        environment = dict(os.environ if env is None else env)
        arguments = [os.fspath(argument) for argument in args]
        assert arguments[1] == "-m" or arguments[1].endswith(".py"), arguments
        request = {"arguments": arguments, "environment": environment}
        request["folder"] = str(cwd or os.getcwd())
        self.pid = _zygote(environment).fork(request, streams)
        self._child_created = True
        self._close_pipe_fds(*pipes)


class Zygote:
    """The process that has imported the libraries, as pytest sees it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(300)  # a slow machine may take long to import; a hang, for ever
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )  # fmt: skip

    def fork(self, request: dict[str, Any], streams: list[int]) -> int:
        """Pid of a program that has begun; it is a child of this process."""
        with _adopting_orphans():
            socket.send_fds(self._control, [json.dumps(request).encode()], streams)
            pid = self._control.recv(64)
        if not pid:
            raise RuntimeError(f"The process that forks programs ended: {self._process.wait()}.")
        return int(pid)

    def close(self) -> None:
        self._control.close()
        self._process.wait(timeout=60)


_running: dict[frozenset[tuple[str, str]], Zygote] = {}


def _zygote(environment: Mapping[str, str]) -> Zygote:
    """The one for this environment; there is one at a time, as modules keep to an environment."""
    key = frozenset((name, value) for name, value in environment.items() if name not in LATE)
    if key not in _running:
        close()
        _running[key] = Zygote(environment)
    return _running[key]


@atexit.register
def close() -> None:
    while _running:
        _running.popitem()[1].close()


@contextlib.contextmanager
def _adopting_orphans() -> Iterator[None]:
    """Grandchildren whose parents end become our children, so that we can wait for them."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def serve(control: socket.socket) -> dict[str, Any] | None:
    """Forks a program for each request; returns the request in the program, None at the end."""
    while True:
        message, streams, _, _ = socket.recv_fds(control, 1 << 20, 3)
        if not message:
            return None
        read, write = os.pipe()
        between = os.fork()  # its end makes the program an orphan, which pytest adopts
        if not between:
            parent = os.getpid()
            if pid := os.fork():
                os.write(write, str(pid).encode())
                os._exit(0)
            while os.getppid() == parent:
                time.sleep(0.0005)
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            for other in (*streams, read, write, control.detach()):
                os.close(other)
            return json.loads(message)
        os.waitpid(between, 0)
        control.send(os.read(read, 64))
        for other in (*streams, read, write):
            os.close(other)


def become(request: dict[str, Any]) -> None:
    """Runs the program in this process, as if it had been started."""
    import numpy as np

    os.chdir(request["folder"])
    for name in LATE:  # the others are the same, or were set by a library
        os.environ.pop(name, None)
    os.environ.update(request["environment"])
    sys.orig_argv, sys.argv = request["arguments"], request["arguments"][1:]
    sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())
    np.random.seed()  # `random` does so by itself
    importlib.invalidate_caches()
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if sys.argv[0] == "-m":
        name = sys.argv.pop(1)
        sys.path[0] = os.getcwd()
        runpy._run_module_as_main(name)
    else:
        path = Path(sys.argv[0]).absolute()
        sys.path[0] = str(path.resolve().parent)
        main.__dict__.update(__file__=str(path), __builtins__=__builtins__)
        exec(compile(path.read_bytes(), path, "exec"), main.__dict__)


if __name__ == "__main__":
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()  # what is there stays: no collection in a child copies its pages
    try:
        request = serve(socket.socket(fileno=int(sys.argv[1])))
    except KeyboardInterrupt:  # pytest has it, too
        request = None
    if request:
        become(request)
