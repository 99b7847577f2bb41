"""Program: every field of a config, with its default and what it means.

    fmbseg config
    fmbseg config temperature

Reads nothing but its own source, writes to the screen. A word after it shows only the fields that
have it in their names, or else in their comments. Each can be set in a config file, or on the
command line of any program that has --config: `--config.train.temperature=0.1`.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from fmbseg_jax.config import Config, flatten


def comments(section: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted name and comment, the string below it, of every field in a tree of dataclasses."""
    body = ast.parse(textwrap.dedent(inspect.getsource(type(section)))).body[0].body  # type: ignore[attr-defined]
    for field, below in zip(body, [*body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign):
            continue
        name = field.target.id  # type: ignore[union-attr]
        value = getattr(section, name)
        if hasattr(value, "__dataclass_fields__"):
            yield from comments(value, f"{prefix}{name}.")
        else:
            assert isinstance(below, ast.Expr), f"{prefix}{name} has no comment"
            yield f"{prefix}{name}", " ".join(ast.literal_eval(below.value).split())


def matching(word: str) -> dict[str, str]:
    """The fields that have `word` in their names, or if there are none, in their comments."""
    fields = dict(comments(Config()))
    named = {name: comment for name, comment in fields.items() if word.lower() in name.lower()}
    return named or {name: text for name, text in fields.items() if word.lower() in text.lower()}


def describe(fields: dict[str, str], width: int) -> str:
    """The fields as text, no line of it longer than `width` characters."""
    defaults = flatten(Config())
    return "\n".join(
        f"{name} = {defaults[name]!r}\n"
        + textwrap.fill(comment, width, initial_indent="    ", subsequent_indent="    ")
        for name, comment in fields.items()
    )


def main() -> None:
    words = sys.argv[1:]
    if any(word in ("--help", "-h") for word in words):
        print(__doc__)
        return
    word = words[0].removeprefix("--config.").removeprefix("--") if words else ""
    if not (fields := matching(word)):
        near = difflib.get_close_matches(word, flatten(Config()), 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        sys.exit(f"\nerror: No field of the config has {word!r}.{hint} `fmbseg config` shows all.")
    print(describe(fields, min(100, shutil.get_terminal_size().columns)))


if __name__ == "__main__":
    main()
