"""A SAM checkpoint → model. All sizes are read from the shapes: ViT-B, -L, -H, or any other."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from fmbseg_jax.errors import UserError
from fmbseg_jax.io import machine
from fmbseg_jax.pretrained import checksums, config_json, hub
from labelling.sam import names
from labelling.sam.meta import segment_anything

_PIXEL_MEAN = 123.675, 116.28, 103.53
_PIXEL_STD = 58.395, 57.12, 57.375
_DECODER_HEADS = 8
"""Meta's mean, standard deviation and number of heads: not in the file."""

_modeling = segment_anything.modeling


def load(path: str | Path, device: str = "cpu") -> Any:
    """Reads a published checkpoint (float32 or float16), see `read`, into a float32 model."""
    tensors = read(path)
    try:
        with torch.device("meta"):  # no memory, and no time spent on random initial values
            model = build(tensors)
    except KeyError as error:
        raise UserError(f"{path} is no SAM checkpoint: it has no tensor {error}.") from None
    except (AssertionError, RuntimeError, ValueError, ZeroDivisionError, TypeError) as error:
        machine.let_through(error, path, by_words=True)
        raise UserError(f"{path} is no SAM checkpoint: its shapes do not fit ({error}).") from None
    _check(path, model.state_dict(), tensors)
    model.load_state_dict({name: t.float() for name, t in tensors.items()}, assign=True)
    # The only values that are not in the file.
    model.pixel_mean = torch.tensor(_PIXEL_MEAN).view(-1, 1, 1)
    model.pixel_std = torch.tensor(_PIXEL_STD).view(-1, 1, 1)
    return model.eval().to(device)


def build(tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A model with the sizes that the tensors' shapes tell; its values are not set."""
    prompt_dim = tensors["prompt_encoder.not_a_point_embed.weight"].shape[1]
    encoder = _image_encoder(tensors, prompt_dim)
    size = encoder.img_size
    grid = tensors["image_encoder.pos_embed"].shape[1]
    return _modeling.Sam(
        image_encoder=encoder,
        prompt_encoder=_modeling.PromptEncoder(
            embed_dim=prompt_dim,
            image_embedding_size=(grid, grid),
            input_image_size=(size, size),
            mask_in_chans=tensors["prompt_encoder.mask_downscaling.3.weight"].shape[0],
        ),
        mask_decoder=_mask_decoder(tensors, prompt_dim),
        pixel_mean=_PIXEL_MEAN,
        pixel_std=_PIXEL_STD,
    )


def _image_encoder(tensors: dict[str, torch.Tensor], prompt_dim: int) -> torch.nn.Module:
    _, grid, _, width = tensors["image_encoder.pos_embed"].shape
    patch = tensors["image_encoder.patch_embed.proj.weight"].shape[-1]
    depth = _count(tensors, "image_encoder.blocks.")
    blocks = [f"image_encoder.blocks.{i}." for i in range(depth)]
    if not blocks:
        raise KeyError("image_encoder.blocks.0.attn.rel_pos_h")
    relative = [tensors[block + "attn.rel_pos_h"] for block in blocks]
    # 2 g - 1 relative positions: a block over the whole grid; fewer: one over windows.
    windows = {(len(r) + 1) // 2 for r in relative if len(r) != 2 * grid - 1}
    if len(windows) > 1:
        raise ValueError(f"windows of several sizes: {sorted(windows)}")
    return _modeling.ImageEncoderViT(
        img_size=grid * patch,
        patch_size=patch,
        embed_dim=width,
        depth=len(blocks),
        num_heads=width // relative[0].shape[1],
        mlp_ratio=tensors[blocks[0] + "mlp.lin1.weight"].shape[0] / width,
        out_chans=prompt_dim,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=max(windows, default=0),
        global_attn_indexes=tuple(i for i, r in enumerate(relative) if len(r) == 2 * grid - 1),
    )


def _mask_decoder(tensors: dict[str, torch.Tensor], prompt_dim: int) -> torch.nn.Module:
    layers = "mask_decoder.transformer.layers."
    iou_head = "mask_decoder.iou_prediction_head.layers."
    return _modeling.MaskDecoder(
        transformer_dim=prompt_dim,
        transformer=_modeling.TwoWayTransformer(
            depth=_count(tensors, layers),
            embedding_dim=prompt_dim,
            mlp_dim=tensors[layers + "0.mlp.lin1.weight"].shape[0],
            num_heads=_DECODER_HEADS,
        ),
        num_multimask_outputs=tensors["mask_decoder.mask_tokens.weight"].shape[0] - 1,
        iou_head_depth=_count(tensors, iou_head),
        iou_head_hidden_dim=tensors[iou_head + "0.weight"].shape[0],
    )


def _count(tensors: dict[str, torch.Tensor], prefix: str) -> int:
    """How many numbered parts the names under a prefix tell of."""
    return len({name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)})


def read(source: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by Meta's names.

    Args:
      source: a file as Meta publishes it; a folder in Hugging Face layout; or a hub id.

    Raises:
      UserError: it is none of these, or has the name of a published file and is another.
    """
    path = Path(source)
    if path.is_dir() or (hub.is_id(str(source)) and not path.is_file()):
        return _read_folder(hub.locate(str(source)), str(source))
    if not path.is_file():
        raise UserError(
            f"No SAM checkpoint at {path}. Get one of segment-anything's (sam_vit_b_01ec64.pth, "
            "sam_vit_l_0b3195.pth, sam_vit_h_4b8939.pth; its README has the links) and give its "
            "path, --config.models.sam=FILE; or give a hub id, such as facebook/sam-vit-base."
        )
    checksums.check(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises many kinds
        machine.let_through(error, path, by_words=True)
        raise UserError(
            f"{path} is no SAM checkpoint: torch cannot read it ({type(error).__name__}). It has "
            f"{path.stat().st_size:,} bytes, SAM ViT-B 375 million: fetch it again."
        ) from None
    if other := names.other_model(tensors):
        raise UserError(
            f"{path} is a checkpoint of {other}, which is another architecture. Give one of SAM "
            "(sam_vit_b_01ec64.pth, ...) or what was fine-tuned from it, such as MedSAM."
        )
    if not isinstance(tensors, dict) or not all(torch.is_tensor(t) for t in tensors.values()):
        raise UserError(f"{path} is no SAM checkpoint: expected a dict of tensors by name.")
    return tensors


def _read_folder(folder: Path, source: str) -> dict[str, torch.Tensor]:
    """transformers' SamModel."""
    config = config_json.read(folder, source)
    config_json.check_kind(config, source, (config_json.SAM,), "the model of masks")
    tensors: dict[str, torch.Tensor] = {}
    for path in hub.weight_files(folder):
        try:
            if path.suffix == ".safetensors":
                tensors |= safetensors.torch.load_file(path)
            else:
                tensors |= torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # both libraries' readers raise many kinds
            machine.let_through(error, path, by_words=True)
            raise UserError(f"{path} cannot be read ({error}). Fetch it again.") from None
    return {new: tensors[old] for old, new in names.to_meta(tensors).items()}


def _check(
    path: str | Path, expected: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]
) -> None:
    """Complete in both directions: nothing missing, nothing left over, every shape right."""
    faults = [f"{name} is missing" for name in expected if name not in tensors]
    faults += [f"{name} is one too many" for name in tensors if name not in expected]
    faults += [
        f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(f"{path} is no SAM checkpoint: {'; '.join(faults[:5])}{more}.")
