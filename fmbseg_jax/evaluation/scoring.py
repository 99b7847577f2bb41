"""Label maps against ground truth: segment, count, add up.

What is counted in each image is written down as it is found, so that an evaluation that was stopped
goes on where it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from fmbseg_jax.data import label_maps
from fmbseg_jax.datasets.folder import Benchmark
from fmbseg_jax.errors import Notice, UserError
from fmbseg_jax.evaluation import metrics
from fmbseg_jax.io import files, texts
from fmbseg_jax.io.appending import append_lines
from fmbseg_jax.io.threads import in_order
from fmbseg_jax.parallel import agreement
from fmbseg_jax.runs.progress import progress
from fmbseg_jax.segmentation.image_features import Prepared
from fmbseg_jax.segmentation.segmenter import Segmenter
from fmbseg_jax.vocabulary import IGNORE
from fmbseg_jax.vocabulary.classes import Classes

_THREADS = 8  # images read at once


@dataclasses.dataclass(frozen=True)
class Result:
    """Pixels counted over a whole benchmark."""

    confusion: np.ndarray
    """int64 [K, K + 1]: rows are labels; the last column counts pixels left unlabelled."""
    by_image: dict[str, float]
    """mIoU of each image that this process has looked at, over the classes in its label map."""
    images: int
    void: int = 0
    """Pixels of the truth that have no class, and are not counted."""

    @property
    def absent(self) -> list[int]:
        """Classes that no pixel of the truth has."""
        return np.flatnonzero(self.confusion.sum(1) == 0).tolist()

    @property
    def void_share(self) -> float:
        """Share of the truth's pixels that have no class."""
        return self.void / (self.void + int(self.confusion.sum()))

    @property
    def iou(self) -> np.ndarray:
        """float64 [K]; an unlabelled pixel is a miss of its class. NaN where a class is absent."""
        return _iou(self.confusion)

    @property
    def coverage(self) -> float:
        """Share of the pixels counted that got a class."""
        return float(self.confusion[:, :-1].sum() / self.confusion.sum())

    @property
    def miou(self) -> float:
        """Mean of `iou` over the classes that are there."""
        return float(np.nanmean(self.iou))


@dataclasses.dataclass(frozen=True)
class Counts:
    """Pixels counted in one image."""

    cells: np.ndarray
    """int64 [c]: indices of the confusion matrix [K, K + 1] that are not 0."""
    counts: np.ndarray
    """int64 [c]: what is there."""
    void: int
    """Pixels of the truth without a class."""

    @classmethod
    def of(cls, predicted: np.ndarray, truth: np.ndarray, num_classes: int) -> Counts:
        """Counts one label map [H, W] against its ground truth; IGNORE in either is no class."""
        confusion = metrics.confusion_matrix(
            metrics.with_unlabelled(predicted, num_classes), truth, num_classes + 1
        )[:-1]
        (cells,) = np.nonzero(confusion.reshape(-1))
        void = int(np.count_nonzero(truth == IGNORE))
        return cls(cells, confusion.reshape(-1)[cells], void)

    def if_possible(self, num_classes: int) -> Counts | None:
        """These counts; None where no image can have them: cells twice, or not of the matrix."""
        ends = np.concatenate([[-1], self.cells, [num_classes * (num_classes + 1)]])
        possible = (
            self.void >= 0
            and self.cells.shape == self.counts.shape
            and np.all(np.diff(ends) > 0)
            and np.all((self.counts > 0) & (self.counts < 1 << 32))
        )
        return self if possible else None

    def confusion(self, num_classes: int) -> np.ndarray:
        """int64 [K, K + 1]."""
        dense = np.zeros(num_classes * (num_classes + 1), np.int64)
        dense[self.cells] = self.counts
        return dense.reshape(num_classes, num_classes + 1)


