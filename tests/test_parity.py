"""Every published architecture, at reduced depth, against Hugging Face's PyTorch, block by block.

Models are random, at unit scale (see models.at_unit_scale), and saved as the published ones are.
"""

import copy
import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from fmbseg_jax.data.images import decode, normalise, resize
from fmbseg_jax.encoders import clip as clip_family
from fmbseg_jax.encoders import loading
from fmbseg_jax.errors import UserError
from fmbseg_jax.nn import positions, transformer

DEPTH = 2
GRIDS = [(4, 4), (3, 7)]


def small(spec):
    """The architecture at reduced depth; the table of positions at reduced size."""
    blocks = dataclasses.replace(spec.transformer, depth=DEPTH)
    return dataclasses.replace(spec, transformer=blocks, grid=5)


def hugging_face(spec):
    """A random Hugging Face model of a spec."""
    blocks = spec.transformer
    shape = {
        "hidden_size": blocks.width, "num_hidden_layers": blocks.depth,
        "num_attention_heads": blocks.heads, "layer_norm_eps": blocks.epsilon,
        "image_size": spec.grid * spec.patch, "patch_size": spec.patch,
    }  # fmt: skip
    if spec.rope:
        return DINOv3ViTModel(
            DINOv3ViTConfig(
                **shape, intermediate_size=blocks.mlp_width, hidden_act=blocks.activation,
                use_gated_mlp=blocks.gated, num_register_tokens=spec.registers,
                rope_theta=spec.rope, key_bias=blocks.key_bias,
            )
        )  # fmt: skip
    if spec.registers:
        return Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(
                **shape, use_swiglu_ffn=blocks.gated, num_register_tokens=spec.registers
            )
        )
    return Dinov2Model(Dinov2Config(**shape, use_swiglu_ffn=blocks.gated))


def relative_error(ours, theirs):
    theirs = theirs.detach().float().numpy()
    return np.abs(np.asarray(ours, np.float32) - theirs).max() / np.abs(theirs).max()


def blocks_and_output(module, params, images):
    """The outputs of the module's blocks, in order, and its own."""
    output, state = module.apply(
        {"params": params},
        jnp.asarray(images),
        capture_intermediates=lambda layer, name: isinstance(layer, transformer.Block),
        mutable=["intermediates"],
    )
    found = state["intermediates"]
    inner = found.get("transformer", {})
    hidden = [inner[f"block{i}"]["__call__"][0] for i in range(len(inner))]
    return hidden + ([found["last"]["__call__"][0]] if "last" in found else []), output


def pixels(spec, batch, grid, seed=0):
    side = spec.patch
    shape = (batch, grid[0] * side, grid[1] * side, 3)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def errors(module, params, model, images):
    """Relative error of each block and of the output's parts."""
    hidden, output = blocks_and_output(module, params, images)
    batch = torch.from_numpy(images.transpose(0, 3, 1, 2))
    with torch.no_grad():
        theirs = model(batch, output_hidden_states=True)
    last = theirs.last_hidden_state
    patches = np.asarray(output.patches).reshape(len(images), -1, last.shape[-1])
    skipped = last.shape[1] - patches.shape[1]
    # Theirs begin with the embedding; the last block shows in the outputs below, after its norm.
    pairs = zip(hidden[:-1], theirs.hidden_states[1:-1], strict=True)
    return [
        *(relative_error(a, b) for a, b in pairs),
        relative_error(output.cls, last[:, 0]),
        relative_error(patches, last[:, skipped:]),
    ]


# The 7B model's two blocks would take minutes; tests/test_published.py has what is its own.
@pytest.fixture(scope="module", params=[name for name in loading.VISION if "7b" not in name])
def published(request, tmp_path_factory):
    """A published vision architecture at reduced depth: its folder, and Hugging Face's model."""
    spec = small(loading.VISION[request.param])
    folder = tmp_path_factory.mktemp("published")
    model = models.at_unit_scale(hugging_face(spec))
    model.save_pretrained(folder)
    return folder, model, spec


