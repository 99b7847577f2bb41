"""Where the page keeps what its visitors upload and get, and how that goes again."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fmbseg_jax.io.files import is_other_process

_PREFIX = "fmbseg_page_"
KEPT = 7200
"""Seconds for which a file of a visitor stays at most, whatever became of its transfer."""
_EVERY = 600  # seconds between looks


class Folder(NamedTuple):
    """Two folders of one run of the page."""

    served: Path
    """What is here, whoever knows its name can ask the page for."""
    private: Path
    """What is here, nobody can."""


@contextlib.contextmanager
def folder() -> Iterator[Folder]:
    """Folders for this process alone, which go when the block ends.

    Whatever threads are still writing at that time goes when a page is started again.
    """
    prefix = f"{_PREFIX}{platform.node()}_{os.getpid()}_"
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as made:
        both = Folder(Path(made, "served"), Path(made, "private"))
        for part in both:
            part.mkdir()
        ended = threading.Event()
        threading.Thread(target=_sweep, args=(both, ended), daemon=True).start()
        try:
            yield both
        finally:
            ended.set()


def _sweep(folders: Folder, ended: threading.Event) -> None:
    while not ended.wait(_EVERY):
        with contextlib.suppress(OSError):  # no handle is free, for example: the next time then
            remove_old(folders, time.time() - KEPT)


def remove_old(folders: Folder, before: float) -> None:
    """Removes what was last written before a time, in seconds since 1970.

    Of what is served, only uploads that were broken off: those that have come whole, and the
    examples, lie in folders of their own, which Gradio sees to.
    """
    for path in (*folders.served.iterdir(), *folders.private.rglob("*")):
        with contextlib.suppress(OSError):  # another thread was sooner
            if path.is_file() and path.lstat().st_mtime < before:
                path.unlink()


def remove_abandoned() -> None:
    """Removes what pages have left that were killed: their visitors' uploads."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        found = re.fullmatch(rf"{_PREFIX}{re.escape(platform.node())}_(\d+)_\w+", path.name)
        ours = not path.is_symlink() and path.is_dir() and path.stat().st_uid == os.getuid()
        if found and ours and not is_other_process(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)
