"""The published benchmarks: layouts, label values, class names, and the whole way to a result."""

import json
import shutil

import numpy as np
import pytest
from conftest import ROOT, run
from PIL import Image

from fmbseg_jax.config import Eval
from fmbseg_jax.data import label_maps
from fmbseg_jax.datasets import coco
from fmbseg_jax.datasets.completeness import check
from fmbseg_jax.datasets.folder import open_folder, open_published
from fmbseg_jax.datasets.published import PUBLISHED, background_words, stuff_words
from fmbseg_jax.errors import UserError
from fmbseg_jax.evaluation import scoring
from fmbseg_jax.evaluation.protocol import of_benchmark, with_background
from fmbseg_jax.vocabulary import IGNORE
from fmbseg_jax.vocabulary.classes import Classes

SIZE = (20, 30)


def test_class_names():
    counts = {name: len(one.words) for name, one in PUBLISHED.items()}
    assert counts == {
        "voc21": 21, "voc20": 20, "context59": 59, "context60": 60, "coco_object80": 80,
        "coco_object81": 81, "coco_stuff171": 171, "cityscapes": 19, "ade150": 150,
    }  # fmt: skip
    for with_, without in [("voc21", "voc20"), ("context60", "context59"),
                           ("coco_object81", "coco_object80")]:  # fmt: skip
        assert PUBLISHED[with_].words == ("background", *PUBLISHED[without].words)
    assert PUBLISHED["coco_stuff171"].words[:80] == PUBLISHED["coco_object80"].words
    assert len(background_words()) == 26
    assert len(stuff_words()) == 91
    assert stuff_words()[0] == "banner"
    assert stuff_words()[-1] == "wood"
    assert PUBLISHED["ade150"].words[7] == "bed"  # mmsegmentation has a blank after it


def test_cocos_ids():
    """Facts of the published label list."""
    names = PUBLISHED["coco_stuff171"].words
    ids = dict(zip(names, coco.THINGS + coco.STUFF, strict=True))
    some = {"person": 1, "stop sign": 13, "toothbrush": 90, "couch": 63, "tv": 72, "banner": 92,
            "bridge": 95, "light": 130, "wall-wood": 177, "wood": 182}  # fmt: skip
    assert {name: ids[name] for name in some} == some


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def grey(values):
    return np.resize(np.asarray(values, np.uint8), SIZE)


def photograph(root, *paths):
    for path in paths:
        save(root / path, np.full((*SIZE, 3), 90, np.uint8))


def as_published(read, values):
    """What a benchmark makes of label values that lie in the first row of its only map."""
    found = read.labels(read.names[0])
    assert found.dtype == np.uint16
    assert found.shape == SIZE
    return found[0, : len(values)].tolist()


