"""Images, label maps, weights, exports and checkpoints of which any byte is another.

What has a digest is read as it was or refused. What has none, a photograph or weights of other
people, is refused or read as something of its kind: never a traceback, a hang, or numbers that no
image has.
"""

import contextlib
import io
import json
import os
import random
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from labelling_tiny import save_sam
from models import photograph, save_aligner
from mutations import mutations
from PIL import Image
from safetensors.torch import save_file

import fmbseg_jax
from fmbseg_jax.data import images, label_maps
from fmbseg_jax.data.tfrecord import RecordSource, ShardWriter, shard_name
from fmbseg_jax.errors import UserError
from fmbseg_jax.pretrained import weights
from fmbseg_jax.sharing import exports
from fmbseg_jax.training import checkpoint
from fmbseg_jax.training.batches import TrainBatches
from labelling.sam import checkpoint as sam_checkpoint

TIMES = int(os.environ.get("ATTACK", "1"))
SEED, COUNT, SLOW = 0, 40 * TIMES, 15 * TIMES  # of each kind; of folders that Orbax reads
_HANG = 30  # s


def image(kind, mode="RGB", depth=None, **options):
    """An image file of a kind that Pillow writes."""
    pixels = photograph(23, 31) if depth is None else np.arange(713, dtype=depth).reshape(23, 31)
    file, picture = io.BytesIO(), Image.fromarray(pixels)
    (picture if depth else picture.convert(mode)).save(file, kind, **options)
    return file.getvalue()


IMAGES = {
    "jpeg": image("JPEG"), "progressive jpeg": image("JPEG", progressive=True),
    "cmyk jpeg": image("JPEG", "CMYK"), "png": image("PNG"), "palette png": image("PNG", "P"),
    "grey png": image("PNG", "L"), "16-bit png": image("PNG", depth=np.uint16),
    "webp": image("WEBP"), "lossless webp": image("WEBP", lossless=True), "gif": image("GIF", "P"),
    "bmp": image("BMP"), "tiff": image("TIFF"), "float tiff": image("TIFF", depth=np.float32),
    "lzw tiff": image("TIFF", compression="tiff_lzw"),
    "jpeg tiff": image("TIFF", compression="jpeg"), "ppm": image("PPM"),
}  # fmt: skip


def attack(whole, use, count, report):
    """Has each of `count` damaged copies used; by UserError or by a value, within the time."""
    for damaged in mutations(whole, random.Random(SEED), count):
        begun = time.monotonic()
        try:
            use(damaged)
        except UserError as error:
            assert "Traceback" not in str(error)
        except Exception as error:
            pytest.fail(f"{type(error).__name__}: {error} of {damaged[:300]!r}")
        assert time.monotonic() - begun < _HANG
    report["damaged files"] = report.get("damaged files", 0) + count


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.parametrize("kind", IMAGES)
def test_images(kind, report):
    def use(data):
        images.size(data, kind)
        found = images.decode(data, images.USUAL, kind)
        assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3

    use(IMAGES[kind])
    attack(IMAGES[kind], use, COUNT, report)


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_label_maps(mode, tmp_path, report):
    file, path = io.BytesIO(), tmp_path / "a.png"
    labels = np.arange(12, dtype=np.uint16).reshape(3, 4)
    Image.fromarray(labels if mode == "I;16" else labels.astype(np.uint8)).save(file, "PNG")

    def use(data):
        path.write_bytes(data)
        found = label_maps.read(path, 12)
        assert found.dtype == np.uint16 and set(np.unique(found)) <= {*range(12), 255, 65535}

    use(file.getvalue())
    attack(file.getvalue(), use, COUNT, report)


TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4), "a.bias": torch.ones(3, dtype=torch.float16),
    "b": torch.arange(5), "c": torch.zeros(2, 2, dtype=torch.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "a.pth"])
