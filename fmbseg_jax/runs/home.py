"""A home folder for the caches of libraries, where a process has none: in containers, in jobs."""

from __future__ import annotations

import atexit
import getpass
import os
import shutil
import sys
import tempfile
from collections.abc import MutableMapping


def provide(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets HOME and USER where there are none, and no entry of the user either.

    Libraries ask for both as they are imported, and fail, or make a folder named "~".
    """
    if os.path.expanduser("~") == "~":
        folder = tempfile.mkdtemp(prefix="fmbseg_home_")
        atexit.register(_remove, folder, os.getpid())
        environment["HOME"] = folder
        print(
            f"There is no home folder: what is fetched lies in {folder} until this program ends. "
            "Set HOME to a folder to keep it.",
            file=sys.stderr,
        )
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):  # by version of Python
        environment["USER"] = f"uid{os.getuid()}"


def _remove(folder: str, maker: int) -> None:
    if os.getpid() == maker:  # not a fork of it
        shutil.rmtree(folder, ignore_errors=True)
