"""The published benchmarks: class names, splits, and how people have them on disk.

Splits, names and label values are those of mmsegmentation 0.27 and of TCL, whose protocol the paper
follows. To add one, add an entry to `PUBLISHED`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from fmbseg_jax.datasets import coco
from fmbseg_jax.vocabulary import IGNORE, read_words

NAMES = Path(__file__).parent / "classnames"
"""Folder of the class names, a file for each set."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One way in which label maps lie on disk; `{}` stands for an image's name."""

    labels: str
    values: Mapping[int, int] | None = None
    """A map's values → the categories that `Published.classes` knows; None: they are the same."""
    panoptic: str = ""
    """JSON of the segments, where `labels` are COCO's panoptic PNGs."""
    things: str = ""
    """Panoptic PNGs that fill in the objects, where `labels` have stuff alone."""


@dataclasses.dataclass(frozen=True)
class Published:
    """What is known of a benchmark before one looks at the disk."""

    title: str
    names: str
    """File of class names."""
    first: int
    """Its first line that counts, from 0."""
    count: int
    """Images."""
    roots: tuple[str, ...]
    """Where it may lie under the folder of all data, the first that is there."""
    images: tuple[str, ...]
    split: str
    """File with one name a line; "" takes every image."""
    sources: tuple[Source, ...]
    classes: Mapping[int, int]
    """Category → class, or IGNORE."""
    background: str | None = None
    """Where class 0 is what is no other class, how it is found ("words" or "none")."""
    paper: float | None = None
    """mIoU in the paper's Table 1, in percent."""

    @property
    def words(self) -> tuple[str, ...]:
        """The class names."""
        return read_words(NAMES / self.names)[self.first :]


def background_words() -> tuple[str, ...]:
    """SCLIP's 26 words for what is in the background."""
    return read_words(NAMES / "background26.txt")


def stuff_words() -> tuple[str, ...]:
    """COCO-Stuff's 91 kinds of stuff."""
    return read_words(NAMES / "coco_stuff171.txt")[80:]


def _same(count: int) -> dict[int, int]:
    return {i: i for i in range(count)} | {255: IGNORE}


def _without_zero(count: int) -> dict[int, int]:
    """mmsegmentation's reduce_zero_label: 0 is ignored, every other value one less."""
    return {0: IGNORE, 255: IGNORE} | {i + 1: i for i in range(count)}


_OBJECTS = {i: IGNORE for i in range(201)} | {i: n for n, i in enumerate(coco.THINGS)}
_OBJECTS_OR_NOT = {i: 0 for i in range(201)} | {i: n + 1 for n, i in enumerate(coco.THINGS)}
_STUFF = {coco.UNLABELLED: IGNORE} | {i: n for n, i in enumerate(coco.THINGS + coco.STUFF)}

_STUFF_TRAIN_IDS = Source("annotations/val2017/{}_labelTrainIds.png", coco.FROM_STUFF_TRAIN_IDS)
_STUFF_THINGS = tuple(
    Source(f"{folder}/val2017/{{}}.png", coco.FROM_STUFF_THING_MAPS)
    for folder in ("stuffthingmaps", "annotations")
)
_PANOPTIC = tuple(
    Source(f"{folder}panoptic_val2017/{{}}.png", coco.AS_IS, f"{folder}panoptic_val2017.json")
    for folder in ("annotations/", "")
)
_PIXEL_MAPS = tuple(
    Source(
        "annotations/stuff_val2017_pixelmaps/{}.png",
        coco.AS_IS,
        f"{folder}panoptic_val2017.json",
        f"{folder}panoptic_val2017/{{}}.png",
    )
    for folder in ("annotations/", "")
)
_CITYSCAPES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Of Cityscapes' ids, the 19 that are scored."""
_FROM_CITYSCAPES_IDS = {i: 255 for i in (*range(34), 255)} | {
    i: n for n, i in enumerate(_CITYSCAPES)
}

_VOC = Published(
    title="Pascal VOC 2012",
    names="voc21.txt",
    first=0,
    count=1449,
    roots=("VOCdevkit/VOC2012", "VOC2012", "."),
    images=("JPEGImages/{}.jpg",),
    split="ImageSets/Segmentation/val.txt",
    sources=(Source("SegmentationClass/{}.png"),),
    classes=_same(21),
    background="words",
    paper=67.73,
)
_CONTEXT = Published(
    title="Pascal Context",
    names="context60.txt",
    first=0,
    count=5104,
    roots=("VOCdevkit/VOC2010", "VOC2010", "."),
    images=("JPEGImages/{}.jpg",),
    split="ImageSets/SegmentationContext/val.txt",
    sources=(Source("SegmentationClassContext/{}.png"),),
    classes=_same(60),
    background="none",
)
_COCO = Published(
    title="COCO-Stuff",
    names="coco_stuff171.txt",
    first=0,
    count=5000,
    roots=("coco_stuff164k", "coco", "coco_object", "."),
    images=("images/val2017/{}.jpg", "val2017/{}.jpg"),
    split="",
    sources=(_STUFF_TRAIN_IDS, *_STUFF_THINGS, *_PIXEL_MAPS),
    classes=_STUFF,
    paper=29.88,
)
_OBJECT_SOURCES = (
    Source("annotations/val2017/{}_instanceTrainIds.png", coco.FROM_OBJECT_TRAIN_IDS),
    _STUFF_TRAIN_IDS,
    *_STUFF_THINGS,
    *_PANOPTIC,
)

PUBLISHED: dict[str, Published] = {
    "voc21": _VOC,
    "voc20": dataclasses.replace(
        _VOC, title="Pascal VOC 2012, no background", names="voc21.txt", first=1,
        classes=_without_zero(20), background=None, paper=85.65,
    ),
    "context59": dataclasses.replace(
        _CONTEXT, title="Pascal Context, no background", names="context60.txt", first=1,
        classes=_without_zero(59), background=None, paper=42.72,
    ),
    "context60": _CONTEXT,
    "coco_object80": dataclasses.replace(
        _COCO, title="COCO objects", names="coco_object81.txt", first=1,
        sources=_OBJECT_SOURCES, classes=_OBJECTS, paper=57.63,
    ),
    "coco_object81": dataclasses.replace(
        _COCO, title="COCO objects and background", names="coco_object81.txt", first=0,
        sources=_OBJECT_SOURCES, classes=_OBJECTS_OR_NOT, background="words", paper=None,
    ),
    "coco_stuff171": _COCO,
    "cityscapes": Published(
        title="Cityscapes",
        names="cityscapes19.txt", first=0,
        count=500,
        roots=("cityscapes", "."),
        images=("leftImg8bit/val/{}_leftImg8bit.png",),
        split="",
        sources=(
            Source("gtFine/val/{}_gtFine_labelTrainIds.png"),
            Source("gtFine/val/{}_gtFine_labelIds.png", _FROM_CITYSCAPES_IDS),
        ),
        classes=_same(19),
        paper=28.36,
    ),
    "ade150": Published(
        title="ADE20K",
        names="ade150.txt", first=0,
        count=2000,
        roots=("ade/ADEChallengeData2016", "ADEChallengeData2016", "."),
        images=("images/validation/{}.jpg",),
        split="",
        sources=(Source("annotations/validation/{}.png"),),
        classes=_without_zero(150),
        paper=16.25,
    ),
}  # fmt: skip
