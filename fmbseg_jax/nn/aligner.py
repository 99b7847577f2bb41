"""The alignment module: patch features of the frozen encoder → CLIP's text space (section 3.3).

The paper's three (Table 2): a linear layer, an MLP, one transformer block. Each takes [b, n, d] and
returns unit vectors float32 [b, n, D]. Parameters are float32, whatever they multiply in.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmbseg_jax.errors import UserError
from fmbseg_jax.nn import transformer

KINDS = "linear", "mlp", "block"


def unit(x: Float[Array, "*s D"]) -> Float[Array, "*s D"]:
    """Vectors of length 1; the zero vector stays where it is, gradient included."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jnp.where(square > 0, jnp.maximum(square, 1e-24) ** -0.5, 0)


class Linear(nn.Module):
    """One linear layer."""

    output: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, patches: Float[Array, "b n d"]) -> Float[Array, "b n D"]:
        return unit(transformer.linear(self.output, self.dtype, name="projection")(patches))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    output: int
    mlp_ratio: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, patches: Float[Array, "b n d"]) -> Float[Array, "b n D"]:
        width = patches.shape[-1] * self.mlp_ratio
        hidden = transformer.gelu(transformer.linear(width, self.dtype, name="hidden")(patches))
        return unit(transformer.linear(self.output, self.dtype, name="projection")(hidden))


class Block(nn.Module):
    """One transformer block over the patches of an image, then a linear layer."""

    output: int
    mlp_ratio: int
    heads: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, patches: Float[Array, "b n d"]) -> Float[Array, "b n D"]:
        width = patches.shape[-1]
        if width % self.heads:
            raise UserError(
                f"train.heads = {self.heads} does not divide the encoder's width of {width}."
            )
        spec = transformer.Spec(
            width=width,
            depth=1,
            heads=self.heads,
            mlp_width=width * self.mlp_ratio,
            dtype=self.dtype,
        )
        x = transformer.Block(spec, name="block")(patches)
        x = transformer.layer_norm(spec, name="norm")(x)
        return unit(transformer.linear(self.output, self.dtype, name="projection")(x))


def create(
    kind: str, *, output: int, mlp_ratio: int, heads: int, dtype: str = "float32"
) -> nn.Module:
    """The aligner named "linear", "mlp" or "block", of output width `output` = D.

    `dtype`, "float32" or "bfloat16", is what matrices are multiplied in.
    """
    kinds: dict[str, Any] = {
        "linear": lambda: Linear(output, dtype),
        "mlp": lambda: Mlp(output, mlp_ratio, dtype),
        "block": lambda: Block(output, mlp_ratio, heads, dtype),
    }
    return kinds[kind]()
