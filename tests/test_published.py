"""Published repositories, rebuilt name by name: each loads, and gives what transformers gives."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, CLIPModel

from fmbseg_jax.encoders import identity, loading
from fmbseg_jax.encoders.text_features import TextFeatures
from fmbseg_jax.errors import UserError
from labelling.clip import Clip

TEMPLATE = "a photo of a {}."
_HEAD = {"classifier.weight": (10, 2 * published.WIDTH), "classifier.bias": (10,)}


def _under(prefix, shapes):
    return {prefix + name: shape for name, shape in shapes.items()} | _HEAD


VISION = {
    "dinov2-small": (published.dinov2(), published.dinov2_config(), {}),
    "dinov2-giant": (published.dinov2(gated=True), published.dinov2_config(gated=True), {}),
    "dinov2-base, fine-tuned, in parts": (
        published.dinov2(), published.dinov2_config(), {"files": "safetensors parts"},
    ),
    "dinov2-small-imagenet1k-1-layer": (
        _under("dinov2.", published.dinov2()), published.dinov2_config(), {},
    ),
    "dinov2-with-registers-small": (published.dinov2(4), published.dinov2_config(4), {}),
    "dinov2-with-registers-small-imagenet1k-1-layer": (
        _under("dinov2_with_registers.", published.dinov2(4)), published.dinov2_config(4), {},
    ),
    "dinov3-vits16": (published.dinov3(), published.dinov3_config(), {}),
    "dinov3-vits16plus": (published.dinov3(gated=True), published.dinov3_config(gated=True), {}),
    "dinov3-vit7b16": (
        published.dinov3(gated=True, query_and_value_bias=False),
        published.dinov3_config(gated=True, query_and_value_bias=False),
        {"files": "safetensors parts"},
    ),
}  # fmt: skip

CLIP = {
    "openai/clip-vit-base-patch16": (True, published.clip_config(), {"files": "bin"}),
    "openai/clip-vit-large-patch14": (True, published.clip_config(twice=True), {}),
    "laion/CLIP-ViT-H-14": (True, published.clip_config("gelu"), {"files": "bin parts"}),
    "saved by transformers 5": (False, published.clip_config(), {"modern": True}),
}


def relative_error(ours, theirs):
    theirs = np.asarray(theirs)
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("name", VISION)
def test_vision_encoders(name, tmp_path):
    shapes, config, files = VISION[name]
    folder = published.write_folder(tmp_path, config, published.tensors(shapes), name[:6], **files)
    module, params = loading.load_vision(str(folder))
    theirs, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    for grid in ((5, 5), (3, 4)):
        side = module.spec.patch
        size = (2, grid[0] * side, grid[1] * side, 3)
        images = np.random.default_rng(0).normal(size=size).astype(np.float32)
        with torch.no_grad():
            tokens = theirs(torch.from_numpy(images).permute(0, 3, 1, 2)).last_hidden_state
        ours = module.apply({"params": params}, jnp.asarray(images))
        patches = np.asarray(ours.patches).reshape(2, -1, published.WIDTH)
        assert relative_error(ours.cls, tokens[:, 0]) < 1e-5
        assert relative_error(patches, tokens[:, -patches.shape[1] :]) < 1e-5


def _fused(tensors, rename):
    """Tensors under Meta's names, queries, keys and values (or gates and values) in one."""
    fused = {}
    for name, tensor in tensors.items():
        for old, new in rename.items():
            name = name.replace(old, new)
        fused.setdefault(name, []).append(tensor)
    return {name: torch.cat(parts) for name, parts in fused.items()}


