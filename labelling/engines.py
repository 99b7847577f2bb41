"""Who makes the shards: this process, one process for each GPU, or a Ray cluster.

A shard is the unit of work. A worker that dies loses its shard, which another one makes again.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from fmbseg_jax.errors import UserError
from fmbseg_jax.io import machine
from fmbseg_jax.runs.extras import how_to_install
from labelling.shards.counts import Counts
from labelling.shards.worker import Worker

Progress = Callable[[int, Counts], None]
"""Gets a shard and its counts so far."""

ATTEMPTS = 3
"""How often a shard is tried before a worker's death is taken for the shard's fault."""


def run_here(worker: Worker, shards: Sequence[int], progress: Progress) -> None:
    """One shard after the other, in this process."""
    for shard in shards:
        worker.write(shard, functools.partial(progress, shard))


def run_processes(
    worker: Worker, shards: Sequence[int], progress: Progress, devices: Sequence[str]
) -> None:
    """A process for each of `devices`, such as "cuda:0", "cuda:1", or "cpu" several times."""
    todo, deaths = collections.deque(shards), collections.Counter[int]()
    idle = [_Process(worker, device, len(devices)) for device in devices[: len(todo)]]
    busy: dict[Connection, _Process] = {}
    try:
        while todo or busy:
            while todo and idle:
                process = idle.pop()
                process.give(todo.popleft())
                busy[process.connection] = process
            for connection in wait(busy):
                process = busy[connection]  # type: ignore[index]
                try:
                    kind, value = process.connection.recv()
                except (EOFError, OSError):
                    del busy[process.connection]
                    process.stop()
                    deaths[process.shard] += 1
                    _check_deaths(process.shard, deaths, process.exit)
                    print(f"\nA worker died ({process.exit}); shard {process.shard} is made again.")
                    todo.appendleft(process.shard)
                    idle.append(_Process(worker, process.device, len(devices)))
                    continue
                if kind == "error":
                    raise value
                progress(process.shard, value)
                if kind == "done":
                    idle.append(busy.pop(process.connection))
    finally:
        for process in [*idle, *busy.values()]:
            process.stop()


class _Process:
    """A process with a worker in it, that makes the shards it is given."""

    def __init__(self, worker: Worker, device: str, shares: int):
        context = multiprocessing.get_context("spawn")
        self.device, self.shard = device, -1
        self.connection, theirs = context.Pipe()
        worker = dataclasses.replace(worker, device=device)
        self._process = context.Process(target=_serve, args=(worker, shares, theirs), daemon=True)
        self._process.start()
        theirs.close()  # so that its death closes the pipe

    def give(self, shard: int) -> None:
        """Has it make a shard."""
        self.shard = shard
        with contextlib.suppress(OSError):  # it is dead: the pipe says so where it is read
            self.connection.send(shard)

    def stop(self) -> None:
        """Ends it at once, if it is still there."""
        self.connection.close()
        if self._process.is_alive() and self._process.exitcode is None:
            self._process.terminate()
        self._process.join()

    @property
    def exit(self) -> str:
        """How it ended."""
        code = self._process.exitcode or 0
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _serve(worker: Worker, shares: int, connection: Connection) -> None:
    """What a process does: shards in, counts out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    if worker.device == "cpu":
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // shares))
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        while True:
            shard = connection.recv()
            try:
                counts = worker.write(shard, lambda counts: connection.send(("image", counts)))
                connection.send(("done", counts))
            except UserError as error:
                connection.send(("error", error))
            except Exception as error:
                told = machine.sentence(error)
                trace = RuntimeError(traceback.format_exc())
                connection.send(("error", UserError(told) if told else trace))


def _check_deaths(shard: int, deaths: collections.Counter[int], how: str) -> None:
    if deaths[shard] >= ATTEMPTS:
        raise UserError(
            f"{ATTEMPTS} workers died ({how}) while they made shard {shard}. Out of memory? Give "
            "fewer --workers, or look at its images. Shards that are done stay."
        )


def run_ray(worker: Worker, shards: Sequence[int], progress: Progress, workers: int) -> None:
    """Actors of a Ray cluster: that of $RAY_ADDRESS, or one of this machine alone.

    Work folder and images have to be where every node finds them.

    Args:
      workers: how many, as far as they find room; 0: one for each GPU of the cluster, or where
        there is none for each node.
    """
    try:
        import ray
    except ImportError:
        raise UserError(f"--engine=ray needs Ray: {how_to_install('ray')}") from None
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus, cpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("GPU", "CPU"))
    count = min(workers or gpus or len(nodes), gpus or cpus, len(shards))  # more would never start
    on_one = int(max(node.get("CPU", 0) for node in nodes))
    share = {"num_gpus": 1} if gpus else {"num_cpus": max(1, min(cpus // count, on_one))}
    # Workers are restarted for as long as it takes; it is a shard that has so many attempts.
    remote: Any = ray.remote(**share, max_restarts=-1, max_task_retries=ATTEMPTS - 1)  # type: ignore[call-overload]
    pool = ray.util.ActorPool([remote(_Actor).remote(worker) for _ in range(count)])
    try:
        for made in pool.map_unordered(lambda actor, shard: actor.write.remote(shard), [*shards]):
            progress(*made)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise UserError(
            f"Workers died {ATTEMPTS} times over a shard, or the cluster is gone "
            f"({type(error).__name__}). Out of memory? Shards that are done stay."
        ) from None
    finally:
        ray.shutdown()


class _Actor:
    """A worker on a cluster."""

    def __init__(self, worker: Worker):
        self._worker = worker

    def write(self, shard: int) -> tuple[int, Counts]:
        """Makes a shard."""
        return shard, self._worker.write(shard)
