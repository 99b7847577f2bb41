"""What leaves the house: exports that are read again, run without us, are pushed and pulled."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import ROOT, run
from models import photograph, save_aligner, save_dinov2
from PIL import Image
from safetensors.numpy import load_file
from stand_in_hub import in_place_of_the_hub

import fmbseg_jax
from fmbseg_jax.encoders import loading
from fmbseg_jax.errors import UserError
from fmbseg_jax.export import write_safetensors
from fmbseg_jax.io import replacing
from fmbseg_jax.nn import aligner
from fmbseg_jax.pretrained import hub
from fmbseg_jax.sharing import exports

WORDS = "sky,sofa;couch,moon"


@pytest.fixture(scope="module")
def export(world, tmp_path_factory):
    return save_aligner(tmp_path_factory.mktemp("export") / "export", world.root)


@pytest.fixture
def copy(export, tmp_path):
    return shutil.copytree(export, tmp_path / "export")


def blocks():
    """The Python code of docs/export.md: StableHLO, PyTorch."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def deployed(export, tmp_path_factory):
    """Copies of an export with its programs, for one window and for a larger image."""
    folder = tmp_path_factory.mktemp("deployed")
    command = ["fmbseg_jax.export", f"--model={export}", f"--words={WORDS}"]
    run(*command, f"--out={folder / 'square'}")
    run(*command, f"--out={folder / 'wide'}", "--size=70,161")
    return folder


@pytest.mark.parametrize(("name", "size"), [("square", (70, 70)), ("wide", (70, 161))])
def test_stablehlo_is_the_segmenter(export, deployed, name, size):
    data = (deployed / name / "similarities.stablehlo").read_bytes()
    program = jax.export.deserialize(bytearray(data))
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}
    facts = json.loads((deployed / name / "similarities.json").read_text())
    assert facts["words"] == WORDS.split(",")
    assert facts["versions"]["jax"] == jax.__version__
    segmenter = fmbseg_jax.load(export)
    for count in (1, 3):
        photographs = np.stack([photograph(*size, seed=i) for i in range(count)])
        found = jax.jit(program.call)(photographs)
        assert found.dtype == np.float32
        for image, ours in zip(photographs, found, strict=True):
            expected = segmenter.similarities(image, WORDS.split(","))
            np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_what_a_newer_jax_wrote_fails_as_the_docs_say(deployed):
    """An operation of a later version stands in the file."""
    data = (deployed / "square" / "similarities.stablehlo").read_bytes()
    program = jax.export.deserialize(bytearray(data))
    contents = program.mlir_module_serialized
    operation = re.search(rb"dot_general_v\d", contents)[0]
    newer = contents.replace(operation, operation[:-1] + b"9")
    program = jax.export.deserialize(
        dataclasses.replace(program, mlir_module_serialized=newer).serialize()
    )
    text = (ROOT / "docs" / "export.md").read_text()
    said = re.search(r"^    JaxRuntimeError: (.*)$", text, re.MULTILINE)[1]
    with pytest.raises(jax.errors.JaxRuntimeError, match=said):
        jax.jit(program.call)(np.zeros((1, 70, 70, 3), np.uint8))


