"""Published checkpoints: where they are, what is in their files, and from there to Flax params."""

from __future__ import annotations

import functools
import hashlib
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  # makes bfloat16 known to NumPy, as which safetensors reads it
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from safetensors import safe_open
from safetensors.numpy import save

from fmbseg_jax.errors import UserError
from fmbseg_jax.io import machine
from fmbseg_jax.io.files import write_atomically
from fmbseg_jax.pretrained import hub, pickled
from fmbseg_jax.pretrained.table import Table


def convert(folder: Path, table: Table, module: nn.Module, example: Array) -> dict[str, Any]:
    """The params of `module` from the published files in `folder`.

    Matrices come in the module's own dtype, what is added or multiplied channel by channel (biases,
    norms, layer scales, positions) in float32.

    Args:
      example: an input of the module, which fixes the shapes of its params.

    Raises:
      UserError: names every tensor that is missing, surplus or misshapen.
    """
    files = open_files(folder, table)
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
    for ours, (theirs, layout) in table.entries.items():
        if theirs not in files:
            continue
        tensor, wanted = files[theirs](), layout.published(shapes[ours])
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            faults.append(f"misshapen: {theirs} holds {tensor.dtype}, expected floating point")
            continue
        if tensor.shape != wanted:
            faults.append(f"misshapen: {theirs} is {tensor.shape}, expected {wanted}")
            continue
        matrix = ours.endswith("kernel")
        dtype = module.spec.transformer.dtype if matrix else "float32"
        params[tuple(ours.split("/"))] = jnp.asarray(layout.convert(tensor), dtype)
    if faults:
        raise UserError(f"The weights in {folder} do not fit its sizes:{_listed(faults)}")
    return unflatten_dict(params)


def write_pytorch(path: Path, params: Any, facts: dict[str, str]) -> str:
    """Writes params as safetensors, named and laid out as PyTorch's modules have them.

    `block/norm1/scale` becomes `block.norm1.weight`; `projection/kernel` [in, out] becomes
    `projection.weight` [out, in].

    Returns:
      SHA-256 of the file.
    """
    names = {"kernel": "weight", "scale": "weight", "bias": "bias"}
    tensors = {}
    for (*module, kind), value in flatten_dict(jax.device_get(params)).items():
        tensor = np.asarray(value)
        tensors[".".join([*module, names[kind]])] = np.ascontiguousarray(
            tensor.T if kind == "kernel" else tensor
        )
    contents = save(tensors, facts)
    write_atomically(path, contents)
    return hashlib.sha256(contents).hexdigest()


def _listed(faults: list[str], most: int = 10) -> str:
    """Lines of up to `most` faults of each kind, and how many more there are."""
    lines = ""
    for kind in ("missing", "surplus", "misshapen"):
        # A tensor that gives two params is named once.
        of_kind = list(dict.fromkeys(fault for fault in faults if fault.startswith(kind)))
        lines += "".join(f"\n  {fault}" for fault in of_kind[:most])
        if len(of_kind) > most:
            lines += f"\n  ... and {len(of_kind) - most} more {kind}"
    return lines


def open_files(folder: Path, table: Table) -> dict[str, Callable[[], np.ndarray]]:
    """How to read each tensor of a model, by its name in the table."""
    tensors = read_files(folder)
    if table.prefix and any(name.startswith(table.prefix) for name in tensors):
        return {name.removeprefix(table.prefix): read for name, read in tensors.items()}
    return tensors


def read_files(folder: Path) -> dict[str, Callable[[], np.ndarray]]:
    """How to read each tensor, by its name in the files: safetensors, else PyTorch's.

    Raises:
      UserError: there are none, they are damaged, or hold more than tensors.
    """
    tensors: dict[str, Callable[[], np.ndarray]] = {}
    for path in hub.weight_files(folder):
        try:
            readers = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{path} is refused or damaged: {str(error).splitlines()[0]}. Only tensors are "
                "read from such files, never code. Fetch it again, or take its safetensors."
            ) from None
        except UserError:
            raise
        except Exception as error:  # both libraries' readers raise many kinds
            machine.let_through(error, path)
            raise _damaged(path, error) from None
        tensors |= {name: functools.partial(_tensor, path, r) for name, r in readers.items()}
    return tensors


def _tensor(path: Path, read: Callable[[], np.ndarray]) -> np.ndarray:
    try:
        return read()
    except Exception as error:  # as above
        machine.let_through(error, path)
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    with open(path, "rb") as file:
        if file.read(len(_LFS)) == _LFS:
            return UserError(
                f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` there."
            )
    return UserError(f"{path} is damaged ({error}). Fetch it again.")


_LFS = b"version https://git-lfs"


def _safetensors(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    with safe_open(path, framework="np") as file:
        names = list(file.keys())

    def read(name: str) -> np.ndarray:
        with safe_open(path, framework="np") as file:
            return file.get_tensor(name)

    return {name: functools.partial(read, name) for name in names}


def _pickled(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    try:
        return pickled.read(path)
    except pickled.OldFormatError:
        return _old_format(path)


def _old_format(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    """A file of PyTorch before 1.6, which PyTorch alone reads."""
    try:
        import torch
    except ModuleNotFoundError:
        raise UserError(
            f"{path} is damaged, or in the format of PyTorch before 1.6, which needs PyTorch here: "
            "pip install torch. Or fetch the model's safetensors."
        ) from None
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose message says how to run the code in it
        raise pickle.UnpicklingError("it asks for more than tensors, or is no such file") from None
    return {name: functools.partial(_from_torch, tensor) for name, tensor in tensors.items()}


def _from_torch(tensor: Any) -> np.ndarray:
    return tensor.float().numpy()  # NumPy has no bfloat16 of torch's
