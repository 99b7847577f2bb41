"""Errors of the machine: told as what they are, with the file and what to do; never as damage."""

import errno
import json
import os
import resource

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import run
from models import save_aligner

import fmbseg_jax
from fmbseg_jax import config as config_lib
from fmbseg_jax.config.files import resolve
from fmbseg_jax.data import images, label_maps, tfrecord
from fmbseg_jax.datasets import folder as benchmarks
from fmbseg_jax.errors import UserError
from fmbseg_jax.io import appending, files, machine, texts
from fmbseg_jax.pretrained import weights
from fmbseg_jax.runs import workfolder
from fmbseg_jax.sharing import exports
from fmbseg_jax.training import batches as pipeline
from fmbseg_jax.training import log as logs
from fmbseg_jax.training.checkpoint import Checkpoints
from fmbseg_jax.vocabulary import parse_words, read_templates
from labelling.detection import read_image_labels

FULL = (
    'RESOURCE_EXHAUSTED: Error writing local file "/w/d/1": No space left on device [OS error 28]'
)
TOLD = [
    (MemoryError("Unable to allocate 3 GiB"), MemoryError, 0),
    (OSError(errno.EMFILE, "Too many open files", "a"), OSError, errno.EMFILE),
    (PermissionError(errno.EACCES, "Permission denied", "a"), OSError, errno.EACCES),
    (OSError(errno.EIO, "Input/output error"), OSError, errno.EIO),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes."), MemoryError, 0),
    (RuntimeError("can't start new thread"), MemoryError, 0),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), MemoryError, 0),
    (ValueError(FULL), OSError, errno.ENOSPC),
    (Exception("I/O error: Too many open files (os error 24)"), OSError, errno.EMFILE),
    (ImportError("libx.so: failed to map: Cannot allocate memory"), MemoryError, 0),
    (OSError("out of memory error when reading image file"), MemoryError, 0),
]
OTHERS = [
    ValueError("bad magic"),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "a"),
    PermissionError(errno.EPERM, "Operation not permitted"),  # of a connection
    OSError("image file is truncated"),
    KeyError("memory"),
]


@pytest.mark.parametrize(("error", "kind", "code"), TOLD, ids=lambda value: str(value)[:30])
def test_what_tells_of_the_machine(error, kind, code):
    found = machine.error_of(error)
    assert isinstance(found, kind) and (not code or found.errno == code)
    outer = ValueError("The data are damaged.")
    outer.__cause__ = error
    assert type(machine.error_of(outer)) is type(found)
    if code != errno.EACCES:
        with pytest.raises(kind, match="the file"):
            machine.let_through(OSError(code, "x") if code else error, "the file", by_words=True)


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_what_does_not(error):
    assert machine.error_of(error) is None
    machine.let_through(error)
    try:
        try:
            raise MemoryError
        except MemoryError:
            raise error from None
    except Exception as raised:
        assert machine.error_of(raised) is None


def test_a_path_in_the_words_of_a_library():
    assert str(machine.error_of(ValueError(FULL))) == "[Errno 28] No space left on device: '/w/d/1'"


@pytest.fixture(scope="module")
def export(world, tmp_path_factory):
    return save_aligner(tmp_path_factory.mktemp("machine") / "export", world.root)


def shortage(*arguments, **more):
    raise ValueError("Error opening: Too many open files [OS error 24: EMFILE]")


def test_an_export_that_cannot_be_opened_is_not_damaged(export, monkeypatch):
    monkeypatch.setattr(exports.ocp.StandardCheckpointer, "restore", shortage)
    with pytest.raises(OSError, match="Too many open files") as raised:
        fmbseg_jax.load(export)
    assert raised.value.errno == errno.EMFILE and raised.value.filename == str(export / "params")


def test_a_checkpoint_that_cannot_be_opened_stays(tmp_path, monkeypatch):
    state = {"w": np.ones((2, 3), np.float32)}
    batches = pipeline.TrainBatches(
        4, lambda i: {"labels": np.zeros(2, np.int32)}, seed=0, batch_size=2, epochs=1
    )
    iterator = iter(batches)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state, iterator)
    checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr(type(checkpoints._manager), "restore", shortage)
        with pytest.raises(OSError, match="Too many open files"):
            checkpoints.restore(state, batches)
    assert checkpoints.last == 1
    assert not list((tmp_path / "checkpoints").glob("*.damaged"))
    restored, _ = checkpoints.restore(state, batches)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    checkpoints.close()


