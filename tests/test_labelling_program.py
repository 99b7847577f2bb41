"""python -m labelling: any image, any interruption, every message."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
import torch
import zygote
from conftest import wait_until
from labelling_tiny import CONFIG, WORDS, picture, run, save_sam
from models import save_clip
from PIL import Image

from fmbseg_jax import config
from fmbseg_jax.data import example
from fmbseg_jax.data.tfrecord import RecordSource, find_shards
from fmbseg_jax.errors import UserError
from fmbseg_jax.features import write_features
from fmbseg_jax.vocabulary import IGNORE
from labelling.shards import dataset

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_clip(folder / "clip")
    save_sam(folder / "sam.pth")
    return folder


@pytest.fixture
def world(models, tmp_path):
    """A config, a word list, models, and eight images."""
    shutil.copytree(models / "clip", tmp_path / "clip")
    shutil.copy(models / "sam.pth", tmp_path / "sam.pth")
    (tmp_path / "config.py").write_text(CONFIG.format(tmp_path))
    (tmp_path / "words.txt").write_text("\n".join(WORDS))
    for i in range(8):
        path = tmp_path / "images" / ("sub" if i % 2 else ".") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(40 + 5 * i, 60, i)).save(path)
    return tmp_path


def label(world, *flags, workdir="work"):
    return run(f"--config={world}/config.py", f"--workdir={world}/{workdir}", *flags)


def records(world, workdir="work"):
    source = RecordSource(find_shards(world / workdir / "pseudo_labels"))
    return [example.decode_pseudo_label(source[i]) for i in range(len(source))]


def shards(world, workdir="work"):
    return {p.name: p.read_bytes() for p in find_shards(world / workdir / "pseudo_labels")}


# What comes out


def test_a_whole_run(world, capsys):
    assert label(world, "--figures=2") == (0, "")
    output = capsys.readouterr()
    labels = records(world)
    assert [r.filename for r in labels] == ["0.png", "2.png", "4.png", "6.png"] + [
        f"sub/{i}.png" for i in (1, 3, 5, 7)
    ]
    for r in labels:
        assert r.image == (world / "images" / r.filename).read_bytes()
        assert r.labels.shape == (40 + 5 * int(r.filename[-5]), 60)
    covered = sum((r.labels != IGNORE).sum() for r in labels) / sum(r.labels.size for r in labels)
    assert "images    8: 8 labelled, 0 skipped" in output.out
    assert f"coverage  {covered:.1%} of the pixels" in output.out
    assert f"{np.mean([len(r.found) for r in labels]):.1f} in each image" in output.out
    by_word = Counter(WORDS[i] for r in labels for i in r.found)
    told = example.read_metadata(world / "work" / "pseudo_labels")["images_by_word"]
    assert told == {word: by_word[word] for word in WORDS}
    assert list(told.values()) == sorted(told.values(), reverse=True)
    found = [f"{word} {count}" for word, count in told.items() if count]
    assert f"found in  {', '.join(found)}\n" in output.out
    assert "8/8" in output.err and f"coverage {covered:.1%}" in output.err
    figures = world / "work" / "figures" / "labelling"
    assert sorted(p.name for p in figures.rglob("*.png")) == ["0.png.png", "2.png.png"]


def test_tensorflow_datasets_opens_the_folder(world):
    label(world)
    folder = world / "work" / "pseudo_labels"
    builder = tfds.builder_from_directory(str(folder))
    assert builder.info.splits["train"].num_examples == 8
    assert builder.info.splits["train"].shard_lengths == [3, 3, 2]
    metadata = example.read_metadata(folder)
    assert metadata["words"] == list(WORDS) and metadata["config"]["label.short_side"] == 48
    assert metadata["models"]["clip"] == f"{world}/clip"
    assert len(metadata["models"]["sam_sha256"]) == len(metadata["models"]["clip_sha256"]) == 64


def test_flags_replace_the_configs_data(world):
    other = world / "other"
    other.mkdir()
    shutil.copy(world / "images" / "0.png", other / "x.png")
    assert label(world, f"--images={other}", "--words=water, not water") == (0, "")
    assert [r.filename for r in records(world)] == ["x.png"]
    metadata = example.read_metadata(world / "work" / "pseudo_labels")
    assert metadata["words"] == ["water", "not water"]


def test_image_level_labels(world):
    (world / "given.tsv").write_text("0.png\tcat\nsub/1.png\t\n")
    assert label(world, f"--config.data.image_labels={world}/given.tsv") == (0, "")
    by_name = {r.filename: r for r in records(world)}
    assert by_name["0.png"].found.tolist() == [3] and by_name["0.png"].votes.tolist() == [-1]
    assert not len(by_name["sub/1.png"].found) and (by_name["sub/1.png"].votes >= 0).all()
    assert (by_name["2.png"].votes > 0).all()


def test_no_word_reaches_min_crops(world, capsys):
    assert label(world, "--config.label.min_crops=1000") == (0, "")
    output = capsys.readouterr().out
    assert "0.0 in each image; none in 8 images (no word has 1000 crops" in output
    assert f"never     {', '.join(WORDS)}\n" in output and "found in" not in output
    assert all((r.labels == IGNORE).all() for r in records(world))


def test_annotations_need_no_models(world, capsys):
    shutil.rmtree(world / "clip")
    (world / "sam.pth").unlink()
    for path in (world / "images").rglob("*.png"):
        size = Image.open(path).size
        target = world / "labels" / path.relative_to(world / "images")
        target.parent.mkdir(parents=True, exist_ok=True)
        labels = np.full(size[::-1], 2, np.uint8)
        labels[0] = 255
        Image.fromarray(labels).save(target)
    Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60)).save(world / "images/0.png")
    assert label(world, f"--config.data.annotations={world}/labels", "--figures=1") == (0, "")
    for r in records(world):
        assert (r.labels[0] == IGNORE).all() and (r.labels[1:] == 2).all()
    told = capsys.readouterr().out
    assert "1.0 in each image" in told
    pixels = sum(r.labels.size for r in records(world))
    void = sum(np.count_nonzero(r.labels == IGNORE) for r in records(world)) / pixels
    assert f"{1 - void:.1%} of the pixels; the other {void:.1%} are void: not labelled" in told
    assert f"no pixel  {', '.join(word for i, word in enumerate(WORDS) if i != 2)}\n" in told
    assert told.count("1 image, 0.png, has more than 8 bits a channel") == 1
    metadata = example.read_metadata(world / "work" / "pseudo_labels")
    assert metadata["deep"] == [1, "0.png"]
    example.check_deep(metadata, "file")
    with pytest.raises(UserError, match="made with data.deep='file'; now it is 'type'"):
        write_features(config.Config(data=config.Data(deep="type")), world / "work")
    assert label(world, f"--config.data.annotations={world}/labels", "--config.data.deep=type")[0]


# Any image


def _formats(folder):
    """Files that must be labelled, with the size they have when upright."""
    colour = Image.fromarray(picture(30, 50))
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    colour.save(folder / "exif.jpg", exif=exif)
    colour.convert("L").save(folder / "grey.png")
    colour.convert("P").save(folder / "palette.gif")
    colour.convert("RGBA").save(folder / "alpha.png")
    colour.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.arange(1500, dtype=np.uint16).reshape(30, 50) * 40).save(folder / "deep.png")
    Image.fromarray(picture(1, 1)).save(folder / "pixel.png")
    Image.fromarray(picture(1, 20000)).save(folder / "long.png")
    Image.fromarray(picture(20000, 1)).save(folder / "tall.png")
    special = {"exif.jpg": (50, 30), "pixel.png": (1, 1), "long.png": (1, 20000)}
    special["tall.png"] = (20000, 1)
    return {p.name: special.get(p.name, (30, 50)) for p in folder.iterdir()}


def _damaged(folder):
    """Files that cannot be labelled."""
    buffer = io.BytesIO()
    Image.fromarray(picture(100, 100)).save(buffer, "JPEG")
    (folder / "cut.jpg").write_bytes(buffer.getvalue()[:1000])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("hello")
    (folder / "gone.png").symlink_to(folder / "nothing")
    return {"cut.jpg", "empty.png", "text.jpg", "gone.png"}


def test_any_image(world, capsys):
    sizes = _formats(world / "any")
    damaged = _damaged(world / "any")
    flags = f"--images={world}/any", "--config.label.sam.points_per_side=2"
    assert label(world, *flags) == (0, "")
    assert {r.filename: r.labels.shape for r in records(world)} == sizes
    output = capsys.readouterr().out
    assert f"images    {len(sizes) + 4}: {len(sizes)} labelled, 4 skipped" in output
    lines = (world / "work/pseudo_labels/skipped.tsv").read_text().splitlines()
    reasons = dict(line.split("\t") for line in lines)
    assert set(reasons) == damaged and all(reasons.values())
    assert "gone.png cannot be read: No such file" in output
    assert reasons["text.jpg"] == "cannot be read: not an image file, or damaged at its start"


def test_strict(world):
    (world / "images" / "3.jpg").write_text("hello")
    code, message = label(world, "--strict")
    assert code == 1 and "error: 3.jpg cannot be read" in message
    assert "Without --strict it would be skipped and listed." in message
    assert label(world) == (0, "")
    assert len(records(world)) == 8


def test_nothing_but_damaged_images(world):
    (world / "bad").mkdir()
    (world / "bad" / "a.jpg").write_text("hello")
    code, message = label(world, f"--images={world}/bad")
    assert code == 1 and "None of the images can be read:\n  a.jpg cannot be read" in message
    shutil.copy(world / "images" / "0.png", world / "bad" / "a.jpg")  # mended
    assert label(world, f"--images={world}/bad") == (0, "")
    assert len(records(world)) == 1


# Any interruption


def _command(world, workdir, *flags):
    flags = (f"--config={world}/config.py", f"--workdir={world}/{workdir}", *flags)
    return [sys.executable, "-m", "labelling", *flags]


def _start(world, workdir, *flags, popen=zygote.Popen):
    return popen(_command(world, workdir, *flags), env=ENVIRONMENT)


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


@pytest.fixture(scope="module")
def undisturbed(models, tmp_path_factory):
    """A larger world, and its shards when nothing interferes."""
    world = tmp_path_factory.mktemp("world")
    shutil.copytree(models / "clip", world / "clip")
    shutil.copy(models / "sam.pth", world / "sam.pth")
    (world / "config.py").write_text(CONFIG.format(world))
    (world / "words.txt").write_text("\n".join(WORDS))
    (world / "images").mkdir()
    for i in range(24):
        Image.fromarray(picture(150, 200, i)).save(world / "images" / f"{i:02d}.png")
    (world / "images" / "05.jpg").write_text("damaged")
    flags = ["--config.label.sam.points_per_side=8", "--config.label.images_per_shard=5"]
    assert _start(world, "whole", *flags).wait(timeout=300) == 0
    return world, flags


@pytest.mark.parametrize("shards_done", [0, 2, 4])
def test_kill_and_run_again(undisturbed, shards_done, capfd):
    """kill -9 at a random moment after some shards; the next run loses and doubles nothing."""
    world, flags = undisturbed
    workdir = f"killed-{shards_done}"
    folder = world / workdir / "pseudo_labels"
    process = _start(world, workdir, *flags)
    done = "pseudo_labels-train.tfrecord-*-of-00005"
    assert wait_until(
        lambda: folder.is_dir() and len(list(folder.glob(done))) >= shards_done, process
    )
    time.sleep(random.Random(shards_done).uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(list(folder.glob(done)))
    assert not (folder / "dataset_info.json").exists() or before == 5
    again = _start(world, workdir, *flags, popen=subprocess.Popen)
    assert again.wait(timeout=300) == 0
    assert shards(world, workdir) == shards(world, "whole")
    assert (folder / "skipped.tsv").read_text() == (
        world / "whole/pseudo_labels/skipped.tsv"
    ).read_text()
    ours, theirs = (
        tfds.builder_from_directory(str(world / w / "pseudo_labels")).info.splits["train"]
        for w in (workdir, "whole")
    )
    assert ours.shard_lengths == theirs.shard_lengths and ours.num_bytes == theirs.num_bytes
    assert not list(folder.rglob("*.incomplete"))
    output = capfd.readouterr().out
    assert "images    25: 24 labelled, 1 skipped" in output


@pytest.mark.parametrize("moment", ["before the counts", "before the name", "before the metadata"])
def test_stopped_between_two_writes(world, monkeypatch, moment):
    """The moments that a signal seldom meets."""
    label(world, workdir="whole")

    class Killed(BaseException):
        pass

    def kill(*arguments, **named):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        if moment == "before the counts":
            patch.setattr("labelling.shards.dataset.write_json", _after(kill, 1))
        elif moment == "before the name":
            patch.setattr("fmbseg_jax.data.tfrecord.ShardWriter.__exit__", kill)
        else:
            patch.setattr("fmbseg_jax.data.example.write_metadata", kill)
        label(world)
    assert not (world / "work/pseudo_labels/dataset_info.json").exists()
    assert label(world) == (0, "")
    assert shards(world) == shards(world, "whole")


def _after(kill, calls):
    """Lets dataset.write_json (the counts of a shard) through so many times, then kills."""
    original = dataset.write_json
    left = iter(range(calls))
    return lambda *a: original(*a) if next(left, None) is not None else kill()


def test_nothing_to_do(world, capsys, monkeypatch):
    label(world)
    before = {p: p.stat().st_mtime_ns for p in (world / "work/pseudo_labels").rglob("[!.]*")}
    capsys.readouterr()
    for model in ("labelling.clip.Clip", "labelling.sam.model.Sam"):
        monkeypatch.setattr(model, None)
    assert label(world) == (0, "")
    output = capsys.readouterr().out
    assert "nothing to label" in output and "images    8: 8 labelled" in output
    after = {p: p.stat().st_mtime_ns for p in (world / "work/pseudo_labels").rglob("[!.]*")}
    assert after == before


def test_nothing_to_do_does_not_import_pytorch(world):
    label(world)
    code = (
        "import runpy, sys\nsys.argv[0] = 'labelling'\n"
        "try: runpy.run_module('labelling', run_name='__main__')\n"
        "finally: assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    command = _command(world, "work")
    subprocess.run([command[0], "-c", code, *command[3:]], env=ENVIRONMENT, check=True)


def test_a_shard_that_was_deleted_is_made_again(world, capsys):
    label(world)
    before = shards(world)
    folder = world / "work" / "pseudo_labels"
    find_shards(folder)[1].unlink()
    capsys.readouterr()
    assert label(world) == (0, "")
    assert "| 5/8 [" in capsys.readouterr().err  # the bar starts at what is done
    assert shards(world) == before
    (folder / "progress" / "00002.json").unlink()  # a shard without its counts is none
    assert label(world) == (0, "")
    assert shards(world) == before and (folder / "progress" / "00002.json").exists()


def exchange(first, second):
    """Two files take each other's names; with the time that each has."""
    between = first.with_suffix(".between")
    first.rename(between)
    second.rename(first)
    between.rename(second)


