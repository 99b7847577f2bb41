"""The loop around the training step: checkpoints, the log, validation, being told to stop."""

from __future__ import annotations

import collections
import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from fmbseg_jax.config import Train
from fmbseg_jax.errors import UserError
from fmbseg_jax.parallel import agreement, preemption
from fmbseg_jax.parallel.mesh import distribute
from fmbseg_jax.runs.progress import progress
from fmbseg_jax.training.batches import Reader, TrainBatches
from fmbseg_jax.training.checkpoint import Checkpoints
from fmbseg_jax.training.log import MetricsLog, Pace
from fmbseg_jax.training.step import Objective, TrainState, schedule, train_step
from fmbseg_jax.training.validation import Validation

_IN_FLIGHT = 2  # steps that the device has been given and has not done


def fit(
    state: TrainState,
    batches: TrainBatches,
    text: Array,
    frozen: Any,
    *,
    objective: Objective,
    mesh: Mesh,
    config: Train,
    workdir: Path,
    validation: Validation | None = None,
) -> TrainState | None:
    """Trains from the last checkpoint in WORKDIR/checkpoints, or from `state`, to the last step.

    Args:
      text, frozen: as for `train_step`, on all devices of the mesh.
      validation: on `train.validate_on`, for process 0; the others have none.

    Returns:
      The state to export; None where a signal stopped it, after a checkpoint.

    Raises:
      UserError: loss, gradient or parameters are not finite, or the checkpoint is of another
        architecture.
      KeyboardInterrupt: Ctrl-C, after a checkpoint.
    """
    with contextlib.ExitStack() as stack:
        notice = stack.enter_context(preemption.listen())
        score = "miou" if config.validate_on else "loss"
        checkpoints = Checkpoints(workdir / "checkpoints", config.keep, score)
        stack.enter_context(contextlib.closing(checkpoints))
        state, iterator = checkpoints.restore(state, batches)
        stack.callback(iterator.close)
        first = int(state.step)
        log = stack.enter_context(MetricsLog(workdir / "metrics", first))
        bar = stack.enter_context(progress(batches.steps, "train", first, unit="step"))
        if first:
            done = ", the last: nothing is left to train" if first == batches.steps else ""
            bar.write(f"Continuing from the checkpoint of step {first}{done}.")
        reader, meter = Reader(iterator), _Meter(config, batches.steps)
        losses: list[float] = []  # since the last checkpoint

        def stop(step: int) -> None:
            checkpoints.wait()
            bar.close()
            _stopped(notice.signal, step, checkpoints.last or 0, workdir)

        for step in range(first + 1, batches.steps + 1):
            batch = meter.next(reader, notice.heard)
            if batch is None:
                meter.take(checkpoints)
                if step - 1 > first:
                    checkpoints.save(step - 1, state, reader)
                stop(step - 1)
                return None
            state, metrics = train_step(
                state, distribute(mesh, batch), text, frozen, objective=objective
            )
            meter.add(step, metrics, patches=batch["labels"].shape[1])
            bar.update()

            due = _due(config, step, batches.steps, stop=notice.reached(step))
            if not (due.save or due.say):
                continue
            values = meter.take(checkpoints)
            losses += [one["loss"] for one in values]
            scalars, value = values[-1], -float(np.mean(losses))
            if due.say:
                scalars |= meter.pace.take()
            if due.measure:
                scalars["miou"] = value = _validate(validation, state.params)
                meter.pace.take()
            if due.say:
                log.write(step, {k: v for k, v in scalars.items() if not math.isnan(v)})
                bar.set_postfix(_shown(scalars))
            checkpoints.poll()
            if due.save:
                checkpoints.save(step, state, reader, value if due.score else None)
                losses = []
            if due.stop:
                stop(step)
                return None
        checkpoints.wait()
        return checkpoints.restore_best(state) if config.export == "best" else state


class _Due(NamedTuple):
    """What has to be done after a step."""

    say: bool
    measure: bool
    save: bool
    score: bool
    """Whether the checkpoint is to be compared with others."""
    stop: bool


def _due(config: Train, step: int, steps: int, *, stop: bool) -> _Due:
    """A stop is for a checkpoint alone: there may be seconds left."""
    last = step == steps
    stop = stop and not last
    watched = bool(config.validate_on)
    measure = watched and not stop and (last or step % config.validate_every == 0)
    regular = last or step % config.checkpoint_every == 0
    return _Due(
        say=last or measure or step % config.log_every == 0,
        measure=measure,
        save=stop or measure or regular,
        score=measure or (regular and not watched),
        stop=stop,
    )


