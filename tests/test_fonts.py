"""Text in pictures: letters of every alphabet, and those that no font here has."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image, ImageDraw, ImageFont

from fmbseg_jax.outputs import fonts, overlays
from fmbseg_jax.outputs.colours import PAPER
from labelling.figures import draw_points

DEJAVU = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
INK = 34, 36, 42


@pytest.fixture(autouse=True)
def listed(monkeypatch):
    """The fonts of this system: none, but those that a test adds."""
    paths = []
    monkeypatch.setattr(fonts, "_listed", lambda: paths)
    caches = (fonts._installed, fonts._faces, fonts._tell, fonts._letters)
    for cache in caches:
        cache.cache_clear()
    yield paths
    for cache in caches:
        cache.cache_clear()


def drawn(text, size=24, anchor="la", at=(150, 60)):
    """A text on paper, grey [120, 300]; the darker, the more ink."""
    canvas = Image.new("L", (300, 120), 255)
    draw = ImageDraw.Draw(canvas)
    fonts.Font(size).draw(draw, at, text, "black", anchor)
    return 255 - np.asarray(canvas)


def bounds(ink):
    """(left, top, right, bottom) of what is drawn."""
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def test_ascii_is_drawn_as_pillow_draws_it():
    letters = ImageFont.load_default(24)
    for anchor in ("la", "ms", "rm", "lm"):
        canvas = Image.new("L", (300, 120), 255)
        ImageDraw.Draw(canvas).text((150, 60), "sail boat, 7 %", "black", letters, anchor)
        np.testing.assert_array_equal(
            drawn("sail boat, 7 %", anchor=anchor), 255 - np.asarray(canvas)
        )
    assert fonts.Font(24).length("sky") == letters.getlength("sky")


WORDS = "café", "Müller", "Straße", "łąka", "небо", "ουρανός", "đường phố", "שמיים", "سماء"


@pytest.mark.parametrize("word", WORDS)
def test_letters_of_many_alphabets_are_there(word, capsys):
    letters = {letter for letter in word if not letter.isascii()}
    assert all(overlays.legend([letter], 60).tobytes() != BOX for letter in letters)
    size = 24 * 0.92
    expected = ImageFont.truetype(DEJAVU, size).getlength(word)
    assert fonts.Font(24).length(word) == pytest.approx(expected)
    canvas = Image.new("L", (300, 120), 255)
    line = 60 + ImageFont.load_default(24).getmetrics()[0]
    font = ImageFont.truetype(DEJAVU, size)
    ImageDraw.Draw(canvas).text((150, line), word, "black", font, "ls")
    np.testing.assert_array_equal(drawn(word), 255 - np.asarray(canvas))
    assert capsys.readouterr().err == ""


def box():
    """What Pillow's own font draws of any letter beyond ASCII."""
    sheet = overlays.legend(["s"], 60)
    canvas = Image.fromarray(sheet)
    ImageDraw.Draw(canvas).rectangle((24, 0, 60, 40), PAPER)
    ImageDraw.Draw(canvas).text((25, 2), "é", INK, ImageFont.load_default(15))
    return np.asarray(canvas).tobytes()


BOX = box()


def test_words_stand_on_one_line_whatever_their_letters():
    """The Latin x beside the Cyrillic one, from another font."""
    for anchor in ("la", "ls", "lm"):
        latin, cyrillic = (bounds(drawn(x, 40, anchor)) for x in ("x", "х"))
        assert abs(latin[3] - cyrillic[3]) <= 1 and abs(latin[1] - cyrillic[1]) <= 2


def test_anchors_of_other_letters():
    assert bounds(drawn("небо", anchor="rm"))[2] == pytest.approx(150, abs=2)
    left, _, right, _ = bounds(drawn("небо", anchor="ms"))
    assert (left + right) / 2 == pytest.approx(150, abs=2)
    draw = ImageDraw.Draw(Image.new("L", (9, 9)))
    for text in ("небо", "sky"):
        np.testing.assert_allclose(
            fonts.Font(24).box(draw, (150, 60), text), bounds(drawn(text)), atol=2
        )


