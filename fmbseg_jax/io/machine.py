"""Errors of this machine, not of a file: memory, disks, handles, rights; and what to do about each.

Libraries tell of them in many ways: as MemoryError, as OSError, or as a RuntimeError or ValueError
with words of the operating system in it. Whoever takes any error of a library for damage of a file
lets these through first, or a file that is whole would be thrown away.
"""

from __future__ import annotations

import errno
import os
import re

_MEMORY = (
    "Close other programs, raise its limit (ulimit -v, or the job's), or ask for less at once: "
    "features.batch_size, train.images_per_pass, --batch_size, --workers."
)
_WRITABLE = "Give a folder that you may write to, or the right to do so."
_HANDLES = "Raise the limit: ulimit -n 4096."

_OF_MACHINE = {
    errno.ENOSPC: "Make room.",
    errno.EDQUOT: "Make room.",
    errno.EROFS: "Give a folder that can be written to.",
    errno.EACCES: _WRITABLE,
    errno.EPERM: _WRITABLE,
    errno.ENOMEM: _MEMORY,
    errno.EMFILE: _HANDLES,
    errno.ENFILE: _HANDLES,
    errno.EFBIG: "Files of this size are not allowed here: raise the limit (ulimit -f), or give a "
    "folder on another disk.",
    errno.EIO: "The disk does not answer as it should: look at it, or give a folder on another.",
    errno.ESTALE: "A network disk has lost it: mount that again.",
}
"""Errors that say nothing of what is in a file, and what to do about each."""

_RIGHTS = errno.EACCES, errno.EPERM

_ADVICE = _OF_MACHINE | {
    errno.ENOENT: "It is not there (any more). Put it back, if it was moved or deleted.",
    errno.ENOTDIR: "A part of this path is a file and no folder. Give another path.",
    errno.EISDIR: "This is a folder, and a file is wanted. Move it away, or give another path.",
    errno.EEXIST: "Something else has this name. Move it away, or give another path.",
    errno.ENOTEMPTY: "This folder is not empty. Move away what is in it.",
    errno.ENAMETOOLONG: "Give shorter names: most disks take 255 bytes in a name, 4096 in a path.",
    errno.ELOOP: "Links lead in a circle. Remove one of them.",
    errno.EBUSY: "Another program uses it. Wait for that, or end it.",
}
_NAMED = "Look at what has this name, or give another path."

_NO_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|out of memory|bad_alloc|can't allocate memory|insufficient memory|"
    r"unable to allocate|failed to allocate|can't start new thread",
    re.IGNORECASE,
)


def error_of(error: BaseException, *, by_words: bool = True) -> MemoryError | OSError | None:
    """The error of this machine that an error is, came from, or tells of; None where of none.

    Args:
      by_words: the library that raised it puts errors of the system in words of its own, as
        tensorstore, XLA and PyTorch do. Not for those that quote files of other people: what stands
        in a file may read like an error of the machine.
    """
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, MemoryError):
            return cause
        if isinstance(cause, OSError) and cause.errno:
            # A connection that is refused is no matter of folders.
            if cause.errno in _OF_MACHINE and (cause.filename or cause.errno not in _RIGHTS):
                return cause
        elif in_words := _of_rust(str(cause)) or (_in_words(str(cause)) if by_words else None):
            return in_words
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def _of_rust(text: str) -> OSError | None:
    """The error of the system at the end of an error of a library in Rust, which quotes none."""
    number = re.search(r"\(os error (\d+)\)\s*$", text)
    if number and (code := int(number[1])) in _OF_MACHINE:
        return OSError(code, os.strerror(code))
    return None


def _in_words(text: str) -> MemoryError | OSError | None:
    """The error of this machine that the words of a library's error tell of."""
    reason = " ".join(text.split())[:300]
    path = re.search(r"""["'](/[^"']*)["']""", text)
    numbers = [int(number) for number in re.findall(r"(?i)os error (\d+)", text)]
    for code in _OF_MACHINE.keys() - {errno.EPERM}:
        if code in numbers or os.strerror(code).lower() in text.lower():
            if code == errno.ENOMEM:
                return MemoryError(reason)
            return OSError(code, os.strerror(code), path[1]) if path else OSError(code, reason)
    return MemoryError(reason) if _NO_MEMORY.search(text) else None


def let_through(error: BaseException, file: object = "", *, by_words: bool = False) -> None:
    """Raises the error of this machine that an error tells of; returns where it tells of none.

    Args:
      file: what was read or written, for the message, where the error does not name it.
      by_words: as for `error_of`.
    """
    found = error_of(error, by_words=by_words)
    if isinstance(found, MemoryError):
        if not file:
            raise found
        reason = f" ({found})" if str(found) else ""
        told = f"while {file} was read{reason}; if there is plenty of memory, the file is damaged"
        raise MemoryError(told) from error
    if found is not None:
        if file and found.filename is None:
            raise OSError(found.errno, found.strerror, str(file)) from error
        raise found


def sentence(error: BaseException) -> str:
    """What a program says of an error of this machine or of a path; "" for any other."""
    found = error_of(error)
    if found is None and isinstance(error, OSError):
        found = error
    if isinstance(found, MemoryError):
        where = str(found).strip().rstrip(".")
        return f"There is not enough memory{f': {where}' if where else ''}. {_MEMORY}"
    if found is None or not (found.filename is not None or found.errno in _ADVICE):
        return ""
    return f"{str(found).rstrip('.')}. {_ADVICE.get(found.errno or 0, _NAMED)}"
