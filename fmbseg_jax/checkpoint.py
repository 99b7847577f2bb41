"""Checkpoints of a training run, and the export that others load. Orbax lives here alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from fmbseg_jax.data import pipeline
from fmbseg_jax.errors import UserError


class Checkpoints:
    """The training state and the data iterator's state, under one step."""

    def __init__(self, folder: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def save(self, step: int, state: Any, batches: pipeline.Iterator) -> None:
        """Saves in the background; a save that a kill cuts short is never restored."""
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=pipeline.save_position(batches)
        )
        if step != self._manager.latest_step():
            self._manager.save(step, args=arguments)

    def restore(self, state: Any, batches: pipeline.Iterator) -> Any:
        """The last whole checkpoint, with the shapes and shardings of `state`, or `state` itself.

        `batches` is moved to where it stood.
        """
        step = self._manager.latest_step()
        if step is None:
            return state
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        arguments = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract),
            data=pipeline.restore_position(batches),
        )
        return self._manager.restore(step, args=arguments)["state"]

    def close(self) -> None:
        """Waits for the last save."""
        self._manager.wait_until_finished()
        self._manager.close()


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
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), template
    )
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(Path(folder).resolve() / "params", template)


def read_model(folder: str | Path) -> dict[str, Any]:
    """model.json of an export; raises UserError where the folder is none."""
    path = Path(folder) / "model.json"
    if not path.is_file() or not (Path(folder) / "params").is_dir():
        raise UserError(
            f"{folder} is no exported aligner (no model.json, or no params/). Give the export/ "
            "folder of a work folder in which train.py has finished."
        )
    return json.loads(path.read_text())
