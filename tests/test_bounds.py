"""What a file may ask for: memory and time have bounds, whoever wrote the file."""

import json
import math
import shutil
import zipfile

import numpy as np
import pytest
import tensorstore
import torch
from models import save_aligner
from safetensors.torch import load_file

import fmbseg_jax
from fmbseg_jax.config import Config, checks, flatten, unflatten
from fmbseg_jax.encoders import identity, loading
from fmbseg_jax.errors import UserError
from fmbseg_jax.sharing import exports
from fmbseg_jax.vocabulary import read_templates

USUAL = flatten(Config())
FLOATS = [name for name, value in USUAL.items() if type(value) is float]
INTEGERS = [name for name, value in USUAL.items() if type(value) is int]


@pytest.fixture(scope="module")
def export(world, tmp_path_factory):
    return save_aligner(tmp_path_factory.mktemp("export") / "export", world.root)


@pytest.fixture
def changed(export, tmp_path):
    """Loads a copy of an export, with changes in its model.json."""
    copy = shutil.copytree(export, tmp_path / "export")

    def load(protocol=None, config=(), **changes):
        model = json.loads((export / "model.json").read_text()) | changes
        model["config"] |= dict(config)
        (copy / "model.json").write_text(json.dumps(model))
        return fmbseg_jax.load(copy, protocol)

    return load


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", FLOATS)
def test_no_number_of_a_config_is_nan_or_infinite(name, value):
    with pytest.raises(UserError, match=f"{name} is a finite number; got"):
        unflatten({name: value}).validate()


@pytest.mark.parametrize(
    "value, message", [(1e300, "at most 3.4e.38"), (1e-60, "too small for float32")]
)
def test_no_number_of_a_config_is_beyond_float32(value, message):
    """Where 1e300 is infinite, and 1e-60 is 0."""
    with np.errstate(over="ignore"):
        assert np.float32(value) in (0, np.inf)
    with pytest.raises(UserError, match=message):
        unflatten({"train.temperature": value}).validate()


@pytest.mark.parametrize("name", INTEGERS)
def test_every_whole_number_of_a_config_has_a_bound(name):
    most = checks.AT_MOST[name]
    with pytest.raises(UserError, match=f"{name} is at most {most}; got {most + 1}"):
        unflatten({name: most + 1}).validate()
    assert not [
        fault for fault in checks.faults(USUAL | {name: most}) if f"at most {most};" in fault
    ]


def test_seeds_that_differ_differ():
    """JAX's keys have 64 bits, of which a seed beyond fills the lower half only."""
    with pytest.raises(UserError, match="seed is at most 4294967295"):
        unflatten({"seed": 2**32}).validate()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"eval.short_side": 8192, "eval.stride": 64}, r"14,884 windows of 448 x 448 pixels"),
        (
            {"label.short_side": 8192, "label.stride": 16},
            r"label.stride = 16 gives \d+,\d+ windows",
        ),
        ({"eval.batch_size": 60_000}, "eval.batch_size = 60000 images .* are 12,042 megapixels"),
        ({"features.size": 2044, "features.batch_size": 1000}, "are 4,178 megapixels at once"),
    ],
)
def test_what_is_held_at_once_has_a_bound(fields, message):
    with pytest.raises(UserError, match=message):
        unflatten(fields).validate()


@pytest.mark.parametrize(
    "fields",
    [
        {"eval.short_side": 2048, "eval.stride": 112},
        {"eval.short_side": 8192},
        {"eval.batch_size": 4096},
        {"features.size": 896, "features.batch_size": 512},
        {"eval.stride": 14},
    ],
)
def test_what_machines_can_hold_is_fine(fields):
    unflatten(fields).validate()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"eval.threshold": math.nan}, "eval.threshold is a finite number; got nan"),
        ({"eval.batch_size": 10**9}, "eval.batch_size is at most"),
        ({"eval.batch_size": 10**400}, "eval.batch_size is at most"),
        ({"eval.pamr": 10**9}, "eval.pamr is at most 1000"),
        ({"eval.short_side": 10**6}, "eval.short_side is at most 8192"),
        ({"eval.window": 7000, "eval.short_side": 8192}, "eval.window is at most 2048"),
        ({"eval.template": "\n".join(f"a {{}} {i}." for i in range(30_000))}, "30,000 templates"),
    ],
)
def test_the_config_of_an_export_has_bounds(changed, fields, message):
    with pytest.raises(UserError, match=message):
        changed(config=fields)


@pytest.mark.parametrize(
    "protocol", [{"threshold": math.nan}, {"threshold": -math.inf}, {"batch_size": 10**9}]
)
def test_what_is_passed_to_load_has_bounds(changed, protocol):
    with pytest.raises(UserError, match=r"with your changes, cannot be used:\s+eval\.\w+ is"):
        changed(protocol)


