"""What each parameter is called in the published files: complete in both directions.

A table maps our parameter's path to the tensor's name there and to how its layout changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fmbseg_jax.models.specs import TextSpec, VisionSpec

_Shape = tuple[int, ...]


class Layout(NamedTuple):
    """How a tensor is laid out in the published file, and how ours comes of it."""

    published: Callable[[_Shape], _Shape]
    """From our shape to theirs."""
    convert: Callable[[np.ndarray], np.ndarray]
    """From their tensor to ours."""


_KEEP = Layout(lambda ours: ours, lambda tensor: tensor)
_FLAT = Layout(lambda ours: (1, 1, *ours), lambda tensor: tensor[0, 0])
_ROWS = Layout(lambda ours: (1, *ours), lambda tensor: tensor[0])
# torch's Linear holds [out, in], its Conv2d [out, in, h, w]; ours [in, out] and [h, w, in, out].
_TRANSPOSE = Layout(lambda ours: ours[::-1], lambda tensor: tensor.T)
_CONV = Layout(
    lambda ours: (ours[3], ours[2], *ours[:2]), lambda tensor: tensor.transpose(2, 3, 1, 0)
)


def _part(index: int, count: int) -> Layout:
    """One of several matrices, or biases, that lie on top of each other in one tensor."""
    return Layout(
        lambda ours: (count * ours[-1], *ours[:-1]),
        lambda tensor: np.split(tensor, count)[index].T,
    )


_Entries = dict[str, tuple[str, Layout]]


@dataclasses.dataclass(frozen=True)
class Table:
    """Our path → (their name, its layout); `unused` matches names left out on purpose."""

    entries: _Entries
    unused: str
    prefix: str = ""
    """What all names may begin with: in a model with a head on top of the tower."""


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
            entries |= _joined(f"{ours}/mlp", ("gate", "up"), f"{theirs}.mlp.weights_in")
            entries |= _dense(f"{ours}/mlp/down", f"{theirs}.mlp.weights_out")
        else:
            entries |= _dense(f"{ours}/mlp/up", f"{theirs}.mlp.fc1")
            entries |= _dense(f"{ours}/mlp/down", f"{theirs}.mlp.fc2")
        entries |= _norms_and_scales(ours, theirs)
    kind = "dinov2_with_registers" if spec.registers else "dinov2"
    return Table(entries, _MASK_TOKEN_AND_HEAD, prefix=f"{kind}.")


def dinov2_of_torch_hub(spec: VisionSpec) -> Table:
    """Meta's own names, of DINOv2 (with and without registers)."""
    entries: _Entries = {
        "embedding/cls": ("cls_token", _FLAT),
        "embedding/positions": ("pos_embed", _ROWS),
        "embedding/patch/kernel": ("patch_embed.proj.weight", _CONV),
        "embedding/patch/bias": ("patch_embed.proj.bias", _KEEP),
        **_norm("norm", "norm"),
    }
    if spec.registers:
        entries["embedding/registers"] = ("register_tokens", _ROWS)
    for i in range(spec.transformer.depth):
        ours, theirs = f"transformer/block{i}", f"blocks.{i}"
        entries |= _joined(f"{ours}/attention", ("query", "key", "value"), f"{theirs}.attn.qkv")
        entries |= _dense(f"{ours}/attention/out", f"{theirs}.attn.proj")
        if spec.transformer.gated:
            entries |= _joined(f"{ours}/mlp", ("gate", "up"), f"{theirs}.mlp.w12")
            entries |= _dense(f"{ours}/mlp/down", f"{theirs}.mlp.w3")
        else:
            entries |= _dense(f"{ours}/mlp/up", f"{theirs}.mlp.fc1")
            entries |= _dense(f"{ours}/mlp/down", f"{theirs}.mlp.fc2")
        for j in (1, 2):
            entries |= _norm(f"{ours}/norm{j}", f"{theirs}.norm{j}")
            entries[f"{ours}/scale{j}"] = (f"{theirs}.ls{j}.gamma", _KEEP)
    return Table(entries, unused="mask_token")


