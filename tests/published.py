"""Small folders with the files, the names of tensors and the settings of published repositories.

Written out by hand, not saved by transformers, whose names in memory and on disk change with its
versions. `{i}` in a name stands for the index of a block.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import torch
from safetensors.torch import save_file

DEPTH, WIDTH, HEADS = 2, 24, 2
Shapes = dict[str, tuple[int, ...]]


def _linear(name: str, outputs: int, inputs: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def _norms(*names: str) -> Shapes:
    return {f"{name}.{kind}": (WIDTH,) for name in names for kind in ("weight", "bias")}


def _blocks(block: Shapes) -> Shapes:
    return {name.format(i=i): shape for i in range(DEPTH) for name, shape in block.items()}


def dinov2(registers: int = 0, gated: bool = False) -> Shapes:
    """facebook/dinov2-*, and with registers; the table of positions is that of 5 × 5 patches."""
    at = "encoder.layer.{i}"
    block = _norms(f"{at}.norm1", f"{at}.norm2")
    for name in ("attention.attention.query", "attention.attention.key"):
        block |= _linear(f"{at}.{name}", WIDTH, WIDTH)
    block |= _linear(f"{at}.attention.attention.value", WIDTH, WIDTH)
    block |= _linear(f"{at}.attention.output.dense", WIDTH, WIDTH)
    block |= {f"{at}.layer_scale{j}.lambda1": (WIDTH,) for j in (1, 2)}
    if gated:  # 2/3 of four times the width, in eights
        block |= _linear(f"{at}.mlp.weights_in", 128, WIDTH)
        block |= _linear(f"{at}.mlp.weights_out", WIDTH, 64)
    else:
        block |= _linear(f"{at}.mlp.fc1", 4 * WIDTH, WIDTH)
        block |= _linear(f"{at}.mlp.fc2", WIDTH, 4 * WIDTH)
    embeddings: Shapes = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.mask_token": (1, WIDTH),
        "embeddings.position_embeddings": (1, 26, WIDTH),
        "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,),
    }
    if registers:
        embeddings["embeddings.register_tokens"] = (1, registers, WIDTH)
    return embeddings | _blocks(block) | _norms("layernorm")


def dinov2_config(registers: int = 0, gated: bool = False) -> dict[str, Any]:
    config = {
        "architectures": ["Dinov2Model"], "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
        "hidden_size": WIDTH, "image_size": 70, "initializer_range": 0.02, "layer_norm_eps": 1e-06,
        "layerscale_value": 1.0, "mlp_ratio": 4, "model_type": "dinov2",
        "num_attention_heads": HEADS, "num_channels": 3, "num_hidden_layers": DEPTH,
        "patch_size": 14, "qkv_bias": True, "torch_dtype": "float32",
        "transformers_version": "4.32.0.dev0", "use_swiglu_ffn": gated,
    }  # fmt: skip
    if registers:
        config |= {
            "architectures": ["Dinov2WithRegistersModel"], "model_type": "dinov2_with_registers",
            "num_register_tokens": registers, "interpolate_antialias": True,
            "interpolate_offset": 0.0,
        }  # fmt: skip
    return config


def dinov3(gated: bool = False, query_and_value_bias: bool = True) -> Shapes:
    """facebook/dinov3-vit*."""
    at = "layer.{i}"
    block = _norms(f"{at}.norm1", f"{at}.norm2")
    for letter, bias in zip("qkvo", (query_and_value_bias, False) * 2, strict=True):
        block |= _linear(f"{at}.attention.{letter}_proj", WIDTH, WIDTH, bias or letter == "o")
    block |= {f"{at}.layer_scale{j}.lambda1": (WIDTH,) for j in (1, 2)}
    for name in ("up_proj", "gate_proj") if gated else ("up_proj",):
        block |= _linear(f"{at}.mlp.{name}", 64, WIDTH)
    block |= _linear(f"{at}.mlp.down_proj", WIDTH, 64)
    embeddings: Shapes = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.mask_token": (1, 1, WIDTH),
        "embeddings.register_tokens": (1, 4, WIDTH),
        "embeddings.patch_embeddings.weight": (WIDTH, 3, 16, 16),
        "embeddings.patch_embeddings.bias": (WIDTH,),
    }
    return embeddings | _blocks(block) | _norms("norm")


def dinov3_config(gated: bool = False, query_and_value_bias: bool = True) -> dict[str, Any]:
    return {
        "architectures": ["DINOv3ViTModel"], "attention_dropout": 0.0, "drop_path_rate": 0.0,
        "hidden_act": "silu" if gated else "gelu", "hidden_size": WIDTH, "image_size": 224,
        "initializer_range": 0.02, "intermediate_size": 64, "key_bias": False,
        "layer_norm_eps": 1e-05, "layerscale_value": 1.0, "mlp_bias": True,
        "model_type": "dinov3_vit", "num_attention_heads": HEADS, "num_channels": 3,
        "num_hidden_layers": DEPTH, "num_register_tokens": 4, "patch_size": 16,
        "pos_embed_jitter": None, "pos_embed_rescale": 2.0, "pos_embed_shift": None,
        "proj_bias": True, "query_bias": query_and_value_bias, "rope_theta": 100.0,
        "torch_dtype": "float32", "transformers_version": "4.56.0.dev0", "use_gated_mlp": gated,
        "value_bias": query_and_value_bias,
    }  # fmt: skip


CLIP_OUTPUT, CLIP_TOKENS = 16, 514


def clip(buffers: bool) -> Shapes:
    """openai/clip-vit-*; older files hold two buffers, position_ids, as well."""
    shapes: Shapes = {
        "logit_scale": (),
        "text_projection.weight": (CLIP_OUTPUT, WIDTH),
        "visual_projection.weight": (CLIP_OUTPUT, WIDTH),
        "text_model.embeddings.token_embedding.weight": (CLIP_TOKENS, WIDTH),
        "text_model.embeddings.position_embedding.weight": (77, WIDTH),
        "vision_model.embeddings.class_embedding": (WIDTH,),
        "vision_model.embeddings.patch_embedding.weight": (WIDTH, 3, 8, 8),
        "vision_model.embeddings.position_embedding.weight": (17, WIDTH),
        **_norms("text_model.final_layer_norm", "vision_model.pre_layrnorm"),
        **_norms("vision_model.post_layernorm"),
    }
    for tower in ("text_model", "vision_model"):
        at = f"{tower}.encoder.layers.{{i}}"
        block = _norms(f"{at}.layer_norm1", f"{at}.layer_norm2")
        for name in ("k_proj", "out_proj", "q_proj", "v_proj"):
            block |= _linear(f"{at}.self_attn.{name}", WIDTH, WIDTH)
        block |= _linear(f"{at}.mlp.fc1", 4 * WIDTH, WIDTH)
        block |= _linear(f"{at}.mlp.fc2", WIDTH, 4 * WIDTH)
        shapes |= _blocks(block)
    if buffers:
        shapes |= {"text_model.embeddings.position_ids": (1, 77)}
        shapes |= {"vision_model.embeddings.position_ids": (1, 17)}
    return shapes


def clip_config(activation: str = "quick_gelu", twice: bool = False) -> dict[str, Any]:
    """twice: sizes stand in text_config_dict and vision_config_dict as well."""
    sizes = {
        "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": HEADS,
        "num_hidden_layers": DEPTH, "projection_dim": CLIP_OUTPUT,
    }  # fmt: skip
    text = {**sizes, "max_position_embeddings": 77, "vocab_size": CLIP_TOKENS}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    usual = {"attention_dropout": 0.0, "hidden_act": activation, "layer_norm_eps": 1e-05}
    # The published files name 2 as the end of a sentence, which it is not.
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    return {
        "architectures": ["CLIPModel"], "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592, "model_type": "clip", "projection_dim": CLIP_OUTPUT,
        "text_config": {**text, **usual, **ids, "model_type": "clip_text_model"},
        "text_config_dict": text if twice else None,
        "vision_config": {**vision, **usual, "model_type": "clip_vision_model"},
        "vision_config_dict": vision if twice else None,
        "torch_dtype": "float32", "transformers_version": None,
    }  # fmt: skip


def tensors(shapes: Shapes, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random values at unit scale, so that a wrong activation or epsilon shows."""
    generator, values = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("position_ids"):
            values[name] = torch.arange(shape[1])[None]
        elif "norm" in name and name.endswith("weight") or "lambda" in name or "gamma" in name:
            values[name] = 1 + 0.3 * noise
        elif len(shape) > 1 and not ("embed" in name and "patch" not in name or "token" in name):
            values[name] = 1.5 * noise[0].numel() ** -0.5 * noise
        else:
            values[name] = noise if len(shape) > 1 else 0.3 * noise
    return values


