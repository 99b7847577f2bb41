"""The programs as people run them: killed in the middle, run again, given bad input."""

import json
import shutil
import signal
import subprocess

import numpy as np
import pytest
from conftest import run, start, wait_until
from PIL import Image

from fmbseg_jax import config
from fmbseg_jax.data import tfrecord
from fmbseg_jax.datasets.folder import open_folder
from fmbseg_jax.errors import UserError
from fmbseg_jax.evaluation import scoring


def killed(until, *arguments, **environment):
    """Starts a program, kills it with -9 once `until()` holds; False if it was done before."""
    process = start(*arguments, stdout=subprocess.DEVNULL, **environment)
    if found := wait_until(until, process):
        process.send_signal(signal.SIGKILL)
        process.wait()
    return found


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
    run(*command, fresh=True)
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
    output = run(*command, fresh=True).stdout
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


def results(workdir):
    return json.loads((workdir / "evaluation" / "test.json").read_text())["systems"]


def counted(workdir):
    """Lines of the counts, the first of which says whose they are."""
    path = workdir / "evaluation" / "counts" / "test" / "aligner.0.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def test_evaluation_continues_after_a_kill(done, world, tmp_path):
    shutil.copytree(done / "export", tmp_path / "export")
    command = ["evaluate.py", *world.flags, f"--workdir={tmp_path}", "--config.eval.batch_size=1"]
    assert killed(lambda: len(counted(tmp_path)) >= 3, *command)
    there = counted(tmp_path)
    with open(tmp_path / "evaluation/counts/test/aligner.0.jsonl", "a") as file:
        file.write('{"image": "cut sho')  # as a kill in the middle of a line leaves it
    output = run(*command, fresh=True).stdout
    assert f"{len(there) - 1}/5" in output  # not counted again
    assert counted(tmp_path)[: len(there)] == there
    assert results(tmp_path) == results(done)


def test_the_result_is_what_numpy_counts(done, world):
    import fmbseg_jax

    made = json.loads((done / "evaluation" / "test.json").read_text())
    segmenter = fmbseg_jax.load(done / "export", config.unflatten(made["config"]).eval)
    words = (world.root / "test" / "words.txt").read_text().split("\n")[:15]
    confusion = np.zeros((15, 15))
    for path in (world.root / "test" / "labels").glob("*.png"):
        image = np.asarray(Image.open(world.root / "test" / "images" / path.name))
        np.add.at(
            confusion,
            (np.asarray(Image.open(path)).ravel(), segmenter.segment(image, words).ravel()),
            1,
        )
    union = confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    with np.errstate(invalid="ignore"):
        iou = np.diag(confusion) / union
    found = results(done)["aligner"]
    assert found["miou"] == pytest.approx(np.nanmean(iou))
    assert found["coverage"] == 1
    assert found["images"] == 5
    assert np.asarray(found["confusion"])[:, :-1].tolist() == confusion.tolist()


def rows_of(workdir):
    """Pixels of each class in the truth."""
    return [sum(row) for row in results(workdir)["aligner"]["confusion"]]


def test_an_evaluation_says_all_that_is_needed_to_repeat_it(done):
    facts = json.loads((done / "evaluation" / "test.json").read_text())
    assert facts["config"]["eval.stride"] == 35
    assert set(facts["models"]) == {"aligner"}
    assert len(facts["models"]["aligner"]["vision"]["hash"]) >= 16
    assert facts["words"]["compared"] == list(facts["systems"]["aligner"]["iou"])
    assert facts["templates"] == ["a photo of a {}."]

    assert facts["versions"]["fmbseg_jax"]
    absent = [
        word for word, iou in zip(facts["words"]["compared"], rows_of(done), strict=True) if not iou
    ]
    assert facts["truth"] == {"void": 0.0, "absent": absent} and absent
    folder = done / "evaluation"
    table = (folder / "results.md").read_text()
    assert table.startswith("| set | what | mIoU | labelled | images |\n| --- | --- | ---: |")
    lacking = "test: 0.0% of the ground truth has no class, and is not counted; no pixel has the"
    assert f"{lacking} class {absent[0]}" in table
    assert "short side 70, window 70, stride 35" in table
    for name in ("contact_sheet", "best_and_worst", "confusion"):
        assert (folder / "test" / f"{name}.png").stat().st_size > 5_000


