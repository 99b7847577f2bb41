"""The programs as people run them: killed in the middle, run again, given bad input."""

import json
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from conftest import ROOT, program, run
from PIL import Image

from fmbseg_jax.data import tfrecord


def killed(until, *arguments, **environment):
    """Starts a program, kills it with -9 once `until()` holds; False if it was done before."""
    process = subprocess.Popen(
        program(*arguments), cwd=ROOT, env=os.environ | {"XLA_FLAGS": "", **environment},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None:
        if until():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.002)
    return False


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    """A work folder in which nothing was ever interrupted."""
    workdir = tmp_path_factory.mktemp("done")
    world.pseudo_labels(workdir)
    write_scenes(world.root / "test", 5)
    flags = [*world.flags, f"--workdir={workdir}"]
    run("fmbseg_jax.features", *flags)
    run("train.py", *flags)
    run("evaluate.py", *flags)
    return workdir


def write_scenes(folder, count):
    from toyworld import scenes

    scenes.write_folder(folder, "test", count)


def count(pattern):
    return lambda folder: len(list(folder.glob(pattern)))


def test_features_continue_after_a_kill(done, world, tmp_path):
    world.pseudo_labels(tmp_path)
    command = ["fmbseg_jax.features", *world.flags, f"--workdir={tmp_path}"]
    for shards in (0, 1, 2):
        killed(
            lambda n=shards: (
                count("*.incomplete")(tmp_path / "features") and _shards(tmp_path) >= n
            ),
            *command,
        )
    run(*command)
    expected = tfrecord.find_shards(done / "features")
    for ours, theirs in zip(tfrecord.find_shards(tmp_path / "features"), expected, strict=True):
        assert ours.read_bytes() == theirs.read_bytes()
    assert not list((tmp_path / "features").glob("*.incomplete"))


def _shards(workdir):
    return count("*.tfrecord-?????-of-?????")(workdir / "features")


def test_training_continues_after_a_kill(done, world, tmp_path):
    for name in ("pseudo_labels", "features"):
        shutil.copytree(done / name, tmp_path / name)
    command = ["train.py", *world.flags, f"--workdir={tmp_path}"]
    checkpoints = tmp_path / "checkpoints"
    assert killed(lambda: (checkpoints / "3").exists(), *command)
    assert not (tmp_path / "export").exists()
    output = run(*command).stdout
    assert "The aligner is in" in output
    expected, ours = (_log(folder) for folder in (done, tmp_path))
    assert [line["step"] for line in ours] == [line["step"] for line in expected]
    for a, b in zip(expected, ours, strict=True):
        same = "step", "loss", "accuracy", "gradient_norm", "learning_rate"
        assert [a[name] for name in same] == [b[name] for name in same]
    again = run(*command).stdout  # nothing left to do
    assert "The aligner is in" in again
    assert _log(tmp_path) == ours


def _log(workdir):
    return [json.loads(line) for line in (workdir / "metrics" / "train.jsonl").open()]


def test_evaluation_continues_after_a_kill(done, world, tmp_path):
    shutil.copytree(done / "export", tmp_path / "export")
    command = ["evaluate.py", *world.flags, f"--workdir={tmp_path}"]
    predictions = tmp_path / "predictions" / "aligner"
    assert killed(lambda: count("*.png")(predictions) >= 2, *command)
    made = {path: path.stat().st_mtime_ns for path in predictions.glob("*.png")}
    run(*command)
    assert made.items() <= {p: p.stat().st_mtime_ns for p in predictions.glob("*.png")}.items()
    summary = "evaluation/summary.json"
    assert json.loads((tmp_path / summary).read_text()) == json.loads((done / summary).read_text())


def test_the_summary_is_what_numpy_counts(done, world):
    summary = json.loads((done / "evaluation" / "summary.json").read_text())["aligner"]
    confusion = np.zeros((16, 16))
    for path in (world.root / "test" / "labels").glob("*.png"):
        truth = np.asarray(Image.open(path)).ravel()
        guess = np.asarray(Image.open(done / "predictions" / "aligner" / path.name)).ravel()
        np.add.at(confusion, (truth, guess), 1)
    union = confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    with np.errstate(invalid="ignore"):
        iou = np.diag(confusion) / union
    assert summary["miou"] == pytest.approx(np.nanmean(iou))
    assert summary["coverage"] == 1
    assert summary["images"] == 5
    assert (done / "evaluation" / "contact_sheet.png").stat().st_size > 10_000


