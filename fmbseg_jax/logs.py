"""What a run says: a progress bar, JSON lines, TensorBoard events. Process 0 alone speaks."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import jax
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tqdm import tqdm

from fmbseg_jax.data.appending import open_to_append
from fmbseg_jax.data.files import write_atomically


def progress(total: int, description: str, initial: int = 0, unit: str = "image") -> tqdm:
    """A progress bar with time left; silent in all processes but the first."""
    return tqdm(
        total=total, initial=initial, desc=f"{description:<10}", unit=f" {unit}",
        disable=jax.process_index() > 0, dynamic_ncols=True, smoothing=0.1,
    )  # fmt: skip


class MetricsLog:
    """Scalars of a training run: `metrics/train.jsonl`, and TensorBoard events beside it.

    Lines of steps after `step`, which a killed run wrote and this one will do again, are dropped. A
    full disk stops nothing: lines wait until there is room.
    """

    def __init__(self, folder: Path, step: int):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._path = folder, folder / "train.jsonl"
        kept = [line for line in _lines(self._path) if json.loads(line)["step"] <= step]
        write_atomically(self._path, "".join(kept).encode())
        self._waiting: list[str] = []
        self._told = False
        self._events: EventFileWriter | None = EventFileWriter(str(folder))
        restart = SessionLog(status=SessionLog.START)  # TensorBoard forgets the steps from here on
        self._events.add_event(Event(wall_time=time.time(), step=step + 1, session_log=restart))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the scalars of one step."""
        if not self._active:
            return
        self._waiting.append(json.dumps({"step": step, **values}) + "\n")
        summary = Summary(
            value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        )
        try:
            self._write_lines()
            if self._events is None:
                self._events = EventFileWriter(str(self._folder))
            self._events.add_event(Event(wall_time=time.time(), step=step, summary=summary))
            self._events.flush()
        except OSError as error:
            self._tell(error)

    def _write_lines(self) -> None:
        """Appends the lines that wait; what a full disk took of one is taken back."""
        left = "".join(self._waiting).encode()
        with open_to_append(self._path) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(end)
                raise
        self._waiting.clear()

    def _tell(self, error: OSError) -> None:
        self._events = None  # its thread has ended; a new file serves the steps to come
        if not self._told:
            tqdm.write(
                f"\nERROR: the log cannot be written to {self._folder}: {error.strerror or error}. "
                "The training goes on; lines wait until there is room.\n",
                file=sys.stderr,
            )
        self._told = True

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._active and self._events:
            try:
                self._events.close()
            except OSError as failed:
                self._tell(failed)


class Pace:
    """How fast the steps go, and how long the device has nothing to do because data are late."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._start, self._waited = time.monotonic(), 0.0
        self._steps = self._images = self._patches = 0

    def waited(self, seconds: float) -> None:
        """Adds time in which the device had nothing to do."""
        self._waited += seconds

    def step(self, images: int, patches: int) -> None:
        """Adds a step."""
        self._steps += 1
        self._images += images
        self._patches += patches

    def take(self) -> dict[str, float]:
        """Means since the last call: seconds a step, of these waiting for data, and rates.

        Empty where there was no step.
        """
        seconds, steps = time.monotonic() - self._start, self._steps
        values = {
            "step_time": seconds / max(steps, 1),
            "data_wait": self._waited / max(steps, 1),
            "images_per_second": self._images / seconds,
            "patches_per_second": self._patches / seconds,
        }
        self._reset()
        return values if steps else {}


def _lines(path: Path) -> list[str]:
    """Whole lines of a file; a last one that was cut short by a kill is left out."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
