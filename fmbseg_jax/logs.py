"""What a run says: a progress bar, JSON lines, TensorBoard events. Process 0 alone speaks."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import jax
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tqdm import tqdm

from fmbseg_jax.data.images import write_atomically


def progress(total: int, description: str, initial: int = 0, unit: str = "image") -> tqdm:
    """A progress bar with time left; silent in all processes but the first."""
    return tqdm(
        total=total, initial=initial, desc=f"{description:<10}", unit=f" {unit}",
        disable=jax.process_index() > 0, dynamic_ncols=True, smoothing=0.1,
    )  # fmt: skip


class MetricsLog:
    """Scalars of a training run: `metrics/train.jsonl`, and TensorBoard events beside it.

    Lines of steps after `step`, which a killed run wrote and this one will do again, are dropped.
    """

    def __init__(self, folder: Path, step: int):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "train.jsonl"
        kept = [line for line in _lines(self._path) if json.loads(line)["step"] <= step]
        write_atomically(self._path, "".join(kept).encode())
        self._events = EventFileWriter(str(folder))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the scalars of one step."""
        if not self._active:
            return
        with open(self._path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        summary = Summary(
            value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        )
        self._events.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._active:
            self._events.close()


def _lines(path: Path) -> list[str]:
    """Whole lines of a file; a last one that was cut short by a kill is left out."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
