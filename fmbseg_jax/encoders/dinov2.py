"""DINOv2 (Oquab et al. 2023), with and without registers: sizes, names of parameters, presets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmbseg_jax.encoders.vision import VisionSpec
from fmbseg_jax.errors import UserError
from fmbseg_jax.nn.transformer import Spec
from fmbseg_jax.pretrained import checksums, weights
from fmbseg_jax.pretrained.config_json import activation
from fmbseg_jax.pretrained.table import CONV, FLAT, KEEP, ROWS, Entries, Table, dense, joined, norm

KINDS = "dinov2", "dinov2_with_registers"
"""`model_type` of its config.json."""


def spec_of(config: dict[str, Any]) -> VisionSpec:
    """From the config.json of a Dinov2Model, or one with registers."""
    width, gated = config["hidden_size"], bool(config.get("use_swiglu_ffn"))
    hidden = int(width * config["mlp_ratio"])
    if gated:  # two thirds of it, in eights: as many parameters as without a gate
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    return VisionSpec(
        transformer=Spec(
            width=width,
            depth=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            mlp_width=hidden,
            activation="silu" if gated else activation(config),
            epsilon=config["layer_norm_eps"],
            layer_scale=True,
            gated=gated,
        ),
        patch=config["patch_size"],
        grid=config["image_size"] // config["patch_size"],
        registers=config.get("num_register_tokens", 0),
        antialias="num_register_tokens" in config,
    )


def table_of(spec: VisionSpec) -> Table:
    """Hugging Face's Dinov2Model and Dinov2WithRegistersModel, by the names in their files."""
    entries = embedding(spec, "embeddings.patch_embeddings.projection")
    entries |= norm("norm", "layernorm")
    for i in range(spec.transformer.depth):
        ours, theirs = f"transformer/block{i}", f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            entries |= dense(f"{ours}/attention/{name}", f"{theirs}.attention.attention.{name}")
        entries |= dense(f"{ours}/attention/out", f"{theirs}.attention.output.dense")
        if spec.transformer.gated:
            entries |= joined(f"{ours}/mlp", ("gate", "up"), f"{theirs}.mlp.weights_in")
            entries |= dense(f"{ours}/mlp/down", f"{theirs}.mlp.weights_out")
        else:
            entries |= dense(f"{ours}/mlp/up", f"{theirs}.mlp.fc1")
            entries |= dense(f"{ours}/mlp/down", f"{theirs}.mlp.fc2")
        entries |= norms_and_scales(ours, theirs)
    kind = "dinov2_with_registers" if spec.registers else "dinov2"
    return Table(entries, UNUSED, prefix=f"{kind}.")


def embedding(spec: VisionSpec, patch: str) -> Entries:
    """Of the patches, the class token and, where there are any, registers and positions."""
    entries: Entries = {
        "embedding/cls": ("embeddings.cls_token", FLAT),
        "embedding/patch/kernel": (f"{patch}.weight", CONV),
        "embedding/patch/bias": (f"{patch}.bias", KEEP),
    }
    if not spec.rope:
        entries["embedding/positions"] = ("embeddings.position_embeddings", ROWS)
    if spec.registers:
        entries["embedding/registers"] = ("embeddings.register_tokens", ROWS)
    return entries


def norms_and_scales(ours: str, theirs: str) -> Entries:
    """Of a block of DINOv2 or DINOv3."""
    entries: Entries = {}
    for j in (1, 2):
        entries |= norm(f"{ours}/norm{j}", f"{theirs}.norm{j}")
        entries[f"{ours}/scale{j}"] = (f"{theirs}.layer_scale{j}.lambda1", KEEP)
    return entries


# Only its training masks patches; a classifier's head is not needed.
UNUSED = r"embeddings\.mask_token|classifier\..*"


