"""The borders: imports go down only, and each heavy library stays where it belongs."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS = [
    "errors extras machine texts config_checks config_files fields data.spelling "
    "pretrained.checksums pretrained.config_json pretrained.pickled pretrained.tokenizer "
    "config vocabulary workfolder program hub figures data.files data.threads data.tfrecord "
    "data.example data.images data.opening data.tiffs data.deep data.accept "
    "data.finding data.label_maps data.coco data.published data.benchmarks data.completeness "
    "classes recent colours card outputs data.coco_writer data.links data.appending "
    "data.replacing data.records data.sources listening fonts home visits forks",
    "models.positions models.transformer models.specs models.tables models.encoders "
    "models.weights models.identity models.aligner similarity rings pairs_by_row pairs losses "
    "windows pamr sliding metrics",
    "data.pipeline patches dense text sharding preemption model_facts exported checkpoint logs",
    "training training_data looking comparing segmenter deployed answers loading evaluation "
    "systems report pictures",
    "validation",
    "trainer",
    "page",
    "features segment export app train evaluate __main__",
]
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names.split()}

OWNERS = {
    "grain": {"fmbseg_jax/data/pipeline.py"},
    "orbax": {"fmbseg_jax/checkpoint.py", "fmbseg_jax/exported.py"},
    "flatbuffers": {"fmbseg_jax/deployed.py"},
    "safetensors": {"fmbseg_jax/models/weights.py", "labelling/sam_checkpoint.py"},
    "torch": {"labelling", "toyworld", "fmbseg_jax/models/weights.py"},
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


def module(name):
    """The module of ours that an imported name is in, such as data.images; None if not ours."""
    parts = name.removeprefix("fmbseg_jax.").split(".")
    if not name.startswith("fmbseg_jax."):
        return None
    for length in (2, 1):
        if ".".join(parts[:length]) in LAYER:
            return ".".join(parts[:length])
    return None


def own_layer(file):
    name = file.removeprefix("fmbseg_jax/").removesuffix(".py").replace("/", ".")
    return LAYER.get(name)


@pytest.mark.parametrize("file", FILES)
def test_imports_go_down_only(file):
    limit = own_layer(file)
    if file.startswith(("labelling/", "toyworld/", "configs/")):
        limit = 0
    elif limit is None:
        assert Path(file).name == "__init__.py", f"{file} has no layer; give it one here"
        return
    for name in imports(file):
        found = module(name)
        assert found is None or LAYER[found] <= limit, f"{file} imports {name}, a layer above it"


@pytest.mark.parametrize("file", FILES)
def test_heavy_libraries_stay_where_they_belong(file):
    for name in imports(file):
        library = name.split(".")[0]
        if library in OWNERS:
            allowed = {file, *map(str, Path(file).parents)} & OWNERS[library]
            assert allowed, f"{file} imports {name}"


@pytest.mark.parametrize(
    "file", [f for f, layer in ((f, own_layer(f)) for f in FILES) if layer == 1]
)
def test_pure_modules_see_no_config(file):
    assert not {"config", "workfolder", "program"} & {module(name) for name in imports(file)}


def test_every_module_exists():
    for name in LAYER:
        path = Path(f"{name.replace('.', '/')}.py")
        assert (ROOT / "fmbseg_jax" / path).exists() or (ROOT / path).exists(), name