@pytest.mark.parametrize("registers, gated", [(0, False), (4, True)])
def test_dinov2_of_torch_hub(tmp_path, monkeypatch, registers, gated):
    """The same numbers under Meta's names, in one file."""
    monkeypatch.setattr(published, "WIDTH", 128)
    monkeypatch.setattr(published, "HEADS", 2)  # 64 channels each, as in all of them
    shapes = published.dinov2(registers, gated)
    if gated:
        for i in range(published.DEPTH):
            at = f"encoder.layer.{i}.mlp.weights"
            shapes |= {f"{at}_in.weight": (688, 128), f"{at}_in.bias": (688,)}
            shapes |= {f"{at}_out.weight": (128, 344)}
    values = published.tensors(shapes)
    config = published.dinov2_config(registers, gated)
    folder = published.write_folder(tmp_path / "dinov2", config, values, "dinov2")
    meta = {
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "embeddings.": "",
        "encoder.layer.": "blocks.",
        "attention.attention.query": "attn.qkv",
        "attention.attention.key": "attn.qkv",
        "attention.attention.value": "attn.qkv",
        "attention.output.dense": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
        "mlp.weights_in": "mlp.w12",
        "mlp.weights_out": "mlp.w3",
        "layernorm": "norm",
    }
    file = tmp_path / "dinov2_vits14.pth"
    torch.save(_fused(values, meta), file)
    module, params = loading.load_vision(str(file))
    expected_module, expected = loading.load_vision(str(folder))
    assert module.spec == expected_module.spec
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert identity.content_hash(str(file)) == identity.content_hash(str(file))
    torch.save({"head": torch.ones(2)}, file)
    with pytest.raises(UserError, match="is no DINOv2 of torch.hub: it has no tensor 'pos_embed'"):
        loading.load_vision(str(file))
    torch.save({"rope_embed.periods": torch.ones(2)}, file)
    with pytest.raises(UserError, match="DINOv3 in Meta's own layout"):
        loading.load_vision(str(file))