def test_vision_towers_equal_hugging_face(published):
    folder, model, spec = published
    module, params = loading.load_vision(str(folder))
    assert module.spec == spec, "config.json gives back the spec"
    for batch, grid in [(1, GRIDS[0]), (3, GRIDS[1])]:
        assert max(errors(module, params, model, pixels(spec, batch, grid))) < 1e-5


def test_vision_towers_in_bfloat16(published):
    folder, model, spec = published
    half = copy.deepcopy(model).bfloat16()
    half.save_pretrained(folder / "half")
    module, params = loading.load_vision(str(folder / "half"), "bfloat16")
    kernels = [x for path, x in jax.tree.leaves_with_path(params) if "kernel" in str(path)]
    assert {x.dtype for x in kernels} == {jnp.dtype("bfloat16")}
    assert params["norm"]["scale"].dtype == jnp.float32
    half = half.float()
    for batch, grid in [(1, GRIDS[0]), (3, GRIDS[1])]:
        assert max(errors(module, params, half, pixels(spec, batch, grid))) < 1e-2


@pytest.mark.parametrize(
    "wrong",
    [
        {"activation": "quick_gelu"},
        {"epsilon": 1e-4},
        {"layer_scale": False},
        {"heads": 2},
        {"antialias": False},
    ],
    ids=str,
)
def test_a_mutant_is_found(tmp_path, wrong):
    """What would go unnoticed if the fixture's scale or the tolerance were wrong."""
    spec = small(loading.VISION["facebook/dinov2-with-registers-small"])
    model = models.at_unit_scale(hugging_face(spec))
    model.save_pretrained(tmp_path)
    module, params = loading.load_vision(str(tmp_path))
    images = pixels(spec, 1, GRIDS[1])
    assert max(errors(module, params, model, images)) < 1e-5
    blocks = {name: value for name, value in wrong.items() if hasattr(spec.transformer, name)}
    mutant = dataclasses.replace(
        spec,
        transformer=dataclasses.replace(spec.transformer, **blocks),
        **{name: value for name, value in wrong.items() if name not in blocks},
    )
    assert max(errors(loading.VisionEncoder(mutant), params, model, images)) > 3e-5


def test_the_number_of_registers_matters(tmp_path):
    spec = small(loading.VISION["facebook/dinov2-with-registers-small"])
    model = models.at_unit_scale(hugging_face(spec))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_register_tokens": 3}))
    with pytest.raises(UserError, match=r"is \(1, 4, 384\), expected \(1, 3, 384\)"):
        loading.load_vision(str(tmp_path))


def test_rotary_positions_matter(tmp_path):
    spec = small(loading.VISION["facebook/dinov3-vits16-pretrain-lvd1689m"])
    model = models.at_unit_scale(hugging_face(spec))
    model.save_pretrained(tmp_path)
    module, params = loading.load_vision(str(tmp_path))
    mutant = loading.VisionEncoder(dataclasses.replace(spec, rope=99.0))
    assert max(errors(mutant, params, model, pixels(spec, 1, GRIDS[1]))) > 1e-4


def test_the_full_vit_l(tmp_path):
    """DINOv2 L/14 at its own depth and 37 × 37 positions; every block."""
    spec = loading.VISION["facebook/dinov2-large"]
    model = models.at_unit_scale(hugging_face(spec))
    model.save_pretrained(tmp_path)
    module, params = loading.load_vision(str(tmp_path))
    assert max(errors(module, params, model, pixels(spec, 1, (5, 6)))) < 1e-5


