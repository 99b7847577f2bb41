"""What one encoder differs in from another: from a published config.json, or by name.

`VISION` and `CLIP` hold the published models, so that their architectures can be built, counted and
tested without their files.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from fmbseg_jax.nn.transformer import ACTIVATIONS, Spec
from fmbseg_jax.pretrained.config_json import clip_tower


@dataclasses.dataclass(frozen=True)
class VisionSpec:
    """A vision tower: its transformer, its patches, and how its input is normalised."""

    transformer: Spec
    patch: int
    """Side of a patch in pixels."""
    grid: int
    """Side of the grid of patches that it was trained on."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Of the pixels in [0, 1], by channel; ImageNet's."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    registers: int = 0
    """Learned tokens beside the class token, dropped at the end (Darcet et al. 2023)."""
    antialias: bool = False
    """Position embeddings are resized with antialiasing: DINOv2 with registers."""
    rope: float = 0.0
    """Base of rotary positions in the place of learned ones: DINOv3. 0: learned ones."""
    clip: bool = False
    """CLIP's vision tower: a norm before the blocks, no bias of the patches, a projection."""
    output: int = 0
    """D, CLIP's projection."""

    def __post_init__(self) -> None:
        """Raises ValueError where these are no sizes of a vision tower."""
        _check_range("the patch", self.patch, 1, 1024)
        _check_range("the grid of patches", self.grid, 1, 4096)
        _check_range("the number of registers", self.registers, 0, 1024)
        _check_range("the width of the projection", self.output, 0, 65_536)
        if type(self.rope) not in (int, float) or not 0 <= self.rope < 1e9:
            raise ValueError(f"the base of its rotary positions is {self.rope!r}")


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

    def __post_init__(self) -> None:
        """Raises ValueError where these are no sizes of a text tower."""
        _check_range("the vocabulary", self.vocabulary, 1, 10_000_000)
        _check_range("the length of a sentence", self.length, 1, 65_536)
        _check_range("the width of the projection", self.output, 1, 65_536)


def _check_range(name: str, value: Any, least: int, most: int) -> None:
    """A config.json may be another person's: beyond these, memory has no bound."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}, not a whole number from {least} to {most}")


def dinov2(config: dict[str, Any]) -> VisionSpec:
    """From the config.json of a Dinov2Model, or one with registers."""
    width, gated = config["hidden_size"], bool(config.get("use_swiglu_ffn"))
    hidden = int(width * config["mlp_ratio"])
    if gated:  # two thirds of it, in eights: as many parameters as without a gate
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    return VisionSpec(
        transformer=Spec(
            width=width,
            depth=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            mlp_width=hidden,
            activation="silu" if gated else _activation(config),
            epsilon=config["layer_norm_eps"],
            layer_scale=True,
            gated=gated,
        ),
        patch=config["patch_size"],
        grid=config["image_size"] // config["patch_size"],
        registers=config.get("num_register_tokens", 0),
        antialias="num_register_tokens" in config,
    )


def dinov2_of_torch_hub(shapes: Mapping[str, tuple[int, ...]]) -> VisionSpec:
    """From the shapes in a file of Meta's torch.hub, which has no config.json beside it."""
    _, positions, width = shapes["pos_embed"]
    gated = "blocks.0.mlp.w12.weight" in shapes
    hidden = shapes["blocks.0.mlp.w3.weight" if gated else "blocks.0.mlp.fc2.weight"][1]
    registers = shapes.get("register_tokens", (1, 0, width))[1]
    return VisionSpec(
        transformer=Spec(
            width=width,
            depth=sum(name.endswith(".ls1.gamma") for name in shapes),
            heads=width // 64,  # of all DINOv2
            mlp_width=hidden,
            activation="silu" if gated else "gelu",
            epsilon=1e-6,
            layer_scale=True,
            gated=gated,
        ),
        patch=shapes["patch_embed.proj.weight"][-1],
        grid=math.isqrt(positions - 1),
        registers=registers,
        antialias=registers > 0,
    )


def dinov3(config: dict[str, Any]) -> VisionSpec:
    """From the config.json of a DINOv3ViTModel."""
    return VisionSpec(
        transformer=dataclasses.replace(
            _blocks(config),
            layer_scale=True,
            gated=config["use_gated_mlp"],
            query_bias=config.get("query_bias", True),  # the 7B model has none of the three
            key_bias=config["key_bias"],
            value_bias=config.get("value_bias", True),
        ),
        patch=config["patch_size"],
        grid=config["image_size"] // config["patch_size"],
        registers=config["num_register_tokens"],
        rope=config.get("rope_theta") or config["rope_parameters"]["rope_theta"],
    )


