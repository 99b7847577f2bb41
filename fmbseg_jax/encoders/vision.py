"""A vision tower of the DINO families: what one differs in from another, and its module."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmbseg_jax.nn.positions import Rotation, resize_positions, rotary
from fmbseg_jax.nn.transformer import Spec, Transformer, layer_norm, precision
from fmbseg_jax.pretrained.config_json import check_range


@dataclasses.dataclass(frozen=True)
class VisionSpec:
    """A vision tower: its transformer, its patches, and how its input is normalised."""

    transformer: Spec
    patch: int
    """Side of a patch in pixels."""
    grid: int
    """Side of the grid of patches that it was trained on."""
    mean: tuple[float | int, ...] = (0.485, 0.456, 0.406)
    """Of the pixels in [0, 1], by channel; ImageNet's."""
    std: tuple[float | int, ...] = (0.229, 0.224, 0.225)
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
        check_range("the patch", self.patch, 1, 1024)
        check_range("the grid of patches", self.grid, 1, 4096)
        check_range("the number of registers", self.registers, 0, 1024)
        check_range("the width of the projection", self.output, 0, 65_536)
        if type(self.rope) not in (int, float) or not 0 <= self.rope < 1e9:
            raise ValueError(f"the base of its rotary positions is {self.rope!r}")


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
        spec, grid = self.spec, grid_of(images, self.spec)
        x = Embedding(spec, name="embedding")(images)
        x = Transformer(spec.transformer, name="transformer")(x, _rotation(spec, grid))
        x = layer_norm(spec.transformer, name="norm")(x)
        patches = x[:, 1 + spec.registers :]
        return Tokens(x[:, 0], patches.reshape(x.shape[0], *grid, x.shape[-1]))


def grid_of(images: Array, spec: VisionSpec) -> tuple[int, int]:
    """(h, w), patches of an image."""
    return images.shape[1] // spec.patch, images.shape[2] // spec.patch


def _rotation(spec: VisionSpec, grid: tuple[int, int]) -> Rotation | None:
    if not spec.rope:
        return None
    channels = spec.transformer.width // spec.transformer.heads
    return rotary(grid, 1 + spec.registers, channels, spec.rope)