def tower_of_file(file: Path) -> tuple[VisionSpec, Table]:
    """The spec and the names of tensors of a file of Meta's torch.hub."""
    checksums.check(file)
    files = weights.read_files(file)
    if "rope_embed.periods" in files:
        raise UserError(
            f"{file} is DINOv3 in Meta's own layout, which is not read; give it in Hugging Face's, "
            "such as facebook/dinov3-vitb16-pretrain-lvd1689m."
        )
    try:
        spec = _spec_of_torch_hub({name: read().shape for name, read in files.items()})
    except KeyError as error:
        raise UserError(
            f"{file} is no DINOv2 of torch.hub: it has no tensor {error}. Give dinov2_vitb14_"
            "pretrain.pth or one like it, or a hub id such as facebook/dinov2-base."
        ) from None
    return spec, _table_of_torch_hub(spec)


def _spec_of_torch_hub(shapes: Mapping[str, tuple[int, ...]]) -> VisionSpec:
    """From the shapes in a file of Meta's torch.hub, which has no config.json beside it."""
    _, positions, width = shapes["pos_embed"]
    gated = "blocks.0.mlp.w12.weight" in shapes
    hidden = shapes["blocks.0.mlp.w3.weight" if gated else "blocks.0.mlp.fc2.weight"][1]
    registers = shapes.get("register_tokens", (1, 0, width))[1]
    return VisionSpec(
        transformer=Spec(
            width=width,
            depth=sum(name.endswith(".ls1.gamma") for name in shapes),
            heads=width // 64,  # of all DINOv2
            mlp_width=hidden,
            activation="silu" if gated else "gelu",
            epsilon=1e-6,
            layer_scale=True,
            gated=gated,
        ),
        patch=shapes["patch_embed.proj.weight"][-1],
        grid=math.isqrt(positions - 1),
        registers=registers,
        antialias=registers > 0,
    )


def _table_of_torch_hub(spec: VisionSpec) -> Table:
    """Meta's own names, of DINOv2 (with and without registers)."""
    entries: Entries = {
        "embedding/cls": ("cls_token", FLAT),
        "embedding/positions": ("pos_embed", ROWS),
        "embedding/patch/kernel": ("patch_embed.proj.weight", CONV),
        "embedding/patch/bias": ("patch_embed.proj.bias", KEEP),
        **norm("norm", "norm"),
    }
    if spec.registers:
        entries["embedding/registers"] = ("register_tokens", ROWS)
    for i in range(spec.transformer.depth):
        ours, theirs = f"transformer/block{i}", f"blocks.{i}"
        entries |= joined(f"{ours}/attention", ("query", "key", "value"), f"{theirs}.attn.qkv")
        entries |= dense(f"{ours}/attention/out", f"{theirs}.attn.proj")
        if spec.transformer.gated:
            entries |= joined(f"{ours}/mlp", ("gate", "up"), f"{theirs}.mlp.w12")
            entries |= dense(f"{ours}/mlp/down", f"{theirs}.mlp.w3")
        else:
            entries |= dense(f"{ours}/mlp/up", f"{theirs}.mlp.fc1")
            entries |= dense(f"{ours}/mlp/down", f"{theirs}.mlp.fc2")
        for j in (1, 2):
            entries |= norm(f"{ours}/norm{j}", f"{theirs}.norm{j}")
            entries[f"{ours}/scale{j}"] = (f"{theirs}.ls{j}.gamma", KEEP)
    return Table(entries, unused="mask_token")


def _preset(width: int, depth: int, heads: int, registers: int = 0) -> VisionSpec:
    gated = width == 1536  # g
    config = {
        "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
        "mlp_ratio": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "use_swiglu_ffn": gated,
        "image_size": 518, "patch_size": 14,
    }  # fmt: skip
    return spec_of(config | ({"num_register_tokens": registers} if registers else {}))


PRESETS = {
    "facebook/dinov2-small": _preset(384, 12, 6),
    "facebook/dinov2-base": _preset(768, 12, 12),
    "facebook/dinov2-large": _preset(1024, 24, 16),
    "facebook/dinov2-giant": _preset(1536, 40, 24),
    "facebook/dinov2-with-registers-small": _preset(384, 12, 6, registers=4),
    "facebook/dinov2-with-registers-base": _preset(768, 12, 12, registers=4),
    "facebook/dinov2-with-registers-large": _preset(1024, 24, 16, registers=4),
    "facebook/dinov2-with-registers-giant": _preset(1536, 40, 24, registers=4),
}
"""By hub id."""
