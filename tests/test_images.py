"""Every kind of image that people have, and files that are none."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from fmbseg_jax.data import finding, images, opening
from fmbseg_jax.errors import UserError

RGB = np.asarray(
    [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[9, 9, 9], [99, 99, 99], [250, 250, 250]]], np.uint8
)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_rgb_and_grey():
    np.testing.assert_array_equal(images.decode(encoded(Image.fromarray(RGB))), RGB)
    grey = images.decode(encoded(Image.fromarray(RGB[..., 0])))
    np.testing.assert_array_equal(grey, np.repeat(RGB[..., :1], 3, -1))


def test_palette_and_bilevel():
    palette = Image.fromarray(RGB).quantize(16)
    np.testing.assert_array_equal(
        images.decode(encoded(palette)), np.asarray(palette.convert("RGB"))
    )
    bits = images.decode(encoded(Image.fromarray(np.asarray([[0, 255]], np.uint8)).convert("1")))
    np.testing.assert_array_equal(bits[0, :, 0], [0, 255])


def test_transparency_is_laid_over_white():
    rgba = np.dstack([RGB, np.asarray([[255, 0, 128], [255, 0, 255]], np.uint8)])
    decoded = images.decode(encoded(Image.fromarray(rgba)))
    np.testing.assert_array_equal(decoded[0, :2], [[255, 0, 0], [255, 255, 255]])
    assert 120 < decoded[0, 2, 0] < 135
    grey_alpha = Image.fromarray(np.asarray([[[0, 0], [0, 255]]], np.uint8), "LA")
    np.testing.assert_array_equal(images.decode(encoded(grey_alpha))[0, :, 0], [255, 0])


def test_16_bits_are_scaled_not_cut():
    deep = np.asarray([[0, 257, 32896, 65535]], np.uint16)
    np.testing.assert_array_equal(
        images.decode(encoded(Image.fromarray(deep)))[0, :, 0], [0, 1, 128, 255]
    )


def test_cmyk():
    cmyk = Image.fromarray(RGB).convert("CMYK")
    decoded = images.decode(encoded(cmyk, "TIFF"))
    np.testing.assert_array_equal(decoded, np.asarray(cmyk.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation):
    tall = np.zeros((6, 4, 3), np.uint8)
    tall[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = images.decode(encoded(Image.fromarray(tall), "PNG", exif=exif))
    assert decoded.shape == ((6, 4, 3) if orientation < 5 else (4, 6, 3))
    corner = {
        1: (0, 0),
        2: (0, -1),
        3: (-1, -1),
        4: (-1, 0),
        5: (0, 0),
        6: (0, -1),
        7: (-1, -1),
        8: (-1, 0),
    }
    assert np.all(decoded[corner[orientation]] == 255)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "not an image file"),
        (lambda data: b"<html>no image</html>", "not an image file"),
        (lambda data: data[: len(data) // 2], "cannot be read: "),
        (lambda data: data[:100], "cannot be read: "),
        (lambda data: b"\0" * 20 + data[20:], "not an image file"),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_damaged_files_say_why(kind, damage, reason):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with pytest.raises(images.ImageError, match=reason):
        images.decode(damage(encoded(Image.fromarray(noise), kind)))


@pytest.mark.parametrize("data", [b"P", b"\x28", b"BM", b"II*\0", b"\xff\xd8\xff"])
def test_files_of_a_few_bytes(data):
    for name in ("a.jpg", "a.dib", "a.tga"):
        with pytest.raises(images.ImageError, match="not an image file, or damaged at its start"):
            images.decode(data, name=name)
        assert images.size(data, name) == (0, 0)
    assert opening.kind(b"P") == opening.kind(b"") == ""


@pytest.mark.parametrize("kind", ["AVIF", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_kinds(kind):
    image = images.decode(encoded(Image.new("RGB", (5, 4), (250, 0, 0)), kind))
    assert image.shape == (4, 5, 3) and image[..., 0].min() > 240 and image[..., 1:].max() < 10


@pytest.mark.parametrize("shape", [(1, 1), (1, 20_000), (20_000, 1)])
def test_extreme_shapes(shape):
    image = images.decode(encoded(Image.new("RGB", shape[::-1], (1, 2, 3))))
    assert image.shape == (*shape, 3)
    resized = images.resize(image, images.resized_shape(*shape, 448))
    assert min(resized.shape[:2]) == 448
    assert max(resized.shape[:2]) <= images.LONG_SIDE
    assert np.all(resized == [1, 2, 3])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((480, 640), (448, 597)),
        ((500, 375), (597, 448)),
        ((448, 448), (448, 448)),
        ((1024, 2048), (448, 896)),
        ((400, 4000), (448, 2048)),
    ],
)
def test_resized_shape(shape, expected):
    assert images.resized_shape(*shape, 448) == expected


def test_labels_are_resized_by_the_nearest():
    labels = np.arange(6, dtype=np.uint16).reshape(2, 3)
    np.testing.assert_array_equal(images.resize_labels(labels, (4, 6))[::2, ::2], labels)
    np.testing.assert_array_equal(images.resize_labels(labels, (1, 1)), [[4]])


def test_finding_images(tmp_path, capsys):
    with pytest.raises(UserError, match="No folder of images"):
        finding.find_images(tmp_path / "none")
    with pytest.raises(UserError, match="No images in"):
        finding.find_images(tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "IMG_1.HEIC").touch()
    with pytest.raises(UserError, match="for their kind: 1, such as b/IMG_1.HEIC; JPEG is"):
        finding.find_images(tmp_path)
    (tmp_path / ".thumbnails").mkdir()
    for name in ["b/c.JPG", "a.png", "b/.hidden.png", ".thumbnails/a.png", "notes.txt"]:
        (tmp_path / name).touch()
    (tmp_path / "b" / "back").symlink_to(tmp_path)
    (tmp_path / "b" / "again").symlink_to(tmp_path / "b")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")  # whoever reads it is told
    (tmp_path / os.fsdecode(b"caf\xe8.png")).touch()
    assert finding.find_images(tmp_path) == ["a.png", "b/c.JPG", "gone.png"]
    told = capsys.readouterr().out
    assert "for their kind: 1, such as b/IMG_1.HEIC" in told
    assert r"not UTF-8: 1, such as caf\udce8.png" in told


def test_results_of_segmenting_are_no_images(tmp_path):
    for name in ["a.png", "out/segment.json", "out/labels/a.png", "out/overlays/a.jpg"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ["labels/b.png", "out/contact_sheet.png", "out/c.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    expected = ["a.png", "labels/b.png", "out/c.png"]
    assert finding.find_images(tmp_path) == expected
    assert finding.find(f"{tmp_path}/**/*", tmp_path / "new").names == expected


def test_names_of_results():
    names = ["a.jpg", "b.jpg", "b.png", "sub/b.jpg"]
    assert list(finding.png_names(names, whole=True).values()) == [
        "a.png", "b.jpg.png", "b.png.png", "sub/b.png"
    ]  # fmt: skip
    with pytest.raises(UserError, match="b.jpg and b.jpg.bmp would both have b.jpg.png"):
        finding.png_names(["b.jpg", "b.png", "b.jpg.bmp"], whole=True)
    with pytest.raises(UserError, match="b.jpg and b.png would both have b.png"):
        finding.png_names(names)


def test_normalise():
    out = images.normalise(np.asarray([[[0, 255, 51]]], np.uint8), (0.5, 0.5, 0.2), (0.5, 0.25, 1))
    np.testing.assert_allclose(out, [[[-1, 2, 0]]], atol=1e-6)
