"""Pictures: overlays, legends, contact sheets. numpy and Pillow alone."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from fmbseg_jax.outputs.colours import PAPER, UNLABELLED, palette
from fmbseg_jax.outputs.fonts import Font
from fmbseg_jax.vocabulary import IGNORE

_INK = (34, 36, 42)
_FAINT = (120, 122, 130)
_AT_ONCE = 1 << 20  # pixels mixed in floating point: of large images all would take gigabytes


def colourise(labels: np.ndarray, num_words: int) -> np.ndarray:
    """Label map [H, W] → uint8 [H, W, 3]; IGNORE is dark grey."""
    labels = np.asarray(labels)
    colours = np.vstack([palette(num_words), np.asarray([UNLABELLED], np.uint8)])
    return colours[np.where(labels == IGNORE, num_words, labels)]


def overlay(
    image: np.ndarray, labels: np.ndarray, num_words: int, opacity: float = 0.6
) -> np.ndarray:
    """The image [H, W, 3] under its label map [H, W], with a thin light line between words."""
    labels = np.asarray(labels)
    edge = np.zeros(labels.shape, bool)
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge[1:] |= labels[1:] != labels[:-1]
    painted = np.empty_like(image)
    rows = max(1, _AT_ONCE // image.shape[1])
    for top in range(0, len(image), rows):
        strip = slice(top, top + rows)
        mixed = image[strip] * np.float32(1 - opacity)
        mixed += colourise(labels[strip], num_words) * np.float32(opacity)
        mixed[edge[strip]] = mixed[edge[strip]] * 0.35 + 255 * 0.65
        painted[strip] = mixed
    return painted


def with_legend(
    picture: np.ndarray, labels: np.ndarray, words: Sequence[str], ignored: str
) -> np.ndarray:
    """A picture [H, W, 3] of a label map [H, W], and under it the words that are there.

    Args:
      ignored: what pixels of label IGNORE are called.
    """
    present = np.unique(labels)
    size = int(np.clip(picture.shape[1] // 40, 13, 40))
    below = legend(
        words,
        max(picture.shape[1], 20 * size),
        [int(i) for i in present if i != IGNORE],
        size,
        ignored if IGNORE in present else "",
    )
    height, width = picture.shape[0] + len(below), below.shape[1]
    sheet = np.full((height, width, 3), PAPER, np.uint8)
    sheet[: picture.shape[0], : picture.shape[1]] = picture
    sheet[picture.shape[0] :] = below
    return sheet


def percent(share: float) -> str:
    """A share of the pixels, as text: "12 %", "<1 %"."""
    return f"{100 * share:.0f} %" if share >= 0.01 or not share else "<1 %"


def heat_map(values: np.ndarray) -> np.ndarray:
    """float [H, W] → uint8 [H, W, 3], dark blue (lowest) over green to yellow (highest)."""
    span = float(values.max() - values.min()) or 1.0
    stops = np.asarray(
        [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], np.float64
    )
    at = (values - values.min()) / span * (len(stops) - 1)
    below = np.minimum(at.astype(int), len(stops) - 2)
    part = (at - below)[..., None]
    return (stops[below] * (1 - part) + stops[below + 1] * part).astype(np.uint8)


def legend(
    words: Sequence[str],
    width: int,
    present: Sequence[int] | None = None,
    size: int = 15,
    ignored: str = "",
) -> np.ndarray:
    """uint8 [h, width, 3]: a swatch and the name of each word in `present` (default: all).

    Args:
      ignored: what pixels of label IGNORE are called, at the end of the legend; "": nothing.
    """
    indices = list(range(len(words)) if present is None else present)
    colours = np.vstack([palette(len(words)), np.asarray([UNLABELLED], np.uint8)])
    if ignored:
        indices.append(len(words))
    words = [*words, ignored]
    letters = Font(size)
    entries, x, y = [], 0, 0
    for i in indices:
        step = int(letters.length(words[i])) + 2 * size + 16
        if x and x + step > width:
            x, y = 0, y + size + 12
        entries.append((i, x, y))
        x += step
    canvas = Image.new("RGB", (width, y + size + 12), PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, x, y in entries:
        box = (x, y + 3, x + size + 3, y + size + 6)
        draw.rounded_rectangle(box, 4, tuple(colours[i].tolist()))
        letters.draw(draw, (x + size + 10, y + 2), words[i], _INK)
    return np.asarray(canvas)


def contact_sheet(
    columns: Sequence[str],
    examples: Sequence[Sequence[np.ndarray]],
    words: Sequence[str],
    *,
    across: int = 1,
    title: str = "",
    subtitle: str = "",
    tile: int = 192,
    captions: Sequence[str] = (),
    present: Sequence[int] | None = None,
    ignored: str = "",
) -> np.ndarray:
    """Pictures in a grid under column headings, with a legend of the words below.

    Args:
      columns: the heading of each column.
      examples: for each, its uint8 [H, W, 3] pictures, as many as there are columns.
      across: examples in a row.
      tile: side of the square that each picture is fitted into, in pixels; a row of wide pictures
        is as high as they are.
      captions: a few words on each example, laid over its first picture.
      present: words in the legend; default: all.
      ignored: as for `legend`.

    Returns:
      uint8 [h, w, 3].
    """
    margin, gap = 28, 8
    across = min(across, len(examples))
    headings = list(columns) * across
    tiles = [Image.fromarray(fit(picture, tile)) for example in examples for picture in example]
    rows = [tiles[i : i + len(headings)] for i in range(0, len(tiles), len(headings))]
    heights = [max(picture.height for picture in row) for row in rows]

    width = 2 * margin + len(headings) * (tile + gap) - gap
    width = max(width, 2 * margin + int(Font(28).length(title)))
    words_below = legend(words, width - 2 * margin, present, ignored=ignored)
    top = margin + (44 if title else 0) + (26 if subtitle else 0) + 32
    bottom = top + sum(heights) + gap * len(rows) + 12
    sheet = Image.new("RGB", (width, bottom + len(words_below) + margin // 2), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        Font(28).draw(draw, (margin, margin - 6), title, _INK)
    if subtitle:
        Font(15).draw(draw, (margin, margin + (38 if title else 0)), subtitle, _FAINT)
    for j, heading in enumerate(headings):
        centre = margin + j * (tile + gap) + tile // 2
        Font(16).draw(draw, (centre, top - 12), heading, _INK, "ms")
    said = iter(captions)
    for row, height in zip(rows, heights, strict=True):
        for j, picture in enumerate(row):
            left = margin + j * (tile + gap)
            at = (left + (tile - picture.width) // 2, top + (height - picture.height) // 2)
            sheet.paste(picture, at, _rounded(picture.size))
            if j % len(columns) == 0 and (caption := next(said, "")):
                _write(draw, (left + 6, at[1] + 6), caption, tile - 20)
        top += height + gap
    sheet.paste(Image.fromarray(words_below), (margin, bottom))
    return np.asarray(sheet)


def matrix(
    values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str
) -> np.ndarray:
    """A heat map [r, c] with a name for every row and column → uint8 [h, w, 3]."""
    cell = int(np.clip(900 // max(values.shape), 9, 28))
    letters = Font(max(8, cell - 6))
    left, top = (int(max(letters.length(name) for name in names)) + 20 for names in (rows, columns))
    height, width = (n * cell for n in values.shape)
    top += 50
    width_of_all = max(left + width, int(Font(16).length(title)) + 16) + 20
    sheet = Image.new("RGB", (width_of_all, top + height + 20), PAPER)
    picture = Image.fromarray(heat_map(values)).resize((width, height), Image.Resampling.NEAREST)
    sheet.paste(picture, (left, top))
    draw = ImageDraw.Draw(sheet)
    Font(16).draw(draw, (16, 14), title, _INK)
    for i, name in enumerate(rows):
        letters.draw(draw, (left - 8, top + (i + 0.5) * cell), name, _INK, "rm")
    upright = Image.new("RGB", (top - 58, width), PAPER)  # drawn lying, then turned
    draw = ImageDraw.Draw(upright)
    for j, name in enumerate(columns):
        letters.draw(draw, (0, (j + 0.5) * cell), name, _INK, "lm")
    sheet.paste(upright.transpose(Image.Transpose.ROTATE_90), (left, 50))
    return np.asarray(sheet)


def png(picture: np.ndarray) -> bytes:
    """A picture uint8 [H, W, 3], or grey [H, W], as a PNG file."""
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "PNG")
    return data.getvalue()


def fit(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture uint8 [H, W, 3], its longer side as long as `side`."""
    image = Image.fromarray(picture)
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS))


def _rounded(size: tuple[int, int]) -> Image.Image:
    """Mask of a picture with rounded corners; (width, height) in pixels."""
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, size[0] - 1, size[1] - 1), 6, 255)
    return mask


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, width: int) -> None:
    """A line on paper; of one that is too wide the end, where file names differ."""
    letters, whole = Font(14), text
    while whole and letters.length(text) > width:
        whole = whole[1:]
        text = f"…{whole}"
    box = letters.box(draw, at, text)
    draw.rounded_rectangle((box[0] - 4, box[1] - 4, box[2] + 4, box[3] + 4), 4, PAPER)
    letters.draw(draw, at, text, _INK)
