"""What people call from Python: any image, any words, many questions, from many threads."""

import concurrent.futures
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from models import photograph, save_aligner
from PIL import Image

import fmbseg_jax
from fmbseg_jax import config
from fmbseg_jax.errors import UserError
from fmbseg_jax.segmentation import image_features
from fmbseg_jax.segmentation.cache import Recent
from fmbseg_jax.sharing.loading import load
from fmbseg_jax.vocabulary import IGNORE

WORDS = ["sky", "grass", "sail boat", "moon"]


@pytest.fixture(scope="module")
def export(world, tmp_path_factory):
    return save_aligner(tmp_path_factory.mktemp("python") / "export", world.root)


@pytest.fixture(scope="module")
def segmenter(export):
    return fmbseg_jax.load(export)


@pytest.fixture
def looks(monkeypatch):
    """Counts how often a model looks at windows."""
    seen, encode = [], image_features.batching.encode

    def counted(items, size, run):
        return encode(items, size, lambda *batch: seen.append(1) or run(*batch))

    monkeypatch.setattr(image_features.batching, "encode", counted)
    return seen


def test_an_image_is_an_array_a_pillow_image_or_a_path(segmenter, tmp_path):
    image = photograph(90, 120)
    Image.fromarray(image).save(tmp_path / "photo.png")
    expected = segmenter.segment(image, WORDS)
    turned = Image.fromarray(np.rot90(image))
    turned.getexif()[0x0112] = 6  # "turn me right"
    turned.save(tmp_path / "turned.png", exif=turned.getexif())
    for given in (
        Image.fromarray(image),
        Image.fromarray(image).convert("RGBA"),
        str(tmp_path / "photo.png"),
        tmp_path / "photo.png",
        tmp_path / "turned.png",
        np.asfortranarray(image),
        image[::-1][::-1],
    ):
        np.testing.assert_array_equal(segmenter.segment(given, WORDS), expected)


def test_a_path_that_is_no_image_is_refused(segmenter, tmp_path):
    (tmp_path / "note.jpg").write_text("no image")
    for path, message in {
        tmp_path / "none.png": "none.png is not there. Give the path of an image file",
        tmp_path: "is a folder",
        tmp_path / "note.jpg": "note.jpg cannot be read: not an image file",
    }.items():
        with pytest.raises(UserError, match=message):
            segmenter.segment(path, WORDS)


GREY = np.full((8, 9), 100, np.uint8)
FLOAT = np.random.default_rng(0).random((8, 9, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        (FLOAT, r"float32 \[8, 9, 3\]. Its values lie in \[0, 1\]: pass \(image \* 255\)"),
        (FLOAT * 255, r"lie in \[0, 255\]: pass image.round\(\).astype\(np.uint8\)"),
        (FLOAT - 0.5, "pass it as it was before normalisation"),
        (FLOAT * np.nan, "not finite"),
        ((FLOAT * 65535).astype(np.uint16), r"go up to 65\d+: pass \(image / 65"),
        ((FLOAT * 255).astype(np.int64), r"lie in \[0, 255\]"),
        (FLOAT > 0.5, r"lie in \[0, 1\]"),
        (np.moveaxis(FLOAT, -1, 0), r"channels come first: pass np.moveaxis\(image, 0, -1\)"),
        (GREY, r"grey: pass np.repeat\(image\[..., None\], 3, axis=2\)"),
        (GREY[..., None], r"grey: pass np.repeat\(image, 3, axis=2\)"),
        (np.dstack([GREY] * 4), r"fourth channel is opacity: pass image\[..., :3\]"),
        (np.dstack([GREY] * 7), "Choose three of its 7 channels"),
        (np.stack([GREY] * 3)[None], "segment_batch"),
        (np.zeros((0, 8, 3), np.uint8), "It is empty"),
        (None, "It holds no numbers"),
        (GREY[0], "three axes"),
    ],
)
def test_what_is_no_image_gets_advice(segmenter, given, advice):
    with pytest.raises(UserError, match=r"An image is a uint8 array \[H, W, 3\].*" + advice):
        segmenter.segment(given, WORDS)


def test_broken_images_get_a_message(segmenter, tmp_path):
    image = photograph(90, 120)
    Image.fromarray(image).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:700])
    with pytest.raises(UserError, match="The Pillow image cannot be read"):
        segmenter.segment(Image.open(tmp_path / "cut.jpg"), WORDS)
    with pytest.raises(UserError, match="It holds no numbers"):
        segmenter.segment([[1, 2], [3]], WORDS)
    with pytest.raises(UserError, match="A side has up to 60000 pixels"):
        segmenter.segment(np.zeros((1, 70_000, 3), np.uint8), WORDS)
    Image.new("RGB", (70_000, 1)).save(tmp_path / "long.png")
    with pytest.raises(UserError, match="70000 pixels long; 60000 are possible"):
        segmenter.segment(tmp_path / "long.png", WORDS)