def test_another_aligner_is_evaluated_afresh(done, world, tmp_path):
    shutil.copytree(done, tmp_path / "w")
    flags = [*world.flags, f"--workdir={tmp_path / 'w'}"]
    before = {
        p.name: p.stat().st_mtime_ns for p in (tmp_path / "w/predictions/aligner").glob("*.png")
    }
    run("evaluate.py", *flags, "--config.eval.stride=70")
    after = {
        p.name: p.stat().st_mtime_ns for p in (tmp_path / "w/predictions/aligner").glob("*.png")
    }
    assert before.keys() == after.keys()
    assert all(before[name] != after[name] for name in before)


def test_predictions_of_others_are_refused(done, world, tmp_path):
    shutil.copytree(done, tmp_path / "w")
    predictions = tmp_path / "w" / "predictions"
    command = ["evaluate.py", *world.flags, f"--workdir={tmp_path / 'w'}"]
    shutil.copytree(predictions / "aligner", predictions / "stage1")
    wrong = predictions / "stage1" / "test_000002.png"
    Image.fromarray(np.full((128, 128), 15, np.uint16)).save(wrong)
    assert "has the index 15; 15 words allow 0 to 14" in run(*command, check=False).stdout
    wrong.write_bytes(wrong.read_bytes()[:50])
    assert "test_000002.png cannot be read" in run(*command, check=False).stdout
    made_for = {"images": "elsewhere", "words": ["sky"]}
    (predictions / "manifest.json").write_text(json.dumps(made_for))
    output = run(*command, check=False).stdout
    assert "images: 'elsewhere' there" in output and "Traceback" not in output


def test_drawing_scenes_continues_after_a_kill(tmp_path):
    """Stopped at several places: in the end every file is there, and whole."""
    command = ["toyworld", f"--out={tmp_path / 'toy'}", "--scenes=12"]
    for files in (1, 7, 20):
        killed(lambda n=files: len(list((tmp_path / "toy").rglob("*.png"))) >= n, *command)
    run(*command)
    for split in ("train", "validation", "test"):
        names = [f"{split}_{i:06d}.png" for i in range(12)]
        for kind in ("images", "labels"):
            files = sorted((tmp_path / "toy" / split / kind).glob("*.png"))
            assert [path.name for path in files] == names
            assert all(Image.open(path).size == (128, 128) for path in files)
            for path in files:
                Image.open(path).load()


SEGMENT = "fmbseg_jax.segment"


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


def test_segmenting_a_folder(done, photos, tmp_path):
    command = [
        SEGMENT,
        f"--model={done / 'export'}",
        f"--images={photos}",
        "--words=sky, sail boat",
    ]
    command += [f"--out={tmp_path / 'out'}"]
    labels = tmp_path / "out" / "labels"
    assert killed(lambda: count("*.png")(labels) >= 1, *command)
    output = run(*command).stdout
    assert "skipped broken.jpg: cannot be read" in output
    assert "skipped empty.png: cannot be read" in output
    assert "skipped: 2." in output
    for name, shape in {
        "a": (40, 60),
        "sub/grey": (40, 60),
        "cmyk": (40, 60),
        "dot": (1, 1),
        "wide": (1, 20_000),
    }.items():
        labelled = np.asarray(Image.open(labels / f"{name}.png"))
        assert labelled.shape == shape
        assert labelled.max() <= 1
        assert Image.open(tmp_path / "out" / "overlays" / f"{name}.png").size == shape[::-1]
    assert (tmp_path / "out" / "words.txt").read_text() == "sky\nsail boat\n"
    assert (tmp_path / "out" / "contact_sheet.png").exists()
    assert not list((tmp_path / "out").rglob("*.incomplete"))
    strict = run(*command, "--strict", check=False)
    assert strict.returncode == 1
    assert "broken.jpg cannot be read" in strict.stdout
    other = [f"--words={words}" for words in ("sky",)]
    refused = run(*command[:3], *other, command[-1], check=False)
    assert "words: 1 removed (sail boat)" in refused.stdout
    (tmp_path / "more").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "more" / "a.png")
    moved = [*command[:2], f"--images={tmp_path / 'more'}", *command[3:]]
    assert f"images: '{photos}' there" in run(*moved, check=False).stdout


