"""Generated scenes with exact ground truth: the toy world's photographs.

One to three regions of stuff lie behind two to five things, which overlap. A scene is a function
of its seed alone. Things prefer plausible places (fish: water) but are found anywhere, so that a
word can be told from what it looks like and not from where it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fmbseg_jax.io.files import write_atomically
from fmbseg_jax.outputs.overlays import png
from toyworld import drawing

STUFF = tuple(drawing.STUFF)
THINGS = tuple(drawing.THINGS)
WORDS: tuple[str, ...] = STUFF + THINGS
SPLITS = {"pretrain": 0, "train": 1_000_000, "validation": 2_000_000, "test": 3_000_000}
"""First seed of each split. A split ends where the next begins, so no two share a scene."""

_HOMES = {
    "house": ("grass", "sand"),
    "tree": ("grass", "sand"),
    "sun": ("sky",),
    "balloon": ("sky",),
    "sail boat": ("water",),
    "fish": ("water",),
    "mushroom": ("grass", "wooden floor"),
    "flower": ("grass", "brick wall"),
    "car": ("sand", "brick wall"),
}
_MOST_HIDDEN = 0.45
"""A thing is put down only where it leaves this much less than all of every other visible."""


@dataclass(frozen=True)
class Scene:
    """image: uint8 [H, W, 3], RGB; labels: uint16 [H, W], index into WORDS;
    instances: uint16 [H, W], 0 to the number of regions and things, less one."""

    image: np.ndarray
    labels: np.ndarray
    instances: np.ndarray


def scene(seed: int, size: int = 128) -> Scene:
    """The scene of a seed, size × size pixels."""
    random = np.random.default_rng(seed)
    image, words, instances = _background(random, size)
    areas = np.bincount(instances.ravel()).astype(float)  # what each instance had when put down
    for word, radius in _cast(random, size):
        side = 2 * radius
        colour, cover = drawing.sprite(random, word, side)
        for attempt in range(8):
            y, x = random.integers(-radius // 2, size - side + radius // 2 + 1, 2)
            centre = np.clip((y + radius, x + radius), 0, size - 1)
            below = WORDS[words[instances[tuple(centre)]]]
            if attempt < 4 and below not in _HOMES[word] and random.random() < 0.6:
                continue
            placed = _place(cover, (y, x), size)
            solid = placed >= 0.5
            after = np.bincount(instances[~solid], minlength=len(words))
            if solid.sum() > 30 and np.all(after >= (1 - _MOST_HIDDEN) * areas):
                _shade(image, placed, radius)
                image *= 1 - placed[..., None]
                image += _place(colour, (y, x), size)
                instances[solid] = len(words)
                words.append(WORDS.index(word))
                areas = np.append(areas, solid.sum())
                break
    light = random.normal(1, 0.04, 3) * random.uniform(0.92, 1.06)
    image = image * light + random.normal(0, 0.01, image.shape)
    return Scene(
        image=np.round(np.clip(image, 0, 1) * 255).astype(np.uint8),
        labels=np.asarray(words, np.uint16)[instances],
        instances=instances.astype(np.uint16),
    )


def _background(random: np.random.Generator, size: int) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Regions of stuff: image float32 [size, size, 3], word of each region, instances [size, size].

    A horizon, a slanting border, a pond in a plain, or stuff as far as one sees.
    """
    count = random.choice([1, 2, 3], p=[0.15, 0.6, 0.25])
    words = [int(i) for i in random.permutation(len(STUFF))[:count]]
    if STUFF.index("sky") in words[1:] and random.random() < 0.7:
        words.remove(STUFF.index("sky"))
        words.insert(0, STUFF.index("sky"))
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    image = drawing.STUFF[STUFF[words[0]]](random, size)
    instances = np.zeros((size, size), int)
    for i, word in enumerate(words[1:], 1):
        wobble = (drawing.noise(random, (size, size), size / 5) - 0.5) * 0.16
        kind = random.random()
        if kind < 0.6:
            inside = y + wobble - random.uniform(-0.3, 0.3) * (x - 0.5) - random.uniform(0.3, 0.65)
        elif kind < 0.8:
            inside = (x + wobble - random.uniform(0.35, 0.65)) * random.choice([-1, 1])
        else:
            centre = random.uniform(0.25, 0.75, 2)
            inside = 0.32 - np.hypot(x - centre[0], 1.5 * (y - centre[1])) + wobble
        cover = np.clip(inside * size + 0.5, 0, 1)[..., None]
        image = image * (1 - 0.3 * np.exp(-np.abs(inside * size) / 2)[..., None])
        image = image * (1 - cover) + drawing.STUFF[STUFF[word]](random, size) * cover
        instances[inside >= 0] = i
    # A region that later ones covered (nearly) whole would be an instance that nobody sees.
    counts = np.bincount(instances.ravel(), minlength=len(words))
    seen = [i for i in range(len(words)) if counts[i] > 0]
    return image, [words[i] for i in seen], np.searchsorted(seen, instances)