def test_photographs_that_take_the_place_of_others_are_labelled_again(world, capsys):
    """By their bytes: a copy of all of them, with other times, is no reason to begin anew."""
    label(world)
    before = shards(world)
    for path in (world / "images").rglob("*.*"):
        os.utime(path, (1e9, 1e9))
    capsys.readouterr()
    assert label(world) == (0, "")
    assert "nothing to label" in capsys.readouterr().out
    exchange(world / "images" / "0.png", world / "images" / "6.png")  # of two shards
    assert label(world) == (0, "")
    assert shards(world).keys() == before.keys()
    changed = [name for name, data in shards(world).items() if data != before[name]]
    assert len(changed) == 2
    for r in records(world):
        assert r.image == (world / "images" / r.filename).read_bytes()
    assert label(world, workdir="fresh") == (0, "")
    assert shards(world, "fresh") == shards(world)


def test_an_annotation_that_was_corrected_is_taken(world):
    (world / "maps").mkdir()
    for path in (world / "images").rglob("*.*"):
        size = Image.open(path).size[::-1]
        target = world / "maps" / path.relative_to(world / "images").with_suffix(".png")
        target.parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros(size, np.uint8)).save(target)
    flags = [f"--config.data.annotations={world}/maps"]
    assert label(world, *flags) == (0, "")
    size = Image.open(world / "images" / "4.png").size[::-1]
    Image.fromarray(np.ones(size, np.uint8)).save(world / "maps" / "4.png")
    assert label(world, *flags) == (0, "")
    assert [r.filename for r in records(world) if r.labels.any()] == ["4.png"]


