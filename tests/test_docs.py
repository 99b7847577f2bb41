"""Every command and Python block of README and docs runs, as it is written, in a small sandbox.

What cannot run here is in a table, with the reason and what is checked in its place. Links, paths,
flags and fields that the documents name have to exist.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest
from conftest import ROOT
from sandbox import Sandbox

from fmbseg_jax.config import Config, flatten

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
    "water;lake;river;sea", "∂/∂Z",
)  # fmt: skip
"""How blocks begin that are neither commands nor Python."""

BEFORE = {
    "README.md": ["docs/reproduce.md#Table 1"],
    "docs/pods.md": ["docs/reproduce.md#Table 1"],
    "docs/reproduce.md": ["docs/reproduce.md#Table 1"],
    "docs/your_data.md": [],
    "docs/export.md": ["README.md"],
    "docs/labelling.md": [],
    "docs/training.md": ["README.md", "docs/pods.md"],
    "docs/segmenting.md": ["make demo"],
    "docs/data.md": ["make demo"],
    "benchmarks/README.md": ["make demo"],
}
"""What a document takes for granted: commands, a section's commands, or those of a document."""

PLACES = {
    "docs/pods.md": "mkdir -p work/coco scratch/coco"
    " && cp -r work/coco_stuff/pseudo_labels work/coco"
    " && cp -r work/coco_stuff/pseudo_labels scratch/coco",
    "docs/training.md": "mkdir -p work/other && cp -r work/coco/features work/other",
}
"""Work folders that a document calls by other names."""


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
def code_of(document: str) -> list[Code]:
    """All code of a document, in order; raises where a block is of no known kind."""
    found: list[Code] = []
    for block in blocks((ROOT / document).read_text()):
        make = partial(Code, document, section=block.section)
        first = block.text.split("=")[0] if re.match(r"[A-Z_]+=", block.text) else ""
        program = (block.text.split() or [""])[0]
        if block.language == "`":
            if program in PROGRAMS and " " in block.text:
                found.append(make(block.line, kind="shell", text=block.text))
        elif block.language == "python" or re.match("(import|from) ", block.text):
            found.append(make(block.line, kind="python", text=block.text))
        elif block.language == "sh" or program in PROGRAMS or first:
            for line, text in commands(block.text):
                found.append(make(block.line + line, kind="shell", text=text))
        else:
            assert block.text.startswith(NO_CODE), (
                f"{document}:{block.line}: neither Python nor a command of {PROGRAMS}. Fence it, "
                f"or add how it begins to NO_CODE:\n{block.text}"
            )
    return found


Check = Callable[[Sandbox, Code], None]


def runs(sandbox: Sandbox, code: Code) -> None:
    status, output = sandbox.run(code.text)
    assert status == 0, output


def has_the_flags(sandbox: Sandbox, code: Code) -> None:
    status, output = sandbox.run(code.text, flags_only=True)
    assert status == 0 and "It has all of these flags." in output, output


def make_knows_it(sandbox: Sandbox, code: Code) -> None:
    status, output = sandbox.run(code.text.replace("make ", "make --dry-run ", 1))
    assert status == 0, output


def serves_a_page(sandbox: Sandbox, code: Code) -> None:
    status, page = sandbox.answer(code.text)
    assert status == 0 and "<html" in page.lower(), f"exit code {status}: {page[:200]}"


def is_there(sandbox: Sandbox, code: Code) -> None:
    assert (ROOT / code.text.split()[3]).is_file()


def is_a_marker(sandbox: Sandbox, code: Code) -> None:
    assert f'"{code.text.split()[-1]}: ' in (ROOT / "pyproject.toml").read_text()


def wants_its_flags(sandbox: Sandbox, code: Code) -> None:
    """It is the name of a program."""
    status, output = sandbox.run(code.text)
    assert status == 1 and "error: --config is missing. For example:" in output, output


def compiles(sandbox: Sandbox, code: Code) -> None:
    ast.parse(code.text)


def ends(message: str, sandbox: Sandbox, code: Code) -> None:
    """With an error that is expected here, and not another."""
    status, output = sandbox.run(code.text)
    assert status == 1 and message in output and "Traceback" not in output, output


@dataclass(frozen=True)
class Instead:
    """Why a command does not run here, or not to a good end; and what is checked in its place."""

    why: str
    check: Check


