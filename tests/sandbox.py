"""A folder in which the commands of README and docs run as they are written, offline, in seconds.

It looks like a checkout with everything in it that the documents speak of: photographs, words,
checkpoints, data sets, a Hugging Face cache. All of it is tiny: models are random, data sets hold
an image or two, and configs/ and toyworld/ are the project's with smaller numbers.

bash reads the commands. Programs of ours that it starts, it finds in .venv/bin, where each is a
few lines that hand the command line to this process; zygote.py then forks the program.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import tomllib
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path

import models
import zygote
from conftest import ROOT
from labelling_tiny import save_sam
from packaging.requirements import Requirement
from PIL import Image

LIMIT = 300  # s; what takes so long has stopped for ever

_OF_SHELLS = {
    "_", "SHLVL", "PWD", "OLDPWD", "PATH", "VIRTUAL_ENV", "VIRTUAL_ENV_PROMPT", "PS1",
    "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKE_TERMOUT", "MAKE_TERMERR",
}  # fmt: skip
"""Variables that bash and make set; a program of ours reads none of them."""

_LINKS = (
    "Makefile", "README.md", "benchmarks", "docs", "evaluate.py", "fmbseg_jax", "labelling",
    "pyproject.toml", "requirements.txt", "requirements-dev.txt", "tests", "train.py",
)  # fmt: skip

_CONFIG = """
import runpy

def get_config():
    config = runpy.run_path({file!r})["get_config"]()
    sam, train, evaluation = config.label.sam, config.train, config.eval
    if config.models.sam.startswith("sam_vit_"):
        config.models.sam = "tiny_sam.pth"  # files of the published names are checked by their sums
    sam.points_per_side, sam.pred_iou, sam.stability = 4, 0.0, 0.0
    config.features.size = evaluation.stride = 56
    evaluation.short_side = evaluation.window = 112
    train.heads, train.epochs = 2, 2
    if {file!r}.endswith("toy.py"):
        train.epochs = 24  # whose similarities reach what the documents say of the toy world
    return config
"""

_TOYWORLD = """
import runpy, sys
sys.argv.append("--scenes=4")
runpy.run_path({file!r}, run_name="__main__")
"""

_PROGRAM = """#!{python} -SEs
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as control:
    control.connect({address!r})
    request = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode() + b"\\n"
    socket.send_fds(control, [request[:1024]], [1])
    control.sendall(request[1024:])
    sys.exit(int(control.recv(16) or 1))
"""

_FLAGS_ONLY = """
import os, runpy, sys
from absl import app, flags

def run(main, argv=None, flags_parser=None):
    rest = (flags_parser or flags.FLAGS)(sys.argv)
    assert not rest[1:], rest
    print("It has all of these flags.")

