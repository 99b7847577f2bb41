"""Names as they are compared and shown: "é" is one letter or, on macOS, an e and an accent."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath


def plain(name: str) -> str:
    """A name as it is compared: in letters as few as can be (Unicode's NFC)."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def printable(text: str) -> str:
    """A text of others, such as a file's name, for a terminal or a table.

    What a terminal would obey, or what would begin a line or a column, is shown as `\\x1b`, and so
    are the marks that let a line be read in another order.
    """
    if text.isprintable():
        return text
    return "".join(letter if _is_shown(letter) else _escaped(letter) for letter in text)


def _is_shown(letter: str) -> bool:
    if letter.isprintable():
        return True
    return unicodedata.category(letter) not in _ESCAPED and letter not in _ORDERS


_ESCAPED = "Cc", "Zl", "Zp", "Cs"
"""Unicode's categories of control characters, ends of lines and halves of a letter."""
_ORDERS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Unicode's embeddings, overrides and isolates: they change the order in which a line is read."""


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


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
