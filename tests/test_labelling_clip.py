"""CLIP: text features, and dense features against a slow implementation that shares no code."""

import json
import shutil

import numpy as np
import pytest
import torch
from labelling_tiny import WORDS, picture
from models import save_clip
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from fmbseg_jax.data import images
from fmbseg_jax.errors import UserError
from labelling.clip import Clip, crop_corners

torch.set_num_threads(1)
TEMPLATE = "a photo of a {}."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder, width=32, depth=3, image=32, patch=8, output=24)
    return folder


@pytest.fixture(scope="module")
def clip(folder):
    return Clip(str(folder))


def _unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def _norm(x, weights, name):
    return torch.nn.functional.layer_norm(
        x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5
    )


def _linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(1))


def _slow_crop(weights, pixels, heads=4):
    """[3, 32, 32] → class token [D], value features of the 16 patches [16, D], all by hand."""
    vision = "vision_model."
    patches = pixels.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).reshape(16, -1)
    kernel = weights[vision + "embeddings.patch_embedding.weight"].flatten(1)
    x = torch.cat([weights[vision + "embeddings.class_embedding"][None], patches @ kernel.T])
    x = x + weights[vision + "embeddings.position_embedding.weight"]
    x = _norm(x, weights, vision + "pre_layrnorm")
    for i in range(3):
        block = f"{vision}encoder.layers.{i}."
        last_input = x
        y = _norm(x, weights, block + "layer_norm1")
        q, k, v = (_linear(y, weights, f"{block}self_attn.{n}_proj") for n in "qkv")
        q, k, v = (t.unflatten(1, (heads, -1)) for t in (q, k, v))
        attention = torch.einsum("ihc,jhc->hij", q, k) / q.shape[-1] ** 0.5
        mixed = torch.einsum("hij,jhc->ihc", attention.softmax(-1), v).flatten(1)
        x = x + _linear(mixed, weights, block + "self_attn.out_proj")
        y = _linear(_norm(x, weights, block + "layer_norm2"), weights, block + "mlp.fc1")
        x = x + _linear(y * torch.sigmoid(1.702 * y), weights, block + "mlp.fc2")
    values = _norm(last_input[1:], weights, block + "layer_norm1")
    for name in ("self_attn.v_proj", "self_attn.out_proj"):
        values = _linear(values, weights, block + name)
    both = _norm(torch.cat([x[:1], values]), weights, vision + "post_layernorm")
    both = both @ weights["visual_projection.weight"].T
    return both[0], both[1:]


def test_dense_features_against_a_slow_implementation(clip, folder):
    """Windows at stride 24 over 40 × 64 pixels: the last ones are shifted, so counts differ."""
    weights = load_file(folder / "model.safetensors")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    image = picture(45, 70)
    tokens, dense = clip.crops(image, short_side=40, crop=32, stride=24)
    assert images.resized_shape(45, 70, 40) == (40, 62)  # rounded up to whole patches: 40, 64
    mean, std = (torch.tensor(settings[f"image_{s}"])[:, None, None] for s in ("mean", "std"))
    pixels = torch.tensor(images.resize(image, (40, 64))).permute(2, 0, 1)
    pixels = (pixels / 255 - mean) / std
    total = torch.zeros(5, 8, 24)
    count = torch.zeros(5, 8, 1)
    expected = []
    for y in (0, 8):
        for x in (0, 24, 32):
            token, values = _slow_crop(weights, pixels[:, y : y + 32, x : x + 32])
            expected.append(_unit(token))
            for i in range(4):
                for j in range(4):
                    total[y // 8 + i, x // 8 + j] += values[4 * i + j]
                    count[y // 8 + i, x // 8 + j] += 1
    assert sorted(set(count.flatten().tolist())) == [1, 2, 4]
    assert dense.shape == (5, 8, 24)
    torch.testing.assert_close(tokens, torch.stack(expected), atol=2e-5, rtol=0)
    torch.testing.assert_close(dense, _unit(total / count), atol=2e-5, rtol=0)


def test_batches_of_crops_do_not_matter(clip, monkeypatch):
    image = picture(60, 60)
    at_once = clip.crops(image, 64, 32, 8)
    monkeypatch.setattr("labelling.clip._CROPS_AT_ONCE", 7)
    for a, b in zip(at_once, clip.crops(image, 64, 32, 8), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_crops_of_another_size_use_resized_positions(clip):
    """One crop that is the whole image: what transformers gives for that size."""
    image = picture(48, 48)
    tokens, dense = clip.crops(image, 48, 48, 48)
    pixels = images.normalise(image, clip._mean, clip._std)
    with torch.inference_mode():
        output = clip.model.get_image_features(
            torch.from_numpy(pixels).permute(2, 0, 1)[None], interpolate_pos_encoding=True
        )
    torch.testing.assert_close(tokens, _unit(output.pooler_output), atol=1e-5, rtol=0)
    assert dense.shape == (6, 6, 24)


def test_text_features_are_those_of_each_sentence_alone(clip, folder):
    """Whatever else is in the batch, and so however much padding there is."""
    features = clip.text(WORDS, TEMPLATE)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    for word, feature in zip(WORDS, features, strict=True):
        ids = tokenizer(f"a photo of a {word}.", return_tensors="pt")
        with torch.inference_mode():
            expected = clip.model.get_text_features(**ids).pooler_output[0]
        torch.testing.assert_close(feature, _unit(expected), atol=1e-5, rtol=0)
    assert features.shape == (4, 24)


def test_corners_cover_every_patch_and_stay_inside():
    for height, width, crop, stride in [(64, 64, 64, 32), (72, 200, 32, 20), (40, 48, 32, 32)]:
        corners = crop_corners((height, width), crop, stride, 8)
        covered = np.zeros((height, width), bool)
        for y, x in corners:
            assert y % 8 == x % 8 == 0 and 0 <= y <= height - crop and 0 <= x <= width - crop
            covered[y : y + crop, x : x + crop] = True
        assert covered.all() and len(set(corners)) == len(corners)


def test_crop_must_be_whole_patches(clip):
    with pytest.raises(UserError, match="multiple of CLIP's patch, 8 pixels; got 30.* 24 and 32"):
        clip.crops(picture(40, 40), 40, 30, 16)


def test_word_too_long(clip):
    with pytest.raises(UserError, match="'a photo of a x{90}.' has 102 tokens; CLIP reads 77"):
        clip.text(["sky", "x" * 90], TEMPLATE)


def test_a_model_that_is_not_there(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="hf download nobody/clip --local-dir clip"):
        Clip("nobody/clip")
    with pytest.raises(UserError, match="No model at weights/of/clip: give a folder"):
        Clip("weights/of/clip")


def test_a_model_in_the_hubs_cache(folder, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some--clip" / "snapshots" / "0"
    shutil.copytree(folder, snapshot)
    (tmp_path / "models--some--clip" / "refs").mkdir()
    (tmp_path / "models--some--clip" / "refs" / "main").write_text("0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert Clip("some/clip").patch == 8


def test_incomplete_folders(folder, tmp_path):
    copy = tmp_path / "clip"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors.pop("visual_projection.weight")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks parameters: visual_projection.weight"):
        Clip(str(copy))
    (copy / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be loaded"):
        Clip(str(copy))
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="has no preprocessor_config.json"):
        Clip(str(copy))
