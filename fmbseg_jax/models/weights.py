"""Published checkpoints: where they are, what is in their files, and from there to Flax params."""

from __future__ import annotations

import functools
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
from fmbseg_jax.models.tables import Table


def convert(folder: Path, table: Table, module: nn.Module, example: Array) -> dict[str, Any]:
    """The params of `module` from the published files in `folder`.

    Matrices come in the module's own dtype, what is added or multiplied channel by channel (biases,
    norms, layer scales, positions) in float32.

    Args:
      example: an input of the module, which fixes the shapes of its params.

    Raises:
      UserError: names every tensor that is missing, surplus or misshapen.
    """
    files = _open_files(folder)
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
            tensor = change(files[theirs]())
            if tensor.shape != shapes[ours]:
                faults.append(f"misshapen: {theirs} gives {tensor.shape}, expected {shapes[ours]}")
            matrix = ours.endswith("kernel")
            dtype = module.spec.transformer.dtype if matrix else "float32"
            params[tuple(ours.split("/"))] = jnp.asarray(tensor, dtype)
    if faults:
        raise UserError(
            f"The weights in {folder} do not fit its config.json:\n  " + "\n  ".join(faults[:20])
        )
    return unflatten_dict(params)


def _open_files(folder: Path) -> dict[str, Callable[[], np.ndarray]]:
    """How to read each tensor, by its published name: safetensors, else pytorch_model.bin."""
    for name, read in (("model.safetensors", _safetensors), ("pytorch_model.bin", _pickled)):
        index = folder / f"{name}.index.json"
        if index.is_file():
            parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        elif (folder / name).is_file():
            parts = [name]
        else:
            continue
        tensors: dict[str, Callable[[], np.ndarray]] = {}
        for part in parts:
            try:
                tensors |= read(folder / part)
            except Exception as error:  # both libraries' readers raise many kinds
                raise UserError(f"{folder / part} is damaged ({error}). Fetch it again.") from None
        return tensors
    raise UserError(
        f"No weights in {folder}: expected model.safetensors or pytorch_model.bin, or its parts "
        "with their index.json."
    )


def _safetensors(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    with safe_open(path, framework="flax") as file:
        names = list(file.keys())

    def read(name: str) -> np.ndarray:
        with safe_open(path, framework="flax") as file:
            return np.asarray(file.get_tensor(name))

    return {name: functools.partial(read, name) for name in names}


def _pickled(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    import torch  # the only reader of its format; nothing else here needs it

    tensors = torch.load(path, map_location="cpu", weights_only=True)
    return {name: functools.partial(_from_torch, tensor) for name, tensor in tensors.items()}


def _from_torch(tensor: Any) -> np.ndarray:
    return tensor.float().numpy()  # numpy has no bfloat16 of torch's


def content_hash(source: str) -> str:
    """SHA-256 (first 16 digits) of a model's weights: which encoder an export belongs to."""
    files = hub.weight_files(hub.locate(source))
    return _hash_files(tuple((path, path.stat().st_mtime_ns) for path in files))


@functools.cache  # gigabytes that a program asks for up to three times
def _hash_files(files: tuple[tuple[Path, int], ...]) -> str:
    """Of files, each with its time of modification, so that a changed one is read again."""
    digest = hashlib.sha256()
    for path, _ in files:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()[:16]
