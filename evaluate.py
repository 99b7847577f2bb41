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
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from PIL import Image

from fmbseg_jax import checkpoint, evaluation, figures, program, report, sharding, workfolder
from fmbseg_jax import segmenter as segmenter_lib
from fmbseg_jax.classes import of_benchmark
from fmbseg_jax.config import Config
from fmbseg_jax.data import label_maps
from fmbseg_jax.data.benchmarks import Benchmark, check, open_folder, open_published
from fmbseg_jax.data.published import PUBLISHED
from fmbseg_jax.errors import UserError
from fmbseg_jax.models import weights
from fmbseg_jax.segmenter import Segmenter, clip_patches, load
from fmbseg_jax.vocabulary import IGNORE

Results = dict[str, list[evaluation.Result]]
Segmenters = dict[str, tuple[Segmenter, dict[str, Any]]]
"""By title, a segmenter and the facts of its model."""
_EVENLY, _EXTREME = 10, 3  # images in the pictures: at even distances; of the best and the worst


def evaluate(
    config: Config,
    workdir: Path,
    benchmarks: Sequence[Benchmark],
    segmenters: Segmenters,
    theirs: Theirs | None = None,
) -> dict[str, Results]:
    """Scores everything on every benchmark, and writes what was found.

    Args:
      segmenters: by title (`report.TITLES`), each with its model's facts.
      theirs: label maps of another system.

    Returns:
      By benchmark, by what was scored, its result and perhaps a second one with PAMR.
    """
    folder, found = workdir / "evaluation", {}
    for benchmark in benchmarks:
        found[benchmark.name] = results = _score(config, workdir, benchmark, segmenters, theirs)

        def write(benchmark: Benchmark = benchmark, results: Results = results) -> None:
            models = {name: facts for name, (_, facts) in segmenters.items()}
            report.write_json(folder, benchmark, results, config, models)
            print(f"Drawing {benchmark.name} ...")
            _draw(config, workdir, benchmark, segmenters, results, theirs)

        sharding.by_the_first(write)
    if jax.process_index() == 0:
        notes = "\n".join(report.notes(config.eval, benchmarks))
        table = report.as_text([row for one in benchmarks for row in report.rows(folder, one.name)])
        print(f"\n{table}\n\n{notes}\n")
        report.write_markdown(folder)
        compiled = segmenter_lib.compiled() + sum(one.compiled for one, _ in segmenters.values())
        print(f"XLA programs compiled, one for each shape and device: {compiled}.")
        print(f"Written to {folder}: results.md, and for each benchmark NAME.json and pictures.")
    return found


