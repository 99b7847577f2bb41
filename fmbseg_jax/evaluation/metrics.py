"""Mean intersection over union: counted in integers, divided once."""

from __future__ import annotations

import numpy as np

from fmbseg_jax.vocabulary import IGNORE


def confusion_matrix(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts of pixels, int64 [C, C]; rows are labels, columns predictions.

    On the host: label maps come in as many sizes as images do, and each would be compiled anew.
    Pixels labelled IGNORE are not counted. A prediction has to be a class; to score label maps
    with unlabelled pixels, make those one class more (`with_unlabelled`).

    Args:
      predictions, labels: integers, of one shape.
    """
    counted = labels != IGNORE
    index = labels[counted].astype(np.int64) * num_classes + predictions[counted]
    return np.bincount(index, minlength=num_classes**2).reshape(num_classes, num_classes)


def with_unlabelled(predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Label map whose unlabelled pixels, IGNORE, are class `num_classes`: each counts as a miss."""
    return np.where(predictions == IGNORE, num_classes, predictions).astype(np.int32)


def iou(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union of each class, float64 [C]; NaN where a class is absent.

    A class is absent when it is in no label and in no prediction.
    """
    confusion = np.asarray(confusion, np.int64)
    intersection = np.diagonal(confusion)
    union = confusion.sum(0) + confusion.sum(1) - intersection
    return np.where(union > 0, intersection / np.maximum(union, 1), np.nan)


def mean_iou(confusion: np.ndarray) -> float:
    """Mean of `iou` over the classes that are there; NaN where there is none."""
    values = iou(confusion)
    return float(np.nanmean(values)) if np.any(np.isfinite(values)) else float("nan")
