"""What a run says: a progress bar, JSON lines, TensorBoard events. Process 0 alone speaks."""

from __future__ import annotations

import io
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import jax
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from fmbseg_jax.io import texts
from fmbseg_jax.io.appending import append
from fmbseg_jax.io.files import write_atomically


class MetricsLog:
    """Scalars of a training run: `metrics/train.jsonl`, and TensorBoard events beside it.

    Lines of steps after `step`, which a killed run wrote and this one will do again, are dropped. A
    full disk stops nothing: lines and events wait until there is room.
    """

    def __init__(self, folder: Path, step: int):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._told = folder, False
        lines, events = folder / "train.jsonl", _events_file(folder)
        _drop_after(lines, step)
        self._waiting = {lines: b"", events: b""}
        self._lines, self._events = lines, events
        self._add_event(Event(file_version="brain.Event:2"))
        restart = SessionLog(status=SessionLog.START)  # TensorBoard forgets the steps from here on
        self._add_event(Event(step=step + 1, session_log=restart))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the scalars of one step."""
        if not self._active:
            return
        self._waiting[self._lines] += (json.dumps({"step": step, **values}) + "\n").encode()
        summary = Summary(
            value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        )
        self._add_event(Event(step=step, summary=summary))
        if error := self._append():
            self._tell(error, "The training goes on; lines wait until there is room.")

    def _add_event(self, event: Event) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._waiting[self._events] += record.getvalue()

    def _append(self) -> OSError | None:
        """Writes what waits; returns why it still does."""
        failed = None
        for path, data in self._waiting.items():
            try:
                append(path, data)
                self._waiting[path] = b""
            except OSError as error:
                failed = error
        return failed

    def _tell(self, error: OSError, rest: str) -> None:
        if not self._told:
            tqdm.write(
                f"\nERROR: the log cannot be written to {self._folder}: {error.strerror or error}. "
                f"{rest}\n",
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
        if self._active and (failed := self._append()):
            self._told = False
            lines = self._waiting[self._lines].count(b"\n")
            self._tell(failed, f"Its last {lines} lines are lost, and nothing else.")


def _events_file(folder: Path) -> Path:
    """A new file of events, by a name that TensorBoard knows and sorts by time."""
    name = f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{platform.node()}.{os.getpid()}"
    number = next(i for i in itertools.count() if not (folder / f"{name}.{i}").exists())
    return folder / f"{name}.{number}"


def _drop_after(path: Path, step: int) -> None:
    """Leaves the lines of steps up to `step`; of a damaged file a copy stays, and it is told of."""
    data = path.read_bytes() if path.exists() else b""
    whole, _, _ = data.rpartition(b"\n")  # a kill may have cut the last line
    lines = [line for line in whole.split(b"\n") if line]
    parsed = [next(texts.parse_lines(line, {"step": int}), None) for line in lines]
    if damaged := parsed.count(None):
        copy = path.with_name(f"{path.name}.damaged")
        write_atomically(copy, data)
        tqdm.write(
            f"\nERROR: damaged lines of {path} are left out: {damaged}. The file as it was is "
            f"{copy}.\n",
            file=sys.stderr,
        )
    kept = [line for line, one in zip(lines, parsed, strict=True) if one and one["step"] <= step]
    write_atomically(path, b"".join(line + b"\n" for line in kept))


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
