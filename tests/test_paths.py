"""Folders whose names look like patterns; folders that take the place of others."""

import shutil
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from fmbseg_jax import checkpoint, exported
from fmbseg_jax.data import files
from fmbseg_jax.data.links import without_patterns
from fmbseg_jax.errors import UserError

NAMES = "run[1]", "[!a]*", "what?", "a\\b", "a b", "50%20", "небо #1"


def params(value=0.0):
    return {"kernel": jnp.arange(6.0).reshape(2, 3) + value}


def export(value=0.0):
    encoder = {"source": "", "hash": ""}
    model = {"vision": encoder, "clip": encoder, "words": [], "images": 0, "config": {}}
    model["aligner"] = {"kind": "linear", "output": 1, "mlp_ratio": 1, "heads": 1}
    return exported.Export(params(value), model)


def kernel(folder):
    return np.asarray(exported.load_export(folder, params())["kernel"])


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
        exported.save_export(work / "export", export(i), "")
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
    exported.save_export(tmp_path / "export", export(), "")
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
        exported.save_export(folder / "export", export(), "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="set TMPDIR .*No such file"):
        exported.save_export(folder / "export", export(), "")


# Taking the place of an earlier export


@pytest.fixture
def old(tmp_path):
    exported.save_export(tmp_path / "export", export(), "")
    return tmp_path / "export"


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_export_that_cannot_be_read_takes_no_place(old, monkeypatch):
    save = exported._save

    def badly(folder, given):
        save(folder, given)
        largest = max(folder.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
        largest.write_bytes(bytes(largest.stat().st_size))

    monkeypatch.setattr(exported, "_save", badly)
    with pytest.raises(UserError, match="written cannot be read .* What was there is as it was"):
        exported.save_export(old, export(1), "")
    np.testing.assert_array_equal(kernel(old), params()["kernel"])
    monkeypatch.undo()
    exported.save_export(old, export(1), "")
    np.testing.assert_array_equal(kernel(old), params(1)["kernel"])
    assert entries(old.parent) == ["export"]


@pytest.mark.parametrize("fails", [0, 1])
@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_a_rename_that_fails_leaves_the_old_one(old, monkeypatch, fails, kind):
    rename, calls = Path.rename, []

    def refused(self, target):
        calls.append(self)
        if len(calls) == fails + 1:
            raise kind("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(kind, match="no"):
        exported.save_export(old, export(1), "")
    np.testing.assert_array_equal(kernel(old), params()["kernel"])


def test_killed_while_neither_has_the_name(old):
    """The old one is whole; readers say where, and the next writer gives it its name again."""
    shutil.copytree(old, old.with_name("export.incomplete"))
    old.rename(old.with_name("export.being_replaced"))
    with pytest.raises(UserError, match=r"export\.being_replaced: rename it to export"):
        exported.read_model(exported.locate(old))
    with pytest.raises(RuntimeError), files.replaced(old):
        raise RuntimeError
    np.testing.assert_array_equal(kernel(old), params()["kernel"])


def test_a_relative_folder_that_is_being_replaced_is_no_id_of_the_hub(old, monkeypatch):
    old.rename(files.moved_aside(old))
    monkeypatch.chdir(old.parent.parent)
    with pytest.raises(UserError, match="as it was replacing it"):
        exported.read_model(exported.locate(f"{old.parent.name}/export"))


def test_of_a_link_the_folder_is_replaced_that_it_leads_to(old):
    link = old.parent / "link"
    link.symlink_to(old)
    exported.save_export(link, export(1), "")
    assert link.is_symlink() and entries(old.parent) == ["export", "link"]
    np.testing.assert_array_equal(kernel(old), params(1)["kernel"])
