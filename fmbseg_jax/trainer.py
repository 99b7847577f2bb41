"""The loop around the training step: checkpoints, the log, validation, being told to stop."""

from __future__ import annotations

import collections
import contextlib
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
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
        unseen, pace = _Unseen(checkpoints, rate), logs.Pace()
        running: collections.deque[Array] = collections.deque()
        losses: list[float] = []  # since the last checkpoint
        for step in range(first + 1, batches.steps + 1):
            batch, waited = _next(iterator, running)
            pace.waited(waited)
            placed = sharding.distribute(mesh, batch)
            if len(running) == _IN_FLIGHT:
                running.popleft().block_until_ready()
            state, metrics = training.train_step(state, placed, text, frozen, objective=objective)
            running.append(metrics["loss"])
            unseen.add(step, metrics)
            pace.step(config.batch_size, config.batch_size * batch["labels"].shape[1])
            bar.update()
            if step == first + 1:  # compilation is not the pace
                metrics["loss"].block_until_ready()
                pace.take()

            last, stop = step == batches.steps, notice.reached(step)
            measure = validation and (last or step % config.validate_every == 0)
            save = last or stop or measure or step % config.checkpoint_every == 0
            say = last or measure or step % config.log_every == 0
            if not (say or save):
                continue
            seen = unseen.check()
            losses += [values["loss"] for values in seen]
            score = -float(np.mean(losses))
            if say:
                values = {
                    name: float(value) for name, value in seen[-1].items() if name != "finite"
                }
                values |= {"learning_rate": float(rate(step - 1))} | pace.take()
                if validation and measure:
                    score = _validate(validation, state.params)
                    values["miou"] = score
                    pace.take()
                log.write(step, values)
                bar.set_postfix(_shown(values))
            checkpoints.poll()
            if save:
                comparable = measure or not validation
                checkpoints.save(
                    step, state, iterator, score if comparable and math.isfinite(score) else None
                )
                losses = []
            if stop and not last:
                checkpoints.wait()
                bar.close()
                _stopped(notice.signal, step, workdir)
                return None
        checkpoints.wait()
        return checkpoints.restore_best(state) if config.export == "best" else state


class _Unseen:
    """Metrics of steps that nobody has looked at, so that the device need not be waited for."""

    def __init__(self, checkpoints: Checkpoints, rate: optax.Schedule):
        self._checkpoints, self._rate = checkpoints, rate
        self._entries: list[tuple[int, dict[str, Array]]] = []

    def add(self, step: int, metrics: dict[str, Array]) -> None:
        self._entries.append((step, metrics))

    def check(self) -> list[dict[str, Any]]:
        """All of them, on the host; raises UserError at the first that is not finite."""
        seen = jax.device_get([metrics for _, metrics in self._entries])
        for (step, _), values in zip(self._entries, seen, strict=True):
            if not values["finite"]:
                self._diverged(step, values)
        self._entries = []
        return seen

    def _diverged(self, step: int, values: dict[str, Any]) -> None:
        self._checkpoints.wait()
        last = self._checkpoints.last
        good = (
            f"The last good checkpoint is of step {last}" if last else "There is no checkpoint yet"
        )
        raise UserError(
            f"Training diverged at step {step}: loss {values['loss']}, gradient norm "
            f"{values['gradient_norm']}, learning rate {float(self._rate(step - 1)):.3g}. {good}. "
            "Lower train.peak_lr, or give the gradients a train.clip_norm, and train in another "
            "--workdir or delete the checkpoints/ of this one."
        )


def _next(iterator: Any, running: collections.deque[Array]) -> tuple[dict[str, np.ndarray], float]:
    """The next batch, and for how long the device had nothing to do while it was waited for.

    At most: where it became free during the wait, all of the wait counts.
    """
    start = time.monotonic()
    batch = next(iterator)
    idle = not running or running[-1].is_ready()  # type: ignore[attr-defined]
    return batch, (time.monotonic() - start) if idle else 0.0


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


def _stopped(signal: str, step: int, workdir: Path) -> None:
    """Says so; Ctrl-C ends the program as an interruption does."""
    if jax.process_index() == 0:
        print(
            f"\n{signal}: stopped after step {step}, its checkpoint is saved in "
            f"{workdir / 'checkpoints'}. Run the same command to continue.",
            flush=True,
        )
    if signal == "SIGINT":
        raise KeyboardInterrupt