@pytest.fixture(scope="module", params=clip_family.PRESETS)
def clip(request, tmp_path_factory):
    """A published CLIP at reduced depth: its folder, Hugging Face's model, the specs."""
    vision, text = clip_family.PRESETS[request.param]
    vision = dataclasses.replace(small(vision), grid=GRIDS[0][0])
    text = dataclasses.replace(
        text,
        transformer=dataclasses.replace(text.transformer, depth=DEPTH),
        vocabulary=514,
        end=513,
    )
    folder = tmp_path_factory.mktemp("clip")
    models.save_tokenizer(folder)

    def tower(blocks):
        return {
            "hidden_size": blocks.width, "num_hidden_layers": blocks.depth,
            "num_attention_heads": blocks.heads, "intermediate_size": blocks.mlp_width,
        }  # fmt: skip

    config = CLIPConfig(
        vision_config={
            **tower(vision.transformer),
            "patch_size": vision.patch,
            "image_size": vision.grid * vision.patch,
        },
        text_config={
            **tower(text.transformer), "vocab_size": 514,
            "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513,
        },
        projection_dim=vision.output,
    )  # fmt: skip
    model = models.at_unit_scale(CLIPModel(config))
    model.save_pretrained(folder)
    models.save_clip_processor(folder, vision.grid * vision.patch)
    return folder, model, vision, text


def dense_features(model, images):
    """Section 3.1 of the paper, word by word, in PyTorch."""
    vision = model.vision_model
    hidden = vision(images, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
    last = vision.encoder.layers[-1]
    values = last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(hidden[-2])))
    return model.visual_projection(vision.post_layernorm(values))[:, 1:]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_clip_towers_equal_hugging_face(clip, dtype, tolerance):
    folder, model, vision, text = clip
    if dtype == "bfloat16":
        model = copy.deepcopy(model).bfloat16()
        model.save_pretrained(folder / "half")
        models.save_tokenizer(folder / "half")
        models.save_clip_processor(folder / "half", vision.grid * vision.patch)
        folder, model = folder / "half", model.float()
    module, params = loading.load_clip_vision(str(folder), dtype)
    same = _in_float32(module.spec)
    assert same == vision
    for batch, grid in [(1, GRIDS[0]), (3, GRIDS[1])]:
        images = pixels(vision, batch, grid)
        hidden, output = blocks_and_output(module, params, images)
        theirs = torch.from_numpy(images.transpose(0, 3, 1, 2))
        with torch.no_grad():
            found = model.vision_model(
                theirs, output_hidden_states=True, interpolate_pos_encoding=True
            )
            cls = model.visual_projection(found.pooler_output)
            patches = dense_features(model, theirs)
        for ours, block in zip(hidden, found.hidden_states[1:], strict=True):
            assert relative_error(ours, block) < tolerance
        assert relative_error(output.cls, cls) < tolerance
        ours = np.asarray(output.patches).reshape(patches.shape)
        assert relative_error(ours, patches) < tolerance
    module, params, _ = loading.load_text(str(folder), dtype)
    assert _in_float32(module.spec) == text
    ids = np.asarray([[512, 70, 300, 513, 513], [512, 9, 513, 513, 513], [512, 1, 2, 3, 513]])
    with torch.no_grad():
        expected = model.get_text_features(input_ids=torch.from_numpy(ids)).pooler_output
    assert relative_error(module.apply({"params": params}, jnp.asarray(ids)), expected) < tolerance


def _in_float32(spec):
    blocks = dataclasses.replace(spec.transformer, dtype="float32")
    return dataclasses.replace(spec, transformer=blocks)