def test_segment_errors(done, photos, tmp_path):
    def error(**changes):
        given = {"model": done / "export", "images": photos, "words": "sky", "out": tmp_path / "o"}
        arguments = [f"--{key}={value}" for key, value in (given | changes).items()]
        result = run(SEGMENT, *arguments, check=False)
        assert result.returncode == 1
        assert "Traceback" not in result.stdout
        return result.stdout

    (tmp_path / "none").mkdir()
    assert "--words is missing" in error(words="")
    assert "word 2 is empty" in error(words="sky,,grass")
    assert "'Sky', is word 1 again" in error(words="sky,Sky")
    assert "'couch', is word 1 again" in error(words="sofa;couch,couch")
    assert "'sofa;Sofa', has a name twice" in error(words="sofa;Sofa,sky")
    assert "No word list at" in error(words=tmp_path / "no.txt")
    assert "No images in" in error(images=tmp_path / "none")
    assert "is a file; give the folder that it is in" in error(images=photos / "a.png")
    (tmp_path / "none" / "note.jpg").write_text("no image")
    assert "None of the images" in error(images=tmp_path / "none", out=tmp_path / "p")
    assert "separated by commas" in error(words="car/truck")
    assert "is no exported aligner" in error(model=tmp_path)
    assert "would be taken for images" in error(out=photos / "sub" / "out")
    Image.new("RGB", (9, 9)).save(photos / "a.bmp")
    assert "a.bmp and a.png would both have a.png" in error()


def test_program_errors(world, tmp_path):
    def error(*arguments):
        given = [*world.flags[:1], *arguments, f"--workdir={tmp_path / 'w'}"]
        result = run("train.py", *given, check=False)
        assert result.returncode == 1
        assert "Traceback" not in result.stdout
        return result.stdout

    assert "Did you mean --config.train.batch_size?" in error("--config.train.batchsize=3")
    assert "train.loss is one of" in error("--config.train.loss=l2", "--config.train.epochs=0")
    assert "train.epochs is a positive number; got 0" in error("--config.train.epochs=0")
    assert "No config file at nowhere.py" in error("--config=nowhere.py")
    mistaken = tmp_path / "mistaken.py"
    lines = "from fmbseg_jax.config import Config", "def get_config():", "    config = Config()"
    mistaken.write_text("\n".join([*lines, "    config.train.haeds = 2", "    return config"]))
    assert "no field 'haeds'. Did you mean 'heads'?" in error(f"--config={mistaken}")
    mistaken.write_text("import nothing_of_this_name")
    assert "cannot be used as a config (ModuleNotFoundError" in error(f"--config={mistaken}")
    assert "Unexpected argument 'stray'" in error("stray")
    (tmp_path / "mine.py").write_text(
        "from fmbseg_jax.config import Config\n"
        "def get_config():\n    config = Config()\n    config.train.epoch = 3\n    return config\n"
    )
    mine = [f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / 'w'}"]
    output = run("train.py", *mine, check=False).stdout  # with the line of the file that is wrong
    assert "Did you mean 'epochs'?" in output
    assert "config.train.epoch = 3" in output
    (tmp_path / "w").write_text("a file where the folder should be")
    blocked = run("evaluate.py", *world.flags, f"--workdir={tmp_path / 'w'}", check=False)
    assert "Cannot make the work folder" in blocked.stdout


def test_help_shows_an_example():
    for name in ("train.py", "evaluate.py", SEGMENT, "fmbseg_jax.features"):
        result = run(name, "--help", check=False)
        assert "    python " in result.stdout
