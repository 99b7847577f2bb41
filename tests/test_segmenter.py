"""The exported model at work, against the same computation in PyTorch."""

import copy
import dataclasses
import multiprocessing
import pickle
import shutil

import jax
import numpy as np
import pytest
import torch
from conftest import ROOT, run
from models import photograph
from torch.nn.functional import gelu, interpolate, normalize
from transformers import CLIPModel, CLIPTokenizer, Dinov2Model

import fmbseg_jax
from fmbseg_jax import config
from fmbseg_jax.data import images
from fmbseg_jax.errors import UserError
from fmbseg_jax.evaluation import scoring
from fmbseg_jax.evaluation.protocol import with_background
from fmbseg_jax.segmentation.segmenter import compiled
from fmbseg_jax.sharing import exports
from fmbseg_jax.sharing.loading import clip_patches, load
from fmbseg_jax.vocabulary import IGNORE
from fmbseg_jax.vocabulary.classes import Classes
from labelling.clip import Clip

WORDS = ["sky", "grass", "sail boat", "a word that was never trained"]


@pytest.fixture(scope="module")
def export(world, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("segmenter")
    world.pseudo_labels(workdir, count=5)
    flags = [*world.flags, f"--workdir={workdir}", "--config.train.aligner=mlp"]
    run("fmbseg_jax.features", *flags)
    run("train.py", *flags)
    return workdir / "export"


@pytest.fixture(scope="module")
def segmenter(export):
    return fmbseg_jax.load(export)


def reference(world, segmenter, image, antialias=True):
    """Similarities of each pixel, [H, W, K]: one window after the other, upsampled, averaged."""
    vision = Dinov2Model.from_pretrained(world.root / "dinov2").eval()
    clip = CLIPModel.from_pretrained(world.root / "clip").eval()
    tokenizer = CLIPTokenizer.from_pretrained(world.root / "clip")
    sentences = [f"a photo of a {word}." for word in WORDS]
    ids = tokenizer(sentences, padding=True, return_tensors="pt")
    text = normalize(clip.get_text_features(**ids).pooler_output, dim=-1)
    aligner = {
        name: {key: torch.from_numpy(np.asarray(value).copy()) for key, value in layer.items()}
        for name, layer in segmenter.dense.params["aligner"].items()
    }
    if antialias:
        resized = images.resize(image, images.resized_shape(*image.shape[:2], 70))
    else:
        planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        scale = min(70 / min(image.shape[:2]), 2048 / max(image.shape[:2]))
        size = [int(side * scale + 0.5) for side in image.shape[:2]]
        theirs = interpolate(planes, size=size, mode="bilinear")[0].permute(1, 2, 0).round()
        resized = images.resize_plain(image, tuple(size))
        assert np.mean(resized == theirs.numpy()) > 0.995  # small ratios: many ties in rounding
    normal = images.normalise(resized, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    pixels = torch.from_numpy(np.asarray(normal, np.float32)).permute(2, 0, 1)[None]
    height, width = pixels.shape[2:]
    total, count = torch.zeros(1, len(WORDS), height, width), torch.zeros(height, width)
    for y in sorted({*range(0, height - 70, 35), height - 70}):
        for x in sorted({*range(0, width - 70, 35), width - 70}):
            patches = vision(pixels[..., y : y + 70, x : x + 70]).last_hidden_state[0, 1:]
            hidden = gelu(patches @ aligner["hidden"]["kernel"] + aligner["hidden"]["bias"])
            aligned = hidden @ aligner["projection"]["kernel"] + aligner["projection"]["bias"]
            window = (normalize(aligned, dim=-1) @ text.T).T.reshape(1, -1, 5, 5)
            window = interpolate(window, size=(70, 70), mode="bilinear")
            total[..., y : y + 70, x : x + 70] += window
            count[y : y + 70, x : x + 70] += 1
    return interpolate(total / count, size=image.shape[:2], mode="bilinear")[0].permute(1, 2, 0)


@pytest.mark.parametrize("shape", [(70, 70), (90, 161), (200, 83), (1, 40)])
def test_it_equals_pytorch(world, segmenter, shape):
    image = photograph(*shape)
    with torch.no_grad():
        expected = reference(world, segmenter, image).numpy()
    similarities = segmenter.similarities(image, WORDS)
    np.testing.assert_allclose(similarities, expected, atol=1e-4)
    labels = segmenter.segment(image, WORDS)
    assert labels.dtype == np.int32
    assert labels.shape == shape
    assert np.mean(labels == expected.argmax(-1)) > 0.999


PHOTOGRAPHS = ROOT.parent / "shared" / "data"


def real_photographs():
    """Of odd sizes and both orientations."""
    found = sorted((PHOTOGRAPHS / "msrc" / "images").glob("*.png"))[::24]
    found += sorted((PHOTOGRAPHS / "coco_panoptic" / "images").glob("*.jpg"))[::25]
    return [images.decode(path.read_bytes()) for path in found]


@pytest.mark.skipif(not PHOTOGRAPHS.exists(), reason="needs photographs beside the project")
def test_real_photographs_equal_pytorch(world, export):
    """Similarities to 1e-4; label maps but for ties; the counts follow, integer by integer."""
    segmenter, photographs = load(export, protocol(export)), real_photographs()
    assert len({image.shape for image in photographs}) > 4
    prepared = ((i, segmenter.prepare(image)) for i, image in enumerate(photographs))
    found = list(segmenter.label_maps(prepared, Classes.of(WORDS)))
    assert [one.key for one in found] == list(range(len(photographs)))
    agree = pixels = 0
    for image, one in zip(photographs, found, strict=True):
        with torch.no_grad():
            expected = reference(world, segmenter, image, antialias=False).numpy()
        ours = segmenter.similarities(image, WORDS)
        np.testing.assert_allclose(ours, expected, atol=1e-4)
        theirs = expected.argmax(-1)
        agree, pixels = agree + np.count_nonzero(one.labels == theirs), pixels + theirs.size
        truth = np.where(expected.max(-1) > 0.3, theirs, IGNORE).astype(np.uint16)
        counts = scoring.Counts.of(one.labels, truth, len(WORDS)).confusion(len(WORDS))
        plain = np.zeros_like(counts)
        counted = truth != IGNORE
        np.add.at(plain, (truth[counted], one.labels[counted]), 1)
        np.testing.assert_array_equal(counts, plain)
    assert agree / pixels >= 0.9999


def test_batches_and_devices_change_nothing(export, monkeypatch):
    """Eight devices take turns; alone, each image gives what it gives among others."""
    sizes = [(70, 70), (90, 161), (70, 70), (200, 83)]  # eight windows and more in one image
    photographs = [photograph(*size, seed=i) for i, size in enumerate(sizes)]
    alone = load(export, protocol(export))
    together = load(export, protocol(export, batch_size=2))
    assert len(jax.local_devices()) == 8
    prepared = ((i, together.prepare(image)) for i, image in enumerate(photographs))
    found = {}
    for i, labels, refined, *_ in together.label_maps(prepared, Classes.of(WORDS)):
        assert refined is None
        found[i] = labels
        expected = alone.segment(photographs[i], WORDS)
        assert np.mean(labels == expected) > 0.999  # a batch of another size rounds otherwise
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    prepared = ((i, together.prepare(image)) for i, image in enumerate(photographs))
    for one in together.label_maps(prepared, Classes.of(WORDS)):
        np.testing.assert_array_equal(one.labels, found[one.key])
    assert together.fingerprint == alone.fingerprint


def protocol(export, **changes):
    """That of the export, with changes."""
    leaves = exports.read_model(export)["config"]
    ours = {name: value for name, value in leaves.items() if name.startswith("eval.")}
    return dataclasses.replace(config.unflatten(ours).eval, **changes)


def test_few_programs_are_compiled_for_many_sizes(export, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    segmenter = load(export, protocol(export, batch_size=4))
    sizes = np.random.default_rng(0).integers(60, 120, (30, 2))
    prepared = ((i, segmenter.prepare(photograph(*size))) for i, size in enumerate(sizes))
    before = compiled([segmenter])
    assert len(list(segmenter.label_maps(prepared, Classes.of(WORDS)))) == 30
    assert compiled([segmenter]) - before <= 11


def test_a_threshold_leaves_the_background(export):
    segmenter = load(export, protocol(export))
    image = photograph(90, 120)
    best = segmenter.similarities(image, WORDS[1:]).max(-1)
    threshold = float(np.median(best))
    classes = with_background(WORDS, "threshold", threshold=threshold)
    ((_, labels, *_),) = segmenter.label_maps([(0, segmenter.prepare(image))], classes)
    clear = np.abs(best - threshold) > 1e-5
    np.testing.assert_array_equal((labels == 0)[clear], (best < threshold)[clear])
    words = segmenter.segment(image, WORDS[1:]) + 1
    assert np.mean(labels[labels > 0] == words[labels > 0]) > 0.999


def test_clips_own_patches_equal_pytorch(world):
    """MaskCLIP's way: the last block's values, its output, norm and projection."""
    protocol = config.Eval(short_side=64, window=64, stride=32)
    segmenter = clip_patches(str(world.root / "clip"), protocol)
    image = photograph(64, 64)
    clip = Clip(str(world.root / "clip"))
    _, features = clip.crops(image, short_side=64, crop=64, stride=64)
    expected = torch.einsum("hwd,kd->khw", features, clip.text(WORDS, "a photo of a {}."))
    expected = interpolate(expected[None], size=(64, 64), mode="bilinear")[0].permute(1, 2, 0)
    ours = segmenter.similarities(image, WORDS)
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-4)


def test_resizing_without_antialiasing_is_torchs():
    image = photograph(90, 161)
    for shape in [(45, 80), (31, 200), (90, 161), (180, 322)]:
        planes = torch.from_numpy(image).permute(2, 0, 1)[None].double()
        expected = interpolate(planes, size=shape, mode="bilinear")[0].permute(1, 2, 0).numpy()
        ours = images.resize_plain(image, shape)
        assert ours.dtype == np.uint8
        assert np.abs(ours - expected).max() < 0.501


def test_the_order_of_the_words_does_not_matter(segmenter):
    image = photograph(90, 120)
    forward, backward = segmenter.segment(image, WORDS), segmenter.segment(image, WORDS[::-1])
    assert np.mean(forward == 3 - backward) > 0.999


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
    ],
)
def test_what_is_no_image_is_refused(segmenter, image):
    with pytest.raises(UserError, match=r"An image is a uint8 array \[H, W, 3\]"):
        segmenter.segment(image, WORDS)