@pytest.fixture
def no_handles():
    """No file can be opened."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_files_that_cannot_be_opened_are_not_damaged(tmp_path, request):
    with tfrecord.ShardWriter(tmp_path / "a.tfrecord-00000-of-00001") as writer:
        writer.write(b"record")
    shard = writer.path
    safetensors.numpy.save_file({"x": np.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "words.txt").write_text("sky\n")
    workfolder.remember(tmp_path / "manifest.json", {"a": 1}, "Put it back.")
    reads = [
        lambda: tfrecord.RecordSource([shard]),
        lambda: weights.read_files(tmp_path),
        lambda: parse_words(str(tmp_path / "words.txt")),
        lambda: workfolder.remember(tmp_path / "manifest.json", {"a": 1}, "Put it back."),
    ]
    for read in reads:
        read()
    request.getfixturevalue("no_handles")
    for read in reads:
        with pytest.raises(OSError, match="Too many open files") as raised:
            read()
        assert str(tmp_path) in machine.sentence(raised.value)


def test_images_for_which_memory_is_short_are_not_damaged(monkeypatch):
    png = label_maps.encode(np.zeros((3, 4), np.uint16))

    def short(*arguments):
        raise MemoryError

    monkeypatch.setattr(images.opening.Image.Image, "load", short)
    for read in (
        lambda: images.decode(png, name="a.png"),
        lambda: label_maps.decode(png, "a.png"),
    ):
        with pytest.raises(MemoryError, match="a.png"):
            read()


# Errors of paths: the name, and what to do


def too_long(folder):
    files.write_atomically(folder / ("a" * 300), b"")


def below_a_file(folder):
    (folder / "file").touch()
    files.write_atomically(folder / "file" / "a", b"")


def over_a_folder(folder):
    (folder / "a").mkdir()
    appending.append(folder / "a", b"data")


def gone(folder):
    files.write_atomically(folder / "gone" / "a", b"")


def in_a_circle(folder):
    (folder / "a").symlink_to(folder / "a")
    texts.read(folder / "a")


def too_large(folder):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with tfrecord.ShardWriter(folder / "a") as writer:
            writer.write(bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("act", "code", "advice"),
    [
        (too_long, errno.ENAMETOOLONG, "Give shorter names"),
        (below_a_file, errno.ENOTDIR, "Give another path"),
        (over_a_folder, errno.EISDIR, "Move it away"),
        (gone, errno.ENOENT, "Put it back"),
        (in_a_circle, errno.ELOOP, "Remove one of them"),
        (too_large, errno.EFBIG, "ulimit -f"),
    ],
)
def test_errors_of_paths(act, code, advice, tmp_path):
    with pytest.raises(OSError, match=str(tmp_path)) as raised:
        act(tmp_path)
    told = machine.sentence(raised.value)
    assert raised.value.errno == code and str(tmp_path) in told and advice in told
    assert not list(tmp_path.glob("*.incomplete"))


def test_a_bug_keeps_its_traceback():
    for error in (KeyError("a"), ValueError("a"), OSError("a"), ConnectionResetError(104, "reset")):
        assert machine.sentence(error) == ""


def test_programs_say_it_in_a_sentence(world, tmp_path):
    folder = tmp_path / "features" / "metadata.json"
    folder.mkdir(parents=True)
    (tmp_path / "features" / "dataset_info.json").touch()
    result = run("train.py", *world.flags, f"--workdir={tmp_path}", check=False)
    assert result.returncode == 1 and "Traceback" not in result.stdout
    assert f"error: [Errno 21] Is a directory: '{folder}'. This is a folder, and" in result.stdout
    words = tmp_path / "words.txt"
    words.write_bytes("sky\ncaf\xe9\n".encode("latin-1"))
    command = ["fmbseg_jax.segment", f"--words={words}", f"--images={tmp_path}", "--model=a/b"]
    result = run(*command, f"--out={tmp_path / 'out'}", check=False)
    assert result.returncode == 1 and "Traceback" not in result.stdout
    assert f"error: {words} is not UTF-8 text (byte 0xE9 in line 2). Save it as" in result.stdout


def test_a_log_on_a_full_disk(tmp_path, capsys):
    """Lines wait; where there is no room to the end, it says how many are lost."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with logs.MetricsLog(tmp_path, 0) as log:
        log.write(1, {"loss": 1.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        log.write(2, {"loss": 1.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        log.write(3, {"loss": 1.0})
        steps = [json.loads(line)["step"] for line in (tmp_path / "train.jsonl").open()]
        assert steps == [1, 2, 3]
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        log.write(4, {"loss": 1.0})
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    told = capsys.readouterr().err
    assert "File too large. The training goes on" in told
    assert "Its last 1 lines are lost, and nothing else." in told


# Texts of people


LATIN = "sky\ncaf\xe9 {}\n".encode("latin-1")


def split_of_voc(path):
    root = path.parent / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    path.rename(root / "ImageSets" / "Segmentation" / "val.txt")
    benchmarks.open_published("voc20", path.parent)


@pytest.mark.parametrize(
    "read",
    [
        lambda path: parse_words(str(path)),
        lambda path: read_templates(str(path)),
        lambda path: read_image_labels(path, ["sky"], ["a.jpg"]),
        lambda path: resolve(["train", f"--config={path}"]),
        split_of_voc,
    ],
    ids=["words", "templates", "image labels", "config", "split"],
)
def test_texts_in_another_encoding(read, tmp_path):
    path = tmp_path / "text.txt"
    for data, byte in ((LATIN, "0xE9 in line 2"), ("sky\nsea".encode("utf-16"), "0xFF in line 1")):
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"txt is not UTF-8 text \(byte {byte}\). Save it as"):
            read(path)
        if not path.exists():
            return


def test_a_config_that_names_its_encoding(tmp_path):
    """Python files may."""
    path = tmp_path / "config.py"
    source = "# coding: latin-1\n# \xe9\nfrom fmbseg_jax.config import Config as get_config\n"
    path.write_bytes(source.encode("latin-1"))
    resolve(["train", f"--config={path}"])


# Records of a work folder: what to do


def test_a_damaged_config_of_a_work_folder(tmp_path):
    config = config_lib.Config()
    workfolder.claim(tmp_path, config, ("features",), "features/*")
    for damage in (b"", b"null", b"[" * 100_000, b'{"features": 1}', b"\xff\xfe"):
        (tmp_path / "config.json").write_bytes(damage)
        with pytest.raises(UserError, match=r"config.json is damaged: .*Put back a copy of it; or"):
            workfolder.claim(tmp_path, config, ("features",), "features/*")
    (tmp_path / "config.json").unlink()
    workfolder.claim(tmp_path, config, ("features",), "features/*")


def test_damaged_facts(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text('{"words": [1, ["sky"]]}')
    with pytest.raises(UserError, match="1 added .*2 removed"):
        workfolder.remember(path, {"words": ["sky"]}, "Put them back.")
    path.write_text('{"words":')
    advice = (
        "Delete this file, if nothing of that has changed since. If something has: put them back"
    )
    with pytest.raises(UserError, match=f"manifest.json is damaged: it is not JSON .*{advice}"):
        workfolder.remember(path, {"words": ["sky"]}, "Put them back.")
    os.unlink(path)
    workfolder.remember(path, {"words": ["sky"]}, "Put them back.")


@pytest.mark.parametrize(
    ("value", "form", "fault"),
    [
        ({"a": 1}, {"a": int, "b?": str}, ""),
        ({"a": True}, {"a": int}, "a is no integer"),
        ({"a": 1.0}, {"a": int}, "a is no integer"),
        ({"a": 1}, {"a": float}, ""),
        ({"a": float("nan")}, {"a": float}, "a is no number"),
        ({"a": None}, {"a": float | None}, ""),
        ({"a": True}, {"a": float | None}, "a is no float | None"),
        ({"a": 1 << 63}, {"a": int}, "a is no integer"),
        ({}, {"a": int}, "it lacks a"),
        ({"a": {}}, {"a": {"b": int}}, "it lacks a.b"),
        ([["a", [1, 2]]], [(str, [int])], ""),
        ([["a", [1, "2"]]], [(str, [int])], "[0][1][1] is no integer"),
        ([["a"]], [(str, [int])], "[0] is no list of 2"),
        ({"a": "\ud800"}, {str: str}, "a is no text"),
        ({"a\0": 1}, {str: int}, "it is no text"),
        ([], dict, "it is no object"),
    ],
)
def test_forms_of_json(value, form, fault):
    assert texts.fault(value, form) == fault


@pytest.mark.parametrize("name", ["a.ppm", "a.jpg", "a.png"])
@pytest.mark.parametrize("words", [b"bad_alloc", b"RESOURCE_EXHAUSTED"])
def test_words_in_a_picture_are_no_error_of_the_machine(name, words):
    """Pillow quotes what it cannot read; a run over a stranger's pictures would end there."""
    data = b"P6\n" + words + b"xxx 3 255\n"
    with pytest.raises(images.ImageError):
        images.decode(data, images.USUAL, name)
    assert images.size(data, name) == (0, 0) and not images.is_deep(data, name)


@pytest.mark.parametrize("words", ["Permission denied", "No space left on device", "bad_alloc"])
def test_words_in_weights_are_no_error_of_the_machine(words, tmp_path):
    header = json.dumps({"x": {"dtype": words, "shape": [1], "data_offsets": [0, 4]}}).encode()
    data = len(header).to_bytes(8, "little") + header + b"\0" * 4
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        weights.read_files(tmp_path)
