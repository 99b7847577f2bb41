"""Published models: a folder here, or files of the Hugging Face hub, fetched once."""

from __future__ import annotations

import re
from pathlib import Path

from fmbseg_jax.errors import UserError


def locate(source: str) -> Path:
    """The folder of a model: `source` itself, or a hub id's files, fetched once under a bar.

    Raises:
      UserError: it is neither; the message says how to get it.
    """
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise UserError(
            f"No model at {source}: give a folder, or a hub id such as facebook/dinov2-base."
        )
    from huggingface_hub import snapshot_download

    try:
        try:  # the cache first: without a network the hub's client would retry for half a minute
            folder = Path(snapshot_download(source, local_files_only=True))
            if weight_files(folder):
                return folder
        except OSError:
            pass
        return Path(snapshot_download(source, allow_patterns=_wanted(source)))
    except Exception as error:  # offline, unknown id, no access: the hub client has many kinds
        raise UserError(
            f"{source} is neither a folder here nor to be had from the Hugging Face hub "
            f"({type(error).__name__}). On a machine with a connection run\n"
            f"    hf download {source} --local-dir {Path(source).name}\n"
            "copy that folder here, and give its path instead of the id."
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights: safetensors, or where there are none PyTorch's."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _wanted(source: str) -> list[str]:
    """What to fetch: pytorch_model.bin only where nobody has published safetensors."""
    from huggingface_hub import list_repo_files

    safe = any(name.endswith(".safetensors") for name in list_repo_files(source))
    return ["*.json", "*.txt", "*.safetensors" if safe else "pytorch_model*.bin"]
