"""The frozen models of stage 1: found, loaded, and known by a hash of their parameters."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
from collections.abc import Sequence

import torch
from etils import epath

from fmbseg_jax.config import Config
from fmbseg_jax.errors import UserError
from fmbseg_jax.io import machine
from fmbseg_jax.pretrained import hub
from fmbseg_jax.runs.workfolder import remember
from labelling import clip
from labelling.sam import checkpoint
from labelling.sam import model as sam
from labelling.stage1 import Labeller


def check(config: Config) -> None:
    """Raises UserError where a model is not there or cannot be read; keeps nothing of it."""
    checkpoint.read(config.models.sam)
    hub.locate(config.models.clip)  # the last: it may take a download


def load(
    config: Config, words: Sequence[str], identity: epath.Path, device: str, fresh: bool = False
) -> Labeller:
    """Loads the models onto a device, "cpu" or "cuda:1".

    Args:
      identity: JSON file of their sources and hashes; written by the first run, checked by others.
    """
    if torch.device(device).type == "cpu":
        keep_freed_memory()
    dtype = config.label.compute
    if dtype == "auto":
        dtype = "float32" if torch.device(device).type == "cpu" else "float16"
    clip_model = clip.Clip(config.models.clip, device, dtype)
    sam_model = sam.Sam(config.models.sam, device, dtype)
    facts = {
        "clip": config.models.clip,
        "clip_sha256": content_hash(clip_model.model),
        "sam": config.models.sam,
        "sam_sha256": content_hash(sam_model.model),
        "compute": dtype,
    }
    advice = "Put these models back, set label.compute as it was, or give another --workdir."
    remember(identity, facts, advice, fresh=fresh)
    return Labeller(clip_model, sam_model, words, config.label)


def keep_freed_memory() -> None:
    """Has glibc keep the memory of freed tensors for the next ones: up to a gigabyte.

    Else it gives those of megabytes back to the system, which clears them page by page when they
    come again.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(trim_threshold, 1 << 30)
        mallopt(mmap_threshold, 1 << 25)


def devices(name: str, workers: int = 0) -> list[str]:
    """The devices that `label.device` means, one for each of `workers`.

    Args:
      name: "auto" (all GPUs, or the CPU), "cpu", "cuda" (all GPUs), "cuda:1", ...
      workers: 0: one for each device.
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    found = {"auto": gpus or ["cpu"], "cuda": gpus}.get(name) or [name]
    try:
        torch.zeros(1, device=found[0])
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        machine.let_through(error, by_words=True)
        raise UserError(
            f"label.device is {name!r}, which cannot be used here ({str(error).splitlines()[0]}). "
            "Give cpu, cuda, cuda:1, ..., or auto."
        ) from None
    return [found[i % len(found)] for i in range(workers or len(found))]


def content_hash(model: torch.nn.Module) -> str:
    """SHA-256 over the names, shapes and values of the parameters, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
