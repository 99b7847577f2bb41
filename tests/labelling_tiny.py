"""What the tests of labelling share: a tiny random SAM, pictures, and a way to run the program."""

from __future__ import annotations

import runpy
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from absl import flags
from models import at_unit_scale

from labelling.sam.meta import segment_anything

WORDS = ("sky", "grass", "sail boat", "cat")
CONFIG = """
from fmbseg_jax.config import Config

def get_config():
    config = Config()
    config.data.images, config.data.words = "{0}/images", "{0}/words.txt"
    config.models.clip, config.models.sam = "{0}/clip", "{0}/sam.pth"
    config.label.short_side, config.label.crop, config.label.stride = 48, 32, 16
    config.label.images_per_shard = 3
    config.label.sam.points_per_side = 4
    config.label.sam.pred_iou = config.label.sam.stability = 0.0
    return config
"""


def build_sam() -> torch.nn.Module:
    """64 px, patch 8: two blocks, one over windows of 3 × 3 patches, one over all 8 × 8."""
    torch.manual_seed(0)  # of the random position encoding
    modeling = segment_anything.modeling
    sam = modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            img_size=64, patch_size=8, embed_dim=24, depth=2, num_heads=2, mlp_ratio=2,
            out_chans=32, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), use_rel_pos=True,
            window_size=3, global_attn_indexes=(1,),
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=32, image_embedding_size=(8, 8), input_image_size=(64, 64), mask_in_chans=8
        ),
        mask_decoder=modeling.MaskDecoder(
            transformer_dim=32, num_multimask_outputs=3, iou_head_depth=2, iou_head_hidden_dim=20,
            transformer=modeling.TwoWayTransformer(
                depth=1, embedding_dim=32, mlp_dim=40, num_heads=8
            ),
        ),
        pixel_mean=[123.675, 116.28, 103.53], pixel_std=[58.395, 57.12, 57.375],
    )  # fmt: skip
    return at_unit_scale(sam, seed=6)  # one that gives masks neither empty nor full


def save_sam(path: Path) -> Path:
    torch.save(build_sam().state_dict(), path)
    return path


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours: uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(12 * (a * y + b * x) + c) for a, b, c in rng.normal(size=(3, 3))]
    return np.uint8(127.5 + 127 * np.stack(waves, -1))


def run(*arguments: str) -> tuple[int, str]:
    """`python -m labelling ARGUMENTS` in this process: its exit code and its error message.

    The flags it defines are taken away again, so that other programs can define theirs.
    """
    known = flags.FLAGS._flags()
    ours = ("config", "workdir", "images", "words", "strict", "figures", "predict", "benchmark")
    ours += ("engine", "workers")
    before = {name: known.pop(name) for name in ours if name in known}
    argv, sys.argv = sys.argv, ["labelling", *map(str, arguments)]
    try:
        runpy.run_module("labelling", run_name="__main__")
    except SystemExit as end:
        return (1, end.code) if isinstance(end.code, str) else (end.code or 0, "")
    finally:
        sys.argv = argv
        for name in [name for name in known if name.split(".")[0] in ours]:
            del known[name]
        known.update(before)
    raise AssertionError("the program ends with an exit code")
