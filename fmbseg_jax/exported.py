"""The exported aligner: a folder that others load, and how it is read and written.

    params/       Orbax
    model.json    encoders by source and hash, dimensions, template, words, config, versions
    README.md     the model card
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from fmbseg_jax.errors import UserError


class _Quiet(logging.Filter):
    """Drops what Orbax warns of, and the tracebacks of a failed save: `Checkpoints` tells of it."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname


logging.getLogger("absl").addFilter(_Quiet())


@dataclasses.dataclass(frozen=True)
class Export:
    """A trained aligner, and all that is needed to use it."""

    params: Any
    model: dict[str, Any]
    """model.json: encoders by source and hash, dimensions, template, words, config, versions."""


def save_export(folder: Path, export: Export, card: str) -> None:
    """Writes Orbax params, model.json and a README; the folder appears when it is whole.

    For process 0 alone: the others are not waited for.
    """
    incomplete = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(incomplete, ignore_errors=True)
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
    with ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
        checkpointer.save(incomplete.resolve() / "params", jax.device_get(export.params))
    (incomplete / "model.json").write_text(json.dumps(export.model, indent=1) + "\n")
    (incomplete / "README.md").write_text(card)
    shutil.rmtree(folder, ignore_errors=True)
    incomplete.rename(folder)


def load_export(folder: str | Path, template: Any) -> Any:
    """The params of an export, with the structure and shapes of `template`, on one device.

    Whatever devices they were trained on: the first one here takes them.

    Raises:
      UserError: they are of another architecture; shows the shapes.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), template
    )
    params = Path(folder).resolve() / "params"
    check_shapes(params, template, "Give the export of an aligner of this config.")
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(params, template)


def read_model(folder: str | Path) -> dict[str, Any]:
    """model.json of an export; raises UserError where the folder is none."""
    path = Path(folder) / "model.json"
    if not path.is_file() or not (Path(folder) / "params").is_dir():
        raise UserError(
            f"{folder} is no exported aligner (no model.json, or no params/). Give the export/ "
            "folder of a work folder in which train.py has finished."
        )
    return json.loads(path.read_text())


def check_shapes(folder: Path, template: Any, advice: str) -> None:
    """Raises UserError, with both shapes, where saved arrays are not those of `template`."""
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(folder).item_metadata
    there, here = (
        {
            jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (saved.tree if hasattr(saved, "tree") else saved, template)
    )
    differing = [
        f"{name}: {list(there[name]) if name in there else 'nothing'} there, "
        f"{list(here[name]) if name in here else 'nothing'} here"
        for name in sorted(there | here)
        if there.get(name) != here.get(name)
    ]
    if differing:
        more = f"\n  and {len(differing) - 8} more" if len(differing) > 8 else ""
        raise UserError(
            f"{folder} is of another architecture:\n  " + "\n  ".join(differing[:8]) + more
            + f"\n{advice}"
        )  # fmt: skip


def locate(path: str | Path) -> Path:
    return Path(path)
