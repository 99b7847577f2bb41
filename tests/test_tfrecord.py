"""TFRecord shards: read back, damage named, written atomically."""

import os
import pickle
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest

from fmbseg_jax.data import example, label_maps
from fmbseg_jax.data.tfrecord import RecordError, RecordSource, ShardWriter, find_shards, shard_name
from fmbseg_jax.errors import UserError
from fmbseg_jax.runs import workfolder
from fmbseg_jax.vocabulary import IGNORE


def write(folder, index=0, count=1, records=(b"one", b"", b"three" * 100)):
    path = folder / shard_name("toy", "train", index, count)
    with ShardWriter(path) as writer:
        for record in records:
            writer.write(record)
    return path


def test_records_come_back_in_order(tmp_path):
    for i in range(3):
        write(tmp_path, i, 3, [b"%d-%d" % (i, j) for j in range(i + 1)])
    source = RecordSource(find_shards(tmp_path))
    expected = [b"0-0", b"1-0", b"1-1", b"2-0", b"2-1", b"2-2"]
    assert list(source) == expected
    assert list(pickle.loads(pickle.dumps(source))) == expected
    with pytest.raises(IndexError):
        source[6]


def test_the_format_is_tensorflows(tmp_path):
    """The bytes of a record of b"abc", by TensorFlow's record_writer.h."""
    from google_crc32c import value

    def masked(data):
        crc = value(data)
        return ((crc >> 15) | (crc << 17) & 0xFFFFFFFF) + 0xA282EAD8 & 0xFFFFFFFF

    length = struct.pack("<Q", 3)
    expected = (
        length + struct.pack("<I", masked(length)) + b"abc" + struct.pack("<I", masked(b"abc"))
    )
    assert write(tmp_path, records=[b"abc"]).read_bytes() == expected


@pytest.mark.parametrize("where", ["length", "data", "crc"])
def test_a_flipped_bit_is_found(tmp_path, where):
    path = write(tmp_path)
    second = 12 + 3 + 4  # where record 1 starts; its data is empty, record 2 follows
    position = {"length": second, "data": second + 16 + 12 + 50, "crc": second + 12}[where]
    record = {"length": 1, "data": 2, "crc": 1}[where]
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(RecordError, match=rf"00000-of-00001: record {record} is damaged"):
        list(RecordSource([path]))


@pytest.mark.parametrize("kept", [5, 19 + 3, -1])
def test_a_truncated_shard_is_found(tmp_path, kept):
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    record = {5: 0, 22: 1, -1: 2}[kept]
    with pytest.raises(RecordError, match=rf"00000-of-00001: record {record} is damaged: the file"):
        RecordSource([path])


def test_missing_shards_are_named(tmp_path):
    with pytest.raises(RecordError, match="No TFRecord shards"):
        find_shards(tmp_path)
    for i in (0, 2):
        write(tmp_path, i, 4)
    with pytest.raises(
        RecordError, match=r"lacks 2 of 4 shards: .*00001-of-00004, .*00003-of-00004"
    ):
        find_shards(tmp_path)
    write(tmp_path, 0, 2)
    with pytest.raises(RecordError, match="several datasets"):
        find_shards(tmp_path)
    with pytest.raises(RecordError, match="Cannot read .*gone"):
        RecordSource([tmp_path / "gone"])


def test_a_shard_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / shard_name("toy", "train", 0, 1)
    with pytest.raises(ZeroDivisionError), ShardWriter(path) as writer:
        writer.write(b"one")
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_a_killed_writer_leaves_no_shard(tmp_path):
    path = tmp_path / shard_name("toy", "train", 0, 1)
    code = (
        "import sys, time; from fmbseg_jax.data.tfrecord import ShardWriter\n"
        "with ShardWriter(sys.argv[1]) as writer:\n"
        "    writer.write(b'x' * 100000); writer._file.flush(); print('go', flush=True)\n"
        "    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"go\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not path.exists()
    with workfolder.hold(tmp_path):  # the next run removes what was left
        write(tmp_path)
    assert [file.name for file in tmp_path.iterdir() if file.name != ".lock"] == [path.name]
    assert len(RecordSource(find_shards(tmp_path))) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_loses_nothing(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]).returncode:
        pytest.skip("no permission to mount a tmpfs")
    try:
        write(tmp_path, 0, 2)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path, 1, 2, [b"x" * 100_000] * 20)
        assert [file.name for file in tmp_path.iterdir()] == [shard_name("toy", "train", 0, 2)]
        assert len(RecordSource([next(tmp_path.iterdir())])) == 3
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def pseudo_label():
    labels = np.arange(12, dtype=np.uint16).reshape(3, 4)
    labels[0, 0] = IGNORE
    return example.PseudoLabel(
        image=b"\xff\xd8 bytes",
        filename="a/ü.jpg",
        labels=labels,
        found=np.asarray([3, 700], np.uint16),
        votes=np.asarray([5, -1], np.int32),
        mask_words=np.asarray([3], np.uint16),
        mask_scores=np.asarray([0.9], np.float32),
        mask_stages=np.asarray([11], np.uint8),
        points=np.asarray([[1.5, 2.5]], np.float32),
        point_words=np.asarray([3], np.uint16),
    )


