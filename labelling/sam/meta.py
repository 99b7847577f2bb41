"""Meta's `segment_anything` package, importable with or without torchvision.

segment-anything 1.0 takes four functions from torchvision: `batched_nms`, `box_area`, `resize` and
`to_pil_image`. torchvision has to match torch to the build, and where it does not (or is not there)
its import fails, and with it this one. So where torchvision works, it is used; where it does not,
four stand-ins with the same results take its place *while `segment_anything` is being imported* and
are removed again: left in `sys.modules` they would make transformers believe in a torchvision that
has nothing else.
"""

from __future__ import annotations

import importlib
import sys
import types

import numpy as np
import torch
from PIL import Image


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Greedy non-maximum suppression: indices of the boxes kept, best score first.

    boxes: float [n, 4], (x0, y0, x1, y1) in pixels; scores: float [n].
    """
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order].float()
    area = box_area(boxes)
    corner0 = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    corner1 = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    intersection = (corner1 - corner0).clamp(min=0).prod(-1)
    union = area[:, None] + area[None] - intersection
    overlaps = (intersection / union.clamp(min=1e-9) > iou_threshold).cpu().numpy()
    alive = np.ones(len(order), bool)
    keep = []
    for i in range(len(order)):
        if alive[i]:
            keep.append(i)
            alive &= ~overlaps[i]
    return order[torch.as_tensor(keep, dtype=torch.long, device=order.device)]


def batched_nms(
    boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float
) -> torch.Tensor:
    """`nms` within each category of `idxs` [n]: boxes of different categories never overlap."""
    if not len(boxes):
        return torch.empty(0, dtype=torch.long, device=boxes.device)
    apart = idxs.to(boxes) * (boxes.max() - boxes.min() + 1)
    return nms(boxes + apart[:, None], scores, iou_threshold)


def box_area(boxes: torch.Tensor) -> torch.Tensor:
    """Areas [n] of boxes [n, 4], (x0, y0, x1, y1)."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _stand_ins() -> dict[str, types.ModuleType]:
    names = ["torchvision", "torchvision.ops", "torchvision.ops.boxes"]
    names += ["torchvision.transforms", "torchvision.transforms.functional"]
    modules = {name: types.ModuleType(name) for name in names}
    boxes = modules["torchvision.ops.boxes"]
    functional = modules["torchvision.transforms.functional"]
    boxes.batched_nms, boxes.box_area = batched_nms, box_area  # type: ignore[attr-defined]
    functional.resize = _resize  # type: ignore[attr-defined]
    functional.to_pil_image = Image.fromarray  # type: ignore[attr-defined]
    return modules


def _import_segment_anything() -> types.ModuleType:
    try:
        importlib.import_module("torchvision.ops")
    except (ImportError, RuntimeError):  # absent, or built for another torch
        before = {name: module for name, module in sys.modules.items() if "torchvision" in name}
        stand_ins = _stand_ins()
        sys.modules.update(stand_ins)
        try:
            return importlib.import_module("segment_anything")
        finally:
            for name in stand_ins:
                del sys.modules[name]
            sys.modules.update(before)
    return importlib.import_module("segment_anything")


segment_anything = _import_segment_anything()
