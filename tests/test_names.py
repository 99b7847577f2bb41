"""Names of files and words as systems store them, and files that are left out."""

import unicodedata
import warnings

import numpy as np
import pytest
from conftest import run
from etils import epath
from PIL import Image

from fmbseg_jax.data import finding, images, label_maps
from fmbseg_jax.datasets.folder import open_folder, open_published
from fmbseg_jax.errors import Notice, UserError
from fmbseg_jax.evaluation.scoring import score_folder
from fmbseg_jax.io import files, spelling
from fmbseg_jax.vocabulary import check_words, parse_words, read_words, unlike
from labelling.detection import read_image_labels
from labelling.shards.annotated import annotated_image

APART = unicodedata.normalize("NFD", "é")  # as macOS stores it
LETTER = unicodedata.normalize("NFC", "é")
PICTURE = Image.new("RGB", (6, 4), "red")
CLUTTER = ["._a.jpg", "__MACOSX/a.jpg", "@eaDir/a.jpg", "sub/@eaDir/SYNOPHOTO_THUMB_M.jpg"]
CLUTTER += ["$RECYCLE.BIN/b.png", "__MACOSX/sub/._b.png"]


def place(folder, *names, kind=None):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PICTURE.save(folder / name, kind)


def test_every_ending_that_can_be_read(tmp_path, capsys):
    names = ["a.jfif", "b.JPE", "c.pgm", "d.pnm", "e.apng", "f.dib", "g.tga", "h.pbm", "i.jpg"]
    kinds = ["JPEG", "JPEG", "PPM", "PPM", "PNG", "DIB", "TGA", "PPM", "JPEG"]
    for name, kind in zip(names, kinds, strict=True):
        (PICTURE.convert("1") if name == "h.pbm" else PICTURE).save(tmp_path / name, kind)
    assert finding.find_images(tmp_path) == names
    assert not capsys.readouterr().out
    for name in names:
        assert images.decode((tmp_path / name).read_bytes(), name=name).shape == (4, 6, 3)


def test_images_under_other_names_are_counted(tmp_path, capsys):
    place(tmp_path, "a.png")
    place(tmp_path, "sub/noending", "scan.old", "b.jpg_large", kind="JPEG")
    for name in ["notes.txt", "movie", "empty.bin"]:
        (tmp_path / name).write_bytes(b"\0" * 40 * (name != "empty.bin"))
    place(tmp_path, "a.json", kind="PNG")  # of those one need not look into
    told = "names that do not end as an image's: 2, such as b.jpg_large, which is a JPEG file"
    for find in (
        lambda: finding.find_images(tmp_path),
        lambda: finding.find(f"{tmp_path}/**/*", tmp_path / "out").names,
    ):
        assert find() == ["a.png", "sub/noending"]
        assert f"{told}. Rename them, for example to b.jpg_large.jpg." in capsys.readouterr().out
    (tmp_path / "a.png").unlink()
    (tmp_path / "sub" / "noending").unlink()
    with pytest.raises(UserError, match=told):
        finding.find_images(tmp_path)


