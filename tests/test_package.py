"""The package as it is installed: wheel, requirements, and programs run from an empty folder."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from PIL import Image

import fmbseg_jax
from fmbseg_jax.runs.extras import EXTRAS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, as a build leaves files beside its source."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    made = shutil.ignore_patterns(".*", "work", "data", "build", "*.egg-info")
    shutil.copytree(
        ROOT, source, dirs_exist_ok=True,
        ignore=lambda folder, names: made(folder, names) if Path(folder) == ROOT else (),
    )  # fmt: skip
    pip("wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={out}", str(source))
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs `fmbseg` where the wheel is installed, in a folder that is empty at first."""
    environment, here = tmp_path_factory.mktemp("venv"), tmp_path_factory.mktemp("here")
    venv.create(environment)
    python = environment / "bin" / "python"
    pip(f"--python={python}", "install", "--no-deps", str(wheel))
    packages = environment / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    # The libraries of this environment; not what its own .pth files add, such as the checkout.
    # Modules that are None cannot be imported: nothing of an extra can.
    (packages / "libraries.pth").write_text(
        f"{sysconfig.get_path('purelib')}\n"
        f"import sys; sys.modules.update(dict.fromkeys({list(EXTRAS)}))\n"
    )
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments, program="fmbseg"):
        command = [environment / "bin" / program, *map(str, arguments)]
        result = subprocess.run(
            command, cwd=here, env=clean | {"XLA_FLAGS": ""}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert "Traceback" not in result.stdout, result.stdout
        return result.stdout

    place = run("-c", "import fmbseg_jax; print(fmbseg_jax.__file__)", program="python")
    assert place.strip() == str(packages / "fmbseg_jax" / "__init__.py")
    return run


def test_the_wheel_holds_the_package_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    parts = {name.split("/")[0] for name in names}
    assert parts == {"fmbseg_jax", "labelling", f"fmbseg_jax-{fmbseg_jax.__version__}.dist-info"}
    code = {name for name in names if ".dist-info/" not in name}
    assert {Path(name).suffix for name in code} == {".py", ".txt", ".typed"}
    for folder in ("fmbseg_jax", "labelling"):
        source = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")}
        shipped = {f"fmbseg_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
        ours = {name for name in code if name.startswith(folder) and name.endswith(".py")}
        assert ours - shipped == source
    assert shipped <= code
    assert wheel.stat().st_size < 1e6


def test_the_programs_run_where_only_the_package_is(installed, world, tmp_path):
    assert "segment any image by any words" in installed()
    assert installed("--version") == f"{fmbseg_jax.__version__}\n"
    assert "fmbseg label --config=" in installed("label", "--help")
    world.pseudo_labels(tmp_path, 5)
    flags = ["--config=configs/toy.py", *world.flags[1:], f"--workdir={tmp_path}"]
    installed("features", *flags)
    assert "The aligner is in" in installed("train", *flags, "--config.train.epochs=1")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (70, 70), "green").save(tmp_path / "photos" / "a.png")
    given = {"model": "export", "images": "photos", "out": "segmented"}
    folders = [f"--{name}={tmp_path / folder}" for name, folder in given.items()]
    assert "PyTorch" not in installed("segment", *folders, "--words=sky,grass")
    assert (tmp_path / "segmented" / "labels" / "a.png").exists()
    output = installed("label", *flags, folders[1], "--words=sky")
    assert 'error: torch is not installed. This needs: pip install -e ".[label]"' in output


def test_every_shipped_config_is_found_where_only_the_package_is(installed):
    flags = [f"--config=configs/{path.name}" for path in sorted((ROOT / "configs").glob("*.py"))]
    code = f"from fmbseg_jax.config.files import resolve; print(*resolve({flags}), sep='\\n')"
    found = installed("-c", code, program="python").splitlines()
    assert len(found) == len(flags) >= 4
    for given, path in zip(flags, found, strict=True):
        assert path.endswith(f"site-packages/fmbseg_jax/configs/{given.split('/')[1]}")


def requirements(file):
    lines = [line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    return [line for line in lines if line]


def name(requirement):
    return re.match(r"[\w-]+", requirement)[0].lower()


def test_requirements_have_the_ranges_of_the_package():
    pinned, extras = requirements("requirements.txt"), PROJECT["optional-dependencies"]
    assert sorted(pinned) == sorted([*PROJECT["dependencies"], *extras["label"]])
    assert len({name(line) for line in pinned}) == len(pinned)
    develop = requirements("requirements-dev.txt")
    assert {*extras["app"], *extras["ray"]} <= set(develop)
    jax = next(line for line in pinned if name(line) == "jax")
    for extra, kind in {"cuda": "cuda13", "cuda12": "cuda12", "tpu": "tpu"}.items():
        assert extras[extra] == [jax.replace("jax", f"jax[{kind}]")]
    assert set(EXTRAS.values()) <= set(extras)


def locked():
    """Every pin of requirements.lock, with its hashes."""
    text = re.sub(r"^ *#.*\n", "", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)
    for pin in re.sub(r" *\\\n *", " ", text).splitlines():
        requirement, *hashes = pin.split(" --hash=")
        yield Requirement(requirement), hashes


ENVIRONMENTS = [
    {"python_version": version, "python_full_version": f"{version}.0", "sys_platform": system,
     "platform_system": {"linux": "Linux", "darwin": "Darwin"}[system]}
    for version in ("3.11", "3.12") for system in ("linux", "darwin")
]  # fmt: skip


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda e: " ".join(e.values()))
def test_the_lock_is_within_the_ranges(environment):
    """Of one version each, wherever this runs: `make lock` makes it anew."""
    pins = {}
    for requirement, _ in locked():
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert requirement.name not in pins
            pins[requirement.name] = str(requirement.specifier).removeprefix("==")
    for line in requirements("requirements.txt"):
        wanted = Requirement(line)
        version = pins[wanted.name.lower().replace("_", "-")]
        assert wanted.specifier.contains(version), f"{line}, but {version} in requirements.lock"


def test_the_lock_has_hashes_and_no_place_of_its_own():
    """Every line is a version, its hashes or a comment: no index or file that others lack."""
    pins = list(locked())
    assert len(pins) > len(requirements("requirements.txt"))
    for requirement, hashes in pins:
        assert re.fullmatch(r"==[\w.!+]+", str(requirement.specifier)), requirement
        assert requirement.url is None and hashes
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", one) for one in hashes), requirement
    assert not re.search(r"index|://|file:|find-links", (ROOT / "requirements.lock").read_text())


def test_the_base_has_no_torch():
    assert not {"torch", "torchvision", "segment-anything"} & set(
        map(name, PROJECT["dependencies"])
    )
    everything = sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"])
    assert "torchvision" not in map(name, everything)
