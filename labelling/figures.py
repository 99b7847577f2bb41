"""Figures of stage 1: similarities, query points as green stars, masks (paper, Figs. 2, 3, 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from etils import epath
from PIL import Image, ImageDraw

from fmbseg_jax.data import images, label_maps
from fmbseg_jax.data.example import PseudoLabel, read_pseudo_label
from fmbseg_jax.data.records import open_records
from fmbseg_jax.io import files
from fmbseg_jax.outputs import overlays
from fmbseg_jax.outputs.fonts import Font
from fmbseg_jax.vocabulary import IGNORE, unlike
from labelling.compose import pixel_similarities
from labelling.stage1 import Scene

_SIDE = 512
"""Long side of the pictures, in pixels."""
_GREEN = 60, 220, 90
_STAR = np.stack(
    [
        np.where(np.arange(10) % 2, 0.42, 1) * np.sin(np.arange(10) * np.pi / 5),
        np.where(np.arange(10) % 2, -0.42, -1) * np.cos(np.arange(10) * np.pi / 5),
    ],
    axis=-1,
)
"""float [10, 2], corners (x, y) of a star of radius 1, tip up."""


def draw(
    out: epath.Path,
    label: PseudoLabel,
    words: Sequence[str],
    scene: Scene | None,
    reading: images.Reading,
) -> None:
    """Draws a record as `out`/FILENAME.png."""
    path = _path(out, label)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, overlays.png(label_sheet(label, words, scene, reading)))


def draw_records(
    folder: epath.Path,
    out: epath.Path,
    count: int,
    words: Sequence[str],
    look: Callable[[PseudoLabel], Scene | None],
    reading: images.Reading,
) -> None:
    """Draws those of the first `count` records of a dataset that are not drawn yet."""
    records = open_records(folder)
    for i in range(min(count, len(records))):
        with records.naming(i):
            label = read_pseudo_label(records, i, len(words))
            if not _path(out, label).exists():
                draw(out, label, words, look(label), reading)


def _path(out: epath.Path, label: PseudoLabel) -> epath.Path:
    """a.jpg.png: beside it there may be an a.png, with a.png.png."""
    return out / f"{label.filename}.png"


def label_sheet(
    label: PseudoLabel,
    words: Sequence[str],
    scene: Scene | None = None,
    reading: images.Reading = images.USUAL,
) -> np.ndarray:
    """A record as a picture, uint8 [h, w, 3]: with its scene, a row for each word found."""
    image = label_maps.image_of(label.labels, label.image, label.filename, reading)
    whole = overlays.overlay(image, label.labels, len(words))
    if scene is None or not len(scene.found):
        columns = ["image", "labels"]
        rows = [[image, whole]]
    else:
        columns = ["query points", "similarity", "1.1", "1.2", "pseudo label"]
        blank = np.full_like(image, overlays.PAPER)
        rows = [
            [*word_pictures(image, label, scene, words, i), whole if i == 0 else blank]
            for i in range(len(scene.found))
        ]
    covered = np.mean(label.labels != IGNORE)
    return overlays.contact_sheet(
        columns,
        rows,
        words,
        title=label.filename,
        subtitle=f"{len(label.found)} words found, {covered:.0%} of the pixels labelled",
        present=sorted({*label.found.tolist(), *np.unique(label.labels).tolist()} - {IGNORE}),
        ignored=unlike("no word", words) if IGNORE in label.labels else "",
    )


def word_pictures(
    image: np.ndarray, label: PseudoLabel, scene: Scene, words: Sequence[str], index: int
) -> list[np.ndarray]:
    """Points, similarity map, mask of 1.1 and masks of 1.2, for the index-th word found."""
    word = int(scene.found[index])
    votes = int(scene.votes[index])
    caption = words[word] if votes < 0 else f"{words[word]}, {votes} votes"
    picture = draw_points(image, label.points[label.point_words == word], caption)
    masks = []
    for stage in (11, 12):
        chosen = (scene.mask_words == index) & (scene.mask_stages == stage)
        labels = np.where(scene.masks[chosen].union(), word, IGNORE)
        masks.append(overlays.overlay(image, labels, len(words)))
    return [picture, similarity_map(scene.similarities[..., word], image.shape[:2]), *masks]


def similarity_map(similarities: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """float [h, w], one word's similarities → uint8 [H, W, 3]."""
    strips = [values[0] for _, values in pixel_similarities(similarities[..., None], shape)]
    return overlays.heat_map(np.concatenate(strips))


def draw_points(image: np.ndarray, points: np.ndarray, caption: str = "") -> np.ndarray:
    """The image, enlarged, with a green star at each point, float [p, 2], (x, y) in its pixels."""
    scale = _SIDE / max(image.shape[:2])
    size = tuple(max(1, round(side * scale)) for side in image.shape[1::-1])
    picture = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for point in points:
        corners = point * scale + _STAR * (_SIDE / 28)
        draw.polygon([tuple(corner) for corner in corners.tolist()], _GREEN, "black", 2)
    if caption:
        letters = Font(_SIDE // 14)
        box = letters.box(draw, (_SIDE // 40, _SIDE // 50), caption)
        draw.rectangle((0, 0, box[2] + _SIDE // 40, box[3] + _SIDE // 50), "white")
        letters.draw(draw, (_SIDE // 40, _SIDE // 50), caption, "black")
    return np.asarray(picture)
