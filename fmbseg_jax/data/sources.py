"""From which state of its files something was made: others may take their names later."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

from fmbseg_jax.io import texts
from fmbseg_jax.io.appending import append_lines

State = list[list[int]]
"""Size in bytes, and time of change in nanoseconds, of each file."""
STATE = [(int, int)]
"""Its form in JSON."""


def state(*paths: str | os.PathLike) -> State:
    """The state of some files, before they are read; raises OSError where one is not there."""
    found = [os.stat(path) for path in paths]
    return [[status.st_size, status.st_mtime_ns] for status in found]


class Sources:
    """By name, the state of the files that something was made from, in a file of JSON lines.

    It is written line by line, as things are made, by several threads; a line that is damaged, or
    that a kill cut short, counts as none.
    """

    def __init__(self, path: Path):
        """Reads what is there."""
        self._path, self._lock = path, threading.Lock()
        self._states: dict[str, State] = {}
        data = path.read_bytes() if path.is_file() else b""
        for line in texts.parse_lines(data, (str, STATE)):
            if line is not None:
                self._states[line[0]] = line[1]

    def is_current(self, name: str, *paths: str | os.PathLike) -> bool:
        """Whether the files are still as they were when what has this name was made."""
        try:
            return name in self._states and self._states[name] == state(*paths)
        except OSError:
            return False

    def add(self, name: str, found: State) -> None:
        """Writes down the state that something was made from, once it is on disk."""
        with self._lock:
            self._states[name] = found
            append_lines(self._path, f"{json.dumps([name, found])}\n".encode())
