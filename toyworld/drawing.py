"""How each word of the toy world looks: textures that fill a region, and things drawn as sprites.

Coordinates of a thing are u (right) and v (down) in [-1, 1]; colours are RGB, 1 is white. Light
comes from the upper left everywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Colour = tuple[float, float, float]
Random = np.random.Generator


def noise(random: Random, shape: tuple[int, int], scale: float | tuple[float, float]) -> np.ndarray:
    """Smooth value noise, float32 [*shape] in [0, 1]; `scale` (y, x): pixels from bump to bump."""
    scales = scale if isinstance(scale, tuple) else (scale, scale)
    cells = [int(np.ceil(side / step)) + 2 for side, step in zip(shape, scales, strict=True)]
    grid = random.random(cells, dtype=np.float32)
    for axis, (side, step) in enumerate(zip(shape, scales, strict=True)):
        position = np.arange(side, dtype=np.float32) / step
        index = position.astype(int)
        blend = position - index
        blend = np.expand_dims(blend * blend * (3 - 2 * blend), 1 - axis)
        below, above = np.take(grid, index, axis), np.take(grid, index + 1, axis)
        grid = below + (above - below) * blend
    return grid


def mix(first: np.ndarray | Colour, second: np.ndarray | Colour, amount: np.ndarray) -> np.ndarray:
    """From the first colour (amount 0) to the second (amount 1): float32 [H, W, 3]."""
    first, second = np.asarray(first, np.float32), np.asarray(second, np.float32)
    return first + (second - first) * np.clip(amount, 0, 1)[..., None]


def vary(random: Random, colour: Colour, spread: float = 0.04) -> np.ndarray:
    return np.asarray(colour, np.float32) + random.normal(0, spread, 3).astype(np.float32)


def pick(random: Random, *colours: Colour) -> np.ndarray:
    return vary(random, colours[random.integers(len(colours))])


# Stuff: (random, size) -> float32 [size, size, 3].


def sky(random: Random, size: int) -> np.ndarray:
    height = np.linspace(0, 1, size, dtype=np.float32)[:, None] * np.ones((1, size), np.float32)
    high = vary(random, (0.30, 0.60, 0.95))
    low = pick(random, (0.72, 0.90, 1.0), (0.95, 0.86, 0.88))
    clouds = 0.65 * noise(random, (size, size), (16, 30)) + 0.35 * noise(random, (size, size), 7)
    return mix(mix(high, low, height), (1, 1, 1), (clouds - 0.50) * 3.5)


def grass(random: Random, size: int) -> np.ndarray:
    blades = noise(random, (size, size), (4.5, 1.6))
    patches = noise(random, (size, size), 20)
    green = mix(vary(random, (0.25, 0.58, 0.16)), vary(random, (0.50, 0.76, 0.22)), patches)
    return green * (0.66 + 0.62 * blades[..., None])


def water(random: Random, size: int) -> np.ndarray:
    y = np.arange(size, dtype=np.float32)[:, None]
    swell = noise(random, (size, size), (24, 18)) * 9
    wave = np.sin(y * random.uniform(0.55, 0.85) + swell)
    dark, bright = vary(random, (0.05, 0.38, 0.62)), vary(random, (0.12, 0.58, 0.74))
    depth = mix(dark, bright, 0.5 + 0.5 * wave)
    return mix(depth, (0.88, 0.98, 1.0), (wave - 0.82) * 4 * noise(random, (size, size), (5, 12)))


def sand(random: Random, size: int) -> np.ndarray:
    x = np.arange(size, dtype=np.float32)[None]
    ripple = np.sin(x * 0.16 + noise(random, (size, size), 26) * 12)
    grain = noise(random, (size, size), 1.4)
    light = 0.84 + 0.06 * ripple + 0.26 * grain
    return vary(random, (0.93, 0.81, 0.56)) * light[..., None]


def brick_wall(random: Random, size: int) -> np.ndarray:
    high = random.integers(8, 13)
    long = 2 * high + random.integers(0, 4)
    y, x = np.mgrid[:size, :size] + random.integers(0, 40)
    row = y // high
    x = x + (row % 2) * (long // 2)
    tone = random.random((64, 64), dtype=np.float32)[row % 64, x // long % 64]
    brick = mix(vary(random, (0.66, 0.27, 0.20)), vary(random, (0.82, 0.44, 0.30)), tone)
    brick = brick * (0.88 + 0.22 * noise(random, (size, size), 2.5)[..., None])
    lit, dim = (y % high == 2) | (x % long == 2), (y % high == high - 1) | (x % long == long - 1)
    brick = brick * np.select([lit, dim], [1.14, 0.80], 1.0)[..., None].astype(np.float32)
    return mix(brick, vary(random, (0.86, 0.82, 0.76), 0.02), (y % high < 2) | (x % long < 2))


def wooden_floor(random: Random, size: int) -> np.ndarray:
    wide = random.integers(13, 20)
    y, x = np.mgrid[:size, :size]
    board = (x + random.integers(0, 40)) // wide
    tone = random.random(64, dtype=np.float32)[board % 64]
    rings = np.sin(x * 1.1 + noise(random, (size, size), (34, 7)) * 14 + board * 2.1)
    wood = mix(vary(random, (0.50, 0.31, 0.17)), vary(random, (0.68, 0.45, 0.25)), tone)
    wood = wood * (0.93 + 0.13 * rings[..., None]).astype(np.float32)
    gap = np.diff(board, axis=1, prepend=board[:, :1]) > 0
    return mix(wood, (0.22, 0.13, 0.08), 0.85 * gap)


STUFF: dict[str, Callable[[Random, int], np.ndarray]] = {
    "sky": sky,
    "grass": grass,
    "water": water,
    "sand": sand,
    "brick wall": brick_wall,
    "wooden floor": wooden_floor,
}


class Sprite:
    """A thing being painted on a transparent square, part over part."""

    def __init__(self, random: Random, side: int, turn: float, mirrored: bool):
        v, u = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j].astype(np.float32)
        self.light = 1.10 - 0.24 * np.clip((u + v) * 0.5 + 0.35, 0, 1)
        cosine, sine = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        u, v = cosine * u + sine * v, cosine * v - sine * u
        self.u, self.v = (-u if mirrored else u), v
        self.random = random
        self.rgb = np.zeros((side, side, 3), np.float32)
        self.covered = np.zeros((side, side), bool)

    def paint(self, where: np.ndarray, colour: np.ndarray | Colour) -> np.ndarray:
        colour = np.asarray(colour, np.float32)
        self.rgb[where] = colour[where] if colour.ndim == 3 else colour
        self.covered |= where
        return where

    def disc(self, u: float, v: float, radius: float, ratio: float = 1.0) -> np.ndarray:
        """bool: inside the ellipse; `ratio` is its height over its width."""
        return np.square(self.u - u) + np.square((self.v - v) / ratio) < radius * radius

    def box(self, left: float, top: float, right: float, bottom: float) -> np.ndarray:
        return (self.u > left) & (self.u < right) & (self.v > top) & (self.v < bottom)


def house(s: Sprite) -> None:
    u, v, random = s.u, s.v, s.random
    s.paint(s.box(0.32, -0.92, 0.52, -0.2), (0.40, 0.36, 0.42))
    boards = 0.93 + 0.07 * (np.sin(v * 24) > -0.6)[..., None]
    wall = vary(random, (0.98, 0.70, 0.76), 0.02)
    s.paint(s.box(-0.72, -0.1, 0.72, 0.9), wall * boards)
    for x in (-0.42, 0.42):
        s.paint(s.box(x - 0.2, 0.02, x + 0.2, 0.42), (1, 1, 1))
        s.paint(s.box(x - 0.15, 0.07, x + 0.15, 0.37), (0.24, 0.36, 0.58))
        s.paint(s.box(x - 0.03, 0.07, x + 0.03, 0.37), (1, 1, 1))
    s.paint(s.box(-0.15, 0.4, 0.15, 0.9), (0.62, 0.28, 0.46))
    s.paint(s.disc(0.08, 0.66, 0.04), (0.95, 0.8, 0.3))
    tiles = (np.sin(v * 26) > 0.1) ^ (np.sin(u * 19) > 0.75)
    roof = (v > -0.9) & (v < 0.02) & (np.abs(u) < (v + 0.9) * 0.98 + 0.06)
    s.paint(roof, mix(vary(random, (0.47, 0.50, 0.60), 0.02), (0.28, 0.30, 0.40), tiles))


def tree(s: Sprite) -> None:
    random = s.random
    bark = 0.85 + 0.2 * (np.sin(s.u * 40 + 3 * s.v) > 0)[..., None]
    s.paint(s.box(-0.14, 0.1, 0.14, 0.97), np.asarray((0.46, 0.29, 0.16)) * bark)
    crown = s.disc(0, -0.42, 0.54) | s.disc(0.42, -0.06, 0.42) | s.disc(-0.42, -0.06, 0.42)
    leaves = noise(random, s.u.shape, max(3.0, 0.07 * len(s.u)))
    dark, bright = vary(random, (0.01, 0.20, 0.17), 0.02), vary(random, (0.05, 0.40, 0.30), 0.02)
    s.paint(crown, mix(dark, bright, (leaves - 0.35) * 3))


def sun(s: Sprite) -> None:
    radius, angle = np.hypot(s.u, s.v), np.arctan2(s.v, s.u)
    rays = (radius < 0.98) & (np.cos(angle * 11) > (radius - 0.5) * 2.2 - 0.7)
    s.paint(rays, vary(s.random, (1.0, 0.62, 0.10), 0.03))
    s.paint(radius < 0.62, vary(s.random, (1.0, 0.88, 0.25), 0.02))
    for x in (-0.21, 0.21):
        s.paint(s.disc(x, -0.1, 0.075, 1.3), (0.35, 0.18, 0.05))
        s.paint(s.disc(x * 1.7, 0.1, 0.1), (1.0, 0.66, 0.30))
    s.paint((np.abs(np.hypot(s.u, s.v - 0.04) - 0.26) < 0.045) & (s.v > 0.14), (0.35, 0.18, 0.05))


def balloon(s: Sprite) -> None:
    u, v, random = s.u, s.v, s.random
    bag = s.disc(0, -0.22, 0.76) | ((v > 0.1) & (v < 0.56) & (np.abs(u) < 0.86 - v * 1.15))
    bulge = np.sin(np.clip(u / np.sqrt(np.clip(1 - np.square(v + 0.22), 0.08, 1)), -1, 1) * 9.5)
    first = vary(random, (0.04, 0.70, 0.62), 0.03)
    s.paint(bag, mix(first, (1.0, 0.95, 0.55), bulge > 0))
    s.paint(bag & (np.abs(v + 0.2) < 0.07), first * 0.7)
    s.paint((np.abs(np.abs(u) - 0.14) < 0.025) & (v > 0.5) & (v < 0.75), (0.3, 0.18, 0.1))
    weave = (np.sin(u * 40) > 0) ^ (np.sin(v * 40) > 0)
    s.paint(s.box(-0.19, 0.7, 0.19, 0.97), mix((0.60, 0.40, 0.20), (0.42, 0.25, 0.12), weave))


def sail_boat(s: Sprite) -> None:
    u, v, random = s.u, s.v, s.random
    s.paint(s.box(-0.04, -0.96, 0.04, 0.5), (0.42, 0.26, 0.16))
    stripes = mix((0.98, 0.97, 0.95), vary(random, (0.16, 0.20, 0.52), 0.02), np.sin(v * 24) > 0.2)
    main = (v > -0.9) & (v < 0.36) & (u > 0.05) & (u < 0.05 + (v + 0.9) * 0.62)
    s.paint(main, stripes)
    jib = (v > -0.7) & (v < 0.36) & (u < -0.05) & (u > -0.05 - (v + 0.7) * 0.62)
    s.paint(jib, stripes * 0.95)
    s.paint((v > -0.99) & (v < -0.85) & (u > 0.03) & (u < 0.3 - (v + 0.99)), (0.16, 0.20, 0.52))
    hull = (v > 0.42) & (v < 0.9) & (np.abs(u) < 0.97 - (v - 0.42) * 0.8)
    s.paint(hull, vary(random, (0.14, 0.16, 0.42), 0.02))
    s.paint(hull & (np.abs(v - 0.55) < 0.06), (0.97, 0.95, 0.9))


def fish(s: Sprite) -> None:
    u, v, random = s.u, s.v, s.random
    orange = vary(random, (1.0, 0.52, 0.10))
    tail = (u > 0.4) & (u < 0.97) & (np.abs(v) < (u - 0.36) * 0.95)
    s.paint(tail, mix(orange, (1, 0.8, 0.3), np.sin(v * 22)))
    fin = (np.abs(u) < 0.4) & (v > -0.66) & (v < 0) & (u > -0.75 - v)
    s.paint(fin, mix(orange, (1, 0.8, 0.3), np.sin(u * 22)))
    body = s.disc(-0.15, 0, 0.76, 0.66)
    stripes = np.cos((u + 0.1 + 0.25 * v * v) * 11)
    white = mix(orange, (1, 1, 0.96), (stripes - 0.25) * 8)
    s.paint(body, mix(white, (0.10, 0.09, 0.16), (stripes - 0.62) * 8))
    s.paint(body & (u < -0.56), orange)
    s.paint(s.disc(-0.64, -0.1, 0.125), (1, 1, 1))
    s.paint(s.disc(-0.66, -0.1, 0.065), (0.06, 0.06, 0.1))


def mushroom(s: Sprite) -> None:
    u, v, random = s.u, s.v, s.random
    stem = (np.abs(u) < 0.25 + 0.08 * v * v) & (v > 0) & (v < 0.95)
    s.paint(stem, mix((0.97, 0.91, 0.78), (0.80, 0.70, 0.55), (np.sin(u * 30) > 0.5)))
    s.paint(s.disc(0, 0.16, 0.7, 0.2), (0.86, 0.76, 0.62))
    cap = (v < 0.16) & s.disc(0, 0.16, 0.96, 1.12)
    s.paint(cap, vary(random, (0.86, 0.13, 0.14), 0.03))
    dots = ((-0.6, -0.1), (0, -0.6), (0.6, -0.12), (-0.08, -0.12), (-0.42, -0.52), (0.4, -0.52))
    for x, y in dots:
        x, y = x + random.normal(0, 0.04), y + random.normal(0, 0.04)
        s.paint(cap & s.disc(x, y, random.uniform(0.12, 0.19)), (1.0, 0.98, 0.94))


def flower(s: Sprite) -> None:
    u, v, random = s.u, s.v, s.random
    green = vary(random, (0.20, 0.55, 0.20), 0.03)
    s.paint((np.abs(u - 0.05 * np.sin(v * 5)) < 0.055) & (v > 0) & (v < 0.98), green)
    s.paint(s.disc(0.22, 0.72, 0.2, 0.5) | s.disc(-0.22, 0.82, 0.2, 0.5), green * 1.15)
    v = v + 0.3
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    petals = radius < 0.56 + 0.14 * np.cos(angle * 7)
    colour = vary(random, (0.60, 0.38, 0.98), 0.03)
    veins = 0.25 * (np.cos(angle * 7) < -0.1) + 0.5 * np.clip(0.42 - radius, 0, 1)
    s.paint(petals, mix(colour, colour * 0.55, veins))
    seeds = (np.sin(u * 38) > 0) ^ (np.sin(v * 38) > 0)
    s.paint(radius < 0.22, mix((1.0, 0.80, 0.15), (0.85, 0.52, 0.08), seeds))


def car(s: Sprite) -> None:
    u, v, random = s.u, s.v, s.random
    paint = vary(random, (0.92, 0.14, 0.56), 0.03)
    s.paint((v > -0.56) & (v < 0) & (np.abs(u) < 0.62 + (v + 0.1) * 0.4), paint * 0.88)
    for x in (-0.27, 0.27):
        pane = (np.abs(v + 0.24) < 0.19) & (np.abs(u - x) < 0.21)
        s.paint(pane, mix((0.72, 0.90, 0.98), (0.96, 1, 1), np.abs(u - x + v + 0.3) < 0.1))
    body = s.box(-0.97, -0.06, 0.97, 0.44) & ((np.abs(u) < 0.86) | (v > 0.06))
    s.paint(body, paint)
    s.paint(body & (np.abs(v - 0.2) < 0.03), paint * 0.65)
    s.paint(s.disc(-0.88, 0.13, 0.1), (1.0, 0.97, 0.7))
    s.paint(body & (u > 0.86) & (v < 0.26), (0.60, 0.05, 0.30))
    for x in (-0.52, 0.52):
        s.paint(s.disc(x, 0.46, 0.30), (0.12, 0.12, 0.15))
        s.paint(s.disc(x, 0.46, 0.15), (0.80, 0.82, 0.85))
        s.paint(s.disc(x, 0.46, 0.06), (0.35, 0.36, 0.40))


THINGS: dict[str, Callable[[Sprite], None]] = {
    "house": house,
    "tree": tree,
    "sun": sun,
    "balloon": balloon,
    "sail boat": sail_boat,
    "fish": fish,
    "mushroom": mushroom,
    "flower": flower,
    "car": car,
}
_ANY_WAY_UP = {"sun"}


def sprite(random: Random, word: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A thing in a square of `side` pixels: colour float32 [side, side, 3], cover [side, side].

    Drawn three times finer and averaged, so that edges are smooth. Colour outside the cover is 0.
    """
    turn = random.uniform(-3.1, 3.1) if word in _ANY_WAY_UP else random.normal(0, 0.12)
    drawn = Sprite(random, 3 * side, turn, mirrored=random.random() < 0.5)
    THINGS[word](drawn)
    premultiplied = drawn.rgb * (drawn.light * drawn.covered)[..., None]
    blocks = premultiplied.reshape(side, 3, side, 3, 3).mean((1, 3))
    cover = drawn.covered.reshape(side, 3, side, 3).mean((1, 3), dtype=np.float32)
    return blocks, cover
