"""Folders whose names look like patterns; folders that take the place of others."""

import errno
import json
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from fmbseg_jax.config import Config
from fmbseg_jax.data.sources import Sources
from fmbseg_jax.errors import UserError
from fmbseg_jax.io import replacing
from fmbseg_jax.io.files import incomplete
from fmbseg_jax.io.links import without_patterns
from fmbseg_jax.runs import workfolder
from fmbseg_jax.sharing import exports
from fmbseg_jax.training import checkpoint

NAMES = "run[1]", "[!a]*", "what?", "a\\b", "a b", "50%20", "небо #1"


def params(value=0.0):
    return {"kernel": jnp.arange(6.0).reshape(2, 3) + value}


def export(value=0.0):
    encoder = {"source": "", "hash": ""}
    model = {"vision": encoder, "clip": encoder, "words": [], "images": 0, "config": {}}
    model["aligner"] = {"kind": "linear", "output": 1, "mlp_ratio": 1, "heads": 1}
    return exports.Export(params(value), model)


def kernel(folder):
    return np.asarray(exports.load_export(folder, params())["kernel"])


class Batches:
    """A reader that remembers one number."""

    state = 0

    def __iter__(self):
        return self

    def __next__(self):
        raise StopIteration

    def get_state(self):
        return {"at": self.state}

    def set_state(self, state):
        self.state = state["at"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_in_any_folder_is_read_again(name, tmp_path):
    folder, sibling = tmp_path / name / "work", tmp_path / "run1" / "work"
    for i, work in enumerate((sibling, folder)):  # the sibling is what such a pattern would match
        exports.save_export(work / "export", export(i), "")
    np.testing.assert_array_equal(kernel(folder / "export"), params(1)["kernel"])
    saved = checkpoint.Checkpoints(folder / "checkpoints")
    batches = Batches()
    batches.state = 7
    saved.save(3, params(2), batches)
    saved.close()
    again, there = checkpoint.Checkpoints(folder / "checkpoints"), Batches()
    state, iterator = again.restore(params(), there)
    again.close()
    np.testing.assert_array_equal(state["kernel"], params(2)["kernel"])
    assert (again.last, iterator.state) == (3, 7)


def test_an_export_may_be_moved_into_such_a_folder(tmp_path):
    exports.save_export(tmp_path / "export", export(), "")
    moved = tmp_path / "old [1]"
    shutil.move(tmp_path / "export", moved)
    np.testing.assert_array_equal(kernel(moved), params()["kernel"])


def test_a_link_lasts_as_long_as_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    plain, folder = tmp_path / "plain", tmp_path / "run[1]"
    plain.mkdir()
    folder.mkdir()
    with without_patterns(plain) as path:
        assert path == plain.resolve()
    with without_patterns(folder) as path:
        (path / "file").write_text("there")
        assert (folder / "file").read_text() == "there"
    assert sorted(child.name for child in tmp_path.iterdir()) == ["plain", "run[1]"]
    assert (folder / "file").exists()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(UserError, match="would be taken for a pattern, .* set TMPDIR to a folder"):
        exports.save_export(folder / "export", export(), "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="set TMPDIR .*No such file"):
        exports.save_export(folder / "export", export(), "")


# Taking the place of an earlier export


@pytest.fixture
def old(tmp_path):
    exports.save_export(tmp_path / "export", export(), "")
    return tmp_path / "export"


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_export_that_cannot_be_read_takes_no_place(old, monkeypatch):
    save = exports._save

    def badly(folder, given):
        save(folder, given)
        largest = max(folder.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
        largest.write_bytes(bytes(largest.stat().st_size))

    monkeypatch.setattr(exports, "_save", badly)
    with pytest.raises(UserError, match="written cannot be read .* What was there is as it was"):
        exports.save_export(old, export(1), "")
    np.testing.assert_array_equal(kernel(old), params()["kernel"])
    monkeypatch.undo()
    exports.save_export(old, export(1), "")
    np.testing.assert_array_equal(kernel(old), params(1)["kernel"])
    assert entries(old.parent) == ["export"]


@pytest.mark.parametrize("fails", [0, 1])
@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_a_rename_that_fails_leaves_the_old_one(old, monkeypatch, fails, kind):
    rename, calls = Path.rename, []
    monkeypatch.setattr(replacing, "_exchanged", lambda new, old: False)

    def refused(self, target):
        calls.append(self)
        if len(calls) == fails + 1:
            raise kind("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(kind, match="no"):
        exports.save_export(old, export(1), "")
    np.testing.assert_array_equal(kernel(old), params()["kernel"])


def test_killed_while_neither_has_the_name(old):
    """The old one is whole; readers say where, and the next writer gives it its name again."""
    shutil.copytree(old, old.with_name("export.incomplete"))
    old.rename(old.with_name("export.being_replaced"))
    with pytest.raises(UserError, match=r"export\.being_replaced: rename it to export"):
        exports.read_model(exports.locate(old))
    with pytest.raises(RuntimeError), replacing.replaced(old):
        raise RuntimeError
    np.testing.assert_array_equal(kernel(old), params()["kernel"])


def test_a_relative_folder_that_is_being_replaced_is_no_id_of_the_hub(old, monkeypatch):
    old.rename(replacing.moved_aside(old))
    monkeypatch.chdir(old.parent.parent)
    with pytest.raises(UserError, match="as it was replacing it"):
        exports.read_model(exports.locate(f"{old.parent.name}/export"))


def test_of_a_link_the_folder_is_replaced_that_it_leads_to(old):
    link = old.parent / "link"
    link.symlink_to(old)
    exports.save_export(link, export(1), "")
    assert link.is_symlink() and entries(old.parent) == ["export", "link"]
    np.testing.assert_array_equal(kernel(old), params(1)["kernel"])


def test_readers_see_one_of_the_two_whenever_they_look(old):
    """Where folders can be exchanged, the name is never without one."""
    stop, seen = threading.Event(), set()

    def look():
        while not stop.is_set():
            seen.add((old / "model.json").is_file())

    reader = threading.Thread(target=look)
    reader.start()
    for i in range(20):
        with replacing.replaced(old) as new:
            (new / "model.json").write_text(str(i))
    stop.set()
    reader.join()
    assert seen == {True} and (old / "model.json").read_text() == "19"
    assert entries(old.parent) == ["export"]


def test_what_fails_leaves_nothing(old):
    with pytest.raises(OSError, match="full"), replacing.replaced(old) as new:
        (new / "half").touch()
        raise OSError("full")
    assert entries(old.parent) == ["export"]


def test_a_copy_can_be_written_to_and_follows_no_link_out(tmp_path):
    folder, new = tmp_path / "folder", tmp_path / "new"
    (folder / "part").mkdir(parents=True)
    new.mkdir()
    (folder / "part" / "a").write_text("a")
    (folder / "b").symlink_to("part/a")
    (folder / "part" / "a").chmod(0o400)
    (folder / "part").chmod(0o500)
    replacing.copy(folder, new, without=["none"])
    assert (new / "b").read_text() == (new / "part" / "a").read_text() == "a"
    assert not (new / "b").is_symlink()
    assert all(path.stat().st_mode & 0o200 for path in new.rglob("*"))
    (folder / "part").chmod(0o700)
    for make in (
        lambda path: path.symlink_to("/etc/hostname"),
        lambda path: path.symlink_to(tmp_path, target_is_directory=True),
        os.mkfifo,
    ):
        make(folder / "part" / "bad")
        with pytest.raises(UserError, match="part/bad leads out of .*, or is not a file"):
            replacing.copy(folder, new)
        (folder / "part" / "bad").unlink()


@pytest.mark.parametrize("make", [os.symlink, os.link])
def test_nothing_is_written_on_through_a_link(tmp_path, make):
    """A lock, a log or a list in a folder of other people may lead to a file elsewhere."""
    private = tmp_path / "private"
    private.write_text("kept")
    (tmp_path / "work").mkdir()
    make(private, tmp_path / "work" / ".lock")
    make(private, tmp_path / "work" / ".config.lock")
    make(private, tmp_path / "work" / "made_from.jsonl")
    for act in (
        lambda: workfolder.hold(tmp_path / "work").__enter__(),
        lambda: workfolder.claim(tmp_path / "work", Config(), ("seed",), "features/*"),
        lambda: Sources(tmp_path / "work" / "made_from.jsonl").add("a", [[1, 2]]),
    ):
        with pytest.raises(UserError, match="is no file of its own"):
            act()
    assert private.read_text() == "kept"


def test_stages_record_their_config_one_after_the_other(tmp_path):
    """config.json is read, changed and written by one at a time: no stage loses its part."""
    stages = [f"stage{i}" for i in range(12)]

    def claim(stage):
        for _ in range(10):
            workfolder.claim(tmp_path, Config(), ("seed",), f"{stage}/*")

    with ThreadPoolExecutor(len(stages)) as pool:
        list(pool.map(claim, stages))
    assert json.loads((tmp_path / "config.json").read_text()).keys() == set(stages)


def test_a_claim_removes_what_killed_ones_left(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    ours = incomplete(epath.Path(tmp_path) / "config.json").name
    left = tmp_path / ours.replace(f"-{os.getpid()}-", f"-{dead.pid}-")
    elsewhere = tmp_path / ours.replace(platform.node(), "another-host")
    for path in (tmp_path / ours, left, elsewhere):
        path.touch()
    workfolder.claim(tmp_path, Config(seed=1), ("seed",), "stage/*")
    assert not left.exists()
    assert elsewhere.exists()  # another machine may be writing it


def test_two_that_replace_one_folder_at_once(old):
    """Neither sees the other's files; the last one wins."""
    with replacing.replaced(old) as first:
        (first / "a").touch()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(_replace, old, "b").result()
        assert entries(old) == ["b"] and entries(first) == ["a"]
    assert entries(old) == ["a"] and entries(old.parent) == ["export"]


def _replace(folder, name):
    with replacing.replaced(folder) as new:
        (new / name).touch()


def test_a_folder_of_somebody_elses_stays(tmp_path):
    """Only what was an export is taken for one that was moved aside."""
    for name in ("export.being_replaced", "export.incomplete"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    with pytest.raises(UserError, match="being_replaced is in the way"):
        _replace(tmp_path / "export", "a")
    (tmp_path / "export.being_replaced").rename(tmp_path / "mine")
    _replace(tmp_path / "export", "a")
    assert entries(tmp_path) == ["export", "export.incomplete", "mine"]


def test_a_disk_that_is_mounted_in_its_place(old, monkeypatch):
    def busy(new, old):
        raise OSError(errno.EBUSY, "Device or resource busy", str(old))

    monkeypatch.setattr(replacing, "_exchanged", busy)
    with pytest.raises(UserError, match="a disk is mounted there. Give another folder"):
        _replace(old, "a")
    np.testing.assert_array_equal(kernel(old), params()["kernel"])


def test_what_a_killed_one_left_of_a_folder_goes(old):
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = Path(str(incomplete(old)).replace(f"-{os.getpid()}-", f"-{dead.pid}-"))
    (left / "params").mkdir(parents=True)
    (left / "params" / "half").touch()
    exports.save_export(old, export(1), "")
    assert entries(old.parent) == ["export"]


def test_a_file_where_a_folder_is_to_be(tmp_path):
    (tmp_path / "export").write_text("kept")
    with (
        pytest.raises(UserError, match="export is a file"),
        replacing.replaced(tmp_path / "export"),
    ):
        pass
    assert (tmp_path / "export").read_text() == "kept" and entries(tmp_path) == ["export"]


def test_a_line_after_one_that_was_cut(tmp_path):
    """It begins on a line of its own: else the two would be one, and both be lost."""
    sources = Sources(tmp_path / "made_from.jsonl")
    sources.add("a.jpg", [[1, 2]])
    whole = (tmp_path / "made_from.jsonl").read_bytes()
    (tmp_path / "made_from.jsonl").write_bytes(whole + b'["b.jpg", [[1')
    Sources(tmp_path / "made_from.jsonl").add("c.jpg", [[3, 4]])
    again = Sources(tmp_path / "made_from.jsonl")
    assert again._states == {"a.jpg": [[1, 2]], "c.jpg": [[3, 4]]}


def test_a_claim_waits_for_another_and_says_so(tmp_path, capsys):
    with ThreadPoolExecutor(1) as pool:
        with workfolder._alone(tmp_path):
            claimed = pool.submit(workfolder.claim, tmp_path, Config(), ("seed",), "stage/*")
            while "Waiting for another program" not in capsys.readouterr().out:
                assert not claimed.done()
        assert claimed.result(timeout=60) == tmp_path
    with workfolder.hold(tmp_path):  # the folder itself may be somebody's
        workfolder.claim(tmp_path, Config(), ("seed",), "stage/*")
