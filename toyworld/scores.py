"""What the three models are worth on validation scenes: the figures on their card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate, normalize, one_hot
from transformers import CLIPModel, CLIPTokenizer, Dinov2Model

from fmbseg_jax.vocabulary import TEMPLATE
from toyworld import clip, dinov2, sam
from toyworld.corpus import confusion, corpus, mean_iou
from toyworld.scenes import STUFF, WORDS


@torch.inference_mode()
def _crops(model: CLIPModel, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [b, 3, 128, 128] → class tokens of 49 crops [b, 49, D], patches [b, 32, 32, D]."""
    large = interpolate(images.float(), scale_factor=2, mode="bilinear", align_corners=False)
    windows = large.unfold(2, 64, 32).unfold(3, 64, 32)  # [b, 3, 7, 7, 64, 64]
    b, _, rows, columns = windows.shape[:4]
    windows = windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 64, 64)
    vision, block = model.vision_model, model.vision_model.encoder.layers[-1]
    output = vision(clip.normalised(windows.to(model.device)), output_hidden_states=True)
    values = block.self_attn.v_proj(block.layer_norm1(output.hidden_states[-2][:, 1:]))
    values = model.visual_projection(vision.post_layernorm(block.self_attn.out_proj(values)))
    tokens = model.visual_projection(output.pooler_output).reshape(b, rows * columns, -1)
    total, count = torch.zeros(b, 32, 32, values.shape[-1]), torch.zeros(1, 32, 32, 1)
    values = values.reshape(b, rows, columns, 8, 8, -1).cpu()
    for y in range(rows):
        for x in range(columns):
            total[:, 4 * y : 4 * y + 8, 4 * x : 4 * x + 8] += values[:, y, x]
            count[:, 4 * y : 4 * y + 8, 4 * x : 4 * x + 8] += 1
    return normalize(tokens, dim=-1).cpu(), normalize(total / count, dim=-1)


@torch.inference_mode()
def of_clip(model: CLIPModel, words: CLIPTokenizer, count: int = 100) -> dict[str, float]:
    """Detection by votes, patches alone, and naming of true masks, on validation scenes."""
    model.eval().float()
    data = corpus("validation", count)
    texts = clip.text_features(model, words, [TEMPLATE.format(word) for word in WORDS]).cpu()
    votes, present, named = [], [], []
    counts = torch.zeros(len(WORDS), len(WORDS))
    for part in range(0, count, 10):
        labels, instances = (x[part : part + 10].long() for x in (data.labels, data.instances))
        tokens, patches = _crops(model, data.images[part : part + 10])
        votes.append(one_hot((tokens @ texts.T).argmax(-1), len(WORDS)).sum(1))
        there = one_hot(labels.flatten(1), len(WORDS)).amax(1) > 0
        present.append(there)
        similarity = interpolate((patches @ texts.T).permute(0, 3, 1, 2), size=128, mode="bilinear")
        counts += confusion(labels, similarity.argmax(1), len(WORDS))
        for one, among, truth, parts in zip(similarity, there, labels, instances, strict=True):
            for k in parts.unique():
                mean = one[:, parts == k].mean(1).masked_fill(~among, -1)
                named.append(bool(mean.argmax() == truth[parts == k][0]))
    vote, there = torch.cat(votes), torch.cat(present)
    scores = {}
    for least in (1, 2):
        hits = int(((vote >= least) & there).sum())
        scores[f"detection precision, votes >= {least}"] = hits / max(1, int((vote >= least).sum()))
        scores[f"detection recall, votes >= {least}"] = hits / int(there.sum())
    scores["patches alone, mIoU"] = mean_iou(counts)
    return scores | {"true masks named": sum(named) / len(named)}


