"""What the programs need of the operating system: locks on files, which Windows has not."""

from __future__ import annotations

from fmbseg_jax.errors import UnsupportedSystem

try:
    import fcntl
except ModuleNotFoundError:
    raise UnsupportedSystem(
        "FMbSeg runs on Linux and macOS; on Windows, in WSL: run `wsl --install`, and in it do as "
        "on Linux."
    ) from None

__all__ = ["fcntl"]