def test_texts_that_begin_like_images_are_none(tmp_path):
    place(tmp_path, "picture", kind="PNG")
    for name, text in {
        "LICENSE": "Python Software Foundation License", "NOTES": "BMW cars", "list": "P1 first\n",
        "GIFTS": "GIF89a was a format", "x.rst": "P5 is a heading\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text * 3)
    assert finding.find_images(tmp_path) == ["picture"]


def test_files_of_a_store_are_not_looked_into():
    """Each look would be a request: names without an ending are told of, and no more."""
    names = ["a/noending", "b.txt", "c.png", "d.old"]
    told = finding._misnamed(epath.Path("gs://nowhere/photos"), names)
    assert "1, such as a/noending, and not looked into. Rename them, for example to noend" in told
    assert not finding._misnamed(epath.Path("gs://nowhere/photos"), names[1:])


def test_clutter_is_no_image(tmp_path):
    place(tmp_path, "a.jpg", "sub/b.png", *CLUTTER)
    (tmp_path / "Thumbs.db").write_bytes(b"\xff\xd8\xff\xe0")
    assert finding.find_images(tmp_path) == ["a.jpg", "sub/b.png"]
    for pattern in ("*", "._*", "**/*", "*/*", "*/*/*", "@eaDir/*"):
        try:
            names = finding.find(f"{tmp_path}/{pattern}", tmp_path / "out").names
        except UserError:
            names = []
        assert {*names} <= {"a.jpg", "sub/b.png"}, pattern


def test_clutter_beside_a_published_set(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    place(root, "images/validation/ADE_val_1.jpg", "images/validation/._ADE_val_1.jpg")
    place(root, "images/validation/@eaDir/ADE_val_1.jpg")
    (root / "annotations/validation").mkdir(parents=True)
    Image.new("L", (6, 4), 1).save(root / "annotations/validation/ADE_val_1.png")
    assert open_published("ade150", tmp_path).names == ("ADE_val_1",)


@pytest.mark.parametrize(("there", "asked"), [(APART, LETTER), (LETTER, APART)])
def test_label_maps_in_the_other_spelling(tmp_path, there, asked):
    """Archives that were packed on one system and unpacked on another mix both."""
    place(tmp_path, f"images/caf{asked}/a{asked}.jpg")
    labels = tmp_path / "labels" / f"caf{there}"
    labels.mkdir(parents=True)
    Image.fromarray(np.eye(4, 6, dtype=np.uint8)).save(labels / f"a{asked}.png")
    (tmp_path / "words.txt").write_text("sky\nboat\n")
    benchmark = open_folder(tmp_path)
    (name,) = benchmark.names
    np.testing.assert_array_equal(benchmark.labels(name), np.eye(4, 6))
    assert score_folder(benchmark, tmp_path / "labels").miou == 1
    data = (tmp_path / "images" / name).read_bytes()
    assert annotated_image(tmp_path / "labels", data, name, 2).labels.sum() == 4
    assert label_maps.find(tmp_path / "labels", name).is_file()


def test_the_exact_spelling_comes_first(tmp_path):
    for name, value in ((LETTER, 1), (APART, 2)):
        Image.new("L", (1, 1), value).save(tmp_path / f"{name}.png")
    for name, value in ((LETTER, 1), (APART, 2)):
        assert label_maps.read(label_maps.find(tmp_path, f"{name}.jpg"), 3) == value
    assert spelling.beside(tmp_path, f"{LETTER}x.png") == tmp_path / f"{LETTER}x.png"


def test_two_spellings_do_not_overwrite_each_other():
    names = [f"caf{APART}.jpg", f"caf{LETTER}.jpg"]
    for listed in (names, names[::-1]):
        with pytest.raises(UserError, match="would both have .* only in how letters with accents"):
            finding.png_names(listed, whole=True)
    with pytest.raises(UserError, match="would both have"):
        finding.png_names([f"{APART}.jpg", f"{LETTER}.png"])


def test_words_in_both_spellings(tmp_path):
    assert check_words([f"caf{APART}", "sky"]) == (f"caf{LETTER}", "sky")
    with pytest.raises(UserError, match="is word 1 again"):
        check_words([f"caf{APART}", f"Caf{LETTER}"])
    (tmp_path / "labels.tsv").write_text(f"{APART}.jpg\tsky,caf{APART}\n{LETTER}.png\tsky\n")
    words = check_words(["sky", f"caf{APART};bar"])
    found = read_image_labels(tmp_path / "labels.tsv", words, [f"{LETTER}.jpg", f"{LETTER}.png"])
    assert {name: indices.tolist() for name, indices in found.items()} == {
        f"{LETTER}.jpg": [0, 1], f"{LETTER}.png": [0]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words", "told"),
    [
        ("sky\nsea, grass\n", ("sky", "sea, grass"), r"line 2 is read as one word, 'sea, grass'"),
        ("# mine\nsky\n", ("# mine", "sky"), "line 1 is read as one word, '# mine'.*no comments"),
        ("a,b\nc\nd,e\n", ("a,b", "c", "d,e"), "'a,b', as are 1 more with ','"),
    ],
)
def test_doubtful_lines_of_a_word_list(tmp_path, text, words, told):
    path = tmp_path / "words.txt"
    path.write_text(text)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        assert parse_words(str(path)) == read_words(path) == words
    with pytest.warns(Notice, match=told):
        warnings.warn(caught[0].message, stacklevel=1)
    assert len(caught) == 1 and str(path) in str(caught[0].message)
    path.write_text("sky\nsail boat;ship\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_words(path)


def test_two_things_have_two_names():
    assert unlike("background", ["sky", "boat"]) == "background"
    assert unlike("background", ["sky", "Background;wall"]) == "background (no word)"
    twice = ["background", "background (no word)"]
    assert unlike("background", twice) == "background (no word) (no word)"


CONTROLS = "\x1b]0;owned\x07", "a\nb", "a\tb", "\u202egpj.exe", "\x9b31m", "a\rb", "\u2028"


@pytest.mark.parametrize("control", CONTROLS)
def test_no_control_character_comes_from_a_name(control, tmp_path, capsys):
    """Neither to a terminal nor into a table, whose columns and lines they would shift."""
    (tmp_path / f"{control}.png").touch()
    (tmp_path / "b.png").touch()
    assert finding.find_images(tmp_path) == ["b.png"]
    told = capsys.readouterr().out
    assert "for names with control characters: 1, such as " in told
    assert control not in told
    with pytest.raises(UserError, match="has control characters"):
        files.inside(f"sub/{control}.png", "A record")
    with pytest.raises(UserError, match="Rename the image"):
        finding.find(str(tmp_path / f"{control}.png"), tmp_path / "out")


@pytest.mark.parametrize("control", ["\x1b[2J", "\u202e", "\x07", "\ud800"])
def test_no_control_character_comes_from_a_word(control):
    with pytest.raises(UserError, match=r"word 1, .*, has a control character") as error:
        check_words([f"sky{control}", "sea"], "The list")
    assert control not in str(error.value)


def test_usual_names_are_printable():
    names = ["a b.jpg", "été.jpg", "небо.png", "海.jpg", "👩\u200d🚀.png", "नमस्ते", "a\u00a0b"]
    assert [spelling.printable(name) for name in names] == names
    assert spelling.printable("a\x1b[31m\n\u202e") == "a\\x1b[31m\\n\\u202e"


def test_an_error_is_shown_without_what_a_terminal_obeys():
    flags = "--images=a\x1b[2Jb", "--model=x", "--words=sky", "--out=y"
    result = run("fmbseg_jax.segment", *flags, check=False)
    assert result.returncode == 1
    assert "\x1b" not in result.stdout and r"\x1b[2Jb" in result.stdout
