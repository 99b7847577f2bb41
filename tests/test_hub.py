"""Models of the hub: fetched once and found again, whoever has put a part into the cache."""

import builtins
import collections
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import run
from huggingface_hub import hf_hub_download
from models import photograph, save_aligner, save_clip, save_dinov2
from PIL import Image
from safetensors.torch import load_file, save_file
from stand_in_hub import COMMIT, in_place_of_the_hub, serve

import fmbseg_jax
from fmbseg_jax.encoders import identity, loading
from fmbseg_jax.errors import UserError
from fmbseg_jax.pretrained import hub, pickled
from fmbseg_jax.sharing import exports
from fmbseg_jax.sharing.card import model_card
from labelling.clip import Clip
from labelling.sam import checkpoint

SOURCES = "some/clip", "some/dino"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_clip(folder / "clip")
    save_dinov2(folder / "dino")
    return folder


@pytest.fixture
def stand_in(saved, tmp_path, monkeypatch):
    """A hub with the repositories some/clip and some/dino, and an empty cache."""
    with in_place_of_the_hub(tmp_path, monkeypatch) as served:
        for source in SOURCES:
            shutil.copytree(
                saved / source.split("/")[1], served.repository(source), dirs_exist_ok=True
            )
        yield served


def load_all():
    loading.load_vision("some/dino")
    loading.load_clip_vision("some/clip")
    loading.load_text("some/clip")
    return [identity.content_hash(source) for source in SOURCES]


def test_what_was_fetched_is_found_without_a_request(stand_in, saved, monkeypatch):
    hashes = load_all()
    assert hashes == [identity.content_hash(str(saved / name)) for name in ("clip", "dino")]
    fetched = {path.split("/")[-1] for path in stand_in.requests if path.startswith("GET /some")}
    assert "model.safetensors" in fetched
    assert not {"README.md", ".gitattributes"} & fetched
    stand_in.requests.clear()
    assert load_all() == hashes
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_all() == hashes
    assert not stand_in.requests


@pytest.mark.parametrize(
    "source, there",
    [
        ("some/clip", ["config.json", "model.safetensors", "preprocessor_config.json"]),
        ("some/clip", ["config.json", "vocab.json", "merges.txt", "tokenizer_config.json"]),
        ("some/dino", ["config.json", "model.safetensors"]),
        ("some/dino", ["config.json", "preprocessor_config.json"]),
    ],
)
def test_a_cache_that_another_program_has_filled_in_part(stand_in, saved, source, there):
    for name in there:
        hf_hub_download(source, name)
    assert identity.content_hash(source) == identity.content_hash(str(saved / source[5:]))
    load_all()
    stand_in.requests.clear()
    load_all()
    assert not stand_in.requests


def test_offline_what_a_cache_lacks_is_told(stand_in, monkeypatch):
    for name in ("config.json", "model.safetensors"):
        hf_hub_download("some/dino", name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"(?s)hf download.*has a part.*lacks.*preprocessor_config"):
        loading.load_vision("some/dino")
    with pytest.raises(UserError, match="nor to be had"):
        loading.load_vision(f"some/{'a' * 120}")


def test_a_model_whose_normalisation_is_published_nowhere(stand_in):
    (stand_in.root / "some/dino/preprocessor_config.json").unlink()
    module, _ = loading.load_vision("some/dino")
    assert module.spec.mean == (0.485, 0.456, 0.406)
    stand_in.requests.clear()
    loading.load_vision("some/dino")
    assert not stand_in.requests


def test_one_copy_of_the_weights_is_fetched(stand_in, saved):
    """Of three layouts in one repository, transformers' safetensors alone."""
    repository = stand_in.root / "some/clip"
    for name in ("open_clip_model.safetensors", "pytorch_model.bin", "model.fp16.safetensors"):
        (repository / name).write_bytes(b"a copy")
    (repository / "open_clip_config.json").write_text("{}")
    folder = hub.locate("some/clip")
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in (saved / "clip").iterdir()}


