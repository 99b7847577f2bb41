"""One name in two spellings: "é" is a letter, or, as macOS writes it, an e and an accent."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath


def plain(name: str) -> str:
    """A name as it is compared: in letters as few as can be (Unicode's NFC)."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def beside(folder: Path, name: str) -> Path:
    """The file `folder/name`, in whichever spelling it is there; as it is given, if in none.

    Folders and file may be spelled differently: archives that were unpacked here and there are.
    """
    path = folder
    for part in PurePosixPath(name).parts:
        path = next((path / one for one in _spellings(part) if (path / one).exists()), path / part)
    return path


def _spellings(part: str) -> Iterable[str]:
    if part.isascii():
        return [part]
    forms = (unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
    return dict.fromkeys([part, *forms])


def differing(one: str, other: str) -> str:
    """What to say of two names that look the same; "" where they do not."""
    if one != other and plain(one) == plain(other):
        return " The two names differ only in how letters with accents are stored."
    return ""