def patch_features():
    return example.PatchFeatures(
        patches=np.random.default_rng(0).normal(size=(6, 5)).astype(np.float16),
        labels=np.asarray([0, 1, 2, IGNORE, 4, 5], np.uint16),
        grid=np.asarray([2, 3], np.int32),
        filename="b.png",
    )


def equal(a, b):
    for name, value in vars(a).items():
        other = getattr(b, name)
        if isinstance(value, np.ndarray):
            assert value.dtype == other.dtype
            np.testing.assert_array_equal(value, other)
        else:
            assert value == other


def test_examples_come_back():
    label, features = pseudo_label(), patch_features()
    equal(label, example.decode_pseudo_label(example.encode(label)))
    equal(features, example.decode_patch_features(example.encode(features)))
    bare = example.PseudoLabel(b"x", "c.png", np.zeros((2, 2), np.uint16))
    equal(bare, example.decode_pseudo_label(example.encode(bare)))


def test_a_dataset_folder_opens_in_tfds(tmp_path):
    import tensorflow_datasets as tfds

    with pytest.raises(UserError, match="no finished dataset"):
        example.read_metadata(tmp_path)
    path = tmp_path / shard_name("pseudo_labels", "train", 0, 1)
    with ShardWriter(path) as writer:
        writer.write(example.encode(pseudo_label()))
    example.write_metadata(tmp_path, example.PseudoLabel, [1], 100, {"words": ["sky", "grass"]})
    assert example.read_metadata(tmp_path) == {"words": ["sky", "grass"], "config": {}}
    builder = tfds.builder_from_directory(str(tmp_path))
    assert builder.info.splits["train"].num_examples == 1
    assert set(builder.info.splits["train"].filenames) == {path.name}
    read = builder.info.features.deserialize_example_np(RecordSource(find_shards(tmp_path))[0])
    assert read["filename"].decode() == "a/ü.jpg"
    assert not list(tmp_path.glob(".metadata*"))


def own_features(**changes):
    arrays = {
        "patches": np.ones((6, 3), np.float16),
        "labels": np.zeros(6, np.uint16),
        "grid": np.array([2, 3], np.int32),
    }
    return example.PatchFeatures(**(arrays | changes), filename="a.jpg")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"patches": np.ones((6, 3))}, r"a.jpg hold patches float64\[6, 3\], expected float16"),
        ({"labels": np.zeros(5, np.uint16)}, r"labels uint16\[5\], expected uint16\[6\]"),
        ({"grid": np.array([2, 2], np.int32)}, r"a grid of \[2, 2\] with 6 patches"),
        ({"patches": np.full((6, 3), np.inf, np.float16)}, "infinite or NaN"),
    ],
)
def test_features_that_are_not_what_they_say(wrong, message):
    assert example.encode(own_features())
    with pytest.raises(UserError, match=message):
        example.encode(own_features(**wrong))
    with pytest.raises(UserError, match=message):
        example.encode(example.quantise(own_features(**wrong)))


def test_features_without_their_encoder(tmp_path):
    with pytest.raises(UserError, match='needs "vision"'):
        example.write_metadata(tmp_path, example.PatchFeatures, [0], 0, {"words": ["sky"]})


@pytest.mark.tensorflow
def test_tensorflow_reads_what_is_written(tmp_path):
    """As tf.data, through tensorflow-datasets: every field of both kinds of record."""
    import tensorflow_datasets as tfds

    vision = {"source": "a", "hash": "b"}
    for example_, folder in ((pseudo_label(), "labels"), (own_features(), "features")):
        kind = type(example_)
        (tmp_path / folder).mkdir()
        name = shard_name(example.dataset_name(kind), "train", 0, 1)
        with ShardWriter(tmp_path / folder / name) as writer:
            writer.write(example.encode(example_))
        metadata = {"words": ["sky"], "vision": vision}
        example.write_metadata(tmp_path / folder, kind, [1], 100, metadata)
        dataset = tfds.builder_from_directory(str(tmp_path / folder)).as_dataset(split="train")
        (read,) = dataset.as_numpy_iterator()
        for field, value in read.items():
            expected = getattr(example_, field)
            if field == "filename":
                assert value.decode() == expected
            elif kind is example.PseudoLabel and field == "labels":
                np.testing.assert_array_equal(label_maps.decode(value, ""), expected)
            else:
                np.testing.assert_array_equal(value, expected)
