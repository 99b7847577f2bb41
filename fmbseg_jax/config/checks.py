"""What a config must not be: wrong choices, numbers out of their range, windows that do not fit.

A config may be another person's, as that of an export is: what it asks for has bounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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


AT_MOST = {
    "seed": 2**32 - 1,  # JAX makes one key of those that differ by 2^32
    "data.max_megapixels": 3600, "eval.max_megapixels": 3600,  # 60,000 x 60,000
    "label.short_side": 8192, "label.crop": 2048, "label.stride": 2048, "label.min_crops": 10_000,
    "label.points_per_word": 10_000, "label.images_per_shard": 1_000_000,
    "label.sam.points_per_side": 1024, "label.sam.points_per_batch": 65_536,
    "features.size": 2048, "features.batch_size": 65_536, "features.threads": 1024,
    "train.heads": 1024, "train.mlp_ratio": 64, "train.batch_size": 1_000_000,
    "train.images_per_pass": 1_000_000, "train.patches_per_image": 1_000_000,
    "train.epochs": 1_000_000, "train.checkpoint_every": 10**9, "train.keep": 10_000,
    "train.log_every": 10**9, "train.validate_every": 10**9, "train.validate_images": 1_000_000,
    "eval.short_side": 8192, "eval.window": 2048, "eval.stride": 2048, "eval.batch_size": 65_536,
    "eval.pamr": 1000,
}  # fmt: skip
"""Of every field of integers: beyond, memory or time have no bound."""
_MEGAPIXELS = 2000
"""Most pixels, in millions, of what is held at once: 6 GB."""
_LONG_SIDE = 2048
"""Of a resized image, as in data/images.py, unless its short side is longer."""
_FLOAT32 = 1.18e-38, 3.4e38
"""The least and the greatest number that is computed with."""


def faults(leaves: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a config, a sentence each.

    Args:
      leaves: its values by dotted name, as `config.flatten` has them.
    """
    wrong = {name: fault for name, value in leaves.items() if (fault := _fault(name, value))}
    yield from wrong.values()
    for section, side in (("label", "crop"), ("eval", "window")):
        names = [f"{section}.{name}" for name in (side, "stride", "short_side")]
        if not wrong.keys() & {*names}:
            yield from _of_windows(names, *(leaves[name] for name in names))
    for count, side in (
        ("features.batch_size", "features.size"),
        ("eval.batch_size", "eval.window"),
    ):
        if not wrong.keys() & {count, side}:
            held = leaves[count] * leaves[side] ** 2 / 1e6
            if held > _MEGAPIXELS:
                yield (
                    f"{count} = {leaves[count]} images of {leaves[side]} x {leaves[side]} pixels "
                    f"({side}) are {held:,.0f} megapixels at once; give at most {_MEGAPIXELS:,}."
                )


def _fault(name: str, value: Any) -> str:
    """What is wrong with the value of one field; "" for nothing."""
    if name in _CHOICES and value not in _CHOICES[name]:
        return f"{name} is one of {', '.join(_CHOICES[name])}; got {value!r}."
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{name} is a finite number; got {value}."
    if value < 0 or (value == 0 and name not in _ZERO_ALLOWED):
        zero = "0 or " if name in _ZERO_ALLOWED else ""
        return f"{name} is {zero}a positive number; got {value}."
    if name in _SHARES and value > 1:
        return f"{name} is a share between 0 and 1; got {value}."
    if value > AT_MOST.get(name, _FLOAT32[1]):
        return f"{name} is at most {AT_MOST.get(name, _FLOAT32[1])}; got {value}."
    if 0 < value < _FLOAT32[0]:
        return f"{name} is too small for float32, which would make it 0; got {value}."
    return ""


def _of_windows(names: Sequence[str], side: int, stride: int, short_side: int) -> Iterator[str]:
    """What is wrong with sliding windows over an image, by the names of these three fields."""
    window, step, shorter = names
    if stride > side:
        yield f"{step} is at most {window}, or pixels would be left out; got {stride} > {side}."
    if side > short_side:
        yield f"{window} is at most {shorter}, so that a window fits; got {side} > {short_side}."
    if stride > side or side > short_side:
        return
    count = math.prod(
        math.ceil((length - side) / stride) + 1
        for length in (short_side, max(short_side, _LONG_SIDE))
    )
    if count * side**2 / 1e6 > _MEGAPIXELS:
        yield (
            f"{step} = {stride} gives {count:,} windows of {side} x {side} pixels ({window}) in an "
            f"image of short side {short_side} ({shorter}): {count * side**2 / 1e6:,.0f} "
            f"megapixels; at most {_MEGAPIXELS:,}. Give a larger stride or a shorter side."
        )
