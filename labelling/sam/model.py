"""SAM: one image embedding, then masks from query points and automatic masks (paper, section 3.2).

The rules are those of segment-anything's SamPredictor and SamAutomaticMaskGenerator (without
crops), and so are the results; but the image is encoded once for both, and masks stay at low
resolution (a quarter of the encoder's) until it is known which are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import interpolate

from fmbseg_jax import config
from fmbseg_jax.data import images
from labelling.precision import check_finite
from labelling.sam import checkpoint
from labelling.sam.decoder import MaskDecoder
from labelling.sam.meta import nms

_VALUES_AT_ONCE = 1 << 26
"""Logits brought to full resolution at once; memory, not results."""
_COUNTED_WHOLE = 1 << 21
"""Masks of images of at most so many pixels are measured (area, stability, box) at full resolution,
as Meta does; of larger images at the encoder's, where a mask costs a megapixel and not dozens."""


class Embedding(NamedTuple):
    """An encoded image."""

    features: torch.Tensor
    """[1, c, g, g]."""
    input_size: tuple[int, int]
    """(H, W) of the image as the encoder saw it, before padding."""
    size: tuple[int, int]
    """(H, W) of the image itself."""


class LowMasks(NamedTuple):
    """Masks at low resolution."""

    logits: torch.Tensor
    """float32 [m, 4 g, 4 g], over the padded square that the encoder saw."""
    ious: torch.Tensor
    """float32 [m], predicted IoU."""


class _Survivors(NamedTuple):
    """Masks of a batch of points that pass the filters."""

    logits: torch.Tensor
    """float32 [s, 4 g, 4 g]."""
    ious: torch.Tensor
    """float32 [s]."""
    boxes: torch.Tensor
    """float32 [s, 4], (x0, y0, x1, y1) in pixels."""
    total: torch.Tensor
    """float32 [1], the sum of all logits and IoU of the batch: finite where all of them are."""


