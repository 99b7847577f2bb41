"""Mean intersection over union: counted in integers, divided once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from fmbseg_jax.vocabulary import IGNORE


@functools.partial(jax.jit, static_argnums=2)
def confusion_matrix(
    predictions: Int[Array, "*s"], labels: Int[Array, "*s"], num_classes: int
) -> Int[Array, "C C"]:
    """Counts of pixels, int32; rows are labels, columns predictions.

    Pixels labelled IGNORE are not counted. A prediction has to be a class; to score label maps
    with unlabelled pixels, make those one class more (`with_unlabelled`).
    """
    index = jnp.where(
        labels == IGNORE, num_classes**2, labels.astype(jnp.int32) * num_classes + predictions
    )
    counts = jnp.bincount(index.reshape(-1), length=num_classes**2 + 1)
    return counts[:-1].reshape(num_classes, num_classes).astype(jnp.int32)


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
