"""Which images a program looks at, and what the files are called that it makes of them."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from etils import epath

from fmbseg_jax.data import opening
from fmbseg_jax.data.images import EXTENSIONS
from fmbseg_jax.errors import UserError
from fmbseg_jax.io import files, machine, spelling

_OTHERS = (
    ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf",
    ".orf", ".rw2", ".psd", ".exr", ".dcm",
)  # fmt: skip
"""Photographs, too, which Pillow cannot open; a folder that has some is told so."""
_NO_IMAGES = (
    ".txt", ".json", ".jsonl", ".xml", ".csv", ".tsv", ".md", ".html", ".pdf", ".zip", ".tar",
    ".gz", ".npy", ".npz", ".pkl", ".py", ".yaml", ".yml", ".mp4", ".mov", ".aae", ".xmp",
)  # fmt: skip
"""Files that often lie beside images, into which one need not look."""


def find_images(folder: epath.PathLike) -> list[str]:
    """Paths of all images under `folder`, relative to it, with forward slashes, sorted.

    Hidden files and folders, and results of segmenting, are none. Prints which images are left out
    because of their kind or name.
    """
    if not files.exists(folder):
        raise UserError(f"No folder of images at {folder}. Give the path of an existing folder.")
    folder = epath.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; give the folder that it is in.")
    names, faults = _sorted_out(folder, files.walk(folder))
    if not names:
        raise UserError(
            f"No images in {folder}. Looked for {', '.join(EXTENSIONS)} there and in its folders. "
            + " ".join(faults)
        )
    for fault in faults:
        print(f"{folder}: {fault}")
    return names


def _sorted_out(folder: epath.Path, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The images among the files of a folder, sorted; and, in sentences, what is left out."""
    listed = sorted(names)
    images = [
        name
        for name in listed
        if name.lower().endswith(EXTENSIONS) or _is_image_without_ending(folder, name)
    ]
    others = [name for name in listed if name.lower().endswith(_OTHERS)]
    strange = [name for name in images if not _is_text(name)]
    unprintable = [name for name in images if _is_text(name) and not _is_plain(name)]
    faults = []
    if others:
        faults.append(
            f"Left out, for their kind: {len(others)}, such as {others[0]}; JPEG is read."
        )
    if strange:
        shown = strange[0].encode("utf-8", "backslashreplace").decode()
        faults.append(f"Left out, for names that are not UTF-8: {len(strange)}, such as {shown}.")
    if unprintable:
        faults.append(
            f"Left out, for names with control characters: {len(unprintable)}, such as "
            f"{spelling.printable(unprintable[0])}."
        )
    taken = {*images}
    if misnamed := _misnamed(folder, [name for name in listed if name not in taken]):
        faults.append(misnamed)
    return [name for name in images if _is_plain(name)], faults


def _misnamed(folder: epath.Path, names: Sequence[str]) -> str:
    """A sentence on images whose names do not end as such; "" where there are none."""
    known = (*EXTENSIONS, *_OTHERS, *_NO_IMAGES)
    others = [name for name in names if _is_plain(name) and not name.lower().endswith(known)]
    kinds: dict[str, str] = {}
    if files.is_remote(folder):  # to look into each would take as many requests
        others = [name for name in others if not PurePosixPath(name).suffix]
        such = f"such as {others[0]}, and not looked into" if others else ""
    else:
        kinds = {name: kind for name in others if (kind := _kind(folder / name))}
        others = list(kinds)
        such = f"such as {others[0]}, which is a {kinds[others[0]]} file" if others else ""
    if not others:
        return ""
    ending = kinds.get(others[0], "JPEG").lower().replace("jpeg", "jpg")
    return (
        f"Left out, for names that do not end as an image's: {len(others)}, {such}. Rename them, "
        f"for example to {PurePosixPath(others[0]).name}.{ending}."
    )


def _is_image_without_ending(folder: epath.Path, name: str) -> bool:
    """Whether a file whose name has no ending is an image by its first bytes; in no store."""
    if PurePosixPath(name).suffix or files.is_remote(folder) or not _is_plain(name):
        return False
    return bool(_kind(folder / name))


def _kind(path: epath.Path) -> str:
    """The kind of image that a file is by its header; "" for others.

    The first bytes alone would not do: a text may begin with "P1" or "BM".
    """
    try:
        if not os.path.isfile(path):  # a pipe, too, would keep whoever reads it waiting
            return ""
        with open(path, "rb") as file, opening.opened(file) as image:
            return image.format or ""
    except (OSError, ValueError) as error:
        if not isinstance(error, PermissionError):  # whoever reads it says so
            machine.let_through(error, path)
        return ""


def _is_plain(name: str) -> bool:
    """Whether a name can be written into records and lists, and shown by a terminal."""
    return _is_text(name) and spelling.printable(name) == name


def _is_text(name: str) -> bool:
    """Whether a name is UTF-8."""
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
        if other := owners.get(spelling.plain(target)):  # one file, on some disks
            alike = spelling.differing(name, other)
            raise UserError(f"{other} and {name} would both have {target}. Rename one.{alike}")
        owners[spelling.plain(target)] = name
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
        if not _is_plain(path.name):
            raise UserError(
                f"The name {path.name!r} is not UTF-8, or has control characters. Rename the image."
            )
        return Found(path.parent, [path.name])
    if os.path.exists(argument) or not glob.has_magic(argument):
        return Found(path, find_images(path))
    first = next(i for i, part in enumerate(path.parts) if glob.has_magic(part))
    root, pattern = Path(*path.parts[:first]), Path(*path.parts[first:])
    matches = glob.glob(str(pattern), root_dir=root, recursive=True)
    names, faults = _sorted_out(
        epath.Path(root),
        (
            Path(name).as_posix()
            for name in matches
            if not files.is_result(root, name) and not files.is_clutter(Path(name).as_posix())
        ),
    )
    if not names:
        raise UserError(
            f"No image matches {argument}: a file whose name ends in {', '.join(EXTENSIONS)}. "
            "Patterns go in quotes, such as 'photos/**/*.jpg'. " + " ".join(faults)
        )
    for fault in faults:
        print(fault)
    return Found(root, names)
