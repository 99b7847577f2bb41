"""Published models: a folder here, or files of the Hugging Face hub, fetched once."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fmbseg_jax.errors import UserError

TOKENIZER = "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"
_WEIGHTS = "model.safetensors", "pytorch_model.bin"
_WANTED = "*.json", "*.txt", "*.safetensors"


def locate(source: str) -> Path:
    """The folder of a model: `source` itself, or a hub id's files, fetched once under a bar.

    Raises:
      UserError: it is neither; the message says how to get it.
    """
    if Path(source).is_dir():
        return Path(source)
    if not is_id(source):
        raise UserError(
            f"No model at {source}: give a folder, or a hub id such as facebook/dinov2-base."
        )
    return fetch(source, lambda: _wanted(source), weight_files, _WANTED)


def is_id(source: str) -> bool:
    """Whether this may be the name of a repository on the hub: `facebook/dinov2-base`."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and ".." not in source


def check_id(source: str) -> None:
    """Raises UserError where this cannot be the name of a repository."""
    if not is_id(source):
        raise UserError(f"A repository on the hub is USER/NAME; got {source!r}.")


def fetch(
    source: str,
    wanted: Callable[[], list[str] | None],
    check: Callable[[Path], Any],
    shown: Sequence[str] = (),
) -> Path:
    """The folder of a repository's files, fetched once under a bar.

    Args:
      wanted: patterns of the files to fetch; None for all. Asked with a connection only.
      check: raises UserError where the files are not whole.
      shown: patterns for the message that says how to fetch the files by hand.

    Raises:
      UserError: they cannot be had; the message says how to get them.
    """
    from huggingface_hub import snapshot_download

    print(
        f"Looking for {source} in the Hugging Face hub's cache, then in the hub ...",
        file=sys.stderr,  # also where this is called as a function, whose output may be a table
    )
    try:
        try:  # the cache first: without a network the hub's client would retry for half a minute
            folder = Path(snapshot_download(source, local_files_only=True))
            check(folder)  # a download that was stopped lacks some
            return folder
        except (OSError, UserError):
            pass
        return Path(snapshot_download(source, allow_patterns=wanted()))
    except Exception as error:  # offline, unknown id, no access: the hub client has many kinds
        include = " --include " + " ".join(f"'{pattern}'" for pattern in shown) if shown else ""
        name = Path(source).name
        raise UserError(
            f"{source} is neither a folder here nor to be had from the Hugging Face hub "
            f"({_reason(error)}). On a machine with a "
            f"connection run\n    hf download {source} --local-dir {name}{include}\n"
            f"copy the folder {name} to this machine, and give its path in the place of the id."
        ) from None


def push(folder: Path, source: str, *, private: bool) -> str:
    """Uploads a folder to a repository of the hub, which is made if needed; returns its address.

    Raises:
      UserError: no connection, no token, no such user: with the hub's own reason.
    """
    from huggingface_hub import HfApi

    check_id(source)
    try:
        api = HfApi()
        api.create_repo(source, private=private, exist_ok=True)
        api.upload_folder(repo_id=source, folder_path=folder, commit_message="FMbSeg aligner")
    except Exception as error:  # the hub client has many kinds
        raise UserError(
            f"{folder} could not be pushed to {source} ({_reason(error)}). `hf auth login` gives "
            "this machine your token; the same command tries again."
        ) from None
    return f"https://huggingface.co/{source}"


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights, sorted: safetensors, else PyTorch's; one, or its parts.

    Raises:
      UserError: there are none, or parts of them are missing.
    """
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if not index.is_file():
            if (folder / name).is_file():
                return [folder / name]
            continue
        try:
            parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{index} lists no weight_map. Fetch it again.") from None
        if missing := [part for part in parts if not (folder / part).is_file()]:
            raise UserError(
                f"{folder} lacks {len(missing)} of the {len(parts)} parts that {index.name} lists: "
                f"{', '.join(missing)}. Fetch them again."
            )
        return [folder / part for part in parts]
    raise UserError(
        f"No weights in {folder}: expected {' or '.join(_WEIGHTS)}, or its parts with their "
        "index.json."
    )


def check_tokenizer(folder: Path) -> None:
    """Raises UserError where a folder lacks its tokenizer: an empty one would stand in for it."""
    one_file, *two = TOKENIZER[:3]
    if not (folder / one_file).is_file() and not all((folder / name).is_file() for name in two):
        raise UserError(
            f"{folder} has no tokenizer: expected {one_file}, or {' and '.join(two)}. Take them "
            "from where the model was published."
        )


def _wanted(source: str) -> list[str]:
    """What to fetch: pytorch_model.bin only where nobody has published safetensors."""
    from huggingface_hub import list_repo_files

    safe = any(name.endswith(".safetensors") for name in list_repo_files(source))
    return [*_WANTED] if safe else [*_WANTED[:2], "pytorch_model*.bin"]
