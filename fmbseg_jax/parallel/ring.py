"""Every device meets every other: what they hold goes round the mesh axis, step by step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def ring(
    mine: Array, theirs: Any, meet: Callable[[Array, Any], Array], axis_name: str | None
) -> Array:
    """Takes what every other device holds past this one.

    Args:
      mine: what this device has so far.
      theirs: what travels: this device's own at first.
      meet: from what this device has, and what another holds, to what it has then.
      axis_name: of the mesh; None for one device, which meets nobody.
    """
    if axis_name is None:
        return mine
    send = functools.partial(_send, axis_name=axis_name)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        mine, theirs = carry
        theirs = send(theirs, 1)
        return (meet(mine, theirs), theirs), None

    steps = jax.lax.axis_size(axis_name) - 1
    return jax.lax.scan(step, (mine, theirs), None, length=steps)[0][0]


def half_ring(
    mine: Array, ours: Any, meet: Callable[[Any], tuple[Array, Array]], axis_name: str | None
) -> Array:
    """Has every two devices meet once, in half the steps; each meeting serves both.

    Args:
      mine: what this device has from itself.
      ours: what it holds, which travels.
      meet: from what another holds to what the meeting gives us, and gives it.
      axis_name: of the mesh; None for one device.

    Returns:
      What it has from all, itself included.
    """
    if axis_name is None:
        return mine
    send = functools.partial(_send, axis_name=axis_name)
    devices = jax.lax.axis_size(axis_name)
    half = (devices - 1) // 2

    def step(carry: Any, _: None) -> tuple[Any, None]:
        mine, travelling = carry
        theirs, gathered = send(travelling, 1)
        to_us, to_them = meet(theirs)
        return (mine + to_us, (theirs, gathered + to_them)), None

    start = mine, (ours, jnp.zeros_like(mine))
    (mine, (theirs, gathered)), _ = jax.lax.scan(step, start, None, length=half)
    mine = mine + send(gathered, -half)  # home again
    if devices % 2 == 0:  # opposite devices meet twice: each takes its own part
        mine = mine + meet(send(theirs, 1))[0]
    return mine


def total(x: Array, axis_name: str | None) -> Array:
    """The sum over the devices."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def _send(tree: Any, shift: int, *, axis_name: str) -> Any:
    """Everybody's to the device `shift` further."""
    devices = jax.lax.axis_size(axis_name)
    route = [(i, (i + shift) % devices) for i in range(devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, route), tree)
