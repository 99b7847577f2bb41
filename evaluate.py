"""Program: trained aligners, CLIP and stage 1 against ground truth: tables, JSON, pictures.

    python evaluate.py --config=configs/toy.py --workdir=work/toy
    python evaluate.py --config=FILE --workdir=DIR --benchmarks=voc21,ade150 [--model=EXPORT]

Scores, on the annotated folder `eval.folder`, or on published benchmarks that lie in `eval.data`,
whatever is there of:

    WORKDIR/export                    the aligner (or --model)
    WORKDIR/oracle/export             an aligner trained on the ground truth, the ceiling
    WORKDIR/predictions/NAME/...      stage 1 (python -m labelling --predict)
    --clip_windows                    CLIP's own patches, nothing trained
    --predictions=DIR                 label maps of any other system, a PNG for each image

and writes, in WORKDIR/evaluation, NAME.json, pictures in NAME/, and results.md for all of them. Run
again to continue. --check looks only whether the benchmarks are as they should be.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags
from PIL import Image

from fmbseg_jax import checkpoint, evaluation, figures, program, report, sharding, workfolder
from fmbseg_jax.classes import of_benchmark
from fmbseg_jax.config import Config
from fmbseg_jax.data.benchmarks import Benchmark, check, open_folder, open_published
from fmbseg_jax.data.images import write_atomically
from fmbseg_jax.errors import UserError
from fmbseg_jax.segmenter import Segmenter, clip_patches, load
from fmbseg_jax.vocabulary import IGNORE

Results = dict[str, list[evaluation.Result]]
_EVENLY, _EXTREME = 10, 3  # images in the pictures: at even distances; of the best and the worst


def evaluate(
    config: Config,
    workdir: Path,
    benchmarks: Sequence[Benchmark],
    model: Path,
    *,
    with_clip: bool = False,
    predictions: Path | None = None,
) -> dict[str, Results]:
    """Scores everything on every benchmark, and writes what was found.

    Args:
      model: an exported aligner.
      with_clip: CLIP's own patches too.
      predictions: label maps of another system, in a folder for each benchmark or without.

    Returns:
      By benchmark, by what was scored, its result and perhaps a second one with PAMR.
    """
    trained = checkpoint.read_model(model)
    segmenters = {"aligner": load(model, config.eval)}
    if (workdir / "oracle" / "export").exists():
        segmenters["oracle"] = load(workdir / "oracle" / "export", config.eval)
    if with_clip:
        segmenters["clip_windows"] = clip_patches(trained["clip"]["source"], config.eval)
    found = {one.name: _score(config, workdir, one, segmenters, predictions) for one in benchmarks}
    if jax.process_index() == 0:
        folder = workdir / "evaluation"
        for benchmark in benchmarks:
            results = found[benchmark.name]
            facts = {
                "segmenters": {name: one.fingerprint for name, one in segmenters.items()},
                **{name: trained[name] for name in ("vision", "clip", "aligner")},
            }
            report.write_json(folder / f"{benchmark.name}.json", benchmark, results, config, facts)
            _draw(config, workdir, benchmark, segmenters["aligner"], results)
        table = [row for one in benchmarks for row in report.rows(one, found[one.name])]
        notes = "\n".join(report.notes(config.eval, benchmarks))
        text = f"{report.as_markdown(table)}\n\n{notes}\n"
        write_atomically(folder / "results.md", text.encode())
        print(f"\n{report.as_text(table)}\n\n{notes}\n")
        compiled = sum(segmenter.compiled for segmenter in segmenters.values())
        print(f"Programs compiled, each for one shape: {compiled}.")
        print(
            f"Written to {folder}: results.md; for each benchmark NAME.json, NAME/ with pictures."
        )
    return found


def _score(
    config: Config,
    workdir: Path,
    benchmark: Benchmark,
    segmenters: dict[str, Segmenter],
    predictions: Path | None,
) -> Results:
    """By what is scored on one benchmark, its results."""
    classes, results = of_benchmark(config.eval, benchmark), {}
    saved = workdir / "predictions" / benchmark.name
    if (saved / "manifest.json").exists():
        facts = {"images": str(benchmark.root.resolve()), "words": list(classes.words)}
        advice = "Run `python -m labelling --predict` for this benchmark in another --workdir."
        workfolder.remember(saved / "manifest.json", facts, advice)
    counts = workdir / "evaluation" / "counts" / benchmark.name
    for name in report.TITLES:
        if name in segmenters:
            results[name] = evaluation.segment(segmenters[name], benchmark, classes, counts, name)
        elif (saved / name).is_dir():
            results[name] = [evaluation.score_folder(benchmark, saved / name)]
    if predictions:
        own = predictions / benchmark.name
        folder = own if own.is_dir() else predictions
        results[predictions.resolve().name] = [evaluation.score_folder(benchmark, folder)]
    return results


def _draw(
    config: Config, workdir: Path, benchmark: Benchmark, segmenter: Segmenter, results: Results
) -> None:
    """Pictures of one benchmark: examples, the aligner's best and worst, its confusion matrix."""
    result = results["aligner"][-1]
    evenly = report.at_even_distances(list(result.by_image), _EVENLY)
    extremes = report.best_and_worst(result.by_image, _EXTREME)
    shown = list(dict.fromkeys([*evenly, *extremes]))
    prepared = ((name, segmenter.prepare(benchmark.image(name))) for name in shown)
    classes = of_benchmark(config.eval, benchmark)
    segmented = {
        one.key: one.labels if one.refined is None else one.refined
        for one in segmenter.label_maps(prepared, classes)
    }
    labelled = workdir / "predictions" / benchmark.name / "stage1"
    columns = {"ground truth": {name: benchmark.labels(name) for name in shown}}
    if labelled.is_dir():
        columns["pseudo label"] = {
            name: evaluation.read_prediction(labelled, name, len(benchmark.words)) for name in shown
        }
    columns["segmentation"] = segmented
    folder = workdir / "evaluation" / benchmark.name
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{benchmark.title}: mIoU {100 * result.miou:.1f} on {result.images:,} images"
    pictures = {
        "contact_sheet": _sheet(benchmark, columns, dict.fromkeys(evenly, ""), title, 2),
        "best_and_worst": _sheet(benchmark, columns, extremes, title, 1),
        "confusion": report.confusion_map(result, benchmark.words),
    }
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{name}.png")