# Every message


def test_another_config_is_refused(world):
    label(world)
    code, message = label(world, "--config.label.min_crops=3")
    assert code == 1 and "label.min_crops: 2 there, 3 now" in message and "--workdir" in message
    assert label(world, "--config.label.sam.points_per_batch=7") == (0, "")


def test_other_images_or_words_are_refused(world):
    label(world)
    os.rename(world / "images" / "2.png", world / "images" / "new.png")
    code, message = label(world)
    assert code == 1 and "images: 1 added (new.png); 1 removed (2.png)" in message
    assert "Put them back as they were, or give the new data another --workdir." in message
    os.rename(world / "images" / "new.png", world / "images" / "2.png")
    (world / "words.txt").write_text("\n".join(WORDS[::-1]))
    assert "words: in another order" in label(world)[1]


def test_models_that_changed_between_runs(world):
    label(world)
    find_shards(world / "work" / "pseudo_labels")[0].unlink()
    tensors = torch.load(world / "sam.pth")
    torch.save({name: 2 * t for name, t in tensors.items()}, world / "sam.pth")
    assert "sam_sha256: " in label(world)[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.data.images="], "No images: give --images=DIR or set config.data.images."),
        (["--config.data.words="], "No words: give --words=FILE"),
        (["--images=nowhere"], "No folder of images at nowhere"),
        (["--images={0}/empty"], "No images in {0}/empty"),
        (["--words=nothing.txt"], "No word list at nothing.txt"),
        (["--words=sky,,cat"], "word 2 is empty"),
        (["--config.models.clip={0}/no/clip"], "No model at {0}/no/clip"),
        (["--config.models.sam={0}/no.pth"], "No SAM checkpoint at {0}/no.pth"),
        (["--config.label.device=abc"], "label.device is 'abc', which cannot be used here"),
        (["--config.label.stages=3"], "label.stages is one of 1.1, 1.2, both; got '3'"),
        (["--config.label.crop=30"], "multiple of CLIP's patch, 8 pixels; got 30"),
        (["--config.data.annotations={0}/none"], "No label map at {0}/none/0.png"),
        (["--config.data.image_labels=x.tsv"], "No file of image-level labels at x.tsv"),
        (["--workdir={0}/words.txt/work"], "Cannot write to {0}/words.txt/work/pseudo_labels"),
        (["--workdir={0}/blocked"], "Cannot write to {0}/blocked/pseudo_labels"),
        (
            ["--predict"],
            "No images to segment: give --images=DIR, --benchmark=NAME or set config.eval.folder.",
        ),
        (["something"], "Unexpected argument 'something'"),
    ],
)
def test_messages(world, flags, message):
    (world / "empty").mkdir()
    (world / "blocked").mkdir()
    (world / "blocked" / "pseudo_labels").write_text("a file")
    code, text = label(world, *(flag.format(world) for flag in flags))
    assert code == 1 and message.format(world) in text
    assert text.startswith("\nerror: ") and "Traceback" not in text


