"""Joining the other hosts, and the devices that there are."""

from __future__ import annotations

import glob
import importlib.util
import os

import jax

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
