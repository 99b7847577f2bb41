"""What comes from others: it may be wrong or hostile, and must not run code or write elsewhere."""

import numpy as np
import pytest
from PIL import Image

from fmbseg_jax.data import benchmarks, example, images
from fmbseg_jax.errors import UserError

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
    assert images.inside(name, "A record") == name


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
    with pytest.raises(images.ImageError, match="(?i)decompression bomb"):
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
    from fmbseg_jax.outputs import Outputs

    names = images.find_images(tmp_path / "photos")
    outputs = Outputs(
        tmp_path / "out", tmp_path / "photos", ["sky"], images.png_names(names), False
    )
    outputs.write(names[0], np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint16), None)
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "elsewhere.png", "out"}
