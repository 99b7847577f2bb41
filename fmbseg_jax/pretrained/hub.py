"""Published models: a folder here, or files of the Hugging Face hub, fetched once.

What is in the hub's cache is taken from there without a request, whoever has put it there, as long
as all that we want is there; else the rest is fetched. `USER/NAME` is what the hub holds by that
name, `USER/NAME@REVISION` one state of it: a commit's hash, a tag, a branch or a pull request.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fmbseg_jax.errors import UserError
from fmbseg_jax.io import machine, texts
from fmbseg_jax.pretrained import config_json, tokenizer

_WEIGHTS = "model.safetensors", "pytorch_model.bin"
BESIDE = ("config.json", *config_json.PROCESSORS, *tokenizer.FILES)
"""What belongs to a model beside its weights."""
_SHOWN = "*.json", "*.txt", "model*.safetensors"
"""Patterns for people; `_model_files` is exact."""
_PICKLES = {".pth", ".pt"}
_NO_ID = {*_PICKLES, ".bin", ".ckpt", ".safetensors", ".npz", ".onnx", ".zip", ".h5"}


def locate(source: str) -> Path:
    """The folder of a model: `source` itself, or a hub id's files, fetched once under a bar.

    A file of weights, as torch.hub has them, is its own place.

    Raises:
      UserError: it is neither; the message says how to get it.
    """
    if Path(source).is_dir() or (Path(source).is_file() and Path(source).suffix in _PICKLES):
        return Path(source)
    if Path(source).is_file():
        raise UserError(f"{source} is a file. Give the folder that the model's files are in.")
    if not is_id(source):
        raise UserError(
            f"No model at {source}: give a folder, or a hub id such as facebook/dinov2-base, or "
            "facebook/dinov2-base@REVISION for a commit, tag or branch of it."
        )
    return fetch(
        source,
        lambda names: _model_files(source, names),
        lambda folder: _check_model(source, folder),
        BESIDE,
        _SHOWN,
    )


def is_id(source: str) -> bool:
    """Whether this may name a repository on the hub: `facebook/dinov2-base`, or with @REVISION.

    Not what is plainly a file or an export, `checkpoints/sam.pth`, `work/export`: where that is
    missing, the hub is not asked.
    """
    path = Path(split(source)[0])
    named = _ID.fullmatch(source) is not None and ".." not in source
    return named and path.suffix.lower() not in _NO_ID and path.name != "export"


_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@(\w[\w./-]*))?")


def split(source: str) -> tuple[str, str | None]:
    """The name of a repository, and the revision behind its @; None where there is none."""
    match = _ID.fullmatch(source)
    return (match[1], match[2]) if match else (source, None)


def commit(folder: Path) -> str:
    """The commit whose files a folder of the hub's cache holds; "" of any other folder."""
    is_snapshot = folder.parent.name == "snapshots" and re.fullmatch(COMMIT, folder.name)
    return folder.name if is_snapshot else ""


COMMIT = r"[0-9a-f]{40}"
"""Pattern of a commit's hash."""


def check_id(source: str) -> None:
    """Raises UserError where this cannot be the name of a repository."""
    if not is_id(source) or split(source)[1]:
        raise UserError(f"A repository on the hub is USER/NAME; got {source!r}.")


def fetch(
    source: str,
    choose: Callable[[Sequence[str]], Sequence[str]],
    check: Callable[[Path], Any],
    patterns: Sequence[str],
    shown: Sequence[str] = (),
) -> Path:
    """The folder of a repository's files: those of the cache, else fetched under a bar.

    Args:
      choose: from the names of all files of a repository, those that are wanted.
      check: raises UserError where the files in a folder are not all that is wanted.
      patterns: files that have to be in the cache if the repository has them; without them the
        hub's client would want every file there.
      shown: patterns for the message that says how to fetch the files by hand.

    Raises:
      UserError: they cannot be had; the message says how to get them.
    """
    from huggingface_hub import HfApi, snapshot_download

    (name, revision), part = split(source), ""
    try:
        # Without the network the hub's client would retry for half a minute, so the cache comes
        # first; only `check` knows whether it is whole, for another program may have filled it.
        found = snapshot_download(
            name, revision=revision, local_files_only=True, allow_patterns=list(patterns)
        )
        check(Path(found))
        return Path(found)
    except UserError as error:
        part = f" The hub's cache has a part of it: {error}"
    except (OSError, ValueError):  # not there, cut short, or a name that the hub cannot have
        pass
    # Also where this is called as a function, whose output may be a table.
    print(f"Fetching {source} from the Hugging Face hub ...", file=sys.stderr)
    try:
        wanted = choose(HfApi().list_repo_files(name, revision=revision))
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(wanted)))
    except UserError:
        raise
    except Exception as error:  # offline, unknown id, no access: the hub client has many kinds
        machine.let_through(error)
        raise UserError(_advice(source, error, shown) + part) from None
    check(folder)
    return folder