class Sam:
    """A published SAM. Points are (x, y) in pixels of the image, a pixel's centre at + 0.5."""

    def __init__(self, path: str | Path, device: str = "cpu", dtype: str = "float32"):
        """Loads a model.

        Args:
          path: a checkpoint as Meta publishes it.
          dtype: what is multiplied: "float32", or half of it, "float16" or "bfloat16".
        """
        self.model = checkpoint.load(path, device)
        self.device = device
        self.decoder = MaskDecoder(self.model)
        self._encode: Any = self.model.image_encoder
        if torch.device(device).type == "cuda":
            self._encode = torch.compile(self._encode)  # its input has one shape
        self._dtype = getattr(torch, dtype)

    @torch.inference_mode()
    def embed(self, image: np.ndarray) -> Embedding:
        """Encodes an image, uint8 [H, W, 3]: the long side at the model's size, the rest padded.

        Raises:
          UserError: a feature is NaN or infinite.
        """
        height, width = image.shape[:2]
        scale = self.model.image_encoder.img_size / max(height, width)
        # At least a pixel: Meta's rounding would leave nothing of a very long image.
        size = max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
        pixels = torch.from_numpy(images.resize(image, size).copy()).permute(2, 0, 1)
        pixels = self.model.preprocess(pixels.to(self.device))
        with self._half():
            features = self._encode(pixels[None])
        check_finite("SAM's image encoder", self._dtype, [features])
        return Embedding(features, size, (height, width))

    @torch.inference_mode()
    def point_masks(self, embedding: Embedding, points: torch.Tensor) -> LowMasks:
        """One mask for each group of points: of three, the one of highest confidence (3.2, 1.1).

        Args:
          points: float [p, k, 2], k points on each of p objects.

        Raises:
          UserError: a mask or an IoU is NaN or infinite.
        """
        with self._half():
            decoded = self.decoder.decode(embedding.features, _to_input(points, embedding))
            ious, best = decoded.ious.max(1)
            prompts = torch.arange(len(points), device=best.device)
            logits = self.decoder.masks(decoded, prompts, best)
        self._check([decoded.ious, logits])
        return LowMasks(logits, ious)

    @torch.inference_mode()
    def automatic_masks(self, embedding: Embedding, options: config.Sam) -> LowMasks:
        """Masks of everything, best first: a grid of single points, filters and NMS (3.2, 1.2).

        Raises:
          UserError: a mask or an IoU is NaN or infinite, also of those that are filtered out.
        """
        grid = point_grid(options.points_per_side, embedding.size).to(self.device)
        kept = [
            self._survivors(embedding, points[:, None], options)
            for points in grid.split(options.points_per_batch)
        ]
        self._check([batch.total for batch in kept])
        logits, ious, boxes, _ = (torch.cat(parts) for parts in zip(*kept, strict=True))
        best = nms(boxes, ious, options.nms)
        return LowMasks(logits[best], ious[best])

    @torch.inference_mode()
    def full_size(self, embedding: Embedding, logits: torch.Tensor) -> Iterator[torch.Tensor]:
        """Low masks, [m, 4 g, 4 g] → chunks of them at the size of the image, bool [·, H, W]."""
        for chunk in self._resized(embedding, logits, embedding.size):
            yield chunk > self.model.mask_threshold

    def _survivors(
        self, embedding: Embedding, points: torch.Tensor, options: config.Sam
    ) -> _Survivors:
        """The masks of a batch of points that pass the filters."""
        with self._half():
            decoded = self.decoder.decode(embedding.features, _to_input(points, embedding))
            confident = decoded.ious > (options.pred_iou or -torch.inf)
            prompt, index = confident.nonzero(as_tuple=True)
            logits = self.decoder.masks(decoded, prompt, index)
        height, width = embedding.size
        whole = height * width <= _COUNTED_WHOLE
        size = embedding.size if whole else embedding.input_size
        keep, boxes = [], [torch.zeros(0, 4, device=logits.device)]
        for chunk in self._resized(embedding, logits, size):
            masks = chunk > self.model.mask_threshold
            share = _area(masks) / (size[0] * size[1])
            good = (share > 0) & (share >= options.min_area) & (share <= options.max_area)
            if options.stability > 0:
                inner, outer = _area(chunk > 1), _area(chunk > -1)
                good &= inner / outer >= options.stability
            keep.append(good)
            boxes.append(mask_boxes(masks[good]))
        good = torch.cat(keep) if keep else torch.zeros(0, dtype=torch.bool, device=logits.device)
        total = decoded.ious.sum() + logits.sum()
        ious = decoded.ious[prompt, index]
        return _Survivors(logits[good], ious[good], torch.cat(boxes), total[None])

    def _check(self, values: list[torch.Tensor]) -> None:
        check_finite("SAM's mask decoder", self._dtype, values)

    def _resized(
        self, embedding: Embedding, logits: torch.Tensor, size: tuple[int, int]
    ) -> Iterator[torch.Tensor]:
        """Logits [m, l, l] → chunks of them at the image's or the encoder's size, [·, *size].

        As Meta's postprocess_masks does it: first to the padded square, then to the image.
        """
        side, (height, width) = self.model.image_encoder.img_size, embedding.input_size
        largest = max(side * side, size[0] * size[1])
        for chunk in logits.split(max(1, _VALUES_AT_ONCE // largest)) if len(logits) else ():
            square = interpolate(chunk[:, None], (side, side), mode="bilinear")
            inside = square[..., :height, :width]
            if size != (height, width):
                inside = interpolate(inside, size, mode="bilinear")
            yield inside[:, 0]

    def _half(self) -> torch.autocast:
        return torch.autocast(
            torch.device(self.device).type, self._dtype, enabled=self._dtype != torch.float32
        )


def _to_input(points: torch.Tensor, embedding: Embedding) -> torch.Tensor:
    """Points (x, y) in the image's pixels → in those of the encoder's input."""
    seen, size = (
        torch.tensor(s[::-1], device=points.device).double()
        for s in (embedding.input_size, embedding.size)
    )
    return points * (seen / size)


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
    pixels = masks.view(torch.uint8)  # torch finds their maximum far faster than `any`
    for covered in (pixels.amax(1), pixels.amax(2)):  # columns, rows
        first = covered.argmax(1)
        last = covered.shape[1] - 1 - covered.flip(1).argmax(1)
        sides.append((first, last))
    (x0, x1), (y0, y1) = sides
    return torch.stack([x0, y0, x1, y1], dim=1).float()


def _area(masks: torch.Tensor) -> torch.Tensor:
    """Pixels in each mask; as bytes, since torch is slow at adding up booleans."""
    return masks.flatten(1).view(torch.uint8).sum(1, dtype=torch.int32)
