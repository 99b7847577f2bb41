"""Files that were damaged in any way: refused by their names, or made again; never misread.

Where a value was changed to another that is as good (a word to another word, a count to another
count), nobody can tell; then it is taken, and has to be of the form that programs rely on.
"""

import dataclasses
import io
import json
import os
import random
import struct
import zlib

import numpy as np
import pytest
from mutations import mutations
from PIL import Image

from fmbseg_jax import config as config_lib
from fmbseg_jax import features
from fmbseg_jax.data import example, images, label_maps, records, sources
from fmbseg_jax.data.tfrecord import RecordError, RecordSource, ShardWriter, shard_name
from fmbseg_jax.datasets import coco
from fmbseg_jax.encoders import loading
from fmbseg_jax.encoders.text_features import TextFeatures
from fmbseg_jax.errors import UserError
from fmbseg_jax.evaluation import report, scoring
from fmbseg_jax.io import texts
from fmbseg_jax.pretrained import hub, tokenizer
from fmbseg_jax.runs import workfolder
from fmbseg_jax.sharing import model_json
from fmbseg_jax.training import log as logs
from fmbseg_jax.vocabulary import IGNORE, read_templates, read_words
from labelling.detection import read_image_labels
from labelling.shards.dataset import Dataset, ImageFiles

SEED, COUNT = 0, 25 * int(os.environ.get("ATTACK", "1"))  # of each file


class WorkFolderConfig:
    """config.json."""

    def __init__(self, folder):
        (folder / "features").mkdir()
        (folder / "features" / "a.tfrecord-00000-of-00001").touch()
        self.folder, self.file = folder, folder / "config.json"
        self.use()

    def use(self):
        workfolder.claim(self.folder, config_lib.Config(), ("features",), "features/*.tfrecord-*")


class Manifest:
    """What `remember` writes."""

    facts = {"images": ["a.jpg", "b.jpg"], "words": ["sky"], "threshold": None, "nested": {"a": 1}}

    def __init__(self, folder):
        self.file = folder / "manifest.json"
        self.use()

    def use(self):
        workfolder.remember(self.file, self.facts, "Put it back.")
        return json.loads(self.file.read_text()) == self.facts


class MadeFrom:
    """What a shard of features was made from."""

    def __init__(self, folder):
        self.file = folder / "00000.json"
        self.file.write_text('{"labels": "f1", "vision": "a0", "size": 448}')

    def use(self):
        assert isinstance(features._made_from(self.file).get("vision", ""), str)


class Description:
    """A finished dataset."""

    name = ""

    def __init__(self, folder):
        write_features(folder)
        self.folder, self.file = folder, folder / self.name

    def use(self):
        assert all(isinstance(word, str) for word in example.read_metadata(self.folder)["words"])
        assert len(records.open_records(self.folder)) == 3
        assert example.kept_as(self.folder) in ("float16", "int8")


class DatasetInfo(Description):
    name = "dataset_info.json"


class Features(Description):
    name = "features.json"


class Metadata(Description):
    name = "metadata.json"


class Labelled:
    """Pseudo labels whose images are still there."""

    name = ""

    def __init__(self, folder):
        for name in ("a.png", "b.png"):
            Image.new("RGB", (4, 3)).save(folder / name)
        self.data = config_lib.Data(images=str(folder))
        self.folder, self.images = folder, ["a.png", "b.png"]
        self.open().write(0, self.labels)
        self.file = folder / "out" / "progress" / self.name
        assert self.open().missing() == []

    def open(self):
        dataset = Dataset(self.folder / "out", self.images, 2, ImageFiles(self.data))
        dataset.open({"words": ["sky"]})
        return dataset

    def labels(self, names):
        for name in names:
            labels = np.zeros((3, 4), np.uint16)
            yield example.PseudoLabel((self.folder / name).read_bytes(), name, labels)

    def use(self):
        """It is whole, or made again."""
        for shard in self.open().missing():
            self.open().write(shard, self.labels)
        whole = self.open()
        assert whole.missing() == []
        counts = whole.counts()
        assert (counts.images, counts.records, counts.skipped) == (2, 2, [])
        assert whole.num_shards == 1 and counts.images_by_word(["sky"])["sky"] >= 0