def test_wrong_words_are_refused(segmenter):
    image = photograph(8, 8)
    for words, message in [([], "holds no word"), (["a", " "], "word 2 is empty")]:
        with pytest.raises(UserError, match=message):
            segmenter.segment(image, words)


def test_the_protocol_can_be_another(export):
    other = load(export, config.Eval(short_side=140, window=140, stride=70))
    assert other.segment(photograph(30, 40), WORDS).shape == (30, 40)
    assert other.fingerprint != fmbseg_jax.load(export).fingerprint


def test_other_encoder_weights_are_refused(export, world, tmp_path):
    import json

    import models

    shutil.copytree(export, tmp_path / "export")
    models.save_dinov2(tmp_path / "dinov2", width=48, image=70, patch=14, depth=2)
    model = json.loads((tmp_path / "export" / "model.json").read_text())
    model["vision"]["source"] = str(tmp_path / "dinov2")
    (tmp_path / "export" / "model.json").write_text(json.dumps(model))
    with pytest.raises(
        UserError, match="other values .* than the one that the aligner was trained with"
    ):
        fmbseg_jax.load(tmp_path / "export")
    model["vision"]["source"] = str(tmp_path / "gone")
    (tmp_path / "export" / "model.json").write_text(json.dumps(model))
    with pytest.raises(UserError, match="(?s)is now: --vision=FOLDER.*No model at"):
        fmbseg_jax.load(tmp_path / "export")
    moved = fmbseg_jax.load(tmp_path / "export", vision=str(world.root / "dinov2"))
    image = photograph(70, 80)
    same = fmbseg_jax.load(export).segment(image, ["sky", "grass"])
    np.testing.assert_array_equal(moved.segment(image, ["sky", "grass"]), same)


