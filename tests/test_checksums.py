"""Files that bear the name of a published one are that file."""

import hashlib
import os
import re

import pytest
import torch
from labelling_tiny import CONFIG, WORDS, run, save_sam
from models import save_clip

from fmbseg_jax.encoders import loading
from fmbseg_jax.errors import UserError
from fmbseg_jax.pretrained import checksums
from labelling.sam import checkpoint


@pytest.mark.parametrize("name", checksums.SHA256)
def test_another_file_under_a_published_name_is_refused(tmp_path, name):
    save_sam(tmp_path / name)  # which torch reads
    read = checkpoint.read if name.startswith("sam") else loading.load_vision
    message = f"{name} is not the file that is published as {re.escape(name)}: its SHA-256"
    with pytest.raises(UserError, match=message):
        read(str(tmp_path / name))


def test_the_published_file_is_read(tmp_path, monkeypatch):
    path = save_sam(tmp_path / "sam_vit_b_01ec64.pth")
    published = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(checksums.SHA256, path.name, published)
    assert checkpoint.read(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))
    with pytest.raises(UserError, match="Fetch it again; a model of your own needs another name"):
        checkpoint.read(path)


def test_it_is_read_once(tmp_path, monkeypatch):
    path = save_sam(tmp_path / "sam_vit_b_01ec64.pth")
    monkeypatch.setitem(checksums.SHA256, path.name, hashlib.sha256(path.read_bytes()).hexdigest())
    before = checksums._sum.cache_info()
    for _ in range(3):
        checksums.check(path)
    after = checksums._sum.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (1, 2)


def test_files_of_other_names_are_ones_own(tmp_path):
    assert checkpoint.read(save_sam(tmp_path / "sam_vit_b.pth"))


def test_sums_are_sums():
    assert all(re.fullmatch("[0-9a-f]{64}", one) for one in checksums.SHA256.values())
    assert len({*checksums.SHA256.values()}) == len(checksums.SHA256)


def test_labelling_ends_with_the_sentence(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG.format(tmp_path))
    (tmp_path / "words.txt").write_text("\n".join(WORDS))
    save_clip(tmp_path / "clip")
    (tmp_path / "images").mkdir()
    torch.save({}, tmp_path / "images" / "not.png")
    path = save_sam(tmp_path / "sam_vit_b_01ec64.pth")
    code, message = run(
        f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/work",
        f"--config.models.sam={path}",
    )  # fmt: skip
    assert code == 1 and "is not the file that is published as sam_vit_b" in message, message
