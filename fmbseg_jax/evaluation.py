"""Label maps against ground truth: segment, count, report.

Whatever made them, the label maps of an annotated folder lie in one folder, a 16-bit PNG for each
image; those that are there are not made again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

from fmbseg_jax import logs, metrics
from fmbseg_jax.data import label_maps
from fmbseg_jax.data.benchmarks import Folder
from fmbseg_jax.data.images import write_atomically
from fmbseg_jax.errors import UserError
from fmbseg_jax.segmenter import Segmenter
from fmbseg_jax.vocabulary import IGNORE


@dataclasses.dataclass(frozen=True)
class Result:
    """Pixels counted over a whole benchmark."""

    confusion: np.ndarray
    """int64 [K, K + 1]: rows are labels; the last column counts pixels left unlabelled."""
    coverage: float
    """Share of all pixels that got a word."""
    images: int

    @property
    def iou(self) -> np.ndarray:
        """float64 [K]; an unlabelled pixel is a miss of its class. NaN where a class is absent."""
        square = np.pad(self.confusion, ((0, 1), (0, 0)))
        return metrics.iou(square)[:-1]

    @property
    def miou(self) -> float:
        """Mean of `iou` over the classes that are there."""
        return float(np.nanmean(self.iou))


def prediction_path(folder: Path, name: str) -> Path:
    """Where the label map of the image `name` lies."""
    return (folder / name).with_suffix(".png")


def segment_folder(segmenter: Segmenter, benchmark: Folder, folder: Path, title: str) -> None:
    """Writes the label map of each image into `folder`; those there, by the same model, stay."""
    _claim(folder, segmenter.fingerprint + str((benchmark.words, benchmark.root.resolve())))
    todo = [name for name in benchmark.names if not prediction_path(folder, name).exists()]
    with logs.progress(len(benchmark.names), title, len(benchmark.names) - len(todo)) as bar:
        for name in todo:
            labels = segmenter.segment(benchmark.image(name), benchmark.words)
            path = prediction_path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, label_maps.encode(labels.astype(np.uint16)))
            bar.update()


def _claim(folder: Path, made_by: str) -> None:
    """Empties `folder` unless what is there was made by the same model, for the same words."""
    mark, digest = folder / "made_by.txt", hashlib.sha256(made_by.encode()).hexdigest()
    if not mark.exists() or mark.read_text() != digest:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_atomically(mark, digest.encode())


def score_folder(benchmark: Folder, folder: Path) -> Result:
    """Counts the label maps in `folder` against the benchmark's.

    Raises:
      UserError: an image has no label map, one of another size, or with an index that is no word.
    """
    words = len(benchmark.words)
    confusion = np.zeros((words + 1, words + 1), np.int64)
    labelled = pixels = 0
    for name in benchmark.names:
        truth, predicted = benchmark.labels(name), read_prediction(folder, name, words)
        if truth.shape != predicted.shape:
            raise UserError(
                f"{prediction_path(folder, name)} is {predicted.shape}, the image {truth.shape}."
            )
        labelled += int(np.count_nonzero(predicted != IGNORE))
        pixels += predicted.size
        confusion += metrics.confusion_matrix(
            metrics.with_unlabelled(predicted, words), truth, words + 1
        )
    if not confusion.any():
        raise UserError(f"No pixel of {benchmark.root}'s label maps has a word.")
    return Result(confusion[:-1], labelled / pixels, len(benchmark.names))


def read_prediction(folder: Path, name: str, num_words: int) -> np.ndarray:
    """The label map of the image `name`, uint16 [H, W]."""
    path = prediction_path(folder, name)
    if not path.exists():
        raise UserError(f"No label map {path}: the run that makes them has not finished.")
    return label_maps.read(path, num_words)


def write_summary(path: Path, results: dict[str, Result], words: tuple[str, ...]) -> None:
    """summary.json: for each row its mIoU, coverage, IoU by word (null where absent), images."""
    rows = {
        name: {
            "miou": result.miou,
            "coverage": result.coverage,
            "iou": {
                word: None if np.isnan(value) else float(value)
                for word, value in zip(words, result.iou, strict=True)
            },
            "images": result.images,
        }
        for name, result in results.items()
    }
    write_atomically(path, (json.dumps(rows, indent=1) + "\n").encode())
