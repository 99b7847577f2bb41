"""Several workers, here and on Ray: killed, misled, and kept apart."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import zygote
from conftest import wait_until
from labelling_tiny import CONFIG, WORDS, picture, save_sam
from models import save_clip
from PIL import Image

from fmbseg_jax.data import example
from fmbseg_jax.data.tfrecord import RecordSource, find_shards
from fmbseg_jax.errors import UserError
from fmbseg_jax.runs import workfolder
from labelling import engines
from labelling.shards import dataset
from labelling.shards.worker import Worker

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0",
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images, words, models, a config, and the shards that one worker makes of them."""
    world = tmp_path_factory.mktemp("world")
    save_clip(world / "clip")
    save_sam(world / "sam.pth")
    (world / "config.py").write_text(CONFIG.format(world))
    (world / "words.txt").write_text("\n".join(WORDS))
    (world / "images").mkdir()
    for i in range(18):
        Image.fromarray(picture(150, 200, i)).save(world / "images" / f"{i:02d}.png")
    (world / "images" / "05.jpg").write_text("damaged")
    start(world, "alone", fresh=True).wait()
    assert len(shards(world, "alone")) == 7
    return world


def start(world, workdir, *flags, fresh=False, **options):
    popen = subprocess.Popen if fresh or "--engine=ray" in flags else zygote.Popen
    flags = "--config.label.sam.points_per_side=8", f"--workdir={world / workdir}", *flags
    command = [sys.executable, "-m", "labelling", f"--config={world}/config.py", *flags]
    return popen(command, env=ENVIRONMENT, text=True, cwd=ROOT, **options)


def finish(process):
    """Its output, when it has ended well."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def captured(*arguments):
    return start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def shards(world, workdir):
    return {p.name: p.read_bytes() for p in find_shards(world / workdir / "pseudo_labels")}


def processes():
    """(pid, parent, command line) of everything that runs."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(folder.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1])
            command = folder.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, ValueError):
            continue
        yield int(folder.name), parent, command


def descendants(pid):
    family, grown = {pid}, True
    while grown:
        more = {child for child, parent, _ in processes() if parent in family} - family
        grown, family = bool(more), family | more
    return family - {pid}


def kill_one(process, pattern, folder):
    """kill -9 of a process below one whose command matches, once a shard is being written."""

    def workers():
        if not any(folder.glob("*.incomplete")) or not any(folder.glob("*.tfrecord-*-of-*[0-9]")):
            return []
        mine = descendants(process.pid)
        return [p for p, _, name in processes() if p in mine and re.search(pattern, name)]

    found = []
    begun = wait_until(lambda: found.extend(workers()) or found, process)
    assert begun, "it ended before a worker could be killed"
    os.kill(found[-1], signal.SIGKILL)


@pytest.mark.parametrize("kill", [False, True])
def test_two_processes_make_what_one_makes(world, kill):
    workdir = f"processes-{kill}"
    process = captured(world, workdir, "--workers=2")
    if kill:
        kill_one(process, "multiprocessing.spawn", world / workdir / "pseudo_labels")
    output = finish(process)
    assert "19: 18 labelled, 1 skipped" in output
    assert shards(world, workdir) == shards(world, "alone")
    assert not list((world / workdir).rglob("*.incomplete"))


def test_ray_makes_what_one_makes_though_a_worker_is_killed(world):
    process = captured(world, "ray", "--engine=ray", "--workers=2")
    kill_one(process, r"ray::_Actor", world / "ray" / "pseudo_labels")
    output = finish(process)
    assert "19: 18 labelled, 1 skipped" in output
    assert shards(world, "ray") == shards(world, "alone")


class Deadly(Worker):
    """Dies of its second shard."""

    def write(self, shard, progress=lambda counts: None):
        if shard == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return engines.Counts(images=1)


class Faulty(Worker):
    def write(self, shard, progress=lambda counts: None):
        raise UserError("this image is the last straw") if shard else ZeroDivisionError()


def test_a_shard_that_kills_its_workers_stops_the_run():
    made = []
    worker = Deadly(None, (), None, {})
    with pytest.raises(UserError, match=r"3 workers died \(signal SIGKILL\) .* shard 1\. Out of"):
        engines.run_processes(worker, [0, 1], lambda *event: made.append(event), ["cpu"])
    assert [shard for shard, _ in made] == [0]


@pytest.mark.parametrize(("shard", "kind", "message"), [
    (1, UserError, "the last straw"), (0, RuntimeError, "ZeroDivisionError"),
])  # fmt: skip
def test_a_workers_error_is_the_runs(shard, kind, message):
    with pytest.raises(kind, match=message):
        engines.run_processes(Faulty(None, (), None, {}), [shard], print, ["cpu", "cpu"])


def test_strict_stops_all(world):
    process = captured(world, "strict", "--workers=2", "--strict")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "error: 05.jpg cannot be read" in output and "Traceback" not in output


def at_work(world, name):
    """A run that has begun to write a shard."""
    process = captured(world, name)
    begun = (world / name / "pseudo_labels").glob
    assert wait_until(lambda: any(begun("*.incomplete")), process)
    return process