INSTEAD = {
    r"make test": Instead("it would run itself; minutes", make_knows_it),
    r"python -m pytest tests/\w+\.py": Instead("runs anyway, beside this", is_there),
    r"pytest -m network": Instead("wants a connection", is_a_marker),
    r"python (train\.py|evaluate\.py|-m labelling)": Instead("a name", wants_its_flags),
    r"python benchmarks/.*": Instead("minutes to hours", has_the_flags),
    r"fmbseg app .*|tensorboard .*": Instead("goes on until Ctrl-C", serves_a_page),
    r"RAY_ADDRESS=auto .*": Instead(
        "wants a cluster; test_labelling_engines.py has one", has_the_flags
    ),
    r"python train.py .* --coordinator=.*": Instead(
        "wants hosts; test_hosts.py has processes", has_the_flags
    ),
    r"gcloud .*": Instead("wants TPUs; the hosts' command has our flags", has_the_flags),
    r"python evaluate.py .* --check": Instead(
        "the sets are not whole here", partial(ends, "Not the number of images that is published")
    ),
    r".* --push=.*": Instead(
        "wants a connection", partial(ends, "could not be pushed to USER/NAME (OfflineMode")
    ),
    r"import tensorflow as tf.*": Instead(
        "TensorFlow is not installed; test_tfrecord.py -m tensorflow reads the same", compiles
    ),
}
"""By a pattern of the whole command or Python block."""

STAND_INS = {
    "pip": "wants a connection; extras and files of requirements have to exist",
    "gcloud": "wants a cloud; bash reads the command for the hosts",
    "hf": "wants a connection and a token; the hub's client has to have the command",
}
"""Programs that are not the real ones in the sandbox: why, and what they do."""

LIBRARIES = {
    "fiftyone": """
from pathlib import Path

class types:
    COCODetectionDataset = "coco"

class Dataset:
    @staticmethod
    def from_dir(*, dataset_type, data_path, labels_path, label_types):
        assert Path(data_path).is_dir() and Path(labels_path).is_file()
""",
    "label_studio_sdk/converter/brush": """
def mask2rle(mask):
    assert mask.dtype == "uint8" and mask.ndim == 2 and mask.max() == 255
    return mask.ravel().tolist()
""",
}
"""What stands in for libraries that are not installed, and what it asks of its arguments."""

ARGUMENTS = {"import pathlib, sys\n": ["data/toy/train", "work/colours/features"]}
"""Of Python blocks that are scripts, by how they begin."""


def instead_of(code: Code) -> tuple[str, Check]:
    """Pattern and check of a command: of the first pattern that fits, or "" and that it runs."""
    for pattern, instead in INSTEAD.items():
        if re.fullmatch(pattern, code.bare, re.DOTALL):
            return pattern, instead.check
    return "", run_python if code.kind == "python" else runs


def run_python(sandbox: Sandbox, code: Code) -> None:
    """After the blocks of its section that stand before it."""
    section = [c for c in code_of(code.document) if c.kind == "python" and c.line <= code.line]
    section = [c for c in section if c.section == code.section and not instead_of(c)[0]]
    arguments = next((a for first, a in ARGUMENTS.items() if code.text.startswith(first)), [])
    status, output = sandbox.run_python("\n\n".join(c.text for c in section), *arguments)
    assert status == 0, output


class Reader:
    """Does what the documents say, once; and what they take for granted, before."""

    def __init__(self, sandbox: Sandbox):
        self.sandbox, self._done = sandbox, {}

    def read(self, what: str) -> list[str]:
        """Faults of a document, of a section (`DOCUMENT#SECTION`) of it, or of a command."""
        document, _, section = what.partition("#")
        if document not in DOCUMENTS:
            return self._do(Code("tests/test_docs.py", 0, "", "shell", what))
        if not section:
            for before in BEFORE.get(document, []):
                self.read(before)
            if place := PLACES.get(document):
                self.read(place)
        faults = []
        for code in code_of(document):
            if section in ("", code.section):
                faults += self._do(code)
        return faults

    def _do(self, code: Code) -> list[str]:
        key = (code.document, code.line) if code.kind == "python" else code.bare
        if key not in self._done:
            self._done[key] = []
            try:
                instead_of(code)[1](self.sandbox, code)
            except Exception as error:
                self._done[key] = [f"{code}\n{error}"]
        return self._done[key]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    sandbox = Sandbox(tmp_path_factory.mktemp("checkout"))
    for name, source in LIBRARIES.items():
        path = sandbox.folder / "stand_ins" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    yield Reader(sandbox)
    sandbox.close()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_code_of(document, reader):
    faults = reader.read(document)
    assert not faults, "\n\n".join(faults)


