"""The loop around the training step: checkpoints, the log, validation, being told to stop."""

from __future__ import annotations

import collections
import contextlib
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from fmbseg_jax import logs, preemption, sharding, training
from fmbseg_jax.checkpoint import Checkpoints
from fmbseg_jax.config import Train
from fmbseg_jax.data.pipeline import TrainBatches
from fmbseg_jax.errors import UserError
from fmbseg_jax.validation import Validation

_IN_FLIGHT = 2  # steps that the device has been given and has not done


def fit(
    state: training.TrainState,
    batches: TrainBatches,
    text: Array,
    frozen: Any,
    *,
    objective: training.Objective,
    mesh: Mesh,
    config: Train,
    workdir: Path,
    validation: Validation | None = None,
) -> training.TrainState | None:
    """Trains from the last checkpoint in WORKDIR/checkpoints, or from `state`, to the last step.

    Args:
      text, frozen: as for `training.train_step`, on all devices of the mesh.

    Returns:
      The state to export; None where a signal stopped it, after a checkpoint.

    Raises:
      UserError: loss, gradient or parameters are not finite, or the checkpoint is of another
        architecture.
      KeyboardInterrupt: Ctrl-C, after a checkpoint.
    """
    rate = training.schedule(config, batches.steps)
    with contextlib.ExitStack() as stack:
        notice = stack.enter_context(preemption.listen())
        checkpoints = stack.enter_context(
            contextlib.closing(Checkpoints(workdir / "checkpoints", config.keep))
        )
        state, iterator = checkpoints.restore(state, batches)
        stack.callback(iterator.close)  # type: ignore[attr-defined]
        first = int(state.step)
        log = stack.enter_context(logs.MetricsLog(workdir / "metrics", first))
        bar = stack.enter_context(logs.progress(batches.steps, "train", first, unit="step"))
        meter, losses = _Meter(config.batch_size), []  # losses since the last checkpoint
        for step in range(first + 1, batches.steps + 1):
            batch = meter.next(iterator)
            state, metrics = training.train_step(
                state, sharding.distribute(mesh, batch), text, frozen, objective=objective
            )
            meter.add(step, metrics, patches=batch["labels"].shape[1])
            bar.update()

            last, stop = step == batches.steps, notice.reached(step)
            measure = validation and (last or step % config.validate_every == 0)
            save = last or stop or measure or step % config.checkpoint_every == 0
            say = last or measure or step % config.log_every == 0
            if not (save or say):
                continue
            seen = meter.take()
            if bad := next((one for one in seen if not one.finite), None):
                checkpoints.wait()
                raise UserError(_diverged(bad, float(rate(bad.step - 1)), checkpoints.last))
            losses += [one.loss for one in seen]
            values = seen[-1].scalars | {"learning_rate": float(rate(step - 1))} | meter.pace.take()
            if validation and measure:
                values["miou"] = _validate(validation, state.params)
                meter.pace.take()
            if say:
                log.write(step, values)
                bar.set_postfix(_shown(values))
            checkpoints.poll()
            if save:
                score = values.get("miou") if validation else -float(np.mean(losses))
                checkpoints.save(step, state, iterator, score)
                losses = []
            if stop and not last:
                checkpoints.wait()
                bar.close()
                _stopped(notice.signal, step, checkpoints.last, workdir)
                return None
        checkpoints.wait()
        return checkpoints.restore_best(state) if config.export == "best" else state


class _Seen(NamedTuple):
    """What came out of a step."""

    step: int
    scalars: dict[str, float]
    finite: bool

    @property
    def loss(self) -> float:
        return self.scalars["loss"]


class _Meter:
    """Gives the device steps without waiting for it, and later asks what came of them."""

    def __init__(self, images: int):
        self.pace = logs.Pace()
        self._images = images
        self._metrics: dict[int, dict[str, Array]] = {}
        self._running: collections.deque[Array] = collections.deque()
        self._compiled = False

    def next(self, iterator: Any) -> dict[str, np.ndarray]:
        """The next batch, once the device has little left to do.

        While the batch is waited for the device may have nothing to do: the whole wait counts as
        such, if it had nothing to do at its end.
        """
        start = time.monotonic()
        batch = next(iterator)
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

    def take(self) -> list[_Seen]:
        """What came of all steps since the last call."""
        found = []
        for step, values in jax.device_get(self._metrics).items():
            finite = bool(values.pop("finite"))
            found.append(_Seen(step, {name: float(x) for name, x in values.items()}, finite))
        self._metrics = {}
        return found


def _diverged(bad: _Seen, rate: float, last: int | None) -> str:
    good = f"The last good checkpoint is of step {last}" if last else "There is no checkpoint yet"
    return (
        f"Training diverged at step {bad.step}: loss {bad.loss}, gradient norm "
        f"{bad.scalars['gradient_norm']}, learning rate {rate:.3g}. {good}. Lower train.peak_lr "
        "or set train.clip_norm; then delete the checkpoints/ of this --workdir, or give another."
    )


def _validate(validation: Validation, params: Any) -> float:
    first = jax.process_index() == 0
    return sharding.same_for_all(validation.miou(jax.device_get(params)) if first else 0.0)


def _shown(values: dict[str, float]) -> dict[str, str]:
    shown = {"loss": f"{values['loss']:.3f}", "accuracy": f"{values['accuracy']:.3f}"}
    if "images_per_second" in values:
        shown["images/s"] = f"{values['images_per_second']:.1f}"
    if "miou" in values:
        shown["mIoU"] = f"{100 * values['miou']:.1f}"
    return shown


def _stopped(signal: str, step: int, saved: int | None, workdir: Path) -> None:
    """Says so; Ctrl-C ends the program as an interruption does."""
    if jax.process_index() == 0:
        print(
            f"\n{signal}: stopped after step {step}; the checkpoint of step {saved} is saved in "
            f"{workdir / 'checkpoints'}. Run the same command to continue.",
            flush=True,
        )
    if signal == "SIGINT":
        raise KeyboardInterrupt