def clip_vision(config: dict[str, Any]) -> VisionSpec:
    """From the config.json of a CLIPModel."""
    vision = clip_tower(config, "vision")
    return VisionSpec(
        transformer=_blocks(vision),
        patch=vision["patch_size"],
        grid=vision["image_size"] // vision["patch_size"],
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        clip=True,
        output=config.get("projection_dim", 512),
    )


def clip_text(config: dict[str, Any]) -> TextSpec:
    """From the config.json of a CLIPModel."""
    text = clip_tower(config, "text")
    return TextSpec(
        transformer=dataclasses.replace(_blocks(text), causal=True),
        vocabulary=text["vocab_size"],
        length=text["max_position_embeddings"],
        output=config.get("projection_dim", 512),
        end=text["vocab_size"] - 1,
    )


def _blocks(tower: dict[str, Any]) -> Spec:
    """As DINOv3 and CLIP name the sizes."""
    return Spec(
        width=tower["hidden_size"],
        depth=tower["num_hidden_layers"],
        heads=tower["num_attention_heads"],
        mlp_width=tower["intermediate_size"],
        activation=_activation(tower),
        epsilon=tower["layer_norm_eps"],
    )


def _activation(config: dict[str, Any]) -> str:
    if config["hidden_act"] not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"its activation, {config['hidden_act']!r}, is not one of {known}")
    return config["hidden_act"]


def _dinov2(width: int, depth: int, heads: int, registers: int = 0) -> VisionSpec:
    gated = width == 1536  # g
    config = {
        "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
        "mlp_ratio": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "use_swiglu_ffn": gated,
        "image_size": 518, "patch_size": 14,
    }  # fmt: skip
    return dinov2(config | ({"num_register_tokens": registers} if registers else {}))


def _dinov3(
    width: int, depth: int, heads: int, hidden: int, gated: bool = False, qv_bias: bool = True
) -> VisionSpec:
    return dinov3(
        {
            "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
            "intermediate_size": hidden, "hidden_act": "silu" if gated else "gelu",
            "layer_norm_eps": 1e-5, "use_gated_mlp": gated, "query_bias": qv_bias,
            "key_bias": False, "value_bias": qv_bias, "rope_theta": 100.0,
            "num_register_tokens": 4, "image_size": 224, "patch_size": 16,
        }
    )  # fmt: skip


def _clip(
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
    return clip_vision(config), clip_text(config)


VISION: dict[str, VisionSpec] = {
    "facebook/dinov2-small": _dinov2(384, 12, 6),
    "facebook/dinov2-base": _dinov2(768, 12, 12),
    "facebook/dinov2-large": _dinov2(1024, 24, 16),
    "facebook/dinov2-giant": _dinov2(1536, 40, 24),
    "facebook/dinov2-with-registers-small": _dinov2(384, 12, 6, registers=4),
    "facebook/dinov2-with-registers-base": _dinov2(768, 12, 12, registers=4),
    "facebook/dinov2-with-registers-large": _dinov2(1024, 24, 16, registers=4),
    "facebook/dinov2-with-registers-giant": _dinov2(1536, 40, 24, registers=4),
    "facebook/dinov3-vits16-pretrain-lvd1689m": _dinov3(384, 12, 6, 1536),
    "facebook/dinov3-vits16plus-pretrain-lvd1689m": _dinov3(384, 12, 6, 1536, gated=True),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": _dinov3(768, 12, 12, 3072),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": _dinov3(1024, 24, 16, 4096),
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": _dinov3(1280, 32, 20, 5120, gated=True),
    "facebook/dinov3-vit7b16-pretrain-lvd1689m": _dinov3(
        4096, 40, 32, 8192, gated=True, qv_bias=False
    ),
}
"""DINOv2 and DINOv3, by hub id."""

CLIP: dict[str, tuple[VisionSpec, TextSpec]] = {
    "openai/clip-vit-base-patch32": _clip((768, 12, 12), (512, 8), 32, 512),
    "openai/clip-vit-base-patch16": _clip((768, 12, 12), (512, 8), 16, 512),
    "openai/clip-vit-large-patch14": _clip((1024, 24, 16), (768, 12), 14, 768),
    "openai/clip-vit-large-patch14-336": _clip((1024, 24, 16), (768, 12), 14, 768, image=336),
}
"""Vision and text tower of OpenAI's CLIP, by hub id."""
