"""Program: trained aligners and stage 1 against ground truth: a table, JSON, a contact sheet.

    python evaluate.py --config=configs/toy.py --workdir=work/toy [--model=EXPORT]

Scores, on the annotated folder `eval.folder`, every set of label maps that is there:

    WORKDIR/predictions/...   CLIP's patches and stage 1 (python -m labelling --predict)
    WORKDIR/export            the aligner (or --model)
    WORKDIR/oracle/export     an aligner trained on the ground truth, the ceiling

and writes WORKDIR/evaluation/summary.json and contact_sheet.png. Run again to continue.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from fmbseg_jax import evaluation, figures, program, workfolder
from fmbseg_jax.config import Config
from fmbseg_jax.data.benchmarks import Folder
from fmbseg_jax.errors import UserError
from fmbseg_jax.segmenter import load

TITLES = {
    "clip_patches": "CLIP's patches alone",
    "stage1_1": "stage 1.1: points",
    "stage1_2": "stage 1.2: automatic masks",
    "stage1": "stage 1: both",
    "aligner": "the aligner",
    "oracle": "ceiling: trained on the truth",
}
_SHEET_IMAGES = 10


def evaluate(config: Config, workdir: Path, model: Path) -> dict[str, evaluation.Result]:
    """Segments with the aligners, scores all label maps, writes the results."""
    benchmark = Folder.open(config.eval.folder)
    predictions = workdir / "predictions"
    if (predictions / "manifest.json").exists():
        workfolder.remember(
            predictions / "manifest.json",
            {"images": str(benchmark.root.resolve() / "images"), "words": list(benchmark.words)},
            "Run `python -m labelling --predict` for this benchmark in another --workdir.",
        )
    for name, export in (("aligner", model), ("oracle", workdir / "oracle" / "export")):
        if export.exists() or name == "aligner":
            segmenter = load(export, config.eval)
            evaluation.segment_folder(segmenter, benchmark, predictions / name, name)
        else:
            shutil.rmtree(predictions / name, ignore_errors=True)  # of an aligner that is no more
    there = [name for name in TITLES if (predictions / name).is_dir()]
    results = {name: evaluation.score_folder(benchmark, predictions / name) for name in there}

    folder = workdir / "evaluation"
    folder.mkdir(exist_ok=True)
    evaluation.write_summary(folder / "summary.json", results, benchmark.words)
    print(table(results, config, benchmark))
    sheet = contact_sheet(benchmark, predictions, results)
    Image.fromarray(sheet).save(folder / "contact_sheet.png")
    print(f"\nWritten to {folder}: summary.json, contact_sheet.png")
    return results


def table(results: dict[str, evaluation.Result], config: Config, benchmark: Folder) -> str:
    """The results as text, with the protocol they were measured by."""
    lines = [
        "",
        f"{'':32} {'mIoU':>6} {'labelled':>9}",
        *(
            f"{TITLES[name]:32} {100 * result.miou:6.2f} {100 * result.coverage:8.1f}%"
            for name, result in results.items()
        ),
        "",
        f"{len(benchmark.names)} images, {len(benchmark.words)} words; short side "
        f"{config.eval.short_side}, window {config.eval.window}, stride {config.eval.stride}; "
        f'template "{config.eval.template}"; an unlabelled pixel counts as a miss.',
    ]
    return "\n".join(lines)


def contact_sheet(
    benchmark: Folder, predictions: Path, results: dict[str, evaluation.Result]
) -> np.ndarray:
    """uint8 [h, w, 3]: image, truth, pseudo label and segmentation, two images a row."""
    columns = {"stage1": "pseudo label", "aligner": "segmentation"}
    shown = [name for name in columns if name in results]
    step = max(1, len(benchmark.names) // _SHEET_IMAGES)
    groups = []
    for name in benchmark.names[::step][:_SHEET_IMAGES]:
        maps = [benchmark.labels(name)]
        maps += [
            evaluation.read_prediction(predictions / kind, name, len(benchmark.words))
            for kind in shown
        ]
        coloured = [figures.colourise(labels, len(benchmark.words)) for labels in maps]
        groups.append([benchmark.image(name), *coloured])
    headings = ["image", "ground truth", *(columns[name] for name in shown)]
    pairs = [sum(groups[i : i + 2], []) for i in range(0, len(groups), 2)]
    return figures.contact_sheet(
        headings * min(2, len(groups)),
        pairs,
        benchmark.words,
        title="Segmented without a single annotation",
        subtitle=f"mIoU {100 * results['aligner'].miou:.1f} on {len(benchmark.names)} images",
        tile=160,
        unlabelled="stage1" in shown,
    )


def main() -> None:
    config = CONFIG.value
    workdir = Path(workfolder.make(workfolder.local(WORKDIR.value)))
    model = Path(MODEL.value or workdir / "export")
    if not config.eval.folder:
        raise UserError("Give the annotated folder to evaluate on: --config.eval.folder=DIR.")
    evaluate(config, workdir, model)


if __name__ == "__main__":
    CONFIG, WORKDIR = program.define_config()
    MODEL = flags.DEFINE_string("model", "", "Exported aligner; WORKDIR/export if not given.")
    program.run(main)