def _score(
    config: Config,
    workdir: Path,
    benchmark: Benchmark,
    segmenters: Segmenters,
    theirs: Theirs | None,
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
            results[name] = evaluation.segment(
                segmenters[name][0], benchmark, classes, counts, name
            )
        elif (saved / name).is_dir():
            results[name] = [evaluation.score_folder(benchmark, saved / name)]
    if theirs:
        results[theirs.name] = [evaluation.score_folder(benchmark, theirs.folder(benchmark))]
    if not results:
        raise UserError(
            f"Nothing to score on {benchmark.name}: no aligner in {workdir / 'export'}, no label "
            f"maps in {saved}. Train one, or give --model, --clip_windows or --predictions."
        )
    return results


def _draw(
    config: Config,
    workdir: Path,
    benchmark: Benchmark,
    segmenters: Segmenters,
    results: Results,
    theirs: Theirs | None,
) -> None:
    """Pictures of one benchmark: examples, the best and worst images, the confusion matrix.

    Of the aligner, or else of what is there.
    """
    drawn = next(name for name in ("aligner", *results) if name in results)
    result = results[drawn][-1]
    evenly = report.at_even_distances(list(result.by_image), _EVENLY)
    extremes = report.best_and_worst(result.by_image, _EXTREME)
    shown = list(dict.fromkeys([*evenly, *extremes]))
    saved, words = workdir / "predictions" / benchmark.name, len(benchmark.words)
    folders = {name: saved / name for name in report.TITLES}
    if theirs:
        folders[theirs.name] = theirs.folder(benchmark)
    columns = {"ground truth": {name: benchmark.labels(name) for name in shown}}
    if folders["stage1"].is_dir() and drawn != "stage1":
        columns["pseudo label"] = {
            name: evaluation.read_prediction(folders["stage1"], name, words) for name in shown
        }
    if drawn in segmenters:
        columns["segmentation"] = _segmented(config, benchmark, segmenters[drawn][0], shown)
    else:
        columns["segmentation"] = {
            name: evaluation.read_prediction(folders[drawn], name, words) for name in shown
        }
    what = report.TITLES.get(drawn, drawn) + (" with PAMR" if len(results[drawn]) > 1 else "")
    title = f"{benchmark.title}: {what}, mIoU {100 * result.miou:.1f}"
    pictures = {
        "contact_sheet": _sheet(benchmark, columns, dict.fromkeys(evenly, ""), title, 2),
        "best_and_worst": _sheet(benchmark, columns, extremes, title, 1),
        "confusion": report.confusion_map(result, benchmark.words, title),
    }
    folder = workdir / "evaluation" / benchmark.name
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{name}.png")


def _segmented(
    config: Config, benchmark: Benchmark, segmenter: Segmenter, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Label maps of some images, refined where the protocol refines."""
    prepared = ((name, segmenter.prepare(benchmark.image(name))) for name in names)
    found = segmenter.label_maps(prepared, of_benchmark(config.eval, benchmark))
    return {name: labels if refined is None else refined for name, labels, refined in found}


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
    if unknown := [name for name in names if name not in PUBLISHED]:
        raise UserError(f"No benchmark {', '.join(unknown)}. There are: {', '.join(PUBLISHED)}.")
    if names:
        found, faults = [], []
        for name in dict.fromkeys(names):
            try:
                found.append(open_published(name, config.eval.data))
            except UserError as error:
                faults.append(str(error))
        if faults:
            raise UserError("\n\n".join(faults))
        return found
    if not config.eval.folder:
        raise UserError(
            "Give what to evaluate on: an annotated folder, --config.eval.folder=DIR, or published "
            "benchmarks, --benchmarks=voc21,ade150."
        )
    return [open_folder(config.eval.folder)]


def _load(config: Config, workdir: Path, model: str, with_clip: bool) -> Segmenters:
    """The models that are there."""
    found: Segmenters = {}
    if model or (workdir / "export").exists():
        found["aligner"] = _aligner(config, Path(model or workdir / "export"))
    if (workdir / "oracle" / "export").exists():
        found["oracle"] = _aligner(config, workdir / "oracle" / "export")
    if with_clip:
        clip = config.models.clip
        facts = {"source": clip, "hash": weights.content_hash(clip)}
        found["clip_windows"] = clip_patches(clip, config.eval), {"clip": facts}
    return found


def _aligner(config: Config, export: Path) -> tuple[Segmenter, dict[str, Any]]:
    segmenter, model = load(export, config.eval), checkpoint.read_model(export)
    facts = {name: model[name] for name in ("aligner", "vision", "clip")}
    return segmenter, {"export": str(export.resolve()), **facts}


class Theirs(NamedTuple):
    """Label maps of another system."""

    root: Path
    alone: bool
    """Whether there is a single benchmark, which needs no folder of its own."""

    @property
    def name(self) -> str:
        return self.root.resolve().name

    def folder(self, benchmark: Benchmark) -> Path:
        """Where those of a benchmark lie."""
        own = self.root / benchmark.name
        return self.root if self.alone and not own.is_dir() else own


def _theirs(folder: str, benchmarks: Sequence[Benchmark]) -> Theirs | None:
    """What --predictions names, if it is given; all label maps have to be there."""
    if not folder:
        return None
    theirs = Theirs(Path(folder), len(benchmarks) == 1)
    if theirs.name in report.TITLES:
        raise UserError(
            f"--predictions={folder} has a name that our own results have; rename the folder to "
            "what the system is called."
        )
    for benchmark in benchmarks:
        paths = [label_maps.path(theirs.folder(benchmark), name) for name in benchmark.names]
        missing = [path for path in paths if not path.exists()]
        if missing:
            raise UserError(
                f"--predictions={folder} lacks {len(missing)} of {len(paths)} label maps for "
                f"{benchmark.name}, such as {missing[0]}. "
                f"They are {folder}/{benchmark.name}/NAME.png"
                + (f", or {folder}/NAME.png." if theirs.alone else ".")
            )
    return theirs


def main() -> None:
    sharding.start_hosts(*(flag.value for flag in HOSTS))
    config = CONFIG.value
    benchmarks = _open(config, BENCHMARKS.value)
    if CHECK.value:
        report.print_checks([check(benchmark) for benchmark in benchmarks])
        return
    if not WORKDIR.value:
        raise UserError("Flag --workdir is missing: the folder of the experiment.")
    theirs = _theirs(PREDICTIONS.value, benchmarks)
    workdir = Path(workfolder.make(workfolder.local(WORKDIR.value)))
    with sharding.hold(workdir / "evaluation"):
        segmenters = _load(config, workdir, MODEL.value, CLIP.value)
        evaluate(config, workdir, benchmarks, segmenters, theirs)


if __name__ == "__main__":
    CONFIG, WORKDIR = program.define_config(workdir_required=False)
    MODEL = flags.DEFINE_string("model", "", "Exported aligner; WORKDIR/export if not given.")
    BENCHMARKS = flags.DEFINE_list("benchmarks", [], ", ".join(PUBLISHED))
    PREDICTIONS = flags.DEFINE_string("predictions", "", "Label maps of another system to score.")
    CLIP = flags.DEFINE_bool("clip_windows", False, "Score config.models.clip's own patches too.")
    CHECK = flags.DEFINE_bool("check", False, "Look only whether the benchmarks are complete.")
    HOSTS = program.define_hosts()
    program.run(main)
