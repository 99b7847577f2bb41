"""The exported aligner: a folder that others load, and how it is read and written.

It holds params/ (Orbax), model.json (encoders by source and hash, dimensions, words, config,
versions, and what belongs to params/) and README.md, the model card. Whoever made it is not
trusted: it is read as JSON and arrays, checked, and nothing of it is run or written anywhere.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from fmbseg_jax.errors import UserError
from fmbseg_jax.io import machine
from fmbseg_jax.io.links import without_patterns
from fmbseg_jax.io.replacing import moved_aside, replaced
from fmbseg_jax.pretrained import hub
from fmbseg_jax.sharing.model_json import read_model, sizes


class _Quiet(logging.Filter):
    """Drops what Orbax warns of, and the tracebacks of a failed save: `Checkpoints` tells of it."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname + record.getMessage()


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_Quiet())


@dataclasses.dataclass(frozen=True)
class Export:
    """A trained aligner, and all that is needed to use it."""

    params: Any
    model: dict[str, Any]
    """model.json: encoders by source and hash, dimensions, template, words, config, versions."""


def save_export(folder: Path, export: Export, card: str) -> None:
    """Writes Orbax params, model.json and a README; the folder appears when it is whole.

    What was written is read again; only then it takes the place of an earlier export, and of what
    `fmbseg export` has added to that.

    For process 0 alone: the others are not waited for.

    Raises:
      UserError: what was written cannot be read; the earlier export is as it was.
    """
    with replaced(folder) as new:
        _save(new, jax.device_get(export.params))
        params = {"hash": digest(export.params), "files": sizes(new / "params")}
        model = json.dumps(export.model | {"params": params}, indent=1)
        (new / "model.json").write_text(model + "\n")
        (new / "README.md").write_text(card)
        try:
            load_export(new, export.params)
        except UserError as error:
            raise UserError(
                f"The aligner could not be written to {folder}: what was written cannot be read "
                f"({error}). What was there is as it was. Is the disk sound?"
            ) from error


def _save(folder: Path, params: Any) -> None:
    with without_patterns(folder) as path, _checkpointer() as checkpointer:
        checkpointer.save(path / "params", params)


def _checkpointer() -> ocp.StandardCheckpointer:
    """One that waits for no other process: what is read or written is small, and on this host."""
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"only{process}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=alone)


def load_export(folder: str | Path, template: Any) -> Any:
    """The params of an export, with the structure and shapes of `template`, on one device.

    Whatever devices they were trained on: the first one here takes them.

    Raises:
      UserError: they are of another architecture; shows the shapes. Or they are damaged.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), template
    )
    folder, known = Path(folder), read_model(folder).get("params")
    damaged = UserError(
        f"The parameters in {folder / 'params'} are damaged. Fetch or export them again."
    )
    try:
        with without_patterns(folder) as path:
            advice = "Give the export of an aligner of this config."
            check_shapes(path / "params", template, advice, shown=folder / "params")
            _check_room(path / "params", shown=folder / "params")
            with _checkpointer() as checkpointer:
                params = checkpointer.restore(path / "params", template)
    except UserError:
        raise
    except Exception as error:  # Orbax and tensorstore have many kinds for bytes that changed
        machine.let_through(error, folder / "params", by_words=True)
        raise damaged from error
    if known and digest(params) != known["hash"]:
        raise damaged
    return params


def _check_room(folder: Path, shown: Path) -> None:
    """Raises UserError where arrays would take far more memory than their files have bytes.

    Arrays without files would be read as zeros, and chunks are unpacked whole.
    """
    needed = sum(
        np.dtype(leaf.dtype).itemsize
        * max(math.prod(shape) for shape in (leaf.shape, leaf.storage.chunk_shape) if shape)
        for leaf in jax.tree.leaves(_saved(folder))
    )
    there = sum(sizes(folder).values())
    if needed > max(_PACKED * there, _ALWAYS):
        raise UserError(
            f"The parameters in {shown} would take {needed:,} bytes of memory, and their files "
            f"have {there:,}: they are damaged, or made to fill this machine."
        )


_PACKED, _ALWAYS = 20, 1 << 26
"""How many times smaller than in memory parameters are on disk at most, where that matters: numbers
that were learnt hardly pack."""


def digest(params: Any) -> str:
    """SHA-256 (first 16 digits) of parameters: names, shapes, bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(params)):
        leaf = np.asarray(leaf)
        digest.update(repr((jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype))).encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()[:16]


def locate(path: str | Path) -> Path:
    """The folder of an export: `path` itself, or a hub id's files, fetched once under a bar."""
    if Path(path).exists() or moved_aside(Path(path)).exists() or not hub.is_id(str(path)):
        return Path(path)
    return hub.fetch(str(path), _own_files, read_model, _OWN)


_OWN = "model.json", "README.md", "params/*"


def _own_files(names: Sequence[str]) -> list[str]:
    """Of a repository's files the aligner's; not its StableHLO, which may take gigabytes."""
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in _OWN)]


def check_shapes(folder: Path, template: Any, advice: str, shown: Path) -> None:
    """Raises UserError, with both shapes, where saved arrays are not those of `template`.

    What is damaged raises other errors: ValueError, and many of Orbax and tensorstore.

    Args:
      shown: what the message calls the folder.
    """
    there, here = (
        {
            jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (_saved(folder), template)
    )
    if not there:
        raise ValueError("it holds no parameters that can be read")
    differing = [
        f"{name}: {list(there[name]) if name in there else 'nothing'} there, "
        f"{list(here[name]) if name in here else 'nothing'} here"
        for name in sorted(there | here)
        if there.get(name) != here.get(name)
    ]
    if differing:
        more = f"\n  and {len(differing) - 8} more" if len(differing) > 8 else ""
        raise UserError(
            f"{shown} is of another architecture:\n  " + "\n  ".join(differing[:8]) + more
            + f"\n{advice}"
        )  # fmt: skip


def _saved(folder: Path) -> Any:
    """Shapes, dtypes and chunks of saved arrays, as a tree; none of them is read."""
    with _checkpointer() as checkpointer:
        saved = checkpointer.metadata(folder).item_metadata
    return saved.tree if hasattr(saved, "tree") else saved
