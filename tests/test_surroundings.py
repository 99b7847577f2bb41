"""Where programs run: on other systems and platforms, and as users of whom nothing is known."""

import os
import pwd
import subprocess
import sys
import tempfile

import jax
import labelling_tiny
import numpy as np
import pytest
from conftest import ROOT, run
from models import save_aligner

import fmbseg_jax
from fmbseg_jax.encoders.text_features import TextFeatures
from fmbseg_jax.errors import UserError
from fmbseg_jax.parallel import hosts
from fmbseg_jax.runs import home
from fmbseg_jax.sharing import loading


@pytest.mark.parametrize("program", ["label", "features", "app"])
def test_windows_is_told_where_it_runs(program):
    code = f"""
import sys
sys.modules["fcntl"] = None  # as where there is none
sys.argv = ["fmbseg", "{program}", "--help"]
from fmbseg_jax.__main__ import main
main()
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error: FMbSeg runs on Linux and macOS; on Windows, in WSL:" in result.stderr


def test_a_platform_that_is_not_here(world, tmp_path):
    message = "error: JAX_PLATFORMS is 'rocm', and JAX finds no device that it can use ("
    (tmp_path / "pseudo_labels").mkdir()
    command = ["fmbseg_jax.features", *world.flags, f"--workdir={tmp_path}"]
    result = run(*command, check=False, JAX_PLATFORMS="rocm")
    assert result.returncode == 1 and "Traceback" not in result.stdout
    assert message in result.stdout and "Unset JAX_PLATFORMS, or set it to cpu." in result.stdout


@pytest.mark.parametrize("error", [RuntimeError("no TPU (set JAX_PLATFORMS='')"), AssertionError()])
def test_devices_are_asked_for_before_anything_is_loaded(world, tmp_path, monkeypatch, error):
    export = save_aligner(tmp_path / "export", world.root)

    def none():
        raise error

    monkeypatch.setattr(jax, "devices", none)
    reason = "no TPU" if str(error) else "none was found"
    for start in (
        lambda: fmbseg_jax.load(export),
        lambda: loading.clip_patches(str(world.root / "clip"), None),
        lambda: hosts.start_hosts("", 0, -1),
    ):
        with pytest.raises(UserError, match=rf"no device that it can use \({reason}\)\. Unset"):
            start()


@pytest.fixture
def nameless(monkeypatch, tmp_path):
    """No HOME, and a user id that no one has."""

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    return tmp_path


def test_a_user_without_a_home_gets_one(nameless, capsys):
    labelling_tiny.run("--help")  # any program
    folder = os.environ["HOME"]
    assert os.path.dirname(folder) == str(nameless) and os.path.isdir(folder)
    assert f"no home folder: what is fetched lies in {folder} until" in capsys.readouterr().err
    assert os.environ["USER"] == f"uid{os.getuid()}"
    home.provide()
    assert os.environ["HOME"] == folder and capsys.readouterr().err == ""
    home._remove(folder, os.getpid() + 1)
    assert os.path.isdir(folder)
    home._remove(folder, os.getpid())
    assert not os.path.exists(folder)


def test_features_of_words_without_a_home_are_kept_in_memory(nameless, world, monkeypatch):
    monkeypatch.delenv("FMBSEG_CACHE")
    features = TextFeatures(str(world.root / "clip"))
    first = features(["sky"])
    np.testing.assert_array_equal(features(["sky"]), first)
    assert not list(nameless.iterdir())