def test_accents_that_are_letters_of_their_own():
    np.testing.assert_array_equal(drawn("cafe\u0301"), drawn("café"))


# Letters that DejaVu lacks


def make_font(path, letters):
    """A font whose letters are all one black square, as wide as the font is high."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(letter): "square" for letter in letters})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupOS2()
    builder.setupPost()
    path.parent.mkdir(parents=True, exist_ok=True)
    builder.save(path)
    return path


def test_a_font_of_the_system_has_them(listed, tmp_path, capsys):
    (tmp_path / "Damaged.ttf").write_bytes(b"no font")
    make_font(tmp_path / "LastResort.otf", "天空")
    make_font(tmp_path / "ZBold.ttf", "天空")
    plain = make_font(tmp_path / "Z.ttf", "天空")
    listed += [path for path in tmp_path.iterdir()]
    ink = drawn("天空", 24)
    left, top, right, bottom = bounds(ink)
    assert (right - left, bottom - top) == (48, 24) and ink[top:bottom, left:right].min() == 255
    parts = fonts.split("sky 天空 небо")
    assert [text for _, text in parts] == ["sky ", "天空 ", "небо"]
    assert [face.path for face, _ in parts] == [DEJAVU, plain, DEJAVU]
    assert fonts.Font(24).length("天空") == 48
    assert capsys.readouterr().err == ""


def test_one_font_for_a_text_where_one_has_all_of_it(listed, tmp_path):
    whole = make_font(tmp_path / "Whole.ttf", "sky天")
    listed += [whole, make_font(tmp_path / "WholeBold.ttf", "天")]
    assert [(face.path.name, text) for face, text in fonts.split("sky 天")] == [
        ("Whole.ttf", "sky 天")
    ]


def test_letters_that_no_font_has_are_told_of_once(capsys):
    overlays.legend(["天空", "sky", "地"], 200)
    overlays.legend(["海 небо", "하늘"], 200)
    said = capsys.readouterr().err.splitlines()
    assert [line.split("(")[1].split(")")[0] for line in said] == ["CJK", "HANGUL"]
    assert all("Install one that has, such as Debian's fonts-noto-cjk" in line for line in said)
    assert [text for _, text in fonts.split("海 небо")] == ["海 небо"]


def test_without_fontconfig_the_usual_folders_are_searched(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    path = make_font(tmp_path / ".fonts" / "sub" / "Sky.TTF", "𐇐")
    assert path in fonts._listed()
    program = tmp_path / "fc-list"
    program.write_text("#!/bin/sh\necho /somewhere/Sky.otf\n")
    program.chmod(0o755)
    assert fonts._listed() == [Path("/somewhere/Sky.otf")]


def test_without_matplotlib_there_are_still_pictures(monkeypatch, capsys):
    monkeypatch.setattr(fonts.importlib.util, "find_spec", lambda name: None)
    assert overlays.legend(["é"], 60).tobytes() == BOX
    assert "(LATIN)" in capsys.readouterr().err


def test_every_picture_with_words_has_them(tmp_path):
    """Two words that were the same box: pictures of the one differ from those of the other."""
    grey = np.full((40, 60, 3), 200, np.uint8)
    pictures = (
        lambda word: overlays.contact_sheet([word], [[grey]], ["a"]),
        lambda word: overlays.contact_sheet(["a"], [[grey]], [word]),
        lambda word: overlays.contact_sheet(["a"], [[grey]], ["a"], title=word),
        lambda word: overlays.contact_sheet(["a"], [[grey]], ["a"], subtitle=word),
        lambda word: overlays.contact_sheet(["a"], [[grey]], ["a"], captions=[word]),
        lambda word: overlays.matrix(np.eye(1), [word], ["a"], ""),
        lambda word: overlays.matrix(np.eye(1), ["a"], [word], ""),
        lambda word: overlays.matrix(np.eye(1), ["a"], ["a"], word),
        lambda word: overlays.with_legend(grey, np.zeros((40, 60), int), [word], ""),
        lambda word: draw_points(grey, np.zeros((0, 2)), word),
    )
    for picture in pictures:
        one, other = picture("é"), picture("б")
        assert one.shape != other.shape or (one != other).any()
