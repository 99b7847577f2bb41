"""Files of this machine or of a store: listed, named, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import fsspec
from etils import epath

from fmbseg_jax.errors import UserError
from fmbseg_jax.io import machine
from fmbseg_jax.io.spelling import printable


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is in a store such as gs:// or s3://."""
    return "://" in str(path)


def exists(path: epath.PathLike) -> bool:
    """Whether there is such a file or folder; raises UserError where its store cannot be asked."""
    try:
        return epath.Path(path).exists()
    except Exception as error:  # each store has its own kinds
        if isinstance(error, OSError) and not is_remote(path):
            raise
        machine.let_through(error, path)
        raise UserError(
            f"{path} cannot be reached ({type(error).__name__}: {error}). Give a folder, gs:// "
            "(which needs `pip install gcsfs`) or s3:// (`pip install s3fs`), and have your "
            "credentials set."
        ) from None


def inside(name: str, source: str) -> str:
    """A name that others have written, `sub/a.jpg`; refused where it leads out of its folder.

    Args:
      source: where it was read, for the message.
    """
    parts = name.replace("\\", "/").split("/")
    if not name.strip() or ".." in parts or parts[0] == "" or printable(name) != name:
        raise UserError(
            f"{source} names the image {name!r}, which may lie outside its folder, or has "
            "control characters. Names are relative and plain, such as sub/a.jpg; do not "
            "use files of people you do not trust."
        )
    return name


def walk(folder: epath.PathLike) -> Iterator[str]:
    """Paths of all files under a folder, relative to it, with forward slashes.

    None is hidden, in a hidden folder, or clutter. Whatever links lead to a folder, it is visited
    once. One that cannot be read is told of.
    """
    if is_remote(folder):  # by one listing: epath's own walk forgets which store it is in
        filesystem, root = fsspec.url_to_fs(str(folder))
        for path in filesystem.find(root):
            name = path.removeprefix(root).lstrip("/")
            if not _is_hidden(name):
                yield name
        return
    visited = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=_tell):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        made = MADE if RESULTS in names else set()
        folders[:] = sorted(name for name in folders if not _is_hidden(name) and name not in made)
        for name in names:
            if not _is_hidden(name) and name not in made:
                yield PurePath(root, name).relative_to(folder).as_posix()


RESULTS, MADE = "segment.json", {"labels", "overlays", "scores", "contact_sheet.png"}
"""In a folder with such a file these are results of segmenting, and no images to begin with."""


def is_result(folder: Path, name: str) -> bool:
    """Whether a file, by its path from a folder, is a result of segmenting."""
    parts = Path(name).parts
    return any(
        part in MADE and (folder.joinpath(*parts[:i]) / RESULTS).is_file()
        for i, part in enumerate(parts)
    )


_CLUTTER = {
    "__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "thumbs.db", "desktop.ini"
}  # fmt: skip
"""What systems and network disks leave among files: copies, thumbnails, what was thrown away."""


def is_clutter(name: str) -> bool:
    """Whether a file, by its path, is of a system's own: macOS writes `._a.jpg` beside `a.jpg`."""
    return any(part[:2] == "._" or part.lower() in _CLUTTER for part in name.split("/"))


def _is_hidden(name: str) -> bool:
    return is_clutter(name) or any(part[:1] == "." for part in name.split("/"))


def _tell(error: OSError) -> None:
    print(f"{printable(str(error.filename))} is left out: {error.strerror}.")


@contextlib.contextmanager
def naming(path: epath.PathLike) -> Iterator[None]:
    """Gives errors of the system the name of the file that is written.

    That of a full disk has none, and others have that of its unfinished copy.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename == str(path):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_file(path: str | os.PathLike) -> bytes:
    """The bytes of a file of this machine.

    Raises:
      OSError: it is not there, or is a pipe or a device, which may have no end; or it is larger
        than any image.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "It is a pipe or a device, not a file", str(path))
        if status.st_size > _LARGEST:
            raise OSError(errno.EINVAL, f"It has {status.st_size:,} bytes", str(path))
        return file.read()


_LARGEST = 1 << 32


def write_atomically(path: epath.PathLike, data: bytes) -> None:
    """Writes a file that appears under its name only when it is whole."""
    path = epath.Path(path)
    unfinished = incomplete(path)
    try:
        with naming(path), unfinished.open("wb") as file:
            file.write(data)
            if not is_remote(path):
                file.flush()
                os.fsync(file.fileno())  # else a power cut may leave an empty file under the name
        with naming(path):
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def incomplete(path: epath.PathLike) -> epath.Path:
    """The name of a file or folder while this thread writes it; short, however long its own is."""
    path = epath.Path(path)
    name = hashlib.blake2b(os.fsencode(path.name), digest_size=6).hexdigest()
    writer = f"{platform.node()}-{os.getpid()}-{threading.get_ident()}"
    return path.with_name(f"{name}.{writer}.incomplete")


def remove_abandoned(folder: Path, *, alone: bool = True) -> None:
    """Removes what killed runs, or killed workers of this one, have left unfinished below.

    Args:
      alone: no other run is at work there. Where one may be, only what is in the folder itself,
        and of processes of this machine that have ended, is removed.
    """
    for path in folder.rglob("*.incomplete") if alone else folder.glob("*.incomplete"):
        found = re.search(r"\.([^/]*)-(\d+)-\d+\.incomplete$", path.name)  # ours alone
        if not found:
            continue
        host, process = found[1], int(found[2])
        if host != platform.node():
            left = alone
        else:
            left = not is_other_process(process) and (alone or process != os.getpid())
        if left and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif left:
            path.unlink(missing_ok=True)


def is_other_process(pid: int) -> bool:
    """Whether this is another process, and at work."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes JSON of any alphabet, as `write_atomically`."""
    write_atomically(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def write_table(path: epath.PathLike, rows: Mapping[str, str]) -> None:
    """Writes lines of two columns, split by a tab; there is none within them."""
    lines = (f"{name}\t{' '.join(text.split())}\n" for name, text in rows.items())
    write_atomically(path, "".join(lines).encode())
