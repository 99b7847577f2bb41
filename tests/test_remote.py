"""Folders in a store: s3://, played by a file system in memory, through the same library."""

import io

import fsspec
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from labelling_tiny import CONFIG, WORDS, picture, run, save_sam
from models import save_clip, save_dinov2
from PIL import Image

from fmbseg_jax import features
from fmbseg_jax.config import Config
from fmbseg_jax.data import example, finding
from fmbseg_jax.data.tfrecord import RecordError, RecordSource, ShardWriter, find_shards
from fmbseg_jax.errors import UserError
from fmbseg_jax.runs import workfolder


class Store(MemoryFileSystem):
    """A bucket: no rename, no folders of their own, nothing visible before it is closed."""

    protocol = ("s3",)
    store: dict = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("s3://", "memory://"))


@pytest.fixture
def store():
    known = _registry.get("s3")
    fsspec.register_implementation("s3", Store, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    Store.store.clear()
    yield Store.store
    backend.fsspec_backend._get_filesystem.cache_clear()
    _registry.pop("s3", None)
    if known:
        fsspec.register_implementation("s3", known)


def put_images(root, count=5):
    filesystem = fsspec.filesystem("s3")
    for i in range(count):
        data = io.BytesIO()
        Image.fromarray(picture(40 + 5 * i, 60, i)).save(data, "PNG")
        filesystem.pipe(f"{root}/{'sub/' * (i % 2)}{i}.png", data.getvalue())


def test_labelling_and_features_in_a_store(store, tmp_path, monkeypatch, capsys):
    """Images read from a store and shards written into one: what comes of local folders."""
    save_clip(tmp_path / "clip")
    save_sam(tmp_path / "sam.pth")
    save_dinov2(tmp_path / "dinov2", width=48, image=70, patch=14)
    (tmp_path / "config.py").write_text(CONFIG.format(tmp_path))
    (tmp_path / "words.txt").write_text("\n".join(WORDS))
    put_images("s3://bucket/images")
    fsspec.filesystem("s3").pipe("s3://bucket/images/sub/broken.png", b"no image")
    for name in finding.find_images("s3://bucket/images"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(fsspec.filesystem("s3").cat(f"s3://bucket/images/{name}"))
    flags = [f"--config={tmp_path}/config.py", "--figures=1"]
    assert run(*flags, f"--workdir={tmp_path}/here") == (0, "")
    there = [*flags, "--images=s3://bucket/images", "--workdir=s3://bucket/work"]
    assert run(*there) == (0, "")
    assert "start no second run" in capsys.readouterr().out
    assert run(*there) == (0, "")
    assert "nothing to label" in capsys.readouterr().out
    local, remote = (
        [path.read_bytes() for path in find_shards(f"{work}/pseudo_labels")]
        for work in (f"{tmp_path}/here", "s3://bucket/work")
    )
    assert local == remote
    for name in ("skipped.tsv", "metadata.json", "progress/manifest.json"):
        assert f"/bucket/work/pseudo_labels/{name}" in store
    assert any(name.startswith("/bucket/work/figures/labelling") for name in store)
    assert not [name for name in store if "incomplete" in name]
    refused = run(*there, "--config.label.points_per_word=7")
    assert "label.points_per_word: 5 there, 7 now" in refused[1]

    config = Config()
    config.models.vision, config.features.size = str(tmp_path / "dinov2"), 70
    made = [workfolder.make(work) for work in (tmp_path / "here", "s3://bucket/work")]
    for work in made:
        features.write_features(config, work)
    local, remote = ([path.read_bytes() for path in find_shards(w / "features")] for w in made)
    assert local == remote
    assert example.kept_as("s3://bucket/work/features") == "float16"


def test_a_writer_that_fails_leaves_nothing(store):
    with pytest.raises(KeyError), ShardWriter("s3://bucket/a.tfrecord-00000-of-00001") as writer:
        writer.write(b"half")
        raise KeyError
    assert not [name for name in store if name.startswith("/bucket/a")]
    with pytest.raises(RecordError, match="Cannot read s3://bucket/none"):
        RecordSource(["s3://bucket/none"])


def test_stores_that_cannot_be_reached():
    with pytest.raises(UserError, match=r"gs://bucket/images cannot be reached.*pip install gcsfs"):
        finding.find_images("gs://bucket/images")
    with pytest.raises(UserError, match="cannot be reached"):
        workfolder.make("gs://bucket/work")
    with pytest.raises(UserError, match="cannot be reached .*Give a folder, gs://"):
        finding.find_images("http://somewhere/images")
    with pytest.raises(UserError, match="needs a --workdir on this machine, not gs://bucket"):
        workfolder.local("gs://bucket/work")
