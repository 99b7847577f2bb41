"""A tiny SAM, built from Meta's own classes and trained as SAM is: masks from points, no words.

A prompt is one to five points in one target: an instance (a thing's visible part, or a region of
stuff), or two instances of the same word at once, for points that fall on both.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate, mse_loss, normalize

from labelling.meta_sam import segment_anything
from toyworld.corpus import Corpus, corpus, jitter
from toyworld.loop import fit
from toyworld.loop import save as save_whole
from toyworld.scenes import STUFF

SIZE, PATCH, GRID = 128, 8, 16
WIDTH, DEPTH, WINDOW, GLOBAL = 128, 4, 8, (1, 3)
PROMPT = 128
FREQUENCY = 2.5
"""Scale of the positions' random frequencies (part of the state dict). At SAM's own, 1, neighbours
in a grid of only 16 × 16 look nearly alike, and small things are found late."""
STEPS, BATCH, PROMPTS, PEAK = 1150, 20, 2, 8e-4
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def build(seed: int) -> nn.Module:
    modeling = segment_anything.modeling
    torch.manual_seed(seed)
    sam = modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=4,
            out_chans=PROMPT, norm_layer=partial(nn.LayerNorm, eps=1e-6), use_rel_pos=True,
            window_size=WINDOW, global_attn_indexes=GLOBAL,
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=PROMPT, image_embedding_size=(GRID, GRID), input_image_size=(SIZE, SIZE),
            mask_in_chans=16,
        ),
        mask_decoder=modeling.MaskDecoder(
            num_multimask_outputs=3, transformer_dim=PROMPT, iou_head_depth=3,
            iou_head_hidden_dim=128,
            transformer=modeling.transformer.TwoWayTransformer(
                depth=2, embedding_dim=PROMPT, num_heads=8, mlp_dim=256
            ),
        ),
        pixel_mean=list(MEAN),
        pixel_std=list(STD),
    )
    sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix *= FREQUENCY
    for name, module in sam.mask_decoder.named_modules():
        if name.endswith(("token_to_image", "image_to_token")):
            # Queries and keys start alike: a point sees its own place in the image at once.
            module.q_proj.weight.data *= 3
            module.k_proj.load_state_dict(module.q_proj.state_dict())
    for module in sam.modules():
        if isinstance(module, nn.Embedding):  # as loud as the positions they are added to, or less
            module.weight.data *= 0.3
    return sam


def decode(
    sam: nn.Module, embedding: torch.Tensor, points: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedding [1, c, g, g], pixels (x, y) [p, n, 2] → logits [p, 3, S, S], IoU [p, 3]."""
    labels = torch.ones(points.shape[:2], dtype=torch.int, device=points.device)
    sparse, dense = sam.prompt_encoder(points=(points, labels), boxes=None, masks=None)
    logits, iou = sam.mask_decoder(
        image_embeddings=embedding, image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=True,
    )
    return interpolate(logits, size=SIZE, mode="bilinear", align_corners=False), iou


