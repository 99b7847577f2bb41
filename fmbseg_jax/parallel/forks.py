"""Processes that are forked off one in which JAX has run: there, it waits for ever."""

from __future__ import annotations

import os

from fmbseg_jax.errors import UserError


def check_process(owner: int) -> None:
    """Raises UserError where this is not the process, by its id, that a model was loaded in."""
    if os.getpid() != owner:
        raise UserError(
            f"The model was loaded in process {owner}, from which this one, {os.getpid()}, was "
            "forked; JAX does not work in such a process. Load the model in each process after it "
            'has started, and start them by multiprocessing.get_context("spawn"), or use threads, '
            "which may share one model."
        )
