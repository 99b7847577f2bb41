"""Which published model an aligner was trained with, by a hash of the model's values."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fmbseg_jax.encoders import loading
from fmbseg_jax.errors import UserError
from fmbseg_jax.pretrained import hub, tokenizer, weights
from fmbseg_jax.pretrained.table import Table


def content_hash(source: str, recorded: str = "") -> str:
    """SHA-256 (first 16 digits) of a model's values: which encoder an export belongs to.

    Of its sizes, its normalisation, its tokenizer and its tensors, as far as they are used: the
    same whichever files they are in, and whatever lies beside these.

    Args:
      recorded: what stands in an export or a work folder. It is returned where it is this model's,
        also if it is a hash of the files' bytes, as those up to version 0.1 are.

    Raises:
      UserError: there is no such model, or it is of a kind that is not read here.
    """
    state = _state(hub.locate(source))
    found = _of_values(source, state)
    return recorded if recorded and recorded != found and recorded == _of_files(state) else found


def describe(source: str, recorded: str = "") -> dict[str, str]:
    """What is recorded of a model: source, hash and, of one from the hub, the commit it is of.

    Args:
      recorded: as for `content_hash`.
    """
    facts = {"source": source, "hash": content_hash(source, recorded)}
    revision = hub.commit(hub.locate(source))
    return facts | ({"revision": revision} if revision else {})


def is_one_model(source: str, first: str, second: str) -> bool:
    """Whether two recorded hashes are of one model, which lies at `source` if they differ."""
    if first == second:
        return True
    try:
        return all(content_hash(source, recorded) == recorded for recorded in (first, second))
    except UserError:  # it is not there any more
        return False


_State = tuple[tuple[Path, int], ...]
"""Files, each with its time of modification, so that a changed one is read again."""


def _state(folder: Path) -> _State:
    paths = [*hub.weight_files(folder), *(folder / name for name in hub.BESIDE)]
    return tuple((path, path.stat().st_mtime_ns) for path in paths if path.is_file())


@functools.cache  # gigabytes that a program asks for up to three times
def _of_values(source: str, state: _State) -> str:
    folder, digest = hub.locate(source), hashlib.sha256()
    for facts, table in _towers(folder, source):
        digest.update(repr(facts).encode())
        files = weights.open_files(folder, table)
        for name in sorted({name for name, _ in table.entries.values()} & files.keys()):
            tensor = np.ascontiguousarray(files[name]())
            digest.update(f"{name} {tensor.shape} {tensor.dtype}".encode())
            digest.update(tensor.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:16]


def _towers(folder: Path, source: str) -> Iterator[tuple[Any, Table]]:
    """What a model's numbers depend on beside its tensors, and the table of these."""
    if not loading.is_clip(folder, source):
        spec, table = loading.vision_tower(folder, source)
        yield dataclasses.asdict(spec), table
        return
    image, table = loading.clip_vision_tower(folder, source)
    yield dataclasses.asdict(image), table
    text, table = loading.text_tower(folder, source)
    yield (dataclasses.asdict(text), tokenizer.digest(folder)), table


@functools.cache
def _of_files(state: _State) -> str:
    """The hash of a model as it was recorded once: of the bytes of some of its files, in order."""
    counted = "config.json", "preprocessor_config.json", *tokenizer.FILES[:4]
    digest = hashlib.sha256()
    for path, _ in state:
        if path.name in hub.BESIDE and path.name not in counted:
            continue
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()[:16]
