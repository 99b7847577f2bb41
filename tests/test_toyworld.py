"""The toy world: exact scenes, weights that load as published ones do, training that resumes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from toyworld import clip, dinov2, loop, pretrain, sam, scores
from toyworld.corpus import Boxes, corpus, random_boxes
from toyworld.scenes import SPLITS, STUFF, WORDS, scene, write_folder

WEIGHTS = Path(pretrain.__file__).parent / "weights"


@pytest.fixture(scope="module")
def scenes():
    return [scene(SPLITS["validation"] + i) for i in range(60)]


def test_a_scene_is_a_function_of_its_seed(tmp_path):
    """Another process, with another hash seed, draws the same scene."""
    code = f"from toyworld import scenes; scenes.write_folder({str(tmp_path)!r}, 'pretrain', 1, 5)"
    root = Path(pretrain.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
    again = np.asarray(Image.open(tmp_path / "images" / "pretrain_000005.png"))
    np.testing.assert_array_equal(again, scene(5).image)
    assert (again != scene(6).image).any()


def test_truth_is_consistent_in_every_scene(scenes):
    seen = set()
    for drawn in scenes:
        assert drawn.image.shape == (128, 128, 3) and drawn.image.dtype == np.uint8
        assert drawn.labels.dtype == drawn.instances.dtype == np.uint16
        ids = np.unique(drawn.instances)
        assert len(ids) >= 2
        for i in ids:
            words = np.unique(drawn.labels[drawn.instances == i])
            assert len(words) == 1, "an instance has one word"
            seen.add(int(words[0]))
    assert seen == set(range(len(WORDS)))


def test_truth_is_where_the_picture_changes(scenes):
    """The border between two instances is an edge of the picture, not beside it."""
    at_border, beside = [], []
    for drawn in scenes[:20]:
        step = np.abs(np.diff(drawn.image.astype(float).mean(-1), axis=1))
        things = drawn.labels >= len(STUFF)
        border = things[:, 1:] != things[:, :-1]
        at_border.append(step[border].mean())
        beside.append(step[~border].mean())
    assert np.mean(at_border) > 2 * np.mean(beside)


def test_things_come_twice_and_touch(scenes):
    twice = touching = 0
    for drawn in scenes:
        first = [np.argmax(drawn.instances.ravel() == i) for i in np.unique(drawn.instances)]
        things = [word for word in drawn.labels.ravel()[first] if word >= len(STUFF)]
        twice += len(things) > len(set(things))
        thing = drawn.labels >= len(STUFF)
        border = drawn.instances[:, 1:] != drawn.instances[:, :-1]
        touching += (border & thing[:, 1:] & thing[:, :-1]).any()
    assert twice >= 15
    assert touching >= 20


def test_a_word_cannot_be_told_from_its_place(scenes):
    """Each stuff word is found in the upper and in the lower half of scenes."""
    halves = np.zeros((len(STUFF), 2))
    for drawn in scenes:
        for half, part in enumerate((drawn.labels[:64], drawn.labels[64:])):
            halves[:, half] += [(part == word).sum() for word in range(len(STUFF))]
    shares = halves / halves.sum(1, keepdims=True)
    assert shares.min() > 0.08


def test_splits_do_not_share_scenes():
    starts = sorted(SPLITS.values())
    assert min(b - a for a, b in zip(starts, starts[1:], strict=False)) >= 1_000_000
    assert len({scene(start).image.tobytes() for start in starts}) == len(starts)


def test_a_folder_is_completed_and_has_nothing_else(tmp_path):
    write_folder(tmp_path, "train", 3)
    images = sorted((tmp_path / "images").iterdir())
    kept = images[0].stat().st_mtime_ns
    images[1].unlink()
    write_folder(tmp_path, "train", 4)
    names = [f"train_{i:06d}.png" for i in range(4)]
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == names
    assert sorted(path.name for path in (tmp_path / "labels").iterdir()) == names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "labels", "words.txt"]
    assert images[0].stat().st_mtime_ns == kept
    drawn = scene(SPLITS["train"] + 3)
    np.testing.assert_array_equal(Image.open(tmp_path / "labels" / names[3]), drawn.labels)
    np.testing.assert_array_equal(Image.open(tmp_path / "images" / names[3]), drawn.image)
    assert (tmp_path / "words.txt").read_text().splitlines() == list(WORDS)


def test_common_points_show_the_same_pixels():
    """A point of the overlap has the same colour in both crops, mirrored or not."""
    random = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 1, 128)
    image = torch.stack([ramp.expand(128, 128), ramp.expand(128, 128).T])[None].expand(
        6, -1, -1, -1
    )
    first, second = dinov2._two_boxes(random, 6)
    points = dinov2._common_points(first, second)
    a, b = (
        dinov2._at(box.cut(image, 64), grid)
        for box, grid in zip((first, second), points, strict=True)
    )
    torch.testing.assert_close(a, b, atol=0.02, rtol=0)


def test_crops_are_cut_where_boxes_say():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    quarter = Boxes(*(torch.tensor([v]) for v in (0.5, -0.5, 0.5, 1.0)))
    torch.testing.assert_close(quarter.cut(image, 2)[0, 0], image[0, 0, :2, 2:])
    mirrored = Boxes(*(torch.tensor([v]) for v in (0.5, -0.5, 0.5, -1.0)))
    torch.testing.assert_close(mirrored.cut(image, 2)[0, 0], image[0, 0, :2, 2:].flip(1))
    boxes = random_boxes(torch.Generator().manual_seed(0), 100, 0.2, 0.9)
    assert (boxes.x.abs() + boxes.half <= 1.0001).all()


def test_assignments_use_all_prototypes():
    logits = torch.randn(512, 16, generator=torch.Generator().manual_seed(0)) * 0.1
    logits[:, 0] += 0.3  # everything likes the first one best
    shares = dinov2.assign(logits, temperature=0.05)
    torch.testing.assert_close(shares.sum(1), torch.ones(512))
    assert shares.sum(0).max() < 2 * shares.sum(0).min()


@pytest.mark.parametrize("balance", [0.0, 1.0])
def test_a_perfect_mask_costs_less_than_any_other(balance):
    truth = torch.zeros(1, 16, 16, dtype=torch.bool)
    truth[:, 4:9, 4:9] = True
    right = torch.where(truth, 8.0, -8.0)[:, None].expand(-1, 3, -1, -1)
    good = sam.mask_loss(right, torch.ones(1, 3), truth, balance)
    assert good < 0.05
    assert sam.mask_loss(right.roll(3, -1), torch.ones(1, 3), truth, balance) > 1
    assert sam.mask_loss(right, torch.zeros(1, 3), truth, balance) > good + 0.9


def test_the_tokenizer_spells_everything_and_knows_its_words(tmp_path):
    from transformers import AutoTokenizer

    clip.tokenizer().save_pretrained(tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path)
    for word in WORDS:
        assert len(words.tokenize(word)) == len(word.split())
    sentence = "a photo of a zebra, 3 cafés and a sail boat."
    assert words.decode(words(sentence).input_ids, skip_special_tokens=True).replace(" ", "") == (
        sentence.replace(" ", "")
    )
    ids = words(["sky", "a photo of a sky."], padding=True).input_ids
    assert ids[0][-1] == words.eos_token_id == words.pad_token_id == len(words) - 1


@pytest.mark.parametrize("name", pretrain.MODELS)
def test_pretraining_resumes_where_it_was_killed(name, tmp_path, monkeypatch):
    flags = argparse.Namespace(
        scenes=8, seed=0, steps=3, device="cpu", validation=2, out=tmp_path / "weights"
    )
    work = tmp_path / "work"
    work.mkdir()
    module = {"clip": clip, "dinov2": dinov2, "sam": sam}[name]
    monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setitem(scores.SCORES, name, lambda *model, count: {"nothing": 0.0})
    steps = []

    def killed(path, value, save=loop.save):
        save(path, value)
        steps.append(value["step"])
        if steps == [1, 2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain.train_one(name, flags.out, work, flags)
    pretrain.train_one(name, flags.out, work, flags)
    assert steps == [1, 2, 3]
    assert json.loads((work / f"{name}.json").read_text())["steps"] == 3
    pretrain.summarise(work, flags)
    assert "nothing" in (flags.out / "README.md").read_text()
    assert not list(tmp_path.rglob("*.incomplete"))
    pretrain.train_one(name, flags.out, work, flags)
    assert steps == [1, 2, 3], "what is done is not done again"


def test_the_weights_are_small_and_the_card_is_theirs():
    size = sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file())
    assert size < pretrain.SPACE
    card = (WEIGHTS / "README.md").read_text()
    for report in json.loads((WEIGHTS / "scores.json").read_text()).values():
        for what, value in report["scores"].items():
            assert f"| {what} | {value:.3f} |" in card


def published_scores(name: str) -> dict[str, float]:
    return json.loads((WEIGHTS / "scores.json").read_text())[name]["scores"]


def test_clip_weights_score_what_the_card_says():
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(WEIGHTS / "clip")
    words = AutoTokenizer.from_pretrained(WEIGHTS / "clip")
    measured, said = scores.of_clip(model, words, count=20), published_scores("clip")
    for what, value in measured.items():
        assert abs(value - said[what]) < 0.1, what


def test_sam_weights_score_what_the_card_says():
    model = sam.build(seed=1)
    model.load_state_dict(torch.load(WEIGHTS / "sam.pth", weights_only=True))
    measured, said = scores.of_sam(model, count=8), published_scores("sam")
    for what, value in measured.items():
        assert abs(value - said[what]) < 0.15, what


def test_dinov2_weights_beat_an_untrained_encoder():
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(WEIGHTS / "dinov2")
    found = scores.of_dinov2(model, count=10)
    assert found["linear probe, mIoU"] > found["linear probe, untrained encoder, mIoU"] + 0.05
    assert corpus("validation", 2).images.shape == (2, 3, 128, 128)
    assert os.path.getsize(WEIGHTS / "dinov2" / "model.safetensors") < 3_000_000
