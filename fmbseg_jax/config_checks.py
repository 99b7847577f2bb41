"""What a config must not be: wrong choices, numbers out of their range, windows that do not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_CHOICES = {
    "data.deep": ("file", "type"),
    "eval.deep": ("file", "type"),
    "label.stages": ("1.1", "1.2", "both"),
    "label.combine": ("similarity", "area"),
    "label.compute": ("auto", "float32", "float16", "bfloat16"),
    "features.compute": ("float32", "bfloat16"),
    "features.dtype": ("float16", "int8"),
    "train.features": ("cached", "online"),
    "train.compute": ("float32", "bfloat16"),
    "train.export": ("last", "best"),
    "eval.average": ("unit", "plain"),
    "eval.compute": ("float32", "bfloat16"),
    "eval.background": ("auto", "words", "threshold", "none"),
    "train.aligner": ("linear", "mlp", "block"),
    "train.loss": ("tsupcon", "supcon", "prototype"),
    "train.optimizer": ("sgd", "adamw"),
}
_ZERO_ALLOWED = {
    "seed", "train.images_per_pass", "train.patches_per_image", "train.momentum", "train.warmup",
    "train.weight_decay", "train.clip_norm", "label.sam.min_area", "label.sam.pred_iou",
    "label.sam.stability", "eval.threshold", "eval.pamr",
}  # fmt: skip
_SHARES = {
    "label.sam.pred_iou", "label.sam.stability", "label.sam.nms", "label.sam.min_area",
    "label.sam.max_area", "train.momentum", "train.warmup", "eval.threshold",
}  # fmt: skip


_AT_MOST = {"label.short_side": 8192, "eval.short_side": 8192, "eval.pamr": 1000}
_AT_MOST |= {"data.max_megapixels": 3600, "eval.max_megapixels": 3600}  # 60,000 x 60,000
"""Beyond, memory or time have no bound; a config may be another person's."""


def faults(leaves: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a config, a sentence each.

    Args:
      leaves: its values by dotted name, as `config.flatten` has them.
    """
    for name, value in leaves.items():
        if name in _CHOICES and value not in _CHOICES[name]:
            yield f"{name} is one of {', '.join(_CHOICES[name])}; got {value!r}."
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if value < 0 or (value == 0 and name not in _ZERO_ALLOWED):
                zero = "0 or " if name in _ZERO_ALLOWED else ""
                yield f"{name} is {zero}a positive number; got {value}."
            elif name in _SHARES and value > 1:
                yield f"{name} is a share between 0 and 1; got {value}."
            elif value > _AT_MOST.get(name, value):
                yield f"{name} is at most {_AT_MOST[name]}; got {value}."
    for section, window in (("label", "crop"), ("eval", "window")):
        side, stride, short_side = (
            leaves[f"{section}.{name}"] for name in (window, "stride", "short_side")
        )
        if stride > side:
            yield (
                f"{section}.stride is at most {section}.{window}, or pixels would be left out; "
                f"got {stride} > {side}."
            )
        if side > short_side:
            yield (
                f"{section}.{window} is at most {section}.short_side, so that a window fits; "
                f"got {side} > {short_side}."
            )