def _advice(source: str, error: Exception, shown: Sequence[str]) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, revision = split(source)
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    unknown = isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)
    if isinstance(error, GatedRepoError) or (status in (401, 403) and not unknown):
        return (
            f"{source} is given only to those who have accepted its licence ({_reason(error)}). "
            f"Accept it on https://huggingface.co/{repository}, run `hf auth login` with a token "
            "of the same account, and start again."
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{repository} has no revision {revision!r} on the Hugging Face hub. Give a whole "
            "commit hash, a tag or a branch, which "
            f"https://huggingface.co/{repository}/commits/main lists, or {repository} alone."
        )
    if unknown:
        return (
            f"{source} is neither a folder here nor a model on the Hugging Face hub "
            f"({_reason(error)}). Check its spelling; if it is private, run `hf auth login`."
        )
    include = "".join(f" --include '{pattern}'" for pattern in shown)
    name = Path(repository).name
    at = f" --revision {revision}" if revision else ""
    bin_too = (
        "\n(with --include 'pytorch_model*.bin' for the last, where it has no safetensors)"
        if "model*.safetensors" in shown
        else ""
    )
    return (
        f"{source} is neither a folder here nor to be had from the Hugging Face hub "
        f"({_reason(error)}). On a machine with a connection run\n"
        f"    hf download {repository}{at} --local-dir {name}{include}{bin_too}\n"
        f"copy the folder {name} to this machine, and give its path in the place of the id."
    )


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
    if folder.is_file():
        return [folder]
    for name in _WEIGHTS:
        if (folder / name).is_file():  # before an index, which may be left of something else
            return [folder / name]
        index = folder / f"{name}.index.json"
        if not index.is_file():
            continue
        try:
            weight_map = texts.parse(index.read_bytes(), {"weight_map": {str: str}})["weight_map"]
            parts = sorted(set(weight_map.values()))
            if not parts or any(Path(part).name != part or len(part) > 255 for part in parts):
                raise ValueError("a part lies elsewhere")
        except ValueError:
            raise UserError(f"{index} lists no weight_map of files. Fetch it again.") from None
        if missing := [part for part in parts if not (folder / part).is_file()]:
            raise UserError(
                f"{folder} lacks {len(missing)} of the {len(parts)} parts that {index.name} lists: "
                f"{', '.join(missing)}. Fetch them again."
            )
        return [folder / part for part in parts]
    raise UserError(
        f"No weights in {folder}{config_json.other_layout(folder)}: expected "
        f"{' or '.join(_WEIGHTS)}, or its parts with their index.json."
    )


def _model_files(source: str, names: Sequence[str]) -> list[str]:
    """Of a repository's files those of one model: what lies beside its weights, and these once.

    Raises:
      UserError: it is of a kind that is not read here, or has no weights in Hugging Face layout.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    fetched = functools.partial(hf_hub_download, split(source)[0], revision=split(source)[1])
    if "config.json" in names:  # the kind is known before gigabytes are fetched
        config_json.check_kind(config_json.read_json(Path(fetched("config.json"))), source)
    if not {*config_json.PROCESSORS} & {*names}:
        for name in config_json.PROCESSORS:  # the cache remembers that they are not there
            with contextlib.suppress(EntryNotFoundError):
                fetched(name)
    for weights in _WEIGHTS:
        stem, ending = weights.split(".")
        part = re.compile(rf"{stem}(-\d+-of-\d+)?\.{ending}(\.index\.json)?")
        if found := [name for name in names if part.fullmatch(name)]:
            return [*found, *(name for name in BESIDE if name in names)]
    raise UserError(
        f"{source} has no weights in Hugging Face layout ({' or '.join(_WEIGHTS)}); it has "
        f"{', '.join(sorted(names)[:8])}. Models in OpenCLIP's, timm's or Meta's own layout are "
        "often published in this one, too, under another name."
    )


def _check_model(source: str, folder: Path) -> None:
    """Raises UserError where a folder of the cache lacks what its kind of model needs."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    kind = config_json.read(folder, source).get("model_type")
    weight_files(folder)
    if kind == config_json.CLIP:
        tokenizer.check(folder)
    repository, revision = split(source)
    processors = [
        try_to_load_from_cache(repository, name, revision=revision)
        for name in config_json.PROCESSORS
    ]
    known = any(isinstance(path, str) for path in processors)
    if kind != config_json.SAM and not known and set(processors) != {_CACHED_NO_EXIST}:
        raise UserError(f"{folder} lacks {' or '.join(config_json.PROCESSORS)}.")
