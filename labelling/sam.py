"""SAM: one image embedding, then masks from query points and automatic masks (paper, section 3.2).

The rules are those of segment-anything's SamPredictor and SamAutomaticMaskGenerator (without
crops), and so are the results; but the image is encoded once for both, and masks wait at low
resolution until all that can be checked there has been.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fmbseg_jax import config
from fmbseg_jax.data import images
from labelling import sam_checkpoint
from labelling.meta_sam import nms, segment_anything

_VALUES_AT_ONCE = 1 << 26
"""Logits brought to full resolution at once; memory, not results."""


_Attention: Any = segment_anything.modeling.transformer.Attention


class Embedding(NamedTuple):
    """An encoded image."""

    features: torch.Tensor
    """float32 [1, c, g, g]."""
    input_size: tuple[int, int]
    """(H, W) of the image as the encoder saw it, before padding."""
    size: tuple[int, int]
    """(H, W) of the image itself."""


class Sam:
    """A published SAM. Points are (x, y) in pixels of the image, a pixel's centre at + 0.5."""

    def __init__(self, path: str | Path, device: str = "cpu"):
        """path: a checkpoint file as Meta publishes it."""
        self.model = sam_checkpoint.load(path, device)
        self.device = device
        self._position = self.model.prompt_encoder.get_dense_pe()
        for module in self.model.mask_decoder.modules():
            if isinstance(module, _Attention):
                module.forward = functools.partial(_attend, module)

    @torch.inference_mode()
    def embed(self, image: np.ndarray) -> Embedding:
        """Encodes an image, uint8 [H, W, 3]: the long side at the model's size, the rest padded."""
        height, width = image.shape[:2]
        scale = self.model.image_encoder.img_size / max(height, width)
        # At least a pixel: Meta's rounding would leave nothing of a very long image.
        size = max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
        pixels = torch.from_numpy(images.resize(image, size).copy()).permute(2, 0, 1)
        pixels = self.model.preprocess(pixels.to(self.device))
        return Embedding(self.model.image_encoder(pixels[None]), size, (height, width))

    @torch.inference_mode()
    def point_masks(
        self, embedding: Embedding, points: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One mask for each group of points: of three, the one of highest confidence (3.2, 1.1).

        Args:
          points: float [p, k, 2], k points on each of p objects.

        Returns:
          Masks, bool [p, H, W], and predicted IoU, float32 [p].
        """
        logits, ious = self._decode(embedding, points)
        ious, best = ious.max(1)
        logits = logits[torch.arange(len(logits)), best]
        masks = [chunk > self.model.mask_threshold for chunk in self._upsample(logits, embedding)]
        return torch.cat(masks), ious

    @torch.inference_mode()
    def automatic_masks(
        self, embedding: Embedding, options: config.Sam
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks of everything: a grid of single points, then filters and NMS (3.2, stage 1.2).

        Returns:
          Masks, bool [m, H, W], best first, and predicted IoU, float32 [m].
        """
        grid = point_grid(options.points_per_side, embedding.size).to(self.device)
        kept = [
            self._survivors(embedding, points[:, None], options)
            for points in grid.split(options.points_per_batch)
        ]
        logits, ious, boxes = (torch.cat(parts) for parts in zip(*kept, strict=True))
        best = nms(boxes, ious, options.nms)
        height, width = embedding.size
        masks = [
            chunk > self.model.mask_threshold for chunk in self._upsample(logits[best], embedding)
        ]
        empty = torch.zeros(0, height, width, dtype=torch.bool, device=self.device)
        return torch.cat([empty, *masks]), ious[best]

    def _survivors(
        self, embedding: Embedding, points: torch.Tensor, options: config.Sam
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The masks of a batch of points that pass: logits [s, l, l], IoU [s], boxes [s, 4].

        Areas and stability are counted at full resolution, as Meta does; the logits are handed on
        at low resolution, since NMS will drop most of them.
        """
        logits, ious = self._decode(embedding, points)
        logits, ious = logits.flatten(0, 1), ious.flatten()
        if options.pred_iou > 0:
            confident = ious > options.pred_iou
            logits, ious = logits[confident], ious[confident]
        size = embedding.size[0] * embedding.size[1]
        keep, boxes = [], []
        for chunk in self._upsample(logits, embedding):
            masks = chunk > self.model.mask_threshold
            share = _area(masks) / size
            good = (share > 0) & (share >= options.min_area) & (share <= options.max_area)
            if options.stability > 0:
                inner, outer = _area(chunk > 1), _area(chunk > -1)
                good &= inner / outer >= options.stability
            keep.append(good)
            boxes.append(mask_boxes(masks[good]))
        if not keep:
            return logits, ious, torch.zeros(0, 4, device=self.device)
        good = torch.cat(keep)
        return logits[good], ious[good], torch.cat(boxes)

    def _decode(
        self, embedding: Embedding, points: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Points [p, k, 2] → three masks each, logits [p, 3, l, l], and predicted IoU [p, 3]."""
        seen, size = (torch.tensor(s[::-1], device=self.device).double() for s in embedding[1:])
        points = points * (seen / size)
        foreground = torch.ones(points.shape[:2], dtype=torch.int, device=self.device)
        sparse, dense = self.model.prompt_encoder(
            points=(points, foreground), boxes=None, masks=None
        )
        return self.model.mask_decoder(
            image_embeddings=embedding.features,
            image_pe=self._position,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )

    def _upsample(self, logits: torch.Tensor, embedding: Embedding) -> Iterator[torch.Tensor]:
        """Logits [n, l, l] → chunks of them at the size of the image, [·, H, W]."""
        side = self.model.image_encoder.img_size
        largest = max(side * side, embedding.size[0] * embedding.size[1])
        for chunk in logits.split(max(1, _VALUES_AT_ONCE // largest)) if len(logits) else ():
            yield self.model.postprocess_masks(
                chunk[:, None], embedding.input_size, embedding.size
            )[:, 0]


def point_grid(points_per_side: int, size: tuple[int, int]) -> torch.Tensor:
    """Evenly spaced points over an image of size (H, W): float64 [n², 2], (x, y) in pixels."""
    line = (torch.arange(points_per_side, dtype=torch.float64) + 0.5) / points_per_side
    y, x = torch.meshgrid(line * size[0], line * size[1], indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2)


def mask_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Boxes around masks, none of them empty: bool [m, H, W] → float [m, 4], (x0, y0, x1, y1).

    The last row and column belong to the box, as in Meta's: a mask of one pixel has no extent.
    """
    sides = []
    for covered in (masks.any(1), masks.any(2)):  # columns, rows
        first = covered.int().argmax(1)
        last = covered.shape[1] - 1 - covered.flip(1).int().argmax(1)
        sides.append((first, last))
    (x0, x1), (y0, y1) = sides
    return torch.stack([x0, y0, x1, y1], dim=1).float()


def _attend(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What Meta's attention of the mask decoder gives; on a CPU it saves a third of the time.

    From pixels to the few tokens it takes a softmax over an axis of length 8 or so, a million
    times; with that axis outside, the same numbers come in long vectors.
    """
    q = module._separate_heads(module.q_proj(q), module.num_heads)
    k = module._separate_heads(module.k_proj(k), module.num_heads)
    v = module._separate_heads(module.v_proj(v), module.num_heads)
    if q.shape[2] > k.shape[2]:
        weights = (k * k.shape[-1] ** -0.5) @ q.transpose(2, 3)
        mixed = weights.softmax(2).transpose(2, 3) @ v
    else:
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return module.out_proj(module._recombine_heads(mixed))


def _area(masks: torch.Tensor) -> torch.Tensor:
    """Pixels in each mask; as bytes, since torch is five times slower at adding up booleans."""
    return masks.flatten(1).view(torch.uint8).sum(1, dtype=torch.int32)
