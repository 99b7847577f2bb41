"""Published checkpoints → Flax params, by tables that are complete in both directions.

A table maps our parameter's path to the tensor's name in the published file and to how its layout
changes. A missing, surplus or misshapen tensor raises with its name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from safetensors import safe_open

from fmbseg_jax import hub
from fmbseg_jax.errors import UserError


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


@dataclasses.dataclass(frozen=True)
class Table:
    """Our path → (their name, change of layout); `unused` matches names left out on purpose."""

    entries: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]]
    unused: str


def dinov2(depth: int) -> Table:
    """Hugging Face's Dinov2Model."""
    entries: dict[str, tuple[str, Callable]] = {
        "cls": ("embeddings.cls_token", _flat),
        "positions": ("embeddings.position_embeddings", _rows),
        "patch/kernel": ("embeddings.patch_embeddings.projection.weight", _conv),
        "patch/bias": ("embeddings.patch_embeddings.projection.bias", _keep),
        **_norm("norm", "layernorm"),
    }
    for i in range(depth):
        ours, theirs = f"transformer/block{i}", f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            entries |= _dense(f"{ours}/attention/{name}", f"{theirs}.attention.attention.{name}")
        entries |= _dense(f"{ours}/attention/out", f"{theirs}.attention.output.dense")
        entries |= _dense(f"{ours}/mlp/up", f"{theirs}.mlp.fc1")
        entries |= _dense(f"{ours}/mlp/down", f"{theirs}.mlp.fc2")
        for j in (1, 2):
            entries |= _norm(f"{ours}/norm{j}", f"{theirs}.norm{j}")
            entries[f"{ours}/scale{j}"] = (f"{theirs}.layer_scale{j}.lambda1", _keep)
    return Table(entries, unused=r"embeddings\.mask_token")  # only its training masks patches


def clip_text(depth: int) -> Table:
    """The text tower in Hugging Face's CLIPModel."""
    entries: dict[str, tuple[str, Callable]] = {
        "tokens/embedding": ("text_model.embeddings.token_embedding.weight", _keep),
        "positions": ("text_model.embeddings.position_embedding.weight", _keep),
        "projection/kernel": ("text_projection.weight", _transpose),
        **_norm("norm", "text_model.final_layer_norm"),
    }
    for i in range(depth):
        ours, theirs = f"transformer/block{i}", f"text_model.encoder.layers.{i}"
        for name, their in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out")):
            entries |= _dense(f"{ours}/attention/{name}", f"{theirs}.self_attn.{their}_proj")
        entries |= _dense(f"{ours}/mlp/up", f"{theirs}.mlp.fc1")
        entries |= _dense(f"{ours}/mlp/down", f"{theirs}.mlp.fc2")
        for j in (1, 2):
            entries |= _norm(f"{ours}/norm{j}", f"{theirs}.layer_norm{j}")
    # The image tower, the temperature, and a buffer that older files hold.
    return Table(entries, r"vision_model\..*|visual_projection\..*|logit_scale|.*\.position_ids")


def _dense(ours: str, theirs: str) -> dict[str, tuple[str, Callable]]:
    return {
        f"{ours}/kernel": (f"{theirs}.weight", _transpose),
        f"{ours}/bias": (f"{theirs}.bias", _keep),
    }


def _norm(ours: str, theirs: str) -> dict[str, tuple[str, Callable]]:
    return {
        f"{ours}/scale": (f"{theirs}.weight", _keep),
        f"{ours}/bias": (f"{theirs}.bias", _keep),
    }


def convert(folder: Path, table: Table, module: nn.Module, example: Array) -> dict[str, Any]:
    """The params of `module`, float32, from the safetensors files in `folder`.

    Args:
      example: an input of the module, which fixes the shapes of its params.

    Raises:
      UserError: names every tensor that is missing, surplus or misshapen.
    """
    files = _tensor_files(folder)
    expected = jax.eval_shape(module.init, jax.random.key(0), example)["params"]
    shapes = {"/".join(path): leaf.shape for path, leaf in flatten_dict(expected).items()}
    assert shapes.keys() == table.entries.keys(), shapes.keys() ^ table.entries.keys()
    known = {theirs for theirs, _ in table.entries.values()}
    faults = [f"missing: {name}" for name in sorted(known - files.keys())]
    faults += [
        f"surplus: {name}"
        for name in sorted(files.keys() - known)
        if not re.fullmatch(table.unused, name)
    ]
    params = {}
    for ours, (theirs, change) in table.entries.items():
        if theirs in files:
            with safe_open(files[theirs], framework="flax") as file:
                tensor = np.asarray(file.get_tensor(theirs)).astype(np.float32)
            params[tuple(ours.split("/"))] = change(tensor)
            if params[tuple(ours.split("/"))].shape != shapes[ours]:
                got = params[tuple(ours.split("/"))].shape
                faults.append(f"misshapen: {theirs} gives {got}, expected {shapes[ours]}")
    if faults:
        raise UserError(
            f"The weights in {folder} do not fit its config.json:\n  " + "\n  ".join(faults[:20])
        )
    return unflatten_dict({path: jnp.asarray(tensor) for path, tensor in params.items()})


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Which safetensors file holds each tensor; one file, or several with an index."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(
            f"No weights in {folder}: expected model.safetensors (or model.safetensors.index.json "
            "and its parts)."
        )
    try:
        with safe_open(path, framework="flax") as file:
            return dict.fromkeys(file.keys(), path)
    except Exception as error:  # safetensors' own error type is not public
        raise UserError(f"{path} is damaged ({error}). Fetch it again.") from None


def content_hash(source: str) -> str:
    """SHA-256 (first 16 digits) of a model's weights: which encoder an export belongs to."""
    digest = hashlib.sha256()
    for path in hub.weight_files(hub.locate(source)):
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()[:16]