def test_clips_patches_and_pamr_are_scored(done, world, tmp_path):
    shutil.copytree(done / "export", tmp_path / "export")
    command = ["evaluate.py", *world.flags, f"--workdir={tmp_path}", "--config.eval.window=64"]
    command += ["--config.eval.short_side=64", "--clip_windows"]
    export = json.loads((tmp_path / "export" / "model.json").read_text())
    assert export["clip"]["source"] == str(world.root / "clip")
    output = run(*command, "--config.eval.pamr=2", check=False).stdout
    assert "eval.window = 64 is not a multiple of the encoder's patch of 14" in output
    fields = ["--config.eval.window=56", "--config.eval.short_side=56", "--config.eval.pamr=2"]
    run(*command, *fields)
    found = results(tmp_path)
    assert list(found) == ["clip_windows", "clip_windows + PAMR", "aligner", "aligner + PAMR"]
    assert found["aligner"]["iou"] != found["aligner + PAMR"]["iou"]


def test_another_aligner_is_evaluated_afresh(done, world, tmp_path):
    shutil.copytree(done, tmp_path / "w")
    run("evaluate.py", *world.flags, f"--workdir={tmp_path / 'w'}", "--config.eval.stride=70")
    before, after = counted(done), counted(tmp_path / "w")
    assert len(before) == len(after) == 6
    assert before[0] != after[0]


def test_images_that_exchange_their_names_are_counted_again(done, world, tmp_path):
    """Nothing else of the set has changed: neither names nor the sizes of its label maps."""
    shutil.copytree(done, tmp_path / "w")
    shutil.copytree(world.root / "test", tmp_path / "test")
    command = ["evaluate.py", *world.flags, f"--workdir={tmp_path / 'w'}"]
    command.append(f"--config.eval.folder={tmp_path / 'test'}")
    first, second = (tmp_path / "test" / "images" / f"test_00000{i}.png" for i in (0, 3))
    run(*command)
    before = results(tmp_path / "w")["aligner"]["iou"]
    first.rename(tmp_path / "between.png")
    second.rename(first)
    (tmp_path / "between.png").rename(second)
    run(*command)
    after = results(tmp_path / "w")["aligner"]["iou"]
    shutil.rmtree(tmp_path / "w" / "evaluation")
    run(*command)
    assert results(tmp_path / "w")["aligner"]["iou"] == after != before


def test_label_maps_of_others_are_scored(done, world, tmp_path):
    shutil.copytree(done, tmp_path / "w")
    saved = tmp_path / "w" / "predictions" / "test"
    command = ["evaluate.py", *world.flags, f"--workdir={tmp_path / 'w'}"]
    (tmp_path / "theirs").mkdir()
    for folder in (saved / "stage1", tmp_path / "theirs"):
        shutil.copytree(world.root / "test" / "labels", folder, dirs_exist_ok=True)
    run(*command, f"--predictions={tmp_path / 'theirs'}")
    found = results(tmp_path / "w")
    assert list(found) == ["stage1", "aligner", "theirs"]
    assert found["stage1"]["miou"] == found["theirs"]["miou"] == 1  # they are the truth
    benchmark, wrong = open_folder(world.root / "test"), saved / "stage1" / "test_000002.png"
    Image.fromarray(np.full((128, 128), 15, np.uint16)).save(wrong)
    with pytest.raises(UserError, match="has the index 15; 15 words allow 0 to 14"):
        scoring.score_folder(benchmark, saved / "stage1")
    wrong.write_bytes(wrong.read_bytes()[:50])
    with pytest.raises(UserError, match="test_000002.png cannot be read"):
        scoring.score_folder(benchmark, saved / "stage1")
    Image.fromarray(np.zeros((128, 127), np.uint16)).save(wrong)
    with pytest.raises(UserError, match="test_000002.png is 127 × 128 pixels, its image"):
        scoring.score_folder(benchmark, saved / "stage1")
    wrong.unlink()
    with pytest.raises(UserError, match="test_000002.png. Each image of the benchmark needs one"):
        scoring.score_folder(benchmark, saved / "stage1")
    made_for = {"images": "elsewhere", "words": ["sky"]}
    (saved / "manifest.json").write_text(json.dumps(made_for))
    output = run(*command, check=False).stdout
    assert "images: 'elsewhere' there" in output and "Traceback" not in output


def test_drawing_scenes_continues_after_a_kill(tmp_path):
    """Stopped at several places: in the end every file is there, and whole."""
    command = ["toyworld", f"--out={tmp_path / 'toy'}", "--scenes=12"]
    for files in (1, 7, 20):
        killed(lambda n=files: len(list((tmp_path / "toy").rglob("*.png"))) >= n, *command)
    run(*command, fresh=True)
    for split in ("train", "validation", "test"):
        names = [f"{split}_{i:06d}.png" for i in range(12)]
        for kind in ("images", "labels"):
            files = sorted((tmp_path / "toy" / split / kind).glob("*.png"))
            assert [path.name for path in files] == names
            assert all(Image.open(path).size == (128, 128) for path in files)
            for path in files:
                Image.open(path).load()


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