def test_stablehlo_runs_without_us(deployed, tmp_path):
    """The code of the docs, where neither this package nor flax can be imported."""
    code = blocks()[0].replace("work/mine/export", str(deployed / "wide"))
    Image.fromarray(photograph(90, 120)).save(tmp_path / "photo.jpg")
    alone = "import sys\nfor name in ('fmbseg_jax', 'flax', 'torch'): sys.modules[name] = None\n"
    result = subprocess.run(
        [sys.executable, "-c", alone + code + "print(labels.shape)"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert result.stdout == "(70, 161)\n", result.stderr


@pytest.mark.parametrize("kind", aligner.KINDS)
def test_pytorch_reads_the_aligner(world, tmp_path, kind):
    folder = save_aligner(tmp_path / "export", world.root, kind)
    run("fmbseg_jax.export", f"--model={folder}")
    segmenter = fmbseg_jax.load(folder)
    # At the scale of random weights as they are, a wrong activation would hide.
    large = jax.tree.map(lambda leaf: 3 * leaf + 0.1, segmenter.dense.params["aligner"])
    segmenter.dense.use(large)
    (tmp_path / "large").mkdir()
    write_safetensors(tmp_path / "large", segmenter, exports.read_model(folder))
    names: dict = {}
    exec(blocks()[1], names)
    tensors, facts = names["load_aligner"](tmp_path / "large")
    assert facts["kind"] == kind
    assert facts | {"sha256": ""} == names["load_aligner"](folder)[1] | {"sha256": ""}
    assert len(blocks()[1].splitlines()) <= 44
    patches = np.random.default_rng(0).normal(size=(2, 25, 48)).astype(np.float32)
    with torch.no_grad():
        theirs = names["align"](torch.from_numpy(patches), tensors, facts).numpy()
    module = aligner.create(**exports.read_model(folder)["aligner"])
    ours = module.apply({"params": large}, jnp.asarray(patches))
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_flipped_byte_is_refused_by_the_code_of_the_docs(deployed, tmp_path, place):
    """Of either file, at its start, middle or end; and a file beside the JSON of another."""
    folder = shutil.copytree(deployed / "square", tmp_path / "export")
    Image.fromarray(photograph(90, 120)).save(tmp_path / "photo.jpg")
    names: dict = {}
    exec(blocks()[1], names)
    stablehlo = blocks()[0].replace("work/mine/export", str(folder))
    stablehlo = stablehlo.replace("photo.jpg", str(tmp_path / "photo.jpg"))

    def refused(name):
        with pytest.raises(ValueError, match=f"{name} is not the file that was exported"):
            if name == "aligner.safetensors":
                names["load_aligner"](folder)
            else:
                exec(stablehlo, {})

    for name in ("aligner.safetensors", "similarities.stablehlo"):
        whole = (folder / name).read_bytes()
        data = bytearray(whole)
        data[int(place * (len(data) - 1))] ^= 1
        (folder / name).write_bytes(data)
        refused(name)
        (folder / name).write_bytes(whole)
    shutil.copy(deployed / "wide" / "similarities.stablehlo", folder)
    refused("similarities.stablehlo")


def test_sums_in_the_json_are_those_of_the_files(deployed):
    for name in ("aligner.safetensors", "similarities.stablehlo"):
        facts = json.loads((deployed / "wide" / f"{name.split('.')[0]}.json").read_text())
        command = ["sha256sum", deployed / "wide" / name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert facts["sha256"] == output.split()[0]


def test_the_exported_aligner_is_the_loaded_one(export, deployed):
    tensors = load_file(deployed / "square" / "aligner.safetensors")
    params = fmbseg_jax.load(export).dense.params["aligner"]
    np.testing.assert_array_equal(tensors["hidden.weight"], params["hidden"]["kernel"].T)
    np.testing.assert_array_equal(tensors["projection.bias"], params["projection"]["bias"])
    again = fmbseg_jax.load(deployed / "square")
    image = photograph(80, 90)
    np.testing.assert_array_equal(
        again.similarities(image, ["sky"]), fmbseg_jax.load(export).similarities(image, ["sky"])
    )


def test_export_errors(export, tmp_path):
    def error(*arguments):
        result = run("fmbseg_jax.export", *arguments, check=False)
        assert result.returncode == 1
        assert "Traceback" not in result.stdout
        return result.stdout

    assert "--model is missing" in error()
    model, out = f"--model={export}", f"--out={tmp_path / 'out'}"
    assert "smaller than the model's window of 70" in error(model, out, "--size=70,69")
    assert "--size is H,W in pixels" in error(model, out, "--size=70")
    assert "16,000,000 are possible" in error(model, out, "--size=99999999999,99999999999")
    (tmp_path / "full").mkdir()
    assert "full is there already" in error(model, f"--out={tmp_path / 'full'}")
    assert "export.py is there already" in error(model, f"--out={ROOT / 'fmbseg_jax/export.py'}")
    assert "lies in the export" in error(model, f"--out={export / 'params' / 'copy'}")
    assert "is no exported aligner" in error(f"--model={export}x")
    assert "needs a --out on this machine" in error(model, "--out=gs://bucket/out")
    assert "A repository on the hub is USER/NAME" in error(model, out, "--push=name")
    assert "could not be pushed to user/name" in error(model, out, "--push=user/name")


def test_export_again(export, tmp_path):
    """A copy of the same export is made anew; nothing else that is at --out."""
    out = tmp_path / "out"
    command = ["fmbseg_jax.export", f"--model={export}", f"--out={out}"]
    run(*command, "--words=sky")
    (out / "similarities.stablehlo").write_bytes(b"cut short")
    run(*command, "--words=moon,sea")
    assert json.loads((out / "similarities.json").read_text())["words"] == ["moon", "sea"]
    (out / "notes.txt").write_text("somebody's")
    result = run(*command, check=False)
    assert result.returncode == 1 and "out is there already" in result.stdout
    (out / "notes.txt").unlink()
    (out / "README.md").write_text("somebody's")
    assert run(*command, check=False).returncode == 1
    assert (out / "README.md").read_text() == "somebody's"


def test_a_full_disk_leaves_the_export_as_it_was(copy):
    """The program is written beside it first; what did not fit is gone when the command ends."""
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    command = [sys.executable, "-m", "fmbseg_jax.export", f"--model={copy}", "--words=sky"]
    limited = 'ulimit -f 40; exec "$@"'  # in kB: the program does not fit, the aligner does
    result = subprocess.run(
        ["bash", "-c", limited, "-", *command],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1 and "stablehlo" in result.stderr, result.stderr
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    assert [path.name for path in copy.parent.iterdir()] == ["export"]


def test_a_link_in_an_export_is_not_pushed(copy, tmp_path):
    (tmp_path / "private").write_text("secret")
    (copy / "more.json").symlink_to(tmp_path / "private")
    result = run("fmbseg_jax.export", f"--model={copy}", f"--out={tmp_path / 'out'}", check=False)
    assert "more.json leads out of" in result.stdout and not (tmp_path / "out").exists()


def test_an_export_that_is_replaced_while_it_is_read(world, tmp_path, monkeypatch):
    """What is loaded is one export, not the protocol of one with the parameters of another."""
    first = save_aligner(tmp_path / "first", world.root, stride=35)
    second = save_aligner(tmp_path / "second", world.root, stride=14)
    load_export, swapped = exports.load_export, []

    def swap(folder, template):
        if not swapped:
            swapped.append(True)
            with replacing.replaced(first) as new:
                replacing.copy(second, new)
        return load_export(folder, template)

    monkeypatch.setattr(exports, "load_export", swap)
    assert fmbseg_jax.load(first).protocol["stride"] == 14


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt", "d/more"])
def test_what_has_no_end_is_not_read(copy, name, tmp_path):
    """Neither a pipe, a device, a link out of the export, nor a description of gigabytes."""
    model = json.loads((copy / "model.json").read_text())
    (copy / "model.json").write_text(json.dumps(model | {"params": {"files": {}, "hash": "x"}}))
    path = copy / "params" / name
    path.unlink(missing_ok=True)

    def sparse(path):
        with open(path, "wb") as file:
            file.truncate(3 << 30)

    made = [os.mkfifo, lambda path: path.symlink_to("/dev/zero")]
    made.append(lambda path: path.symlink_to(tmp_path))
    for make in made if "/" in name else [*made, sparse]:
        make(path)
        with pytest.raises(UserError, match="or is not a file|at most"):
            fmbseg_jax.load(copy)
        path.unlink()


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A hub to push to and to pull from; uploads are copies."""
    import huggingface_hub

    with in_place_of_the_hub(tmp_path, monkeypatch) as served:
        made = []

        def create_repo(api, name, *, private, exist_ok):
            made.append((name, private, exist_ok))
            served.repository(name)

        def upload_folder(api, *, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, served.root / repo_id, dirs_exist_ok=True)

        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
        yield served
        assert made == [("user/water", True, True)]


def test_what_is_pushed_is_pulled(export, stand_in, monkeypatch):
    assert hub.push(export, "user/water", private=True) == "https://huggingface.co/user/water"
    (stand_in.root / "user/water/sky.stablehlo").write_bytes(b"gigabytes")
    pulled, image = fmbseg_jax.load("user/water"), photograph(80, 90)
    expected = fmbseg_jax.load(export).similarities(image, ["sky", "moon"])
    np.testing.assert_array_equal(pulled.similarities(image, ["sky", "moon"]), expected)
    assert not any("stablehlo" in request for request in stand_in.requests)
    stand_in.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fmbseg_jax.load("user/water")
    assert not stand_in.requests
    with pytest.raises(UserError, match="(?s)user/none is neither a folder.*hf download user/none"):
        fmbseg_jax.load("user/none")


def test_a_download_that_was_cut_short_is_fetched_again(export, stand_in):
    hub.push(export, "user/water", private=True)
    folder = exports.locate("user/water")
    largest = max((folder / "params").rglob("*"), key=lambda path: path.stat().st_size)
    largest.unlink()
    fmbseg_jax.load("user/water")
    assert largest.is_file()
    cut = shutil.copytree(export, stand_in.root / "cut")
    (cut / largest.relative_to(folder)).write_bytes(b"short")
    with pytest.raises(UserError, match=r"lacks 1 of \d+ files of its parameters"):
        fmbseg_jax.load(cut)


def test_flipped_bytes_are_noticed(copy):
    """Of each file of the parameters some bytes are flipped: never other numbers in silence."""
    expected = exports.read_model(copy)["params"]["hash"]
    files = [path for path in (copy / "params").rglob("*") if path.is_file()]
    noticed = 0
    for path in files:
        before = path.read_bytes()
        for place in (len(before) // 2, len(before) - 1):
            damaged = bytearray(before)
            damaged[place] ^= 0xFF
            path.write_bytes(damaged)
            try:
                params = fmbseg_jax.load(copy).dense.params["aligner"]
                assert exports.digest(params) == expected
            except UserError as error:
                assert "damaged" in str(error) or "another architecture" in str(error)
                noticed += 1
        path.write_bytes(before)
    assert noticed
    fmbseg_jax.load(copy)


def test_the_card_and_the_facts(world, tmp_path):
    """As train.py writes them."""
    from fmbseg_jax.sharing.card import model_card

    folder = save_aligner(tmp_path / "export", world.root)
    model = exports.read_model(folder)
    model["vision"]["source"] = "facebook/dinov2-base"
    model["versions"] = {"fmbseg_jax": "0.1.0", "jax": "0.10.2"}
    card = model_card(model)
    header = card.split("---\n")[1]
    assert "pipeline_tag: image-segmentation" in header
    assert "base_model:\n- facebook/dinov2-base\n" in header
    assert model["vision"]["hash"] in card
    assert "sky, grass" in card
    assert "| trained with | fmbseg_jax 0.1.0, jax 0.10.2 |" in card
    assert "no person has checked them" in card
    for field, said in [("annotations", "that people gave"), ("image_labels", "People said")]:
        config = model["config"] | {f"data.{field}": "there"}
        assert said in model_card(model | {"config": config})


HOSTILE = {
    "no JSON": "{",
    "deep": "[" * 100_000,
    "a list": "[]",
    "code": "{\"aligner\": \"__import__('os').system('touch hacked')\"}",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_model_json_is_refused(copy, text):
    (copy / "model.json").write_text(text)
    with pytest.raises(UserError, match="is not the model.json of an export"):
        fmbseg_jax.load(copy)


SIZES = {"kind": "mlp", "output": 24, "mlp_ratio": 2, "heads": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aligner": SIZES | {"kind": "os.system"}}, "is not a kind"),
        ({"aligner": SIZES | {"output": 60_000}}, "another architecture"),
        ({"aligner": SIZES | {"output": "24"}}, "aligner.output is no positive number"),
        ({"aligner": SIZES | {"name": "x"}}, "with its sizes"),
        ({"vision": {"source": ["/etc"], "hash": "x"}}, "vision.source is no string"),
        ({"vision": {"source": "../../etc", "hash": "x"}}, "No (model at|weights in)"),
        ({"words": [1, 2]}, "'words' are not strings"),
        ({"params": {"hash": "x", "files": {"../../../etc/passwd": 1}}}, "lacks 1 of 1 files"),
        ({"params": []}, "'params' is not"),
        ({"config": {"eval.window": "70"}}, "eval.window is of type int, like 448; got '70'"),
        ({"config": {"eval.template": "/etc/passwd"}}, "names a file of templates"),
        ({"config": {"eval.short_side": -1}}, "eval.short_side is a positive number"),
        ({"config": {"eval.__class__": "x", "models.clip": "x"}}, None),
    ],
)
def test_hostile_facts_do_nothing(copy, changes, message):
    model = json.loads((copy / "model.json").read_text())
    if "config" in changes:
        changes = {"config": model["config"] | changes["config"]}
    (copy / "model.json").write_text(json.dumps(model | changes))
    before = {path: path.stat().st_mtime_ns for path in copy.parent.rglob("*")}
    if message is None:
        fmbseg_jax.load(copy)
    else:
        with pytest.raises(UserError, match=message):
            fmbseg_jax.load(copy)
    assert before == {path: path.stat().st_mtime_ns for path in copy.parent.rglob("*")}


class Pickled:
    def __reduce__(self):
        return (open, ("hacked", "w"))


def test_no_pickle_is_run(world, tmp_path, monkeypatch):
    """An encoder's pytorch_model.bin that would run code is refused; safetensors come first."""
    import pickle

    monkeypatch.chdir(tmp_path)
    save_dinov2(tmp_path / "dinov2", width=48, image=70, patch=14)
    (tmp_path / "dinov2" / "pytorch_model.bin").write_bytes(pickle.dumps(Pickled(), 2))
    loading.load_vision(str(tmp_path / "dinov2"))
    (tmp_path / "dinov2" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="is refused or damaged"):
        loading.load_vision(str(tmp_path / "dinov2"))
    assert not (tmp_path / "hacked").exists()
