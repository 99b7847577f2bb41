"""The Flax encoders against Hugging Face, on random models saved as published ones are."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import save_clip, save_dinov2
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from fmbseg_jax.encoders import identity, loading
from fmbseg_jax.encoders.text_features import TextFeatures
from fmbseg_jax.errors import UserError
from fmbseg_jax.vocabulary import read_templates


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    return folder, save_dinov2(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return folder, save_clip(folder)


def relative_error(ours, theirs):
    theirs = theirs.detach().numpy()
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def test_clip_text_equals_hugging_face(clip):
    folder, model = clip
    words = ["sky", "sail boat", "Straße", "a much longer phrase, with a comma"]
    ours = TextFeatures(str(folder))(words)
    module, params, _ = loading.load_text(str(folder))
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer([f"a photo of a {word}." for word in words], padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model.get_text_features(**ids).pooler_output
    raw = module.apply({"params": params}, jnp.asarray(ids["input_ids"].numpy()))
    assert relative_error(raw, theirs) < 1e-5
    assert relative_error(ours, theirs / theirs.norm(dim=-1, keepdim=True)) < 1e-5
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, rtol=1e-6)


def test_text_features_remember_their_words(clip, monkeypatch, tmp_path):
    monkeypatch.setenv("FMBSEG_CACHE", str(tmp_path))
    features = TextFeatures(str(clip[0]))
    both = features(["sky", "grass"])
    np.testing.assert_array_equal(features(["grass", "sky"]), both[::-1])
    assert len(list(tmp_path.rglob("*.feature"))) == 2
    monkeypatch.setattr(loading, "load_text", None)  # another process: the tower is not needed
    np.testing.assert_array_equal(TextFeatures(str(clip[0]))(["sky", "grass"]), both)
    for path in tmp_path.rglob("*.feature"):
        path.write_bytes(path.read_bytes()[:70])
    with pytest.raises(TypeError):  # damaged: it would be encoded again
        TextFeatures(str(clip[0]))(["sky"])


def test_features_of_other_weights_are_not_taken(clip, tmp_path, monkeypatch):
    monkeypatch.setenv("FMBSEG_CACHE", str(tmp_path / "cache"))
    first = TextFeatures(str(clip[0]))(["sky"])
    other = save_clip(tmp_path / "other", depth=1)
    assert other.config.text_config.num_hidden_layers == 1
    assert np.abs(TextFeatures(str(tmp_path / "other"))(["sky"]) - first).max() > 1e-2


def test_synonyms_share_one_feature(clip):
    from labelling.clip import Clip

    features = TextFeatures(str(clip[0]))
    sofa, couch, both = features(["sofa", "couch", "sofa; couch"])
    mean = (sofa + couch) / 2
    np.testing.assert_allclose(both, mean / np.linalg.norm(mean), atol=1e-6)
    theirs = Clip(str(clip[0])).text(["sky", "sofa; couch"], "a photo of a {}.")
    np.testing.assert_allclose(theirs[1].numpy(), both, atol=1e-5)


def test_several_templates(clip, tmp_path):
    """Of unit length before the mean, as in SCLIP, or as they come from CLIP, as in TCL."""
    folder, model = clip
    templates = ["a photo of a {}.", "art of the {}", "{}"]
    file = tmp_path / "templates.txt"
    file.write_text("\n".join(templates) + "\n\n")
    assert read_templates(str(file)) == tuple(templates)
    assert read_templates("a {}") == ("a {}",)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer([one.format("sky") for one in templates], padding=True, return_tensors="pt")
    with torch.no_grad():
        each = model.get_text_features(**ids).pooler_output
    features = TextFeatures(str(folder))
    for plain, mean in [
        (False, (each / each.norm(dim=-1, keepdim=True)).mean(0)),
        (True, each.mean(0)),
    ]:
        (ours,) = features(["sky"], templates, plain=plain)
        np.testing.assert_allclose(ours, (mean / mean.norm()).numpy(), atol=1e-5)
    one, other = (features(["sky"], templates, plain=plain) for plain in (False, True))
    assert np.abs(one - other).max() > 1e-4


def test_a_word_too_long_is_refused(clip):
    with pytest.raises(UserError, match="tokens; CLIP reads 77. Shorten the word."):
        TextFeatures(str(clip[0]))(["far " * 80])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load(dinov2, tmp_path, dtype):
    """The params are the numbers in the file, in float32."""
    folder, _ = dinov2
    shutil.copytree(folder, tmp_path / "half")
    tensors = load_file(folder / "model.safetensors")
    half = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(half, tmp_path / "half" / "model.safetensors")
    rounded = {name: tensor.float() for name, tensor in half.items()}
    shutil.copytree(folder, tmp_path / "whole")
    save_file(rounded, tmp_path / "whole" / "model.safetensors")
    ours, expected = (loading.load_vision(str(tmp_path / name))[1] for name in ("half", "whole"))
    jax.tree.map(np.testing.assert_array_equal, ours, expected)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(ours)} == {"float32"}


def changed(folder, target, change):
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return str(target)


def test_every_wrong_tensor_is_named(dinov2, tmp_path):
    def spoil(tensors):
        del tensors["layernorm.weight"]
        tensors["head.weight"] = torch.zeros(3)
        tensors["encoder.layer.1.mlp.fc1.bias"] = torch.zeros(5)
        tensors["embeddings.patch_embeddings.projection.weight"] = torch.zeros(48, 588)
        positions = tensors["embeddings.position_embeddings"]
        tensors["embeddings.position_embeddings"] = positions.repeat(2, 1, 1)

    source = changed(dinov2[0], tmp_path / "spoilt", spoil)
    with pytest.raises(UserError) as error:
        loading.load_vision(source)
    for text in [
        "missing: layernorm.weight",
        "surplus: head.weight",
        "misshapen: encoder.layer.1.mlp.fc1.bias is (5,), expected (192,)",
        "misshapen: embeddings.patch_embeddings.projection.weight is (48, 588), expected (48, 3,",
        "misshapen: embeddings.position_embeddings is (2, 26, 48), expected (1, 26, 48)",
    ]:
        assert text in str(error.value)


def test_a_clip_without_its_tokenizer(clip, tmp_path):
    from labelling.clip import Clip

    shutil.copytree(clip[0], tmp_path / "clip")
    (tmp_path / "clip" / "merges.txt").unlink()
    for load in (loading.load_text, Clip):
        with pytest.raises(UserError, match="has no tokenizer: expected tokenizer.json, or vocab"):
            load(str(tmp_path / "clip"))


def test_what_changes_the_numbers_changes_the_hash(dinov2, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(dinov2[0], folder)
    before = identity.content_hash(str(folder))
    (folder / "adapter.safetensors").write_bytes(b"not loaded")
    assert identity.content_hash(str(folder)) == before
    for name, value, other in (
        ("config.json", "1e-06", "1e-05"),
        ("config.json", '"num_attention_heads": 4', '"num_attention_heads": 2'),
        ("preprocessor_config.json", "0.406", "0.411"),
        ("preprocessor_config.json", "0.229", "0.213"),
    ):
        old = (folder / name).read_text()
        assert value in old
        (folder / name).write_text(old.replace(value, other))
        assert identity.content_hash(str(folder)) != before
        (folder / name).write_text(old)


def test_damaged_weights(dinov2, tmp_path):
    shutil.copytree(dinov2[0], tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="is damaged"):
        loading.load_vision(str(tmp_path / "cut"))


def test_models_that_are_not_there_or_not_the_kind(clip, dinov2, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="give a folder, or a hub id"):
        loading.load_vision("no/such/folder")
    with pytest.raises(UserError, match="hf download nobody/nothing"):
        loading.load_vision("nobody/nothing")
    with pytest.raises(UserError, match="the vision encoder is one of dinov2"):
        loading.load_vision(str(clip[0]))
    with pytest.raises(UserError, match="the model of words is a clip, such as openai"):
        loading.load_text(str(dinov2[0]))
    with pytest.raises(UserError, match=r"has no config\.json"):
        loading.load_vision(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2", **_SIZES}))
    with pytest.raises(UserError, match="No weights in"):
        loading.load_vision(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    with pytest.raises(UserError, match=r"config\.json of .* lacks 'hidden_size'"):
        loading.load_vision(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match="is not JSON"):
        loading.load_vision(str(tmp_path))


_SIZES = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 4,
    "hidden_act": "gelu", "layer_norm_eps": 1e-6, "patch_size": 14, "image_size": 28,
}  # fmt: skip