def sizes(**changes):
    return {"kind": "mlp", "output": 24, "mlp_ratio": 2, "heads": 4} | changes


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"aligner": sizes(output=10**12)}, "aligner.output is 1000000000000; it is at most 65536"),
        ({"aligner": sizes(mlp_ratio=10**6)}, "aligner.mlp_ratio is 1000000; it is at most 64"),
        ({"aligner": sizes(heads=10**9)}, "aligner.heads is 1000000000; it is at most 1024"),
        ({"words": ["a long word " * 2] * 10**6}, "it has [0-9,]+ bytes, and 16,000,000"),
        ({"words": ["a"] * 70_000}, "'words' are 70000; label maps have room for 65535"),
    ],
)
def test_the_facts_of_an_export_have_bounds(changed, facts, message):
    with pytest.raises(UserError, match=f"is not the model.json of an export: {message}"):
        changed(**facts)


@pytest.mark.parametrize(
    "output, chunk, files",
    [(60_000, 60_000, False), (24, 10**7, True)],
    ids=["arrays without files", "chunks"],
)
def test_parameters_take_no_more_memory_than_their_files_account_for(
    world, tmp_path, output, chunk, files
):
    """Arrays of zeros need no bytes on disk, and a chunk of any size is unpacked whole."""
    export = save_aligner(tmp_path / "export", world.root)
    model = json.loads((export / "model.json").read_text())
    del model["params"]  # as a hostile one would
    model["aligner"] |= {"output": output, "mlp_ratio": 64}
    (export / "model.json").write_text(json.dumps(model))
    base = {"driver": "ocdbt", "base": f"file://{export}/params/"}
    store, hidden = tensorstore.KvStore.open(base).result(), 48 * 64
    shapes = {"hidden.kernel": [48, hidden], "hidden.bias": [hidden]}
    shapes |= {"projection.kernel": [hidden, output], "projection.bias": [output]}
    for name, shape in shapes.items():
        key = f"{name}/.zarray"
        array = json.loads(store.read(key).result().value) | {"shape": shape, "chunks": shape}
        if name == "projection.kernel":
            array["chunks"] = [chunk, chunk] if files else shape
        store.write(key, json.dumps(array).encode()).result()
        for part in () if files else ("0", "0.0"):
            store.write(f"{name}/{part}", None).result()
    with pytest.raises(
        UserError, match=r"would take [\d,]{9,} bytes of memory, and their files ha"
    ):
        fmbseg_jax.load(export)


def test_an_aligner_of_zeros_is_an_aligner(tmp_path):
    """Which packs to a thousandth."""
    params = {"projection": {"kernel": np.zeros((1024, 768), np.float32)}}
    encoder = {"source": "", "hash": ""}
    model = {"vision": encoder, "clip": encoder, "words": [], "images": 0, "config": {}}
    model["aligner"] = sizes(kind="linear")
    exports.save_export(tmp_path / "export", exports.Export(params, model), "")
    again = exports.load_export(tmp_path / "export", params)
    np.testing.assert_array_equal(again["projection"]["kernel"], 0)


VISION = {
    "hidden_size": 10**7, "image_size": 10**9, "patch_size": 10**9, "mlp_ratio": 10**9,
    "num_hidden_layers": 20_000, "num_register_tokens": 10**9, "patch_size ": 0,
}  # fmt: skip
TEXT = {"vocab_size": 10**10, "max_position_embeddings": 10**10, "num_hidden_layers": 20_000}


@pytest.mark.parametrize(
    "model, name, value",
    [("dinov2", *item) for item in VISION.items()] + [("clip", *item) for item in TEXT.items()],
)
def test_the_sizes_of_a_model_have_bounds(world, tmp_path, model, name, value):
    """XLA ends the program where a size does not fit its integers."""
    folder = shutil.copytree(world.root / model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (config["text_config"] if model == "clip" else config)[name.strip()] = value
    (folder / "config.json").write_text(json.dumps(config))
    load = loading.load_text if model == "clip" else loading.load_vision
    with pytest.raises(UserError, match="describes no model"):
        load(str(folder))


@pytest.mark.parametrize("way", ["repeated", "packed"])
def test_a_pytorch_file_holds_no_more_than_its_bytes(world, tmp_path, way):
    """One number said a trillion times, or zeros that were packed."""
    folder = shutil.copytree(world.root / "dinov2", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    if way == "repeated":
        tensors["layernorm.weight"] = torch.ones(1).expand(10**6, 10**6)
    torch.save(tensors, path)
    if way == "packed":
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
    with pytest.raises(UserError, match="pytorch_model.bin is damaged .*(numbers|packed)"):
        identity.content_hash(str(folder))


def test_templates_have_a_bound():
    assert len(read_templates("\n".join(["a {}."] * 1000))) == 1000
    with pytest.raises(UserError, match="These are 1,001 templates"):
        read_templates("\n".join(["a {}."] * 1001))
