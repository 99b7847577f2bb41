"""Config files: Python with a function `get_config() -> Config`; the package has some of its own.

`configs/NAME.py`, on the command line, and `from configs.NAME import get_config`, in a config file,
mean the file in the current folder, or else the package's own.
"""

from __future__ import annotations

import difflib
import re
import runpy
import sys
import traceback
import types
from collections.abc import Sequence
from pathlib import Path

from fmbseg_jax.errors import UserError
from fmbseg_jax.io import machine, texts

_PACKAGE = Path(__file__).parents[1]
_INSTALLED, _CHECKOUT = _PACKAGE / "configs", _PACKAGE.parent / "configs"
SHIPPED = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT
"""Folder of the package's own."""


def resolve(arguments: Sequence[str]) -> list[str]:
    """The command line with the path of every --config as it is on disk.

    Runs each file: ml_collections would bury its error in a traceback of its own.

    Raises:
      UserError: there is no such file, or it has an error.
    """
    _import_shipped()
    resolved = list(arguments)
    for i, argument in enumerate(arguments):
        value = r"([^:]+)(.*)"
        match = re.match(r"(--?config=)" + value, argument)
        if i and arguments[i - 1] in ("--config", "-config"):
            match = re.match("()" + value, argument)
        if match:
            path = find(match[2])
            _try(path, match[3].removeprefix(":"))
            resolved[i] = match[1] + path + match[3]
    return resolved


def find(path: str) -> str:
    """A path that exists: this one, or the package's own for `configs/NAME.py`."""
    if Path(path).is_file():
        return path
    own = {f"configs/{file.name}": str(file) for file in sorted(SHIPPED.glob("*.py"))}
    if found := own.get(Path(path).as_posix()):
        return found
    near = difflib.get_close_matches(path, own, 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(
        f"No config file at {path}.{hint} Give one of your own, or one that comes with the "
        f"package: {', '.join(own)}."
    )


def _import_shipped() -> None:
    package = types.ModuleType("configs")
    package.__path__ = ["configs", str(SHIPPED)]
    sys.modules.setdefault("configs", package)


def _try(path: str, argument: str) -> None:
    """Runs a file, whose function may take what follows a colon on the command line."""
    try:
        runpy.run_path(path)["get_config"](*[argument] * bool(argument))
    except Exception as error:
        machine.let_through(error, path)
        if isinstance(error, SyntaxError):
            texts.read(path)  # which names the place of what is not UTF-8
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        place = f"{path}, line {frames[-1].lineno}: {frames[-1].line}\n" if frames else ""
        if isinstance(error, UserError):
            raise UserError(f"{place}{error}") from None
        raise UserError(
            f"{place}{path} cannot be used as a config ({type(error).__name__}: {error}). It "
            f"is a Python file with a function get_config() -> Config, as {SHIPPED / 'folder.py'}."
        ) from None
