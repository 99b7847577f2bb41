"""Label maps → one COCO file, whose masks are run-length encoded, a mask for each word."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle

from fmbseg_jax.io.files import incomplete, naming


def write(
    path: Path, words: Sequence[str], maps: Iterable[tuple[str, np.ndarray]], made_by: str
) -> None:
    """Writes what pycocotools and annotation tools load.

    An annotation is a word in an image: category (index of the word, plus one), mask, box (x, y,
    width, height), area in pixels; ids count from 1. Annotations go to disk one after the other, so
    that any number of images is written in little memory.

    Args:
      words: index 0 first.
      maps: file name of each image, and its label map uint16 [H, W]; IGNORE is in no mask.
      made_by: a description of the file.
    """
    facts: dict[str, Any] = {
        "info": {"description": made_by},
        "licenses": [],
        "categories": [{"id": i, "name": word} for i, word in enumerate(words, 1)],
    }
    unfinished, listed, count = Path(incomplete(path)), [], 0
    try:
        with tempfile.TemporaryFile("w+", dir=path.parent) as annotations:
            for number, (name, labels) in enumerate(maps, 1):
                height, width = labels.shape
                listed.append({"id": number, "file_name": name, "height": height, "width": width})
                for index in np.unique(labels[labels < len(words)]):
                    comma, count = ",\n" if count else "", count + 1
                    ids = {"id": count, "image_id": number, "category_id": int(index) + 1}
                    with naming(path):
                        annotations.write(comma + json.dumps(ids | _mask(labels == index)))
            with naming(path), open(unfinished, "w") as file:
                annotations.seek(0)
                file.write(json.dumps(facts | {"images": listed})[:-1] + ', "annotations": [\n')
                shutil.copyfileobj(annotations, file)
                file.write("\n]}\n")
        with naming(path):
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _mask(of: np.ndarray) -> dict[str, Any]:
    """bool [H, W] → the fields of an annotation."""
    encoded = rle.encode(np.asfortranarray(of, np.uint8))
    return {
        "segmentation": {"size": list(of.shape), "counts": encoded["counts"].decode()},
        "area": int(np.count_nonzero(of)),
        "bbox": [float(value) for value in rle.toBbox(encoded)],
        "iscrowd": 0,
    }