def test_a_window_of_broken_patches_is_refused(export):
    with pytest.raises(
        UserError, match="eval.window = 71 is not a multiple of the encoder's patch"
    ):
        load(export, config.Eval(short_side=80, window=71, stride=35))


def _ask_in_a_fork(segmenter, answers):
    try:
        segmenter.segment(photograph(70, 70), WORDS)
    except UserError as error:
        answers.put(str(error))


def test_a_forked_process_is_told_that_it_cannot(segmenter):
    """JAX would wait for ever there."""
    segmenter.segment(photograph(70, 70), WORDS)
    forking = multiprocessing.get_context("fork")
    answers = forking.SimpleQueue()
    process = forking.Process(target=_ask_in_a_fork, args=(segmenter, answers))
    process.start()
    process.join(60)
    alive = process.is_alive()
    process.kill()
    assert not alive and "was forked" in answers.get()


@pytest.mark.parametrize("act", [pickle.dumps, copy.deepcopy])
def test_a_segmenter_says_why_it_cannot_be_pickled(segmenter, act):
    with pytest.raises(TypeError, match=r"call fmbseg_jax\.load\(path\) there"):
        act(segmenter)


def test_wrong_protocols_are_refused(export):
    for wrong in (5, "x", [("a", 1)]):
        with pytest.raises(UserError, match="The protocol is a dict"):
            fmbseg_jax.load(export, wrong)
    for template in ("no braces", "{} and {}", "a {}\x1b[2J"):
        with pytest.raises(UserError, match="A template is a line with one {}"):
            fmbseg_jax.load(export, {"template": template})
