"""Segmenting a folder: what is written, what others read of it, what goes wrong."""

import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import run
from models import save_aligner
from PIL import Image
from pycocotools.coco import COCO
from test_programs import killed

import fmbseg_jax
from fmbseg_jax.data import finding, images, label_maps
from fmbseg_jax.io import files
from fmbseg_jax.io.threads import Room, Writers
from fmbseg_jax.outputs import coco_writer, colours, overlays
from fmbseg_jax.outputs.folder import Outputs
from fmbseg_jax.vocabulary import IGNORE

SEGMENT = "fmbseg_jax.segment"
NAMES = ["a.png", "cmyk.jpg", "dot.png", "sub/grey.jpg", "wide.png"]


@pytest.fixture(scope="module")
def export(world, tmp_path_factory):
    return save_aligner(tmp_path_factory.mktemp("segment") / "export", world.root)


@pytest.fixture
def photos(tmp_path):
    """Every kind of image; two that are none."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    noise.save(folder / "a.png")
    noise.convert("L").save(folder / "sub" / "grey.jpg")
    noise.convert("CMYK").save(folder / "cmyk.jpg")
    noise.resize((1, 1)).save(folder / "dot.png")
    Image.new("RGB", (20_000, 1), "red").save(folder / "wide.png")
    (folder / "broken.jpg").write_bytes((folder / "cmyk.jpg").read_bytes()[:300])
    (folder / "empty.png").touch()
    return folder


def command(export, photos, out, words="sky, sail boat"):
    return [
        SEGMENT, f"--model={export}", f"--images={photos}", f"--words={words}", f"--out={out}"
    ]  # fmt: skip


def test_segmenting_a_folder(export, photos, tmp_path):
    out = tmp_path / "out"
    segment = command(export, photos, out)
    more = [photos / f"zz{i:02d}.png" for i in range(40)]  # enough to be killed among them
    for path in more:
        Image.new("RGB", (400, 300), "red").save(path)
    assert killed(lambda: list((out / "labels").glob("*.png")), *segment, "--batch_size=1")
    for path in more:
        path.unlink()
    output = run(*segment, fresh=True).stdout
    assert "skipped broken.jpg: cannot be read" in output
    assert "skipped: 2, listed in skipped.tsv." in output
    shares = dict(re.findall(r"(sky|sail boat) (\d+) %", output))
    assert 99 <= sum(map(int, shares.values())) <= 101
    skipped = [line.split("\t")[0] for line in (out / "skipped.tsv").read_text().splitlines()]
    assert skipped == ["broken.jpg", "empty.png"]
    segmenter = fmbseg_jax.load(export)
    for name in NAMES:
        stem, image = name[:-4], images.decode((photos / name).read_bytes())
        png = Image.open(out / "labels" / f"{stem}.png")
        assert png.mode == "P"
        expected = segmenter.segment(image, ["sky", "sail boat"])
        assert np.mean(np.asarray(png) == expected) > 0.999
        np.testing.assert_array_equal(
            np.asarray(png.convert("RGB")), colours.palette(2)[np.asarray(png)]
        )
        overlay = Image.open(out / "overlays" / f"{stem}.jpg")
        assert overlay.width >= image.shape[1]
        assert overlay.height > image.shape[0]  # the legend is below
    assert (out / "words.txt").read_text() == "sky\nsail boat\n"
    assert Image.open(out / "contact_sheet.png").width > 300
    assert not list(out.rglob("*.incomplete"))
    before = {path: path.stat().st_mtime_ns for path in (out / "labels").rglob("*.png")}
    assert "5/7" in run(*segment).stdout
    assert before == {path: path.stat().st_mtime_ns for path in (out / "labels").rglob("*.png")}
    strict = run(*segment, "--strict", check=False)
    assert strict.returncode == 1
    assert "broken.jpg cannot be read" in strict.stdout


def test_pycocotools_reads_the_masks(export, photos, tmp_path):
    out = tmp_path / "out"
    run(*command(export, photos, out), "--background=wall")
    coco = COCO(out / "coco.json")
    assert [one["name"] for one in coco.loadCats(coco.getCatIds())] == ["sky", "sail boat"]
    found = coco.loadImgs(coco.getImgIds())
    assert [one["file_name"] for one in found] == NAMES
    background = 0
    for one in found:
        png = out / "labels" / f"{one['file_name'][:-4]}.png"
        labels, painted = label_maps.read(png, 2), np.full((one["height"], one["width"]), IGNORE)
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=one["id"])):
            mask = coco.annToMask(annotation).astype(bool)
            painted[mask] = annotation["category_id"] - 1
            assert annotation["area"] == mask.sum()
            x, y, width, height = map(int, annotation["bbox"])
            rows, columns = np.nonzero(mask)
            assert (x, y) == (columns.min(), rows.min())
            assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)
        np.testing.assert_array_equal(painted, labels)
        background += np.count_nonzero(labels == IGNORE)
    assert background
    colour = Image.open(out / "labels" / "a.png").convert("RGB")
    at = np.argwhere(np.asarray(Image.open(out / "labels" / "a.png")) == 255)[0]
    assert colour.getpixel((int(at[1]), int(at[0]))) == colours.UNLABELLED


def test_a_coco_file_that_cannot_be_finished_leaves_nothing(tmp_path):
    def maps():
        yield "a.png", np.zeros((3, 4), np.uint16)
        raise KeyboardInterrupt

    (tmp_path / "coco.json").write_text("before")
    with pytest.raises(KeyboardInterrupt):
        coco_writer.write(tmp_path / "coco.json", ["sky"], maps(), "")
    assert [path.name for path in tmp_path.iterdir()] == ["coco.json"]
    coco_writer.write(tmp_path / "coco.json", ["sky"], [], "")
    assert json.loads((tmp_path / "coco.json").read_text())["annotations"] == []


def test_scores_are_the_similarities(export, photos, tmp_path):
    out = tmp_path / "out"
    words = "sky,sofa;couch,moon"
    run(*command(export, photos, out, words), "--scores", "--threshold=-1")
    segmenter = fmbseg_jax.load(export)
    for name in NAMES:
        with np.load(out / "scores" / f"{name[:-4]}.npz") as arrays:
            found, listed = arrays["similarities"], arrays["words"].tolist()
        assert listed == ["sky", "sofa;couch", "moon"]
        assert found.dtype == np.float16
        image = images.decode((photos / name).read_bytes())
        expected = segmenter.similarities(image, words.split(","))
        np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("background", [["--background=wall,floor"], ["--threshold=0.02"]])
def test_the_background_of_a_folder(export, photos, tmp_path, background):
    run(*command(export, photos, tmp_path / "out"), *background)
    given = ["wall", "floor"] if "wall" in background[0] else 0.02
    image = images.decode((photos / "a.png").read_bytes())
    expected = fmbseg_jax.load(export).segment(image, ["sky", "sail boat"], given)
    found = label_maps.read(tmp_path / "out" / "labels" / "a.png", 2)
    assert IGNORE in expected
    assert np.mean(found == expected) > 0.999


def test_a_pattern_or_a_file_will_do(export, photos, tmp_path):
    run(*command(export, f"{photos}/**/*.jpg", tmp_path / "out"))
    out = tmp_path / "out"
    found = {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    assert {"labels/cmyk.png", "labels/sub/grey.png"} <= found
    assert "labels/a.png" not in found
    run(*command(export, photos / "a.png", tmp_path / "one"))
    assert [path.name for path in (tmp_path / "one" / "labels").iterdir()] == ["a.png"]
    none = run(*command(export, f"{photos}/*.webp", tmp_path / "none"), check=False)
    assert "No image matches" in none.stdout


def test_results_among_the_images_are_no_images(export, photos):
    """Also by a pattern that matches them; and an image that has changed is segmented again."""
    out = photos / "sub" / "out"
    for images_, to in ((photos, out), (photos, out), (f"{photos}/**/*.*", photos / "out2")):
        assert "skipped: 2" in run(*command(export, images_, to)).stdout
    assert len(list((photos / "out2" / "labels").rglob("*.png"))) == len(NAMES)
    assert sorted(path.name for path in (out / "labels").rglob("*.png")) == sorted(
        f"{name.split('/')[-1][:-4]}.png" for name in NAMES
    )
    Image.new("RGB", (33, 44), "red").save(photos / "a.png")
    os.utime(photos / "a.png", (1e9, 1e9))  # older than what was made of the other
    assert "4/7" in run(*command(export, photos, out)).stdout
    assert Image.open(out / "labels" / "a.png").size == (33, 44)
    assert "4/7" not in run(*command(export, photos, out)).stdout
    status = os.stat(photos / "a.png")
    Image.new("RGB", (44, 33), "blue").save(photos / "a.png")  # within a second, and at once
    os.utime(photos / "a.png", ns=(status.st_mtime_ns + 1, status.st_mtime_ns + 1))
    run(*command(export, photos, out))
    assert Image.open(out / "labels" / "a.png").size == (44, 33)
    other = run(*command(export, f"{photos}/*.png", out), check=False).stdout
    assert f"images: '{photos}' there, '{photos}/*.png' now" in other  # coco.json is of all


def test_many_words_take_16_bits(tmp_path):
    labels = np.asarray([[0, 299, IGNORE]], np.uint16)
    for words, mode in ((254, "P"), (255, "P"), (256, "I;16"), (300, "I;16")):
        some = np.minimum(labels, words - 1)
        some[0, 2] = IGNORE
        path = tmp_path / f"{words}.png"
        data = label_maps.encode_coloured(some, colours.palette(words), colours.UNLABELLED)
        path.write_bytes(data)
        assert Image.open(path).mode == mode
        np.testing.assert_array_equal(label_maps.read(path, words), some)


def test_colours_are_apart_and_stay():
    many = colours.palette(200)
    np.testing.assert_array_equal(colours.palette(15), many[:15])
    assert len(np.unique(many, axis=0)) == 200
    assert colours.palette(5_000).shape == (5_000, 3)
    lab = colours._lab(many.astype(float))
    apart = np.linalg.norm(lab[:, None] - lab, axis=-1) + 1e3 * np.eye(200)
    assert apart[:21, :21].min() > 25  # 2.3 can just be told apart
    assert apart.min() > 8


def test_legends_name_what_is_there():
    picture, labels = np.zeros((30, 40, 3), np.uint8), np.full((30, 40), 2, np.uint16)
    alone = overlays.with_legend(picture, labels, ["sky", "grass", "moon"], "none")
    swatches = {tuple(pixel) for pixel in alone[30:].reshape(-1, 3).tolist()}
    first, _, third = (tuple(colour) for colour in colours.palette(3).tolist())
    assert third in swatches
    assert first not in swatches
    labels[0, 0] = IGNORE
    with_none = overlays.with_legend(picture, labels, ["sky", "grass", "moon"], "none")
    assert colours.UNLABELLED in {tuple(pixel) for pixel in with_none[30:].reshape(-1, 3).tolist()}


def test_little_is_not_nothing():
    shares = (1, 0.526, 0.01, 0.009, 0)
    assert [overlays.percent(share) for share in shares] == ["100 %", "53 %", "1 %", "<1 %", "0 %"]


def test_contact_sheets_are_tight_and_say_which_image_is_where():
    wide, tall = np.zeros((100, 300, 3), np.uint8), np.zeros((300, 100, 3), np.uint8)

    def sheet(*examples, **more):
        return overlays.contact_sheet(["image", "map"], examples, ["sky"], tile=90, **more)

    one_row = sheet([wide, wide], [wide, wide], across=2)
    assert one_row.shape[1] > 4 * 90
    two_rows = sheet([wide, wide], [wide, wide])
    assert two_rows.shape[0] - one_row.shape[0] == 30 + 8  # as high as the pictures, and a gap
    mixed = sheet([wide, tall], [wide, wide])
    assert mixed.shape[0] - two_rows.shape[0] == 90 - 30
    for examples in (1, 2, 3):  # the last row may have room left
        assert sheet(*[[wide, wide]] * examples, across=2).shape[1] > 200
    name = "a/long/way/to/the/photograph.jpg"
    named = sheet([wide, wide], [wide, wide], across=2, captions=[name, ""])
    changed = (named != one_row).any((0, 2)).nonzero()[0]
    assert changed.min() >= 28 and changed.max() < 28 + 90
    other = sheet([wide, wide], [wide, wide], across=2, captions=[name[:-5] + "2.jpg", ""])
    assert (named != other).any()  # what is cut off is not the end


def test_other_words_models_or_images_are_refused(export, photos, tmp_path):
    out = tmp_path / "out"
    run(*command(export, photos, out))
    refused = run(*command(export, photos, out, "sky"), check=False)
    assert "words: 1 removed (sail boat)" in refused.stdout
    refused = run(*command(export, photos, out), "--threshold=0.1", check=False)
    assert "threshold: None there, 0.1 now" in refused.stdout
    refused = run(*command(export, photos, out), "--short_side=140", check=False)
    assert "protocol: others for short_side\n" in refused.stdout
    assert "weights" not in refused.stdout
    (tmp_path / "more").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "more" / "a.png")
    moved = run(*command(export, tmp_path / "more", out), check=False)
    assert f"images: '{photos}' there" in moved.stdout


def test_segment_errors(export, photos, tmp_path):
    def error(*more, **changes):
        given = {"model": export, "images": photos, "words": "sky", "out": tmp_path / "o"}
        arguments = [f"--{key}={value}" for key, value in (given | changes).items()]
        result = run(SEGMENT, *arguments, *more, check=False)
        assert result.returncode == 1
        assert "Traceback" not in result.stdout
        return result.stdout

    (tmp_path / "none").mkdir()
    assert "--words is missing" in error(words="")
    assert "word 2 is empty" in error(words="sky,,grass")
    assert "'Sky', is word 1 again" in error(words="sky,Sky")
    assert "word 2, 'couch', shares 'couch' with 'sofa;couch'" in error(words="sofa;couch,couch")
    assert "'sofa;Sofa', has a name twice" in error(words="sofa;Sofa,sky")
    assert "No word list at" in error(words=tmp_path / "no.txt")
    assert "No images in" in error(images=tmp_path / "none")
    (tmp_path / "none" / "note.jpg").write_text("no image")
    assert "None of the images" in error(images=tmp_path / "none", out=tmp_path / "p")
    assert "separated by commas" in error(words="car/truck")
    assert "is no exported aligner" in error(model=tmp_path)
    assert "All images of" in error(images=f"{photos}/*.png", out=photos)
    assert "word 1 is empty" in error(words="," * 300)
    assert "--threshold=0.5 is the flag" in error("--background=0.5")
    assert "not both" in error("--background=wall", "--threshold=0.1")
    assert "from -1 to 1; got 3.0" in error("--threshold=3")
    assert "eval.compute is one of float32, bfloat16" in error("--compute=float8")
    assert "needs a --images on this machine" in error(images="gs://bucket/photos")


def test_a_full_disk_stops_with_a_message(export, photos, tmp_path, monkeypatch):
    """What is whole stays; the run does not pass over what it could not write."""
    from fmbseg_jax.data.finding import find
    from fmbseg_jax.segment import segment_images
    from fmbseg_jax.vocabulary.classes import Classes

    written, write = [], files.write_atomically

    def full(path, data):
        if len(written) >= 3:
            raise OSError(28, "No space left on device")
        written.append(path)
        write(path, data)

    monkeypatch.setattr(files, "write_atomically", full)
    (photos / "empty.png").unlink()
    found = find(str(photos / "*.png"), tmp_path / "out")
    outputs = Outputs(
        tmp_path / "out", found.folder, ["sky"], finding.png_names(found.names), False
    )
    with pytest.raises(OSError, match="No space left"):
        segment_images(fmbseg_jax.load(export), found, Classes.of(["sky"]), outputs, strict=False)
    assert all(path.exists() for path in written)


def test_links_to_nowhere_and_loops_stop_nothing(export, photos, tmp_path):
    (photos / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (photos / "sub" / "back").symlink_to(photos)
    output = run(*command(export, photos, tmp_path / "out")).stdout
    assert "skipped gone.png: cannot be read: No such file or directory" in output
    assert "8/8" in output and "skipped: 3" in output  # every image once


def test_what_is_odd_about_the_result_is_said(export, photos, tmp_path):
    deep = np.arange(1200, dtype=np.uint16).reshape(30, 40)
    Image.fromarray(deep).save(photos / "deep.tif")
    Image.fromarray(deep + 300).save(photos / "sub" / "deep.png")
    Image.new("RGB", (1200, 1000)).save(photos / "large.png")
    (tmp_path / "words.txt").write_text("sky, moon\n")
    limit = "--max_megapixels=1"
    one = run(*command(export, photos, tmp_path / "one", tmp_path / "words.txt"), limit).stdout
    assert "One word alone has every pixel: give --background=WORDS" in one
    assert one.count("words.txt: line 1 is read as one word, 'sky, moon'. Give each its own") == 1
    assert "Notice" not in one  # but the words alone, without a place in the code
    told = "2 images have more than 8 bits a channel, such as deep.tif: each is scaled from its"
    assert one.count(told) == 1 and "; --deep=type scales by what the type holds." in one
    assert "large.png: cannot be read: it has 2 megapixels (1200 x 1000), and the limit is 1" in one
    assert "--max_megapixels=2 raises it" in one
    small = Image.open(tmp_path / "one" / "overlays" / "deep.jpg").convert("L")
    none = run(
        *command(export, photos, tmp_path / "none"), "--threshold=0.999", limit, "--deep=type"
    ).stdout
    assert "Nearly everything is background: give a lower --threshold" in none
    assert "each is scaled by what its type holds; --deep=file scales from" in none
    dark = Image.open(tmp_path / "none" / "overlays" / "deep.jpg").convert("L")
    bright, black = (np.asarray(picture)[15:28, :40].mean() for picture in (small, dark))
    assert bright > black + 20  # 1,200 of 65,535 levels


def test_a_word_that_is_called_background(tmp_path):
    """Beside what has no word: nothing of either gets lost."""
    image, labels = np.zeros((8, 400, 3), np.uint8), np.zeros((8, 400), np.uint16)
    labels[:, 200:300], labels[:, 300:] = 1, IGNORE
    (tmp_path / "photos").mkdir()
    Image.fromarray(image).save(tmp_path / "photos" / "a.png")
    for first in ("background", "a wall"):
        outputs = Outputs(
            tmp_path / first, tmp_path / "photos", [first, "sky"], {"a.png": "a.png"}, False
        )
        outputs.write("a.png", 0, image, labels, None)
        shares = outputs.finish(["a.png"], {}, "")
        assert sorted(shares.values()) == [0.25, 0.25, 0.5]
        categories = json.loads((tmp_path / first / "coco.json").read_text())["categories"]
        assert [one["name"] for one in categories] == [first, "sky"]
    assert [*shares] == ["a wall", "sky", "background"]
    shares = Outputs(
        tmp_path / "background",
        tmp_path / "photos",
        ["Background", "sky"],
        {"a.png": "a.png"},
        False,
    ).finish(["a.png"], {}, "")
    assert shares == {"Background": 0.5, "sky": 0.25, "background (no word)": 0.25}


def test_large_images_take_turns():
    """As many pixels at once as there is room for, and one larger image alone."""
    room, now, most = Room(10), [], []

    def work(pixels):
        with room.take(pixels):
            now.append(pixels)
            most.append(sum(now))
            time.sleep(0.001)
            now.remove(pixels)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [4, 4, 4, 30, 2, 7, 4, 1] * 10))
    assert all(total <= 10 or total == 30 for total in most)


def test_a_writer_that_fails_stops_the_rest():
    written = []

    def write(i):
        if i == 3:
            raise OSError(28, "full")
        written.append(i)

    with pytest.raises(OSError, match="full"), Writers(2, lambda: None) as writers:
        for i in range(100):
            writers.submit(write, i)
    assert len(written) < 100


def test_pipes_and_devices_are_skipped(export, tmp_path):
    """They would keep whoever reads them waiting, or have no end."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (90, 80), "red").save(folder / "a.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    run(*command(export, folder, tmp_path / "out"))
    skipped = (tmp_path / "out" / "skipped.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in skipped] == ["pipe.png", "zero.png"]
    assert all("a pipe or a device, not a file" in line for line in skipped)
