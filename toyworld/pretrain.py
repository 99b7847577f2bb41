"""Trains the toy world's three tiny foundation models and writes them as the real ones come.

    python -m toyworld.pretrain [--models=clip,dinov2,sam] [--out=toyworld/weights] [--device=cuda]

Reads nothing, as all scenes are drawn; writes, in OUT, each model, `scores.json` and `README.md`,
the card, from what was measured. Each model trains in a process of its own, as many at once as fit
the processors. A killed run is run again and goes on from its last checkpoint in `OUT.work`, which
is removed at the end.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fmbseg_jax.io.files import write_atomically
from fmbseg_jax.runs.workfolder import remember
from toyworld.corpus import corpus
from toyworld.scenes import WORDS
from toyworld.scores import SCORES

MODELS = ("sam", "dinov2", "clip")
"""In the order of starting: what takes longest first."""
SCENES = 4000
SPACE = 8_000_000
"""Bytes that the weights may take."""


def train_one(name: str, out: Path, work: Path, flags: argparse.Namespace) -> None:
    """Trains, publishes and scores one model; its report lies in `work` when all is done."""
    report = work / f"{name}.json"
    if report.exists():
        return
    model = importlib.import_module(f"toyworld.{name}")
    data = corpus("pretrain", flags.scenes, work)
    steps = flags.steps or model.STEPS
    *trained, spent = model.train(
        work, data, seed=flags.seed, device=flags.device, steps=steps, batch=model.BATCH
    )
    model.save(_fresh(work / "saved" / name), *trained)
    publish(work / "saved" / name, out)
    scores = SCORES[name](*trained, count=flags.validation)
    found = {"seed": flags.seed, "steps": steps, "batch": model.BATCH, **spent}
    found |= {"hardware": _hardware(flags.device), "scores": scores}
    write_atomically(report, json.dumps(found).encode())


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def publish(source: Path, out: Path) -> None:
    """Moves the files under `source` to `out`, each replacing its predecessor at once."""
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        target = out / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)


def train_all(names: list[str], flags: argparse.Namespace, processors: int) -> None:
    """One child process for each model, `processors` at a time, the threads shared out evenly."""
    at_once = 1 if flags.device != "cpu" else min(processors, len(names))

    def child(name: str) -> None:
        command = [sys.executable, "-m", "toyworld.pretrain", f"--models={name}", "--child"]
        same = ("out", "seed", "device", "steps", "scenes", "validation")
        command += [f"--{key}={getattr(flags, key)}" for key in same]
        command += [f"--threads={max(1, processors // at_once)}", f"--bar={names.index(name)}"]
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(child, names))


def card(reports: dict[str, dict], flags: argparse.Namespace, size: int) -> str:
    """The model card, from what was measured."""
    made = "\n".join(
        f"| {name} | {r['seed']} | {r['steps']:,} | {r['batch']} | {r['seconds'] / 60:.0f} min "
        f"| {r['processor_seconds'] / 60:.0f} min | {r['hardware']} |"
        for name, r in reports.items()
    )
    scored = "\n".join(
        f"| {name} | {what} | {value:.3f} |"
        for name, r in reports.items()
        for what, value in r["scores"].items()
    )
    text = (Path(__file__).parent / "card.md").read_text()
    return text.format(
        words=len(WORDS),
        scenes=f"{flags.scenes:,}",
        validation=flags.validation,
        probed=2 * flags.validation,
        made=made,
        scored=scored,
        size=f"{size / 1e6:.1f}",
    )


def summarise(work: Path, flags: argparse.Namespace) -> None:
    """Prints the new scores, adds them to `scores.json`, and writes the card."""
    path = flags.out / "scores.json"
    reports = json.loads(path.read_text()) if path.exists() else {}
    for file in sorted(work / f"{name}.json" for name in MODELS):
        if not file.exists():
            continue
        reports[file.stem] = json.loads(file.read_text())
        for what, value in reports[file.stem]["scores"].items():
            print(f"{file.stem:8} {what:55} {value:.3f}")
    files = [file for file in flags.out.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    assert size < SPACE, f"the weights take {size:,} bytes"
    write_atomically(path, json.dumps(reports, indent=2).encode())
    write_atomically(flags.out / "README.md", card(reports, flags, size).encode())


def _hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} of {os.cpu_count()} CPU cores"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--out", type=Path, default=Path("toyworld/weights"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=0, help="0: what each model's file says")
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--validation", type=int, default=100, help="scenes to score on")
    parser.add_argument("--threads", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--bar", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    names = [name for name in MODELS if name in flags.models.split(",")]
    if unknown := set(flags.models.split(",")) - set(MODELS):
        parser.error(f"--models takes {', '.join(MODELS)}; got {', '.join(sorted(unknown))}")
    work = flags.out.with_name(flags.out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    if flags.child:
        torch.set_num_threads(flags.threads)
        os.environ["TOYWORLD_BAR"] = str(flags.bar)
        train_one(names[0], flags.out, work, flags)
        return
    made_from = {"seed": flags.seed, "scenes": flags.scenes, "steps": flags.steps}
    remember(work / "made_from.json", made_from, "Delete that folder to begin anew.")
    processors = len(os.sched_getaffinity(0))
    corpus("pretrain", flags.scenes, work)
    train_all(names, flags, processors)
    summarise(work, flags)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