I = IGNORE  # noqa: E741
LAYOUTS = {
    # name: image, label map, values in the map → classes
    "voc": ("VOCdevkit/VOC2012/JPEGImages/a.jpg", "VOCdevkit/VOC2012/SegmentationClass/a.png",
            "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt",
            {"voc21": ([0, 1, 20, 255], [0, 1, 20, I]), "voc20": ([0, 1, 20, 255], [I, 0, 19, I])}),
    "context": ("VOCdevkit/VOC2010/JPEGImages/a.jpg",
                "VOCdevkit/VOC2010/SegmentationClassContext/a.png",
                "VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt",
                {"context60": ([0, 1, 59, 255], [0, 1, 59, I]),
                 "context59": ([0, 1, 59, 255], [I, 0, 58, I])}),
    "ade": ("ade/ADEChallengeData2016/images/validation/a.jpg",
            "ade/ADEChallengeData2016/annotations/validation/a.png", "",
            {"ade150": ([0, 1, 150], [I, 0, 149])}),
    "cityscapes by train ids": (
        "cityscapes/leftImg8bit/val/bonn/a_leftImg8bit.png",
        "cityscapes/gtFine/val/bonn/a_gtFine_labelTrainIds.png", "",
        {"cityscapes": ([0, 18, 255], [0, 18, I])}),
    "cityscapes by ids": (
        "cityscapes/leftImg8bit/val/bonn/a_leftImg8bit.png",
        "cityscapes/gtFine/val/bonn/a_gtFine_labelIds.png", "",
        {"cityscapes": ([0, 7, 9, 28, 29, 33, 255], [I, 0, I, 15, I, 18, I])}),
    "stuff by train ids": (
        "coco_stuff164k/images/val2017/a.jpg",
        "coco_stuff164k/annotations/val2017/a_labelTrainIds.png", "",
        {"coco_stuff171": ([0, 79, 80, 170, 255], [0, 79, 80, 170, I]),
         "coco_object80": ([0, 79, 80, 170, 255], [0, 79, I, I, I]),
         "coco_object81": ([0, 79, 80, 170, 255], [1, 80, 0, 0, 0])}),
    "stuff-thing maps": (
        "coco_stuff164k/images/val2017/a.jpg", "coco_stuff164k/stuffthingmaps/val2017/a.png", "",
        {"coco_stuff171": ([0, 89, 91, 181, 255], [0, 79, 80, 170, I]),
         "coco_object80": ([0, 89, 91, 181, 255], [0, 79, I, I, I]),
         "coco_object81": ([0, 12, 89, 91, 181, 255], [1, 12, 80, 0, 0, 0])}),
    "stuff-thing maps where mmsegmentation has them": (
        "coco_stuff164k/images/val2017/a.jpg", "coco_stuff164k/annotations/val2017/a.png", "",
        {"coco_stuff171": ([0, 89, 91, 181, 255], [0, 79, 80, 170, I])}),
    "objects by train ids": (
        "coco_object/images/val2017/a.jpg",
        "coco_object/annotations/val2017/a_instanceTrainIds.png", "",
        {"coco_object80": ([0, 1, 80], [I, 0, 79]), "coco_object81": ([0, 1, 80], [0, 1, 80])}),
}  # fmt: skip


def laid_out(data, layout, name):
    """The benchmark of a layout's only image, with the label values that it is tested with."""
    image, labels, split, sets = LAYOUTS[layout]
    photograph(data, image)
    save(data / labels, grey(sets[name][0]))
    if split:
        (data / split).parent.mkdir(parents=True, exist_ok=True)
        (data / split).write_text("a\n")
    return open_published(name, data)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout(tmp_path, layout):
    for name, (values, expected) in LAYOUTS[layout][-1].items():
        benchmark = laid_out(tmp_path, layout, name)
        assert len(benchmark.names) == 1
        assert as_published(benchmark, values) == expected
        assert benchmark.image(benchmark.names[0]).shape == (*SIZE, 3)
        found = check(benchmark)
        assert (found.images, found.expected) == (1, PUBLISHED[name].count)
        # The set's own folder serves as well as the folder of all data.
        inside = tmp_path / PUBLISHED[name].roots[0] if "object" not in name else None
        if inside and inside.exists():
            assert open_published(name, inside).files


