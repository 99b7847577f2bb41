"""SAM as transformers publishes it: its tensors under Meta's names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_NAMES = (
    (r"vision_encoder\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
    (r"vision_encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"image_encoder.blocks.\1.norm\2."),
    (r"vision_encoder\.layers\.", "image_encoder.blocks."),
    (r"vision_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
    (r"vision_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
    (r"vision_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
    (r"vision_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
    (r"vision_encoder\.", "image_encoder."),
    (
        r"shared_image_embedding\.positional_embedding",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
    (r"prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
    (r"prompt_encoder\.mask_embed\.conv1\.", "prompt_encoder.mask_downscaling.0."),
    (r"prompt_encoder\.mask_embed\.layer_norm1\.", "prompt_encoder.mask_downscaling.1."),
    (r"prompt_encoder\.mask_embed\.conv2\.", "prompt_encoder.mask_downscaling.3."),
    (r"prompt_encoder\.mask_embed\.layer_norm2\.", "prompt_encoder.mask_downscaling.4."),
    (r"prompt_encoder\.mask_embed\.conv3\.", "prompt_encoder.mask_downscaling.6."),
    (r"(mask_decoder\.transformer\.layers\.\d+)\.layer_norm(\d)\.", r"\1.norm\2."),
    (r"mask_decoder\.transformer\.layer_norm_final", "mask_decoder.transformer.norm_final"),
    (r"mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
    (r"mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
    (r"mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
)
"""The first that fits the beginning of a name counts; what none fits keeps its name."""

_MLP = re.compile(r"(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.(.+)")

SHARED = "prompt_encoder.shared_embedding.positional_embedding"
"""The same tensor as shared_image_embedding's; some files hold both."""


def to_meta(names: Iterable[str]) -> dict[str, str]:
    """From transformers' names of all tensors of a SamModel to Meta's."""
    names = [name for name in names if name != SHARED]
    return {name: _mlp_layer(name, names) or _renamed(name) for name in names}


def _renamed(name: str) -> str:
    for pattern, replacement in _NAMES:
        renamed, found = re.subn(rf"\A{pattern}", replacement, name)
        if found:
            return renamed
    return name


def _mlp_layer(name: str, names: list[str]) -> str | None:
    """proj_in, layers.0, ..., proj_out are layers 0, 1, ... there."""
    match = _MLP.match(name)
    if not match:
        return None
    mlp, layer = match[1], match[2]
    between = sum(other.startswith(f"{mlp}.layers.") for other in names) // 2
    kind = layer.rsplit(".", 1)[1]
    number = {"proj_in": 0, "proj_out": between + 1}.get(layer.split(".")[0])
    if number is None:
        number = int(layer.split(".")[1]) + 1
    return f"{mlp}.layers.{number}.{kind}"


_OTHERS = {
    r"mask_decoder\.(hf_token|compress_vit_feat)\..*": "SAM-HQ",
    r"image_encoder\.(layers\.0|patch_embed\.seq)\..*": "MobileSAM",
    r"image_encoder\.(trunk|neck\.convs)\..*|sam_mask_decoder\..*": "SAM 2",
    r"detector\..*": "SAM 3",
}
"""By names that their tensors have, and SAM's have not."""


def other_model(checkpoint: Any) -> str:
    """What an unpickled checkpoint is of, where it is of a known successor of SAM; else ""."""
    tensors = checkpoint.get("model", checkpoint) if isinstance(checkpoint, dict) else {}
    for pattern, model in _OTHERS.items():
        if any(re.fullmatch(pattern, str(name)) for name in tensors):
            return model
    return ""
