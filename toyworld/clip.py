"""A tiny CLIP, trained as CLIP is: on images and their captions, by contrast.

A caption names one visible word or lists several. Where two images of a batch have the same caption
both are positives of it; a different caption that would also be true (another word of the same
image) counts as a negative, as it does for every CLIP.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from fmbseg_jax.vocabulary import TEMPLATE
from toyworld.corpus import Boxes, Corpus, random_boxes
from toyworld.loop import fit
from toyworld.scenes import STUFF, WORDS

SIZE, PATCH = 64, 8
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
STEPS, BATCH, PEAK = 1300, 224, 1.5e-3
KEPT = 0.4
"""Part of the patches that a training image keeps (as FLIP does it): faster, and what is left has
to speak for itself, which makes patch values more meaningful."""
_END = "</w>"


def _byte_symbols() -> list[str]:
    """The 256 printable symbols that stand for bytes in byte-level BPE, in the usual order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until each word is one token."""
    spelled = [[*word[:-1], word[-1] + _END] for word in words]
    merges = []
    while any(len(word) > 1 for word in spelled):
        pairs = [pair for word in spelled for pair in zip(word, word[1:], strict=False)]
        best = max(sorted(set(pairs)), key=pairs.count)
        merges.append(best)
        for word in spelled:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def tokenizer() -> CLIPTokenizer:
    """Spells any text by bytes; the toy's words and its template's are single tokens."""
    known = sorted({part for text in (*WORDS, TEMPLATE, "and", ",") for part in _parts(text)})
    merges = _merges(known)
    symbols = _byte_symbols()
    tokens = [*symbols, *(symbol + _END for symbol in symbols), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs: Any = merges  # as transformers takes them; its annotation lags behind
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=77)


def _parts(text: str) -> list[str]:
    return text.replace("{}", "").replace(".", " . ").split()


def build(seed: int) -> tuple[CLIPModel, CLIPTokenizer]:
    words = tokenizer()
    end = words.eos_token_id
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": end, "pad_token_id": end}
    text = {"vocab_size": len(words), "hidden_size": 96, "intermediate_size": 384}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 77, **ids}
    vision = {"image_size": SIZE, "patch_size": PATCH, "hidden_size": 128, "intermediate_size": 512}
    vision |= {"num_hidden_layers": 4, "num_attention_heads": 4}
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))
    for tower in (model.vision_model, model.text_model):  # HF's scale is meant for 768 wide
        for module in tower.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
    return model, words


def caption(random: torch.Generator, areas: torch.Tensor) -> str:
    """What a person might write under a crop, given the area [K] of each word in it.

    Words that fill less than 4 % are passed over; things are named sooner than stuff.
    """
    weight = torch.where(areas > 0.04, areas, 0).sqrt()
    weight[: len(STUFF)] *= 0.6
    if torch.rand((), generator=random) < 0.7:
        chosen = torch.multinomial(weight, 1, generator=random)
    else:
        visible = min(3, int((weight > 0).sum()))
        chosen = torch.multinomial(weight, visible, generator=random)
    return TEMPLATE.format(" and a ".join(WORDS[i] for i in chosen.tolist()))


def _areas(labels: torch.Tensor, boxes: Boxes) -> torch.Tensor:
    """Part of each crop that each word fills: labels uint8 [b, H, W] → float [b, K]."""
    side = labels.shape[-1]
    x, y = ((boxes.grid(24) + 1) / 2 * side).long().clamp(0, side - 1).unbind(-1)
    seen = labels[torch.arange(len(labels))[:, None, None], y, x].long().flatten(1)
    return torch.zeros(len(labels), len(WORDS)).scatter_add_(
        1, seen, torch.full(seen.shape, 1 / seen.shape[1])
    )


def normalised(images: torch.Tensor) -> torch.Tensor:
    """[b, 3, H, W] in [0, 255] → what the model takes."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, STD))
    return (images / 255 - mean) / std


def _image_features(
    model: CLIPModel, pixels: torch.Tensor, random: torch.Generator
) -> torch.Tensor:
    """Projected class tokens of images of which a random part of the patches is seen."""
    vision = model.vision_model
    tokens = vision.embeddings(pixels)
    order = torch.rand(tokens.shape[0], tokens.shape[1] - 1, generator=random).argsort(1)
    kept = order[:, : int(KEPT * order.shape[1])].to(tokens.device) + 1
    patches = tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))
    hidden = vision.pre_layrnorm(torch.cat([tokens[:, :1], patches], 1))
    hidden = vision.encoder(inputs_embeds=hidden).last_hidden_state
    return model.visual_projection(vision.post_layernorm(hidden[:, 0]))


def text_features(model: CLIPModel, words: CLIPTokenizer, sentences: list[str]) -> torch.Tensor:
    ids = words(sentences, padding=True, return_tensors="pt").input_ids.to(model.device)
    return normalize(model.text_projection(model.text_model(input_ids=ids).pooler_output), dim=-1)


def train(work: Path, data: Corpus, *, seed: int, device: str, steps: int, batch: int):
    """Returns the model, its tokenizer and what it took (see `fit`)."""
    model: Any
    model, words = build(seed)
    model.to(device)

    def loss(random: torch.Generator, step: int) -> torch.Tensor:
        chosen = torch.randint(len(data), (batch,), generator=random)
        boxes = random_boxes(random, batch, 0.15, 0.75)
        captions = [caption(random, a) for a in _areas(data.labels[chosen], boxes)]
        pixels = normalised(boxes.cut(data.images[chosen], SIZE).to(device))
        images = normalize(_image_features(model, pixels, random), dim=-1)
        unique = sorted(set(captions))
        index = torch.tensor([unique.index(c) for c in captions], device=device)
        texts = text_features(model, words, unique)[index]
        logits = model.logit_scale.exp().clamp(max=100) * images @ texts.T
        same = (index[:, None] == index[None]).float()
        target = same / same.sum(1, keepdim=True)
        return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2

    spent = fit("clip", model, loss, steps, PEAK, work, seed)
    return model, words, spent


def save(folder: Path, model: CLIPModel, words: CLIPTokenizer) -> None:
    """Writes `folder/clip`."""
    folder = folder / "clip"
    model.half().save_pretrained(folder)
    words.save_pretrained(folder)
    settings = {"image_mean": MEAN, "image_std": STD, "size": {"shortest_edge": SIZE}}
    settings |= {"crop_size": {"height": SIZE, "width": SIZE}}
    settings |= {"image_processor_type": "CLIPImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))
