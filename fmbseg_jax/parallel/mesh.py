"""One mesh axis, `data`: global arrays over all devices of all hosts."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def data_mesh() -> Mesh:
    """All devices in one axis, `data`."""
    return Mesh(np.asarray(jax.devices()), ("data",))


def local_mesh() -> Mesh:
    """The devices of this host in one axis, `data`."""
    return Mesh(np.asarray(jax.local_devices()), ("data",))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """A copy of every array of `tree` on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def distribute(mesh: Mesh, batch: Any) -> Any:
    """Host arrays [b, ...], this process's share → global arrays, split over the first axis."""
    split = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x), batch)
