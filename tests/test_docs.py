"""Every command and Python block of README and docs runs, as it is written, in a small sandbox.

What cannot run here is in a table, with the reason and what is checked in its place.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
from conftest import ROOT
from documents import DOCUMENTS, NO_CODE, Code, blocks, blocks_of, code_in, code_of, commands
from PIL import Image
from sandbox import Sandbox

from fmbseg_jax.outputs.folder import Outputs

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
    r"make lock": Instead("wants a connection", make_knows_it),
    r"make attack": Instead("takes a quarter of an hour", make_knows_it),
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
            return self.do(Code("tests/test_docs.py", 0, "", "shell", what))
        if not section:
            for before in BEFORE.get(document, []):
                self.read(before)
            if place := PLACES.get(document):
                self.read(place)
        faults = []
        for code in code_of(document):
            if section in ("", code.section):
                faults += self.do(code)
        return faults

    def do(self, code: Code) -> list[str]:
        """Faults of a command or a block."""
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


def test_label_studio_gets_the_masks_of_each_image(tmp_path, monkeypatch):
    """Also of a.jpg beside a.png, by the script of docs/segmenting.md as it stands there."""
    (script,) = [c for c in code_of("docs/segmenting.md") if "label_studio_sdk" in c.text]
    maps = {"a.jpg": np.eye(4, dtype=np.uint16), "a.png": np.ones((4, 4), np.uint16)}
    (tmp_path / "photos").mkdir()
    names = {"a.jpg": "a.jpg.png", "a.png": "a.png.png"}
    outputs = Outputs(
        tmp_path / "segmented", tmp_path / "photos", ["sky", "sea;lake"], names, False
    )
    for name, labels in maps.items():
        Image.new("RGB", (4, 4)).save(tmp_path / "photos" / name)
        outputs.write(name, 0, np.zeros((4, 4, 3), np.uint8), labels, None)
    outputs.finish([*maps], {}, "")
    brush = types.ModuleType("brush")
    brush.mask2rle = lambda mask: mask.tolist() if mask.dtype == np.uint8 else None
    converter = types.ModuleType("converter")
    converter.brush = brush
    monkeypatch.setitem(sys.modules, "label_studio_sdk", types.ModuleType("label_studio_sdk"))
    monkeypatch.setitem(sys.modules, "label_studio_sdk.converter", converter)
    monkeypatch.chdir(tmp_path)
    exec(compile(script.text, "docs/segmenting.md", "exec"), {})
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    for task, (name, labels) in zip(tasks, maps.items(), strict=True):
        assert task["data"]["image"].endswith(f"/{name}")
        found = {
            one["value"]["brushlabels"][0]: one["value"]["rle"]
            for one in task["predictions"][0]["result"]
        }
        expected = {
            word: (255 * (labels == i)).tolist()
            for i, word in enumerate(["sky", "sea"])
            if i in labels
        }
        assert found == expected


def test_the_threshold_of_the_docs_leaves_words_and_background(reader):
    assert not reader.read("docs/segmenting.md")
    labels = [np.asarray(Image.open(p)) for p in reader.sandbox.folder.glob("fishes/labels/*.png")]
    found = np.unique(np.concatenate([one.reshape(-1) for one in labels]))
    assert 255 in found and len(found) > 1


@pytest.mark.parametrize(
    "command",
    [
        "fmbseg config epohcs",
        "fmbseg label --config=configs/nowhere.py --workdir=work/wrong",
        "python benchmarks/loss.py --runds=9",
        "python train.py --config=FILE --workdir=SHARED --coordinator=host0:1234 --proces=0",
        'gcloud --command="python3 train.py --config=configs/coco_stuff.py --wrkdir=x"',
        'pip install ".[aap]"',
        "pip install -r requirements-all.txt",
        "hf auth lgin",
        "python -m pytest tests/test_nothing.py",
    ],
)
def test_a_command_that_is_wrong_is_found(command, reader):
    assert reader.do(Code("x.md", 1, "", "shell", command))


def test_a_block_that_is_wrong_is_found(reader):
    assert reader.do(Code("x.md", 1, "", "python", "import fmbseg_jax\nfmbseg_jax.lod"))


def test_a_block_that_nobody_knows_is_found():
    (block,) = blocks("Do:\n\n    docker run this")
    with pytest.raises(AssertionError, match="x.md:3: neither Python nor a command"):
        list(code_in(block, "x.md"))


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
