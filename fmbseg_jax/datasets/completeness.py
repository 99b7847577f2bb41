"""What a benchmark has on disk, and what its label maps lack."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from fmbseg_jax.data import label_maps
from fmbseg_jax.datasets.folder import Benchmark
from fmbseg_jax.errors import UserError
from fmbseg_jax.vocabulary import IGNORE

_MOST_ABSENT = 20  # classes that are named


@dataclasses.dataclass(frozen=True)
class Check:
    """What a benchmark has on disk."""

    name: str
    images: int
    expected: int
    """Images that the published benchmark has; 0 for a folder of one's own."""
    seen: int
    """Classes that a pixel is labelled with."""
    classes: int
    ignored: float
    """Share of the pixels that is not counted."""
    absent: Sequence[str]
    """Classes that no pixel is labelled with."""


def check(benchmark: Benchmark) -> Check:
    """Reads every image and label map; raises UserError with all that are damaged or do not fit."""

    def count(name: str) -> tuple[np.ndarray | None, str]:
        image, path = benchmark.files[name]
        try:
            labels, size = benchmark.labels(name), benchmark.image(name).shape[:2]
        except UserError as error:
            return None, str(error)
        if fault := label_maps.size_fault(labels, size, image):
            return None, f"{path} {fault}"
        return np.bincount(labels.reshape(-1), minlength=IGNORE + 1), ""

    counts, faults = np.zeros(IGNORE + 1, np.int64), []
    with ThreadPoolExecutor() as pool:
        found = pool.map(count, benchmark.names)
        total = len(benchmark.names)
        for one, fault in tqdm(found, benchmark.name, total, unit=" image", dynamic_ncols=True):
            if one is None:
                faults.append(fault)
            else:
                counts += one
    if faults := list(dict.fromkeys(faults)):
        more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise UserError(f"{benchmark.name}:\n  " + "\n  ".join(faults[:10]) + more)
    return Check(
        benchmark.name,
        total,
        benchmark.published.count if benchmark.published else 0,
        int(np.count_nonzero(counts[:IGNORE])),
        len(benchmark.words),
        counts[IGNORE] / counts.sum(),
        [word for word, count in zip(benchmark.words, counts, strict=False) if not count],
    )


def lacking(name: str, void: float, absent: Sequence[str]) -> str:
    """A sentence on what the label maps of a set lack."""
    told = f"{name}: {void:.1%} of the ground truth has no class, and is not counted"
    if not absent:
        return f"{told}; every class has pixels."
    more = f" and {len(absent) - _MOST_ABSENT} more" * (len(absent) > _MOST_ABSENT)
    return f"{told}; no pixel has the class {', '.join(absent[:_MOST_ABSENT])}{more}."