class Tally:
    """Counts by image, in a file of JSON lines; those of another model are dropped.

    A line that is damaged, or that a kill cut short, counts as none: its image is counted again.
    With several processes each has a file of its own, and reads those of all.
    """

    def __init__(self, folder: Path, name: str, made_by: str, num_classes: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._mark = {"made_by": hashlib.sha256(made_by.encode()).hexdigest()[:16]}
        self._num_classes = num_classes
        self.found: dict[str, Counts] = {}
        for path in sorted(folder.glob(f"{name}.*.jsonl")):
            self.found |= self._read(path)
        self._path = folder / f"{name}.{jax.process_index()}.jsonl"
        kept = self._read(self._path) if self._path.exists() else {}
        agreement.wait_for_all(f"tally {name}")  # all have read what is now dropped
        lines = [json.dumps(self._mark), *(_line(*item) for item in kept.items())]
        files.write_atomically(self._path, "".join(f"{line}\n" for line in lines).encode())

    def add(self, image: str, counts: Counts) -> None:
        """Writes down what was counted in an image."""
        self.found[image] = counts
        append_lines(self._path, f"{_line(image, counts)}\n".encode())

    def _read(self, path: Path) -> dict[str, Counts]:
        mark, _, data = path.read_bytes().partition(b"\n")
        if mark != json.dumps(self._mark).encode():
            return {}
        found = {}
        for line in texts.parse_lines(data, _LINE):
            if line is None:
                continue
            cells, counts = (np.asarray(line[name], np.int64) for name in ("cells", "counts"))
            if one := Counts(cells, counts, line["void"]).if_possible(self._num_classes):
                found[line["image"]] = one
        return found


_LINE = {"image": str, "void": int, "cells": [int], "counts": [int]}


def _line(image: str, counts: Counts) -> str:
    lists = {"cells": counts.cells.tolist(), "counts": counts.counts.tolist()}
    return json.dumps({"image": image, "void": counts.void, **lists})


def segment(
    segmenter: Segmenter, benchmark: Benchmark, classes: Classes, folder: Path, title: str
) -> list[Result]:
    """Segments and counts all images of a benchmark, each process its share.

    Args:
      folder: where the counts of each image are kept.

    Returns:
      The result, and with `eval.pamr` a second one, of the refined label maps.
    """
    # "void": tallies of before had no such number.
    made_by = repr(("void", segmenter.fingerprint, classes, benchmark.fingerprint))
    kinds = [title, f"{title}_pamr"] if segmenter.refines else [title]
    tallies = [Tally(folder, kind, made_by, len(classes.names)) for kind in kinds]
    ours = _share(benchmark)
    todo = [name for name in ours if any(name not in tally.found for tally in tallies)]

    def count() -> None:
        deep = [name for name in todo if benchmark.is_deep(name)]
        if deep:  # of several systems once
            told = benchmark.reading.of_deep(len(deep), deep[0])
            warnings.warn(told, Notice, stacklevel=1)
        prepared = _read(segmenter, benchmark, todo)
        described = f"{benchmark.name}: {title}"
        with progress(len(ours), described, len(ours) - len(todo)) as bar:
            for one in segmenter.label_maps(prepared, classes):
                (name, truth), found = one.key, (one.labels, one.refined)
                for tally, labels in zip(tallies, found, strict=False):
                    assert labels is not None
                    tally.add(name, Counts.of(labels, truth, len(classes.names)))
                bar.update()

    agreement.together(count)
    return [_sum(tally.found, ours, benchmark) for tally in tallies]


def _share(benchmark: Benchmark) -> Sequence[str]:
    """Names of the images that this process looks at."""
    return benchmark.names[jax.process_index() :: jax.process_count()]


def _read(
    segmenter: Segmenter, benchmark: Benchmark, names: Sequence[str]
) -> Iterator[tuple[tuple[str, np.ndarray], Prepared]]:
    """Images by name, with their ground truth, ahead of whoever takes them."""

    def one(i: int) -> tuple[tuple[str, np.ndarray], Prepared]:
        image, truth = benchmark.image(names[i]), benchmark.labels(names[i])
        _check_size(benchmark.files[names[i]][1], truth, image.shape[:2], names[i])
        return (names[i], truth), segmenter.prepare(image)

    yield from in_order(len(names), one, _THREADS)


def _sum(found: dict[str, Counts], names: Sequence[str], benchmark: Benchmark) -> Result:
    """Over the images of all processes, those of this one being `names`."""
    classes = len(benchmark.words)
    confusion, by_image = np.zeros((classes, classes + 1), np.int64), {}
    void = np.array([sum(found[name].void for name in names)], np.int64)
    for name in names:
        counts = found[name].confusion(classes)
        confusion += counts
        there = counts.any(1)  # a stray pixel of another class would weigh as much as all of one
        by_image[name] = float(_iou(counts)[there].mean()) if there.any() else float("nan")
    confusion = agreement.sum_of_all(confusion)
    if not confusion.any():
        raise UserError(f"No pixel of {benchmark.root}'s label maps has a class.")
    (void,) = agreement.sum_of_all(void)
    return Result(confusion, by_image, len(benchmark.names), int(void))


def score_folder(benchmark: Benchmark, folder: Path) -> Result:
    """Counts the label maps in `folder`, by name of the image, against the benchmark's.

    Where class 0 is the background, pixels that are left unlabelled are that.

    Raises:
      UserError: an image has no label map, one of another size, or with an index that is no class.
    """
    classes = len(benchmark.words)
    names, found = _share(benchmark), {}

    def one(i: int) -> Counts:
        truth, predicted = benchmark.labels(names[i]), read_prediction(folder, names[i], benchmark)
        _check_size(label_maps.find(folder, names[i]), predicted, truth.shape, names[i])
        if benchmark.has_background:
            predicted = np.where(predicted == IGNORE, np.uint16(0), predicted)
        return Counts.of(predicted, truth, classes)

    def count() -> None:
        for name, counts in zip(names, in_order(len(names), one, _THREADS), strict=True):
            found[name] = counts

    agreement.together(count)
    return _sum(found, names, benchmark)


def _check_size(path: Path, labels: np.ndarray, size: tuple[int, ...], name: str) -> None:
    if fault := label_maps.size_fault(labels, size, name):
        raise UserError(f"{path} {fault}")


def read_prediction(folder: Path, name: str, benchmark: Benchmark) -> np.ndarray:
    """The label map of the image `name` of a benchmark, uint16 [H, W]."""
    path = label_maps.find(folder, name)
    if not path.exists():
        raise UserError(
            f"No label map {path}. Each image of the benchmark needs one; where a run makes them, "
            "let it finish."
        )
    return label_maps.read(path, len(benchmark.words), benchmark.reading.megapixels)


def _iou(confusion: np.ndarray) -> np.ndarray:
    """float64 [K], of a confusion matrix [K, K + 1] whose last column is a miss."""
    return metrics.iou(np.pad(confusion, ((0, 1), (0, 0))))[:-1]