def panoptic(folder, segments, where="annotations/"):
    """One panoptic PNG with vertical stripes, a segment each, and its JSON."""
    colours = np.zeros((*SIZE, 3), np.uint8)
    infos, width = [], SIZE[1] // len(segments)
    for i, category in enumerate(segments):
        number = 70_000 + 300 * i if category else 0
        stripe = (number % 256, number // 256 % 256, number // 65536)
        colours[:, i * width : (i + 1) * width] = stripe
        if category:
            infos.append({"id": number, "category_id": category})
    save(folder / f"{where}panoptic_val2017/a.png", colours)
    facts = {"annotations": [{"file_name": "a.png", "segments_info": infos}]}
    (folder / f"{where}panoptic_val2017.json").write_text(json.dumps(facts))
    return width


def test_panoptic_maps(tmp_path):
    root = tmp_path / "coco"
    photograph(root, "val2017/a.jpg")
    width = panoptic(root, [1, 90, 92, 187, 0])
    columns = [width * i for i in range(5)]
    for name, expected in [
        ("coco_object80", [0, 79, I, I, I]),
        ("coco_object81", [1, 80, 0, 0, 0]),
    ]:
        labels = open_published(name, tmp_path).labels("a")
        assert labels[0, columns].tolist() == expected
    with pytest.raises(UserError, match="coco_stuff171 .* is not under"):
        open_published("coco_stuff171", tmp_path)  # panoptic maps merge kinds of stuff
    pixels = np.repeat([[183, 183, 92, 182, 0]], SIZE[0], 0).repeat(width, 1).astype(np.uint8)
    save(root / "annotations/stuff_val2017_pixelmaps/a.png", pixels)
    labels = open_published("coco_stuff171", tmp_path).labels("a")
    assert labels[0, columns].tolist() == [0, 79, 80, 170, I]


def test_a_panoptic_map_without_its_json_entry(tmp_path):
    root = tmp_path / "coco"
    photograph(root, "val2017/a.jpg")
    panoptic(root, [1])
    path = root / "annotations/panoptic_val2017.json"
    path.write_text(json.dumps({"annotations": []}))
    with pytest.raises(UserError, match="has no annotation of a.png"):
        open_published("coco_object80", tmp_path).labels("a")
    coco._segments.cache_clear()
    path.write_text(json.dumps({"annotations": [{"file_name": "a.png", "segments_info": []}]}))
    with pytest.raises(UserError, match="has the segment 70000, which"):
        open_published("coco_object80", tmp_path).labels("a")
    coco._segments.cache_clear()
    path.write_text("[]")
    with pytest.raises(UserError, match="it is no object. Take the panoptic JSON"):
        open_published("coco_object80", tmp_path).labels("a")
    coco._segments.cache_clear()


def test_a_benchmark_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="(?s)voc20 .* not under.*JPEGImages/.*VOCdevkit/VOC2012"):
        open_published("voc20", tmp_path)
    root = voc(tmp_path)
    (root / "SegmentationClass/a.png").unlink()
    with pytest.raises(UserError, match=r"has some of them, but not SegmentationClass/\*.png\.\n"):
        open_published("voc20", tmp_path)
    with pytest.raises(UserError, match="There is no benchmark 'voc22'. There are: voc21, voc20"):
        open_published("voc22", tmp_path)


def voc(root, values=(0, 1, 20, 255), names=("a",)):
    root = root / "VOCdevkit/VOC2012"
    for name in names:
        photograph(root, f"JPEGImages/{name}.jpg")
        save(root / f"SegmentationClass/{name}.png", grey(values))
    (root / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(names))
    return root


def test_label_maps_of_another_set_are_refused(tmp_path):
    voc(tmp_path, values=[0, 33])
    with pytest.raises(UserError, match="has the value 33, which this benchmark does not know"):
        open_published("voc21", tmp_path).labels("a")


def test_images_without_label_maps_are_told(tmp_path):
    root = voc(tmp_path, names=("a", "b"))
    (root / "SegmentationClass/b.png").unlink()
    with pytest.raises(UserError, match="1 of 2 images without a label map, such as b"):
        open_published("voc21", tmp_path)
    (root / "JPEGImages/b.jpg").unlink()
    with pytest.raises(UserError, match="1 of 2 images without their file, such as b"):
        open_published("voc21", tmp_path)


