"""What README and docs name is there: links, files, functions, flags and fields of the config."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT
from documents import DOCUMENTS, blocks_of

from fmbseg_jax.config import Config, flatten

FOREIGN_FLAGS = {
    "include": "of hf", "signal": "of SLURM's srun", "logdir": "of TensorBoard",
    "require-hashes": "of pip",
}  # fmt: skip

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
        *ROOT.glob("fmbseg_jax/**/*.py"), *ROOT.glob("benchmarks/*.py"),
        ROOT / "labelling/__main__.py",
    ]  # fmt: skip
    defined = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', "".join(p.read_text() for p in sources))
    for span in spans(page):
        if found := re.match(rf"({sections})\.[a-z_.]+", span):
            name = found[0].rstrip(".")
            is_file = span.endswith((".py", ".json", ".jsonl", ".md"))
            known = any(one == name or one.startswith(f"{name}.") for one in fields)
            assert is_file or known or (span.endswith("*") and name in str([*fields])), span
        for flag in re.findall(r"(?:^| )--([\w.-]+)", span):
            if flag.startswith("config."):
                assert flag.removeprefix("config.") in fields, span
            else:
                assert flag in {*defined, "help", *FOREIGN_FLAGS}, span
