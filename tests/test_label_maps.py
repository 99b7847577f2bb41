"""Label maps as people have them: every kind of PNG that holds indices, and what is refused."""

import io
import json
import os
import struct

import numpy as np
import pytest
from PIL import Image
from rasters import chunk, png

from fmbseg_jax.data import label_maps
from fmbseg_jax.datasets import coco
from fmbseg_jax.datasets.completeness import check
from fmbseg_jax.datasets.folder import open_folder
from fmbseg_jax.errors import UserError
from fmbseg_jax.evaluation.report import print_checks
from fmbseg_jax.vocabulary import IGNORE
from labelling.shards.annotated import annotated_image

INDICES = np.arange(9 * 13).reshape(9, 13)
PALETTE = chunk(b"PLTE", bytes(range(255, -1, -1)) * 3)
HIDDEN = {0: chunk(b"tRNS", struct.pack(">H", 1)), 3: chunk(b"tRNS", b"\0\x80")}
"""By type of colour, a chunk that makes index 1, or 0 and 1, transparent."""


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(
    ("colour", "bits"), [(0, b) for b in (1, 2, 4, 8, 16)] + [(3, b) for b in (1, 2, 4, 8)]
)
def test_indices_of_any_depth(tmp_path, colour, bits, interlaced):
    indices = INDICES % min(2**bits, 100)
    file = tmp_path / "a.png"
    palette = [PALETTE[:8] + PALETTE[8 : 8 + 3 * 2**bits]]
    palette = [chunk(b"PLTE", palette[0][8:])] if colour == 3 else []
    for extra in ([], [HIDDEN[colour]]):
        file.write_bytes(png(indices, colour, bits, *palette, *extra, interlaced=interlaced))
        np.testing.assert_array_equal(label_maps.read(file, 100), indices)
        expected = np.uint16 if bits == 16 else np.uint8
        assert label_maps.read_values(file).dtype == expected


def test_the_largest_index_of_few_bits_is_a_word(tmp_path):
    """255 of 8 bits is no word; of 4 bits 15 is one, of 1 bit 1."""
    for bits, colour in ((1, 0), (2, 0), (4, 0), (4, 3)):
        palette = [chunk(b"PLTE", bytes(3 * 2**bits))] * (colour == 3)
        (tmp_path / "a.png").write_bytes(png(INDICES % 2**bits, colour, bits, *palette))
        assert label_maps.read(tmp_path / "a.png", 2**bits).max() == 2**bits - 1
    (tmp_path / "a.png").write_bytes(png(np.full((2, 2), 255), 0, 8))
    assert np.all(label_maps.read(tmp_path / "a.png", 2) == IGNORE)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_nothing_but_png_content(tmp_path, kind):
    file = tmp_path / "a.png"
    Image.fromarray((INDICES % 3).astype(np.uint8)).save(file, kind)
    with pytest.raises(UserError, match=f"a.png cannot be read: it is a {kind} file") as error:
        label_maps.read(file, 100)
    assert ("changes values" in str(error.value)) == (kind in ("JPEG", "WEBP"))
    assert "Save label maps as PNG" in str(error.value)


def test_maps_of_several_channels(tmp_path):
    file, small = tmp_path / "a.png", (INDICES % 3).astype(np.uint8)
    for image, told in (
        (np.stack([small] * 3, -1), "mode RGB; .* three channels are equal: save one of them"),
        (np.stack([small, small, small + 1], -1), "mode RGB; .* map of colours has to be conv"),
        (np.stack([small] * 4, -1), "mode RGBA; .* without opacity"),
        (Image.fromarray(np.stack([small] * 2, -1), "LA"), "mode LA; .* without opacity"),
    ):
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file)
        with pytest.raises(UserError, match=told):
            label_maps.read(file, 100)
    file.write_bytes(png(np.stack([INDICES] * 2, -1), 4, 16))
    with pytest.raises(UserError, match="without opacity"):
        label_maps.read(file, 100)
    file.write_bytes(png(INDICES, 0, 8)[:-30])
    with pytest.raises(UserError, match="a.png cannot be read"):
        label_maps.read(file, 200)


