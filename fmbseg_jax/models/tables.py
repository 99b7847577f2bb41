"""What each parameter is called in the published files: complete in both directions.

A table maps our parameter's path to the tensor's name there and to how its layout changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from fmbseg_jax.models.specs import TextSpec, VisionSpec


def _keep(tensor: np.ndarray) -> np.ndarray:
    return tensor


def _flat(tensor: np.ndarray) -> np.ndarray:
    return tensor.reshape(-1)


def _rows(tensor: np.ndarray) -> np.ndarray:
    return tensor[0]


def _transpose(tensor: np.ndarray) -> np.ndarray:
    return tensor.T  # torch's Linear holds [out, in]


def _conv(tensor: np.ndarray) -> np.ndarray:
    return tensor.transpose(2, 3, 1, 0)  # [out, in, h, w] → [h, w, in, out]


def _first_half(tensor: np.ndarray) -> np.ndarray:
    return tensor[: len(tensor) // 2].T


def _second_half(tensor: np.ndarray) -> np.ndarray:
    return tensor[len(tensor) // 2 :].T


_Entries = dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Table:
    """Our path → (their name, change of layout); `unused` matches names left out on purpose."""

    entries: _Entries
    unused: str


def dinov2(spec: VisionSpec) -> Table:
    """Hugging Face's Dinov2Model and Dinov2WithRegistersModel, by the names in their files."""
    entries = _embedding(spec, "embeddings.patch_embeddings.projection")
    entries |= _norm("norm", "layernorm")
    for i in range(spec.transformer.depth):
        ours, theirs = f"transformer/block{i}", f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            entries |= _dense(f"{ours}/attention/{name}", f"{theirs}.attention.attention.{name}")
        entries |= _dense(f"{ours}/attention/out", f"{theirs}.attention.output.dense")
        if spec.transformer.gated:
            for name, half in (("gate", _first_half), ("up", _second_half)):
                entries[f"{ours}/mlp/{name}/kernel"] = (f"{theirs}.mlp.weights_in.weight", half)
                entries[f"{ours}/mlp/{name}/bias"] = (f"{theirs}.mlp.weights_in.bias", half)
            entries |= _dense(f"{ours}/mlp/down", f"{theirs}.mlp.weights_out")
        else:
            entries |= _dense(f"{ours}/mlp/up", f"{theirs}.mlp.fc1")
            entries |= _dense(f"{ours}/mlp/down", f"{theirs}.mlp.fc2")
        entries |= _norms_and_scales(ours, theirs)
    return Table(entries, unused=_MASK_TOKEN)


def dinov3(spec: VisionSpec) -> Table:
    """Hugging Face's DINOv3ViTModel."""
    entries = _embedding(spec, "embeddings.patch_embeddings")
    entries |= _norm("norm", "norm")
    for i in range(spec.transformer.depth):
        ours, theirs = f"transformer/block{i}", f"layer.{i}"
        for name, their in (("query", "q"), ("value", "v"), ("out", "o")):
            entries |= _dense(f"{ours}/attention/{name}", f"{theirs}.attention.{their}_proj")
        key = _dense(f"{ours}/attention/key", f"{theirs}.attention.k_proj")
        if not spec.transformer.key_bias:
            del key[f"{ours}/attention/key/bias"]
        entries |= key
        for name in ("up", "down", "gate") if spec.transformer.gated else ("up", "down"):
            entries |= _dense(f"{ours}/mlp/{name}", f"{theirs}.mlp.{name}_proj")
        entries |= _norms_and_scales(ours, theirs)
    return Table(entries, unused=_MASK_TOKEN)


_MASK_TOKEN = r"embeddings\.mask_token"  # only their training masks patches


def clip_text(spec: TextSpec) -> Table:
    """The text tower in Hugging Face's CLIPModel."""
    entries: _Entries = {
        "tokens/embedding": ("text_model.embeddings.token_embedding.weight", _keep),
        "positions": ("text_model.embeddings.position_embedding.weight", _keep),
        "projection/kernel": ("text_projection.weight", _transpose),
        **_norm("norm", "text_model.final_layer_norm"),
    }
    for i in range(spec.transformer.depth):
        entries |= _clip_block(f"transformer/block{i}", f"text_model.encoder.layers.{i}")
    # The image tower, the temperature, and a buffer that older files hold.
    return Table(entries, r"vision_model\..*|visual_projection\..*|logit_scale|.*\.position_ids")


def clip_vision(spec: VisionSpec) -> Table:
    """The vision tower in Hugging Face's CLIPModel."""
    entries: _Entries = {
        "embedding/cls": ("vision_model.embeddings.class_embedding", _keep),
        "embedding/positions": ("vision_model.embeddings.position_embedding.weight", _keep),
        "embedding/patch/kernel": ("vision_model.embeddings.patch_embedding.weight", _conv),
        "projection/kernel": ("visual_projection.weight", _transpose),
        **_norm("norm_before", "vision_model.pre_layrnorm"),  # their spelling
        **_norm("norm", "vision_model.post_layernorm"),
    }
    last = spec.transformer.depth - 1
    for i in range(spec.transformer.depth):
        ours = "last" if i == last else f"transformer/block{i}"
        entries |= _clip_block(ours, f"vision_model.encoder.layers.{i}")
    return Table(entries, r"text_model\..*|text_projection\..*|logit_scale|.*\.position_ids")


def _embedding(spec: VisionSpec, patch: str) -> _Entries:
    entries: _Entries = {
        "embedding/cls": ("embeddings.cls_token", _flat),
        "embedding/patch/kernel": (f"{patch}.weight", _conv),
        "embedding/patch/bias": (f"{patch}.bias", _keep),
    }
    if not spec.rope:
        entries["embedding/positions"] = ("embeddings.position_embeddings", _rows)
    if spec.registers:
        entries["embedding/registers"] = ("embeddings.register_tokens", _rows)
    return entries


def _norms_and_scales(ours: str, theirs: str) -> _Entries:
    """Of a block of DINOv2 or DINOv3."""
    entries: _Entries = {}
    for j in (1, 2):
        entries |= _norm(f"{ours}/norm{j}", f"{theirs}.norm{j}")
        entries[f"{ours}/scale{j}"] = (f"{theirs}.layer_scale{j}.lambda1", _keep)
    return entries


def _clip_block(ours: str, theirs: str) -> _Entries:
    entries: _Entries = {}
    for name, their in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out")):
        entries |= _dense(f"{ours}/attention/{name}", f"{theirs}.self_attn.{their}_proj")
    entries |= _dense(f"{ours}/mlp/up", f"{theirs}.mlp.fc1")
    entries |= _dense(f"{ours}/mlp/down", f"{theirs}.mlp.fc2")
    for j in (1, 2):
        entries |= _norm(f"{ours}/norm{j}", f"{theirs}.layer_norm{j}")
    return entries


def _dense(ours: str, theirs: str) -> _Entries:
    return {
        f"{ours}/kernel": (f"{theirs}.weight", _transpose),
        f"{ours}/bias": (f"{theirs}.bias", _keep),
    }


def _norm(ours: str, theirs: str) -> _Entries:
    return {
        f"{ours}/scale": (f"{theirs}.weight", _keep),
        f"{ours}/bias": (f"{theirs}.bias", _keep),
    }
