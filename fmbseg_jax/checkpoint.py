"""Checkpoints of a training run: its state and the reader's, kept by Orbax."""

from __future__ import annotations

import contextlib
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
from fmbseg_jax.data.links import without_patterns
from fmbseg_jax.errors import UserError
from fmbseg_jax.exported import check_shapes


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
        self._folder.mkdir(parents=True, exist_ok=True)
        self._open_path = contextlib.ExitStack()
        self._path = self._open_path.enter_context(without_patterns(self._folder))
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        policy = ocp.checkpoint_managers
        best = policy.BestN(get_metric_fn=self._score, n=1, keep_checkpoints_without_metrics=False)
        last = policy.preservation_policy.LatestN(self._keep)
        options = ocp.CheckpointManagerOptions(
            best_fn=self._score,  # else scores are forgotten when the folder is opened again
            preservation_policy=policy.AnyPreservationPolicy([last, best]),
        )
        return ocp.CheckpointManager(self._path, options=options)

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
        state_path = Path(str(step), "state")
        check_shapes(
            self._path / state_path, state,
            "Set the config back to what it was, or delete that folder to train afresh.",
            shown=self._folder / state_path,
        )  # fmt: skip
        return ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state))

    def close(self) -> None:
        """Waits for the last save."""
        self.wait()
        self._manager.close()
        self._open_path.close()