def test_weights(name, tmp_path, report):
    """Those of other people have no digest; a bit that flips in a number is another number."""
    path = tmp_path / name
    if name.endswith("safetensors"):
        save_file(TENSORS, path, metadata={"format": "pt"})
    else:
        torch.save(TENSORS, path)

    def use(data):
        path.write_bytes(data)
        for read in weights.read_files(path if name == "a.pth" else tmp_path).values():
            assert isinstance(read(), np.ndarray)

    use(path.read_bytes())
    attack(path.read_bytes(), use, COUNT, report)


def test_sam(tmp_path, report):
    """Another byte of its numbers is another SAM; its names and shapes are checked."""
    path = save_sam(tmp_path / "sam.pth")

    def use(data):
        path.write_bytes(data)
        sam_checkpoint.load(path)

    use(path.read_bytes())
    attack(path.read_bytes(), use, COUNT, report)


def test_a_shard_is_what_was_written(tmp_path, report):
    records = [b"first", b"", b"third" * 20]
    path = tmp_path / shard_name("a", "train", 0, 1)
    with ShardWriter(path) as writer:
        for record in records:
            writer.write(record)

    def use(data):
        path.write_bytes(data)
        found = list(RecordSource([path]))
        assert {*found} <= {*records}  # how many there have to be is known elsewhere

    use(path.read_bytes())
    attack(path.read_bytes(), use, COUNT * 4, report)


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_an_export_is_what_was_written(world, tmp_path, report):
    whole = save_aligner(tmp_path / "whole", world.root)
    expected = exports.read_model(whole)["params"]["hash"]
    params = fmbseg_jax.load(whole).dense.params["aligner"]
    drawn = random.Random(SEED)
    for _ in range(SLOW):
        folder = shutil.copytree(whole, tmp_path / "damaged", dirs_exist_ok=True)
        path = drawn.choice(files_of(folder / "params"))
        (damaged,) = mutations(path.read_bytes() or b"\0", drawn, 1)
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):
            assert exports.digest(exports.load_export(folder, params)) == expected
    report["damaged exports"] = SLOW


@pytest.mark.parametrize("time", [-(10**30), -1, 10**25, "soon", [], 1.5])
def test_a_checkpoint_of_no_time_is_set_aside(time, tmp_path):
    """Orbax reads the times of all of them at once, and would stop at one."""
    checkpoints = checkpoint.Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"x": jnp.ones(3)}, iter(pipeline()))
    checkpoints.close()
    path = tmp_path / "2" / "_CHECKPOINT_METADATA"
    facts = json.loads(path.read_text()) | {"commit_timestamp_nsecs": time}
    path.write_text(json.dumps(facts))
    opened = checkpoint.Checkpoints(tmp_path)
    assert opened.last == 1 and (tmp_path / "2.damaged").exists()
    opened.close()


def pipeline():
    return TrainBatches(4, lambda i: {"labels": np.zeros(2)}, seed=0, batch_size=2, epochs=1)


def test_a_checkpoint_is_what_was_saved(tmp_path, report):
    """A damaged one is set aside, and the one before it is taken."""

    class Batches:
        def __init__(self, state=0):
            self.state = state

        def __iter__(self):
            return Batches()

        def __next__(self):
            raise StopIteration

        def get_state(self):
            return {"next": self.state}

        def set_state(self, state):
            self.state = state["next"]

    def state(step):
        return {"step": jnp.asarray(step), "x": jnp.full((3, 4), float(step))}

    checkpoints = checkpoint.Checkpoints(tmp_path / "whole")
    for step in (1, 2):
        checkpoints.save(step, state(step), Batches(step), 0.5)
    checkpoints.close()
    drawn = random.Random(SEED)
    for i in range(SLOW):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(i))
        path = drawn.choice(files_of(folder / "2"))
        (damaged,) = mutations(path.read_bytes() or b"\0", drawn, 1)
        path.write_bytes(damaged)
        opened = checkpoint.Checkpoints(folder)
        restored, batches = opened.restore(state(0), Batches())
        step = int(restored["step"])
        assert step in (1, 2) and batches.get_state() == {"next": step}
        jax.tree.map(np.testing.assert_array_equal, restored, state(step))
        opened.close()
        shutil.rmtree(folder)
    report["damaged checkpoints"] = SLOW