def test_the_tables_have_nothing_that_no_document_has():
    found = [code for document in DOCUMENTS for code in code_of(document)]
    used = {instead_of(code)[0] for code in found}
    shell, python = (
        "\n".join(code.text for code in found if code.kind == kind) for kind in ("shell", "python")
    )
    blocks = [block for name in DOCUMENTS for block in blocks_of(name)]
    unused = {*INSTEAD} - used
    unused |= {one for one in NO_CODE if not any(b.text.startswith(one) for b in blocks)}
    unused |= {one for one in ARGUMENTS if one not in python}
    unused |= {one for one in STAND_INS if not re.search(rf"\b{one} ", shell)}
    unused |= {one for one in LIBRARIES if one.replace("/", ".").rpartition(".")[0] not in python}
    unused |= {*BEFORE, *PLACES} - {*DOCUMENTS}
    assert not unused


def blocks_of(document: str) -> list[Block]:
    return list(blocks((ROOT / document).read_text()))


def test_blocks_and_commands_are_found():
    text = """# One
Say `make tea` or
`fmbseg
label`:

    fmbseg label --config=FILE \\
        --strict   # all

    for i in 1 2; do
      echo "$i
    x"
    done

## Two

```python
x = 1
```
"""
    found = list(blocks(text))
    assert [(b.line, b.section, b.language) for b in found] == [
        (2, "One", "`"), (3, "One", "`"), (6, "One", ""), (16, "Two", "python"),
    ]  # fmt: skip
    assert [b.text for b in found[:2]] == ["make tea", "fmbseg label"]
    assert list(commands(found[2].text)) == [
        (0, "fmbseg label --config=FILE \\\n    --strict   # all"),
        (3, 'for i in 1 2; do\n  echo "$i\nx"\ndone'),
    ]


FOREIGN_FLAGS = {"signal": "of SLURM's srun", "logdir": "of TensorBoard"}

PAGES = [*DOCUMENTS, "CHANGELOG.md"]


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = ROOT / page
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file) if file else path
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(target)
    assert not broken


def spans(document: str) -> list[str]:
    return [block.text for block in blocks_of(document) if block.language == "`"]


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_are_there(page):
    """`fmbseg_jax/losses.py`; a name after a colon is defined in it."""
    folders = "fmbseg_jax|labelling|toyworld|configs|tests|benchmarks|docs"
    named = [span for span in spans(page) if re.fullmatch(rf"({folders})/[\w./-]*", span)]
    missing = [name for name in named if "NAME" not in name and not (ROOT / name).exists()]
    assert not missing
    text = (ROOT / page).read_text()
    for file, names in re.findall(rf"`((?:{folders})/[\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", text):
        for name in re.findall(r"\w+", names):
            source = (ROOT / file).read_text()
            assert re.search(rf"(def|class) {name}\b|^{name}\b", source, re.MULTILINE), (file, name)


@pytest.mark.parametrize("page", PAGES)
def test_fields_and_flags_that_are_named_exist(page):
    fields = flatten(Config())
    sections = "|".join({name.split(".")[0] for name in fields})
    sources = [
        *ROOT.glob("fmbseg_jax/*.py"), *ROOT.glob("benchmarks/*.py"), ROOT / "labelling/__main__.py"
    ]  # fmt: skip
    defined = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', "".join(p.read_text() for p in sources))
    for span in spans(page):
        if found := re.match(rf"({sections})\.[a-z_.]+", span):
            name = found[0].rstrip(".")
            is_file = span.endswith((".py", ".json", ".jsonl", ".md"))
            known = any(one == name or one.startswith(f"{name}.") for one in fields)
            assert is_file or known or (span.endswith("*") and name in str([*fields])), span
        for flag in re.findall(r"(?:^| )--([\w.]+)", span):
            if flag.startswith("config."):
                assert flag.removeprefix("config.") in fields, span
            else:
                assert flag in {*defined, "help", *FOREIGN_FLAGS}, span
