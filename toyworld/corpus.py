"""Scenes as tensors: drawn once by all processors, kept in the work folder, cut into crops."""

from __future__ import annotations

import io
import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import affine_grid, grid_sample
from tqdm import tqdm

from fmbseg_jax.io.files import write_atomically
from toyworld.scenes import SPLITS, scene


@dataclass(frozen=True)
class Corpus:
    """images: uint8 [n, 3, H, W]; labels, instances: uint8 [n, H, W], as in scenes.Scene."""

    images: torch.Tensor
    labels: torch.Tensor
    instances: torch.Tensor

    def to(self, device: str) -> Corpus:
        return Corpus(*(part.to(device) for part in (self.images, self.labels, self.instances)))

    def __len__(self) -> int:
        return len(self.images)


def _planes(seed: int) -> np.ndarray:
    """uint8 [H, W, 5]: image, labels, instances of one scene."""
    drawn = scene(seed)
    return np.dstack([drawn.image, drawn.labels, drawn.instances]).astype(np.uint8)


def corpus(split: str, count: int, folder: Path | None = None) -> Corpus:
    """The first `count` scenes of a split; with `folder`, from there if it has them."""
    path = folder / f"{split}_{count}.npy" if folder else None
    if path and path.exists():
        planes = np.load(path)
    else:
        seeds = range(SPLITS[split], SPLITS[split] + count)
        if count > 200:
            with multiprocessing.get_context("spawn").Pool() as pool:
                drawn = pool.imap(_planes, seeds, chunksize=20)
                planes = np.stack(list(tqdm(drawn, f"{split} scenes", count, unit="scene")))
        else:
            planes = np.stack([_planes(seed) for seed in seeds])
        planes = np.ascontiguousarray(planes.transpose(0, 3, 1, 2))
        if path:
            _keep(path, planes)
    tensor = torch.from_numpy(planes)
    return Corpus(tensor[:, :3], tensor[:, 3], tensor[:, 4])


def _keep(path: Path, planes: np.ndarray) -> None:
    stream = io.BytesIO()
    np.save(stream, planes)
    write_atomically(path, stream.getvalue())


@dataclass(frozen=True)
class Boxes:
    """Squares in images: x, y of the centre and side, in [-1, 1] of the image; mirrored is ±1."""

    x: torch.Tensor
    y: torch.Tensor
    half: torch.Tensor
    mirrored: torch.Tensor

    def grid(self, size: int) -> torch.Tensor:
        """Where a crop of size × size samples the image: float [b, size, size, 2], (x, y)."""
        zero = torch.zeros_like(self.x)
        rows = [self.half * self.mirrored, zero, self.x], [zero, self.half, self.y]
        theta = torch.stack([torch.stack(row, -1) for row in rows], 1)
        return affine_grid(theta, [len(self.x), 1, size, size], align_corners=False)

    def cut(self, images: torch.Tensor, size: int) -> torch.Tensor:
        """Crops of images [b, c, H, W] → float32 [b, c, size, size], bilinear."""
        return grid_sample(
            images.float(), self.grid(size), padding_mode="reflection", align_corners=False
        )


def random_boxes(random: torch.Generator, count: int, smallest: float, largest: float) -> Boxes:
    """Squares inside the image with sides `smallest` to `largest` of its side, log-uniform."""
    u = torch.rand(4, count, generator=random)
    half = torch.exp(np.log(smallest) + u[0] * (np.log(largest) - np.log(smallest)))
    x, y = (2 * u[1] - 1) * (1 - half), (2 * u[2] - 1) * (1 - half)
    return Boxes(x, y, half, torch.where(u[3] < 0.5, -1.0, 1.0))


def jitter(random: torch.Generator, images: torch.Tensor, strength: float) -> torch.Tensor:
    """Varies gains of the channels, brightness and contrast: images [b, 3, H, W] in [0, 1]."""
    draw = torch.randn(len(images), 5, 1, 1, generator=random).to(images) * strength
    mean = images.mean((1, 2, 3), keepdim=True)
    contrast, light, gains = 1 + 1.5 * draw[:, 3:4], draw[:, 4:5], 1 + draw[:, :3]
    return ((images - mean) * contrast + mean + light) * gains


def confusion(truth: torch.Tensor, predicted: torch.Tensor, words: int) -> torch.Tensor:
    """Pixels by true (row) and predicted word: int64 [words, words]; both maps int64."""
    pairs = (truth * words + predicted).flatten()
    return torch.bincount(pairs, minlength=words * words).view(words, words)


def mean_iou(counts: torch.Tensor) -> float:
    """Mean intersection over union of a confusion matrix, over the words that occur in it."""
    hits, either = counts.diag(), counts.sum(0) + counts.sum(1) - counts.diag()
    return float((hits / either)[either > 0].mean())
