"""Checkpoints of a training run: its state and the reader's, kept by Orbax."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from tqdm import tqdm

from fmbseg_jax.errors import UserError
from fmbseg_jax.io import machine, texts
from fmbseg_jax.io.links import without_patterns
from fmbseg_jax.parallel import agreement
from fmbseg_jax.sharing.exports import check_shapes, digest
from fmbseg_jax.training.batches import Iterator, Reader, TrainBatches


class Checkpoints:
    """The training state and the data iterator's state, under one step.

    The last ones stay, and the one of the highest score. A save that fails, on a full disk for
    example, is told of loudly and stops nothing: the checkpoints before it are whole. With several
    processes, which save together, it does stop the run.

    Each carries a digest of what was saved. One that is read back otherwise, or not at all, is set
    aside as STEP.damaged, and the one before it is taken.
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
        if jax.process_index() == 0:
            for step in filter(self._has_damaged_facts, self._steps()):
                self._move_aside(step, "its scores or times cannot be read")
        agreement.wait_for_all("checkpoints opened")
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
        self,
        step: int,
        state: Any,
        batches: Iterator | Reader,
        score: float | None = None,
    ) -> None:
        """Saves in the background; a save that a kill cuts short is never restored.

        Without a score, or with NaN, it is never the best.
        """
        self.wait()  # for the one before
        if step == self.last:
            return
        read = batches.get_state()
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(read),
            digest=ocp.args.JsonSave({"state": digest(state), "data": _digest_of_json(read)}),
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
        steps = self._steps()
        last = f"The last good one is of step {steps[-1]}" if steps else "There is none yet"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        told = machine.sentence(error) or f"{reason}."
        return f"a checkpoint could not be saved in {self._folder}: {told}\n{last}"

    def restore(self, state: Any, batches: TrainBatches) -> tuple[Any, Iterator]:
        """The last whole checkpoint, and the batches from there on; else `state`, and all batches.

        Args:
          state: gives the shapes and shardings. The checkpoint may come from another number of
            devices or processes.

        Raises:
          UserError: the checkpoint is of another architecture, with both shapes; or the processes
            do not see the same one.
        """
        iterator = iter(batches)
        seen = agreement.of_all(self.last or 0)
        if len(set(seen)) > 1:
            raise UserError(
                f"The processes see checkpoints of different steps in {self._folder}: {seen}. The "
                "work folder has to be on a disk that all of them share."
            )
        while (step := self.last) is not None:
            restored = self._read(step, state, data=ocp.args.JsonRestore())
            if restored:
                iterator.set_state(restored["data"])
                return restored["state"], iterator
        return state, iterator

    def restore_best(self, state: Any) -> Any:
        """The checkpoint of the highest score, with the shapes and shardings of `state`."""
        while (step := self.best) is not None:
            if restored := self._read(step, state):
                return restored["state"]
        return state

    def _read(self, step: int, state: Any, **more: Any) -> Any:
        """What was saved at a step; None where it is damaged, after which it is set aside."""
        reason = "its bytes are not those that were saved"
        try:
            arguments = ocp.args.Composite(state=self._restore_arguments(step, state), **more)
            restored = self._manager.restore(step, args=arguments)
            whole = self._is_as_saved(step, restored)
        except UserError:
            raise
        except Exception as error:  # Orbax and tensorstore have many kinds for bytes that changed
            machine.let_through(error, self._folder / str(step), by_words=True)
            reason, whole = (str(error).strip() or type(error).__name__).splitlines()[0], False
        if all(agreement.of_all(int(whole))):
            return restored
        self._set_aside(step, reason)
        return None

    def _is_as_saved(self, step: int, restored: Any) -> bool:
        if not (self._path / str(step) / "digest").exists():  # of version 0.1
            return True
        saved = self._manager.restore(step, args=ocp.args.Composite(digest=ocp.args.JsonRestore()))[
            "digest"
        ]
        same = saved["state"] == digest(restored["state"])
        data = "data" not in restored or saved["data"] == _digest_of_json(restored["data"])
        return same and data

    def _set_aside(self, step: int, reason: str) -> None:
        if jax.process_index() == 0:
            self._move_aside(step, reason)
        agreement.wait_for_all(f"checkpoint {step} set aside")
        self._manager.close()
        self._manager = self._open()

    def _move_aside(self, step: int, reason: str) -> None:
        aside = self._folder / f"{step}.damaged"
        shutil.rmtree(aside, ignore_errors=True)
        (self._folder / str(step)).rename(aside)
        before = [other for other in self._steps() if other < step]
        instead = f"the one of step {before[-1]}" if before else "the beginning"
        tqdm.write(
            f"\nERROR: the checkpoint of step {step} is damaged ({reason[:200]}). It is set aside "
            f"as {aside}; before it there is {instead}.\n",
            file=sys.stderr,
        )

    def _steps(self) -> list[int]:
        """Of all checkpoints that are whole, ascending."""
        return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdigit())

    def _has_damaged_facts(self, step: int) -> bool:
        """Whether Orbax, which reads those of all checkpoints at once, would stop at one."""
        folder = self._path / str(step)
        scores, times = folder / "metrics" / "metrics", folder / "_CHECKPOINT_METADATA"
        try:
            if scores.exists():
                texts.parse(scores.read_bytes(), {str: float})
            known = texts.parse(times.read_bytes(), _TIMES) if times.exists() else {}
        except ValueError:
            return True
        return any(not 0 <= (known.get(name.rstrip("?")) or 0) < _LAST for name in _TIMES)

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


_TIMES = {"init_timestamp_nsecs?": int | None, "commit_timestamp_nsecs?": int | None}
_LAST = 4_000_000_000 * 10**9
"""A time in nanoseconds since 1970 that no checkpoint has: the year 2096."""


def _digest_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