class ShardCounts(Labelled):
    name = "00000.json"


class ShardSources(Labelled):
    name = "00000.sources.json"


class LabelledManifest(Labelled):
    name = "manifest.json"


class TrainLog:
    """metrics/train.jsonl."""

    def __init__(self, folder):
        self.folder, self.file = folder, folder / "train.jsonl"
        lines = [json.dumps({"step": step, "loss": 1.5}) for step in (10, 20, 30)]
        self.file.write_text("".join(f"{line}\n" for line in lines))

    def use(self):
        before = self.file.read_bytes()
        with logs.MetricsLog(self.folder, 20) as log:
            log.write(30, {"loss": 2.0})
        steps = [json.loads(line)["step"] for line in self.file.read_text().splitlines()]
        assert all(step <= 20 for step in steps[:-1]) and steps[-1] == 30
        copy = self.folder / "train.jsonl.damaged"
        if copy.exists():
            assert copy.read_bytes() == before
            copy.unlink()


class Evaluated:
    """evaluation/NAME.json."""

    def __init__(self, folder):
        self.folder, self.file = folder, folder / "test.json"
        found = {"miou": 0.5, "coverage": 1.0, "images": 60}
        facts = {
            "paper": 16.25, "whole": True, "protocol": ["As always."], "models": {},
            "systems": {"aligner": found, "aligner + PAMR": found},
            "truth": {"void": 0.1, "absent": ["sky"]},
        }  # fmt: skip
        self.file.write_text(json.dumps(facts))

    def use(self):
        report.write_markdown(self.folder)
        assert isinstance(report.as_text(report.rows(self.folder, "test")), str)


class Tallied:
    """evaluation/counts/NAME/SYSTEM.0.jsonl."""

    def __init__(self, folder):
        self.folder, self.file = folder, folder / "aligner.0.jsonl"
        tally = scoring.Tally(folder, "aligner", "a model", 3)
        for name in ("a.png", "b.png"):
            tally.add(name, scoring.Counts(np.asarray([0, 5]), np.asarray([7, 2]), 1))

    def use(self):
        found = scoring.Tally(self.folder, "aligner", "a model", 3).found
        for counts in found.values():
            assert counts.confusion(3).shape == (3, 4) and counts.void >= 0
            assert counts.confusion(3).min() >= 0 and counts.confusion(3).sum() > 0


class SourcesFile:
    """made_from.jsonl."""

    def __init__(self, folder):
        self.image, self.file = folder / "a.png", folder / "made_from.jsonl"
        self.image.write_bytes(b"image")
        made = sources.Sources(self.file)
        for name in ("a", "b"):
            made.add(name, sources.state(self.image))

    def use(self):
        for name in ("a", "b"):
            current = sources.Sources(self.file).is_current(name, self.image)
            lines = texts.parse_lines(self.file.read_bytes(), object)
            assert current == ([name, sources.state(self.image)] in list(lines))


class ModelFacts:
    """export/model.json."""

    def __init__(self, folder):
        (folder / "params").mkdir()
        (folder / "params" / "a").write_bytes(b"a")
        self.folder, self.file = folder, folder / "model.json"
        encoder = {"source": "somewhere", "hash": "0"}
        facts = {
            "aligner": {"kind": "mlp", "output": 8, "mlp_ratio": 2, "heads": 4},
            "vision": encoder, "clip": encoder, "words": ["sky"], "images": 3,
            "config": {"eval.short_side": 448}, "params": {"files": {"a": 1}, "hash": "0"},
        }  # fmt: skip
        self.file.write_text(json.dumps(facts))

    def use(self):
        model = model_json.read_model(self.folder)
        assert all(isinstance(model[name]["source"], str) for name in ("vision", "clip"))
        assert model["aligner"]["output"] > 0 and isinstance(model["config"], dict)