def test_maps_within_records_are_of_one_channel():
    data = io.BytesIO()
    Image.new("RGB", (4, 4)).save(data, "PNG")
    with pytest.raises(UserError, match="The label map of x has mode RGB"):
        label_maps.decode(data.getvalue(), "x")


def test_exif_of_image_and_map(tmp_path):
    """Label maps are upright; one that has the rotation of its image is turned with it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph = io.BytesIO()
    Image.new("RGB", (13, 9)).save(photograph, "JPEG", exif=exif)
    lying = Image.fromarray((INDICES % 3).astype(np.uint8))
    lying.save(tmp_path / "a.png")
    with pytest.raises(UserError, match="13 × 9 pixels, its image a.jpg 9 × 13 .*EXIF data"):
        annotated_image(tmp_path, photograph.getvalue(), "a.jpg", 3)
    lying.save(tmp_path / "a.png", exif=exif)
    label = annotated_image(tmp_path, photograph.getvalue(), "a.jpg", 3)
    np.testing.assert_array_equal(label.labels, np.rot90(INDICES % 3, -1))


def test_panoptic_maps(tmp_path):
    """The number of a segment is R + 256 G + 65536 B, in colours of 8 bits or a palette of them."""
    segments = [{"id": 1 + 256 * 2, "category_id": 17}, {"id": 65536 * 3, "category_id": 92}]
    described = {"annotations": [{"file_name": "a.png", "segments_info": segments}]}
    (tmp_path / "all.json").write_text(json.dumps(described))
    colours = np.zeros((2, 3, 3), np.uint8)
    colours[0], colours[1, 0] = (1, 2, 0), (0, 0, 3)
    expected = [[17, 17, 17], [92, 0, 0]]
    file = tmp_path / "a.png"
    indexed = Image.fromarray(np.array([[1, 1, 1], [2, 0, 0]], np.uint8))
    indexed.putpalette([0, 0, 0, 1, 2, 0, 0, 0, 3])
    for image in (Image.fromarray(colours), indexed):
        image.save(file)
        np.testing.assert_array_equal(coco.read_panoptic(file, tmp_path / "all.json"), expected)
    file.write_bytes(png(colours.astype(np.int64) * 256, 2, 16))
    with pytest.raises(UserError, match=r"mode RGB \(RGB;16B\); .* RGB of 8 bits"):
        coco.read_panoptic(file, tmp_path / "all.json")
    file.write_bytes(png(np.full((2, 3), 513), 0, 16))
    with pytest.raises(UserError, match="RGB of 8 bits"):
        coco.read_panoptic(file, tmp_path / "all.json")
    Image.fromarray(colours).save(file, "JPEG")
    with pytest.raises(UserError, match="it is a JPEG file, which changes values"):
        coco.read_panoptic(file, tmp_path / "all.json")


def test_what_the_truth_lacks_is_said(tmp_path, capsys):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    (tmp_path / "words.txt").write_text("sky\nmoon\nboat\n")
    labels = np.full((4, 5), 255, np.uint8)
    labels[0], labels[1, 0] = 0, 2
    Image.new("RGB", (5, 4)).save(tmp_path / "images/a.jpg")
    Image.fromarray(labels).save(tmp_path / "labels/a.png")
    print_checks([check(open_folder(tmp_path))])
    told = capsys.readouterr().out
    assert (
        "70.0% of the ground truth has no class, and is not counted; no pixel has the class moon."
        in told
    )
    labels[2] = 1
    Image.fromarray(labels).save(tmp_path / "labels/a.png")
    print_checks([check(open_folder(tmp_path))])
    assert "45.0% of the ground truth" in (told := capsys.readouterr().out)
    assert "every class has pixels" in told


def test_a_pipe_and_a_huge_map_are_refused(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UserError, match="a.png cannot be read: It is a pipe or a device"):
        label_maps.read(tmp_path / "a.png", 3)
    (tmp_path / "b.png").write_bytes(label_maps.encode(np.zeros((1100, 1000), np.uint16)))
    with pytest.raises(UserError, match="1000 × 1100 pixels, more than the 1,000,000"):
        label_maps.read(tmp_path / "b.png", 3, megapixels=1)
    assert label_maps.read(tmp_path / "b.png", 3, megapixels=2).shape == (1100, 1000)