@torch.inference_mode()
def _features(model: Dinov2Model, images: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 3, 128, 128] → features [n, d, 32, 32] of the images enlarged to 256 pixels."""
    device = next(model.parameters()).device
    found = []
    for part in images.split(10):
        large = interpolate(part.to(device) / 255, scale_factor=2, mode="bilinear")
        found.append(dinov2.patches(model, dinov2.normalised(large)).cpu())
    return torch.cat(found)


class _Block(nn.Module):
    """The second probe: one transformer block and a linear layer."""

    def __init__(self, width: int):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(
            width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.linear = nn.Linear(width, len(WORDS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.block(x))


def _probe(
    train: torch.Tensor,
    labels: torch.Tensor,
    test: torch.Tensor,
    truth: torch.Tensor,
    head: nn.Module,
    epochs: int,
    peak: float,
) -> float:
    """mIoU at pixels of a head trained on features [n, d, 32, 32] with labels [n, 128, 128]."""
    train, test = (f.flatten(2).transpose(1, 2) for f in (train, test))
    mean, std = train.mean((0, 1)), train.std((0, 1)) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    cells = labels.unflatten(2, (32, 4)).unflatten(1, (32, 4)).transpose(2, 3).flatten(3)
    targets = cells.long().mode(-1).values.flatten(1)
    optimizer = torch.optim.AdamW(head.parameters(), peak, weight_decay=0.01)
    random = torch.Generator().manual_seed(0)
    order = [torch.randperm(len(train), generator=random).split(8) for _ in range(epochs)]
    batches = [chosen for epoch in order for chosen in epoch]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, len(batches))
    for chosen in batches:
        value = cross_entropy(head(train[chosen]).flatten(0, 1), targets[chosen].flatten())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    counts = torch.zeros(len(WORDS), len(WORDS))
    with torch.inference_mode():
        for x, y in zip(test.split(10), truth.split(10), strict=True):
            logits = head(x).transpose(1, 2).unflatten(2, (32, 32))
            predicted = interpolate(logits, size=128, mode="bilinear").argmax(1)
            counts += confusion(y.long(), predicted, len(WORDS))
    return mean_iou(counts)


def _colours(images: torch.Tensor) -> torch.Tensor:
    """The baseline without a model: mean and deviation of RGB in 4 × 4 pixels, [n, 6, 32, 32]."""
    cells = images.float().unflatten(3, (32, 4)).unflatten(2, (32, 4))
    return torch.cat([cells.mean((3, 5)), cells.std((3, 5))], 1) / 64


def of_dinov2(model: Dinov2Model, count: int = 100) -> dict[str, float]:
    """Probes trained on 2 × count labelled scenes of "train": mIoU on `count` validation scenes."""
    train, test = corpus("train", 2 * count), corpus("validation", count)
    model.eval().float()
    untrained = dinov2.build(seed=7).eval()
    kinds = {
        "": lambda images: _features(model, images),
        ", untrained encoder": lambda images: _features(untrained, images),
        ", colours only": _colours,
    }
    scores = {}
    for name, extract in kinds.items():
        seen, held = extract(train.images).clone(), extract(test.images).clone()
        sizes: dict[str, Any] = {"linear": (nn.Linear(seen.shape[1], len(WORDS)), 20, 1e-2)}
        if not name:
            torch.manual_seed(0)
            sizes["block"] = (_Block(seen.shape[1]), 10, 2e-3)
        for kind, (head, epochs, peak) in sizes.items():
            scores[f"{kind} probe{name}, mIoU"] = _probe(
                seen, train.labels, held, test.labels, head, epochs, peak
            )
    return scores


@torch.inference_mode()
def of_sam(model: Any, count: int = 60) -> dict[str, float]:
    """Masks from 5 points and from a grid of single points, on validation scenes."""
    model.eval()
    device = model.pixel_mean.device
    data = corpus("validation", count)
    random = torch.Generator().manual_seed(0)
    ious: dict[str, list[float]] = {"stuff": [], "things": []}
    predicted, actual, covered = [], [], []
    centres = (torch.arange(16) + 0.5) * sam.SIZE / 16 - 0.5
    points = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1).reshape(-1, 1, 2)
    for image, labels, instances in zip(data.images, data.labels, data.instances, strict=True):
        embedding = model.image_encoder(
            (image[None].to(device) - model.pixel_mean) / model.pixel_std
        )
        ids, areas = instances.unique(return_counts=True)
        targets = instances[None] == ids[areas >= 12][:, None, None]
        logits, iou, *_ = sam.decode(model, embedding, sam.points_in(random, targets, 5).to(device))
        true = sam.mask_iou(sam.full_size(logits).cpu() > 0, targets[:, None])
        predicted += iou.cpu().flatten().tolist()
        actual += true.flatten().tolist()
        best = iou.argmax(1).cpu()
        for target, row, k in zip(targets, true, best, strict=True):
            ious["stuff" if labels[target][0] < len(STUFF) else "things"].append(float(row[k]))
        masks = _automatic(model, embedding, points.to(device))
        overlap = sam.mask_iou(masks[:, None], targets[None])
        covered += (overlap > 0.6).any(0).tolist()
    return {
        "most confident mask of 5 points, stuff, mean IoU": float(np.mean(ious["stuff"])),
        "most confident mask of 5 points, things, mean IoU": float(np.mean(ious["things"])),
        "predicted and true IoU, correlation": float(np.corrcoef(predicted, actual)[0, 1]),
        "instances covered by automatic masks (IoU > .6)": float(np.mean(covered)),
    }


def _automatic(model: Any, embedding: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Masks of a grid of single points after mask suppression at IoU .7: bool [m, S, S]."""
    logits, iou, *_ = sam.decode(model, embedding, points)
    masks, scores = (sam.full_size(logits) > 0).flatten(0, 1).cpu(), iou.flatten().cpu()
    keep: list[int] = []
    flat = masks.flatten(1).float()
    both = flat @ flat.T
    area = both.diag()
    overlap = both / (area[:, None] + area[None] - both).clamp(min=1)
    for i in scores.argsort(descending=True).tolist():
        if scores[i] > 0.5 and area[i] > 12 and not (overlap[i, keep] > 0.7).any():
            keep.append(i)
    return masks[keep]


SCORES: dict[str, Callable[..., dict[str, float]]] = {
    "clip": of_clip,
    "dinov2": of_dinov2,
    "sam": of_sam,
}
"""By model: from what its `train` returns, and `count` scenes, to named scores."""