class Model:
    """What lies beside the weights of a published model."""

    name = ""

    def __init__(self, folder):
        from models import save_tokenizer

        size = save_tokenizer(folder)
        tower = {
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
            "intermediate_size": 64, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
        }  # fmt: skip
        text = tower | {"vocab_size": size, "max_position_embeddings": 77}
        vision = tower | {"image_size": 32, "patch_size": 8}
        config = {"model_type": "clip", "projection_dim": 24}
        config |= {"text_config": text, "vision_config": vision}
        (folder / "config.json").write_text(json.dumps(config))
        pixels = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.2, 0.2]}
        (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": pixels}))
        words = json.loads((folder / "vocab.json").read_text())
        added = [{"content": "<|startoftext|>", "id": words["<|startoftext|>"]}]
        merges = ["h i</w>"]
        whole = {"added_tokens": added, "model": {"vocab": words | {"hi</w>": 600}}}
        whole["model"]["merges"] = merges
        if self.name == "tokenizer.json":
            (folder / self.name).write_text(json.dumps(whole))
        self.folder, self.file = folder, folder / self.name

    def use(self):
        text, _ = loading.text_tower(self.folder, str(self.folder))
        image, _ = loading.clip_vision_tower(self.folder, str(self.folder))
        for size in (text.vocabulary, text.length, text.output, image.patch, image.grid):
            assert type(size) is int and size > 0
        assert len(tokenizer.digest(self.folder)) == 64


class ModelConfig(Model):
    name = "config.json"


class Processor(Model):
    name = "processor_config.json"


class Preprocessor(Model):
    name = "preprocessor_config.json"

    def __init__(self, folder):
        super().__init__(folder)
        (folder / "processor_config.json").unlink()


class TokenizerFile(Model):
    name = "tokenizer.json"


class Vocabulary(Model):
    name = "vocab.json"


class Merges(Model):
    name = "merges.txt"


class TokenizerSettings(Model):
    name = "tokenizer_config.json"


class WeightIndex:
    """The parts of a large model."""

    def __init__(self, folder):
        self.folder, self.file = folder, folder / "model.safetensors.index.json"
        (folder / "a.safetensors").touch()
        self.file.write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))

    def use(self):
        assert hub.weight_files(self.folder) == [self.folder / "a.safetensors"]


class Panoptic:
    """COCO's panoptic JSON."""

    def __init__(self, folder):
        self.png, self.file = folder / "0.png", folder / "panoptic.json"
        Image.new("RGB", (4, 3), (7, 0, 0)).save(self.png)
        segments = [{"id": 7, "category_id": 92}]
        one = {"file_name": "0.png", "segments_info": segments}
        self.file.write_text(json.dumps({"annotations": [one]}))

    def use(self):
        coco._segments.cache_clear()
        assert coco.read_panoptic(self.png, self.file).shape == (3, 4)


class Words:
    """A word list."""

    def __init__(self, folder):
        self.file = folder / "words.txt"
        self.file.write_text("sky\ngrass;meadow\nün mot\nsail boat\n")

    def use(self):
        assert all(word and "\0" not in word for word in read_words(self.file))


class Templates:
    """A file of templates."""

    def __init__(self, folder):
        self.file = folder / "templates"
        self.file.write_text("a photo of a {}.\nune photo à {}\n")

    def use(self):
        assert all(isinstance(line, str) for line in read_templates(str(self.file)))


class ImageLabels:
    """Image-level labels."""

    def __init__(self, folder):
        self.file = folder / "labels.tsv"
        self.file.write_text("a.jpg\tsky,grass\nb.jpg\t\n")

    def use(self):
        found = read_image_labels(self.file, ["sky", "grass"], ["a.jpg", "b.jpg"])
        assert set(found) <= {"a.jpg", "b.jpg"}


