"""A tiny SAM, built from Meta's own classes and trained as SAM is: masks from points, no words.

A prompt is one to five points in one target: an instance (a thing's visible part, or a region of
stuff), or two instances of the same word at once, for points that fall on both.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import (
    avg_pool2d,
    binary_cross_entropy_with_logits,
    cosine_similarity,
    interpolate,
    mse_loss,
    normalize,
)

from labelling.sam.meta import segment_anything
from toyworld.corpus import Corpus, jitter
from toyworld.loop import fit
from toyworld.loop import save as save_whole

SIZE, PATCH, GRID = 128, 8, 16
WIDTH, DEPTH, WINDOW, GLOBAL = 128, 4, 8, (1, 3)
PROMPT = 128
FREQUENCY = 2.5
"""Scale of the positions' random frequencies (part of the state dict). At SAM's own, 1, neighbours
in a grid of only 16 × 16 look nearly alike, and small things are found late."""
_ALIKE = ("q_proj", "k_proj")
STEPS, BATCH, PROMPTS, PEAK = 3000, 8, 6, 1e-3
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def build(seed: int) -> nn.Module:
    modeling = segment_anything.modeling
    torch.manual_seed(seed)
    sam = modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            img_size=SIZE,
            patch_size=PATCH,
            embed_dim=WIDTH,
            depth=DEPTH,
            num_heads=4,
            out_chans=PROMPT,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=WINDOW,
            global_attn_indexes=GLOBAL,
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=PROMPT,
            image_embedding_size=(GRID, GRID),
            input_image_size=(SIZE, SIZE),
            mask_in_chans=16,
        ),
        mask_decoder=modeling.MaskDecoder(
            num_multimask_outputs=3,
            transformer_dim=PROMPT,
            iou_head_depth=3,
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
    for name, module in sam.mask_decoder.named_modules():
        if isinstance(module, nn.Linear | nn.ConvTranspose2d) and name[-6:] not in _ALIKE:
            # torch's start shrinks each layer's output by 0.4 to 0.6: after ten of them the masks
            # of all prompts are alike.
            module.weight.data *= 3**0.5 if "proj" in name else 6**0.5
    norms = [m for m in sam.mask_decoder.transformer.modules() if isinstance(m, nn.LayerNorm)]
    for module in (sam.image_encoder.neck[3], *norms):
        module.weight.data *= 0.3  # content softer than position: attention finds places at once
    for module in sam.modules():
        if isinstance(module, nn.Embedding):  # as loud as the positions they are added to, or less
            module.weight.data *= 0.3
    return sam


class Decoded(NamedTuple):
    """What the decoder makes of n prompts: a mask is the product of its weights and the pixels."""

    logits: torch.Tensor
    """[n, 3, s, s]."""
    iou: torch.Tensor
    """Predicted, [n, 3]."""
    weights: torch.Tensor
    """[n, 3, c]."""
    pixels: torch.Tensor
    """[n, c, s, s]."""


def guide(found: Decoded, targets: torch.Tensor) -> torch.Tensor:
    """Draws pixels of the target together, and the masks' weights to what tells them apart.

    The product of two unknowns is slow to learn: with the masks' own loss alone, all prompts of an
    image get the same masks for thousands of steps. Here each factor has a goal of its own: the
    target's pixels, their mean and that of the rest known, have to be found by that difference; and
    the weights, which the prompt decides, have to point along it.
    """
    side = targets.shape[-1] // found.pixels.shape[-1]
    inside = avg_pool2d(targets[:, None].float(), side)
    means = [
        (found.pixels * part).sum((2, 3)) / part.sum((2, 3)).clamp(min=1e-3)
        for part in (inside, 1 - inside)
    ]
    apart, middle = means[0] - means[1], (means[0] + means[1]) / 2
    projected = ((found.pixels - middle[..., None, None]) * apart[..., None, None]).sum(1)
    scale = 4 / apart.square().sum(1).clamp(min=1e-3)[:, None, None]
    entropy = binary_cross_entropy_with_logits(projected * scale, inside[:, 0], reduction="none")
    shares = sum(p[:, 0] / p.sum((2, 3))[..., None].clamp(min=1) for p in (inside, 1 - inside))
    grouped = (entropy * shares).sum((1, 2)).mean() / 2
    along = cosine_similarity(found.weights, apart.detach()[:, None], dim=-1)
    return grouped + (1 - along).mean()


def decode(sam: Any, embeddings: torch.Tensor, points: torch.Tensor) -> Decoded:
    """Masks of p prompts for each of b images, at a quarter of a patch: one batch of b · p.

    Meta's decoder takes one image at a time; this is the same computation for several.

    Args:
      embeddings: float [b, c, g, g].
      points: float [b · p, n, 2], pixels (x, y), all of the first image first.

    """
    decoder, count = sam.mask_decoder, len(points)
    labels = torch.ones(points.shape[:2], dtype=torch.int, device=points.device)
    sparse, dense = sam.prompt_encoder(points=(points, labels), boxes=None, masks=None)
    output = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([output.expand(count, -1, -1), sparse], 1)
    source = embeddings.repeat_interleave(count // len(embeddings), 0) + dense
    positions = sam.prompt_encoder.get_dense_pe().expand(count, -1, -1, -1)
    states, source = decoder.transformer(source, positions, tokens)
    grid = source.transpose(1, 2).unflatten(2, embeddings.shape[-2:])
    upscaled = decoder.output_upscaling(grid)
    networks = decoder.output_hypernetworks_mlps
    weights = [network(states[:, 1 + i]) for i, network in enumerate(networks)]
    logits = torch.einsum("bmc,bchw->bmhw", torch.stack(weights, 1), upscaled)
    iou = decoder.iou_prediction_head(states[:, 0])
    return Decoded(logits[:, 1:], iou[:, 1:], torch.stack(weights[1:], 1), upscaled)


def full_size(logits: torch.Tensor) -> torch.Tensor:
    """Logits [p, 3, s, s] → [p, 3, SIZE, SIZE]."""
    return interpolate(logits, size=SIZE, mode="bilinear", align_corners=False)


def points_in(random: torch.Generator, target: torch.Tensor, count: int) -> torch.Tensor:
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
    """Focal and dice loss of the masks, and the error of the predicted IoUs.

    logits: [p, 3, s, s]; iou: [p, 3]; targets: bool [p, S, S]. At `balance` 1 the target and the
    rest of the image weigh alike in the focal loss, and all three masks count: else they settle on
    three regions of the image, whatever the prompt. At 0 each pixel weighs alike and only the best
    mask counts, as SAM has it.
    """
    side = targets.shape[-1] // logits.shape[-1]
    truth = avg_pool2d(targets[:, None].float(), side).expand_as(logits)
    entropy = binary_cross_entropy_with_logits(logits, truth, reduction="none")
    chance = logits.sigmoid()
    focal = entropy * (truth - chance).square()
    inside, pixels = (focal * truth).sum((2, 3)), truth.sum((2, 3)).clamp(min=1)
    outside, others = (focal * (1 - truth)).sum((2, 3)), (1 - truth).sum((2, 3)).clamp(min=1)
    balanced = 4 * (inside / pixels + outside / others)
    focal = balance * balanced + (1 - balance) * 20 * focal.mean((2, 3))
    overlap = 2 * (chance * truth).sum((2, 3))
    dice = 1 - (overlap + 1) / (chance.sum((2, 3)) + truth.sum((2, 3)) + 1)
    with torch.no_grad():
        actual = mask_iou(logits > 0, truth > 0.5)
    each = focal + dice
    best = balance * each.mean(1) + (1 - balance) * each.min(1).values
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


def mask_iou(masks: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """IoU of bool masks [..., H, W], broadcast."""
    both = (masks & truth).sum((-2, -1)).float()
    return both / (masks | truth).sum((-2, -1)).clamp(min=1)


def train(work: Path, data: Corpus, *, seed: int, device: str, steps: int, batch: int):
    """Returns the model and what it took (see `fit`)."""
    sam: Any = build(seed).to(device)

    def loss(random: torch.Generator, step: int) -> torch.Tensor:
        chosen = torch.randint(len(data), (batch,), generator=random)
        images, labels, instances = data.images[chosen], data.labels[chosen], data.instances[chosen]
        if torch.rand((), generator=random) < 0.5:
            images, labels, instances = images.flip(3), labels.flip(2), instances.flip(2)
        images = jitter(random, images / 255, 0.05).to(device) * 255
        embeddings = sam.image_encoder((images - sam.pixel_mean) / sam.pixel_std)
        count = 1 + step % 5
        balance = max(0.0, 1 - 2 * step / steps)  # small things first; exact borders later
        scenes = zip(labels, instances, strict=True)
        targets = torch.cat([prompts(random, *scene, PROMPTS) for scene in scenes])
        points = points_in(random, targets, count).to(device)
        found, targets = decode(sam, embeddings, points), targets.to(device)
        masks = mask_loss(found.logits, found.iou, targets, balance)
        near = affinity_loss(embeddings, instances.to(device))
        return masks + near + 2 * guide(found, targets)

    spent = fit("sam", sam, loss, steps, PEAK, work, seed)
    return sam, spent


def save(folder: Path, sam: Any) -> None:
    """Writes `folder/sam.pth`."""
    halves = {name: value.half().cpu() for name, value in sam.state_dict().items()}
    save_whole(folder / "sam.pth", halves)
    sam.load_state_dict(halves)  # so that what is scored is what was saved
