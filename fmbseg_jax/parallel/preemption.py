"""Being told to stop: SIGTERM from a scheduler, Ctrl-C from a user."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Notice:
    """Whether this process has been told to stop."""

    def __init__(self) -> None:
        self.signal = ""
        """Name of the signal; "" while there was none."""

    def reached(self, step: int) -> bool:
        """Whether to stop after this step; with several processes, the same for all of them.

        Call it after every step.
        """
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = self.signal or "SIGTERM"
            return True
        return self.heard()

    def heard(self) -> bool:
        """Whether this process may stop at once, not only after a step: it is the only one."""
        return bool(self.signal) and jax.process_count() == 1


@contextlib.contextmanager
def listen() -> Iterator[Notice]:
    """Takes SIGTERM and Ctrl-C as a wish to stop after the step; a second Ctrl-C stops at once.

    Of several processes any may be told: JAX's own service hears SIGTERM, and agrees on a step.
    """
    notice = Notice()

    alone = jax.process_count() == 1

    def heard(number: int, _: FrameType | None) -> None:
        notice.signal = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not alone:
            os.kill(os.getpid(), signal.SIGTERM)

    numbers = (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,)
    before = {number: signal.signal(number, heard) for number in numbers}
    try:
        yield notice
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