app.run = run
del sys.argv[0]
if sys.argv[0] == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Sandbox:
    """The folder, and what runs the programs that bash starts in it."""

    def __init__(self, folder: Path):
        self.folder, self._flags_only = folder, False
        self._running: list[subprocess.Popen] = []
        self._control = Path(tempfile.mkdtemp(prefix="fmbseg_docs_"))  # a socket's path is short
        address = self._control / "socket"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(address))
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()
        self._stand_ins = {"pip": _pip, "gcloud": self._gcloud, "hf": _hf}
        _build(folder, str(address))
        ours = {"PATH": f"{folder / '.venv' / 'bin'}:{os.environ['PATH']}", "XLA_FLAGS": ""}
        ours |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
        ours |= {"SCRATCH": str(folder / "scratch"), "PYTHONPATH": str(folder / "stand_ins")}
        ours |= {
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"
        }  # of what takes longer to compile than to run
        gone = "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "VIRTUAL_ENV", "RAY_ADDRESS"
        self.environment = {k: v for k, v in os.environ.items() if k not in gone} | ours

    def close(self) -> None:
        self._listener.close()
        shutil.rmtree(self._control)

    def run(self, command: str, flags_only: bool = False) -> tuple[int, str]:
        """Exit code and output of a command for the shell.

        Args:
          flags_only: programs of ours, and benchmarks, only read their flags.
        """
        self._flags_only = flags_only
        try:
            with self._bash(command) as process:
                output, _ = process.communicate(timeout=LIMIT)
        finally:
            self._flags_only = False
        return process.returncode, output

    def answer(self, command: str) -> tuple[int, str]:
        """Exit code, after Ctrl-C, of a command that serves a page, and the page."""
        with self._bash(command) as process:
            output = ""
            for line in process.stdout:
                output += line
                if address := re.search(r"http://[\w.:]+/", output):
                    break
            assert process.poll() is None and address, output
            page = urllib.request.urlopen(address[0], timeout=60).read().decode()
            for program in self._running:
                program.send_signal(signal.SIGINT)
            process.communicate(timeout=LIMIT)
        return process.returncode, page

    def run_python(self, code: str, *arguments: str) -> tuple[int, str]:
        """Exit code and output of a script."""
        (self.folder / "script.py").write_text(code)
        return self.run(" ".join(["python", "script.py", *arguments]))

    def _bash(self, command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-e", "-c", command], cwd=self.folder, env=self.environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            request, streams, _, _ = socket.recv_fds(connection, 1024, 1)
            while not request.endswith(b"\n"):
                request += connection.recv(1 << 16)
            code = 1
            try:
                code = self._start(*json.loads(request), streams[0])
            except Exception as error:  # bash sees it as the program's
                os.write(streams[0], f"{type(error).__name__}: {error}\n".encode())
            finally:
                os.close(streams[0])
                connection.sendall(str(code).encode())

    def _start(self, argv: list[str], folder: str, environment: dict, stdout: int) -> int:
        """Runs a program that bash has started; its exit code."""
        name, arguments = Path(argv[0]).name, argv[1:]
        if name in self._stand_ins:
            os.write(stdout, self._stand_ins[name](arguments).encode())
            return 0
        first = {"fmbseg": ["-m", "fmbseg_jax"], "tensorboard": ["-m", "tensorboard.main"]}
        arguments = [*first.get(name, []), *arguments]
        if self._flags_only:
            arguments = ["flags_only.py", *arguments]
        with self._tracked(arguments, folder, environment, stdout) as process:
            return process.wait()

    @contextlib.contextmanager
    def _tracked(self, arguments, folder, environment, stdout) -> Iterator[subprocess.Popen]:
        theirs = {name: value for name, value in environment.items() if name not in _OF_SHELLS}
        same = theirs.items() <= self.environment.items() and sys.platform == "linux"
        process = (zygote.Popen if same else subprocess.Popen)(
            [sys.executable, *arguments], cwd=folder,
            env=self.environment if same else environment,
            stdin=subprocess.DEVNULL, stdout=stdout, stderr=stdout,
        )  # fmt: skip
        self._running.append(process)
        try:
            yield process
        finally:
            self._running.remove(process)

    def _gcloud(self, arguments: list[str]) -> str:
        """The command for the hosts is read by bash, and our programs read their flags."""
        (command,) = [a.removeprefix("--command=") for a in arguments if a.startswith("--command")]
        with self._bash(command) as process:
            output, _ = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, output
        return output


def _pip(arguments: list[str]) -> str:
    """That extras and files of requirements exist; names of other projects are only read."""
    assert arguments.pop(0) == "install", arguments
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    while arguments:
        argument = arguments.pop(0)
        if argument == "-r":
            assert (ROOT / arguments.pop(0)).is_file()
        elif argument not in ("-q", "-e", "--no-deps", "--require-hashes"):
            wanted = Requirement(re.sub(r"^\.", project["name"], argument))
            if wanted.name == project["name"]:
                known = project["optional-dependencies"].keys()
            elif wanted.extras:
                known = set(importlib.metadata.metadata(wanted.name).get_all("Provides-Extra"))
            assert not wanted.extras or wanted.extras <= known, f"{argument}: {sorted(known)}"
    return "These can be asked for.\n"


def _hf(arguments: list[str]) -> str:
    """That the hub's client has such a command."""
    hf = Path(sys.executable).parent / "hf"
    command = [hf, *arguments, "--help"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _build(folder: Path, address: str) -> None:
    for name in _LINKS:
        (folder / name).symlink_to(ROOT / name)
    (folder / "fmbseg").symlink_to(".")  # a checkout on a host of its own
    _programs(folder, address)
    _smaller(folder)
    _hub(folder / "hf" / "hub")
    save_sam(folder / "tiny_sam.pth")
    _images(folder)
    _benchmarks(folder / "data")


def _programs(folder: Path, address: str) -> None:
    venv.create(folder / ".venv")
    (folder / ".venv" / "demo").touch()  # nothing is left to install
    asks = _PROGRAM.format(python=sys.executable, address=address).lstrip()
    names = "python", "python3", "fmbseg", "tensorboard", "pip", "gcloud", "hf"
    one_task = '#!/bin/sh\nexec "$@"\n'
    for name, text in {**dict.fromkeys(names, asks), "srun": one_task}.items():
        path = folder / ".venv" / "bin" / name
        path.unlink(missing_ok=True)  # a link to the real one
        path.write_text(text)
        path.chmod(0o755)
    (folder / "flags_only.py").write_text(_FLAGS_ONLY)


def _smaller(folder: Path) -> None:
    (folder / "configs").mkdir()
    for path in (ROOT / "configs").glob("*.py"):
        (folder / "configs" / path.name).write_text(_CONFIG.format(file=str(path)))
    for name in ("FILE", "..."):  # documents write these for "a config of yours"
        shutil.copy(folder / "configs" / "coco_stuff.py", folder / name)
    (folder / "toyworld").mkdir()
    for path in (ROOT / "toyworld").iterdir():
        if path.name != "__main__.py":
            (folder / "toyworld" / path.name).symlink_to(path)
    main = _TOYWORLD.format(file=str(ROOT / "toyworld" / "__main__.py"))
    (folder / "toyworld" / "__main__.py").write_text(main)


def _hub(cache: Path) -> None:
    """A cache of the Hugging Face hub with the models that configs/ name."""

    def snapshot(source: str) -> Path:
        repository = cache / f"models--{source.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        return repository / "snapshots" / ("0" * 40)

    for name, patch in {"base-patch16": 16, "large-patch14": 14}.items():
        source = f"openai/clip-vit-{name}"
        models.save_clip(snapshot(source), depth=1, image=224, patch=patch)
    for size in ("base", "large"):
        models.save_dinov2(snapshot(f"facebook/dinov2-{size}"), width=32, depth=1, image=112)


def _images(folder: Path) -> None:
    from toyworld import scenes

    scenes.write_folder(folder / "annotated", "test", 2)
    (folder / "photos").mkdir()
    (folder / "data" / "coco" / "train2017").mkdir(parents=True)
    for i in range(4):
        image = Image.fromarray(scenes.scene(i).image)
        image.save(folder / "photos" / f"{i}.jpg")
        image.save(folder / "data" / "coco" / "train2017" / f"{i:012}.jpg")
    shutil.copy(folder / "photos" / "0.jpg", folder / "photo.jpg")
    (folder / "words.txt").write_text("water;lake;river;sea\nsky\ntrees\ngrass\n")


def _benchmarks(data: Path) -> None:
    """An image of each set of the paper's Table 1."""
    from test_benchmarks import laid_out

    laid_out(data, "voc", "voc21")
    laid_out(data, "context", "context59")
    laid_out(data, "ade", "ade150")
    laid_out(data, "cityscapes by ids", "cityscapes")
    laid_out(data, "stuff-thing maps", "coco_stuff171")
