"""The paper's Table 2 on the toy world: three aligners, three losses; and stage 1 beside them.

    python benchmarks/ablation.py --work=work/ablation [--seeds=3] [--split=test]

Each seed has its own scenes, to label and to score on, and the aligner starts from other
parameters; the first seed is `make demo`. Prints mean and standard deviation over the seeds.
Choices are made with --split=validation. What is there stays: run again to continue.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from absl import flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs import toy  # noqa: E402
from fmbseg_jax.data import label_maps  # noqa: E402
from fmbseg_jax.data.example import decode_pseudo_label  # noqa: E402
from fmbseg_jax.data.tfrecord import RecordSource, find_shards  # noqa: E402
from fmbseg_jax.datasets.folder import open_folder
from fmbseg_jax.evaluation import scoring
from fmbseg_jax.evaluation.report import TITLES
from fmbseg_jax.runs import program, workfolder
from fmbseg_jax.sharing.loading import load
from fmbseg_jax.train import CHECKPOINTS, train  # noqa: E402
from fmbseg_jax.vocabulary.classes import Classes
from toyworld import scenes  # noqa: E402

LABELLED, UNSEEN = 160, 60

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


class Seed:
    """One seed's folder: its scenes, its pseudo labels and features, and the runs upon them."""

    def __init__(self, work: Path, seed: int, split: str):
        self._root, self._seed = work / f"seed{seed}", seed
        self._scenes = scenes.write_folder(self._root / "train", "train", LABELLED, seed * LABELLED)
        self._unseen = open_folder(
            scenes.write_folder(self._root / split, split, UNSEEN, seed * UNSEEN)
        )
        self._workdir, self._truth = self._root / "labelled", self._root / "truth"
        annotated = f"--config.data.annotations={self._scenes / 'labels'}"
        for folder, more in ((self._workdir, ()), (self._truth, (annotated,))):
            self._run("labelling", folder, *more)
            self._run("fmbseg_jax.features", folder, *more)
        self._stage1 = self._root / f"stage1-{split}"
        self._run("labelling", self._stage1, "--predict")

    def _run(self, module: str, workdir: Path, *more: str) -> None:
        """Runs a program of the toy config on this seed's scenes, as a user would."""
        fields = {
            "data.images": self._scenes / "images",
            "data.words": self._scenes / "words.txt",
            "eval.folder": self._unseen.root,
        }
        settings = [f"--config.{name}={value}" for name, value in fields.items()]
        command = [sys.executable, "-m", module, "--config=configs/toy.py", *settings]
        subprocess.run([*command, f"--workdir={workdir}", *more], check=True)

    def stage1(self, name: str) -> float:
        """mIoU of stage 1 as a segmenter of the unseen scenes."""
        predictions = self._stage1 / "predictions" / self._unseen.name / name
        return scoring.score_folder(self._unseen, predictions).miou

    def labels_trained_on(self) -> float:
        """mIoU of the pseudo labels themselves, on the scenes that the aligner is trained on."""
        records = RecordSource(find_shards(self._workdir / "pseudo_labels"))
        folder = self._root / "labels"
        for record in map(records.__getitem__, range(len(records))):
            label = decode_pseudo_label(record)
            path = label_maps.path(folder, label.filename)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(label_maps.encode(label.labels))
        return scoring.score_folder(open_folder(self._scenes), folder).miou

    def aligner(self, name: str, changes: dict[str, object], truth: bool = False) -> float:
        """mIoU of the aligner that the toy config, so changed, trains."""
        config = toy.get_config()
        config.seed = self._seed
        for field, value in changes.items():
            setattr(config.train, field, value)
        source = self._truth if truth else self._workdir
        workdir = source / "".join(c if c.isalnum() else "_" for c in name)
        workfolder.claim(workdir, config, ("seed", "models.clip", "train"), CHECKPOINTS)
        if not (workdir / "features").exists():
            (workdir / "features").symlink_to((source / "features").resolve())
        if not (workdir / "export").exists():
            train(config, workdir)
        segmenter = load(workdir / "export", config.eval)
        counts, classes = workdir / f"counts-{self._unseen.name}", Classes.of(self._unseen.words)
        return scoring.segment(segmenter, self._unseen, classes, counts, "aligner")[0].miou


def main() -> None:
    rows: dict[str, list[float]] = {}
    for number in range(SEEDS.value):
        seed = Seed(Path(WORK.value), number, SPLIT.value)
        found = {TITLES[name]: seed.stage1(name) for name in STAGE1}
        found["the pseudo labels trained on"] = seed.labels_trained_on()
        for name, changes in VARIANTS.items():
            found[name] = seed.aligner(name, changes)
        found[TITLES["oracle"]] = seed.aligner("ceiling", {}, truth=True)
        for name, value in found.items():
            rows.setdefault(name, []).append(100 * value)
        print_table(rows, number + 1)


def print_table(rows: dict[str, list[float]], seeds: int) -> None:
    """Markdown; the deviation is that of the population of seeds."""
    print(f"\n| mIoU, {UNSEEN} {SPLIT.value} scenes a seed, {seeds} seeds | mean | deviation |")
    print("|---|---|---|")
    for name, values in rows.items():
        print(f"| {name} | {np.mean(values):.2f} | {np.std(values):.2f} |")


if __name__ == "__main__":
    WORK = flags.DEFINE_string("work", "work/ablation", "Where the runs go.")
    SEEDS = flags.DEFINE_integer("seeds", 3, "How many seeds.")
    SPLIT = flags.DEFINE_enum("split", "test", ["test", "validation"], "Scenes to score on.")
    program.run(main)
