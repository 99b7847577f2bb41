"""What the parameters of each encoder are called in its published files."""

from __future__ import annotations

from fmbseg_jax.encoders.specs import TextSpec, VisionSpec
from fmbseg_jax.pretrained.table import (
    CONV,
    FLAT,
    KEEP,
    ROWS,
    TRANSPOSE,
    Entries,
    Table,
    dense,
    joined,
    norm,
)


def dinov2(spec: VisionSpec) -> Table:
    """Hugging Face's Dinov2Model and Dinov2WithRegistersModel, by the names in their files."""
    entries = _embedding(spec, "embeddings.patch_embeddings.projection")
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
        entries |= _norms_and_scales(ours, theirs)
    kind = "dinov2_with_registers" if spec.registers else "dinov2"
    return Table(entries, _MASK_TOKEN_AND_HEAD, prefix=f"{kind}.")


def dinov2_of_torch_hub(spec: VisionSpec) -> Table:
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


def dinov3(spec: VisionSpec) -> Table:
    """Hugging Face's DINOv3ViTModel."""
    entries = _embedding(spec, "embeddings.patch_embeddings")
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
        entries |= _norms_and_scales(ours, theirs)
    return Table(entries, _MASK_TOKEN_AND_HEAD, prefix="dinov3_vit.")


# Only their training masks patches; a classifier's head is not needed.
_MASK_TOKEN_AND_HEAD = r"embeddings\.mask_token|classifier\..*"


def clip_text(spec: TextSpec) -> Table:
    """The text tower in Hugging Face's CLIPModel."""
    entries: Entries = {
        "tokens/embedding": ("text_model.embeddings.token_embedding.weight", KEEP),
        "positions": ("text_model.embeddings.position_embedding.weight", KEEP),
        "projection/kernel": ("text_projection.weight", TRANSPOSE),
        **norm("norm", "text_model.final_layer_norm"),
    }
    for i in range(spec.transformer.depth):
        entries |= _clip_block(f"transformer/block{i}", f"text_model.encoder.layers.{i}")
    # The image tower, the temperature, and a buffer that older files hold.
    return Table(entries, r"vision_model\..*|visual_projection\..*|logit_scale|.*\.position_ids")


def clip_vision(spec: VisionSpec) -> Table:
    """The vision tower in Hugging Face's CLIPModel."""
    entries: Entries = {
        "embedding/cls": ("vision_model.embeddings.class_embedding", KEEP),
        "embedding/positions": ("vision_model.embeddings.position_embedding.weight", KEEP),
        "embedding/patch/kernel": ("vision_model.embeddings.patch_embedding.weight", CONV),
        "projection/kernel": ("visual_projection.weight", TRANSPOSE),
        **norm("norm_before", "vision_model.pre_layrnorm"),  # their spelling
        **norm("norm", "vision_model.post_layernorm"),
    }
    last = spec.transformer.depth - 1
    for i in range(spec.transformer.depth):
        ours = "last" if i == last else f"transformer/block{i}"
        entries |= _clip_block(ours, f"vision_model.encoder.layers.{i}")
    return Table(entries, r"text_model\..*|text_projection\..*|logit_scale|.*\.position_ids")


def _embedding(spec: VisionSpec, patch: str) -> Entries:
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


def _norms_and_scales(ours: str, theirs: str) -> Entries:
    """Of a block of DINOv2 or DINOv3."""
    entries: Entries = {}
    for j in (1, 2):
        entries |= norm(f"{ours}/norm{j}", f"{theirs}.norm{j}")
        entries[f"{ours}/scale{j}"] = (f"{theirs}.layer_scale{j}.lambda1", KEEP)
    return entries


def _clip_block(ours: str, theirs: str) -> Entries:
    entries: Entries = {}
    for name, their in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out")):
        entries |= dense(f"{ours}/attention/{name}", f"{theirs}.self_attn.{their}_proj")
    entries |= dense(f"{ours}/mlp/up", f"{theirs}.mlp.fc1")
    entries |= dense(f"{ours}/mlp/down", f"{theirs}.mlp.fc2")
    for j in (1, 2):
        entries |= norm(f"{ours}/norm{j}", f"{theirs}.layer_norm{j}")
    return entries
