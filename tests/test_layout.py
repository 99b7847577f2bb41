"""The borders: imports between packages go down only, and heavy libraries stay in theirs."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PACKAGES = {
    "io": "Bytes on disk: whole files or none, checked text and JSON, errors of the machine.",
    "config": "What an experiment is: its fields, what they may be, where config files are found.",
    "vocabulary": "Words, the sentences made of them, and classes: words that stand for one thing.",
    "nn": "Layers that all networks share, and the aligner.",
    "runs": "What every run of a program shares: flags and messages, work folder, progress.",
    "data": "Images, label maps and records, in memory and on disk.",
    "pretrained": "Published model files: found, fetched, read, and converted completely.",
    "parallel": "Devices and hosts: mesh, agreement of processes, ring, being told to stop.",
    "datasets": "Annotated sets: any folder, and the nine published ones.",
    "outputs": "What people look at: colours, overlays, sheets, COCO files, folders of results.",
    "encoders": "The frozen towers: DINOv2, DINOv3 and CLIP.",
    "losses": "Equations 1 to 4 of the paper, and the log-sum-exp over pairs under them.",
    "methods": "From windows of an image to unit vectors in the space of text.",
    "segmentation": "Windows of images → features → similarities → label maps, for any words.",
    "sharing": "An aligner as others get it: folder, model.json, card, StableHLO, loading.",
    "evaluation": "Label maps against ground truth: protocol, counting, systems, tables, pictures.",
    "web": "The page, what it shows, and where it listens.",
    "training": "The aligner's step, loop, batches, checkpoints, validation and log.",
}
"""The packages of fmbseg_jax and the sentence of each; one imports those above it alone."""
RANK = {"errors": -1, **{name: rank for rank, name in enumerate(PACKAGES)}}
PROGRAMS = {"__main__", "app", "evaluate", "export", "features", "segment", "train"}
PURE = {"nn", "losses"}
"""What sees neither config nor programs."""
LABELLING = {*list(PACKAGES)[: RANK["encoders"]], "errors", "evaluation.protocol"} - {
    "nn",
    "parallel",
}
"""What stage 1 and the toy world see; none of it needs JAX."""

OWNERS = {
    "grain": {"fmbseg_jax/io/threads.py", "fmbseg_jax/training/batches.py"},
    "orbax": {"fmbseg_jax/training/checkpoint.py", "fmbseg_jax/sharing/exports.py"},
    "flatbuffers": {"fmbseg_jax/sharing/stablehlo.py"},
    "safetensors": {"fmbseg_jax/pretrained/weights.py", "labelling/sam/checkpoint.py"},
    "torch": {"labelling", "toyworld", "fmbseg_jax/pretrained/weights.py"},
    "segment_anything": {"labelling"},
    "tensorflow": set(),
}

FILES = [
    path.relative_to(ROOT).as_posix()
    for folder in ("fmbseg_jax", "labelling", "toyworld", "configs")
    for path in sorted((ROOT / folder).rglob("*.py"))
] + ["train.py", "evaluate.py"]


def imports(file):
    """Full names of what a file imports, those inside functions included."""
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def ours(file):
    """Packages and modules of fmbseg_jax that a file imports from, such as io and io.files."""
    for name in imports(file):
        _, *parts = name.split(".")
        if name.startswith("fmbseg_jax.") and parts[0] in RANK.keys() | PROGRAMS:
            yield parts[0], ".".join(parts[:2])


def package(file):
    """The package that a file of fmbseg_jax is in; "" for those on top."""
    parts = Path(file).parts
    return parts[1] if len(parts) > 2 and parts[0] == "fmbseg_jax" else ""


@pytest.mark.parametrize("file", FILES)
def test_imports_go_down_only(file):
    top = Path(file).stem if not package(file) and file.startswith("fmbseg_jax/") else ""
    for name, module in ours(file):
        if file.startswith(("labelling/", "toyworld/", "configs/")):
            assert {name, module} & LABELLING, f"{file} imports {module}"
        elif package(file) and name != package(file):
            assert name in RANK, f"{file} imports a program, {name}"
            assert RANK[name] < RANK[package(file)], f"{file} imports {module}, which is above it"
        elif top:
            assert name in RANK or top in PROGRAMS, f"{file} imports {module}"


@pytest.mark.parametrize("file", FILES)
def test_heavy_libraries_stay_where_they_belong(file):
    for name in imports(file):
        library = name.split(".")[0]
        if library in OWNERS:
            allowed = {file, *map(str, Path(file).parents)} & OWNERS[library]
            assert allowed, f"{file} imports {name}"


@pytest.mark.parametrize("file", [file for file in FILES if package(file) in PURE])
def test_pure_modules_see_no_config(file):
    assert not {"config", "runs"} & {name for name, _ in ours(file)}


def test_each_package_has_its_sentence():
    folders = {path.parent.name: path for path in (ROOT / "fmbseg_jax").glob("*/__init__.py")}
    sentences = {name: ast.get_docstring(ast.parse(folders[name].read_text())) for name in folders}
    assert sentences == PACKAGES


def test_the_programs_alone_lie_on_top():
    top = {path.stem for path in (ROOT / "fmbseg_jax").glob("*.py")}
    assert top == PROGRAMS | {"__init__", "errors"}
