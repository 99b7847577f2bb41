"""CLIP's text tower: its sizes, and its module."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fmbseg_jax.nn.transformer import Spec, Transformer, dense, layer_norm
from fmbseg_jax.pretrained.config_json import check_range


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
        check_range("the vocabulary", self.vocabulary, 1, 10_000_000)
        check_range("the length of a sentence", self.length, 1, 65_536)
        check_range("the width of the projection", self.output, 1, 65_536)


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