def dinov3(spec: VisionSpec) -> Table:
    """Hugging Face's DINOv3ViTModel."""
    entries = _embedding(spec, "embeddings.patch_embeddings")
    entries |= _norm("norm", "norm")
    for i in range(spec.transformer.depth):
        ours, theirs = f"transformer/block{i}", f"layer.{i}"
        for name, their in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
            layer = _dense(f"{ours}/attention/{name}", f"{theirs}.attention.{their}_proj")
            if not getattr(spec.transformer, f"{name}_bias", True):
                del layer[f"{ours}/attention/{name}/bias"]
            entries |= layer
        for name in ("up", "down", "gate") if spec.transformer.gated else ("up", "down"):
            entries |= _dense(f"{ours}/mlp/{name}", f"{theirs}.mlp.{name}_proj")
        entries |= _norms_and_scales(ours, theirs)
    return Table(entries, _MASK_TOKEN_AND_HEAD, prefix="dinov3_vit.")


# Only their training masks patches; a classifier's head is not needed.
_MASK_TOKEN_AND_HEAD = r"embeddings\.mask_token|classifier\..*"


def clip_text(spec: TextSpec) -> Table:
    """The text tower in Hugging Face's CLIPModel."""
    entries: _Entries = {
        "tokens/embedding": ("text_model.embeddings.token_embedding.weight", _KEEP),
        "positions": ("text_model.embeddings.position_embedding.weight", _KEEP),
        "projection/kernel": ("text_projection.weight", _TRANSPOSE),
        **_norm("norm", "text_model.final_layer_norm"),
    }
    for i in range(spec.transformer.depth):
        entries |= _clip_block(f"transformer/block{i}", f"text_model.encoder.layers.{i}")
    # The image tower, the temperature, and a buffer that older files hold.
    return Table(entries, r"vision_model\..*|visual_projection\..*|logit_scale|.*\.position_ids")


def clip_vision(spec: VisionSpec) -> Table:
    """The vision tower in Hugging Face's CLIPModel."""
    entries: _Entries = {
        "embedding/cls": ("vision_model.embeddings.class_embedding", _KEEP),
        "embedding/positions": ("vision_model.embeddings.position_embedding.weight", _KEEP),
        "embedding/patch/kernel": ("vision_model.embeddings.patch_embedding.weight", _CONV),
        "projection/kernel": ("visual_projection.weight", _TRANSPOSE),
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
        "embedding/cls": ("embeddings.cls_token", _FLAT),
        "embedding/patch/kernel": (f"{patch}.weight", _CONV),
        "embedding/patch/bias": (f"{patch}.bias", _KEEP),
    }
    if not spec.rope:
        entries["embedding/positions"] = ("embeddings.position_embeddings", _ROWS)
    if spec.registers:
        entries["embedding/registers"] = ("embeddings.register_tokens", _ROWS)
    return entries


def _norms_and_scales(ours: str, theirs: str) -> _Entries:
    """Of a block of DINOv2 or DINOv3."""
    entries: _Entries = {}
    for j in (1, 2):
        entries |= _norm(f"{ours}/norm{j}", f"{theirs}.norm{j}")
        entries[f"{ours}/scale{j}"] = (f"{theirs}.layer_scale{j}.lambda1", _KEEP)
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


def _joined(ours: str, names: Sequence[str], theirs: str) -> _Entries:
    """Layers that are one in the published file, in the order of their rows."""
    entries: _Entries = {}
    for i, name in enumerate(names):
        part = _part(i, len(names))
        entries[f"{ours}/{name}/kernel"] = (f"{theirs}.weight", part)
        entries[f"{ours}/{name}/bias"] = (f"{theirs}.bias", part)
    return entries


def _dense(ours: str, theirs: str) -> _Entries:
    return {
        f"{ours}/kernel": (f"{theirs}.weight", _TRANSPOSE),
        f"{ours}/bias": (f"{theirs}.bias", _KEEP),
    }


def _norm(ours: str, theirs: str) -> _Entries:
    return {
        f"{ours}/scale": (f"{theirs}.weight", _KEEP),
        f"{ours}/bias": (f"{theirs}.bias", _KEEP),
    }
