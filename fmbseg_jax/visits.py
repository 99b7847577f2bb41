"""Where the page keeps what its visitors upload and get, and how that goes again."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fmbseg_jax.data.files import is_other_process

_PREFIX = "fmbseg_page_"


class Folder(NamedTuple):
    """Two folders of one run of the page."""

    served: Path
    """What is here, whoever knows its name can ask the page for."""
    private: Path
    """What is here, nobody can."""


@contextlib.contextmanager
def folder() -> Iterator[Folder]:
    """Folders for this process alone, which go when the block ends."""
    with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{platform.node()}_{os.getpid()}_") as made:
        both = Folder(Path(made, "served"), Path(made, "private"))
        for part in both:
            part.mkdir()
        yield both


def remove_abandoned() -> None:
    """Removes what pages have left that were killed: their visitors' uploads."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        found = re.fullmatch(rf"{_PREFIX}{re.escape(platform.node())}_(\d+)_\w+", path.name)
        ours = not path.is_symlink() and path.is_dir() and path.stat().st_uid == os.getuid()
        if found and ours and not is_other_process(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)
