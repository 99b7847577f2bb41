"""The one transformer of every tower and of the aligner.

DINOv2, CLIP and the aligner differ only in the values of a `Spec`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float


def gelu(x: Array) -> Array:
    """The exact GELU, x Φ(x). jax's default is the tanh form, 2.8e-4 away."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: Array) -> Array:
    """x σ(1.702 x): the activation of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"gelu": gelu, "quick_gelu": quick_gelu}
"""By the name in a published config.json (`hidden_act`)."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """What one transformer differs in from another."""

    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: str = "gelu"
    epsilon: float = 1e-6
    layer_scale: bool = False
    """A learned gain for each channel of each branch (DINOv2)."""
    causal: bool = False
    """A token attends only to itself and those before it (CLIP's text)."""


class Attention(nn.Module):
    """Multi-head self-attention."""

    spec: Spec

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        heads = (*x.shape[:2], self.spec.heads, self.spec.width // self.spec.heads)
        query, key, value = (
            nn.Dense(self.spec.width, name=name)(x).reshape(heads)
            for name in ("query", "key", "value")
        )
        mixed = attend(query, key, value, causal=self.spec.causal)
        return nn.Dense(self.spec.width, name="out")(mixed.reshape(x.shape))


def attend(
    query: Float[Array, "b t h c"],
    key: Float[Array, "b t h c"],
    value: Float[Array, "b t h c"],
    *,
    causal: bool,
) -> Float[Array, "b t h c"]:
    """Scaled dot-product attention, by the fastest way of the platform it runs on."""
    whole = functools.partial(jax.nn.dot_product_attention, is_causal=causal)
    if causal or query.shape[1] < _MANY_TOKENS:
        return whole(query, key, value)
    return jax.lax.platform_dependent(query, key, value, cpu=_head_by_head, default=whole)


_MANY_TOKENS = 256  # of one head, t² similarities fill a CPU core's cache


def _head_by_head(query: Array, key: Array, value: Array) -> Array:
    """On a CPU the t × t similarities of one head stay in the cache, those of all heads do not.

    Twice to five times as fast at 1,024 tokens. The backward pass computes them again.
    """
    b, t, h, c = query.shape

    @jax.checkpoint
    def one(head: tuple[Array, Array, Array]) -> Array:
        q, k, v = head
        return jax.nn.softmax(q @ k.T * c**-0.5, axis=-1) @ v

    heads = [x.transpose(0, 2, 1, 3).reshape(b * h, t, c) for x in (query, key, value)]
    return jax.lax.map(one, tuple(heads)).reshape(b, h, t, c).transpose(0, 2, 1, 3)


class Mlp(nn.Module):
    """Two layers, applied to each token alone."""

    spec: Spec

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        hidden = ACTIVATIONS[self.spec.activation](nn.Dense(self.spec.mlp_width, name="up")(x))
        return nn.Dense(self.spec.width, name="down")(hidden)


class Block(nn.Module):
    """Pre-norm transformer block."""

    spec: Spec

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        branches: tuple[nn.Module, ...] = (
            Attention(self.spec, name="attention"),
            Mlp(self.spec, name="mlp"),
        )
        for i, branch in enumerate(branches, 1):
            y = branch(nn.LayerNorm(self.spec.epsilon, name=f"norm{i}")(x))
            if self.spec.layer_scale:
                y = y * self.param(f"scale{i}", nn.initializers.ones, (self.spec.width,))
            x = x + y
        return x


class Transformer(nn.Module):
    """`depth` blocks; no norm after the last."""

    spec: Spec

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        for i in range(self.spec.depth):
            x = Block(self.spec, name=f"block{i}")(x)
        return x


def bicubic(inputs: int, outputs: int) -> np.ndarray:
    """Matrix float32 [outputs, inputs] of torch's bicubic interpolation (a = -0.75, no antialias).

    `jax.image.resize` has a = -0.5. Sample points are half-pixel centres, borders repeat.
    """
    a = np.float32(-0.75)
    half = np.float32(0.5)  # float32 throughout, as torch: its rounding is part of the result
    centre = (np.arange(outputs, dtype=np.float32) + half) * np.float32(inputs / outputs) - half
    first = np.floor(centre).astype(np.int32) - 1
    matrix = np.zeros((outputs, inputs), np.float32)
    for tap in range(4):
        distance = np.abs(centre - (first + tap).astype(np.float32))
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        column = np.clip(first + tap, 0, inputs - 1)
        np.add.at(matrix, (np.arange(outputs), column), np.where(distance <= 1, near, far))
    return matrix
