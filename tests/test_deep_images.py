"""Images of more than 8 bits a channel, of many channels, and of many pixels."""

import io
import itertools
import struct
import warnings

import numpy as np
import pytest
from PIL import Image
from rasters import chunk, png, tiff

from fmbseg_jax import config
from fmbseg_jax.data import images, inputs
from fmbseg_jax.data.images import ImageError, Reading
from fmbseg_jax.errors import Notice, UserError

GREY = np.add.outer(np.arange(9), 7 * np.arange(16)) * 30  # 0 to 3390: 12 bits
RGB = np.stack([GREY, GREY[::-1] + 5, GREY // 2], -1)
TYPE = Reading("type")


def scaled(values, low=None, high=None):
    """What the values look like in 8 bits, uint8 [H, W, 3]."""
    values = np.asarray(values, np.float64)
    low = values.min() if low is None else low
    high = values.max() if high is None else high
    shares = np.round((values - low) / (high - low) * 255).astype(np.uint8)
    return shares if shares.ndim == 3 else np.repeat(shares[..., None], 3, -1)


def both_ways(data, reading=images.USUAL):
    """The image as it is read from a file, which is that of Pillow's image, opened by a user."""
    image = images.decode(data, reading)
    with Image.open(io.BytesIO(data)) as opened:
        before = opened.mode, opened.size
        for _ in range(2):  # it is the user's: a second look finds it as it was
            np.testing.assert_array_equal(images.pixels(opened, reading), image)
        opened.load()
        assert (opened.mode, opened.size) == before
    assert images.is_deep(data) and images.is_deep(io.BytesIO(data))
    return image


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("kind", "lowest"), [("u2", 0), ("i2", -1024), ("i4", -1024), ("i4", 10**6), ("f4", -100)]
)
def test_grey_tiffs(kind, lowest, order, compressed):
    """CT in Hounsfield units, heights in metres, 12 bits of a microscope: in either byte order."""
    values = (GREY + lowest).astype(kind)
    np.testing.assert_array_equal(
        both_ways(tiff(values, order, compressed=compressed)), scaled(values)
    )


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", "<>")
def test_colour_tiffs_have_one_range_and_all_of_their_bits(order, compressed):
    narrow = RGB // 40 + 20_000  # within 84 of 65,536 levels: 8 bits of 16 would be one colour
    for values in (RGB, narrow):
        data = tiff(values.astype(np.uint16), order, compressed=compressed)
        np.testing.assert_array_equal(both_ways(data), scaled(values))
    data = tiff((9 * RGB).astype(np.uint16), order, compressed=compressed)
    np.testing.assert_array_equal(both_ways(data, TYPE), scaled(9 * RGB, 0, 65535))


def test_32_bits_without_a_sign():
    values = (GREY * 1_000_000).astype(np.uint32)  # up to 3.4e9, where those with one are below 0
    np.testing.assert_array_equal(both_ways(tiff(values)), scaled(values.astype(np.int64)))
    with pytest.raises(ImageError, match="big-endian TIFF of 1 channel of 32 bits, unsigned"):
        images.decode(tiff(values, ">"))


@pytest.mark.parametrize("interlaced", [False, True])
def test_pngs(interlaced):
    np.testing.assert_array_equal(both_ways(png(RGB, 2, 16, interlaced=interlaced)), scaled(RGB))
    np.testing.assert_array_equal(both_ways(png(GREY, 0, 16, interlaced=interlaced)), scaled(GREY))


@pytest.mark.parametrize("top", [1023, 4095, 65535])
def test_portable_maps(top):
    """PGM and PPM say what their largest value is."""
    grey, colours = GREY % (top + 1), RGB % (top + 1)
    for number, plain, values in ((5, 2, grey), (6, 3, colours)):
        head = "P{} 16 9 {}\n"
        binary = head.format(number, top).encode() + values.astype(">u2").tobytes()
        text = head.format(plain, top) + " ".join(map(str, values.reshape(-1)))
        for data in (binary, f"{text}\n".encode()):
            np.testing.assert_array_equal(both_ways(data), scaled(values))
            np.testing.assert_array_equal(both_ways(data, TYPE), scaled(values, 0, top))


def test_opacity_of_16_bits():
    """What cannot be seen is white, and has no part in the range."""
    opacity = np.full((9, 16, 1), 65535)
    opacity[0], opacity[1] = 0, 32768
    values = RGB.copy()
    values[0] = 60_000
    expected = scaled(values, values[1:].min(), values[1:].max())
    for data in (
        png(np.concatenate([values, opacity], -1), 6, 16),
        tiff(np.concatenate([values, opacity], -1).astype(np.uint16), extra=[2]),
    ):
        image = both_ways(data)
        np.testing.assert_array_equal(image[2:], expected[2:])
        assert np.all(image[0] == 255)
        mixed = (expected[1].astype(float) + 255) / 2
        assert np.abs(image[1] - mixed).max() <= 1
    grey = png(np.concatenate([values[..., :1], opacity], -1), 4, 16)
    image = both_ways(grey)
    seen = values[1:, :, 0]
    np.testing.assert_array_equal(image[2:], scaled(values[2:, :, 0], seen.min(), seen.max()))
    assert np.all(image[0] == 255)


def test_a_colour_that_stands_for_transparent():
    hidden = chunk(b"tRNS", struct.pack(">H", 3390))
    values = GREY.copy()
    image = both_ways(png(values, 0, 16, hidden))
    assert np.all(image[-1, -1] == 255)
    assert image[0, 0, 0] == 0 and image[-2, -1, 0] == 255  # 3360, the highest that is seen
    hidden = chunk(b"tRNS", struct.pack(">HHH", *RGB[0, 0]))
    assert np.all(both_ways(png(RGB, 2, 16, hidden))[0, 0] == 255)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_same_of_few_bits(bits):
    values = GREY // 30 % 2**bits
    data = png(values, 0, bits, chunk(b"tRNS", struct.pack(">H", 2)))
    expected = np.where(values == 2, 255, values * (255 // (2**bits - 1)))
    np.testing.assert_array_equal(images.decode(data)[..., 0], expected)
    np.testing.assert_array_equal(images.pixels(Image.open(io.BytesIO(data)))[..., 0], expected)
    assert not images.is_deep(data)


def test_white_is_zero_in_some_tiffs():
    values = GREY.astype(np.uint16)
    data = tiff(values, photometric=0)
    np.testing.assert_array_equal(both_ways(data), 255 - scaled(values))


def test_exif_turns_deep_images():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG", exif=exif)
    (turn,) = (
        chunk(b"eXIf", part[4 : 4 + struct.unpack(">I", buffer.getvalue()[at - 4 : at])[0]])
        for at in [buffer.getvalue().index(b"eXIf")]
        for part in [buffer.getvalue()[at:]]
    )
    for values, colour in ((GREY, 0), (RGB, 2)):
        expected = np.rot90(scaled(values), -1)
        np.testing.assert_array_equal(both_ways(png(values, colour, 16, turn)), expected)


def test_one_value_and_strange_values():
    flat = np.full((3, 4), 700, np.uint16)
    with np.errstate(all="raise"):
        assert np.all(images.decode(tiff(flat)) == 0)
    np.testing.assert_array_equal(images.decode(tiff(flat), TYPE), scaled(flat, 0, 65535))
    for strange in (np.nan, np.inf):
        values = GREY.astype(np.float32)
        values[1, 1] = strange
        with pytest.raises(ImageError, match="not finite"):
            images.decode(tiff(values))


def test_scaling_by_type():
    shares = (GREY / 4000).astype(np.float32)
    np.testing.assert_array_equal(images.decode(tiff(shares), TYPE), scaled(shares, 0, 1))
    signed = tiff(GREY.astype(np.int16))
    np.testing.assert_array_equal(images.decode(signed, TYPE), scaled(GREY, 0, 32767))
    for values, top in ((GREY.astype(np.float32), 1), ((GREY - 9).astype(np.int16), 32767)):
        with pytest.raises(ImageError, match=f"scales from 0 to {top}, .* take deep=file"):
            images.decode(tiff(values), TYPE)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("compressed", [False, True])
def test_other_tiffs_are_refused_not_guessed(order, compressed):
    small, deep = (RGB // 16).astype(np.uint8), RGB.astype(np.uint16)
    four = np.concatenate([small, small[..., :1]], -1)
    for values, options, told in (
        (small[..., :2], {"extra": [0]}, "it has 2 channels; choose three"),
        (four, {"extra": [0]}, "it has 4 channels; choose three"),
        (np.concatenate([four, small], -1), {"extra": [0] * 4}, "it has 7 channels"),
        (four.astype(np.uint16), {"extra": [0]}, "it has 4 channels"),
        (small, {"pages": 3}, "it has 3 pages"),
        (deep, {"planar": True}, "planar"),
        (four.astype(np.uint16), {"extra": [1]}, "multiplied by their opacity"),
        (small[..., 0].astype(np.int8), {}, "signed 8-bit"),
        (GREY.astype(np.float64), {}, "TIFF of 1 channel of 64 bits, floating point, is not read"),
        (RGB.astype(np.float32), {}, "TIFF of 3 channels of 32 bits, floating point, is not read"),
    ):
        with pytest.raises(ImageError, match=told):
            images.decode(tiff(values, order, compressed=compressed, **options))
    inks = tiff(four, order, compressed=compressed, photometric=5)
    assert images.decode(inks).shape == small.shape
    opacity = tiff(four, order, compressed=compressed, extra=[2])
    assert images.decode(opacity).shape == small.shape
    np.testing.assert_array_equal(images.decode(tiff(small, order, planar=True)), small)


def test_what_is_said_of_deep_images(tmp_path):
    told = config.Data(deep="file").reading.of_deep(3, "x.tif")
    assert told == (
        "3 images have more than 8 bits a channel, such as x.tif: each is scaled from its lowest "
        "to its highest value; --config.data.deep=type scales by what the type holds."
    )
    told = config.Eval(deep="type").reading.of_deep(1, "x.tif")
    assert "1 image, x.tif, has more than 8 bits a channel: each is scaled by what its" in told
    assert "--config.eval.deep=file scales from its lowest" in told
    assert not images.USUAL.of_deep(0, "")
    (tmp_path / "a.tif").write_bytes(tiff(GREY.astype(np.uint16)))
    Image.fromarray((RGB // 16).astype(np.uint8)).save(tmp_path / "b.png")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            inputs.image(tmp_path / "a.tif", TYPE)
            inputs.image(Image.open(tmp_path / "a.tif"), TYPE)
            inputs.image(tmp_path / "b.png")
    (notice,) = (one for one in caught if issubclass(one.category, Notice))
    assert "Some images have more than 8 bits a channel: each is scaled by" in str(notice.message)


def test_wrong_options_are_refused():
    for section in ("data", "eval"):
        wrong = config.Config()
        getattr(wrong, section).deep = "window"
        getattr(wrong, section).max_megapixels = 10**6
        with pytest.raises(UserError) as error:
            wrong.validate()
        assert f"{section}.deep is one of file, type; got 'window'." in str(error.value)
        assert f"{section}.max_megapixels is at most 3600" in str(error.value)


def test_large_images(monkeypatch):
    """The limit is a reading's own, and not Pillow's, which is one of the whole process."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    buffer = io.BytesIO()
    Image.new("1", (2001, 1000), 1).save(buffer, "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert images.decode(buffer.getvalue(), Reading(megapixels=3)).shape == (1000, 2001, 3)
    small = (RGB // 16).astype(np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values, compressed in itertools.product(
            (small, small[..., 0], RGB.astype("u2")), (0, 1)
        ):
            data = tiff(values, compressed=compressed)
            assert images.decode(data).shape == small.shape
    with pytest.raises(
        ImageError,
        match=r"3 megapixels \(2001 x 1000\), and the limit is 2; "
        r"--config.data.max_megapixels=3 raises it",
    ):
        images.decode(buffer.getvalue(), config.Data(max_megapixels=2).reading)
    assert images.size(buffer.getvalue()) == (1000, 2001)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_tga_is_told_by_its_name():
    picture = Image.fromarray((RGB // 16).astype(np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "TGA")
    data = buffer.getvalue()[:-26]  # without the mark at the end that newer ones have
    np.testing.assert_array_equal(images.decode(data, name="sub/a.TGA"), np.asarray(picture))
    with pytest.raises(ImageError, match="not an image file"):
        images.decode(data, name="a.jpg")
    buffer = io.BytesIO()
    unused = np.dstack([np.asarray(picture), np.zeros(RGB.shape[:2], np.uint8)])
    Image.fromarray(unused).save(buffer, "TGA")
    data = bytearray(buffer.getvalue())
    data[17] &= 0xF0  # no bit of the fourth byte is opacity
    np.testing.assert_array_equal(images.decode(bytes(data), name="a.tga"), np.asarray(picture))