@pytest.mark.parametrize("name", CLIP)
def test_clip_in_both_stages(name, tmp_path):
    buffers, config, files = CLIP[name]
    values = published.tensors(published.clip(buffers))
    folder = published.write_folder(tmp_path, config, values, "clip", **files)
    theirs, report = CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    words = ["sky", "sail boat", "Straße"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Without this, transformers ends sentences at 49407 where sizes are said twice.
    theirs.text_model.eos_token_id = tokenizer.eos_token_id
    tokens = tokenizer([TEMPLATE.format(word) for word in words], padding=True, return_tensors="pt")
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    pixels = torch.from_numpy(image / 255.0).float()
    processor = published.PROCESSORS["clip"]
    pixels = (pixels - torch.tensor(processor["image_mean"])) / torch.tensor(processor["image_std"])
    with torch.no_grad():
        text = _unit(theirs.get_text_features(**tokens).pooler_output)
        seen = theirs.get_image_features(pixel_values=pixels.permute(2, 0, 1)[None]).pooler_output
    labelling = Clip(str(folder))
    assert relative_error(TextFeatures(str(folder))(words), text) < 1e-5
    assert relative_error(labelling.text(words, TEMPLATE), text) < 1e-5
    assert relative_error(labelling.crops(image, 32, 32, 32)[0], _unit(seen)) < 1e-5
    module, params = loading.load_clip_vision(str(folder))
    normal = (image / 255.0 - module.spec.mean) / module.spec.std
    ours = module.apply({"params": params}, jnp.asarray(normal[None], jnp.float32))
    assert relative_error(ours.cls, seen) < 1e-5


def _unit(features):
    return features / features.norm(dim=-1, keepdim=True)


@pytest.fixture
def clip_folder(tmp_path):
    values = published.tensors(published.clip(buffers=False))
    return published.write_folder(tmp_path / "clip", published.clip_config(), values, "clip")


def test_a_token_added_after_the_end(clip_folder):
    """A token beyond the end's must not be taken for it: both stages read the state of the end."""
    config = published.clip_config()
    config["text_config"]["vocab_size"] += 1
    shapes = published.clip(buffers=False)
    embedding = "text_model.embeddings.token_embedding.weight"
    shapes[embedding] = (published.CLIP_TOKENS + 1, published.WIDTH)
    published.write_folder(clip_folder, config, published.tensors(shapes), "clip")
    tokenizer = AutoTokenizer.from_pretrained(clip_folder)
    tokenizer.add_tokens(["zzebra"])
    tokenizer.save_pretrained(clip_folder)
    words = ["sky", "zzebra"]
    theirs = CLIPModel.from_pretrained(clip_folder)
    theirs.text_model.eos_token_id = tokenizer.eos_token_id  # as transformers does it since 4.31
    ids = tokenizer([TEMPLATE.format(word) for word in words], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = _unit(theirs.get_text_features(**ids).pooler_output)
    assert relative_error(TextFeatures(str(clip_folder))(words), expected) < 1e-5
    assert relative_error(Clip(str(clip_folder)).text(words, TEMPLATE), expected) < 1e-5


def test_a_token_that_the_model_does_not_know(clip_folder):
    """Its embedding would be another's, or no number at all."""
    tokenizer = AutoTokenizer.from_pretrained(clip_folder)
    tokenizer.add_tokens(["zzebra"])
    tokenizer.save_pretrained(clip_folder)
    for text in (
        TextFeatures(str(clip_folder)),
        lambda w: Clip(str(clip_folder)).text(w, TEMPLATE),
    ):
        assert len(text(["sky"])) == 1
        with pytest.raises(
            UserError, match=r"'a photo of a zzebra\.' has the token 514.*knows 514"
        ):
            text(["zzebra"])


@pytest.mark.parametrize(
    "tower, name, value", [("text", "hidden_act", "gelu"), ("vision", "layer_norm_eps", 1e-3)]
)
def test_a_config_that_contradicts_itself(clip_folder, tower, name, value):
    config = published.clip_config(twice=True)
    config[f"{tower}_config"][name] = value
    (clip_folder / "config.json").write_text(json.dumps(config))
    message = f"contradicts itself in {tower}_config and {tower}_config_dict .{name}"
    for load in (loading.load_text, loading.load_clip_vision, Clip):
        with pytest.raises(UserError, match=message):
            load(str(clip_folder))
    config[f"{tower}_config_dict"][name] = value
    (clip_folder / "config.json").write_text(json.dumps(config))
    words = ["sky", "Straße"]
    ours, labelling = TextFeatures(str(clip_folder))(words), Clip(str(clip_folder))
    assert relative_error(ours, labelling.text(words, TEMPLATE)) < 1e-5


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"image_mean": [0.5], "image_std": [0.5]}, "three numbers each"),
        ({"image_mean": [0.5] * 3}, "three numbers each"),
        ({**published.PROCESSORS["clip"], "rescale_factor": 1 / 127.5}, "rescale_factor 1/255"),
        ({**published.PROCESSORS["clip"], "do_normalize": False}, "without do_normalize"),
        ({**published.PROCESSORS["clip"], "do_rescale": False}, "without do_rescale"),
        ({**published.PROCESSORS["clip"], "rescale_factor": "1/255"}, "rescale_factor 1/255"),
        ({**published.PROCESSORS["clip"], "image_std": [0, 0, 0]}, "the latter above 0"),
        ([1, 2], "is damaged: it is no object"),
    ],
)
def test_other_pixels_are_refused_in_both_stages(clip_folder, settings, message):
    (clip_folder / "preprocessor_config.json").write_text(json.dumps(settings))
    for load in (loading.load_clip_vision, Clip):
        with pytest.raises(UserError, match=message):
            load(str(clip_folder))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("merges.txt", lambda data: data + b"\xff\xfe a\n"),
        ("vocab.json", lambda data: data[:100]),
        ("vocab.json", lambda data: b"[1]"),
        ("tokenizer_config.json", lambda data: b'{"added_tokens_decoder": {"x": {"content": 1}}}'),
    ],
)
def test_damaged_tokenizers(clip_folder, name, change):
    path = clip_folder / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=r"(tokenizer in .* is damaged|Fetch it again|from where)"):
        identity.content_hash(str(clip_folder))


def test_exports_that_recorded_a_hash_of_files(clip_folder, tmp_path):
    """Those of version 0.1: SHA-256 of the weights' file, then of these beside it, in order."""
    import hashlib

    names = "model.safetensors", "config.json", "preprocessor_config.json"
    names += "vocab.json", "merges.txt", "tokenizer_config.json"
    digest = hashlib.sha256(b"".join((clip_folder / name).read_bytes() for name in names))
    recorded, source = digest.hexdigest()[:16], str(clip_folder)
    assert identity.content_hash(source, recorded) == recorded != identity.content_hash(source)
    now = identity.content_hash(source)
    assert identity.is_one_model(source, now, recorded)
    assert identity.is_one_model("nowhere", now, now)
    assert not identity.is_one_model("nowhere", now, recorded)
    assert not identity.is_one_model(source, now, "another")
    copy = shutil.copytree(clip_folder, tmp_path / "copy")
    path = copy / "preprocessor_config.json"
    path.write_text(path.read_text().replace("0.26862954", "0.3"))
    assert identity.content_hash(str(copy), recorded) != recorded
