"""A tiny DINOv2, self-supervised: neither labels nor text.

Two crops of a scene overlap. Each crop's patches are assigned to prototypes, evenly over the batch
(Sinkhorn-Knopp, as in DINOv2), and the other crop, of other scale and colours, has to predict the
assignment wherever the two show the same point. Clusters shared by the whole batch pull alike
patches of different scenes together, where a contrast between points would push them apart. A
moving-average teacher pays off in longer runs; in a short one it only lags, so there is none.
Besides, each patch, a third of them hidden, has to tell the pixels in and around it: what is near a
patch is then in its feature from the first steps on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import (
    avg_pool2d,
    cross_entropy,
    grid_sample,
    normalize,
    unfold,
)
from transformers import Dinov2Config, Dinov2Model

from toyworld.corpus import Boxes, Corpus, jitter
from toyworld.loop import fit

SIZE, PATCH = 128, 8
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STEPS, BATCH, PEAK = 1400, 16, 2e-3
CROP = 96
"""Side of a training crop in pixels; it shows a quarter to all of a scene's side."""
JITTER, HIDDEN = 0.05, 0.3
"""How much colours vary between crops, and the part of the patches that the model does not see."""
PROTOTYPES = 256
SHARP, SOFT = 0.03, 0.1
"""Temperatures of the assignments and of the predictions."""
POINTS = 10
"""Common points of two crops are a POINTS × POINTS grid over their overlap."""


class Student(nn.Module):
    """The model, a head that turns patches into unit vectors, and prototypes of them."""

    def __init__(self, seed: int):
        super().__init__()
        self.model = build(seed)
        self.head = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 64))
        self.prototypes = nn.Linear(64, PROTOTYPES, bias=False)
        self.surroundings = nn.Linear(128, 3 * 6 * 6)

    def forward(
        self, pixels: torch.Tensor, points: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines with the prototypes at points [b, P, P, 2]: [b·P·P, K]; and the error in pixels.

        `hidden` bool [b, n] are the patches that the model does not see.
        """
        found = patches(self.model, pixels, hidden)
        near = self.surroundings(found.flatten(2).transpose(1, 2))
        error = (near - _surroundings(pixels)).square().mean()
        seen = _at(found, points)
        cosines = normalize(self.head(seen), dim=-1) @ normalize(self.prototypes.weight, dim=-1).T
        return cosines, error


def build(seed: int) -> Dinov2Model:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "hidden_size": 128,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
    }
    settings |= {"mlp_ratio": 4, "image_size": SIZE, "patch_size": PATCH, "layerscale_value": 1.0}
    model = Dinov2Model(Dinov2Config(**settings))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return model


def normalised(images: torch.Tensor) -> torch.Tensor:
    """[b, 3, H, W] in [0, 1] → what the model takes."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, STD))
    return (images - mean) / std


def _surroundings(pixels: torch.Tensor) -> torch.Tensor:
    """The 3 × 3 patches about each patch, in 6 × 6 pixels: [b, n, 108]."""
    small = avg_pool2d(pixels, PATCH // 2)
    return unfold(small, 6, padding=2, stride=2).transpose(1, 2)


def patches(
    model: Dinov2Model, pixels: torch.Tensor, hidden: torch.Tensor | None = None
) -> torch.Tensor:
    """Normalised images [b, 3, H, W] → patch features [b, d, H/8, W/8]."""
    tokens = model(pixels, bool_masked_pos=hidden).last_hidden_state[:, 1:]
    side = pixels.shape[-1] // PATCH
    return tokens.transpose(1, 2).unflatten(2, (side, side))


@torch.no_grad()
def assign(logits: torch.Tensor, temperature: float, rounds: int = 3) -> torch.Tensor:
    """Sinkhorn-Knopp: similarities [n, K] → assignments [n, K]; rows sum to 1, columns to n / K."""
    q = torch.exp((logits - logits.max()) / temperature)
    for _ in range(rounds):
        q = q / q.sum(0, keepdim=True).clamp(min=1e-12)
        q = q / q.sum(1, keepdim=True).clamp(min=1e-12)
    return q


def _two_boxes(random: torch.Generator, count: int) -> tuple[Boxes, Boxes]:
    """Two squares in each image that overlap: the second's centre lies in the first."""
    u = torch.rand(2, 4, count, generator=random)
    half = 0.25 * 3 ** u[:, 0]  # a quarter of the side to three quarters
    half[1] = (half[0] * 2 ** (2 * u[1, 0] - 1)).clamp(0.25, 0.75)
    x, y = (2 * u[0, 1:3] - 1) * (1 - half[0])
    near = torch.stack([x, y]) + (u[1, 1:3] - 0.5) * half[0]
    x2, y2 = torch.maximum(torch.minimum(near, 1 - half[1]), half[1] - 1)
    flips = torch.where(u[:, 3] < 0.5, -1.0, 1.0)
    return Boxes(x, y, half[0], flips[0]), Boxes(x2, y2, half[1], flips[1])


def _common_points(a: Boxes, b: Boxes) -> tuple[torch.Tensor, torch.Tensor]:
    """The same points of the overlap in the coordinates of either crop: [b, P, P, 2] each."""
    steps = (torch.arange(POINTS) + 0.5) / POINTS
    ends = []
    for ca, cb in ((a.x, b.x), (a.y, b.y)):
        low = torch.maximum(ca - a.half, cb - b.half)[:, None]
        high = torch.minimum(ca + a.half, cb + b.half)[:, None]
        ends.append(low + steps * (high - low))
    x, y = ends[0][:, None].expand(-1, POINTS, -1), ends[1][..., None].expand(-1, -1, POINTS)
    grids = []
    for box in (a, b):
        half = box.half[:, None, None]
        u = (x - box.x[:, None, None]) / half * box.mirrored[:, None, None]
        grids.append(torch.stack([u, (y - box.y[:, None, None]) / half], -1))
    return grids[0], grids[1]


def _at(features: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Features [b, d, h, w] at points [b, P, P, 2], bilinear → [b·P·P, d]."""
    sampled = grid_sample(features, points, padding_mode="border", align_corners=False)
    return sampled.permute(0, 2, 3, 1).flatten(0, 2)


def train(work: Path, data: Corpus, *, seed: int, device: str, steps: int, batch: int):
    """Returns the model and what it took (see `fit`)."""
    student = Student(seed).to(device)

    def loss(random: torch.Generator, step: int) -> torch.Tensor:
        images = data.images[torch.randint(len(data), (batch,), generator=random)]
        boxes = _two_boxes(random, batch)
        views = torch.cat([jitter(random, box.cut(images, CROP) / 255, JITTER) for box in boxes])
        points = torch.cat(_common_points(*boxes))
        hidden = torch.rand(2 * batch, (CROP // PATCH) ** 2, generator=random) < HIDDEN
        cosines, error = student(normalised(views).to(device), points.to(device), hidden.to(device))
        first, second = cosines.chunk(2)
        swapped = cross_entropy(first / SOFT, assign(second, SHARP))
        swapped = swapped + cross_entropy(second / SOFT, assign(first, SHARP))
        return swapped / 2 + error

    spent = fit("dinov2", student, loss, steps, PEAK, work, seed)
    return student.model, spent


def save(folder: Path, model: Dinov2Model) -> None:
    """Writes `folder/dinov2`."""
    folder = folder / "dinov2"
    model.half().save_pretrained(folder)
    settings = {"image_mean": MEAN, "image_std": STD, "size": {"shortest_edge": SIZE}}
    settings |= {"crop_size": {"height": SIZE, "width": SIZE}}
    settings |= {"image_processor_type": "BitImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))
