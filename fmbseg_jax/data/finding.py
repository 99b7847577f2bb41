"""Which images a program looks at: those of a folder, one file, or those that a pattern matches."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import NamedTuple

from fmbseg_jax.data import images
from fmbseg_jax.errors import UserError


class Found(NamedTuple):
    """The images of --images."""

    folder: Path
    """What their names are relative to."""
    names: list[str]


def find(argument: str, out: Path) -> Found:
    """The images of a folder and its sub-folders, of one file, or of a pattern with * or ?.

    What lies in `out` are results, which the next run would take for images.
    """
    found = _find(argument)
    results = out.resolve()
    names = [
        name for name in found.names if not (found.folder / name).resolve().is_relative_to(results)
    ]
    if not names:
        raise UserError(
            f"All images of --images={argument} lie in --out={out}. Give another --out."
        )
    return Found(found.folder, names)


def _find(argument: str) -> Found:
    path = Path(argument)
    if os.path.isfile(argument):
        return Found(path.parent, [path.name])
    if os.path.exists(argument) or not glob.has_magic(argument):
        return Found(path, images.find_images(path))
    first = next(i for i, part in enumerate(path.parts) if glob.has_magic(part))
    root, pattern = Path(*path.parts[:first]), Path(*path.parts[first:])
    names = glob.glob(str(pattern), root_dir=root, recursive=True)
    kept = sorted(
        Path(name).as_posix() for name in names if name.lower().endswith(images.EXTENSIONS)
    )
    if not kept:
        raise UserError(
            f"No image matches {argument}: a file whose name ends in "
            f"{', '.join(images.EXTENSIONS)}. Patterns go in quotes, such as 'photos/**/*.jpg'."
        )
    return Found(root, kept)
