"""The whole chain under attack: killed at any moment, on disks that are full, from label to page.

What is drawn is drawn from a seed. ATTACK=25 makes 25 times as many attacks, and prints how many of
each there were: `make attack`.
"""

import contextlib
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time

import pytest
from conftest import run, start
from labelling_tiny import save_sam
from PIL import Image

from toyworld import scenes

TIMES = int(os.environ.get("ATTACK", "1"))
KILLS, LIMITS = 6, 1
"""Of each program: how often it is killed, and how often its disk is full."""

_HANG = 30  # s beyond what an undisturbed run takes


@dataclasses.dataclass(frozen=True)
class Step:
    """A program of the chain."""

    command: list[str]
    makes: list[str]
    """Folders in the work folder that are its own."""
    seconds: float = 0.0
    """What it takes in peace."""


@pytest.fixture(scope="module")
def place(world, tmp_path_factory):
    """Images, words, truth and models."""
    place = tmp_path_factory.mktemp("chain")
    save_sam(place / "sam.pth")
    for part, split, count in (("train", "train", 6), ("test", "test", 4)):
        for kind in ("images", "labels"):
            (place / part / kind).mkdir(parents=True)
        (place / part / "words.txt").write_text("\n".join(scenes.WORDS))
        for i in range(count):
            scene = scenes.scene(scenes.SPLITS[split] + i)
            Image.fromarray(scene.image).save(place / part / "images" / f"{i}.png")
            Image.fromarray(scene.labels.astype("uint8")).save(place / part / "labels" / f"{i}.png")
    return place


def steps(world, place, workdir):
    """The chain, as a user would type it."""
    fields = {
        "models.sam": place / "sam.pth", "label.sam.points_per_side": 4, "label.sam.pred_iou": 0.0,
        "label.sam.stability": 0.0, "label.images_per_shard": 2, "eval.folder": place / "test",
        "train.checkpoint_every": 5, "train.epochs": 20,
    }  # fmt: skip
    flags = [*world.flags, *(f"--config.{name}={value}" for name, value in fields.items())]
    flags.append(f"--workdir={workdir}")
    words, model = f"{place}/train/words.txt", f"--model={workdir}/export"
    return {
        "label": Step(
            ["labelling", *flags, f"--images={place}/train/images", f"--words={words}"],
            ["pseudo_labels"],
        ),
        "features": Step(["fmbseg_jax.features", *flags], ["features"]),
        "train": Step(["train.py", *flags], ["checkpoints", "metrics", "export"]),
        "export": Step(["fmbseg_jax.export", model, f"--out={workdir}/deployed"], ["deployed"]),
        "predict": Step(
            ["labelling", *flags, f"--words={words}", "--predict"], ["predictions"]
        ),
        "evaluate": Step(["evaluate.py", *flags], ["evaluation"]),
        "segment": Step(
            ["fmbseg_jax.segment", model, f"--images={place}/test/images", f"--words={words}",
             f"--out={workdir}/segmented"],
            ["segmented"],
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def chain(world, place):
    """The programs in their order; run once in peace, which leaves PEACE, and then undone."""
    chain = steps(world, place, place / "work")
    seconds = {}
    for name, step in chain.items():
        begun = time.monotonic()
        run(*step.command)
        seconds[name] = time.monotonic() - begun
    (place / "work").rename(place / "peace")
    return {name: dataclasses.replace(step, seconds=seconds[name]) for name, step in chain.items()}


def contents(folder):
    """By path, what a work folder holds, but for what no two runs have in common.

    That is times, process ids, and the names that Orbax gives to its files, whose values have a
    digest in model.json.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        own = {"checkpoints", "params"} & {*name.parts} or "tfevents" in name.name
        if path.is_dir() or own or name.name == ".lock":
            continue
        value = path.read_bytes()
        if name.name == "model.json":
            value = json.loads(value)
            del value["params"]["files"]
        elif name.name == "train.jsonl":
            lines = map(json.loads, value.splitlines())
            value = [(line["step"], line["loss"], line["accuracy"]) for line in lines]
        elif name.name == "made_from.jsonl":  # in the order in which threads come
            value = {tuple(map(str, json.loads(line))) for line in value.splitlines()}
        found[str(name)] = value
    return found


def test_kills_at_any_moment_change_no_byte(chain, place, report):
    """Every program of the chain is killed again and again, then run to its end."""
    moments, kills = random.Random(0), dict.fromkeys(chain, 0)
    for name, step in chain.items():
        seconds = step.seconds
        while kills[name] < KILLS * TIMES:
            begun, process = time.monotonic(), start(*step.command)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moments.uniform(0, seconds))
            process.kill()
            output = process.communicate()[0]
            assert process.returncode in (-signal.SIGKILL, 0), output
            assert "Traceback" not in output and "error" not in output.lower(), output
            if process.returncode:
                kills[name] += 1
            else:  # it was done: from the start again
                seconds = min(seconds, time.monotonic() - begun)
                for folder in step.makes:
                    shutil.rmtree(place / "work" / folder)
        run(*step.command)
    assert contents(place / "work") == contents(place / "peace")
    assert not list(place.rglob("*.incomplete"))
    report["kill -9"] = sum(kills.values())


@pytest.mark.parametrize("limit", [resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE])
def test_short_of_space_or_of_files(limit, chain, place, report):
    """Whatever a program lacks, it ends with a sentence, and later goes on as if nothing was."""
    shutil.rmtree(place / "work", ignore_errors=True)
    drawn, failed = random.Random(0), 0
    for step in chain.values():
        for _ in range(LIMITS * TIMES):
            process = start(*step.command)
            of_size = limit == resource.RLIMIT_FSIZE
            most = int(2 ** drawn.uniform(3, 15)) if of_size else drawn.randrange(10, 26)
            resource.prlimit(process.pid, limit, (most, most))
            output = process.communicate(timeout=step.seconds + _HANG)[0]
            assert "Traceback" not in output, output
            assert process.returncode == 0 or "error" in output.lower(), output
            failed += process.returncode != 0
        run(*step.command)
    assert failed
    assert contents(place / "work") == contents(place / "peace")
    report[f"runs under RLIMIT {limit}"] = len(chain) * LIMITS * TIMES
