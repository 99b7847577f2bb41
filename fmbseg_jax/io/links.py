"""Paths for libraries that take a folder named `run[1]` for a pattern, as Orbax does."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fmbseg_jax.errors import UserError

_PATTERN = re.compile(r"[][*?\\]")
"""What globs read as more than a letter; the backslash, file systems of tensorstore's."""


@contextlib.contextmanager
def without_patterns(folder: Path) -> Iterator[Path]:
    """A path to a folder, which is there, in which nothing can be taken for a pattern.

    That is its own, or one through a link in the folder for temporary files, while the block runs.

    Raises:
      UserError: a link cannot be made, or would have such letters itself.
    """
    folder = folder.resolve()
    if not _PATTERN.search(str(folder)):
        yield folder
        return
    advice = (
        f"{folder} has a character in its path that would be taken for a pattern, one of "
        "[ ] * ? \\. Rename it, or set TMPDIR to a folder that has none and where links can be "
        "made."
    )
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(tempfile.TemporaryDirectory(prefix="fmbseg_"))
            link = Path(made).resolve() / "folder"
            link.symlink_to(folder, target_is_directory=True)
        except OSError as error:
            raise UserError(f"{advice} ({error.strerror})") from None
        if _PATTERN.search(str(link)):
            raise UserError(advice)
        yield link