FILES = [
    WorkFolderConfig, Manifest, MadeFrom, DatasetInfo, Features, Metadata, ShardCounts,
    ShardSources, LabelledManifest, TrainLog, Evaluated, Tallied, SourcesFile, ModelFacts,
    ModelConfig, Processor, Preprocessor, TokenizerFile, Vocabulary, Merges, TokenizerSettings,
    WeightIndex, Panoptic, Words, Templates, ImageLabels,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::fmbseg_jax.errors.Notice")
@pytest.mark.parametrize("kind", FILES, ids=lambda kind: kind.__name__)
def test_any_damage(kind, tmp_path):
    subject = kind(tmp_path)
    whole = subject.file.read_bytes()
    subject.use()
    for damaged in mutations(whole, random.Random(SEED), COUNT):
        subject.file.write_bytes(damaged)
        try:
            subject.use()
        except UserError as error:
            message = str(error)
            assert str(tmp_path) in message and "Traceback" not in message, message
        except Exception as error:
            pytest.fail(f"{type(error).__name__}: {error} of {damaged[:300]!r}")


RECORDS = 6 * COUNT  # of each kind


def pseudo_label():
    png = io.BytesIO()
    Image.fromarray(np.arange(36, dtype=np.uint8).reshape(3, 4, 3)).save(png, "PNG")
    return example.PseudoLabel(
        png.getvalue(), "1.png", np.asarray([[0, 1, IGNORE, 1]] * 3, np.uint16),
        np.asarray([0, 1], np.uint16), np.asarray([3, -1], np.int32), np.zeros(1, np.uint16),
        np.ones(1, np.float32), np.full(1, 11, np.uint8), np.ones((1, 2), np.float32),
        np.zeros(1, np.uint16),
    )  # fmt: skip


def features_of(name, int8=False):
    whole = example.PatchFeatures(
        np.arange(1, 13, dtype=np.float16).reshape(4, 3), np.asarray([0, 1, IGNORE, 1], np.uint16),
        np.asarray([2, 2], np.int32), name,
    )  # fmt: skip
    return example.quantise(whole) if int8 else whole


def write_shard(folder, record):
    """A shard of three records, of which the second may be any bytes, with a CRC."""
    path = folder / shard_name("pseudo_labels", "train", 0, 1)
    with ShardWriter(path) as writer:
        for one in (b"", record, b""):
            writer.write(one)
    return path


def read_label(source):
    label = example.read_pseudo_label(source, 1, 2)
    image = label_maps.image_of(label.labels, label.image, label.filename, images.USUAL)
    assert image.shape == (*label.labels.shape, 3) and image.dtype == np.uint8
    assert label.labels.dtype == np.uint16 and len(label.found) == len(label.votes)
    assert len(label.mask_words) == len(label.mask_scores) == len(label.mask_stages)
    assert label.points.shape == (len(label.point_words), 2)
    return label.labels


def read_patches(source, kept_as="float16"):
    features = example.read_patch_features(source, 1, kept_as, 2)
    assert features.patches.dtype == np.float16 and features.patches.ndim == 2
    assert features.labels.shape == (len(features.patches),) == (features.grid.prod(),)
    return features.labels


def read_int8(source):
    return read_patches(source, "int8")


@pytest.mark.filterwarnings("ignore:overflow")  # of a scale; training refuses what is infinite
@pytest.mark.parametrize(
    ("record", "read"),
    [(pseudo_label(), read_label), (features_of("1.png"), read_patches),
     (features_of("1.png", int8=True), read_int8)],
    ids=["pseudo label", "features", "int8 features"],
)  # fmt: skip
def test_any_damage_of_a_record_with_a_good_crc(record, read, tmp_path):
    """Refused with shard and number, or read as arrays that fit each other."""
    whole, refused = example.encode(record), 0
    path = write_shard(tmp_path, whole)
    assert read(RecordSource([path])).shape == record.labels.shape
    for damaged in mutations(whole, random.Random(SEED), RECORDS):
        source = RecordSource([write_shard(tmp_path, damaged)])
        try:
            labels = read_record(read, source, damaged)
        except RecordError as error:
            refused += 1
            assert str(error).startswith(f"{path}, record 1: "), error
        else:
            assert np.all((labels < 2) | (labels == IGNORE))
    assert refused > RECORDS // 3


def read_record(read, source, damaged):
    """What `read` gives within the place of the record, as programs ask for it."""
    try:
        with source.naming(1):
            return read(source)
    except UserError:
        raise
    except Exception as error:
        pytest.fail(f"{type(error).__name__}: {error} of {damaged[:300]!r}")


def changed(example_, **fields):
    return example.encode(dataclasses.replace(example_, **fields))


def photograph(height, width):
    data = io.BytesIO()
    Image.new("RGB", (width, height)).save(data, "JPEG")
    return data.getvalue()


@pytest.mark.parametrize(
    ("record", "read", "message"),
    [
        (b"", read_label, "It is no PseudoLabel"),
        (changed(pseudo_label(), image=b"\xff\xd8\xff broken"), read_label, "1.png cannot be read"),
        (changed(pseudo_label(), image=photograph(4, 3)), read_label, "4 × 3 pixels, its image"),
        (changed(pseudo_label(), image=photograph(6, 8)), read_label, "its image 1.png 8 × 6"),
        (
            changed(pseudo_label(), labels=np.full((3, 4), 2, np.uint16)), read_label,
            "has word index 2; there are 2 words",
        ),
        (
            changed(pseudo_label(), votes=np.zeros(3, np.int32)), read_label,
            "found, votes of 1.png have different lengths",
        ),
        (example.encode(features_of("1.png")), read_label, "It is no PseudoLabel"),
        (example.encode(features_of("1.png")), read_int8, "It is no Int8PatchFeatures"),
        (
            example.encode(features_of("1.png", int8=True)), read_patches,
            "(It is no PatchFeatures|hold patches|expected)",
        ),
        (example.encode(pseudo_label()), read_patches, "It is no PatchFeatures"),
    ],
)  # fmt: skip
def test_a_record_of_something_else(record, read, message, tmp_path):
    path = write_shard(tmp_path, record)
    source = RecordSource([path])
    with pytest.raises(RecordError, match=message) as raised, source.naming(1):
        read(source)
    assert str(raised.value).startswith(f"{path}, record 1: ")


def test_a_label_map_that_claims_more_than_its_bytes_hold():
    """Before memory is asked for."""
    png = bytearray(label_maps.encode(np.zeros((3, 4), np.uint16)))
    png[16:24] = struct.pack(">II", 59_000, 59_000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    with pytest.raises(UserError, match="59000 × 59000 pixels, which its .* bytes cannot hold"):
        label_maps.decode(bytes(png), "a.png", 10**10)
    with pytest.raises(UserError, match="59000 × 59000 pixels, more than the 178,000,000"):
        label_maps.decode(bytes(png), "a.png")
    large = label_maps.encode(np.zeros((4000, 5000), np.uint16))  # packed as far as it goes
    assert label_maps.decode(large, "a.png").shape == (4000, 5000)


def write_features(folder):
    name = shard_name("patch_features", "train", 0, 1)
    with ShardWriter(folder / name) as writer:
        for i in range(3):
            writer.write(example.encode(features_of(f"{i}.png")))
    vision = {"source": "somewhere", "hash": "0"}
    metadata = {"words": ["sky"], "vision": vision, "config": {"seed": 0}, "deep": [0, ""]}
    example.write_metadata(folder, example.PatchFeatures, [3], 1, metadata)


def test_damaged_features_of_sentences(world, tmp_path, monkeypatch):
    """Whatever their bytes are, they are made again."""
    monkeypatch.setenv("FMBSEG_CACHE", str(tmp_path))
    first = TextFeatures(str(world.root / "clip"))
    right = first(["sky"])
    (path,) = tmp_path.rglob("*.feature")
    whole = path.read_bytes()
    for damaged in mutations(whole, random.Random(SEED), 60):
        path.write_bytes(damaged)
        again = TextFeatures(str(world.root / "clip"))
        again._tower = first._tower
        np.testing.assert_array_equal(again(["sky"]), right)
        assert path.read_bytes() == whole
