"""CLIP (Radford et al. 2021), OpenAI's: both towers, names of parameters, presets."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from fmbseg_jax.encoders.text import TextSpec
from fmbseg_jax.encoders.vision import Embedding, Tokens, VisionSpec, grid_of
from fmbseg_jax.nn.transformer import Block, Transformer, dense, layer_norm
from fmbseg_jax.pretrained import table
from fmbseg_jax.pretrained.config_json import blocks, clip_tower
from fmbseg_jax.pretrained.table import CONV, KEEP, TRANSPOSE, Entries, Table, norm


class ClipVisionEncoder(nn.Module):
    """CLIP's vision tower (Radford et al. 2021): features in the space of text, not normalised.

    `cls` is CLIP's image feature. `patches` are the dense features of the paper's section 3.1: the
    last block's value projection and its output, norm and projection; query and key are ignored.
    """

    spec: VisionSpec

    @nn.compact
    def __call__(self, images: Float[Array, "b H W 3"]) -> Tokens:
        spec, tower = self.spec, self.spec.transformer
        x = Embedding(spec, name="embedding")(images)
        x = layer_norm(tower, name="norm_before")(x)
        all_but_last = dataclasses.replace(tower, depth=tower.depth - 1)
        x = Transformer(all_but_last, name="transformer")(x)
        last = Block(tower, name="last")
        norm = layer_norm(tower, name="norm")
        project = dense(tower, spec.output, use_bias=False, name="projection")
        cls, patches = project(norm(last(x)[:, 0])), project(norm(last.values(x)[:, 1:]))
        return Tokens(cls, patches.reshape(x.shape[0], *grid_of(images, spec), spec.output))


def vision_spec(config: dict[str, Any]) -> VisionSpec:
    """From the config.json of a CLIPModel."""
    vision = clip_tower(config, "vision")
    return VisionSpec(
        transformer=blocks(vision),
        patch=vision["patch_size"],
        grid=vision["image_size"] // vision["patch_size"],
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        clip=True,
        output=config.get("projection_dim", 512),
    )


def text_spec(config: dict[str, Any]) -> TextSpec:
    """From the config.json of a CLIPModel."""
    text = clip_tower(config, "text")
    return TextSpec(
        transformer=dataclasses.replace(blocks(text), causal=True),
        vocabulary=text["vocab_size"],
        length=text["max_position_embeddings"],
        output=config.get("projection_dim", 512),
        end=text["vocab_size"] - 1,
    )


def vision_table(spec: VisionSpec) -> Table:
    """The vision tower in Hugging Face's CLIPModel."""
    entries: Entries = {
        "embedding/cls": ("vision_model.embeddings.class_embedding", KEEP),
        "embedding/positions": ("vision_model.embeddings.position_embedding.weight", KEEP),
        "embedding/patch/kernel": ("vision_model.embeddings.patch_embedding.weight", CONV),
        "projection/kernel": ("visual_projection.weight", TRANSPOSE),
        **norm("norm_before", "vision_model.pre_layrnorm"),  # their spelling
        **norm("norm", "vision_model.post_layernorm"),
    }
    last = spec.transformer.depth - 1
    for i in range(spec.transformer.depth):
        ours = "last" if i == last else f"transformer/block{i}"
        entries |= _block(ours, f"vision_model.encoder.layers.{i}")
    return Table(entries, r"text_model\..*|text_projection\..*|logit_scale|.*\.position_ids")


def text_table(spec: TextSpec) -> Table:
    """The text tower in Hugging Face's CLIPModel."""
    entries: Entries = {
        "tokens/embedding": ("text_model.embeddings.token_embedding.weight", KEEP),
        "positions": ("text_model.embeddings.position_embedding.weight", KEEP),
        "projection/kernel": ("text_projection.weight", TRANSPOSE),
        **norm("norm", "text_model.final_layer_norm"),
    }
    for i in range(spec.transformer.depth):
        entries |= _block(f"transformer/block{i}", f"text_model.encoder.layers.{i}")
    # The image tower, the temperature, and a buffer that older files hold.
    return Table(entries, r"vision_model\..*|visual_projection\..*|logit_scale|.*\.position_ids")


def _block(ours: str, theirs: str) -> Entries:
    entries: Entries = {}
    for name, their in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out")):
        entries |= table.dense(f"{ours}/attention/{name}", f"{theirs}.self_attn.{their}_proj")
    entries |= table.dense(f"{ours}/mlp/up", f"{theirs}.mlp.fc1")
    entries |= table.dense(f"{ours}/mlp/down", f"{theirs}.mlp.fc2")
    for j in (1, 2):
        entries |= norm(f"{ours}/norm{j}", f"{theirs}.layer_norm{j}")
    return entries


def _preset(
    vision: tuple[int, int, int], text: tuple[int, int], patch: int, output: int, image: int = 224
) -> tuple[VisionSpec, TextSpec]:
    """vision: width, depth, heads; text: width, heads."""
    width, depth, heads = vision
    config = {
        "projection_dim": output,
        "vision_config": {
            "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
            "intermediate_size": 4 * width, "image_size": image, "patch_size": patch,
        },
        "text_config": {
            "hidden_size": text[0], "num_attention_heads": text[1],
            "intermediate_size": 4 * text[0],
        },
    }  # fmt: skip
    return vision_spec(config), text_spec(config)


PRESETS: dict[str, tuple[VisionSpec, TextSpec]] = {
    "openai/clip-vit-base-patch32": _preset((768, 12, 12), (512, 8), 32, 512),
    "openai/clip-vit-base-patch16": _preset((768, 12, 12), (512, 8), 16, 512),
    "openai/clip-vit-large-patch14": _preset((1024, 24, 16), (768, 12), 14, 768),
    "openai/clip-vit-large-patch14-336": _preset((1024, 24, 16), (768, 12), 14, 768, image=336),
}
"""Vision and text tower of OpenAI's CLIP, by hub id."""