def _points_in(random: torch.Generator, target: torch.Tensor, count: int) -> torch.Tensor:
    """`count` random pixels (x, y) of each bool target [p, H, W]: float [p, count, 2]."""
    chance = target.flatten(1).float()
    index = torch.multinomial(chance, count, replacement=True, generator=random)
    return torch.stack([index % target.shape[-1], index // target.shape[-1]], -1).float()


def prompts(
    random: torch.Generator, labels: torch.Tensor, instances: torch.Tensor, count: int
) -> torch.Tensor:
    """`count` targets bool [count, H, W] in one scene: 1 in 6 joins all instances of a word."""
    ids, areas = instances.unique(return_counts=True)
    ids = ids[areas >= 12]
    chosen = ids[torch.randint(len(ids), (count,), generator=random)]
    targets = instances[None] == chosen[:, None, None]
    joined = torch.rand(count, generator=random) < 1 / 6
    words = torch.stack([labels[target][0] for target in targets])
    return torch.where(joined[:, None, None], labels[None] == words[:, None, None], targets)


def mask_loss(
    logits: torch.Tensor, iou: torch.Tensor, targets: torch.Tensor, balance: float
) -> torch.Tensor:
    """Focal and dice loss of the best of three masks, and the error of the predicted IoUs.

    logits: [p, 3, S, S]; iou: [p, 3]; targets: bool [p, S, S]. At `balance` 1 the target and the
    rest of the image weigh alike in the focal loss, at 0 each pixel does, as SAM has it.
    """
    truth = targets[:, None].expand_as(logits).float()
    entropy = binary_cross_entropy_with_logits(logits, truth, reduction="none")
    chance = logits.sigmoid()
    focal = entropy * (1 - torch.exp(-entropy)).square()
    inside, pixels = (focal * truth).sum((2, 3)), truth.sum((2, 3)).clamp(min=1)
    outside, others = (focal * (1 - truth)).sum((2, 3)), (1 - truth).sum((2, 3)).clamp(min=1)
    balanced = 4 * (inside / pixels + outside / others)
    focal = balance * balanced + (1 - balance) * 20 * focal.mean((2, 3))
    overlap = 2 * (chance * truth).sum((2, 3))
    dice = 1 - (overlap + 1) / (chance.sum((2, 3)) + truth.sum((2, 3)) + 1)
    with torch.no_grad():
        actual = _iou(logits > 0, targets[:, None])
    best = (focal + dice).min(1).values
    return best.mean() + mse_loss(iou, actual)


def affinity_loss(embeddings: torch.Tensor, instances: torch.Tensor) -> torch.Tensor:
    """Cells of one instance alike, of different ones not: a start for the encoder.

    Real SAM starts from a pretrained encoder (MAE); without one, masks from points alone take long
    to say anything about grouping. embeddings: [b, c, g, g]; instances: [b, H, W].
    """
    step = instances.shape[-1] // embeddings.shape[-1]
    cells = instances[:, step // 2 :: step, step // 2 :: step].flatten(1)
    unit = normalize(embeddings.flatten(2), dim=1)
    same = (cells[:, :, None] == cells[:, None]).float()
    return binary_cross_entropy_with_logits(10 * (unit.transpose(1, 2) @ unit) - 5, same)


def _iou(masks: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """IoU of bool masks [..., H, W], broadcast."""
    both = (masks & truth).sum((-2, -1)).float()
    return both / (masks | truth).sum((-2, -1)).clamp(min=1)


def train(work: Path, data: Corpus, *, seed: int, device: str, steps: int, batch: int):
    """Returns the model and what it took (see `fit`)."""
    sam = build(seed).to(device)

    def loss(random: torch.Generator, step: int) -> torch.Tensor:
        chosen = torch.randint(len(data), (batch,), generator=random)
        images, labels, instances = data.images[chosen], data.labels[chosen], data.instances[chosen]
        if torch.rand((), generator=random) < 0.5:
            images, labels, instances = images.flip(3), labels.flip(2), instances.flip(2)
        images = jitter(random, images / 255, 0.05).to(device) * 255
        embeddings = sam.image_encoder((images - sam.pixel_mean) / sam.pixel_std)
        count = 1 + step % 5
        balance = max(0.0, 1 - 2 * step / steps)  # small things first; exact borders later
        losses = []
        for i in range(batch):
            targets = prompts(random, labels[i], instances[i], PROMPTS)
            points = _points_in(random, targets, count).to(device)
            logits, iou = decode(sam, embeddings[i : i + 1], points)
            losses.append(mask_loss(logits, iou, targets.to(device), balance))
        near = affinity_loss(embeddings, instances.to(device))
        return torch.stack(losses).mean() + near

    spent = fit("sam", sam, loss, steps, PEAK, work, seed)
    return sam, spent


def save(folder: Path, sam: nn.Module) -> None:
    """Writes `folder/sam.pth`."""
    halves = {name: value.half().cpu() for name, value in sam.state_dict().items()}
    save_whole(folder / "sam.pth", halves)
    sam.load_state_dict(halves)  # so that what is scored is what was saved


@torch.inference_mode()
def score(sam: nn.Module, count: int = 60) -> dict[str, float]:
    """Masks from 5 points and from a grid of single points, on validation scenes."""
    sam.eval()
    device = sam.pixel_mean.device
    data = corpus("validation", count)
    random = torch.Generator().manual_seed(0)
    ious: dict[str, list[float]] = {"stuff": [], "things": []}
    predicted, actual, covered = [], [], []
    centres = (torch.arange(16) + 0.5) * SIZE / 16 - 0.5
    points = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1).reshape(-1, 1, 2)
    for image, labels, instances in zip(data.images, data.labels, data.instances, strict=True):
        embedding = sam.image_encoder((image[None].to(device) - sam.pixel_mean) / sam.pixel_std)
        ids, areas = instances.unique(return_counts=True)
        targets = instances[None] == ids[areas >= 12][:, None, None]
        logits, iou = decode(sam, embedding, _points_in(random, targets, 5).to(device))
        true = _iou(logits.cpu() > 0, targets[:, None])
        predicted += iou.cpu().flatten().tolist()
        actual += true.flatten().tolist()
        best = iou.argmax(1).cpu()
        for target, row, k in zip(targets, true, best, strict=True):
            ious["stuff" if labels[target][0] < len(STUFF) else "things"].append(float(row[k]))
        masks = _automatic(sam, embedding, points.to(device))
        overlap = _iou(masks[:, None], targets[None])
        covered += (overlap > 0.6).any(0).tolist()
    return {
        "most confident mask of 5 points, stuff, mean IoU": float(np.mean(ious["stuff"])),
        "most confident mask of 5 points, things, mean IoU": float(np.mean(ious["things"])),
        "predicted and true IoU, correlation": float(np.corrcoef(predicted, actual)[0, 1]),
        "instances covered by automatic masks (IoU > .6)": float(np.mean(covered)),
    }


def _automatic(sam: nn.Module, embedding: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Masks of a grid of single points after mask suppression at IoU .7: bool [m, S, S]."""
    logits, iou = decode(sam, embedding, points)
    masks, scores = (logits > 0).flatten(0, 1).cpu(), iou.flatten().cpu()
    keep: list[int] = []
    flat = masks.flatten(1).float()
    both = flat @ flat.T
    area = both.diag()
    overlap = both / (area[:, None] + area[None] - both).clamp(min=1)
    for i in scores.argsort(descending=True).tolist():
        if scores[i] > 0.5 and area[i] > 12 and not (overlap[i, keep] > 0.7).any():
            keep.append(i)
    return masks[keep]