def write_weights(folder: Path, values: dict[str, torch.Tensor], files: str) -> None:
    """files: "safetensors", "bin", or one of these in two "parts" with their index."""
    kind, _, parts = files.partition(" ")
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    names, count = sorted(values), 2 if parts else 1
    where = {}
    for i in range(count):
        part = f"-{i + 1:05}-of-{count:05}" if parts else ""
        some = {name: values[name].contiguous() for name in names[i::count]}
        file = f"{stem}{part}.{kind}"
        where |= dict.fromkeys(some, file)
        if kind == "bin":
            torch.save(some, folder / file)
        else:
            save_file(some, folder / file, metadata={"format": "pt"})
    if parts:
        index = {"metadata": {}, "weight_map": where}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))


_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_OPENAI = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
PROCESSORS: dict[str, dict[str, Any]] = {
    "dinov2": {**_IMAGENET, "image_processor_type": "BitImageProcessor", "rescale_factor": 1 / 255},
    "dinov3": {
        **_IMAGENET,
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "crop_size": None,
    },
    "clip": {
        **_OPENAI,
        "crop_size": 32,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "size": 32,
    },
}


def write_folder(
    folder: Path,
    config: dict[str, Any],
    values: dict[str, torch.Tensor],
    family: str,
    files: str = "safetensors",
    modern: bool = False,
) -> Path:
    """A published folder; `modern`: with the processor_config.json of transformers 5."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    processor = PROCESSORS[family]
    name = "processor_config.json" if modern else "preprocessor_config.json"
    processor = (
        {"image_processor": processor, "processor_class": "CLIPProcessor"} if modern else processor
    )
    (folder / name).write_text(json.dumps(processor, indent=2))
    if family == "clip":
        assert models.save_tokenizer(folder) == CLIP_TOKENS
    write_weights(folder, values, files)
    return folder
