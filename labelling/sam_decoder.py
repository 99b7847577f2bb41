"""SAM's mask decoder for many prompts on one image: Meta's numbers, with less work.

Meta's decoder copies the image's features for each prompt, and brings three masks to size for each.
Here the prompts share the features until the first layer makes them differ; and since the predicted
IoU does not need the masks, only those are made that somebody wants.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention

from labelling.meta_sam import segment_anything

_Attention: Any = segment_anything.modeling.transformer.Attention


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
        self._position = self._prompts.get_dense_pe()
        for module in self._decoder.modules():
            if isinstance(module, _Attention):
                module.forward = functools.partial(_attend, module)

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
        # Of one image, where Meta's code has as many copies as prompts: it is added to, broadcast.
        tokens, image = decoder.transformer(features + dense[:1], self._position, tokens)
        ious = decoder.iou_prediction_head(tokens[:, 0])[:, 1:]  # the first is for single masks
        return Decoded(ious.float(), tokens[:, 2 : len(learned)], image)

    def masks(self, decoded: Decoded, prompt: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The masks number `index` [s], 0 to 2, of the prompts `prompt` [s], ascending.

        Returns:
          Logits, float32 [s, 4 g, 4 g].
        """
        wanted, place = prompt.unique_consecutive(return_inverse=True)
        upscaled, tokens = self._upscale(decoded.image[wanted]), decoded.tokens[wanted]
        mlps = self._decoder.output_hypernetworks_mlps[1:]
        weights = torch.stack([mlp(tokens[:, i]) for i, mlp in enumerate(mlps)], dim=-1)
        logits = (upscaled.flatten(1, 6) @ weights)[place, :, index].float()
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
    kernel = convolution.weight.permute(0, 2, 3, 1)  # [c, 2, 2, e]
    return (x @ kernel.flatten(1)).unflatten(-1, kernel.shape[1:]) + convolution.bias


def _attend(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What Meta's attention gives, also where one image [1, n, c] stands for all prompts.

    From pixels to the few tokens it takes a softmax over an axis of length 8 or so, a million
    times; with that axis outside, the same numbers come in long vectors.
    """
    prompts = max(len(q), len(k))
    q, k, v = (
        module._separate_heads(project(x), module.num_heads)
        for project, x in ((module.q_proj, q), (module.k_proj, k), (module.v_proj, v))
    )
    if len(k) < prompts:  # tokens to the one image: all prompts' tokens are its queries
        tokens = q.transpose(0, 1).flatten(1, 2)[None]
        mixed = scaled_dot_product_attention(tokens, k, v)[0]
        mixed = mixed.unflatten(1, (prompts, -1)).transpose(0, 1)
    elif q.shape[2] > k.shape[2]:
        weights = (k * k.shape[-1] ** -0.5) @ q.transpose(2, 3)  # [p, h, tokens, pixels]
        mixed = weights.softmax(2).transpose(2, 3) @ v
    else:
        mixed = scaled_dot_product_attention(q, k, v)
    return module.out_proj(module._recombine_heads(mixed))