def test_batches_check_their_words_at_once(segmenter):
    with pytest.raises(UserError, match="holds no word"):
        segmenter.segment_batch([], [])
    image = photograph(8, 8)
    for one in (image, Image.fromarray(image), "photo.jpg", Path("photo.jpg")):
        with pytest.raises(UserError, match=r"takes several images: pass \[image\]"):
            segmenter.segment_batch(one, WORDS)


@pytest.mark.parametrize(
    "image",
    [
        FLOAT, FLOAT * 255, (FLOAT * 65535).astype(np.uint16), FLOAT > 0.5, GREY, GREY[..., None],
        np.moveaxis((FLOAT * 255).astype(np.uint8), -1, 0), np.dstack([GREY] * 4),
    ],
)  # fmt: skip
def test_the_advice_works(segmenter, image):
    """What the messages say to pass is what is then accepted."""
    with pytest.raises(UserError) as refused:
        segmenter.segment(image, WORDS)
    advice = re.search(r": pass (.*?)(, or .*)?\.$", str(refused.value))[1]
    advised = eval(advice, {"image": image, "np": np})
    assert segmenter.segment(advised, WORDS).shape == (8, 9)
    assert advised.min() < 40 or image is GREY or image.shape[-1] in (1, 4)  # and is not all black
    assert advised.max() > 90


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "holds no word"),
        ({}, "holds no word"),
        ("sky, grass", r"Words come in a list: \['sky', 'grass'\]"),
        (["sky", 7], "Words are strings; got 7, of type int"),
        (["sky", "  "], "word 2 is empty"),
        (["sky", "Sky"], "'Sky', is word 1 again"),
        ({"couch": []}, "'couch' cannot be used: it holds no word"),
        ({"couch": 3}, "Words come in a list"),
        (None, "Words come in a list"),
        ({"couch": ["sofa"], "seat": ["chair", "sofa"]}, "'chair;sofa', shares 'sofa' with 'sofa'"),
        ({"sky", "grass"}, "Words come in a list"),
    ],
)
def test_wrong_words_are_refused(segmenter, words, message):
    with pytest.raises(UserError, match=message):
        segmenter.segment(photograph(8, 8), words)


def test_of_synonyms_the_best_counts(segmenter):
    image = photograph(90, 120)
    apart = segmenter.similarities(image, ["sky", "grass", "moon"])
    words = {"sky": ["sky"], "other": ["grass", "moon"]}
    together = segmenter.similarities(image, words)
    assert together.shape == (90, 120, 2)
    np.testing.assert_allclose(together[..., 1], apart[..., 1:].max(-1), atol=1e-6)
    expected = np.minimum(apart.argmax(-1), 1)
    assert np.mean(segmenter.segment(image, words) == expected) > 0.999
    assert np.mean(segmenter.segment(image, ["sky", "grass;moon"]) == expected) > 0.999


def test_the_background_is_ignore(segmenter):
    image = photograph(90, 120)
    found = segmenter.similarities(image, WORDS)
    by_words = segmenter.segment(image, WORDS[:2], background=WORDS[2:])
    expected = np.where(found.argmax(-1) < 2, found.argmax(-1), IGNORE)
    assert {0, 1, IGNORE} >= set(np.unique(by_words))
    assert np.mean(by_words == expected) > 0.999
    threshold = np.median(found.max(-1))  # a number of NumPy's
    by_threshold = segmenter.segment(image, WORDS, background=threshold)
    expected = np.where(found.max(-1) < threshold, IGNORE, found.argmax(-1))
    assert np.mean(by_threshold == expected) > 0.999
    assert 0.4 < np.mean(by_threshold == IGNORE) < 0.6
    for background, message in {
        2.0: "from -1 to 1; got 2.0",
        True: "from -1 to 1; got True",
        "sky": r"Words come in a list: \['sky'\]",
        ("wall", "sky"): "'sky', is word 1 again",
    }.items():
        with pytest.raises(UserError, match=message):
            segmenter.segment(image, WORDS, background=background)


