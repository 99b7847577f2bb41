"""Pictures of an evaluation: examples, the best and the worst images, the confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fmbseg_jax.datasets.folder import Benchmark
from fmbseg_jax.evaluation.report import TITLES
from fmbseg_jax.evaluation.scoring import Result
from fmbseg_jax.evaluation.systems import System
from fmbseg_jax.io.files import write_atomically
from fmbseg_jax.outputs import overlays
from fmbseg_jax.vocabulary import IGNORE, unlike
from fmbseg_jax.vocabulary.classes import Classes

_EVENLY, _EXTREME = 10, 3  # images at even distances; of the best and of the worst
_MOST_CLASSES = 200  # in the picture of the confusion matrix

LabelMaps = Mapping[str, np.ndarray]
"""By name of the image, uint16 [H, W]."""


def draw(
    folder: Path,
    benchmark: Benchmark,
    classes: Classes,
    systems: Sequence[System],
    results: Mapping[str, Sequence[Result]],
) -> None:
    """Writes contact_sheet.png, best_and_worst.png and confusion.png (the paper's Figure 4).

    Of the aligner, or else of the first system; stage 1 stands beside it, where it is there.
    """
    by_name = {system.name: system for system in systems}
    drawn = by_name.get("aligner", systems[0])
    *_, result = results[drawn.name]
    names = list(result.by_image)
    evenly = dict.fromkeys(names[:: max(1, len(names) // _EVENLY)][:_EVENLY], "")
    extremes = best_and_worst(result.by_image, _EXTREME)
    shown = list(evenly | extremes)
    columns: dict[str, LabelMaps] = {
        "ground truth": {name: benchmark.labels(name) for name in shown}
    }
    if "stage1" in by_name and drawn.name != "stage1":
        columns["pseudo label"] = by_name["stage1"].label_maps(benchmark, classes, shown)
    columns["segmentation"] = drawn.label_maps(benchmark, classes, shown)
    refined = " with PAMR" if len(results[drawn.name]) > 1 else ""
    title = f"{benchmark.title}: {TITLES.get(drawn.name, drawn.name)}{refined}"
    title += f", mIoU {100 * result.miou:.1f}"
    drawings = {
        "contact_sheet": _sheet(benchmark, columns, evenly, title, 2),
        "best_and_worst": _sheet(benchmark, columns, extremes, title, 1),
        "confusion": confusion_map(result, benchmark.words, title),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in drawings.items():
        write_atomically(folder / f"{name}.png", overlays.png(picture))


def best_and_worst(by_image: Mapping[str, float], count: int) -> dict[str, str]:
    """The `count` images of the highest and of the lowest mIoU, with what to say of each."""
    scored = sorted(
        ((value, name) for name, value in by_image.items() if not np.isnan(value)), reverse=True
    )
    count = min(count, -(-len(scored) // 2))
    best, worst = scored[:count], scored[count:][-count:]
    captions = {name: f"best: {100 * value:.1f}" for value, name in best}
    return captions | {name: f"worst: {100 * value:.1f}" for value, name in worst}


def confusion_map(result: Result, words: Sequence[str], title: str) -> np.ndarray:
    """uint8 [h, w, 3]: of each label's pixels (rows) the share that got each class (columns).

    Colours go by the root of the share, so that rare confusions can be seen. Of more than 200
    classes, those with the most pixels.
    """
    pixels = result.confusion.sum(1)
    largest = np.sort(np.argsort(-pixels, kind="stable")[:_MOST_CLASSES])
    shares = result.confusion[:, :-1] / np.maximum(pixels[:, None], 1)
    shares, words = shares[np.ix_(largest, largest)], [words[i] for i in largest]
    rows = [
        f"{word}  -" if np.isnan(iou) else f"{word}  {100 * iou:.0f}"
        for word, iou in zip(words, result.iou[largest], strict=True)
    ]
    explained = "Rows: truth and IoU; columns: result; brighter: a larger share of the row"
    return overlays.matrix(np.sqrt(shares), rows, words, f"{title}. {explained}")


def _sheet(
    benchmark: Benchmark,
    columns: Mapping[str, LabelMaps],
    captions: Mapping[str, str],
    title: str,
    across: int,
) -> np.ndarray:
    """uint8 [h, w, 3]: the images that have a caption, `across` of them in a row."""
    words = len(benchmark.words)
    examples = [
        [benchmark.image(name), *(overlays.colourise(one[name], words) for one in columns.values())]
        for name in captions
    ]
    maps = [one[name] for one in columns.values() for name in captions]
    present = np.unique(np.concatenate([np.unique(labels) for labels in maps]))
    return overlays.contact_sheet(
        ["image", *columns],
        examples,
        benchmark.words,
        across=across,
        title=title,
        captions=list(captions.values()),
        tile=160,
        present=[int(i) for i in present if i != IGNORE],
        ignored=unlike("no word", benchmark.words) if IGNORE in present else "",
    )
