"""The frozen encoders: DINOv2 for patches, CLIP's text tower for words.

A source is a folder in Hugging Face layout (config.json, safetensors) or a hub id. Sizes come from
config.json: ViT-S to ViT-L, and smaller ones, alike.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fmbseg_jax import hub
from fmbseg_jax.errors import UserError
from fmbseg_jax.models import weights
from fmbseg_jax.models.transformer import ACTIVATIONS, Spec, Transformer, bicubic

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Tokens(NamedTuple):
    """What a vision encoder makes of images."""

    cls: Float[Array, "b d"]
    patches: Float[Array, "b h w d"]


@dataclasses.dataclass(frozen=True)
class VisionSpec:
    """A vision tower: its transformer, its patches, and how its input is normalised."""

    transformer: Spec
    patch: int
    """Side of a patch in pixels."""
    grid: int
    """Side of the grid of patches that it was trained on."""
    mean: tuple[float, ...]
    """Of the pixels in [0, 1], by channel."""
    std: tuple[float, ...]


class VisionEncoder(nn.Module):
    """DINOv2 (Oquab et al. 2023): image → class token and patch tokens, after the last norm.

    The position embeddings are resized to the image's grid as Hugging Face does it: bicubic, by
    size, class token apart.
    """

    spec: VisionSpec

    @nn.compact
    def __call__(self, images: Float[Array, "b H W 3"]) -> Tokens:
        spec, width = self.spec, self.spec.transformer.width
        patch = (spec.patch, spec.patch)
        x = nn.Conv(width, patch, patch, "VALID", name="patch")(images)
        b, h, w, _ = x.shape
        cls = self.param("cls", nn.initializers.zeros, (width,))
        positions = self.param("positions", nn.initializers.zeros, (spec.grid**2 + 1, width))
        x = x.reshape(b, h * w, width) + resize_positions(positions[1:], (h, w))
        first = jnp.broadcast_to(cls + positions[0], (b, 1, width))
        x = Transformer(spec.transformer, name="transformer")(jnp.concatenate([first, x], 1))
        x = nn.LayerNorm(spec.transformer.epsilon, name="norm")(x)
        return Tokens(x[:, 0], x[:, 1:].reshape(b, h, w, width))


def resize_positions(positions: Float[Array, "n d"], grid: tuple[int, int]) -> Float[Array, "m d"]:
    """Position embeddings of a square grid → those of `grid` = (h, w), row by row."""
    side = round(positions.shape[0] ** 0.5)
    if grid == (side, side):
        return positions
    square = positions.reshape(side, side, -1)
    resized = jnp.einsum("hi,wj,ijd->hwd", bicubic(side, grid[0]), bicubic(side, grid[1]), square)
    return resized.reshape(grid[0] * grid[1], -1)


@dataclasses.dataclass(frozen=True)
class TextSpec:
    """A text tower."""

    transformer: Spec
    vocabulary: int
    length: int
    """Most tokens of a sentence, its start and end included."""
    output: int
    """D, width of the space shared with images."""
    end: int
    """Id of the end-of-text token, whose state stands for the sentence."""


class TextEncoder(nn.Module):
    """CLIP's text tower (Radford et al. 2021): token ids → projected features, not normalised."""

    spec: TextSpec

    @nn.compact
    def __call__(self, ids: Int[Array, "K l"]) -> Float[Array, "K D"]:
        spec, width = self.spec, self.spec.transformer.width
        positions = self.param("positions", nn.initializers.zeros, (spec.length, width))
        x = nn.Embed(spec.vocabulary, width, name="tokens")(ids) + positions[: ids.shape[1]]
        x = Transformer(spec.transformer, name="transformer")(x)
        x = nn.LayerNorm(spec.transformer.epsilon, name="norm")(x)
        # Padding follows the first end token; the mask is causal, so it changes nothing.
        end = jnp.argmax(ids == spec.end, axis=1)
        x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        return nn.Dense(spec.output, use_bias=False, name="projection")(x)


def load_vision(source: str) -> tuple[VisionEncoder, dict[str, Any]]:
    """A DINOv2 checkpoint as a Flax module and its float32 params.

    Raises:
      UserError: there is no such checkpoint, or it is not a DINOv2 that we know.
    """
    folder = hub.locate(source)
    config = _config(folder, source)
    if config.get("model_type") != "dinov2" or config.get("use_swiglu_ffn"):
        raise UserError(
            f"{source} is a {config.get('model_type')!r} model; the vision encoder is a DINOv2 of "
            "size S, B or L, such as facebook/dinov2-base."
        )
    processor = _preprocessor(folder)
    spec = VisionSpec(
        transformer=Spec(
            width=config["hidden_size"],
            depth=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            mlp_width=config["hidden_size"] * config["mlp_ratio"],
            activation=_activation(config, source),
            epsilon=config["layer_norm_eps"],
            layer_scale=True,
        ),
        patch=config["patch_size"],
        grid=config["image_size"] // config["patch_size"],
        mean=tuple(processor.get("image_mean", _IMAGENET[0])),
        std=tuple(processor.get("image_std", _IMAGENET[1])),
    )
    module = VisionEncoder(spec)
    example = jnp.zeros((1, spec.patch, spec.patch, 3))
    table = weights.dinov2(spec.transformer.depth)
    return module, weights.convert(folder, table, module, example)


def load_text(source: str) -> tuple[TextEncoder, dict[str, Any], Any]:
    """A CLIP checkpoint's text tower as a Flax module, its float32 params, and its tokenizer.

    Raises:
      UserError: there is no such checkpoint, or it is not a CLIP.
    """
    from transformers import CLIPTokenizer  # half a second that programs without words save

    folder = hub.locate(source)
    config = _config(folder, source)
    if config.get("model_type") != "clip":
        raise UserError(
            f"{source} is a {config.get('model_type')!r} model; words need a CLIP, such as "
            "openai/clip-vit-base-patch16."
        )
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    text = _CLIP_TEXT_DEFAULTS | config["text_config"]
    spec = TextSpec(
        transformer=Spec(
            width=text["hidden_size"],
            depth=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            mlp_width=text["intermediate_size"],
            activation=_activation(text, source),
            epsilon=text["layer_norm_eps"],
            causal=True,
        ),
        vocabulary=text["vocab_size"],
        length=text["max_position_embeddings"],
        output=config.get("projection_dim", 512),
        end=tokenizer.eos_token_id,
    )
    module = TextEncoder(spec)
    table = weights.clip_text(spec.transformer.depth)
    params = weights.convert(folder, table, module, jnp.zeros((1, spec.length), jnp.int32))
    return module, params, tokenizer


# Older published configs hold only what differs from these (transformers' CLIPTextConfig).
_CLIP_TEXT_DEFAULTS: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}


def _config(folder: Path, source: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{source} has no config.json; give a folder in Hugging Face layout.")
    return json.loads(path.read_text())


def _preprocessor(folder: Path) -> dict[str, Any]:
    path = folder / "preprocessor_config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _activation(config: dict[str, Any], source: str) -> str:
    if config["hidden_act"] not in ACTIVATIONS:
        raise UserError(
            f"{source} has the activation {config['hidden_act']!r}, which is not one of "
            f"{', '.join(ACTIVATIONS)}."
        )
    return config["hidden_act"]
