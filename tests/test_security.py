"""What comes from others: it may be wrong or hostile, and must not run code or write elsewhere."""

import io
import json
import os
import subprocess

import numpy as np
import pytest
from PIL import Image

import fmbseg_jax
from fmbseg_jax.data import example, finding, images, label_maps
from fmbseg_jax.datasets import coco
from fmbseg_jax.datasets import folder as benchmarks
from fmbseg_jax.errors import UserError
from fmbseg_jax.io import files

OUTSIDE = ["../a.jpg", "sub/../../a.jpg", "/etc/passwd", "", "..\\..\\a.jpg", "a\0.jpg"]
INSIDE = ["a.jpg", "sub/a.jpg", "a..b.jpg", "12:30.jpg", "..a/b", "ü/猫.png"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_records_cannot_name_files_elsewhere(name):
    """`label --figures` writes pictures by the names in the records."""
    labelled = example.PseudoLabel(b"image", name, np.zeros((2, 2), np.uint16))
    with pytest.raises(UserError, match="may lie outside its folder"):
        example.decode_pseudo_label(example.encode(labelled))
    features = example.PatchFeatures(
        np.zeros((1, 3), np.float16), np.zeros(1, np.uint16), np.ones(2, np.int32), name
    )
    with pytest.raises(UserError, match="may lie outside its folder"):
        example.decode_patch_features(example.encode(features))


@pytest.mark.parametrize("name", INSIDE)
def test_usual_names_are_fine(name):
    assert files.inside(name, "A record") == name


def test_lists_of_a_benchmark_cannot_name_files_elsewhere(tmp_path):
    """`label --predict` writes label maps by the names in the split."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("good\n../../../evil\n")
    with pytest.raises(UserError, match=r"val.txt names the image '../../../evil'"):
        benchmarks.open_published("voc20", tmp_path)


def test_decompression_bombs_are_refused(tmp_path):
    """A gigapixel in a hundred kilobytes is not unpacked."""
    bomb = tmp_path / "bomb.png"
    Image.new("1", (40_000, 40_000)).save(bomb)
    assert bomb.stat().st_size < 400_000
    with pytest.raises(images.ImageError, match="it has 1600 megapixels .*the limit is 178"):
        images.decode(bomb.read_bytes())


def test_nothing_but_pictures_is_opened():
    """Whatever a file is called: Pillow would hand PostScript to an interpreter."""
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"
    with pytest.raises(images.ImageError, match="not an image file"):
        images.decode(postscript)


def test_a_segmented_folder_cannot_leave_its_folder(tmp_path):
    """Links inside the images are followed to read; what is written stays under --out."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "elsewhere.png")
    (tmp_path / "photos" / "link.png").symlink_to(tmp_path / "elsewhere.png")
    from fmbseg_jax.outputs.folder import Outputs

    names = finding.find_images(tmp_path / "photos")
    outputs = Outputs(
        tmp_path / "out", tmp_path / "photos", ["sky"], finding.png_names(names), False
    )
    before = (tmp_path / "elsewhere.png").read_bytes()
    outputs.write(names[0], 0, np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint16), None)
    assert (tmp_path / "elsewhere.png").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "elsewhere.png", "out"}


def test_label_maps_are_pngs_alone(tmp_path):
    """Also those within records: Pillow would start a program for some other formats."""
    stream = io.BytesIO()
    Image.new("L", (4, 4)).save(stream, "EPS")
    with pytest.raises(UserError, match="The label map of a.png cannot be read"):
        label_maps.decode(stream.getvalue(), "a.png")
    (tmp_path / "0.png").write_bytes(stream.getvalue())
    (tmp_path / "panoptic.json").write_text(
        '{"annotations": [{"file_name": "0.png", "segments_info": []}]}'
    )
    with pytest.raises(UserError, match="0.png cannot be read"):
        coco.read_panoptic(tmp_path / "0.png", tmp_path / "panoptic.json")


def test_an_export_may_not_ask_for_everything(world, tmp_path):
    from models import save_aligner

    export = save_aligner(tmp_path / "export", world.root)
    model = json.loads((export / "model.json").read_text())
    changed = model | {"config": model["config"] | {"eval.max_megapixels": 3600}}
    (export / "model.json").write_text(json.dumps(changed))
    assert fmbseg_jax.load(export).reading.megapixels == 178
    assert fmbseg_jax.load(export, {"max_megapixels": 500}).reading.megapixels == 500


def test_what_another_run_is_writing_stays(tmp_path):
    """Only what dead processes of this machine, or those of others, have left is removed."""
    ours = files.incomplete(tmp_path / "a.png")
    sleeping = subprocess.Popen(["sleep", "600"])
    alive = tmp_path / ours.name.replace(f"-{os.getpid()}-", f"-{sleeping.pid}-")
    for path in (ours, alive):
        path.touch()
    files.remove_abandoned(tmp_path)
    assert alive.exists() and not ours.exists()
    sleeping.kill()
    sleeping.wait()
    files.remove_abandoned(tmp_path)
    assert not alive.exists()


def test_long_names_can_be_written(tmp_path):
    path = tmp_path / f"{'字' * 83}.png"  # 253 bytes of 255
    files.write_atomically(path, b"data")
    assert path.read_bytes() == b"data"
    assert len(list(tmp_path.iterdir())) == 1
