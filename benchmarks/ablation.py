"""The paper's Table 2 on the toy world: three aligners, three losses; and stage 1 beside them.

    python benchmarks/ablation.py --work=work/ablation [--seeds=3] [--split=test]

For each seed other scenes are labelled, and the aligner starts from other parameters. Prints the
mean and the standard deviation over the seeds, in mIoU on the scenes of the split. Choices are made
with --split=validation. What is there stays: run again to continue.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from absl import flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs import toy  # noqa: E402
from evaluate import TITLES  # noqa: E402
from fmbseg_jax import evaluation, program  # noqa: E402
from fmbseg_jax.config import Config  # noqa: E402
from fmbseg_jax.data.benchmarks import Folder  # noqa: E402
from fmbseg_jax.segmenter import Segmenter  # noqa: E402
from toyworld import scenes  # noqa: E402
from train import train  # noqa: E402

LABELLED, UNSEEN = 160, 160

VARIANTS: dict[str, dict[str, object]] = {
    "MLP, TSupCon (the toy's default)": {},
    "linear": {"aligner": "linear"},
    "transformer block": {"aligner": "block"},
    "SupCon": {"loss": "supcon"},
    "prototype": {"loss": "prototype"},
    "TSupCon, sums not balanced, as printed": {"balanced": False},
    "TSupCon, temperature 1, as printed": {"temperature": 1.0},
    "TSupCon, both as printed": {"balanced": False, "temperature": 1.0},
}
STAGE1 = ("clip_patches", "stage1_1", "stage1_2", "stage1")


def configured(seed: int, images: Path, unseen: Path) -> Config:
    """The toy config on this seed's scenes."""
    config = toy.get_config()
    config.seed = seed
    config.data.images = str(images / "images")
    config.data.words = str(images / "words.txt")
    config.eval.folder = str(unseen)
    return config


def run(module: str, config: Config, workdir: Path, *more: str) -> None:
    """Runs a program of the toy config with this config's data, as a user would."""
    data = ("data.images", "data.words", "eval.folder")
    fields = {name: _get(config, name) for name in data}
    subprocess.run(
        [
            sys.executable, "-m", module, "--config=configs/toy.py", f"--workdir={workdir}",
            *(f"--config.{name}={value}" for name, value in fields.items()), *more,
        ],
        check=True,
    )  # fmt: skip


def _get(config: Config, name: str) -> object:
    section, field = name.split(".")
    return getattr(getattr(config, section), field)


def prepare(seed: int, work: Path, split: str) -> tuple[Config, Path]:
    """Scenes, pseudo labels and features of one seed, and those of the truth."""
    unseen = scenes.write_folder(work / split, split, UNSEEN)
    images = scenes.write_folder(work / f"scenes{seed}", "train", LABELLED, seed * LABELLED)
    config, workdir = configured(seed, images, unseen), work / f"seed{seed}"
    truth = f"--config.data.annotations={images / 'labels'}"
    for folder, more in ((workdir, ()), (workdir / "oracle", (truth,))):
        run("labelling", config, folder, *more)
        run("fmbseg_jax.features", config, folder, *more)
    if not (work / split / "predictions").exists():
        run("labelling", config, workdir, "--predict")
        (workdir / "predictions").rename(work / split / "predictions")
    return config, workdir


def score(config: Config, workdir: Path, unseen: Folder, features: Path) -> float:
    """mIoU of the aligner that this config trains; from `score.json` where it is there."""
    path = workdir / f"score-{Path(config.eval.folder).name}.json"
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        if not (workdir / "features").exists():
            (workdir / "features").symlink_to(features.resolve())
        if not (workdir / "export").exists():
            train(config, workdir)
        segmenter = Segmenter(workdir / "export", config.eval)
        folder = workdir / f"predictions-{Path(config.eval.folder).name}"
        evaluation.segment_folder(segmenter, unseen, folder, "evaluate")
        path.write_text(json.dumps({"miou": evaluation.score_folder(unseen, folder).miou}))
    return json.loads(path.read_text())["miou"]


def main() -> None:
    work, split = Path(WORK.value), SPLIT.value
    rows: dict[str, list[float]] = {}
    for seed in range(SEEDS.value):
        config, workdir = prepare(seed, work, split)
        unseen = Folder.open(work / split)
        for name in STAGE1 if seed == 0 else ():
            result = evaluation.score_folder(unseen, work / split / "predictions" / name)
            rows[TITLES[name]] = [result.miou]
        for name, changes in VARIANTS.items():
            for field, value in changes.items():
                setattr(config.train, field, value)
            folder = workdir / "".join(c if c.isalnum() else "_" for c in name)
            rows.setdefault(name, []).append(score(config, folder, unseen, workdir / "features"))
            config.train = toy.get_config().train
        oracle = workdir / "oracle" / "features"
        truth = score(config, workdir / "oracle" / "block", unseen, oracle)
        rows.setdefault(TITLES["oracle"], []).append(truth)
    print(f"\n| mIoU on {UNSEEN} {split} scenes | mean of {SEEDS.value} seeds | deviation |")
    print("|---|---|---|")
    for name, values in rows.items():
        deviation = f"{100 * np.std(values):.2f}" if len(values) > 1 else ""
        print(f"| {name} | {100 * np.mean(values):.2f} | {deviation} |")


if __name__ == "__main__":
    WORK = flags.DEFINE_string("work", "work/ablation", "Where the runs go.")
    SEEDS = flags.DEFINE_integer("seeds", 3, "How many seeds.")
    SPLIT = flags.DEFINE_enum("split", "test", ["test", "validation"], "Scenes to score on.")
    program.run(main)
