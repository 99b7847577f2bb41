"""The frozen encoders: DINOv2 or v3 for patches, CLIP's towers for words and images.

A source is a folder in Hugging Face layout (config.json, safetensors) or a hub id. Sizes come from
config.json; `specs.VISION` and `specs.CLIP` have those of the published ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fmbseg_jax.encoders import specs, tables
from fmbseg_jax.encoders.specs import TextSpec, VisionSpec
from fmbseg_jax.errors import UserError
from fmbseg_jax.nn.positions import Rotation, resize_positions, rotary
from fmbseg_jax.nn.transformer import Block, Transformer, dense, layer_norm, precision
from fmbseg_jax.pretrained import checksums, config_json, hub, weights
from fmbseg_jax.pretrained.table import Table
from fmbseg_jax.pretrained.tokenizer import Tokenizer


class Tokens(NamedTuple):
    """What a vision encoder makes of images."""

    cls: Float[Array, "b d"]
    patches: Float[Array, "b h w d"]


class Embedding(nn.Module):
    """Images → class token, registers and patches, with their position embeddings.

    These are resized to the image's grid as Hugging Face does it: bicubic, by size, class token
    apart.
    """

    spec: VisionSpec

    @nn.compact
    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b t d"]:
        spec, width = self.spec, self.spec.transformer.width
        zeros, patch = nn.initializers.zeros, (spec.patch, spec.patch)
        x = nn.Conv(
            width, patch, patch, "VALID",
            use_bias=not spec.clip, precision=precision("float32"), name="patch",
        )(images)  # fmt: skip
        b, h, w, _ = x.shape
        x = x.reshape(b, h * w, width)
        first = self.param("cls", zeros, (width,))
        if not spec.rope:
            positions = self.param("positions", zeros, (spec.grid**2 + 1, width))
            first = first + positions[0]
            x = x + resize_positions(positions[1:], (h, w), spec.antialias)
        before = first[None]
        if spec.registers:
            before = jnp.concatenate(
                [before, self.param("registers", zeros, (spec.registers, width))]
            )
        return jnp.concatenate([jnp.broadcast_to(before, (b, *before.shape)), x], 1)


class VisionEncoder(nn.Module):
    """DINOv2 (Oquab et al. 2023) or v3: image → class token and patches, after the last norm."""

    spec: VisionSpec

    @nn.compact
    def __call__(self, images: Float[Array, "b H W 3"]) -> Tokens:
        spec, grid = self.spec, _grid(images, self.spec)
        x = Embedding(spec, name="embedding")(images)
        x = Transformer(spec.transformer, name="transformer")(x, _rotation(spec, grid))
        x = layer_norm(spec.transformer, name="norm")(x)
        patches = x[:, 1 + spec.registers :]
        return Tokens(x[:, 0], patches.reshape(x.shape[0], *grid, x.shape[-1]))


class ClipVisionEncoder(nn.Module):
    """CLIP's vision tower (Radford et al. 2021): features in the space of text, not normalised.

    `cls` is CLIP's image feature. `patches` are the dense features of the paper's section 3.1: the
    last block's value projection and its output, norm and projection; query and key are ignored.
    """

    spec: VisionSpec

    @nn.compact
    def __call__(self, images: Float[Array, "b H W 3"]) -> Tokens:
        spec, blocks = self.spec, self.spec.transformer
        x = Embedding(spec, name="embedding")(images)
        x = layer_norm(blocks, name="norm_before")(x)
        all_but_last = dataclasses.replace(blocks, depth=blocks.depth - 1)
        x = Transformer(all_but_last, name="transformer")(x)
        last = Block(blocks, name="last")
        norm = layer_norm(blocks, name="norm")
        project = dense(blocks, spec.output, use_bias=False, name="projection")
        cls, patches = project(norm(last(x)[:, 0])), project(norm(last.values(x)[:, 1:]))
        return Tokens(cls, patches.reshape(x.shape[0], *_grid(images, spec), spec.output))


def _grid(images: Array, spec: VisionSpec) -> tuple[int, int]:
    return images.shape[1] // spec.patch, images.shape[2] // spec.patch


def _rotation(spec: VisionSpec, grid: tuple[int, int]) -> Rotation | None:
    if not spec.rope:
        return None
    channels = spec.transformer.width // spec.transformer.heads
    return rotary(grid, 1 + spec.registers, channels, spec.rope)


class TextEncoder(nn.Module):
    """CLIP's text tower (Radford et al. 2021): token ids → projected features, not normalised."""

    spec: TextSpec

    @nn.compact
    def __call__(self, ids: Int[Array, "K l"]) -> Float[Array, "K D"]:
        spec, width = self.spec, self.spec.transformer.width
        positions = self.param("positions", nn.initializers.zeros, (spec.length, width))
        x = nn.Embed(spec.vocabulary, width, name="tokens")(ids).astype(jnp.float32)
        x = x + positions[: ids.shape[1]]
        x = Transformer(spec.transformer, name="transformer")(x)
        x = layer_norm(spec.transformer, name="norm")(x)
        # Padding follows the first end token; the mask is causal, so it changes nothing.
        end = jnp.argmax(ids == spec.end, axis=1)
        x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        return dense(spec.transformer, spec.output, use_bias=False, name="projection")(x)


