"""Colours of words: as far apart as can be, and the same for a word in every picture."""

from __future__ import annotations

import functools

import numpy as np

UNLABELLED = (38, 40, 46)
PAPER = (250, 249, 246)
_FIRST = (76, 124, 210)
_LEVELS = 16  # of each channel, among which colours are chosen
_LIGHTNESS, _CHROMA = (32, 88), (28, 75)  # neither black, white, grey nor glaring


def palette(num_words: int) -> np.ndarray:
    """uint8 [num_words, 3]: a colour for each word; that of a word depends on its place alone.

    Each next one is the colour farthest (CIE L*a*b*) from all before it, and from paper and dark
    grey. After some 2,000 words they begin anew.
    """
    colours = _ordered()
    return colours[np.arange(num_words) % len(colours)]


@functools.cache
def _ordered() -> np.ndarray:
    """uint8 [n, 3]: all colours to choose from, each as far as can be from those before it."""
    levels = np.linspace(0, 255, _LEVELS).round()
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    lab = _lab(colours)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    kept = (_LIGHTNESS[0] < lab[:, 0]) & (lab[:, 0] < _LIGHTNESS[1])
    kept &= (_CHROMA[0] < chroma) & (chroma < _CHROMA[1])
    colours, lab = colours[kept], lab[kept]

    def distance(colour: np.ndarray) -> np.ndarray:
        return np.linalg.norm(lab - colour, axis=1)

    nearest = np.minimum(*(distance(other) for other in _lab(np.array([UNLABELLED, PAPER]))))
    order = [int(distance(_lab(np.array([_FIRST]))[0]).argmin())]
    while len(order) < len(colours):
        nearest = np.minimum(nearest, distance(lab[order[-1]]))
        nearest[order] = -1
        order.append(int(nearest.argmax()))
    return colours[order].astype(np.uint8)


def _lab(colours: np.ndarray) -> np.ndarray:
    """sRGB [n, 3] in [0, 255] → CIE L*a*b* (D65), in which distances are as large as they look."""
    part = colours / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
         [0.0193339, 0.1191920, 0.9503041]]
    )  # fmt: skip
    xyz = linear @ to_xyz.T / [0.95047, 1, 1.08883]
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