def test_the_folder_of_another_run(world):
    """Refused while it lives, with its name; taken over when it is dead."""
    folder = world / "held" / "pseudo_labels"
    first = at_work(world, "held")
    second = captured(world, "held")
    output, _ = second.communicate(timeout=300)
    assert second.returncode == 1 and f"is in use by process {first.pid} on " in output
    first.send_signal(signal.SIGKILL)
    first.wait()
    finish(captured(world, "held"))
    assert shards(world, "held") == shards(world, "alone")
    assert not list(folder.rglob("*.incomplete"))


def test_a_refused_run_does_not_speak_for_the_folder(world):
    """The second run has another config: it must not stand in the first one's config.json."""
    first = at_work(world, "first")
    other = "--config.label.points_per_word=3"
    second = captured(world, "first", other)
    output, _ = second.communicate(timeout=300)
    assert second.returncode == 1 and "is in use" in output
    finish(first)
    finish(captured(world, "first"))
    third = captured(world, "first", other)
    assert "points_per_word: 5 there, 3 now" in third.communicate(timeout=300)[0]


def test_ray_tells_a_workers_error_and_takes_what_fits(world):
    """A message, no traceback of another machine; more workers than cores do not wait for ever."""
    process = captured(world, "ray-strict", "--engine=ray", "--workers=64", "--strict")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "error: 05.jpg cannot be read" in output and "ray::" not in output


@pytest.mark.parametrize("damage", ["cut", "counts"])
def test_a_damaged_shard_is_made_again(world, damage):
    workdir = world / f"damaged-{damage}"
    shutil.copytree(world / "alone", workdir)
    folder = workdir / "pseudo_labels"
    shard = sorted(folder.glob("*.tfrecord-*"))[3]
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        (folder / "progress" / "00003.json").write_text("")
    finish(captured(world, workdir))
    assert shards(world, workdir) == shards(world, "alone")


def test_a_disk_that_does_not_answer_skips_nothing(world, monkeypatch):
    """An error of the disk is not one of the image: tried again, and then the run stops."""
    answers = [OSError(5, "Input/output error"), OSError(5, "Input/output error"), b"image"]
    monkeypatch.setattr(dataset, "_WAITS", (0, 0, 0))

    def read(path):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(dataset, "read_local", read)
    assert dataset.read_file("photos", "a.jpg") == b"image"
    answers[:] = [OSError(5, "Input/output error")] * 3
    with pytest.raises(UserError, match=r"a\.jpg cannot be read, tried 3 times .*Input/output"):
        dataset.read_file("photos", "a.jpg")
    answers[:] = [FileNotFoundError(2, "No such file or directory")]
    with pytest.raises(dataset.ImageError, match="No such file"):
        dataset.read_file("photos", "a.jpg")


def test_a_lock_is_let_go(tmp_path):
    def hold(folder):
        with workfolder.hold(folder):
            pass

    with workfolder.hold(tmp_path / "a"), pytest.raises(UserError, match="in use by process"):
        hold(tmp_path / "a")
    hold(tmp_path / "a")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write to"):
        hold(tmp_path / "file" / "a")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up(world, small_disk):
    process = captured(world, small_disk / "work")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in output
    assert "No space left on device" in output and "run the same command again" in output
    folder = small_disk / "work" / "pseudo_labels"
    done = {p.name: p.read_bytes() for p in folder.glob("*.tfrecord-*")}
    whole = shards(world, "alone")
    assert 0 < len(done) < len(whole) and done.items() <= whole.items()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    finish(captured(world, small_disk / "work"))
    assert shards(world, small_disk / "work") == whole


def test_images_that_were_mended_are_labelled(world):
    workdir = world / "mended"
    shutil.copytree(world / "images", world / "images2")
    flags = f"--images={world / 'images2'}"
    finish(captured(world, workdir, flags))
    before = shards(world, workdir)
    assert "05.jpg" in (workdir / "pseudo_labels" / "skipped.tsv").read_text()
    Image.fromarray(picture(150, 200, 99)).save(world / "images2" / "05.jpg")
    output = finish(captured(world, workdir, flags))
    assert "19: 19 labelled, 0 skipped" in output
    after = shards(world, workdir)
    changed = [name for name in before if before[name] != after[name]]
    assert len(changed) == 1
    assert not (workdir / "pseudo_labels" / "skipped.tsv").read_text()
    path = workdir / "pseudo_labels" / changed[0]
    source = RecordSource([path])
    names = [example.decode_pseudo_label(source[i]).filename for i in range(len(source))]
    assert names == sorted(names) and "05.jpg" in names
    output = finish(captured(world, workdir, flags))
    assert "nothing to label" in output and shards(world, workdir) == after


def test_figures_come_while_it_labels(world):
    workdir = world / "drawn"
    process = captured(world, workdir, "--figures=2")
    pictures = [workdir / "figures" / "labelling" / f"{i:02d}.png.png" for i in (0, 1)]
    drawn = wait_until(lambda: all(path.exists() for path in pictures), process)
    assert drawn, "they come before the end"
    assert len(list((workdir / "pseudo_labels").glob("*.tfrecord-*-of-*[0-9]"))) < 7
    finish(process)
    for path in pictures:
        path.unlink()
    finish(captured(world, workdir, "--figures=3"))
    assert sorted(p.name for p in pictures[0].parent.iterdir()) == [
        f"{i:02d}.png.png" for i in range(3)
    ]
