"""The one transformer of every tower and of the aligner.

DINOv2, DINOv3, CLIP and the aligner differ only in the values of a `Spec`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmbseg_jax.nn.positions import Rotation


def gelu(x: Array) -> Array:
    """The exact GELU, x Φ(x). jax's default is the tanh form, 2.8e-4 away.

    By erf as in PyTorch: jax's own exact form, by erfc, is slower on a CPU.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def quick_gelu(x: Array) -> Array:
    """x σ(1.702 x): the activation of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "quick_gelu": quick_gelu,
    "silu": jax.nn.silu,
}
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
    gated: bool = False
    """The MLP multiplies its hidden layer by a second one, activated (SwiGLU: DINOv2 g)."""
    query_bias: bool = True
    key_bias: bool = True
    value_bias: bool = True
    dtype: str = "float32"
    """What matrices are multiplied in: "float32" or "bfloat16". Norms, softmax and the sum that the
    branches add to are float32 in either case."""

    def __post_init__(self) -> None:
        """Raises ValueError where these are no sizes of a transformer."""
        sizes = self.width, self.heads, self.mlp_width, self.depth + 1  # no block is a depth, too
        possible = all(type(size) is int and 0 < size <= _LARGEST for size in sizes)
        if not possible or self.depth > _DEEPEST or self.width % self.heads:
            raise ValueError(f"width, heads, width of the MLP and depth + 1 are {sizes}")
        if not isinstance(self.epsilon, float | int) or not 0 <= self.epsilon < 1:
            raise ValueError(f"the epsilon of the norms is {self.epsilon!r}")


_LARGEST, _DEEPEST = 65_536, 1000
"""Far beyond any model: what is damaged may say anything, and is built before it is compared."""


def dense(spec: Spec, width: int = 0, **options: Any) -> nn.Dense:
    """A linear layer of `width` or the spec's; multiplies in its dtype, sums in float32."""
    return linear(width or spec.width, spec.dtype, **options)


def linear(width: int, dtype: str, **options: Any) -> nn.Dense:
    """A linear layer that multiplies in `dtype` and sums in float32."""
    return nn.Dense(
        width, dtype=dtype, precision=precision(dtype), dot_general=_dot_general, **options
    )


def precision(dtype: Any) -> jax.lax.Precision | None:
    """Full for float32: GPUs and TPUs would otherwise round its factors to 10 or 7 bits."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def layer_norm(spec: Spec, **options: Any) -> nn.LayerNorm:
    """Computes the variance from differences: E[x²] - E[x]² cancels where the mean is large."""
    return nn.LayerNorm(spec.epsilon, use_fast_variance=False, **options)


_dot_general = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


class Attention(nn.Module):
    """Multi-head self-attention."""

    spec: Spec

    def setup(self) -> None:
        spec = self.spec
        self.query = dense(spec, use_bias=spec.query_bias)
        self.key = dense(spec, use_bias=spec.key_bias)
        self.value = dense(spec, use_bias=spec.value_bias)
        self.out = dense(spec)

    def __call__(
        self, x: Float[Array, "b t d"], rotation: Rotation | None = None
    ) -> Float[Array, "b t d"]:
        heads = (*x.shape[:2], self.spec.heads, self.spec.width // self.spec.heads)
        query, key, value = (f(x).reshape(heads) for f in (self.query, self.key, self.value))
        if rotation:
            query, key = rotation(query), rotation(key)
        query, key, value = (part.astype(self.spec.dtype) for part in (query, key, value))
        mixed = attend(query, key, value, causal=self.spec.causal)
        return self.out(mixed.reshape(x.shape))

    def values(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Each token as if it attended to itself alone."""
        return self.out(self.value(x))