def test_every_published_size_has_shapes():
    """Without their weights: the parameters of the published models, counted."""
    counted = {}
    for name, spec in loading.VISION.items():
        counted[name] = _parameters(loading.VisionEncoder(spec), (1, 224, 224, 3))
    for name, (vision, text) in clip_family.PRESETS.items():
        module = loading.ClipVisionEncoder(vision)
        image = vision.grid * vision.patch
        counted[name] = _parameters(module, (1, image, image, 3))
        counted[name] += _parameters(loading.TextEncoder(text), (1, 77), jnp.int32)
    millions = {name: round(count / 1e6, 1) for name, count in counted.items()}
    assert millions["facebook/dinov2-small"] == 22.1
    assert millions["facebook/dinov2-base"] == 86.6
    assert millions["facebook/dinov2-large"] == 304.4
    assert millions["facebook/dinov2-giant"] == 1136.5
    for size in ("small", "base", "large", "giant"):
        width, name = loading.VISION[f"facebook/dinov2-{size}"].transformer.width, f"dinov2-{size}"
        registers = name.replace("dinov2", "dinov2-with-registers")
        assert counted[f"facebook/{registers}"] == counted[f"facebook/{name}"] + 4 * width
    assert millions["facebook/dinov3-vits16-pretrain-lvd1689m"] == 21.6
    assert millions["facebook/dinov3-vits16plus-pretrain-lvd1689m"] == 28.7
    assert millions["facebook/dinov3-vitb16-pretrain-lvd1689m"] == 85.7
    assert millions["facebook/dinov3-vitl16-pretrain-lvd1689m"] == 303.1
    assert millions["facebook/dinov3-vith16plus-pretrain-lvd1689m"] == 840.6
    assert millions["facebook/dinov3-vit7b16-pretrain-lvd1689m"] == 6716.0
    assert millions["openai/clip-vit-base-patch32"] == 151.3
    assert millions["openai/clip-vit-base-patch16"] == 149.6
    assert millions["openai/clip-vit-large-patch14"] == 427.6
    assert millions["openai/clip-vit-large-patch14-336"] == 427.9


def _parameters(module, shape, dtype=jnp.float32):
    example = jax.ShapeDtypeStruct(shape, dtype)
    params = jax.eval_shape(module.init, jax.random.key(0), example)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_weights_in_every_layout(tmp_path):
    """One file, several, PyTorch's own format: the same params; a missing part is named."""
    spec = small(loading.VISION["facebook/dinov2-small"])
    model = models.at_unit_scale(hugging_face(spec))
    model.save_pretrained(tmp_path / "one")
    _, expected = loading.load_vision(str(tmp_path / "one"))
    model.save_pretrained(tmp_path / "parts", max_shard_size="5MB")
    parts = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(parts) > 1
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    (tmp_path / "bin").mkdir()
    torch.save(tensors, tmp_path / "bin" / "pytorch_model.bin")
    config = (tmp_path / "one" / "config.json").read_text()
    (tmp_path / "bin" / "config.json").write_text(config)
    for layout in ("parts", "bin"):
        _, params = loading.load_vision(str(tmp_path / layout))
        jax.tree.map(np.testing.assert_array_equal, params, expected)
    parts[0].unlink()
    with pytest.raises(UserError, match=rf"lacks 1 of the {len(parts)} parts.*{parts[0].name}"):
        loading.load_vision(str(tmp_path / "parts"))


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("this must not be printed",)

    (tmp_path / "config.json").write_text(json.dumps(_CONFIG))
    torch.save({"cls": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin is refused or damaged"):
        loading.load_vision(str(tmp_path))


_CONFIG = {
    "model_type": "dinov2", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "mlp_ratio": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "patch_size": 14,
    "image_size": 28,
}  # fmt: skip


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("grid", [(32, 32), (24, 50), (37, 38), (3, 5)])
def test_positions_are_resized_as_torch_does(grid, antialias):
    table = np.random.default_rng(1).normal(size=(37 * 37, 5)).astype(np.float32)
    ours = positions.resize_positions(jnp.asarray(table), grid, antialias)
    square = torch.from_numpy(table.reshape(1, 37, 37, 5)).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(square, grid, mode="bicubic", antialias=antialias)
    # One unit in the last place of a sample point is 4e-6 of a patch.
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).reshape(-1, 5).numpy(), atol=1e-5)


@pytest.fixture
def photograph():
    """float32 [224, 336, 3] in [0, 255]: one that the hub's own tests use."""
    from huggingface_hub import hf_hub_download

    path = hf_hub_download("huggingface/cats-image", "cats_image.jpeg", repo_type="dataset")
    return resize(decode(Path(path).read_bytes()), (224, 336))