def _sheet(
    benchmark: Benchmark,
    columns: dict[str, dict[str, np.ndarray]],
    captions: dict[str, str],
    title: str,
    across: int,
) -> np.ndarray:
    """uint8 [h, w, 3]: the images that have a caption, `across` of them in a row."""
    words = len(benchmark.words)
    groups = [
        [benchmark.image(name), *(figures.colourise(one[name], words) for one in columns.values())]
        for name in captions
    ]
    maps = [one[name] for one in columns.values() for name in captions]
    present = np.unique(np.concatenate([np.unique(labels) for labels in maps]))
    return figures.contact_sheet(
        ["image", *columns] * min(across, len(groups)),
        [sum(groups[i : i + across], []) for i in range(0, len(groups), across)],
        benchmark.words,
        title=title,
        captions=list(captions.values()),
        tile=160,
        present=[int(i) for i in present if i != IGNORE],
        unlabelled=IGNORE in present,
    )


def _open(config: Config, names: Sequence[str]) -> list[Benchmark]:
    """The published benchmarks of these names, or the annotated folder of the config."""
    if names:
        return [open_published(name, config.eval.data) for name in dict.fromkeys(names)]
    if not config.eval.folder:
        raise UserError(
            "Give what to evaluate on: an annotated folder, --config.eval.folder=DIR, or published "
            "benchmarks, --benchmarks=voc21,ade150."
        )
    return [open_folder(config.eval.folder)]


def main() -> None:
    sharding.start_hosts(*(flag.value for flag in HOSTS))
    config = CONFIG.value
    benchmarks = _open(config, BENCHMARKS.value)
    if CHECK.value:
        report.print_checks([check(benchmark) for benchmark in benchmarks])
        return
    if not WORKDIR.value:
        raise UserError("Flag --workdir is missing: the folder of the experiment.")
    workdir = Path(workfolder.make(workfolder.local(WORKDIR.value)))
    model = Path(MODEL.value or workdir / "export")
    predictions = Path(PREDICTIONS.value) if PREDICTIONS.value else None
    with sharding.hold(workdir / "evaluation"):
        evaluate(config, workdir, benchmarks, model, with_clip=CLIP.value, predictions=predictions)
        sharding.wait_for_all("evaluation")


if __name__ == "__main__":
    CONFIG, WORKDIR = program.define_config(workdir_required=False)
    MODEL = flags.DEFINE_string("model", "", "Exported aligner; WORKDIR/export if not given.")
    BENCHMARKS = flags.DEFINE_list("benchmarks", [], "Published benchmarks: voc21,ade150,...")
    PREDICTIONS = flags.DEFINE_string("predictions", "", "Label maps of another system to score.")
    CLIP = flags.DEFINE_bool("clip_windows", False, "Score CLIP's own patches too.")
    CHECK = flags.DEFINE_bool("check", False, "Look only whether the benchmarks are complete.")
    HOSTS = program.define_hosts()
    program.run(main)