def load_vision(source: str, dtype: str = "float32") -> tuple[VisionEncoder, dict[str, Any]]:
    """A DINOv2 (with or without registers) or DINOv3 ViT as a Flax module and its params.

    Args:
      source: a folder in Hugging Face layout, a hub id, or a DINOv2 file of Meta's torch.hub.
      dtype: "float32" or "bfloat16": what matrices are kept and multiplied in.

    Raises:
      UserError: there is no such checkpoint, or it is of another kind.
    """
    folder = hub.locate(source)
    spec, table = vision_tower(folder, source)
    module = VisionEncoder(_with_dtype(spec, dtype))
    return module, weights.convert(folder, table, module, _example(spec))


def vision_spec(source: str) -> VisionSpec:
    """The vision encoder of `load_vision`, without loading it."""
    return vision_tower(hub.locate(source), source)[0]


def vision_tower(folder: Path, source: str) -> tuple[VisionSpec, Table]:
    """The spec of a published vision encoder, and the names of its tensors."""
    if folder.is_file():
        return _tower_of_torch_hub(folder)
    kinds = {
        "dinov2": (specs.dinov2, tables.dinov2),
        "dinov2_with_registers": (specs.dinov2, tables.dinov2),
        "dinov3_vit": (specs.dinov3, tables.dinov3),
    }
    config = config_json.read(folder, source)
    describe, table = kinds[
        config_json.check_kind(config, source, config_json.DINO, "the vision encoder")
    ]
    spec = _described(describe, config, source)
    mean, std = config_json.normalisation(folder, source, (spec.mean, spec.std))
    return dataclasses.replace(spec, mean=mean, std=std), table(spec)


def _tower_of_torch_hub(file: Path) -> tuple[VisionSpec, Table]:
    checksums.check(file)
    files = weights.read_files(file)
    if "rope_embed.periods" in files:
        raise UserError(
            f"{file} is DINOv3 in Meta's own layout, which is not read; give it in Hugging Face's, "
            "such as facebook/dinov3-vitb16-pretrain-lvd1689m."
        )
    try:
        spec = specs.dinov2_of_torch_hub({name: read().shape for name, read in files.items()})
    except KeyError as error:
        raise UserError(
            f"{file} is no DINOv2 of torch.hub: it has no tensor {error}. Give dinov2_vitb14_"
            "pretrain.pth or one like it, or a hub id such as facebook/dinov2-base."
        ) from None
    return spec, tables.dinov2_of_torch_hub(spec)


def is_clip(folder: Path, source: str) -> bool:
    """Whether a published model is a CLIP."""
    return (
        folder.is_dir() and config_json.read(folder, source).get("model_type") == config_json.CLIP
    )


def load_clip_vision(
    source: str, dtype: str = "float32"
) -> tuple[ClipVisionEncoder, dict[str, Any]]:
    """A CLIP checkpoint's vision tower as a Flax module and its params; see `load_vision`."""
    folder = hub.locate(source)
    config_json.normalisation(folder, source)  # without it words can be used, images cannot
    spec, table = clip_vision_tower(folder, source)
    module = ClipVisionEncoder(_with_dtype(spec, dtype))
    return module, weights.convert(folder, table, module, _example(spec))


def clip_vision_tower(folder: Path, source: str) -> tuple[VisionSpec, Table]:
    """The spec of a CLIP's vision tower, and the names of its tensors."""
    spec = _described(specs.clip_vision, config_json.read_clip(folder, source), source)
    mean, std = config_json.normalisation(folder, source, (spec.mean, spec.std))
    return dataclasses.replace(spec, mean=mean, std=std), tables.clip_vision(spec)


def load_text(source: str, dtype: str = "float32") -> tuple[TextEncoder, dict[str, Any], Tokenizer]:
    """A CLIP checkpoint's text tower as a Flax module, its params, and its tokenizer.

    Raises:
      UserError: there is no such checkpoint, or it is not a CLIP.
    """
    folder = hub.locate(source)
    spec, table = text_tower(folder, source)
    tokenizer = Tokenizer(folder, spec.vocabulary, spec.length)
    module = TextEncoder(_with_dtype(dataclasses.replace(spec, end=tokenizer.end), dtype))
    params = weights.convert(folder, table, module, jnp.zeros((1, spec.length), jnp.int32))
    return module, params, tokenizer


def text_spec(source: str) -> TextSpec:
    """The text tower of a CLIP checkpoint, without loading it."""
    return text_tower(hub.locate(source), source)[0]


def text_tower(folder: Path, source: str) -> tuple[TextSpec, Table]:
    """The spec of a CLIP's text tower, and the names of its tensors."""
    spec = _described(specs.clip_text, config_json.read_clip(folder, source), source)
    return spec, tables.clip_text(spec)


def _example(spec: VisionSpec) -> Array:
    return jnp.zeros((1, spec.patch, spec.patch, 3), jnp.float32)


def _with_dtype(spec: Any, dtype: str) -> Any:
    return dataclasses.replace(spec, transformer=dataclasses.replace(spec.transformer, dtype=dtype))


def _described(describe: Callable[[Any], Any], config: dict[str, Any], source: str) -> Any:
    try:
        return describe(config)
    except KeyError as error:
        fault = f"lacks {error}"
    except UserError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        fault = f"describes no model: {error}"
    raise UserError(
        f"The config.json of {source} {fault}. Take it from where the model is published."
    )
