"""The code in README and docs: commands for the shell and Python blocks, in their order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from conftest import ROOT

DOCUMENTS = [
    path.relative_to(ROOT).as_posix()
    for path in (
        ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
        ROOT / "benchmarks" / "README.md", ROOT / "CONTRIBUTING.md",
    )
]  # fmt: skip

PROGRAMS = (
    "make", "python", "python3", "fmbseg", "pip", "hf", "tensorboard", "source", "mkdir", "cp",
    "ln", "du", "for", "srun", "gcloud", "pytest", "ray", "git", "export", "cd", "#!/bin/bash",
)  # fmt: skip
"""What a block has to begin with to be commands, and a few words in a text."""

NO_CODE = (
    "your images + your words", "labelling/     stage 1", "config.json        for each",
    "water;lake;river;sea", "∂/∂Z", "JaxRuntimeError: ",
)  # fmt: skip
"""How blocks begin that are neither commands nor Python."""


@dataclass(frozen=True)
class Code:
    """A command, or a Python block."""

    document: str
    line: int
    section: str
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}: {self.text}"

    @property
    def bare(self) -> str:
        """Without the comment behind a command."""
        return self.text if "\n" in self.text else re.sub(r" +#.*", "", self.text)


@dataclass(frozen=True)
class Block:
    """Lines of code in a document, or a span of it in a text."""

    line: int
    section: str
    language: str
    text: str


def blocks(text: str) -> Iterator[Block]:
    """Fenced and indented blocks (language "" where none is said), and `spans` (language "`")."""
    lines, section, i = text.splitlines(), "", 0
    while i < len(lines):
        start = i
        if match := re.match(r"#+ (.*)", lines[i]):
            section, i = match[1], i + 1
        elif match := re.match(r"```(\w*)", lines[i]):
            i = next(j for j in range(i + 1, len(lines)) if lines[j] == "```") + 1
            yield Block(start + 1, section, match[1], "\n".join(lines[start + 1 : i - 1]))
        elif lines[i].startswith("    "):
            while i < len(lines) and (lines[i].startswith("    ") or not lines[i]):
                i += 1
            inside = [line[4:] for line in lines[start:i]]
            yield Block(start + 1, section, "", "\n".join(inside).rstrip())
        else:
            while i < len(lines) and lines[i] and not lines[i].startswith(("#", "```")):
                i += 1
            paragraph = "\n".join(lines[start:i])
            for span in re.finditer(r"`([^`]+)`", paragraph):
                line = start + 1 + paragraph[: span.start()].count("\n")
                yield Block(line, section, "`", " ".join(span[1].split()))
            i = max(i, start + 1)


def commands(script: str) -> Iterator[tuple[int, str]]:
    """Line and text of each command: with its continuation, to the end of a string or a loop."""
    if script.startswith("#!"):
        yield 0, script
        return
    lines, first = script.splitlines(), 0
    for i in range(len(lines)):
        text = "\n".join(lines[first : i + 1])
        open_loop = re.match("for ", text) and not text.endswith("done")
        if text.endswith("\\") or text.count('"') % 2 or open_loop:
            continue
        if text.strip():
            yield first, text
        first = i + 1


@cache
def blocks_of(document: str) -> list[Block]:
    return list(blocks((ROOT / document).read_text()))


@cache
def code_of(document: str) -> list[Code]:
    """All code of a document; raises where a block is of no known kind."""
    return [code for block in blocks_of(document) for code in code_in(block, document)]


def code_in(block: Block, document: str) -> Iterator[Code]:
    program = (block.text.split() or [""])[0]
    ours = program in PROGRAMS or re.match("[A-Z_]+=", program)
    if block.language == "`":
        if ours and " " in block.text:
            yield Code(document, block.line, block.section, "shell", block.text)
    elif block.language == "python" or re.match("(import|from) ", block.text):
        yield Code(document, block.line, block.section, "python", block.text)
    elif block.language == "sh" or ours:
        for line, text in commands(block.text):
            yield Code(document, block.line + line, block.section, "shell", text)
    else:
        assert block.text.startswith(NO_CODE), (
            f"{document}:{block.line}: neither Python nor a command of {PROGRAMS}. Fence it, "
            f"or add how it begins to NO_CODE:\n{block.text}"
        )
