"""SAM's mask decoder for many prompts on one image: Meta's numbers, with less work.

A prompt is a handful of tokens, the image thousands of pixels, and nearly all of the work is with
the pixels. Three things spare it. The prompts share the image's features until the first layer
makes them differ. The projections of the pixels in cross-attention are carried over to the tokens:
a score (W x)·(V t) is x·(Wᵀ V t). And since the predicted IoU does not need the masks, only those
are made that somebody wants.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn.functional import gelu, layer_norm, linear


class Decoded(NamedTuple):
    """Prompts after the decoder's transformer."""

    ious: torch.Tensor
    """float32 [p, 3], predicted IoU of each prompt's three masks."""
    tokens: torch.Tensor
    """[p, 3, c], what each mask is made with."""
    image: torch.Tensor
    """[p, g², c], the image's features as each prompt has left them."""


class MaskDecoder:
    """The prompt encoder and mask decoder of a Sam from Meta's package."""

    def __init__(self, model: Any):
        self._prompts, self._decoder = model.prompt_encoder, model.mask_decoder
        self._position = self._prompts.get_dense_pe().flatten(2).mT  # [1, g², c]
        self._outputs = 1 + self._decoder.num_mask_tokens  # the first tokens: IoU, masks

    def decode(self, features: torch.Tensor, points: torch.Tensor) -> Decoded:
        """Runs the transformer.

        Args:
          features: [1, c, g, g], of the image encoder.
          points: float [p, k, 2], (x, y) in pixels of the image encoder's input.
        """
        decoder = self._decoder
        foreground = torch.ones(points.shape[:2], dtype=torch.int, device=points.device)
        sparse, dense = self._prompts(points=(points, foreground), boxes=None, masks=None)
        learned = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([learned.expand(len(points), -1, -1), sparse], dim=1)
        tokens, image = self._transform(tokens, (features + dense[:1]).flatten(2).mT)
        ious = decoder.iou_prediction_head(tokens[:, 0])[:, 1:]  # the first is for single masks
        return Decoded(ious.float(), tokens[:, 2 : len(learned)], image)

    def _transform(
        self, tokens: torch.Tensor, image: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Meta's TwoWayTransformer, of tokens [p, t, c] and the one image [1, n, c].

        Returns:
          The tokens that masks and IoU are made of, [p, 5, c], and the image [p, n, c].
        """
        two_way, x = self._decoder.transformer, tokens
        for layer in two_way.layers:
            if layer.skip_first_layer_pe:
                x = layer.norm1(layer.self_attn(x, x, x))
            else:
                x = layer.norm1(x + layer.self_attn(x + tokens, x + tokens, x))
            placed = image + self._position
            x = layer.norm2(x + _read(layer.cross_attn_token_to_image, x + tokens, placed, image))
            x = layer.norm3(x + layer.mlp(x))
            image = layer.norm4(
                _written(layer.cross_attn_image_to_token, image, placed, x + tokens, x)
            )
        x, tokens = x[:, : self._outputs], tokens[:, : self._outputs]
        placed = image + self._position
        read = _read(two_way.final_attn_token_to_image, x + tokens, placed, image)
        return two_way.norm_final_attn(x + read), image

    def masks(self, decoded: Decoded, prompt: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The masks number `index` [s], 0 to 2, of the prompts `prompt` [s], ascending.

        Returns:
          Logits, float32 [s, 4 g, 4 g].
        """
        wanted, place = prompt.unique_consecutive(return_inverse=True)
        upscaled, tokens = self._upscale(decoded.image[wanted]), decoded.tokens[wanted]
        mlps = self._decoder.output_hypernetworks_mlps[1:]
        weights = torch.stack([mlp(tokens[:, i]) for i, mlp in enumerate(mlps)], dim=1)
        logits = (weights @ upscaled.flatten(1, 6).mT)[place, index].float()
        # Only now, in one channel for each mask, the cells of a patch go to their rows and columns.
        cells = logits.unflatten(1, upscaled.shape[1:7]).permute(0, 1, 3, 5, 2, 4, 6)
        return cells.flatten(4, 6).flatten(1, 3)

    def _upscale(self, image: torch.Tensor) -> torch.Tensor:
        """[u, g², c] → [u, g, g, 2, 2, 2, 2, c/8]: each patch in 2 × 2 cells, each of these again.

        What Meta's `output_upscaling` computes. Its transposed convolutions do not overlap: they
        are matrix products on each patch alone.
        """
        first, norm, _, second, _ = self._decoder.output_upscaling
        side = round(image.shape[1] ** 0.5)
        x = _split(image.unflatten(1, (side, side)), first)
        x = gelu(layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps))
        return gelu(_split(x, second))


