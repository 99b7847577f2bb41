"""Program: trained aligners, CLIP and stage 1 against ground truth: tables, JSON, pictures.

    fmbseg evaluate --config=configs/toy.py --workdir=work/toy
    python evaluate.py --config=FILE --workdir=DIR --benchmarks=voc21,ade150 [--model=EXPORT]

Reads the annotated folder `eval.folder` (images/, labels/, words.txt), or published benchmarks that
lie in `eval.data`, and scores on them whatever is there of:

    WORKDIR/export                    the aligner (or --model)
    WORKDIR/oracle/export             an aligner trained on the ground truth, the ceiling
    WORKDIR/predictions/NAME/...      stage 1 (fmbseg label --predict)
    --clip_windows                    CLIP's own patches, nothing trained
    --predictions=DIR                 label maps of any other system, a PNG for each image

It writes, in WORKDIR/evaluation, NAME.json, pictures in NAME/, and results.md for all of them. Run
again to continue. --check looks only whether the benchmarks are as they should be.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from fmbseg_jax.config import Config
from fmbseg_jax.data import label_maps
from fmbseg_jax.datasets.completeness import check
from fmbseg_jax.datasets.folder import Benchmark, open_folder, open_published
from fmbseg_jax.datasets.published import PUBLISHED
from fmbseg_jax.errors import UserError
from fmbseg_jax.evaluation import pictures, report
from fmbseg_jax.evaluation.protocol import of_benchmark
from fmbseg_jax.evaluation.scoring import Result
from fmbseg_jax.evaluation.systems import Model, Saved, System
from fmbseg_jax.io.replacing import moved_aside
from fmbseg_jax.parallel import agreement, hosts
from fmbseg_jax.runs import program, workfolder
from fmbseg_jax.segmentation.segmenter import compiled


def evaluate(
    config: Config, workdir: Path, benchmark: Benchmark, systems: Sequence[System]
) -> dict[str, list[Result]]:
    """Scores every system on a benchmark, and writes what was found.

    Returns:
      By name of the system, its result and perhaps a second one with PAMR.
    """
    classes, folder = of_benchmark(config.eval, benchmark), workdir / "evaluation"
    counts = folder / "counts" / benchmark.name
    results = {system.name: system.score(benchmark, classes, counts) for system in systems}

    def write() -> None:
        facts = {system.name: system.facts for system in systems}
        report.write_json(folder, benchmark, results, config, facts)
        report.write_markdown(folder)
        print(f"Drawing {benchmark.name} ...")
        pictures.draw(folder / benchmark.name, benchmark, classes, systems, results)

    agreement.by_the_first(write)
    return results


def show(config: Config, workdir: Path, benchmarks: Sequence[Benchmark]) -> None:
    """Prints the table of these benchmarks."""
    folder = workdir / "evaluation"
    table = [row for benchmark in benchmarks for row in report.rows(folder, benchmark.name)]
    notes = "\n".join(
        [
            *report.notes(config.eval, benchmarks),
            *report.truths(folder, [one.name for one in benchmarks]),
        ]
    )
    print(f"\n{report.as_text(table)}\n\n{notes}\n")
    print(f"Written to {folder}: results.md, and for each benchmark NAME.json and pictures.")


def _open(config: Config, names: Sequence[str]) -> list[Benchmark]:
    """The published benchmarks of these names, or the annotated folder of the config."""
    if unknown := [name for name in names if name not in PUBLISHED]:
        raise UserError(f"No benchmark {', '.join(unknown)}. There are: {', '.join(PUBLISHED)}.")
    if not names and not config.eval.folder:
        raise UserError(
            "Give what to evaluate on: an annotated folder, --config.eval.folder=DIR, or published "
            "benchmarks, --benchmarks=voc21,ade150."
        )
    if not names:
        return [open_folder(config.eval.folder, config.eval.reading)]
    found, faults = [], []
    for name in dict.fromkeys(names):
        try:
            found.append(open_published(name, config.eval.data, config.eval.reading))
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("\n\n".join(faults))
    return found


def _models(config: Config, workdir: Path, model: str, with_clip: bool) -> list[Model]:
    """Those that are there."""
    exports = {"aligner": Path(model or workdir / "export"), "oracle": workdir / "oracle/export"}
    found = [
        Model.exported(name, export, config.eval)
        for name, export in exports.items()
        if export.exists() or moved_aside(export).exists() or (model and name == "aligner")
    ]
    if with_clip:
        found.append(Model.clip("clip_windows", config.models.clip, config.eval))
    return found


def _stage1(config: Config, workdir: Path, benchmark: Benchmark) -> list[Saved]:
    """Label maps of stage 1, as far as they are there; they have to be of this benchmark."""
    saved = workdir / "predictions" / benchmark.name
    if (saved / "manifest.json").exists():
        words = list(of_benchmark(config.eval, benchmark).words)
        facts = {"images": str(benchmark.root.resolve()), "words": words}
        advice = "Run `python -m labelling --predict` for this benchmark in another --workdir."
        workfolder.remember(saved / "manifest.json", facts, advice)
    return [Saved(name, saved / name) for name in report.TITLES if (saved / name).is_dir()]


def _theirs(folder: str, benchmark: Benchmark, alone: bool) -> list[Saved]:
    """What --predictions has for a benchmark, all of it; `alone` it needs no folder of its own."""
    if not folder:
        return []
    root, own = Path(folder), Path(folder) / benchmark.name
    theirs = Saved(root.resolve().name, root if alone and not own.is_dir() else own)
    if theirs.name in report.TITLES:
        raise UserError(
            f"--predictions={folder} has a name that our own results have; rename the folder to "
            "what the system is called."
        )
    paths = [label_maps.find(theirs.folder, name) for name in benchmark.names]
    if missing := [path for path in paths if not path.exists()]:
        raise UserError(
            f"--predictions={folder} lacks {len(missing)} of {len(paths)} label maps for "
            f"{benchmark.name}, such as {missing[0]}. They are {own}/NAME.png"
            + (f", or {root}/NAME.png." if alone else ".")
        )
    return [theirs]


def _systems(
    config: Config, workdir: Path, benchmarks: Sequence[Benchmark]
) -> dict[str, list[System]]:
    """By benchmark, what is scored on it, in the order of the tables."""
    saved = {
        one.name: [
            *_stage1(config, workdir, one),
            *_theirs(PREDICTIONS.value, one, alone=len(benchmarks) == 1),
        ]
        for one in benchmarks
    }
    models = _models(config, workdir, MODEL.value, CLIP.value)
    for name, some in saved.items():
        if not some and not models:
            raise UserError(
                f"Nothing to score on {name}: no aligner in {workdir / 'export'}, no label maps in "
                f"{workdir / 'predictions' / name}. Train one, or give --model, --clip_windows or "
                "--predictions."
            )
    order = {name: i for i, name in enumerate(report.TITLES)}
    return {
        name: sorted([*models, *some], key=lambda system: order.get(system.name, len(order)))
        for name, some in saved.items()
    }


def main() -> None:
    hosts.start_hosts(*(flag.value for flag in HOSTS))
    config = CONFIG.value
    benchmarks = _open(config, BENCHMARKS.value)
    if CHECK.value:
        report.print_checks([check(benchmark) for benchmark in benchmarks])
        return
    if not WORKDIR.value:
        raise UserError("Flag --workdir is missing: the folder of the experiment.")
    workdir = Path(workfolder.make(workfolder.local(WORKDIR.value)))
    with agreement.hold(workdir / "evaluation"):
        systems = _systems(config, workdir, benchmarks)
        for benchmark in benchmarks:
            evaluate(config, workdir, benchmark, systems[benchmark.name])
        if jax.process_index() == 0:
            show(config, workdir, benchmarks)
            scored = itertools.chain(*systems.values())
            segmenters = {one.segmenter for one in scored if isinstance(one, Model)}
            print(f"XLA programs compiled, one for each shape and device: {compiled(segmenters)}.")


if __name__ == "__main__":
    CONFIG, WORKDIR = program.define_config(workdir_required=False)
    MODEL = flags.DEFINE_string("model", "", "Exported aligner; WORKDIR/export if not given.")
    BENCHMARKS = flags.DEFINE_list("benchmarks", [], ", ".join(PUBLISHED))
    PREDICTIONS = flags.DEFINE_string("predictions", "", "Label maps of another system to score.")
    CLIP = flags.DEFINE_bool("clip_windows", False, "Score config.models.clip's own patches too.")
    CHECK = flags.DEFINE_bool("check", False, "Look only whether the benchmarks are complete.")
    HOSTS = program.define_hosts()
    program.run(main)