@pytest.mark.network
@pytest.mark.parametrize("name", loading.VISION)
def test_published_weights_on_a_photograph(name, photograph):
    """Needs a connection, and for DINOv3 leave to fetch it: `pytest -m network`."""
    module, params = loading.load_vision(name)
    model = AutoModel.from_pretrained(name).eval()
    assert module.spec == loading.VISION[name]
    normal = normalise(photograph, module.spec.mean, module.spec.std)[None].astype(np.float32)
    assert max(errors(module, params, model, normal)) < 1e-5


@pytest.mark.network
@pytest.mark.parametrize("name", clip_family.PRESETS)
def test_published_clip_on_a_photograph(name, photograph):
    vision, text = clip_family.PRESETS[name]
    module, params = loading.load_clip_vision(name)
    assert module.spec == vision
    model = CLIPModel.from_pretrained(name).eval()
    side = vision.grid * vision.patch
    normal = normalise(resize(photograph, (side, side)), vision.mean, vision.std)
    images = normal[None].astype(np.float32)
    ours = module.apply({"params": params}, jnp.asarray(images))
    theirs = torch.from_numpy(images.transpose(0, 3, 1, 2))
    with torch.no_grad():
        cls = model.visual_projection(model.vision_model(theirs).pooler_output)
        patches = dense_features(model, theirs)
    assert relative_error(ours.cls, cls) < 1e-5
    assert relative_error(np.asarray(ours.patches).reshape(patches.shape), patches) < 1e-5
    module, params, tokenizer = loading.load_text(name)
    ids = tokenizer(["a photo of a cat."], return_tensors="np")["input_ids"]
    with torch.no_grad():
        expected = model.get_text_features(input_ids=torch.from_numpy(ids)).pooler_output
    assert relative_error(module.apply({"params": params}, jnp.asarray(ids)), expected) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [255, 256, 1025])
def test_attention_head_by_head(tokens, dtype):
    """A CPU's way from 256 tokens on: values and gradients are those of jax.nn."""
    shape = (2, tokens, 3, 16)
    normal = [2 * jax.random.normal(jax.random.key(i), shape) for i in range(4)]
    query, key, value, weight = (x.astype(dtype) for x in normal)
    expected = jax.nn.dot_product_attention

    def loss(attend, *parts):
        return jnp.sum(attend(*parts).astype("float32") * weight)

    ours = functools.partial(transformer.attend, causal=False)
    results = [
        [f(query, key, value), *jax.grad(functools.partial(loss, f), (0, 1, 2))(query, key, value)]
        for f in (ours, expected)
    ]
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    for a, b in zip(*results, strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.abs(a - b).max() < tolerance * np.abs(b).max()


def test_when_flash_attention_is_there():
    def query(dtype, channels):
        return jnp.zeros((1, 2, 3, channels), dtype)

    assert transformer.has_flash(query("bfloat16", 64), 9.0)
    assert not transformer.has_flash(query("bfloat16", 64), 7.5)  # before Ampere
    assert not transformer.has_flash(query("bfloat16", 12), 9.0)
    assert not transformer.has_flash(query("bfloat16", 136), 9.0)
    assert not transformer.has_flash(query("float32", 64), 9.0)


def test_norms_where_the_mean_is_large():
    """E[x²] - E[x]² would be 1e-3 away."""
    x = np.random.default_rng(0).normal(size=(2, 5, 48)).astype(np.float32) + 100
    norm = transformer.layer_norm(transformer.Spec(48, 1, 4, 96))
    ours = norm.apply(norm.init(jax.random.key(0), x), x)
    theirs = torch.nn.functional.layer_norm(torch.from_numpy(x).double(), (48,), eps=1e-6)
    assert relative_error(ours, theirs) < 3e-5
