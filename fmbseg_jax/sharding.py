"""One mesh axis, `data`: global arrays over all devices of all hosts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fmbseg_jax import workfolder
from fmbseg_jax.errors import UserError


def start_hosts() -> None:
    """Joins the other hosts where the environment names a coordinator; else does nothing.

    Set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID on each of them.
    """
    names = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
    missing = [name for name in names if name not in os.environ]
    if 0 < len(missing) < len(names):
        raise UserError(f"To join the other hosts, set {', '.join(missing)} too.")
    if not missing:
        jax.distributed.initialize(
            num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
            process_id=int(os.environ["JAX_PROCESS_ID"]),
        )


def data_mesh() -> Mesh:
    """All devices in one axis, `data`."""
    return Mesh(np.asarray(jax.devices()), ("data",))


def local_mesh() -> Mesh:
    """The devices of this host in one axis, `data`."""
    return Mesh(np.asarray(jax.local_devices()), ("data",))


def wait_for_all(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def hold(folder: epath.PathLike) -> Iterator[None]:
    """`workfolder.hold`, by one process for all of them."""
    first = jax.process_index() == 0
    with workfolder.hold(folder) if first else contextlib.nullcontext():
        wait_for_all(f"{folder} is held")
        yield


def replicate(mesh: Mesh, tree: Any) -> Any:
    """A copy of every array of `tree` on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def distribute(mesh: Mesh, batch: Any) -> Any:
    """Host arrays [b, ...], this process's share → global arrays, split over the first axis."""
    split = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x), batch)
