"""Folders that are replaced whole: filled under another name, then exchanged with the old one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from fmbseg_jax.errors import UserError
from fmbseg_jax.io.files import incomplete, remove_abandoned


@contextlib.contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A new, empty folder to fill, which takes the place of `folder` when the block ends well.

    Where the block fails, nothing is left of it. Linux and macOS exchange the two folders at once;
    where a file system cannot, the old one is moved aside first, and goes last. So whenever this is
    killed, one of the two is there, whole. If it was killed between the two, the next call gives
    the old one its name back. Of two programs that replace one folder at once, the last one wins.

    Raises:
      UserError: there is a file in its place, a disk is mounted there, or something that is not
        ours has the name that the old folder would be moved to.
    """
    folder = folder.resolve()  # of a link, the folder that it leads to
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, where a folder is to be written. Move it away.")
    unfinished, old = Path(incomplete(folder)), moved_aside(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder.parent, alone=False)
    if old.exists() and not (old / "model.json").is_file():  # no export of ours: somebody's own
        raise UserError(f"{old} is in the way. Move it, or give another folder.")
    if old.exists() and not folder.exists():
        old.rename(folder)
    for left in (unfinished, old):
        shutil.rmtree(left, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        if not (folder.exists() and _exchanged(unfinished, folder)):
            _move(unfinished, folder, old)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise UserError(
            f"{folder} cannot be replaced as a whole: a disk is mounted there. Give another folder."
        ) from error
    finally:
        for left in (unfinished, old):  # what was not finished, or what it has replaced
            if folder.exists() or left == unfinished:
                shutil.rmtree(left, ignore_errors=True)


def _move(unfinished: Path, folder: Path, old: Path) -> None:
    if folder.exists():
        folder.rename(old)
    try:
        unfinished.rename(folder)
    except BaseException:  # Ctrl-C, too
        if old.exists():
            old.rename(folder)
        raise


def moved_aside(folder: Path) -> Path:
    """Where `replaced` keeps the old folder while the new one takes its name."""
    folder = folder.resolve()  # of a link, the folder that it leads to
    return folder.with_name(f"{folder.name}.being_replaced")


_HERE = -100 if sys.platform == "linux" else -2
"""AT_FDCWD: paths are taken from the working directory."""
_EXCHANGE = 2
"""RENAME_EXCHANGE of Linux's renameat2, RENAME_SWAP of macOS's renameatx_np."""
_CANNOT = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM}


def _exchanged(new: Path, old: Path) -> bool:
    """Has two folders get each other's name at once; False where the file system cannot do that."""
    system = ctypes.CDLL(None, use_errno=True)
    exchange = getattr(system, "renameat2" if sys.platform == "linux" else "renameatx_np", None)
    if exchange is None:
        return False
    if exchange(_HERE, os.fsencode(new), _HERE, os.fsencode(old), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(old))


def copy(folder: Path, new: Path, without: Collection[str] = ()) -> None:
    """Copies the files of a folder into a new one, which is there and empty.

    Rights are not copied: a copy of what may only be read can be written to.

    Args:
      without: names in the folder itself that are left out.

    Raises:
      UserError: as `files_of`.
    """
    for path in files_of(folder, without):
        target = new / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def files_of(folder: Path, without: Collection[str] = ()) -> Iterator[Path]:
    """All files below a folder, sorted.

    Args:
      without: names in the folder itself that are left out.

    Raises:
      UserError: one is a link out of the folder, or no file; none of it would be the folder's.
    """
    roots = folder.resolve(), _blobs(folder)
    for path in _contents(folder):
        if str(path.relative_to(folder)) in without:
            continue
        target = path.resolve()
        own = any(target.is_relative_to(root) for root in roots)
        if not own or not target.is_file():
            raise UserError(
                f"{path} leads out of {folder} (to {target}), or is not a file. It may be of "
                "whoever made that folder, and is not read: delete it, or put the file itself "
                "there."
            )
        yield path


def _contents(folder: Path) -> Iterator[Path]:
    """All below a folder but its folders, sorted; links to folders are not followed."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        links = [name for name in folders if Path(root, name).is_symlink()]
        yield from (Path(root, name) for name in sorted([*names, *links]))


def _blobs(folder: Path) -> Path:
    """Where the hub's cache keeps the files that `models--USER--NAME/snapshots/REVISION` links."""
    folder = folder.resolve()
    for snapshot in (folder, folder.parent):  # of an export, and of its params/
        if snapshot.parent.name == "snapshots" and snapshot.parents[1].name[:8] == "models--":
            return snapshot.parents[1] / "blobs"
    return folder