def test_weights_in_parts(stand_in, saved):
    tensors = load_file(saved / "dino" / "model.safetensors")
    repository, names = stand_in.root / "some/dino", sorted(tensors)
    (repository / "model.safetensors").unlink()
    parts = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for part, some in parts.items():
        torch.save({name: tensors[name] for name in some}, repository / part)
    index = {"weight_map": {name: part for part, some in parts.items() for name in some}}
    (repository / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert identity.content_hash("some/dino") == identity.content_hash(str(saved / "dino"))


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model(stand_in, status):
    stand_in.gated["some/dino"] = status
    with pytest.raises(UserError, match=r"(?s)accepted its licence.*Accept it on https://hugging"):
        loading.load_vision("some/dino")


def test_a_model_that_nobody_has(stand_in):
    with pytest.raises(
        UserError, match="Check its spelling; if it is private, run `hf auth login`"
    ):
        loading.load_vision("some/nothing")


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "siglip"}, "is SigLIP; a model here is one of clip, dinov2"),
        ({"architecture": "vit_base_patch14_dinov2"}, "is a model of timm; "),
        ({"model_type": "sam2_video"}, "is SAM 2; "),
        ({"model_type": "bert"}, "is a 'bert' model; "),
    ],
)
def test_another_kind_of_model_is_refused_before_its_weights_are_fetched(stand_in, config, message):
    (stand_in.root / "some/dino/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        loading.load_vision("some/dino")
    assert not any("model.safetensors" in request for request in stand_in.requests)


def test_weights_in_another_layout_are_named(stand_in):
    repository = stand_in.root / "some/clip"
    (repository / "model.safetensors").rename(repository / "open_clip_model.safetensors")
    with pytest.raises(UserError, match="no weights in Hugging Face layout.*open_clip_model"):
        loading.load_text("some/clip")
    with pytest.raises(UserError, match="No weights in .* OpenCLIP's layout"):
        (repository / "open_clip_config.json").write_text("{}")
        loading.load_text(str(repository))


@pytest.mark.parametrize("source", ["checkpoints/x.pth", "w/export", "./dino", "work/model.bin"])
def test_paths_are_not_looked_for_on_the_hub(stand_in, source):
    with pytest.raises(UserError, match="No model at"):
        hub.locate(source)
    assert not stand_in.requests


def test_the_command_that_fetches_by_hand(stand_in, monkeypatch):
    """Its patterns, as the hub's own command reads them, are those of the model's files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as raised:
        loading.load_text("some/clip")
    (command,) = (line for line in str(raised.value).splitlines() if "hf download" in line)
    patterns = [part.strip("'") for part in command.split()[command.split().index("--include") :]]
    assert patterns[::2] == ["--include"] * 3
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    import huggingface_hub

    folder = huggingface_hub.snapshot_download("some/clip", allow_patterns=patterns[1::2])
    loading.load_text(folder)
    loading.load_clip_vision(folder)


OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def two_commits(stand_in, saved):
    """some/dino: what was tagged v1, and what has taken its place since."""
    stand_in.keep("some/dino", OLD, "v1", "refs/pr/1")
    path = stand_in.root / "some/dino" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, path)
    stand_in.keep("some/dino", NEW, "branch/new")
    return stand_in


@pytest.mark.parametrize("revision", [OLD, "v1", "refs/pr/1"])
def test_a_revision_is_fetched_once_and_found_offline(two_commits, saved, monkeypatch, revision):
    old, source = identity.content_hash(str(saved / "dino")), f"some/dino@{revision}"
    described = {"source": source, "hash": old, "revision": OLD}
    assert identity.describe(source) == described
    assert identity.content_hash("some/dino") != old
    assert identity.content_hash("some/dino@branch/new") == identity.content_hash("some/dino")
    two_commits.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert identity.describe(source) == described
    assert hub.commit(hub.locate("some/dino@branch/new")) == NEW
    loading.load_vision(source)
    assert not two_commits.requests


def test_the_commit_is_known_of_models_of_the_hub_alone(stand_in, saved, tmp_path):
    assert identity.describe("some/dino")["revision"] == COMMIT
    assert "revision" not in identity.describe(str(saved / "dino"))
    assert hub.commit(tmp_path / "snapshots" / "main") == ""


def test_a_revision_that_nobody_has(two_commits, monkeypatch):
    with pytest.raises(
        UserError,
        match=r"some/dino has no revision 'v2' .*whole commit hash, a tag or a branch, wh",
    ):
        loading.load_vision("some/dino@v2")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError,
        match=r"(?s)some/dino@v1 is neither .*hf download some/dino --revision v1 --local",
    ):
        loading.load_vision("some/dino@v1")


@pytest.mark.parametrize(
    "source", ["some/dino@", "some/dino@../x", "some/dino@a b", "some/dino@-x", "some/x.pth@v1",
               "some/dino@v1@v2", "dino@v1"],
)  # fmt: skip
def test_what_is_no_revision(stand_in, source):
    assert not hub.is_id(source)
    with pytest.raises(UserError, match="dinov2-base@REVISION for a commit, tag or branch of it"):
        hub.locate(source)
    assert not stand_in.requests


def test_a_folder_with_an_at_sign_is_a_folder(stand_in, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved / "dino", tmp_path / "some" / "dino@v1")
    assert identity.content_hash("some/dino@v1") == identity.content_hash(str(saved / "dino"))
    assert not stand_in.requests


def test_a_clip_of_a_revision(stand_in, saved):
    """Its tokenizer, too, and for both stages."""
    stand_in.keep("some/clip", OLD, "v1")
    for path in (stand_in.root / "some/clip").glob("*"):
        path.write_text("{}")  # all that is there now
    hashed = identity.content_hash("some/clip@v1")
    assert hashed == identity.content_hash(str(saved / "clip"))
    loading.load_text("some/clip@v1")
    Clip("some/clip@v1")


def test_a_sam_of_a_revision(stand_in, monkeypatch):
    (stand_in.repository("some/sam") / "config.json").write_text('{"model_type": "sam"}')
    save_file({"a": torch.ones(1)}, stand_in.root / "some/sam/model.safetensors")
    stand_in.keep("some/sam", OLD, "v1")
    monkeypatch.setattr(checkpoint, "_read_folder", lambda folder, source: folder.name)
    assert checkpoint.read("some/sam@v1") == OLD
    assert checkpoint.read("some/sam") == COMMIT


def test_an_export_knows_its_commits(two_commits, world, tmp_path):
    """Where the hub has another encoder by now, that of the training is fetched."""
    folder = save_aligner(tmp_path / "export", world.root)
    model = json.loads((folder / "model.json").read_text())
    vision = {"vision": identity.describe("some/dino@v1")}
    card = model_card(model | vision)
    assert f"| vision encoder | some/dino@v1, commit {OLD} (weights " in card
    assert "base_model:\n- some/dino\n" in card
    shutil.copytree(world.root / "dinov2", two_commits.root / "some/other")
    two_commits.keep("some/other", "e" * 40)
    model["vision"] |= {"source": "some/other", "revision": "e" * 40}
    (folder / "model.json").write_text(json.dumps(model))
    expected = fmbseg_jax.load(folder).weights_hash
    path = two_commits.root / "some/other/model.safetensors"
    save_file({name: t + 1 for name, t in load_file(path).items()}, path)
    shutil.rmtree(tmp_path / "cache")
    assert fmbseg_jax.load(folder).weights_hash == expected
    with pytest.raises(UserError, match="The vision encoder at some/other has other values"):
        fmbseg_jax.load(folder, vision="some/other")
    fmbseg_jax.load(folder, vision=f"some/other@{'e' * 40}")


def test_a_commit_in_model_json_that_is_none(world, tmp_path):
    folder = save_aligner(tmp_path / "export", world.root)
    model = json.loads((folder / "model.json").read_text())
    model["vision"]["revision"] = "../../etc"
    (folder / "model.json").write_text(json.dumps(model))
    with pytest.raises(UserError, match="vision.revision is no commit"):
        fmbseg_jax.load(folder)


def test_an_aligner_of_a_revision(stand_in, world, tmp_path):
    served, name = save_aligner(tmp_path / "first", world.root), "user/water"
    shutil.copytree(served, stand_in.repository(name), dirs_exist_ok=True)
    stand_in.keep(name, OLD, "v1")
    (stand_in.root / name / "model.json").write_text("{}")
    assert exports.locate(f"{name}@v1").name == OLD
    fmbseg_jax.load(f"{name}@v1")
    with pytest.raises(UserError, match="is not the model.json"):
        fmbseg_jax.load(name)
    with pytest.raises(UserError, match="A repository on the hub is USER/NAME; got"):
        hub.push(served, f"{name}@v1", private=True)


TENSORS = {
    "matrix": torch.arange(12.0).reshape(3, 4).T,
    "part": torch.arange(10)[3:7],
    "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "brain": torch.tensor([[0.1, 3e38]], dtype=torch.bfloat16),
    "scalar": torch.tensor(4.6052),
    "empty": torch.zeros(0, 3),
    "flag": torch.tensor([True, False]),
    "parameter": torch.nn.Parameter(torch.ones(2, 2)),
}


def test_pytorchs_files_are_read_without_pytorch(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(collections.OrderedDict(TENSORS), path)
    read = pickled.read(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        found = read[name]()
        assert str(found.dtype) == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(found.astype(float), tensor.detach().double().numpy())


class _Calls:
    def __init__(self, *given):
        self._given = given

    def __reduce__(self):
        return self._given


@pytest.mark.parametrize(
    "content, message",
    [
        ({"a": _Calls(eval, ("1/0",))}, r"asks for \w+\.eval"),
        ({"a": _Calls(getattr, ("a", "lower"))}, r"asks for \w+\.getattr"),
        (_Calls(__import__, ("os",)), r"asks for \w+\.__import__"),
    ],
)
def test_code_in_a_pytorch_file_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "evil.bin")
    with pytest.raises(pickle.UnpicklingError, match=message):
        pickled.read(tmp_path / "evil.bin")


def test_files_that_hold_more_or_less_than_tensors(tmp_path):
    path = tmp_path / "other.bin"
    torch.save({"epoch": 3, "weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="more than a dict of tensors"):
        pickled.read(path)
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(pickled.OldFormatError):
        pickled.read(path)
    beyond = torch.ones(2)
    torch.save({"a": torch.as_strided(torch.ones(2), (2,), (1,))}, path)
    data = path.read_bytes()
    assert beyond.shape == (2,)
    broken = data.replace(b"K\x02\x85", b"K\x7f\x85", 1)  # a shape of 127
    assert broken != data
    path.write_bytes(broken)
    with pytest.raises(Exception, match="beyond its numbers|CRC"):
        pickled.read(path)["a"]()


def test_a_bit_that_flipped_in_a_pytorch_file_is_told(saved, tmp_path):
    shutil.copytree(saved / "dino", tmp_path / "dino")
    tensors = load_file(tmp_path / "dino" / "model.safetensors")
    (tmp_path / "dino" / "model.safetensors").unlink()
    path = tmp_path / "dino" / "pytorch_model.bin"
    torch.save(tensors, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    for read in (loading.load_vision, identity.content_hash):
        with pytest.raises(UserError, match="pytorch_model.bin is damaged .*CRC"):
            read(str(tmp_path / "dino"))


@pytest.fixture
def without_torch(monkeypatch):
    whole = builtins.__import__

    def limited(name, *given, **more):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return whole(name, *given, **more)

    return lambda: monkeypatch.setattr(builtins, "__import__", limited)


@pytest.mark.parametrize("zipped", [True, False])
def test_only_the_old_format_needs_pytorch(saved, tmp_path, without_torch, zipped):
    shutil.copytree(saved / "dino", tmp_path / "dino")
    tensors = load_file(tmp_path / "dino" / "model.safetensors")
    (tmp_path / "dino" / "model.safetensors").unlink()
    path = tmp_path / "dino" / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    expected = identity.content_hash(str(saved / "dino"))
    assert identity.content_hash(str(tmp_path / "dino")) == expected
    without_torch()
    if zipped:
        loading.load_vision(str(tmp_path / "dino"))
        return
    with pytest.raises(UserError, match="format of PyTorch before 1.6.*pip install torch"):
        loading.load_vision(str(tmp_path / "dino"))


def test_the_hash_is_of_values(saved, tmp_path):
    """Not of which files they are in, what else is in these, or what lies beside them."""
    folder = tmp_path / "clip"
    shutil.copytree(saved / "clip", folder)
    before = identity.content_hash(str(folder))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    buffers = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    torch.save(tensors | buffers, folder / "pytorch_model.bin")
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": processor}))
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"more": 1})
    )
    loading.Tokenizer(folder, 514, 77)._tokenizer.save_pretrained(folder)
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()
    assert (folder / "tokenizer.json").is_file()
    assert identity.content_hash(str(folder)) == before
    for changed in (
        {"text_model.embeddings.token_embedding.weight": torch.zeros(514, 32)},
        {"visual_projection.weight": torch.zeros(24, 32)},
    ):
        save_file(tensors | changed, folder / "model.safetensors")
        assert identity.content_hash(str(folder)) != before
    (folder / "model.safetensors").unlink()
    for name, old, new in [
        ("processor_config.json", "0.26862954", "0.5"),
        ("config.json", "quick_gelu", "gelu"),
        ("tokenizer.json", '"a": 64', '"a": 65'),
    ]:
        whole = (folder / name).read_text()
        assert old in whole, name
        (folder / name).write_text(whole.replace(old, new, 1))
        assert identity.content_hash(str(folder)) != before, name
        (folder / name).write_text(whole)
    assert identity.content_hash(str(folder)) == before


def test_the_second_run_of_every_program_asks_nothing(world, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    Image.fromarray(photograph(80, 90)).save(tmp_path / "photos" / "a.png")
    world.pseudo_labels(tmp_path, count=4)
    flags = [*world.flags, f"--workdir={tmp_path}"]
    flags += ["--config.models.clip=some/clip", "--config.models.vision=some/dinov2"]
    places = [f"--model={tmp_path / 'export'}", f"--images={tmp_path / 'photos'}"]
    places += ["--words=sky,grass", f"--out={tmp_path / 'out'}"]
    commands = [("fmbseg_jax.features", *flags), ("train.py", *flags)]
    commands.append(("fmbseg_jax.segment", *places))
    with serve(tmp_path / "hub") as served:
        for name in ("clip", "dinov2"):
            folder = served.repository(f"some/{name}")
            shutil.copytree(world.root / name, folder, dirs_exist_ok=True)
        monkeypatch.setenv("HF_ENDPOINT", served.address)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
        for command in commands:
            run(*command)
        assert {"some/clip", "some/dinov2"} <= {
            "/".join(r.split("/")[1:3]) for r in served.requests
        }
        served.requests.clear()
        for command in commands:
            assert "Fetching" not in run(*command).stdout
        assert not served.requests
    model = exports.read_model(tmp_path / "export")
    assert [model[name]["revision"] for name in ("vision", "clip")] == [COMMIT, COMMIT]
    assert f"some/dinov2, commit {COMMIT} " in (tmp_path / "export" / "README.md").read_text()
