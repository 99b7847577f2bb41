"""COCO's category ids, its panoptic format, and how its label maps come to hold such ids."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from fmbseg_jax.data import label_maps
from fmbseg_jax.data.opening import raw_mode
from fmbseg_jax.errors import UserError
from fmbseg_jax.io import machine, texts

_UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
THINGS = tuple(i for i in range(1, 91) if i not in _UNUSED)
"""Ids of the 80 objects, in the order of their names."""
STUFF = tuple(range(92, 183))
"""Ids of the 91 kinds of stuff, in the order of their names."""
UNLABELLED = 0
OTHER = 183
"""In the pixel maps of stuff: some object."""

AS_IS = {i: i for i in range(201)} | {255: UNLABELLED}
"""Maps that hold ids: panoptic ones (184 to 200 are merged kinds of stuff), pixel maps of stuff."""
FROM_STUFF_THING_MAPS = {i - 1: i for i in range(1, 183)} | {255: UNLABELLED}
"""COCO-Stuff's own PNGs hold ids minus one."""
FROM_STUFF_TRAIN_IDS = dict(enumerate(THINGS + STUFF)) | {255: UNLABELLED}
"""`*_labelTrainIds.png`: the 171 classes in order."""
FROM_OBJECT_TRAIN_IDS = dict(enumerate((UNLABELLED, *THINGS))) | {255: UNLABELLED}
"""`*_instanceTrainIds.png`: 0 for all that is no object, then the 80."""


def read_panoptic(png: Path, segments: Path) -> np.ndarray:
    """A panoptic PNG and the JSON of its set → category ids, uint16 [H, W].

    A pixel's colour is the id of its segment, R + 256 G + 65536 B; 0 is unlabelled.
    """
    categories = _segments(segments).get(png.name)
    if categories is None:
        raise UserError(f"{segments} has no annotation of {png.name}. Take both from one download.")
    colours = _colours(png)
    present, where = np.unique(colours @ (1, 256, 65536), return_inverse=True)
    unknown = [i for i in present if i and i not in categories]
    if unknown:
        raise UserError(f"{png} has the segment {unknown[0]}, which {segments} does not describe.")
    ids = np.asarray([categories[i] if i else UNLABELLED for i in present.tolist()], np.uint16)
    return ids[where].reshape(colours.shape[:2])


def _colours(path: Path) -> np.ndarray:
    """int64 [H, W, 3] of a PNG of 8 bits in colour; grey, or 16 bits, would be other numbers."""
    source = f"The label map {path}"
    with label_maps.png(label_maps.read_bytes(path), source) as file:
        if file.mode not in ("RGB", "RGBA", "P") or "16" in raw_mode(file):
            raise UserError(
                f"{source} is a PNG of mode {file.mode} ({raw_mode(file)}); a panoptic one has the "
                "number of each segment in RGB of 8 bits. Take it as it was downloaded."
            )
        try:
            return np.asarray(file.convert("RGB"), np.int64)
        except Exception as error:  # Pillow's readers raise many kinds on damaged files
            machine.let_through(error, source)
            raise UserError(f"{source} cannot be read: {error}") from None


@functools.lru_cache(2)
def _segments(path: Path) -> dict[str, dict[int, int]]:
    """By PNG, the category of each segment."""
    advice = "Take the panoptic JSON of COCO as it was downloaded."
    found = {
        one["file_name"]: {s["id"]: s["category_id"] for s in one["segments_info"]}
        for one in texts.read_json(path, _PANOPTIC, advice)["annotations"]
    }
    categories = {category for segments in found.values() for category in segments.values()}
    if wrong := categories - set(range(1 << 16)):
        raise UserError(f"{path} is damaged: it has the category {min(wrong)}. {advice}")
    return found


_SEGMENTS = {"file_name": str, "segments_info": [{"id": int, "category_id": int}]}
_PANOPTIC = {"annotations": [_SEGMENTS]}