def test_scores_are_those_of_the_word(segmenter):
    image = photograph(90, 120)
    found = segmenter.similarities(image, WORDS)
    labels, scores = segmenter.segment_with_scores(image, WORDS)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, found.max(-1), atol=1e-5)
    np.testing.assert_array_equal(labels, segmenter.segment(image, WORDS))


def test_a_batch_is_as_one_after_the_other(segmenter, tmp_path):
    sizes = [(70, 70), (90, 161), (200, 83), (40, 30)]
    photographs = [photograph(*size, seed=i) for i, size in enumerate(sizes)]
    Image.fromarray(photographs[1]).save(tmp_path / "1.png")
    given = [photographs[0], tmp_path / "1.png", Image.fromarray(photographs[2]), photographs[3]]
    found = segmenter.segment_batch(given, WORDS, background=["wall"])
    for (labels, scores), image in zip(found, photographs, strict=True):
        alone = segmenter.segment_with_scores(image, WORDS, background=["wall"])
        assert labels.dtype == np.int32
        assert np.mean(labels == alone.labels) > 0.999
        np.testing.assert_allclose(scores, alone.scores, atol=1e-5)


def test_pamr_refines_here_too(export):
    plain, refined = (load(export, config.Eval(**SIZES, pamr=n)) for n in (0, 3))
    image = photograph(90, 120)
    (found,) = refined.label_maps([(0, refined.prepare(image))], looking_for(WORDS))
    np.testing.assert_array_equal(refined.segment(image, WORDS), found.refined)
    assert np.any(refined.segment(image, WORDS) != plain.segment(image, WORDS))


SIZES = {"short_side": 70, "window": 70, "stride": 35}


def looking_for(words):
    from fmbseg_jax.vocabulary.classes import Classes

    return Classes.of(words)


def test_other_words_do_not_look_at_the_image_again(export, looks):
    segmenter = fmbseg_jax.load(export)
    image = photograph(90, 120).copy()
    first = segmenter.segment(image, WORDS)
    once = len(looks)
    assert once
    segmenter.segment(image.copy(), WORDS[:2])
    segmenter.similarities(image, ["a word that is new"])
    np.testing.assert_array_equal(segmenter.segment(image, WORDS), first)
    assert len(looks) == once
    image[40:50, 40:50] = 255 - image[40:50, 40:50]  # in place
    assert np.any(segmenter.segment(image, WORDS) != first)
    assert len(looks) == 2 * once
    segmenter.segment(image.reshape(120, 90, 3), WORDS)  # the same bytes
    assert len(looks) > 2 * once


def test_other_parameters_forget_what_was_seen(export, looks):
    import jax

    segmenter, image = fmbseg_jax.load(export), photograph(90, 120)
    first, once = segmenter.similarities(image, WORDS), len(looks)
    params = segmenter.dense.params["aligner"]
    segmenter.dense.use(jax.tree.map(lambda leaf: leaf + 0.1, params))
    assert np.abs(segmenter.similarities(image, WORDS) - first).max() > 1e-3
    assert len(looks) == 2 * once


def test_threads_share_a_segmenter(export, looks):
    """Twelve threads ask for four images by three lists of words; each image is looked at once."""
    photographs = [photograph(90, 120, seed=i) for i in range(4)]
    fmbseg_jax.load(export).segment(photographs[0], WORDS)
    once = len(looks)
    looks.clear()
    segmenter = fmbseg_jax.load(export)
    lists = [WORDS, WORDS[::-1], ["one", "two", "three"]]
    start = threading.Barrier(12)

    def ask(i):
        start.wait()
        return segmenter.segment(photographs[i % 4], lists[i // 4])

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, range(12)))
    alone = fmbseg_jax.load(export)
    once = len(looks) // 4
    assert len(looks) == 4 * once
    for i, labels in enumerate(found):
        np.testing.assert_array_equal(labels, alone.segment(photographs[i % 4], lists[i // 4]))


def test_the_cache_is_bounded_and_failures_are_not_kept():
    recent, made = Recent(10, lambda value: value), []

    def of(key, size):
        return recent.get(key, lambda: made.append(key) or size)

    assert [of("a", 4), of("b", 4), of("a", 0)] == [4, 4, 4]
    assert made == ["a", "b"]
    of("c", 4)  # "b" is the oldest
    of("a", 4)
    assert made == ["a", "b", "c"]
    of("b", 4)
    assert made == ["a", "b", "c", "b"]
    assert of("large", 99) == 99
    of("large", 99)
    assert made[-1] == "large"
    assert made.count("large") == 1
    with pytest.raises(ZeroDivisionError):
        recent.get("d", lambda: 1 // 0)
    assert of("d", 1) == 1
