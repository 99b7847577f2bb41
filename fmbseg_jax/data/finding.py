"""Which images a program looks at, and what the files are called that it makes of them."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from etils import epath

from fmbseg_jax.data import files
from fmbseg_jax.data.images import EXTENSIONS
from fmbseg_jax.errors import UserError


_OTHERS = (".heic", ".heif", ".jp2", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".psd")
"""Photographs, too, which Pillow cannot open; a folder that has some is told so."""


def find_images(folder: epath.PathLike) -> list[str]:
    """Paths of all images under `folder`, relative to it, with forward slashes, sorted.

    Hidden files and folders, and results of segmenting, are none. Prints which photographs are left
    out because of their kind or name.
    """
    if not files.exists(folder):
        raise UserError(f"No folder of images at {folder}. Give the path of an existing folder.")
    folder = epath.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; give the folder that it is in.")
    names, faults = _sorted_out(files.walk(folder))
    if not names:
        raise UserError(
            f"No images in {folder}. Looked for {', '.join(EXTENSIONS)} there and in its folders. "
            + " ".join(faults)
        )
    for fault in faults:
        print(f"{folder}: {fault}")
    return names


def _sorted_out(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The images among files, sorted; and, in sentences, which photographs cannot be read."""
    listed = sorted(names)
    images = [name for name in listed if name.lower().endswith(EXTENSIONS)]
    others = [name for name in listed if name.lower().endswith(_OTHERS)]
    strange = [name for name in images if not _is_text(name)]
    faults = []
    if others:
        faults.append(f"Left out, for their kind: {len(others)}, such as {others[0]}; JPEG is read.")
    if strange:
        shown = strange[0].encode("utf-8", "backslashreplace").decode()
        faults.append(f"Left out, for names that are not UTF-8: {len(strange)}, such as {shown}.")
    return [name for name in images if _is_text(name)], faults


def _is_text(name: str) -> bool:
    """Whether a name is UTF-8: others cannot be written into records and lists."""
    return name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in name)


def png_names(names: Sequence[str], *, whole: bool = False) -> dict[str, str]:
    """By image, the name of a PNG that mirrors it: `sub/a.jpg` → `sub/a.png`.

    Args:
      whole: those of which `a.jpg` and `a.bmp` would share one get `a.jpg.png` and `a.bmp.png`.

    Raises:
      UserError: two images would share one.
    """
    targets = {name: PurePosixPath(name).with_suffix(".png").as_posix() for name in names}
    if whole:
        times = Counter(targets.values())
        targets = {n: t if times[t] == 1 else f"{n}.png" for n, t in targets.items()}
    owners: dict[str, str] = {}
    for name, target in targets.items():
        if other := owners.get(target):
            raise UserError(f"{other} and {name} would both have {target}. Rename one.")
        owners[target] = name
    return targets


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
        return Found(path, find_images(path))
    first = next(i for i, part in enumerate(path.parts) if glob.has_magic(part))
    root, pattern = Path(*path.parts[:first]), Path(*path.parts[first:])
    matches = glob.glob(str(pattern), root_dir=root, recursive=True)
    names, faults = _sorted_out(
        Path(name).as_posix() for name in matches if not files.is_result(root, name)
    )
    if not names:
        raise UserError(
            f"No image matches {argument}: a file whose name ends in {', '.join(EXTENSIONS)}. "
            "Patterns go in quotes, such as 'photos/**/*.jpg'. " + " ".join(faults)
        )
    for fault in faults:
        print(fault)
    return Found(root, names)