def test_a_missing_model_does_not_claim_the_work_folder(world):
    assert label(world, f"--config.models.sam={world}/no.pth")[0] == 1
    assert label(world) == (0, "")


def test_a_full_disk(world, monkeypatch):
    def write(self, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fmbseg_jax.data.tfrecord.ShardWriter.write", write)
        code, message = label(world)
    assert code == 1 and "No space left on device. Shards that are done stay" in message
    assert label(world) == (0, "")


# Training-free prediction

KINDS = ["clip_patches", "stage1", "stage1_1", "stage1_2"]


def test_predict(world, capsys):
    flags = "--predict", f"--config.eval.folder={world}"
    (world / "images" / "bad.jpg").write_text("hello")
    label(world, f"--images={world}/images")
    assert label(world, *flags) == (0, "")
    output = capsys.readouterr().out
    assert "predictions of 8 images" in output and "bad.jpg cannot be read" in output
    out = world / "work" / "predictions" / world.name
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == KINDS
    for r in records(world):
        maps = {kind: Image.open(out / kind / r.filename) for kind in KINDS}
        assert {m.mode for m in maps.values()} == {"I;16"}
        maps = {kind: np.asarray(m) for kind, m in maps.items()}
        np.testing.assert_array_equal(maps["stage1"], r.labels)
        assert (maps["clip_patches"] < len(WORDS)).all()
        both = (maps["stage1_1"] != IGNORE) | (maps["stage1_2"] != IGNORE)
        np.testing.assert_array_equal(both, r.labels != IGNORE)


def test_predict_goes_on(world, monkeypatch, capsys):
    flags = "--predict", f"--images={world}/images"
    assert label(world, *flags) == (0, "")
    out = world / "work" / "predictions" / "images"
    before = {p: p.read_bytes() for p in out.rglob("*.png")}
    (out / "stage1" / "4.png").unlink()
    assert label(world, *flags) == (0, "")
    assert {p: p.read_bytes() for p in out.rglob("*.png")} == before
    exchange(world / "images" / "0.png", world / "images" / "4.png")
    assert label(world, *flags) == (0, "")
    for name, other in (("0.png", "4.png"), ("4.png", "0.png"), ("2.png", "2.png")):
        assert (out / "stage1" / name).read_bytes() == before[out / "stage1" / other]
    monkeypatch.setattr("labelling.clip.Clip", None)
    assert label(world, *flags) == (0, "")


def test_predictions_of_other_words_are_refused(world):
    benchmark = world / "benchmark"
    shutil.copytree(world / "images", benchmark / "images")
    (benchmark / "words.txt").write_text("sky\ngrass")
    flags = "--predict", f"--config.eval.folder={benchmark}"
    code, message = label(world, *flags)
    assert code == 1 and "differ, so the label maps could not be compared" in message
    assert f"Give --words={benchmark}/words.txt." in message
    assert label(world, *flags, f"--words={benchmark}/words.txt") == (0, "")
    shutil.copy(world / "words.txt", benchmark / "words.txt")
    code, message = label(world, *flags)
    assert code == 1 and "was made from something else:" in message
    assert "words: 2 added (sail boat, cat)" in message


def test_predict_a_published_benchmark(world):
    """Words stand for the background, and so does what no mask covers."""
    voc = world / "data" / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (voc / name).mkdir(parents=True)
    for i in range(2):
        picture = Image.open(next((world / "images").rglob(f"{i}.png"))).convert("RGB")
        picture.save(voc / "JPEGImages" / f"{i}.jpg")
        Image.new("L", picture.size).save(voc / "SegmentationClass" / f"{i}.png")
    (voc / "ImageSets/Segmentation/val.txt").write_text("0\n1\n")
    data = f"--config.eval.data={world / 'data'}"
    for name, background in (("voc21", True), ("voc20", False)):
        assert label(world, "--predict", f"--benchmark={name}", data) == (0, "")
        for kind in KINDS:
            folder = world / "work" / "predictions" / name / kind
            maps = [np.asarray(Image.open(folder / f"{i}.png")) for i in range(2)]
            counted = np.concatenate([one.ravel() for one in maps])
            assert counted[counted != IGNORE].max(initial=0) < (21 if background else 20)
            assert not background or (counted != IGNORE).all()
    assert "--benchmark is for --predict" in label(world, f"--benchmark={name}", data)[1]


def test_predict_strict_and_names_that_meet(world):
    shutil.copy(world / "images" / "0.png", world / "images" / "0.bmp")
    flags = "--predict", f"--images={world}/images"
    assert "0.bmp and 0.png would both have 0.png" in label(world, *flags)[1]
    (world / "images" / "0.bmp").unlink()
    (world / "images" / "bad.jpg").write_text("hello")
    assert "bad.jpg cannot be read" in label(world, *flags, "--strict")[1]


def test_manifest_is_written_once(world):
    label(world)
    manifest = json.loads((world / "work/pseudo_labels/progress/manifest.json").read_text())
    assert manifest["images"] == [r.filename for r in records(world)]
    assert manifest["words"] == list(WORDS)
