"""DINOv3 (Siméoni et al. 2025): sizes, names of parameters, presets."""

from __future__ import annotations

import dataclasses
from typing import Any

from fmbseg_jax.encoders.dinov2 import UNUSED, embedding, norms_and_scales
from fmbseg_jax.encoders.vision import VisionSpec
from fmbseg_jax.pretrained.config_json import blocks
from fmbseg_jax.pretrained.table import Table, dense, norm

KINDS = ("dinov3_vit",)
"""`model_type` of its config.json."""


def spec_of(config: dict[str, Any]) -> VisionSpec:
    """From the config.json of a DINOv3ViTModel."""
    return VisionSpec(
        transformer=dataclasses.replace(
            blocks(config),
            layer_scale=True,
            gated=config["use_gated_mlp"],
            query_bias=config.get("query_bias", True),  # the 7B model has none of the three
            key_bias=config["key_bias"],
            value_bias=config.get("value_bias", True),
        ),
        patch=config["patch_size"],
        grid=config["image_size"] // config["patch_size"],
        registers=config["num_register_tokens"],
        rope=config.get("rope_theta") or config["rope_parameters"]["rope_theta"],
    )


def table_of(spec: VisionSpec) -> Table:
    """Hugging Face's DINOv3ViTModel."""
    entries = embedding(spec, "embeddings.patch_embeddings")
    entries |= norm("norm", "norm")
    for i in range(spec.transformer.depth):
        ours, theirs = f"transformer/block{i}", f"layer.{i}"
        for name, their in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
            layer = dense(f"{ours}/attention/{name}", f"{theirs}.attention.{their}_proj")
            if not getattr(spec.transformer, f"{name}_bias", True):
                del layer[f"{ours}/attention/{name}/bias"]
            entries |= layer
        for name in ("up", "down", "gate") if spec.transformer.gated else ("up", "down"):
            entries |= dense(f"{ours}/mlp/{name}", f"{theirs}.mlp.{name}_proj")
        entries |= norms_and_scales(ours, theirs)
    return Table(entries, UNUSED, prefix="dinov3_vit.")


def _preset(
    width: int, depth: int, heads: int, hidden: int, gated: bool = False, qv_bias: bool = True
) -> VisionSpec:
    return spec_of(
        {
            "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
            "intermediate_size": hidden, "hidden_act": "silu" if gated else "gelu",
            "layer_norm_eps": 1e-5, "use_gated_mlp": gated, "query_bias": qv_bias,
            "key_bias": False, "value_bias": qv_bias, "rope_theta": 100.0,
            "num_register_tokens": 4, "image_size": 224, "patch_size": 16,
        }
    )  # fmt: skip


PRESETS = {
    "facebook/dinov3-vits16-pretrain-lvd1689m": _preset(384, 12, 6, 1536),
    "facebook/dinov3-vits16plus-pretrain-lvd1689m": _preset(384, 12, 6, 1536, gated=True),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": _preset(768, 12, 12, 3072),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": _preset(1024, 24, 16, 4096),
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": _preset(1280, 32, 20, 5120, gated=True),
    "facebook/dinov3-vit7b16-pretrain-lvd1689m": _preset(
        4096, 40, 32, 8192, gated=True, qv_bias=False
    ),
}
"""By hub id."""