def _split(x: torch.Tensor, convolution: torch.nn.ConvTranspose2d) -> torch.Tensor:
    """A transposed convolution of kernel and stride 2, channels last: [..., c] → [..., 2, 2, e]."""
    kernel = convolution.weight.permute(2, 3, 1, 0)  # [2, 2, e, c]
    assert convolution.bias is not None
    return linear(x, kernel.flatten(0, 2), convolution.bias.repeat(4)).unflatten(
        -1, kernel.shape[:3]
    )


def _read(
    attention: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Tokens attend to the image.

    Args:
      query: [p, t, c], tokens.
      key, value: [p, n, c], or [1, n, c] for all prompts; the image with and without position.
    """
    prompts, heads = len(query), attention.num_heads
    into_keys = attention.k_proj.weight.unflatten(0, (heads, -1))  # [h, e, c]
    into_values = attention.v_proj.weight.unflatten(0, (heads, -1))
    q = _by_head(attention.q_proj(query), heads)
    # The keys' bias adds the same to all scores of a token: the softmax does not see it.
    asked = _by_prompt(q @ into_keys * q.shape[-1] ** -0.5, prompts)
    weights = (asked @ _of(key).mT).softmax(-1)  # [p, h t, n]
    mean = (weights @ _of(value)).unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)
    values = mean @ into_values.mT + attention.v_proj.bias.unflatten(0, (heads, 1, -1))
    return attention.out_proj(values.transpose(0, 1).flatten(1)).unflatten(0, (prompts, -1))


def _written(
    attention: Any, image: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """The image attends to tokens: what that gives, added to the image, [p, n, c].

    Args:
      image, query: [p, n, c], or [1, n, c] for all prompts; without and with position.
      key, value: [p, t, c], tokens.
    """
    prompts, heads = len(key), attention.num_heads
    into_queries = attention.q_proj.weight.unflatten(0, (heads, -1))  # [h, e, c]
    bias = attention.q_proj.bias.unflatten(0, (heads, -1, 1))
    out = attention.out_proj.weight.unflatten(1, (heads, -1)).permute(1, 2, 0)  # [h, e, c]
    k, v = (_by_head(f(x), heads) for f, x in ((attention.k_proj, key), (attention.v_proj, value)))
    k = k * k.shape[-1] ** -0.5
    scores = _by_prompt(k @ into_queries, prompts) @ _of(query).mT + _by_prompt(k @ bias, prompts)
    weights = scores.unflatten(1, (heads, -1)).softmax(2).flatten(1, 2)  # [p, h t, n]
    # The weights of each head add up to 1, so each brings its share of the bias.
    tokens = _by_prompt(v @ out + attention.out_proj.bias / heads, prompts)
    return torch.baddbmm(image.expand(prompts, -1, -1), weights.mT, tokens)


def _of(image: torch.Tensor) -> torch.Tensor:
    """[n, c] where there is one image for all prompts: then its products are single ones."""
    return image[0] if len(image) == 1 else image


def _by_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[p, t, h e] → [h, p t, e]."""
    return x.flatten(0, 1).unflatten(-1, (heads, -1)).transpose(0, 1)


def _by_prompt(x: torch.Tensor, prompts: int) -> torch.Tensor:
    """[h, p t, c] → [p, h t, c]."""
    return x.unflatten(1, (prompts, -1)).transpose(0, 1).flatten(1, 2)
