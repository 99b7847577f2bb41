"""Detection, query points, classified masks, and what they become."""

import io
import os

import numpy as np
import pytest
import torch
from labelling_tiny import WORDS, picture, save_sam
from models import save_clip
from PIL import Image

from fmbseg_jax import config
from fmbseg_jax.data import example, label_maps
from fmbseg_jax.errors import UserError
from fmbseg_jax.vocabulary import IGNORE
from labelling import detection, figures, models, stage1
from labelling.clip import Clip
from labelling.sam.model import Sam
from labelling.shards.annotated import annotated_image

torch.set_num_threads(1)


def _options(**changes):
    options = config.Label(short_side=48, crop=32, stride=16, points_per_word=3)
    options.sam = config.Sam(points_per_side=4, pred_iou=0.0, stability=0.0, max_area=1.0)
    for name, value in changes.items():
        setattr(options, name, value)
    return options


@pytest.fixture(scope="module")
def labeller(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_clip(folder / "clip")
    sam = Sam(save_sam(folder / "sam.pth"))
    return stage1.Labeller(Clip(str(folder / "clip")), sam, WORDS, _options())


def _file(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


# Detection


def test_votes():
    similarities = np.zeros((9, 4))
    for crop, word in enumerate([0, 0, 0, 2, 2, 3, 3, 3, 3]):
        similarities[crop, word] = 1
    for min_crops, expected in [(1, [0, 2, 3]), (2, [0, 2, 3]), (3, [0, 3]), (4, [3]), (5, [])]:
        found, votes = detection.vote(similarities, min_crops)
        assert found.tolist() == expected
        assert votes.tolist() == [{0: 3, 2: 2, 3: 4}[word] for word in expected]
        assert votes.dtype == np.int32


def test_image_labels(tmp_path):
    path = tmp_path / "labels.tsv"
    path.write_text("a.jpg\tcat, Sky\n\nsub/b.png\t\n")
    labels = detection.read_image_labels(path, WORDS, ["a.jpg", "sub/b.png", "c.jpg"])
    assert {name: indices.tolist() for name, indices in labels.items()} == {
        "a.jpg": [0, 3],
        "sub/b.png": [],
    }
    assert detection.read_image_labels("", WORDS, []) == {}


def test_image_labels_by_any_synonym(tmp_path):
    (tmp_path / "given.tsv").write_text("a.jpg\tcouch\nb.jpg\tsofa;couch,Sky")
    given = detection.read_image_labels(
        tmp_path / "given.tsv", ("sky", "sofa;couch"), ("a.jpg", "b.jpg")
    )
    assert {name: indices.tolist() for name, indices in given.items()} == {
        "a.jpg": [1], "b.jpg": [0, 1],
    }  # fmt: skip


def test_faulty_image_labels(tmp_path):
    path = tmp_path / "labels.tsv"
    with pytest.raises(UserError, match="No file of image-level labels at .*path<TAB>word,word"):
        detection.read_image_labels(path, WORDS, ["a.jpg"])
    path.write_text("a.jpg\tgras\nb.jpg\tsky\na.jpg sky\na.jpg\tcat\na.jpg\tcat\n")
    with pytest.raises(UserError) as error:
        detection.read_image_labels(path, WORDS, ["a.jpg"])
    message = str(error.value)
    for part in [
        "line 1: no word 'gras'; did you mean 'grass'?",
        "line 2: no image 'b.jpg'; did you mean 'a.jpg'?",
        "line 3 has no tab: 'a.jpg sky'",
        "line 5: 'a.jpg' again",
    ]:
        assert part in message
    assert "line 4" not in message


# Stage 1.1


@pytest.mark.parametrize("size", [(60, 300), (300, 60), (97, 101)])
def test_points_are_centres_of_patches(labeller, size):
    """A marked patch of the resized image: the point lies in the middle of its pixels."""
    height, width = 1, 1
    _, dense = labeller.clip.crops(picture(*size), 48, 32, 16)
    height, width = dense.shape[:2]
    for i, j in [(0, 0), (height - 1, width - 1), (2, width // 2)]:
        similarities = np.zeros((height, width, 2), np.float32)
        similarities[i, j, 1] = 1
        (x, y) = stage1.query_points(similarities, size, 1)[1, 0]
        marked = np.zeros((height, width), bool)
        marked[i, j] = True
        rows, columns = (
            np.floor((np.arange(n) + 0.5) / n * m).astype(int)
            for n, m in zip(size, marked.shape, strict=True)
        )
        ys, xs = np.nonzero(marked[rows[:, None], columns])
        assert abs(y - (ys.mean() + 0.5)) <= 0.5 and abs(x - (xs.mean() + 0.5)) <= 0.5


@pytest.mark.parametrize("size", [(60, 90), (130, 50), (48, 200)])
def test_points_fall_on_what_they_stand_for(labeller, size):
    """A marked image, wide or tall: the patch that the mark changes most has its point on it."""
    plain = np.full((*size, 3), 90, np.uint8)
    marked = plain.copy()
    top, left = size[0] // 2, size[1] // 3
    side = min(size) // 6 + 3
    marked[top : top + side, left : left + side] = 255
    before, after = (labeller.clip.crops(image, 48, 32, 16)[1].numpy() for image in (plain, marked))
    changed = np.linalg.norm(after - before, axis=-1)[..., None]
    (x, y) = stage1.query_points(changed.astype(np.float32), size, 1)[0, 0]
    reach = max(n / m for n, m in zip(size, changed.shape, strict=False)) / 2  # half a patch
    assert left - reach <= x <= left + side + reach
    assert top - reach <= y <= top + side + reach


def test_points_are_the_most_similar_first():
    similarities = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)
    points = stage1.query_points(similarities, (30, 40), 5)
    assert points.shape == (2, 5, 2) and points.dtype == np.float32
    for word in range(2):
        cells = (points[word] // 10).astype(int)
        values = similarities[cells[:, 1], cells[:, 0], word]
        assert values.tolist() == sorted(similarities[..., word].ravel())[::-1][:5]


def test_fewer_patches_than_points():
    assert stage1.query_points(np.zeros((1, 2, 3), np.float32), (10, 20), 5).shape == (3, 2, 2)


# Stage 1.2


@pytest.mark.parametrize(
    ("size", "grid"), [((24, 36), (4, 6)), ((23, 37), (4, 6)), ((3, 50), (5, 7))]
)
def test_mean_feature_under_a_mask_pixel_by_pixel(size, grid):
    """Each pixel has the feature of its patch, in shares where a border of patches cuts it."""
    rng = np.random.default_rng(0)
    masks = rng.random((5, *size)) < 0.4
    features = rng.normal(size=(*grid, 3))
    areas = stage1.mask_areas(torch.from_numpy(masks), grid).numpy()
    np.testing.assert_allclose(areas.sum((1, 2)), masks.sum((1, 2)), rtol=1e-5)
    fine = 840  # cuts each pixel so finely that every border of patches falls between two cuts
    for mask, area in zip(masks, areas, strict=True):
        total = np.zeros(3)
        for y, x in zip(*np.nonzero(mask), strict=True):
            shares = []
            for at, n, m in ((y, size[0], grid[0]), (x, size[1], grid[1])):
                cuts = ((at + (np.arange(fine) + 0.5) / fine) * m / n).astype(int)
                shares.append(np.bincount(cuts, minlength=m) / fine)
            total += np.einsum("i,j,ijd->d", *shares, features)
        mean = np.einsum("ij,ijd->d", area, features) / area.sum()
        np.testing.assert_allclose(mean, total / mask.sum(), atol=2e-3)


def test_masks_get_the_word_of_their_mean_feature(labeller):
    image = picture(60, 90)
    scene = labeller.look(image, given=np.array([0, 2, 3]))
    _, dense = labeller.clip.crops(image, 48, 32, 16)
    text = labeller.clip.text(WORDS, "a photo of a {}.")[[0, 2, 3]]
    rows, columns = (
        (np.arange(n) * m // n) for n, m in zip((60, 90), dense.shape[:2], strict=True)
    )
    pixels = dense.numpy()[rows[:, None], columns]
    automatic = scene.mask_stages == 12
    assert automatic.sum() >= 1
    masks = scene.masks[automatic].rows(slice(None))
    for mask, word in zip(masks, scene.mask_words[automatic], strict=True):
        similarities = text.numpy() @ pixels[mask].mean(0)
        assert similarities[word] >= similarities.max() - 1e-2


# Together


def test_record(labeller):
    data = _file(picture(60, 90))
    label = labeller.label_image(data, "a.png")
    label = example.decode_pseudo_label(example.encode(label))
    assert label.image == data and label.labels.shape == (60, 90)
    assert set(np.unique(label.labels)) <= {*label.found, IGNORE}
    assert len(label.points) == 3 * len(label.found) == len(label.point_words)
    assert set(label.mask_stages) == {11, 12} and set(label.mask_words) <= set(label.found)
    assert (label.votes >= 2).all()
    assert (label.points < [90, 60]).all() and (label.points > 0).all()
    words, counts = np.unique(label.point_words, return_counts=True)
    assert words.tolist() == label.found.tolist() and (counts == 3).all()


def test_thousands_of_words(labeller):
    """LVIS has 1,203: indices need more than a byte, in memory and in the record."""
    words = [f"thing {i}" for i in range(1203)]
    many = stage1.Labeller(labeller.clip, labeller.sam, words, _options(min_crops=1))
    data = _file(picture(60, 90))
    label = many.label_image(data, "a.png", given=np.array([3, 700, 1202]))
    label = example.decode_pseudo_label(example.encode(label))
    assert label.labels.dtype == np.uint16 and label.found.tolist() == [3, 700, 1202]
    assert {700, 1202} & set(np.unique(label.labels)) and set(label.point_words) == {3, 700, 1202}
    voted = many.label_image(data, "a.png")
    assert set(np.unique(voted.labels)) <= {*voted.found, IGNORE} and voted.found.max() > 255


def test_given_words_replace_the_votes(labeller):
    data = _file(picture(60, 90))
    label = labeller.label_image(data, "a.png", given=np.array([1]))
    assert label.found.tolist() == [1] and label.votes.tolist() == [detection.GIVEN]
    assert set(np.unique(label.labels)) <= {1, IGNORE} and (label.labels == 1).any()
    nothing = labeller.label_image(data, "a.png", given=np.array([], np.int64))
    assert (nothing.labels == IGNORE).all() and not len(nothing.mask_words)


@pytest.mark.parametrize("stages", ["1.1", "1.2"])
def test_one_stage_alone(labeller, monkeypatch, stages):
    data = _file(picture(60, 90))
    both = labeller.look(picture(60, 90))
    monkeypatch.setattr(labeller, "options", _options(stages=stages))
    label = labeller.label_image(data, "a.png")
    number = {"1.1": 11, "1.2": 12}[stages]
    assert set(label.mask_stages) == {number} and bool(len(label.points)) == (stages == "1.1")
    np.testing.assert_array_equal(label.labels, both.labels("similarity", stages))


def test_the_image_is_encoded_once(labeller, monkeypatch):
    calls = []
    forward = labeller.sam.model.image_encoder.forward
    monkeypatch.setattr(
        labeller.sam.model.image_encoder, "forward", lambda x: calls.append(1) or forward(x)
    )
    labeller.look(picture(60, 90), given=np.array([0, 1]))
    assert len(calls) == 1


def test_no_word_found(labeller, monkeypatch):
    monkeypatch.setattr(labeller, "options", _options(min_crops=1000))
    label = labeller.label_image(_file(picture(60, 90)), "a.png")
    assert not len(label.found) and (label.labels == IGNORE).all()


def test_figures(labeller):
    label = labeller.label_image(_file(picture(60, 90)), "a.png")
    scene = labeller.look(picture(60, 90))
    sheet = figures.label_sheet(label, WORDS, scene)
    assert sheet.dtype == np.uint8 and sheet.shape[0] > 150 * len(label.found)
    assert (np.abs(sheet - np.float32(figures._GREEN)).max(-1) < 40).sum() > 50
    plain = figures.label_sheet(label, WORDS)
    assert plain.shape[1] < sheet.shape[1]


def test_stars_lie_on_their_points():
    white = np.full((50, 100, 3), 255, np.uint8)
    drawn = figures.draw_points(white, np.array([[25.0, 40.0]]))
    ys, xs = np.nonzero((drawn == figures._GREEN).all(-1))
    scale = drawn.shape[1] / 100
    assert abs(xs.mean() - 25 * scale) < 2 and abs(ys.mean() - 40 * scale) < 2


# Annotations


def test_annotations(tmp_path):
    data = _file(picture(4, 6))
    labels = np.arange(24).reshape(4, 6) % 4
    (tmp_path / "sub").mkdir()
    Image.fromarray(np.where(labels == 3, 255, labels).astype(np.uint8)).save(
        tmp_path / "sub/a.png"
    )
    label = annotated_image(tmp_path, data, "sub/a.jpg", 3)
    np.testing.assert_array_equal(label.labels, np.where(labels == 3, IGNORE, labels))
    assert (
        label.labels.dtype == np.uint16 and not len(label.found) and label.filename == "sub/a.jpg"
    )
    Image.fromarray(np.where(labels == 3, IGNORE, labels).astype(np.uint16)).save(
        tmp_path / "sub/a.png"
    )
    again = annotated_image(tmp_path, data, "sub/a.jpg", 3)
    np.testing.assert_array_equal(again.labels, label.labels)
    coloured = Image.fromarray(labels.astype(np.uint8), mode="P")
    coloured.putpalette(list(range(30)))
    coloured.save(tmp_path / "sub/a.png")
    np.testing.assert_array_equal(label_maps.read(tmp_path / "sub/a.png", 4), labels)


def test_faulty_annotations(tmp_path):
    data = _file(picture(4, 6))
    with pytest.raises(UserError, match="No label map at .*a.png"):
        annotated_image(tmp_path, data, "a.jpg", 3)
    Image.new("L", (6, 5)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="a.png is 6 × 5 pixels, its image a.jpg 6 × 4"):
        annotated_image(tmp_path, data, "a.jpg", 3)
    Image.new("L", (6, 4), 3).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="a.png has the index 3; 3 words allow 0 to 2"):
        annotated_image(tmp_path, data, "a.jpg", 3)
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="a.png has mode RGB"):
        annotated_image(tmp_path, data, "a.jpg", 3)
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="a.png cannot be read"):
        annotated_image(tmp_path, data, "a.jpg", 3)


# Models


def test_devices():
    assert models.devices("cpu") == ["cpu"]
    assert models.devices("cpu", 3) == ["cpu"] * 3
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    assert models.devices("auto") == (gpus or ["cpu"])
    with pytest.raises(UserError, match="label.device is 'tpu', which cannot be used here"):
        models.devices("tpu")


def test_models_that_changed(tmp_path):
    settings = config.Config()
    settings.models.clip, settings.models.sam = str(tmp_path / "clip"), str(tmp_path / "sam.pth")
    save_clip(tmp_path / "clip")
    save_sam(tmp_path / "sam.pth")
    models.check(settings)
    models.load(settings, WORDS, tmp_path / "models.json", "cpu")
    models.load(settings, WORDS, tmp_path / "models.json", "cpu")
    tensors = torch.load(tmp_path / "sam.pth")
    tensors["mask_decoder.iou_token.weight"] += 1e-3
    torch.save(tensors, tmp_path / "sam.pth")
    with pytest.raises(UserError, match=r"was made from something else:\n  sam_sha256:"):
        models.load(settings, WORDS, tmp_path / "models.json", "cpu")
    os.remove(tmp_path / "sam.pth")
    with pytest.raises(UserError, match="No SAM checkpoint at"):
        models.check(settings)