def attend(
    query: Float[Array, "b t h c"],
    key: Float[Array, "b t h c"],
    value: Float[Array, "b t h c"],
    *,
    causal: bool,
) -> Float[Array, "b t h c"]:
    """Scaled dot-product attention, by the fastest way of the platform it runs on.

    The softmax is float32; on a GPU, halves go to cuDNN's flash attention.
    """
    whole = functools.partial(jax.nn.dot_product_attention, is_causal=causal)
    if jax.default_backend() == "gpu" and has_flash(query, _compute_capability()):
        return whole(query, key, value, implementation="cudnn")
    with jax.default_matmul_precision("highest" if query.dtype == jnp.float32 else "default"):
        if causal or query.shape[1] < _MANY_TOKENS:
            return whole(query, key, value)
        return jax.lax.platform_dependent(query, key, value, cpu=_head_by_head, default=whole)


def has_flash(query: Float[Array, "b t h c"], capability: float) -> bool:
    """Whether cuDNN has flash attention for such queries on a GPU of this compute capability."""
    channels = query.shape[-1]
    fits = channels % 8 == 0 and channels <= 128
    return query.dtype == jnp.bfloat16 and fits and capability >= 8


def _compute_capability() -> float:
    try:
        return float(jax.devices()[0].compute_capability)
    except (AttributeError, ValueError):  # not NVIDIA's
        return 0.0


_MANY_TOKENS = 256  # of one head, t² similarities fill a CPU core's cache


def _head_by_head(query: Array, key: Array, value: Array) -> Array:
    """On a CPU the t × t similarities of one head stay in the cache, those of all heads do not.

    The softmax is divided by its sums after the product with the values, a pass over t × t less.
    The backward pass computes the similarities again. On several CPU devices, which only tests
    have, XLA gathers the batch first: right, not fast.
    """
    b, t, h, c = query.shape

    @jax.checkpoint
    def one(head: tuple[Array, Array, Array]) -> Array:
        q, k, v = head
        similarities = jnp.matmul(q, k.T, preferred_element_type=jnp.float32) * c**-0.5
        highest = jax.lax.stop_gradient(jnp.max(similarities, axis=-1, keepdims=True))
        weights = jnp.exp(similarities - highest)
        mixed = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (mixed / jnp.sum(weights, axis=-1, keepdims=True)).astype(v.dtype)

    heads = [x.transpose(0, 2, 1, 3).reshape(b * h, t, c) for x in (query, key, value)]
    return jax.lax.map(one, tuple(heads)).reshape(b, h, t, c).transpose(0, 2, 1, 3)


class Mlp(nn.Module):
    """Two layers, applied to each token alone."""

    spec: Spec

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        spec, activation = self.spec, ACTIVATIONS[self.spec.activation]
        hidden = dense(spec, spec.mlp_width, name="up")(x)
        if spec.gated:
            hidden = activation(dense(spec, spec.mlp_width, name="gate")(x)) * hidden
        else:
            hidden = activation(hidden)
        return dense(spec, name="down")(hidden)


class Block(nn.Module):
    """Pre-norm transformer block."""

    spec: Spec

    def setup(self) -> None:
        self.attention, self.mlp = Attention(self.spec), Mlp(self.spec)
        self.norm1, self.norm2 = (layer_norm(self.spec) for _ in range(2))
        if self.spec.layer_scale:
            shape = (self.spec.width,)
            self.scale1, self.scale2 = (
                self.param(name, nn.initializers.ones, shape) for name in ("scale1", "scale2")
            )

    def __call__(
        self, x: Float[Array, "b t d"], rotation: Rotation | None = None
    ) -> Float[Array, "b t d"]:
        y = self.attention(self.norm1(x), rotation)
        x = x + (y * self.scale1 if self.spec.layer_scale else y)
        y = self.mlp(self.norm2(x))
        return x + (y * self.scale2 if self.spec.layer_scale else y)

    def values(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """What attention adds to each token if query and key are ignored (paper, section 3.1)."""
        return self.attention.values(self.norm1(x))


class Transformer(nn.Module):
    """`depth` blocks; no norm after the last."""

    spec: Spec

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], rotation: Rotation | None = None
    ) -> Float[Array, "b t d"]:
        for i in range(self.spec.depth):
            x = Block(self.spec, name=f"block{i}")(x, rotation)
        return x