def _cast(random: np.random.Generator, size: int) -> list[tuple[str, int]]:
    """The things of a scene and their radii in pixels, far (small) to near (large), loosely."""
    count = random.integers(2, 6)
    kinds = random.choice(len(THINGS), count)
    if random.random() < 0.4:  # two of a kind
        kinds[-1] = kinds[0]
    radii = np.exp(random.uniform(np.log(0.11), np.log(0.26), count)) * size
    order = np.argsort(radii + random.normal(0, 0.03, count) * size)
    return [(THINGS[kinds[i]], int(radii[i])) for i in order]


def _place(patch: np.ndarray, corner: tuple[int, int], size: int) -> np.ndarray:
    """A sprite's plane(s) [s, s, ...] on an empty canvas [size, size, ...], cut at its borders."""
    canvas = np.zeros((size, size, *patch.shape[2:]), np.float32)
    (y, x), side = corner, len(patch)
    top, left, bottom, right = max(y, 0), max(x, 0), min(y + side, size), min(x + side, size)
    canvas[top:bottom, left:right] = patch[top - y : bottom - y, left - x : right - x]
    return canvas


def _shade(image: np.ndarray, cover: np.ndarray, radius: int) -> None:
    """Darkens `image` in place by a soft shadow to the lower right, longer for larger things."""
    reach = max(2, radius // 5)
    shadow = cover
    for axis in (0, 1):
        behind = [(2 * reach, 0) if a == axis else (0, 0) for a in (0, 1)]
        sums = np.cumsum(np.pad(shadow, behind), axis)
        earlier, later = (np.roll(sums, shift, axis) for shift in (0, -2 * reach))
        kept = np.arange(sums.shape[axis] - 2 * reach)
        shadow = np.take(later - earlier, kept, axis) / (2 * reach)
    image *= 1 - 0.38 * shadow[..., None]


def write_folder(folder: str | Path, split: str, count: int, offset: int = 0) -> Path:
    """Writes scenes `offset` to `offset + count` of a split: an annotated folder of images.

    `images/NAME.png`, `labels/NAME.png` (8-bit, index into `words.txt`) and `words.txt`. Each file
    appears whole or not at all, and those that are there are kept: a killed run is run again.
    """
    folder = Path(folder)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if not (folder / "words.txt").exists():
        write_atomically(folder / "words.txt", "".join(f"{word}\n" for word in WORDS).encode())
    for i in range(offset, offset + count):
        image, labels = (folder / kind / f"{split}_{i:06d}.png" for kind in ("images", "labels"))
        if not (image.exists() and labels.exists()):
            drawn = scene(SPLITS[split] + i)
            write_atomically(image, png(drawn.image))
            write_atomically(labels, png(drawn.labels.astype(np.uint8)))
    return folder