def test_check_finds_a_map_of_another_size(tmp_path):
    root = voc(tmp_path)
    save(root / "SegmentationClass/a.png", np.zeros((20, 31), np.uint8))
    benchmark = open_published("voc21", tmp_path)
    with pytest.raises(UserError, match="a.png is 31 × 20 pixels, .*a.jpg 30 × 20"):
        check(benchmark)
    (root / "JPEGImages/a.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="(?s)voc21:.*a.jpg cannot be read"):
        check(benchmark)
    (root / "SegmentationClass/a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="(?s)voc21:.*a.png cannot be read"):
        check(benchmark)


def test_the_program_checks(tmp_path):
    voc(tmp_path, names=("a", "b"))
    flags = ["--config=configs/toy.py", f"--config.eval.data={tmp_path}", "--check"]
    found = run("evaluate.py", *flags, "--benchmarks=voc21,voc20", check=False)
    assert found.returncode == 1
    assert "Not the number of images that is published: voc21, voc20" in found.stdout
    lines = found.stdout.splitlines()
    assert any(line.split() == ["voc21", "2", "1,449", "3", "21", "25.0%"] for line in lines)
    assert any(line.split() == ["voc20", "2", "1,449", "2", "20", "50.0%"] for line in lines)
    assert "Traceback" not in found.stdout


def test_background_by_words():
    classes = with_background(["background", "cat", "bed"], "words", ["sky", "bed", "road"])
    assert classes.words == ("sky", "road", "cat", "bed")  # "bed" is a class, and stays one
    labels = classes.labels(np.asarray([[0, 1, 2, 3]]))
    assert labels.tolist() == [[0, 0, 1, 2]]
    with pytest.raises(UserError, match="Every background word is a class itself"):
        with_background(["background", "cat"], "words", ["cat"])


def test_background_by_threshold():
    classes = with_background(["background", "cat", "dog"], "threshold", threshold=0.2)
    assert classes.words == ("cat", "dog")
    most_similar, best = np.asarray([[0, 1, 1]]), np.asarray([[0.3, 0.2, 0.19]])
    assert classes.labels(most_similar, best).tolist() == [[1, 2, 0]]
    with pytest.raises(UserError, match="needs the cosine similarity"):
        with_background(["background", "cat"], "threshold")


def test_the_best_of_several_words_stands_for_a_class():
    classes = Classes.of(["sofa; couch", "cat"])
    assert classes.words == ("sofa", "couch", "cat")
    assert classes.labels(np.asarray([0, 1, 2])).tolist() == [0, 0, 1]
    with_words = with_background(["background", "sofa;couch"], "words", ["sky", "Couch"])
    assert with_words.words == ("sky", "sofa", "couch")
    assert with_words.index == (0, 1, 1)


def test_other_class_names(tmp_path):
    root = voc(tmp_path)
    names = list(PUBLISHED["voc20"].words)
    names[8] = "chair;seat"
    (root / "names.txt").write_text("\n".join(names))
    benchmark = open_published("voc20", tmp_path)
    classes = of_benchmark(Eval(classes=str(root / "names.txt")), benchmark)
    assert classes.words[8:10] == ("chair", "seat")
    assert len(classes.names) == 20
    with pytest.raises(UserError, match="has 2 names; voc20 has 20 classes"):
        of_benchmark(Eval(classes="cat,dog"), benchmark)


def test_the_rule_of_each_benchmark(tmp_path):
    voc(tmp_path)
    voc20, voc21 = (open_published(name, tmp_path) for name in ("voc20", "voc21"))
    assert of_benchmark(Eval(), voc20) == Classes.of(voc20.words)
    assert of_benchmark(Eval(), voc21).words[:26] == background_words()
    assert len(of_benchmark(Eval(background_words="stuff91"), voc21).words) == 91 + 20
    assert of_benchmark(Eval(background_words="sky,road"), voc21).words[:2] == ("sky", "road")
    assert of_benchmark(Eval(background="none"), voc21) == Classes.of(voc21.words)
    of_threshold = of_benchmark(Eval(background="threshold", threshold=0.1), voc21)
    assert (of_threshold.threshold, len(of_threshold.words)) == (0.1, 20)
    unreadable = Eval(background_words="nowhere.txt")  # which only matters where it is needed
    assert of_benchmark(unreadable, voc20) == Classes.of(voc20.words)
    assert of_benchmark(Eval(background="words"), voc20) == Classes.of(voc20.words)
    photograph(tmp_path / "own", "images/a.jpg")
    save(tmp_path / "own/labels/a.png", grey([0]))
    (tmp_path / "own/words.txt").write_text("other\ncat\n")
    own = open_folder(tmp_path / "own")
    assert of_benchmark(Eval(), own).words == ("other", "cat")
    assert of_benchmark(Eval(background="words", background_words="sky"), own).words == (
        "sky",
        "cat",
    )


def test_counts_are_of_these_label_maps(tmp_path):
    root = voc(tmp_path)
    before = open_published("voc21", tmp_path).fingerprint
    assert before == open_published("voc21", tmp_path).fingerprint
    save(root / "SegmentationClass/a.png", np.random.default_rng(0).integers(0, 9, SIZE, np.uint8))
    assert open_published("voc21", tmp_path).fingerprint != before


def test_the_truth_as_prediction_scores_100(tmp_path):
    """Of every benchmark: the classes that its values stand for, written down here, score 100."""
    for layout, (*_, sets) in LAYOUTS.items():
        for name, (_, expected) in sets.items():
            benchmark = laid_out(tmp_path / layout, layout, name)
            target = label_maps.path(tmp_path / "predicted", benchmark.names[0])
            target.parent.mkdir(parents=True, exist_ok=True)
            guess = np.resize(np.asarray(expected, np.uint16), SIZE)
            target.write_bytes(label_maps.encode(guess))
            result = scoring.score_folder(benchmark, tmp_path / "predicted")
            assert result.miou == 1
            assert set(result.by_image.values()) == {1}
            classes = {value for value in expected if value != IGNORE}
            assert np.count_nonzero(np.isfinite(result.iou)) == len(classes)


def test_the_score_of_one_image_leaves_unlabelled_pixels_a_miss(tmp_path):
    """They are no class of their own: half of one class right is 0.5, not 0.25."""
    voc(tmp_path, values=[1, 1])
    half = np.resize(np.asarray([0, IGNORE], np.uint16), SIZE)
    (tmp_path / "predicted").mkdir()
    (tmp_path / "predicted/a.png").write_bytes(label_maps.encode(half))
    result = scoring.score_folder(open_published("voc20", tmp_path), tmp_path / "predicted")
    assert result.miou == result.by_image["a"] == 0.5


def test_unlabelled_pixels_are_background_where_there_is_one(tmp_path):
    voc(tmp_path, values=[0, 1])
    nothing = np.full(SIZE, IGNORE, np.uint16)
    (tmp_path / "predicted").mkdir()
    (tmp_path / "predicted/a.png").write_bytes(label_maps.encode(nothing))
    scores = {
        name: scoring.score_folder(open_published(name, tmp_path), tmp_path / "predicted")
        for name in ("voc20", "voc21")
    }
    assert scores["voc20"].miou == 0
    np.testing.assert_allclose(scores["voc21"].iou[:2], [0.5, 0])


def test_any_folder(tmp_path):
    photograph(tmp_path, "images/sub/a.jpg")
    save(tmp_path / "labels/sub/a.png", grey([0, 1, 255]))
    (tmp_path / "words.txt").write_text("sky\ngrass\n")
    benchmark = open_folder(tmp_path)
    assert list(benchmark.names) == ["sub/a.jpg"]
    assert benchmark.labels("sub/a.jpg")[0, :3].tolist() == [0, 1, IGNORE]
    (tmp_path / "words.txt").unlink()
    with pytest.raises(UserError, match="it lacks words.txt"):
        open_folder(tmp_path)


BESIDE = ROOT.parent / "shared" / "data"
beside = pytest.mark.skipif(
    not BESIDE.exists(), reason="needs real photographs with their ground truth beside the project"
)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Six real images of COCO as COCO has them, and as VOC would have their objects."""
    root, source = tmp_path_factory.mktemp("real"), BESIDE / "coco_panoptic"
    names = [path.stem for path in sorted((source / "images").glob("*.jpg"))[::16]][:6]
    voc, to_voc = root / "VOC2012", np.full(256, 0, np.uint8)
    for category, label in json.loads((source / "voc20_from_coco.json").read_text())[
        "coco_category_id_to_voc_id"
    ].items():
        to_voc[int(category)] = label
    for name in names:
        for target in (root / "coco/val2017", voc / "JPEGImages"):
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / "images" / f"{name}.jpg", target)
        (root / "coco/panoptic_val2017").mkdir(exist_ok=True)
        shutil.copy(source / "panoptic" / f"{name}.png", root / "coco/panoptic_val2017")
        categories = np.asarray(Image.open(source / "labels" / f"{name}.png"))
        save(voc / "SegmentationClass" / f"{name}.png", to_voc[categories])
    shutil.copy(source / "panoptic.json", root / "coco/panoptic_val2017.json")
    (voc / "ImageSets/Segmentation").mkdir(parents=True)
    (voc / "ImageSets/Segmentation/val.txt").write_text("\n".join(names))
    return root


@beside
def test_panoptic_pngs_equal_the_semantic_ones(real):
    """The latter were made elsewhere: value = category."""
    for name in ("coco_object80", "coco_object81"):
        benchmark = open_published(name, real)
        classes = PUBLISHED[name].classes
        for image in benchmark.names:
            theirs = np.asarray(Image.open(BESIDE / "coco_panoptic/labels" / f"{image}.png"))
            expected = np.vectorize(classes.get)(theirs)
            np.testing.assert_array_equal(benchmark.labels(image), expected)


@beside
def test_real_benchmarks_end_to_end(real, world, tmp_path):
    """Random weights: the numbers mean nothing. The truth as prediction: 100, on every set."""
    world.pseudo_labels(tmp_path, count=5)
    sets = "coco_object80", "coco_object81", "voc20", "voc21"
    flags = [*world.flags, f"--workdir={tmp_path}", f"--config.eval.data={real}"]
    run("fmbseg_jax.features", *flags)
    run("train.py", *flags, "--config.train.epochs=1")
    things = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    objects = {category: i for i, category in enumerate(things)}
    voc_ids = json.loads((BESIDE / "coco_panoptic/voc20_from_coco.json").read_text())
    to_voc = {int(k): v for k, v in voc_ids["coco_category_id_to_voc_id"].items()}
    truth = {  # written down apart from the code that is tested
        "coco_object80": lambda category: objects.get(category, IGNORE),
        "coco_object81": lambda category: objects.get(category, -1) + 1,
        "voc20": lambda category: to_voc.get(category, IGNORE + 1) - 1,
        "voc21": lambda category: to_voc.get(category, 0),
    }
    for name, label in truth.items():
        for image in open_published(name, real).names:
            categories = np.asarray(Image.open(BESIDE / f"coco_panoptic/labels/{image}.png"))
            path = label_maps.path(tmp_path / "truth" / name, image)
            path.parent.mkdir(parents=True, exist_ok=True)
            made = np.vectorize(label)(categories.astype(int)).astype(np.uint16)
            path.write_bytes(label_maps.encode(made))
    flags += [f"--benchmarks={','.join(sets)}", f"--predictions={tmp_path / 'truth'}"]
    output = run("evaluate.py", *flags).stdout
    assert "voc21: 6 images, 21 classes; background by words (background26)" in output
    assert "NOT the whole set, which has 1,449 images" in output
    for name in sets:
        facts = json.loads((tmp_path / "evaluation" / f"{name}.json").read_text())
        assert facts["systems"]["truth"]["miou"] == 1
        assert 0 <= facts["systems"]["aligner"]["miou"] < 0.3
        assert facts["systems"]["aligner"]["images"] == 6
    sizes = [Image.open(path).size for path in (real / "VOC2012/JPEGImages").iterdir()]
    assert np.sum(facts["systems"]["truth"]["confusion"]) == sum(w * h for w, h in sizes)
    table = (tmp_path / "evaluation" / "results.md").read_text()
    assert "| voc20 | the aligner |" in table and "| 85.65 |" in table


@beside
def test_real_text_features_agree_with_the_names():
    """CLIP's features of these class lists, computed elsewhere: order and meaning of the names."""
    features = np.load(BESIDE / "clip_text" / "clip_vitb16_openai_text.npz")
    lists = json.loads((BESIDE / "clip_text" / "classes.json").read_text())
    known = {name: features[name].astype(np.float32) for name in lists}
    ours = {"voc21": "voc21", "coco81": "coco_object81", "ade150": "ade150",
            "cityscapes19": "cityscapes", "cocostuff171": "coco_stuff171"}  # fmt: skip
    for theirs, name in ours.items():
        assert tuple(one.strip() for one in lists[theirs]) == PUBLISHED[name].words
        assert len(known[theirs]) == len(PUBLISHED[name].words)
    couch = known["coco81"][PUBLISHED["coco_object81"].words.index("couch")]
    voc = PUBLISHED["voc21"].words
    assert voc[int(np.argmax(known["voc21"] @ couch))] == "sofa"
    for word, near in [("motorbike", "motorcycle"), ("aeroplane", "airplane"),
                       ("tvmonitor", "tv"), ("diningtable", "dining table")]:  # fmt: skip
        feature = known["voc21"][voc.index(word)]
        found = PUBLISHED["coco_object81"].words[int(np.argmax(known["coco81"] @ feature))]
        assert found == near
    nearest = np.argmax(known["coco81"][1:] @ known["cocostuff171"].T, axis=1)
    assert nearest.tolist() == list(range(80))  # the objects come first, in the same order
    for word, near in [("sky", "clouds"), ("wall", "wall-other"), ("grass", "grass")]:
        feature = known["ade150"][PUBLISHED["ade150"].words.index(word)]
        best = np.argsort(known["cocostuff171"] @ feature)[::-1][:5]
        assert near in [PUBLISHED["coco_stuff171"].words[i] for i in best]
