"""One mesh axis, `data`: global arrays over all devices of all hosts."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import os
from collections.abc import Callable, Iterator
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
      UserError: only some of the three are given, the others cannot be reached, or there is no
        device.
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
    check_devices()


def check_devices() -> None:
    """Raises UserError where JAX has no device of the platform that JAX_PLATFORMS names."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split(" (set JAX_PLATFORMS")[0].strip() or "none was found"
        wanted = os.environ.get("JAX_PLATFORMS", "")
        asked = f"JAX_PLATFORMS is {wanted!r}, and " if wanted else ""
        raise UserError(
            f"{asked}JAX finds no device that it can use ({reason}). Unset JAX_PLATFORMS, or set "
            'it to cpu. GPUs need pip install -e ".[cuda]", TPUs pip install -e ".[tpu]".'
        ) from None


def _in_cluster() -> bool:
    """Whether JAX will find out by itself who the other processes are."""
    environment = os.environ
    if {"SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"} <= environment.keys():
        return int(environment.get("SLURM_NTASKS", 1)) > 1
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    wanted = environment.get("JAX_PLATFORMS") or "tpu"
    return "tpu" in wanted and importlib.util.find_spec("libtpu") is not None and _has_tpu()


def _has_tpu() -> bool:
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


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
    with contextlib.ExitStack() as stack:
        by_the_first(lambda: stack.enter_context(workfolder.hold(folder)))
        yield


def same_for_all(value: Any) -> Any:
    """Process 0's array or number, in every process."""
    return value if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(value)


def of_all(number: int) -> list[int]:
    """What each process gives."""
    if jax.process_count() == 1:
        return [number]
    return [int(x) for x in multihost_utils.process_allgather(np.int32(number))]


def together(act: Callable[[], Any]) -> None:
    """Every process does its own; where one raises UserError, all do."""
    failed: UserError | None = None
    try:
        act()
    except UserError as error:
        failed = error
    others = of_all(int(failed is not None))
    if any(others):
        which = others.index(1)
        raise failed or UserError(f"Process {which} has stopped; its output says why.")


def sum_of_all(counts: np.ndarray) -> np.ndarray:
    """The sum over processes of int64 arrays, exact."""
    if jax.process_count() == 1:
        return counts
    halves = np.stack([counts >> 31, counts & (1 << 31) - 1]).astype(np.int32)  # jax has no int64
    high, low = multihost_utils.process_allgather(halves).astype(np.int64).sum(0)
    return (high << 31) + low


def by_the_first(act: Callable[[], Any]) -> None:
    """Process 0 does it; where that raises UserError, all processes do."""
    together(act if jax.process_index() == 0 else lambda: None)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """A copy of every array of `tree` on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def distribute(mesh: Mesh, batch: Any) -> Any:
    """Host arrays [b, ...], this process's share → global arrays, split over the first axis."""
    split = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x), batch)
