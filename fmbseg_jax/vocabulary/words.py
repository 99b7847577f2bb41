"""Words: class names, prompt templates, and the label value that means "no word"."""

from __future__ import annotations

import os
import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence, Set
from pathlib import Path

from fmbseg_jax.errors import Notice, UserError
from fmbseg_jax.io import texts
from fmbseg_jax.io.spelling import printable

IGNORE = 65535
"""Label of a pixel or patch that has no word; 16-bit label maps hold up to 65,535 words."""

TEMPLATE = "a photo of a {}."
"""The one standard template of the paper (section 4.1)."""
MOST_TEMPLATES = 1000
"""Templates whose features of a word are averaged; the usual lists have up to 80."""


def check_words(words: Iterable[str], source: str = "the word list") -> tuple[str, ...]:
    """Strips the words and returns them; raises UserError where they are not a vocabulary."""
    if isinstance(words, str):
        listed = ", ".join(repr(word.strip()) for word in words.split(","))
        raise UserError(f"Words come in a list: [{listed}]; got the string {words!r}.")
    if not isinstance(words, Iterable) or isinstance(words, Set):  # a set has no order
        raise UserError(f"Words come in a list: ['sky', 'grass']; got {words!r}.")
    words = tuple(words)
    if strange := [word for word in words if not isinstance(word, str)]:
        raise UserError(
            f"Words are strings; got {strange[0]!r}, of type {type(strange[0]).__name__}."
        )
    cleaned = tuple(
        # Accents as letters of their own, as macOS stores them, would make it another word.
        re.sub(r"\s+", " ", unicodedata.normalize("NFC", word)).strip()
        for word in words
    )
    faults = [f"word {i + 1} is empty" for i, word in enumerate(cleaned) if not synonyms(word)]
    faults += [
        f"word {i + 1}, {printable(word)}, has a control character"
        for i, word in enumerate(cleaned)
        if printable(word) != word
    ]
    first: dict[str, int] = {}
    for i, word in enumerate(cleaned):
        names = [name.lower() for name in synonyms(word)]
        if len(set(names)) < len(names):
            faults.append(f"word {i + 1}, {word!r}, has a name twice")
        for name in names:
            j = first.setdefault(name, i)
            if j != i and cleaned[j].lower() == word.lower():
                faults.append(f"word {i + 1}, {word!r}, is word {j + 1} again")
            elif j != i:
                faults.append(f"word {i + 1}, {word!r}, shares {name!r} with {cleaned[j]!r}")
    if not cleaned:
        faults.append("it holds no word")
    if len(cleaned) > IGNORE:
        faults.append(f"it holds {len(cleaned)} words; label maps have room for {IGNORE}")
    if faults:
        raise UserError(
            f"{source} cannot be used: {'; '.join(faults[:10])}. Give each class one word or "
            "phrase, each only once, such as: sky, grass, sail boat."
        )
    return cleaned


def read_words(path: str | Path) -> tuple[str, ...]:
    """Reads a word list: a text file (UTF-8) with one word or phrase a line, or `sofa;couch`.

    Blank lines at the end are passed over; one in between is an error, since a lost line would
    shift every label after it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"No word list at {path}. Write a text file with one word or phrase a line, or give "
            "the words themselves, separated by commas."
        )
    lines = texts.read(path).rstrip().splitlines()
    if doubtful := _doubtful(lines):
        warnings.warn(f"{path}: {doubtful}", Notice, stacklevel=1)
    return check_words(lines, str(path))


def _doubtful(lines: Sequence[str]) -> str:
    """What a word list may have been meant to say otherwise than it is read; "" for nothing."""
    told = []
    for sign, advice in (
        (",", "Give each its own line, or write `;` between names of one class"),
        ("#", "There are no comments: remove the line, if it is one"),
    ):
        numbers = [i for i, line in enumerate(lines) if sign in line]
        if numbers:
            more = f", as are {len(numbers) - 1} more with {sign!r}" * (len(numbers) > 1)
            told.append(
                f"line {numbers[0] + 1} is read as one word, {lines[numbers[0]].strip()!r}{more}. "
                f"{advice}."
            )
    return " ".join(told)


def parse_words(argument: str) -> tuple[str, ...]:
    """Words as given on a command line: the path of a word list, or `sky,grass,sail boat`."""
    if os.path.isfile(argument):  # False, too, for lists too long to be a path
        return read_words(argument)
    if argument.endswith(".txt") or ("/" in argument and "," not in argument):
        return read_words(argument)  # meant as a path: say that it is not there
    return check_words(argument.split(","), "the list of words")


def read_templates(argument: str) -> tuple[str, ...]:
    """Templates, `a photo of a {}.`: one or several, a line each, or a text file of such lines.

    Raises:
      UserError: a line has not one place for the word, or there are more than `MOST_TEMPLATES`.
    """
    file = "{}" not in argument and os.path.isfile(argument)
    text = texts.read(argument) if file else argument
    templates = tuple(line.strip() for line in text.splitlines() if line.strip())
    if wrong := [line for line in templates if line.count("{}") != 1 or printable(line) != line]:
        raise UserError(
            f"A template is a line with one {{}} where the word goes; got {printable(wrong[0])!r}"
            + (f" in {argument}." if file else ".")
        )
    if len(templates) > MOST_TEMPLATES:
        raise UserError(
            f"These are {len(templates):,} templates; CLIP reads every word in each of them, and "
            f"at most {MOST_TEMPLATES:,} are taken."
        )
    return templates


def synonyms(word: str) -> tuple[str, ...]:
    """The names of a class: `sofa;couch` has two, most words one."""
    return tuple(name.strip() for name in word.split(";") if name.strip())


def unlike(name: str, words: Sequence[str]) -> str:
    """What pixels without a word are called: `name`, or another where a word is called that."""
    taken = {known.lower() for word in words for known in (word, *synonyms(word))}
    while name.lower() in taken:
        name += " (no word)"
    return name


def prompts(words: Sequence[str], template: str = TEMPLATE) -> list[str]:
    """The sentences given to the text encoder, one for each word."""
    if template.count("{}") != 1:
        raise UserError(f"A template has one {{}} where the word goes; got {template!r}.")
    return [template.replace("{}", word) for word in words]
