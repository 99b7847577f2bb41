"""CLIP: words → text features; an image → class tokens of its crops, and dense patch features.

Paper, section 3.1: CLIP is trained to align its class token with text, not its patches. Their
features come from the value projection of the last block instead (as MaskCLIP does), and from crops
of an enlarged image, so that the map is fine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize, scaled_dot_product_attention

from fmbseg_jax.data import images
from fmbseg_jax.errors import UserError
from fmbseg_jax.io import machine
from fmbseg_jax.pretrained import config_json, hub
from fmbseg_jax.pretrained.tokenizer import Tokenizer
from fmbseg_jax.vocabulary import prompts, synonyms
from labelling.precision import check_finite

_CROPS_AT_ONCE, _SENTENCES_AT_ONCE = 32, 256
"""Memory and speed, not results."""


class Clip:
    """A published CLIP model. All features it gives are float32, of unit length."""

    def __init__(self, source: str, device: str = "cpu", dtype: str = "float32"):
        """Loads a model.

        Args:
          source: a folder in Hugging Face layout, or a hub id.
          dtype: what is multiplied: "float32", or half of it, "float16" or "bfloat16".
        """
        folder = hub.locate(source)
        self._mean, self._std = config_json.normalisation(folder, source)
        self.model = _load(folder, source)
        text = self.model.config.text_config
        self.tokenizer = Tokenizer(folder, text.vocab_size, text.max_position_embeddings)
        self.model.eval().to(device)
        self.device, self._dtype = device, getattr(torch, dtype)
        self.patch: int = self.model.config.vision_config.patch_size

    @torch.inference_mode()
    def text(self, words: Sequence[str], template: str) -> torch.Tensor:
        """Text features of the words in the template: [K, D]; of synonyms, their mean.

        Raises:
          UserError: a word is too long, or a feature is NaN.
        """
        names = [synonyms(word) for word in words]
        sentences = prompts([name for some in names for name in some], template)
        features = [
            self._sentence_features(sentences[i : i + _SENTENCES_AT_ONCE])
            for i in range(0, len(sentences), _SENTENCES_AT_ONCE)
        ]
        check_finite("CLIP's text encoder", torch.float32, features)
        by_word = normalize(torch.cat(features), dim=-1).split([len(some) for some in names])
        return normalize(torch.stack([some.mean(0) for some in by_word]), dim=-1)

    @torch.inference_mode()
    def crops(
        self, image: np.ndarray, short_side: int, crop: int, stride: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Slides a window over the resized image ("high-resolution feature extraction", 3.2).

        Args:
          image: uint8 [H, W, 3], RGB.
          short_side: the image is resized to it, both sides rounded up to whole patches; pixels.
          crop: side of the window, pixels; a multiple of the patch.
          stride: step of the window, pixels.

        Returns:
          Class tokens of the crops [c, D], and patch features of the whole image [h, w, D]:
          what the crops give for a patch, averaged.

        Raises:
          UserError: a feature is NaN or infinite.
        """
        pixels = self._pixels(image, short_side)
        grid = pixels.shape[1] // self.patch, pixels.shape[2] // self.patch
        total = torch.zeros(*grid, self.model.config.projection_dim, device=self.device)
        tokens = []
        corners = crop_corners(pixels.shape[1:], crop, stride, self.patch)
        for i in range(0, len(corners), _CROPS_AT_ONCE):
            batch = corners[i : i + _CROPS_AT_ONCE]
            windows = torch.stack([pixels[:, y : y + crop, x : x + crop] for y, x in batch])
            with torch.autocast(
                pixels.device.type, self._dtype, enabled=self._dtype != torch.float32
            ):
                class_tokens, patches = (part.float() for part in self._encode(windows))
            tokens.append(class_tokens)
            for (y, x), features in zip(batch, patches, strict=True):
                top, left, side = y // self.patch, x // self.patch, crop // self.patch
                total[top : top + side, left : left + side] += features
        check_finite("CLIP's image encoder", self._dtype, [total, *tokens])
        # Made unit length, the sum over the crops is their mean: no need to count them.
        return torch.cat(tokens), normalize(total, dim=-1)

    def _pixels(self, image: np.ndarray, short_side: int) -> torch.Tensor:
        """The image as CLIP wants it: float32 [3, H', W'], whole patches on both sides."""
        height, width = (
            -(-side // self.patch) * self.patch
            for side in images.resized_shape(image.shape[0], image.shape[1], short_side)
        )
        resized = images.resize(image, (height, width))
        pixels = images.normalise(resized, self._mean, self._std)
        return torch.from_numpy(pixels).permute(2, 0, 1).to(self.device)

    def _encode(self, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[c, 3, s, s] → class tokens [c, D] of unit length, patch features [c, s/p, s/p, D].

        Of the last block the class token alone is computed whole: the patches skip its attention.
        """
        vision = self.model.vision_model
        x = vision.pre_layrnorm(vision.embeddings(windows, interpolate_pos_encoding=True))
        *blocks, last = vision.encoder.layers
        for block in blocks:
            x = block(x, attention_mask=None)
        attention, normal = last.self_attn, last.layer_norm1(x)
        values = attention.v_proj(normal)
        heads = self.model.config.vision_config.num_attention_heads
        query, key, value = (
            projected.unflatten(-1, (heads, -1)).transpose(1, 2)
            for projected in (attention.q_proj(normal[:, :1]), attention.k_proj(normal), values)
        )
        mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        token = x[:, :1] + attention.out_proj(mixed)
        token = (token + last.mlp(last.layer_norm2(token)))[:, 0]
        side = windows.shape[-1] // self.patch
        token, patches = (
            self.model.visual_projection(vision.post_layernorm(y))
            for y in (token, attention.out_proj(values[:, 1:]))
        )
        return normalize(token, dim=-1), patches.unflatten(1, (side, side))

    def _sentence_features(self, sentences: Sequence[str]) -> torch.Tensor:
        """[s, D], not normalised: the state of each sentence's end token, projected."""
        rows = self.tokenizer(sentences)
        padded = np.full((len(rows), max(map(len, rows))), self.tokenizer.end)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        ids = torch.from_numpy(padded).to(self.device)
        # No attention mask: padding comes after the end token, which sees only what precedes.
        states = self.model.text_model(input_ids=ids).last_hidden_state
        # transformers' own choice follows the config.json, which may name another token as the end.
        end = (ids == self.tokenizer.end).int().argmax(dim=1)
        return self.model.text_projection(states[torch.arange(len(rows)), end])


def crop_corners(shape: Sequence[int], crop: int, stride: int, patch: int) -> list[tuple[int, int]]:
    """Top left corners (y, x) of a sliding window, whole patches from the image's corner.

    The last window of a row or column is shifted inside, so that every patch is covered.
    """
    if crop % patch:
        raise UserError(
            f"label.crop is a multiple of CLIP's patch, {patch} pixels; got {crop}. "
            f"The nearest are {crop // patch * patch} and {(crop // patch + 1) * patch}."
        )
    step = max(stride // patch, 1) * patch
    rows, columns = (sorted({*range(0, side - crop, step), side - crop}) for side in shape)
    return [(y, x) for y in rows for x in columns]


def _load(folder: Path, source: str) -> Any:
    """The CLIPModel, float32, of the sizes that the other stages read in its config.json."""
    config = config_json.read_clip(folder, source)
    towers: dict[str, Any] = {
        f"{name}_config": (config.get(f"{name}_config") or {})
        | config_json.clip_tower(config, name)
        for name in ("text", "vision")
    }
    hub.weight_files(folder)
    # Imported here: it takes seconds, and to find that a model is missing must not.
    from transformers import CLIPConfig, CLIPModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        load: Any = CLIPModel.from_pretrained
        sizes = CLIPConfig(**towers, projection_dim=config.get("projection_dim", 512))
        model, report = load(folder, config=sizes, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # transformers raises many kinds on damaged files
        machine.let_through(error, folder, by_words=True)
        raise UserError(f"The CLIP model in {folder} cannot be loaded: {error}") from error
    surplus = [key for key in report["unexpected_keys"] if not key.endswith("position_ids")]
    if surplus:
        raise UserError(f"The CLIP model in {folder} has surplus parameters: {surplus[0]}, ...")
    if report["missing_keys"]:  # transformers would fill these with random numbers
        missing = ", ".join(sorted(report["missing_keys"])[:5])
        raise UserError(f"The CLIP model in {folder} lacks parameters: {missing}.")
    return model