class _Meter:
    """Gives the device steps without waiting for it, and later asks what came of them."""

    def __init__(self, config: Train, steps: int):
        self.pace = Pace()
        self._images, self._rate = config.batch_size, schedule(config, steps)
        self._metrics: dict[int, dict[str, Array]] = {}
        self._running: collections.deque[Array] = collections.deque()
        self._compiled = False

    def next(self, reader: Reader, given_up: Callable[[], bool]) -> dict[str, np.ndarray] | None:
        """The next batch, once the device has little left to do; None where `given_up` came first.

        While the batch is waited for the device may have nothing to do: the whole wait counts as
        such, if it had nothing to do at its end.
        """
        start = time.monotonic()
        batch = reader.next(given_up)
        if not self._running or self._running[-1].is_ready():  # type: ignore[attr-defined]
            self.pace.waited(time.monotonic() - start)
        if len(self._running) == _IN_FLIGHT:
            self._running.popleft().block_until_ready()
        return batch

    def add(self, step: int, metrics: dict[str, Array], patches: int) -> None:
        """Adds a step, of so many patches in each image."""
        self._metrics[step] = metrics
        self._running.append(metrics["loss"])
        self.pace.step(self._images, self._images * patches)
        if not self._compiled:  # which is not the pace
            metrics["loss"].block_until_ready()
            self.pace.take()
            self._compiled = True

    def take(self, checkpoints: Checkpoints) -> list[dict[str, float]]:
        """What came of each step since the last call; raises UserError where one diverged."""
        found = []
        for step, metrics in jax.device_get(self._metrics).items():
            values = {name: float(value) for name, value in metrics.items()}
            values["learning_rate"] = float(self._rate(step - 1))
            finite, patches_finite = values.pop("finite"), values.pop("patches_finite")
            if not finite or not patches_finite:
                checkpoints.wait()
                if not patches_finite:
                    raise UserError(_unfit(step))
                raise UserError(_diverged(step, values, checkpoints.last))
            found.append(values)
        self._metrics = {}
        return found


def _diverged(step: int, values: dict[str, float], last: int | None) -> str:
    good = f"The last good checkpoint is of step {last}" if last else "There is no checkpoint yet"
    return (
        f"Training diverged at step {step}: loss {values['loss']}, gradient norm "
        f"{values['gradient_norm']}, learning rate {values['learning_rate']:.3g}. {good}. Lower "
        "train.peak_lr or set train.clip_norm; then delete the checkpoints/ of this --workdir, or "
        "give another."
    )


def _unfit(step: int) -> str:
    return (
        f"Patch features in the batch of step {step} are NaN or infinite, which is the vision "
        "encoder's doing, not the training's. Set features.compute to float32; if it is that, the "
        "encoder's files are damaged: fetch them again."
    )


def _validate(validation: Validation | None, params: Any) -> float:
    """Process 0 measures, on its own devices."""
    found = validation.miou(jax.device_get(params)) if validation else 0.0
    return float(agreement.same_for_all(np.float32(found)))


def _shown(values: dict[str, float]) -> dict[str, str]:
    shown = {"loss": f"{values['loss']:.3f}", "accuracy": f"{values['accuracy']:.3f}"}
    if "images_per_second" in values:
        shown["images/s"] = f"{values['images_per_second']:.1f}"
    if "miou" in values:
        shown["mIoU"] = f"{100 * values['miou']:.1f}"
    return shown


def _stopped(signal: str, step: int, saved: int, workdir: Path) -> None:
    """Says so; Ctrl-C ends the program as an interruption does."""
    if saved != step:
        there = f"the last one is of step {saved}" if saved else "there is none"
        raise UserError(
            f"{signal}: stopped after step {step}, which could not be saved in "
            f"{workdir / 'checkpoints'}; {there}. Run the same command to continue."
        )
    folder = workdir / "checkpoints"
    said = f"\n{signal}: stopped after step {step}; its checkpoint is saved in {folder}."
    if not step:
        said = f"\n{signal}: stopped before the first step."
    if signal == "SIGINT":
        print(said, flush=True)
        raise KeyboardInterrupt
    print(f"{said} Run the same command to continue.", flush=True)
