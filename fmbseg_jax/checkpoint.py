"""Checkpoints of a training run, and the export that others load. Orbax lives here alone."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from tqdm import tqdm

from fmbseg_jax import sharding
from fmbseg_jax.data import pipeline
from fmbseg_jax.errors import UserError


class _Quiet(logging.Filter):
    """Drops what Orbax warns of, and the tracebacks of a failed save: `Checkpoints` tells of it."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname


logging.getLogger("absl").addFilter(_Quiet())


class Checkpoints:
    """The training state and the data iterator's state, under one step.

    The last ones stay, and the one of the highest score. A save that fails, on a full disk for
    example, is told of loudly and stops nothing: the checkpoints before it are whole. With several
    processes, which save together, it does stop the run.
    """

    def __init__(self, folder: Path, keep: int = 2, score: str = "loss"):
        """Opens or makes a folder.

        Args:
          folder: on a disk that all processes see.
          keep: how many of the last stay.
          score: what the scores are; those of another kind are not compared with them.
        """
        self._folder, self._keep, self._kind = folder.resolve(), keep, score
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        policy = ocp.checkpoint_managers
        best = policy.BestN(get_metric_fn=self._score, n=1, keep_checkpoints_without_metrics=False)
        last = policy.preservation_policy.LatestN(self._keep)
        options = ocp.CheckpointManagerOptions(
            create=True,
            best_fn=self._score,  # else scores are forgotten when the folder is opened again
            preservation_policy=policy.AnyPreservationPolicy([last, best]),
        )
        return ocp.CheckpointManager(self._folder, options=options)

    def _score(self, metrics: dict[str, float]) -> float:
        return metrics.get(self._kind, -math.inf)

    @property
    def last(self) -> int | None:
        """Step of the last checkpoint, whole or being saved; None where there is none."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """Step of the checkpoint of the highest score; the last one where none has a score."""
        best = self._manager.best_step()
        scored = best is not None and self._kind in (self._manager.metrics(best) or {})
        return best if scored else self.last

    def save(
        self, step: int, state: Any, batches: pipeline.Iterator, score: float | None = None
    ) -> None:
        """Saves in the background; a save that a kill cuts short is never restored.

        Without a score, or with NaN, it is never the best.
        """
        self.wait()  # for the one before
        if step == self.last:
            return
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(batches.get_state()),
        )
        metrics = None if score is None or math.isnan(score) else {self._kind: score}
        self._try(lambda: self._manager.save(step, args=arguments, metrics=metrics, force=True))

    def wait(self) -> None:
        """Returns when all that was saved is on disk."""
        self._try(self._manager.wait_until_finished)

    def poll(self) -> None:
        """Tells of a save that has failed in the meantime."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:  # Orbax and tensorstore have many kinds for a disk's refusal
            message = self._failure(error)
            if jax.process_count() > 1:  # the others wait for this one inside Orbax
                raise UserError(message) from None
            tqdm.write(f"\nERROR: {message}; the training goes on.\n", file=sys.stderr)
            for unfinished in self._folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)
            with contextlib.suppress(Exception):
                self._manager.close()
            self._manager = self._open()

    def _failure(self, error: Exception) -> str:
        whole = [int(path.name) for path in self._folder.iterdir() if path.name.isdigit()]
        last = f"The last good one is of step {max(whole)}" if whole else "There is none yet"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        full = "No space left" in reason or "RESOURCE_EXHAUSTED" in reason
        advice = " Make room." if full else ""
        return f"a checkpoint could not be saved in {self._folder}: {reason}.{advice}\n{last}"

    def restore(self, state: Any, batches: pipeline.TrainBatches) -> tuple[Any, pipeline.Iterator]:
        """The last whole checkpoint, and the batches from there on; else `state`, and all batches.

        Args:
          state: gives the shapes and shardings. The checkpoint may come from another number of
            devices or processes.

        Raises:
          UserError: the checkpoint is of another architecture, with both shapes; or the processes
            do not see the same one.
        """
        iterator, step = iter(batches), self.last
        seen = sharding.of_all(step or 0)
        if len(set(seen)) > 1:
            raise UserError(
                f"The processes see checkpoints of different steps in {self._folder}: {seen}. The "
                "work folder has to be on a disk that all of them share."
            )
        if step is None:
            return state, iterator
        arguments = ocp.args.Composite(
            state=self._restore_arguments(step, state), data=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=arguments)
        iterator.set_state(restored["data"])
        return restored["state"], iterator

    def restore_best(self, state: Any) -> Any:
        """The checkpoint of the highest score, with the shapes and shardings of `state`."""
        step = self.best
        if step is None:
            return state
        arguments = ocp.args.Composite(state=self._restore_arguments(step, state))
        return self._manager.restore(step, args=arguments)["state"]

    def _restore_arguments(self, step: int, state: Any) -> Any:
        _check_shapes(
            self._folder / str(step) / "state", state,
            "Set the config back to what it was, or delete that folder to train afresh.",
        )  # fmt: skip
        return ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state))

    def close(self) -> None:
        """Waits for the last save."""
        self.wait()
        self._manager.close()


def _check_shapes(folder: Path, template: Any, advice: str) -> None:
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
    _check_shapes(params, template, "Give the export of an aligner of this config.")
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
