"""Random models, saved in the formats of the published ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3], smooth patches of colour."""
    from fmbseg_jax.data import images

    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), np.uint8)
    return images.resize(coarse, (height, width))


def at_unit_scale(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draws every parameter so that activations stay near 1, far into every nonlinearity.

    A model as it is initialised (weights of 0.02, biases of 0) hides a wrong activation or epsilon
    below rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "lambda" in name or ("norm" in name and name.endswith("weight")):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim < 2:
                parameter.copy_(0.3 * noise)
            elif "embed" in name and "projection" not in name or "token" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(1.5 * parameter[0].numel() ** -0.5 * noise)
    return model.eval()


def save_dinov2(folder: Path, *, width=48, depth=3, heads=4, image=70, patch=14) -> Dinov2Model:
    """A Dinov2Model folder; returns the model."""
    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, mlp_ratio=4,
        image_size=image, patch_size=patch, layer_norm_eps=1e-6,
    )  # fmt: skip
    model = at_unit_scale(Dinov2Model(config))
    model.save_pretrained(folder)
    processor = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def save_clip(
    folder: Path, *, width=32, depth=2, heads=4, image=32, patch=8, output=24
) -> CLIPModel:
    """A CLIPModel folder with a byte-level tokenizer (any word is spelled); returns the model."""
    size = save_tokenizer(folder)
    tower = {
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }
    end = {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    config = CLIPConfig(
        text_config={
            "hidden_size": width,
            "vocab_size": size,
            "max_position_embeddings": 77,
            **tower,
            **end,
        },
        vision_config={"hidden_size": width, "image_size": image, "patch_size": patch, **tower},
        projection_dim=output,
    )
    model = at_unit_scale(CLIPModel(config))
    model.save_pretrained(folder)
    save_clip_processor(folder, image)
    return model


def save_clip_processor(folder: Path, image: int) -> None:
    """preprocessor_config.json of a CLIP."""
    processor = {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "size": {"shortest_edge": image},
        "crop_size": {"height": image, "width": image},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def save_tokenizer(folder: Path) -> int:
    """vocab.json and merges.txt of a byte-level BPE without a merge; returns the size."""
    folder.mkdir(parents=True, exist_ok=True)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [256 + i for i in range(256 - len(printable))]
    letters = [chr(code) for code in printable + others]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": tokens[-2], "eos_token": tokens[-1], "pad_token": tokens[-1]}
    settings = {"tokenizer_class": "CLIPTokenizer", "unk_token": tokens[-1], **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(tokens)


def save_aligner(folder: Path, root: Path, kind: str = "mlp", **protocol) -> Path:
    """A random aligner, exported, over the encoders root/dinov2 and root/clip; returns `folder`."""
    import jax
    import jax.numpy as jnp

    from fmbseg_jax import config as config_lib
    from fmbseg_jax.encoders import identity, loading
    from fmbseg_jax.nn import aligner
    from fmbseg_jax.sharing import exports

    config = config_lib.Config()
    sizes = {"short_side": 70, "window": 70, "stride": 35} | protocol
    for name, value in sizes.items():
        setattr(config.eval, name, value)
    vision, clip = root / "dinov2", root / "clip"
    described = {"kind": kind, "output": loading.text_spec(str(clip)).output}
    described |= {"mlp_ratio": 2, "heads": 4}
    width = loading.vision_spec(str(vision)).transformer.width
    params = aligner.create(**described).init(jax.random.key(0), jnp.zeros((1, 4, width)))["params"]
    model = {
        "aligner": described,
        "vision": {"source": str(vision), "hash": identity.content_hash(str(vision))},
        "clip": {"source": str(clip), "hash": identity.content_hash(str(clip))},
        "words": ["sky", "grass"],
        "images": 0,
        "steps": 0,
        "config": config_lib.flatten(config),
        "versions": {},
    }
    exports.save_export(folder, exports.Export(params, model), "# An aligner of random numbers\n")
    return folder
