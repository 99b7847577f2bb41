"""One mesh axis, `data`: global arrays over all devices of all hosts."""

from __future__ import annotations

import contextlib
import importlib.util
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


def start_hosts(coordinator: str, processes: int, process: int) -> None:
    """Joins the other hosts; does nothing where there are none. Before anything else of JAX.

    Args:
      coordinator: HOST:PORT of process 0; "" takes it from the environment: of a TPU pod, SLURM's
        srun, Open MPI's mpirun, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
      processes: how many there are; 0 takes it from the environment.
      process: which of them this is; -1 takes it from the environment.

    Raises:
      UserError: only some of the three are given, or the others cannot be reached.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    processes = processes or int(os.environ.get("JAX_NUM_PROCESSES", 0))
    process = process if process >= 0 else int(os.environ.get("JAX_PROCESS_ID", -1))
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process + 1}
    missing = [name for name, value in given.items() if not value]
    if 0 < len(missing) < len(given):
        raise UserError(f"To join the other hosts, give {', '.join(missing)} too.")
    try:
        if not missing:
            jax.distributed.initialize(coordinator, processes, process)
        elif _in_cluster():
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"The other hosts cannot be joined: {error}\nGive --coordinator=HOST:PORT, --processes "
            "and --process on each of them; docs/pods.md shows how."
        ) from None


def _in_cluster() -> bool:
    """Whether JAX will find out by itself who the other processes are."""
    environment = os.environ
    if {"SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"} <= environment.keys():
        return int(environment.get("SLURM_NTASKS", 1)) > 1
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    wanted = environment.get("JAX_PLATFORMS", "tpu")
    return "tpu" in wanted and importlib.util.find_spec("libtpu") is not None


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


def same_for_all(value: float) -> float:
    """Process 0's value, in every process."""
    if jax.process_count() == 1:
        return value
    return float(multihost_utils.broadcast_one_to_all(np.float32(value)))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """A copy of every array of `tree` on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def distribute(mesh: Mesh, batch: Any) -> Any:
    """Host arrays [b, ...], this process's share → global arrays, split over the first axis."""
    split = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x), batch)
