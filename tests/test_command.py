"""The command line: `fmbseg`, every --help, wrong flags, config files and their fields."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, run

from fmbseg_jax.__main__ import PROGRAMS
from fmbseg_jax.config import Config, fields, files, flatten
from fmbseg_jax.errors import UserError


def fmbseg(*arguments, check=True):
    result = run("fmbseg_jax", *arguments, check=check)
    assert "Traceback" not in result.stdout
    return result.stdout


def error(*arguments):
    """The message that a command ends with: one line, and an example if it has one."""
    output = fmbseg(*arguments, check=False)
    assert output.startswith("\nerror: ") and output.count("error: ") == 1, output
    assert len(output.strip().splitlines()) in (1, 3), output
    return output.removeprefix("\nerror: ")


def test_the_command_lists_the_programs_without_jax():
    command = [sys.executable, "-X", "importtime", "-m", "fmbseg_jax"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    for name, (_, line) in PROGRAMS.items():
        assert re.search(f"^    {name} +{line}$", result.stdout, re.MULTILINE)
    assert "fmbseg_jax.runs.extras" in result.stderr
    assert not re.search(r"\b(jax|numpy|absl)\b", result.stderr)
    assert fmbseg("--help") == fmbseg("-h") == result.stdout


def test_an_unknown_program_is_answered_with_the_nearest():
    message = error("trian", "--config=configs/toy.py")
    assert message.startswith("There is no program 'trian'. Did you mean train? There are: label, ")
    assert "Did you mean" not in error("xyz")


COMMANDS = {
    f"fmbseg {name}": (module, ["fmbseg_jax", name]) for name, (module, _) in PROGRAMS.items()
}
COMMANDS |= {f"python -m {name}": (name, [name]) for name in ("toyworld", "toyworld.pretrain")}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_is_read_and_written_with_an_example(command):
    module, arguments = COMMANDS[command]
    output = run(*arguments, "--help", check=False).stdout
    assert "Traceback" not in output
    assert re.search(f"^    ({command}|python -m {module})( |$)", output, re.MULTILINE), output
    assert re.search(r"\b[Rr]eads\b", output) and re.search(r"\b[Ww]rit(es|ten)\b", output), output


def test_help_may_be_cut_off():
    reader, writer = os.pipe()
    os.close(reader)  # as by `| head`, at once
    command = [sys.executable, "-m", "fmbseg_jax", "segment", "--help"]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert result.stderr == ""


@pytest.mark.parametrize("file", ["train", "evaluate"])
def test_the_files_of_a_checkout_are_the_programs(file):
    theirs = run(f"{file}.py", "--help", check=False).stdout
    assert f"    python {file}.py --config=" in theirs
    assert theirs == fmbseg(file, "--help", check=False)


def test_a_wrong_flag_is_answered_with_the_nearest():
    assert error("segment", "--imagse=photos") == (
        "There is no flag --imagse. Did you mean --images? --help shows all.\n"
    )
    assert "Did you mean --config.train.epochs?" in error(
        "train", "--config=configs/toy.py", "--train.epochs=3"
    )
    assert "Did you mean" not in error("segment", "--xyz")
    assert error("label", "--figures=many") == "--figures=many: 'many' is no integer.\n"
    assert error("segment", "--threshold=x") == "--threshold=x: 'x' is no number.\n"
    assert "'perhaps' is neither true nor false." in error("segment", "--scores=perhaps")
    assert "should be one of <local|ray>" in error("label", "--engine=rya")


def test_a_missing_flag_comes_with_an_example():
    example = "fmbseg train --config=configs/toy.py --workdir=work/toy"
    expected = f" is missing. For example:\n\n    {example}\n"
    assert error("train") == error("train", "--config.train.epochs=3") == f"--config{expected}"
    assert error("train", "--config=configs/toy.py") == f"--workdir{expected}"


def test_a_wrong_field_is_answered_with_the_nearest(tmp_path):
    flags = "--config=configs/toy.py", f"--workdir={tmp_path}"
    assert error("train", *flags, "--config.train.epohcs=3") == (
        "The config has no field 'train.epohcs'. Did you mean --config.train.epochs? "
        "`fmbseg config` shows all.\n"
    )
    assert error("train", *flags, "--config.train.epochs=many") == (
        "--config.train.epochs=many: 'many' is no integer.\n"
    )


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        ("EACCES", "the right to do so"),
        ("EROFS", "that can be written to"),
        ("ENOSPC", "Make room"),
    ],
)
def test_what_the_system_refuses_comes_with_advice(tmp_path, number, advice):
    (tmp_path / "program.py").write_text(
        "import errno\nfrom fmbseg_jax.runs import program\n"
        f"def main(): raise OSError(errno.{number}, 'No', 'out.png')\nprogram.run(main)"
    )
    result = run(tmp_path / "program.py", check=False, PYTHONPATH=str(ROOT))
    assert result.returncode == 1 and "Traceback" not in result.stdout
    assert "error: [Errno" in result.stdout and "'out.png'" in result.stdout
    assert f"{advice}. Then run the same command to continue." in result.stdout


def test_an_extra_that_is_missing_is_named(monkeypatch, capsys):
    from fmbseg_jax import __main__ as command

    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    monkeypatch.setattr(sys, "argv", ["fmbseg", "pretrain"])
    with pytest.raises(SystemExit, match=r'torch is not inst.*pip install -e ".\[label\]"'):
        command.start("toyworld.pretrain")


def test_the_config_is_printed_with_its_comments():
    output = fmbseg("config")
    for name, value in flatten(Config()).items():
        assert f"{name} = {value!r}\n    " in output
    assert all(len(line) <= 100 for line in output.splitlines())
    found = fmbseg("config", "--config.train.momentum")
    assert found.strip() == "train.momentum = 0.9\n    Momentum of SGD. Ours."
    assert list(fields.matching("cosines")) == ["train.temperature"]  # in no name, in a comment
    assert "Did you mean train.epochs?" in error("config", "train.epohcs")


def test_configs_of_the_package_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = str(files.SHIPPED / "folder.py")
    assert files.find("configs/folder.py") == own
    (tmp_path / "sized.py").write_text("def get_config(size): assert size == 'x:y'")
    resolved = files.resolve(["fmbseg", f"--config={tmp_path / 'sized.py'}:x:y"])[1]
    assert resolved == f"--config={tmp_path / 'sized.py'}:x:y"
    assert files.resolve(["fmbseg", "--config", "configs/folder.py"])[2] == own
    with pytest.raises(UserError, match="No config file at configs/foldre.py. Did you mean "):
        files.find("configs/foldre.py")
    with pytest.raises(
        UserError, match="No config file at mine.py.*configs/folder.py, configs/toy"
    ):
        files.find("mine.py")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "folder.py").write_text("def get_config(): raise ValueError('mine')")
    assert files.find("configs/folder.py") == "configs/folder.py"  # the user's own goes first
    with pytest.raises(UserError, match="line 1.*\n.*cannot be used as a config .ValueError: mine"):
        files.resolve(["fmbseg", "--config=configs/folder.py"])
    text = "from fmbseg_jax.config import Config\ndef get_config(): return Config(epochs=3)"
    (tmp_path / "configs" / "folder.py").write_text(text)
    with pytest.raises(UserError, match="unexpected keyword argument 'epochs'"):
        files.resolve(["fmbseg", "--config=configs/folder.py"])


def test_a_config_file_may_start_from_another(tmp_path):
    from ml_collections.config_flags import config_flags

    (tmp_path / "mine.py").write_text("from configs.coco_stuff_base import get_config")
    path = files.resolve(["fmbseg", f"--config={tmp_path / 'mine.py'}"])[1]
    config = config_flags.ConfigFileFlagParser("config").parse(path.removeprefix("--config="))
    assert config.train.heads == 12
    assert config.data.words.endswith("coco_stuff171.txt")
