"""Eight CPU devices, shape annotations that are checked while the tests run, and a small world."""

import atexit
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


def _folder(prefix: str) -> str:
    """A folder for this process, which goes with it."""
    folder, maker = tempfile.mkdtemp(prefix=prefix), os.getpid()
    # Not with a fork of it.
    atexit.register(lambda: os.getpid() == maker and shutil.rmtree(folder, ignore_errors=True))
    return folder


os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "network" not in sys.argv and "PYTEST_XDIST_WORKER" not in os.environ:  # not pytest -m network
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
# As many workers as cores: threads that wait for each other, spinning, would double the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What one test or program has compiled, another need not; both pytest workers share it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _folder("fmbseg_compiled_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["FMBSEG_CACHE"] = _folder("fmbseg_cache_")

# Ctrl-C is tested; where the tests run in the background, it is ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
import zygote  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

_PURE = [
    "nn.transformer",
    "nn.positions",
    "encoders.vision",
    "encoders.text",
    "encoders.clip",
    "nn.aligner",
    "nn.similarity",
]
_PURE += ["parallel.ring", "losses.logsumexp", "losses.logsumexp_by_row", "losses.contrastive"]
_PURE += ["segmentation.layout", "evaluation.metrics"]
_hook = install_import_hook([f"fmbseg_jax.{name}" for name in _PURE], "beartype.beartype")
_hook.__enter__()  # for the whole run

ROOT = Path(__file__).resolve().parent.parent


class World:
    """Random models in published formats, a few scenes, and flags that name them."""

    def __init__(self, root: Path):
        import models

        self.root = root
        models.save_dinov2(root / "dinov2", width=48, image=70, patch=14)
        models.save_clip(root / "clip")

    @property
    def flags(self) -> list[str]:
        """For any program with a config."""
        fields = {
            "models.clip": self.root / "clip",
            "models.vision": self.root / "dinov2",
            "label.images_per_shard": 4,
            "features.size": 70,
            "features.batch_size": 2,
            "train.epochs": 4,
            "train.checkpoint_every": 3,
            "train.log_every": 1,
            "eval.folder": self.root / "test",
            "eval.short_side": 70,
            "eval.window": 70,
            "eval.stride": 35,
        }
        config = [f"--config.{name}={value}" for name, value in fields.items()]
        return [f"--config={ROOT / 'configs' / 'toy.py'}", *config]

    def pseudo_labels(self, workdir: Path, count: int = 10) -> None:
        """Writes WORKDIR/pseudo_labels: scenes with their true labels, in shards of four."""
        from PIL import Image

        from fmbseg_jax.data import example, tfrecord
        from toyworld import scenes

        folder = workdir / "pseudo_labels"
        folder.mkdir(parents=True)
        shards = [range(start, min(start + 4, count)) for start in range(0, count, 4)]
        for index, members in enumerate(shards):
            name = tfrecord.shard_name("pseudo_labels", "train", index, len(shards))
            with tfrecord.ShardWriter(folder / name) as writer:
                for i in members:
                    scene, png = scenes.scene(scenes.SPLITS["train"] + i), io.BytesIO()
                    Image.fromarray(scene.image).save(png, "PNG")
                    record = example.PseudoLabel(png.getvalue(), f"{i}.png", scene.labels)
                    writer.write(example.encode(record))
        sizes, metadata = [len(shard) for shard in shards], {"words": list(scenes.WORDS)}
        example.write_metadata(folder, example.PseudoLabel, sizes, 1, metadata)


_attacks: dict[str, int] = {}


@pytest.fixture(scope="session")
def report():
    """How many attacks there were of each kind, for the end of `make attack`."""
    return _attacks


def pytest_terminal_summary(terminalreporter):
    if os.environ.get("ATTACK"):
        terminalreporter.write_line(f"attacks: {json.dumps(_attacks)}")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def with_features(world, tmp_path_factory):
    """A work folder with pseudo labels and their features."""
    workdir = tmp_path_factory.mktemp("features")
    world.pseudo_labels(workdir)
    run("fmbseg_jax.features", *world.flags, f"--workdir={workdir}")
    return workdir


def program(*arguments) -> list[str]:
    """The command line of a program of ours, as a user would type it."""
    first = [sys.executable, "-m"] if not str(arguments[0]).endswith(".py") else [sys.executable]
    return [*first, *map(str, arguments)]


def start(
    *arguments, fresh: bool = False, stdout=subprocess.PIPE, **environment: str
) -> subprocess.Popen[str]:
    """Starts a program, on one device; its output is text, standard error included.

    Args:
      fresh: in an interpreter of its own, as users do; otherwise by zygote.py, seconds sooner.
    """
    fresh = fresh or not environment.keys() <= zygote.LATE or sys.platform != "linux"
    popen = subprocess.Popen if fresh else zygote.Popen
    return popen(
        program(*arguments), cwd=ROOT, env=os.environ | {"XLA_FLAGS": "", **environment},
        stdout=stdout, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def run(
    *arguments, check: bool = True, fresh: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, as `start` starts it."""
    process = start(*arguments, fresh=fresh, **environment)
    try:
        output, _ = process.communicate(timeout=_LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"It hangs: {process.args}\n{process.communicate()[0]}") from None
    assert not check or process.returncode == 0, output
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def wait_until(holds: Callable[[], bool], process: subprocess.Popen, every=0.002) -> bool:
    """Waits until `holds()`, asked every so many seconds; False if the process ended before."""
    limit = time.monotonic() + _LIMIT
    while process.poll() is None:
        if holds():
            return True
        if time.monotonic() > limit:
            process.kill()
            raise AssertionError(f"It hangs: {process.args}")
        time.sleep(every)
    return False


_LIMIT = 600  # s; what takes so long has stopped for ever


_LONGEST = [  # modules of minutes come first, so that both workers end at about the same time
    "test_docs", "test_labelling_engines", "test_restarts", "test_hosts", "test_toyworld",
    "test_parity", "test_app", "test_export", "test_benchmarks", "test_real_input",
    "test_training", "test_programs", "test_segment", "test_features", "test_package",
    "test_labelling_program", "test_pairs", "test_sliding", "test_segmenter", "test_losses",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    order = {name: i for i, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.module.__name__, len(order)))
