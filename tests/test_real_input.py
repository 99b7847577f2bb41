"""Photographs through every stage, by a config alone, with models of real sizes and formats.

The models are random, of the size of ViT-S: this shows that the road is whole, not that it is good.
"""

import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from models import save_clip, save_dinov2
from PIL import Image

from fmbseg_jax.data import example, images, tfrecord
from labelling.sam.meta import segment_anything

PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "msrc"
pytestmark = pytest.mark.skipif(
    not PHOTOGRAPHS.exists(), reason="needs 48 MSRC photographs beside the project"
)


def save_sam(path):
    """SAM's own architecture with an encoder as small as ViT-S, at 512 pixels in patches of 16."""
    modeling = segment_anything.modeling
    encoder = modeling.ImageEncoderViT(
        img_size=512, patch_size=16, embed_dim=384, depth=4, num_heads=6, mlp_ratio=4,
        out_chans=256, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), use_rel_pos=True,
        window_size=14, global_attn_indexes=(3,),
    )  # fmt: skip
    prompts = modeling.PromptEncoder(
        embed_dim=256,
        image_embedding_size=(64, 64),
        input_image_size=(1024, 1024),
        mask_in_chans=16,
    )
    transformer = modeling.TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    decoder = modeling.MaskDecoder(transformer_dim=256, transformer=transformer)
    torch.manual_seed(0)
    torch.save(modeling.Sam(encoder, prompts, decoder).state_dict(), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four photographs, of both orientations, and words; one photograph is cut short."""
    root = tmp_path_factory.mktemp("photographs")
    (root / "photos" / "album").mkdir(parents=True)
    names = sorted(path.name for path in (PHOTOGRAPHS / "images").glob("*.png"))[::8][:4]
    for i, name in enumerate(names):
        photograph = Image.open(PHOTOGRAPHS / "images" / name).convert("RGB")
        photograph.save(root / "photos" / "album" / f"{i}.jpg", quality=90)
    (root / "photos" / "cut.jpg").write_bytes(
        (root / "photos" / "album" / "0.jpg").read_bytes()[:2000]
    )
    (root / "words.txt").write_text("water\nsky\ntree\nbuilding\n")
    small = {"width": 384, "depth": 3, "heads": 6}
    save_dinov2(root / "dinov2", image=518, patch=14, **small)
    save_clip(root / "clip", width=384, depth=2, image=224, patch=16, output=384)
    save_sam(root / "sam.pth")
    return root


def test_photographs_go_all_the_way(folder):
    workdir = folder / "work"
    fields = {
        "models.clip": folder / "clip",
        "models.sam": folder / "sam.pth",
        "models.vision": folder / "dinov2",
        "label.sam.points_per_side": 4,
        "label.sam.pred_iou": 0,  # what a random SAM thinks of its masks
        "label.sam.stability": 0,
        "label.min_crops": 1,
        "label.images_per_shard": 3,
        "train.heads": 6,
        "train.epochs": 2,
    }
    common = [f"--config={ROOT / 'configs' / 'folder.py'}", f"--workdir={workdir}"]
    common += [f"--config.{name}={value}" for name, value in fields.items()]
    data = [f"--images={folder / 'photos'}", f"--words={folder / 'words.txt'}"]
    labelled = run("labelling", *common, *data, "--figures=1").stdout
    assert "cut.jpg" in labelled
    run("fmbseg_jax.features", *common)
    run("train.py", *common)
    out = folder / "out"
    segmented = run(
        "fmbseg_jax.segment", f"--model={workdir / 'export'}", f"--images={folder / 'photos'}",
        "--words=water,sky,boat", f"--out={out}",
    ).stdout  # fmt: skip
    assert "skipped cut.jpg" in segmented

    records = tfrecord.RecordSource(tfrecord.find_shards(workdir / "pseudo_labels"))
    assert len(records) == 4
    for record in map(example.decode_pseudo_label, records):
        photograph = images.decode((folder / "photos" / record.filename).read_bytes())
        assert record.labels.shape == photograph.shape[:2]
        assert len(record.found)
        height, width = record.labels.shape
        assert np.all((record.points >= 0) & (record.points <= [width, height]))
    features = tfrecord.RecordSource(tfrecord.find_shards(workdir / "features"))
    assert example.decode_patch_features(features[3]).patches.shape == (32 * 32, 384)
    assert json.loads((workdir / "export" / "model.json").read_text())["images"] == 4
    for i in range(4):
        size = Image.open(folder / "photos" / "album" / f"{i}.jpg").size
        labels = Image.open(out / "labels" / "album" / f"{i}.png")
        assert labels.size == size
        assert np.asarray(labels).max() < 3
