"""The frozen encoders by source: DINOv2 or v3 for patches, CLIP's towers for words and images.

A source is a folder in Hugging Face layout (config.json, safetensors) or a hub id. Each family is
asked in turn whether it is one of its models.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from fmbseg_jax.encoders import clip, dinov2, dinov3
from fmbseg_jax.encoders.clip import ClipVisionEncoder
from fmbseg_jax.encoders.text import TextEncoder, TextSpec
from fmbseg_jax.encoders.vision import VisionEncoder, VisionSpec
from fmbseg_jax.pretrained import config_json, hub, weights
from fmbseg_jax.pretrained.table import Table
from fmbseg_jax.pretrained.tokenizer import Tokenizer

FAMILIES = dinov2, dinov3
VISION = {name: spec for family in FAMILIES for name, spec in family.PRESETS.items()}
"""The published vision encoders, by hub id: to be built, counted and tested without their files."""


def load_vision(source: str, dtype: str = "float32") -> tuple[VisionEncoder, dict[str, Any]]:
    """A DINOv2 (with or without registers) or DINOv3 ViT as a Flax module and its params.

    Args:
      source: a folder in Hugging Face layout, a hub id, or a DINOv2 file of Meta's torch.hub.
      dtype: "float32" or "bfloat16": what matrices are kept and multiplied in.

    Raises:
      UserError: there is no such checkpoint, or it is of another kind.
    """
    folder = hub.locate(source)
    spec, table = vision_tower(folder, source)
    module = VisionEncoder(_with_dtype(spec, dtype))
    return module, weights.convert(folder, table, module, _example(spec))


def vision_spec(source: str) -> VisionSpec:
    """The vision encoder of `load_vision`, without loading it."""
    return vision_tower(hub.locate(source), source)[0]


def vision_tower(folder: Path, source: str) -> tuple[VisionSpec, Table]:
    """The spec of a published vision encoder, and the names of its tensors."""
    if folder.is_file():
        return dinov2.tower_of_file(folder)
    config = config_json.read(folder, source)
    kind = config_json.check_kind(config, source, config_json.DINO, "the vision encoder")
    family = next(family for family in FAMILIES if kind in family.KINDS)
    spec = config_json.described(family.spec_of, config, source)
    mean, std = config_json.normalisation(folder, source, (spec.mean, spec.std))
    return dataclasses.replace(spec, mean=mean, std=std), family.table_of(spec)


def is_clip(folder: Path, source: str) -> bool:
    """Whether a published model is a CLIP."""
    return (
        folder.is_dir() and config_json.read(folder, source).get("model_type") == config_json.CLIP
    )


def load_clip_vision(
    source: str, dtype: str = "float32"
) -> tuple[ClipVisionEncoder, dict[str, Any]]:
    """A CLIP checkpoint's vision tower as a Flax module and its params; see `load_vision`."""
    folder = hub.locate(source)
    config_json.normalisation(folder, source)  # without it words can be used, images cannot
    spec, table = clip_vision_tower(folder, source)
    module = ClipVisionEncoder(_with_dtype(spec, dtype))
    return module, weights.convert(folder, table, module, _example(spec))


def clip_vision_tower(folder: Path, source: str) -> tuple[VisionSpec, Table]:
    """The spec of a CLIP's vision tower, and the names of its tensors."""
    spec = config_json.described(clip.vision_spec, config_json.read_clip(folder, source), source)
    mean, std = config_json.normalisation(folder, source, (spec.mean, spec.std))
    return dataclasses.replace(spec, mean=mean, std=std), clip.vision_table(spec)


def load_text(source: str, dtype: str = "float32") -> tuple[TextEncoder, dict[str, Any], Tokenizer]:
    """A CLIP checkpoint's text tower as a Flax module, its params, and its tokenizer.

    Raises:
      UserError: there is no such checkpoint, or it is not a CLIP.
    """
    folder = hub.locate(source)
    spec, table = text_tower(folder, source)
    tokenizer = Tokenizer(folder, spec.vocabulary, spec.length)
    module = TextEncoder(_with_dtype(dataclasses.replace(spec, end=tokenizer.end), dtype))
    params = weights.convert(folder, table, module, jnp.zeros((1, spec.length), jnp.int32))
    return module, params, tokenizer


def text_spec(source: str) -> TextSpec:
    """The text tower of a CLIP checkpoint, without loading it."""
    return text_tower(hub.locate(source), source)[0]


def text_tower(folder: Path, source: str) -> tuple[TextSpec, Table]:
    """The spec of a CLIP's text tower, and the names of its tensors."""
    spec = config_json.described(clip.text_spec, config_json.read_clip(folder, source), source)
    return spec, clip.text_table(spec)


def _example(spec: VisionSpec) -> Array:
    return jnp.zeros((1, spec.patch, spec.patch, 3), jnp.float32)


def _with_dtype(spec: Any, dtype: str) -> Any:
    return dataclasses.replace(spec, transformer=dataclasses.replace(spec.transformer, dtype=dtype))
