"""PyTorch's own files, pytorch_model.bin, read without PyTorch.

Such a file is a zip archive: `NAME/data.pkl`, a pickle that says which tensors there are, and
`NAME/data/0`, `NAME/data/1`, ..., their bytes. The pickle is read by an unpickler that can rebuild
tensors and nothing else, so that a file of a stranger runs no code.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_DTYPES: dict[str, Any] = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
    "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}  # fmt: skip


class OldFormatError(ValueError):
    """The file is no zip archive: PyTorch before 1.6 wrote it, or it is damaged."""


def read(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    """How to read each tensor of a file, by its name.

    Args:
      path: what `torch.save` of PyTorch 1.6 or newer has written of a dict of tensors.

    Raises:
      OldFormatError: it is of another format.
      pickle.UnpicklingError: it asks for more than tensors.
      ValueError: it holds no dict of tensors.
    """
    if not zipfile.is_zipfile(path):
        raise OldFormatError(f"{path} is no zip archive")
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError(
                "it is packed, as no file of PyTorch's is: unpacked it may be any size"
            )
        listing = next((name for name in archive.namelist() if name.endswith("/data.pkl")), "")
        if not listing:
            raise ValueError("it has no data.pkl")
        folder = listing.removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in archive.namelist() and archive.read(order).decode() != sys.byteorder:
            raise ValueError("its numbers have the bytes of another processor's order")
        with archive.open(listing) as file:
            tensors = _TensorUnpickler(file).load()
    if not isinstance(tensors, dict) or not all(isinstance(t, _Tensor) for t in tensors.values()):
        keys = f", such as {list(tensors)[0]!r}" if isinstance(tensors, dict) and tensors else ""
        raise ValueError(f"it holds more than a dict of tensors{keys}")
    return {name: functools.partial(_load, path, folder, t) for name, t in tensors.items()}


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Numbers that tensors share."""

    dtype: np.dtype
    key: str
    """Name of its file in the archive."""
    count: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A view of a storage; offset and strides in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _TensorUnpickler(pickle.Unpickler):
    """Rebuilds tensors by name, as `_Tensor`, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("collections", "OrderedDict"): collections.OrderedDict,
        }
        if module == "torch" and name in _DTYPES:
            return np.dtype(_DTYPES[name])
        if (module, name) in known:
            return known[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no tensor")

    def persistent_load(self, given: Any) -> _Storage:
        kind, dtype, key, _, count = given
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise pickle.UnpicklingError(f"it refers to {kind!r}, which is no tensor")
        return _Storage(dtype, str(key), int(count))


def _rebuilt(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> _Tensor:
    """What `torch._utils._rebuild_tensor_v2` is called with: gradients and hooks are left out."""
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _load(path: Path, folder: str, tensor: _Tensor) -> np.ndarray:
    storage = tensor.storage
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, storage.dtype)
    with zipfile.ZipFile(path) as archive:
        numbers = np.frombuffer(archive.read(f"{folder}data/{storage.key}"), storage.dtype)
    steps = [step * (size - 1) for size, step in zip(tensor.shape, tensor.strides, strict=True)]
    # Never beyond the numbers: what lies there in memory is not the file's.
    if min(tensor.offset, *steps, 0) < 0 or tensor.offset + sum(steps) >= len(numbers):
        raise ValueError("a tensor reaches beyond its numbers")
    if math.prod(tensor.shape) > len(numbers):
        raise ValueError(f"a tensor {list(tensor.shape)} is made of {len(numbers)} numbers")
    strides = [step * storage.dtype.itemsize for step in tensor.strides]
    return np.lib.stride_tricks.as_strided(
        numbers[tensor.offset :], tensor.shape, strides, writeable=False
    )
