"""Files that grow line by line over several runs; never written through a link."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from fmbseg_jax.errors import UserError
from fmbseg_jax.io.files import naming


def open_to_append(path: str | os.PathLike) -> BinaryIO:
    """Opens a file, which is made if needed, to be read, and written at its end, unbuffered.

    In a folder of other people it may be a link, or a second name of a file elsewhere, which would
    then be overwritten.

    Raises:
      UserError: the file is a link, has other names, or is no regular file.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    refused = UserError(
        f"{path} is no file of its own: it is a link, or has a second name elsewhere, and what it "
        "leads to would be overwritten. Delete it (whoever made this folder put it there), and run "
        "the same command again."
    )
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO) and os.path.lexists(path):
            raise refused from None
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        raise refused
    return open(descriptor, "ab+", buffering=0)


def append_lines(path: Path, data: bytes) -> None:
    """As `append`, whole lines; where a kill has cut the last one, they begin on a new one."""
    with naming(path), open_to_append(path) as file:
        end = file.seek(0, os.SEEK_END)
        cut = end and os.pread(file.fileno(), 1, end - 1) != b"\n"
    append(path, b"\n" + data if cut else data)


def append(path: Path, data: bytes) -> None:
    """Adds to the end of a file, all or nothing: what a full disk took of it is taken back."""
    with naming(path), open_to_append(path) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
        except BaseException:  # Ctrl-C, too
            file.truncate(end)
            raise
