"""NaN and infinity, of half precision or of a damaged file: said, and never made into labels."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from labelling_tiny import CONFIG, WORDS, build_sam, picture, run
from models import photograph, save_aligner, save_clip
from PIL import Image
from safetensors.torch import load_file, save_file

import fmbseg_jax
from fmbseg_jax import config as config_lib
from fmbseg_jax.data import example, tfrecord
from fmbseg_jax.encoders.text_features import TextFeatures
from fmbseg_jax.errors import NotFiniteError, UserError
from fmbseg_jax.training import data, loop
from fmbseg_jax.training import step as training
from labelling.clip import Clip
from labelling.sam.model import Sam

torch.set_num_threads(1)
ADVICE = r"computing in float16\. Set label\.compute to bfloat16 or float32, whose range is wider"
DAMAGED = r"computing in float32\. Its files are damaged"


def overflow(weights, layer, second):
    """One hidden unit beyond float16's 65504, which the next matrix does not use."""
    weights[f"{layer}.weight"][0] = 0
    weights[f"{layer}.bias"][0] = 3e5
    weights[f"{second}.weight"][:, 0] = 0


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP whose image encoder overflows in float16."""
    folder = tmp_path_factory.mktemp("overflowing")
    save_clip(folder / "good")
    shutil.copytree(folder / "good", folder / "clip")
    weights = load_file(folder / "clip" / "model.safetensors")
    layer = "vision_model.encoder.layers.0.mlp."
    overflow(weights, f"{layer}fc1", f"{layer}fc2")
    save_file(weights, folder / "clip" / "model.safetensors", metadata={"format": "pt"})
    return folder


def look(folder, compute):
    return Clip(str(folder), dtype=compute).crops(picture(60, 48), 48, 32, 16)


def test_an_image_encoder_of_clip_that_overflows_is_told(clip_folder):
    with pytest.raises(NotFiniteError, match=f"CLIP's image encoder gives .* {ADVICE}"):
        look(clip_folder / "clip", "float16")
    for compute in ("float32", "bfloat16"):
        tokens, patches = look(clip_folder / "clip", compute)
        assert tokens.isfinite().all() and patches.isfinite().all()
    look(clip_folder / "good", "float16")


def test_a_text_encoder_of_clip_that_gives_nan_is_told(clip_folder, tmp_path):
    shutil.copytree(clip_folder / "good", tmp_path / "clip")
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    weights["text_projection.weight"][3, 3] = torch.nan
    save_file(weights, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    clip, features = Clip(str(tmp_path / "clip")), TextFeatures(str(tmp_path / "clip"))
    with pytest.raises(NotFiniteError, match=f"CLIP's text encoder gives .* {DAMAGED}"):
        clip.text(WORDS, "{}")
    for _ in range(2):  # what it gave is not kept, either
        with pytest.raises(NotFiniteError, match=rf"text encoder of .*clip gives .* {DAMAGED}"):
            features(["sky"])


def test_features_of_words_that_were_damaged_on_disk_are_made_again(
    clip_folder, monkeypatch, tmp_path
):
    monkeypatch.setenv("FMBSEG_CACHE", str(tmp_path))
    good = TextFeatures(str(clip_folder / "good"))(["sky"])
    (kept,) = tmp_path.rglob("*.feature")
    whole = kept.read_bytes()
    nan = np.full(len(whole) // 4, np.nan, np.float32).tobytes()
    flipped = whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]
    for damaged in (b"", whole[:-1], whole[:-4], whole + b"\0" * 4, flipped, nan, nan[:16]):
        kept.write_bytes(damaged)
        np.testing.assert_array_equal(TextFeatures(str(clip_folder / "good"))(["sky"]), good)
        assert kept.read_bytes() == whole
    kept.unlink()
    kept.mkdir()  # cannot be written, either
    np.testing.assert_array_equal(TextFeatures(str(clip_folder / "good"))(["sky"]), good)


SAM_LAYERS = {
    "SAM's image encoder": ("image_encoder.blocks.0.mlp.lin1", "image_encoder.blocks.0.mlp.lin2"),
    "SAM's mask decoder": (
        "mask_decoder.iou_prediction_head.layers.0", "mask_decoder.iou_prediction_head.layers.1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("part", SAM_LAYERS)
@pytest.mark.parametrize("by", ["points", "grid"])
def test_a_sam_that_overflows_is_told(part, by, tmp_path):
    weights = build_sam().state_dict()
    overflow(weights, *SAM_LAYERS[part])
    torch.save(weights, tmp_path / "sam.pth")

    def masks(compute):
        sam, options = Sam(tmp_path / "sam.pth", dtype=compute), config_lib.Label().sam
        options.points_per_side, options.pred_iou, options.stability = 2, 0.0, 0.0
        embedding = sam.embed(picture(50, 64))
        if by == "grid":
            return sam.automatic_masks(embedding, options)
        return sam.point_masks(embedding, torch.tensor([[[20.0, 30.0]]]))

    with pytest.raises(NotFiniteError, match=f"{part} gives .* {ADVICE}"):
        masks("float16")
    found = masks("float32")
    assert len(found.ious) and found.ious.isfinite().all() and found.logits.isfinite().all()


@pytest.mark.parametrize("predict", [False, True])
def test_labelling_stops_and_writes_nothing(predict, clip_folder, tmp_path):
    (tmp_path / "config.py").write_text(CONFIG.format(tmp_path))
    (tmp_path / "words.txt").write_text("\n".join(WORDS))
    shutil.copytree(clip_folder / "clip", tmp_path / "clip")
    torch.save(build_sam().state_dict(), tmp_path / "sam.pth")
    (tmp_path / "images").mkdir()
    Image.fromarray(picture(40, 60)).save(tmp_path / "images" / "a.png")
    flags = [f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/work"]
    flags += ["--config.label.compute=float16"]
    flags += ["--predict", f"--images={tmp_path}/images"] * predict
    code, message = run(*flags)
    assert code == 1
    assert message.startswith("\nerror: a.png: CLIP's image encoder gives numbers that are NaN")
    assert not list((tmp_path / "work").rglob("*.tfrecord*"))
    assert not list((tmp_path / "work").rglob("*.png"))


# Stage 2


@pytest.fixture(scope="module")
def damaged(world, tmp_path_factory):
    """A segmenter whose aligner has a NaN."""
    export = save_aligner(tmp_path_factory.mktemp("damaged") / "export", world.root)
    segmenters = [fmbseg_jax.load(export, {"pamr": pamr}) for pamr in (0, 1)]
    for segmenter in segmenters:
        kernel = segmenter.dense.params["aligner"]["projection"]["kernel"]
        segmenter.dense.params["aligner"]["projection"]["kernel"] = kernel.at[0, 0].set(jnp.nan)
    return segmenters


@pytest.mark.parametrize(
    "ask",
    [
        lambda segmenter, *given: segmenter.segment(*given),
        lambda segmenter, *given: segmenter.segment_with_scores(*given, 0.2),
        lambda segmenter, *given: segmenter.similarities(*given),
        lambda segmenter, image, words: list(segmenter.segment_batch([image] * 2, words)),
    ],
)
@pytest.mark.parametrize("pamr", [0, 1])
def test_similarities_that_are_nan_are_no_label(damaged, ask, pamr):
    with pytest.raises(NotFiniteError, match=f"The model gives .* {DAMAGED}"):
        ask(damaged[pamr], photograph(70, 70), ["sky", "grass"])


def features(patches, name="a.png"):
    labels, grid = np.zeros(len(patches), np.uint16), np.asarray([1, len(patches)], np.int32)
    return example.PatchFeatures(patches, labels, grid, name)


def write_features(folder, kind, record):
    folder.mkdir(parents=True)
    with tfrecord.ShardWriter(
        folder / tfrecord.shard_name(example.dataset_name(kind), "train", 0, 1)
    ) as writer:
        writer.write(record)
    vision = {"source": "theirs", "hash": "1"}
    example.write_metadata(folder, kind, [1], 1, {"words": ["sky"], "vision": vision})


@pytest.mark.parametrize("value", [np.nan, np.inf, 7e4])
def test_features_that_float16_cannot_hold_are_not_written(value):
    with np.errstate(over="ignore"):
        patches = np.full((2, 3), value, np.float32).astype(np.float16)
    with pytest.raises(UserError, match=r"a\.png hold numbers that are infinite or NaN: float16 "):
        example.encode(features(patches))
    with pytest.raises(UserError, match=r"a\.png hold numbers that are infinite or NaN: float16 "):
        example.quantise(features(patches))


def test_features_that_others_wrote_as_nan_are_not_trained_on(tmp_path, monkeypatch):
    patches = np.ones((2, 3), np.float16)
    patches[1, 2] = np.nan
    monkeypatch.setattr(example, "_check_features", lambda features: None)  # another program's
    write_features(tmp_path / "features", example.PatchFeatures, example.encode(features(patches)))
    message = r"-00000-of-00001, record 0: The features of a\.png are not finite: they hold NaN"
    with pytest.raises(UserError, match=message):
        data.open_cached(tmp_path)


def test_int8_features_with_an_infinite_scale_are_not_trained_on(tmp_path, monkeypatch):
    kept = example.quantise(features(np.ones((2, 3), np.float16)))
    kept.scale[1] = 1e30
    monkeypatch.setattr(example, "_check_features", lambda features: None)
    write_features(tmp_path / "features", example.Int8PatchFeatures, example.encode(kept))
    with np.errstate(over="ignore"), pytest.raises(UserError, match="beyond 65504"):
        data.open_cached(tmp_path)


def test_a_batch_with_nan_is_not_taken_for_divergence():
    options = config_lib.Train()
    described = {"kind": "linear", "output": 3, "mlp_ratio": 2, "heads": 1}
    goal = training.objective(options, described, 2)
    patches = np.ones((1, 2, 3), np.float32)
    metrics = {}
    for step, value in enumerate((1.0, np.inf), 1):
        batch = {"patches": patches * value, "labels": np.zeros((1, 2), np.int32)}
        state = training.create_state(goal, 0, 3)
        metrics[step] = training.train_step(state, batch, jnp.eye(3), {}, objective=goal)[1]
    assert [bool(one["patches_finite"]) for one in metrics.values()] == [True, False]
    meter = loop._Meter(options, 2)
    for step, values in jax.device_get(metrics).items():
        meter.add(step, jax.tree.map(jnp.asarray, values), patches=2)
    with pytest.raises(UserError, match=r"in the batch of step 2 are NaN or infinite.*encoder's"):
        meter.take(type("Saved", (), {"wait": lambda self: None})())
