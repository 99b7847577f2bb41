"""SAM: sizes read from shapes, and the same masks as Meta's predictor and mask generator."""

import numpy as np
import pytest
import torch
from labelling_tiny import build_sam, picture, save_sam
from models import at_unit_scale

from fmbseg_jax import config
from fmbseg_jax.errors import UserError
from labelling.sam import checkpoint
from labelling.sam.meta import segment_anything
from labelling.sam.model import Sam, mask_boxes, point_grid

torch.set_num_threads(1)


def bumps(points, side, image_size):
    """What the spotlights add to logits, [p, 3, side, side], and what they multiply them by."""
    at = torch.arange(side) + 0.5
    x, y = (points.mean(1) * (side / image_size)).float().T
    distance = (at - x[:, None])[:, None, :] ** 2 + (at - y[:, None])[:, :, None] ** 2
    radius = torch.tensor([2.0, 5.0, 8.0])[:, None, None]
    bump = 12 * torch.exp(-distance[:, None] / (2 * radius**2)) - 5
    return bump, (0.3 + x / 4)[:, None, None, None]  # steeper to the right


def add_spotlights(model):
    """Adds a bump around the points to the logits: random parameters give masks of everything."""
    seen = {}

    def remember(module, arguments, named):
        seen["points"] = named["points"][0]

    def brighten(module, arguments, output):
        logits, ious = output
        bump, factor = bumps(seen["points"], logits.shape[-1], model.image_encoder.img_size)
        return (logits + bump) * factor, ious

    model.prompt_encoder.register_forward_pre_hook(remember, with_kwargs=True)
    model.mask_decoder.register_forward_hook(brighten)


def add_spotlights_to_ours(sam):
    """The same, of the masks that are wanted."""
    decode, masks, seen = sam.decoder.decode, sam.decoder.masks, {}

    def remember(features, points):
        seen["points"] = points
        return decode(features, points)

    def brighten(decoded, prompt, index):
        logits = masks(decoded, prompt, index)
        bump, factor = bumps(seen["points"], logits.shape[-1], sam.model.image_encoder.img_size)
        return (logits + bump[prompt, index]) * factor[prompt, 0]

    sam.decoder.decode, sam.decoder.masks = remember, brighten


def automatic(sam, embedding, options):
    """Automatic masks at full size, bool [m, H, W], and their predicted IoU."""
    low = sam.automatic_masks(embedding, options)
    none = torch.zeros(0, *embedding.size, dtype=torch.bool)
    return torch.cat([none, *sam.full_size(embedding, low.logits)]), low.ious


@pytest.fixture(scope="module")
def meta():
    """Meta's model as it is."""
    model = build_sam()
    add_spotlights(model)
    return model


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    sam = Sam(save_sam(tmp_path_factory.mktemp("sam") / "sam.pth"))
    add_spotlights_to_ours(sam)
    return sam


SIZES = [(60, 90), (128, 128), (90, 31)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "limits",
    [
        {"pred_iou": 0.0, "stability": 0.0, "nms": 1.0},
        {"pred_iou": 0.9, "stability": 0.8, "nms": 0.7},
        {"pred_iou": 0.0, "stability": 0.7, "nms": 0.3},
    ],
)
def test_automatic_masks_are_those_of_metas_generator(sam, meta, size, limits):
    image = picture(*size)
    generator = segment_anything.SamAutomaticMaskGenerator(
        meta,
        points_per_side=6,
        points_per_batch=10,
        pred_iou_thresh=limits["pred_iou"],
        stability_score_thresh=limits["stability"],
        box_nms_thresh=limits["nms"],
    )
    expected = generator.generate(image)
    options = config.Sam(
        points_per_side=6, points_per_batch=10, min_area=0.0, max_area=1.0, **limits
    )
    masks, scores = automatic(sam, sam.embed(image), options)
    assert len(expected) > 3
    assert limits["nms"] == 1.0 or len(expected) < 100
    np.testing.assert_array_equal(masks, np.stack([e["segmentation"] for e in expected]))
    np.testing.assert_allclose(scores, [e["predicted_iou"] for e in expected], rtol=1e-4)


def test_the_filters_of_the_test_above_do_filter(sam):
    embedding = sam.embed(picture(60, 90))
    counts = [
        len(automatic(sam, embedding, config.Sam(6, 10, iou, stability, nms, 0.0, 1.0))[0])
        for iou, stability, nms in [(0, 0, 1), (0.9, 0, 1), (0, 0.8, 1), (0, 0, 0.7)]
    ]
    assert counts[0] > max(counts[1:]) and min(counts) > 2, counts


@pytest.mark.parametrize("size", SIZES)
def test_point_masks_are_those_of_metas_predictor(sam, meta, size):
    image = picture(*size)
    predictor = segment_anything.SamPredictor(meta)
    predictor.set_image(image)
    points = np.random.default_rng(0).uniform(size=(4, 5, 2)) * size[::-1]
    embedding = sam.embed(image)
    logits, scores = sam.point_masks(embedding, torch.from_numpy(points))
    masks = torch.cat(list(sam.full_size(embedding, logits)))
    for mask, score, group in zip(masks, scores, points, strict=True):
        three, ious, _ = predictor.predict(group, np.ones(5), multimask_output=True)
        np.testing.assert_array_equal(mask, three[ious.argmax()])
        assert score == pytest.approx(ious.max(), abs=1e-5)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.1), (0.1, 0.4)])
def test_area_limits(sam, low, high):
    embedding = sam.embed(picture(60, 90))
    options = config.Sam(6, 10, 0.0, 0.0, 1.0, low, high)
    masks, _ = automatic(sam, embedding, options)
    share = masks.float().mean((1, 2))
    everything, _ = automatic(sam, embedding, config.Sam(6, 10, 0.0, 0.0, 1.0, 0.0, 1.0))
    shares = everything.float().mean((1, 2))
    assert len(masks) == int(((shares >= low) & (shares <= high)).sum()) > 0
    assert share.min() >= low and share.max() <= high


def test_no_mask_survives(sam):
    masks, scores = automatic(sam, sam.embed(picture(60, 90)), config.Sam(4, 64, 9.0))
    assert masks.shape == (0, 60, 90) and masks.dtype == torch.bool and len(scores) == 0


def test_batches_do_not_matter(sam):
    embedding = sam.embed(picture(60, 90))
    one, all_ = (
        automatic(sam, embedding, config.Sam(5, batch, 0.0, 0.5, 0.7, 0.0, 1.0))[0]
        for batch in (1, 64)
    )
    assert torch.equal(one, all_)


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (3, 700)])
def test_shapes_that_metas_rounding_would_make_empty(sam, size):
    embedding = sam.embed(picture(*size))
    masks, _ = automatic(sam, embedding, config.Sam(4, 64, 0.0, 0.0, 0.7, 0.0, 1.0))
    assert masks.shape[1:] == size


def test_grid_is_metas():
    points = point_grid(4, (30, 50)).numpy()
    grid = segment_anything.utils.amg.build_point_grid(4) * [50, 30]
    np.testing.assert_allclose(points, grid)


def test_boxes():
    masks = torch.zeros(2, 5, 7, dtype=torch.bool)
    masks[0, 2, 3] = True
    masks[1, 1:4, 2:7] = True
    masks[1, 2, 4] = False
    assert mask_boxes(masks).tolist() == [[3, 2, 3, 2], [2, 1, 6, 3]]


def test_round_trip(tmp_path):
    original = build_sam()
    loaded = checkpoint.load(save_sam(tmp_path / "sam.pth"))
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    image = torch.from_numpy(picture(64, 64)).permute(2, 0, 1)
    outputs = []
    for model in (original, loaded):
        batch = [{"image": image, "original_size": (64, 64), "point_coords": torch.ones(1, 1, 2),
                  "point_labels": torch.ones(1, 1)}]  # fmt: skip
        outputs.append(model(batch, multimask_output=True)[0])
    for name in outputs[0]:
        assert torch.equal(outputs[0][name], outputs[1][name]), name


def test_float16_files_become_float32(tmp_path):
    tensors = {name: t.half() for name, t in build_sam().state_dict().items()}
    torch.save(tensors, tmp_path / "half.pth")
    model = checkpoint.load(tmp_path / "half.pth")
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}
    assert {p.device.type for p in [*model.parameters(), *model.buffers()]} == {"cpu"}


@pytest.mark.parametrize("kind", ["vit_b", "vit_l", "vit_h"])
def test_sizes_of_the_published_models(kind):
    with torch.device("meta"):
        published = segment_anything.sam_model_registry[kind]()
        ours = checkpoint.build(published.state_dict())
    shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (published, ours)]
    assert shapes[0] == shapes[1]
    for a, b in zip(published.image_encoder.blocks, ours.image_encoder.blocks, strict=True):
        assert (a.window_size, a.attn.num_heads) == (b.window_size, b.attn.num_heads)
    for a, b in zip(published.modules(), ours.modules(), strict=True):
        assert type(a) is type(b)
        assert getattr(a, "eps", None) == getattr(b, "eps", None)
        assert getattr(a, "num_heads", None) == getattr(b, "num_heads", None)
    assert published.image_encoder.img_size == ours.image_encoder.img_size == 1024
    assert published.prompt_encoder.input_image_size == ours.prompt_encoder.input_image_size
    assert published.prompt_encoder.image_embedding_size == (64, 64)


def _without(name):
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("prompt_encoder.no_mask_embed.weight"), "no_mask_embed.weight is missing"),
        (_without("image_encoder.pos_embed"), "no tensor 'image_encoder.pos_embed'"),
        (_without("image_encoder.blocks.1.attn.rel_pos_h"), "no tensor .*blocks.1.attn.rel_pos_h"),
        (lambda t: t.update(extra=torch.ones(1)), "extra is one too many"),
        (
            lambda t: t.update({"image_encoder.blocks.0.norm1.bias": torch.ones(7)}),
            r"norm1.bias has shape \(7,\), not \(24,\)",
        ),
        (
            lambda t: t.update({"image_encoder.blocks.1.attn.rel_pos_h": torch.ones(7, 12)}),
            "windows of several sizes",
        ),
    ],
)
def test_damaged_checkpoints(tmp_path, damage, message):
    tensors = build_sam().state_dict()
    damage(tensors)
    torch.save(tensors, tmp_path / "sam.pth")
    with pytest.raises(UserError, match=message):
        checkpoint.load(tmp_path / "sam.pth")


def test_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="No SAM checkpoint at .*sam_vit_h_4b8939.pth"):
        checkpoint.load(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UserError, match="torch cannot read it"):
        checkpoint.load(tmp_path / "text.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="expected a dict of tensors"):
        checkpoint.load(tmp_path / "list.pth")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="it has no tensor"):
        checkpoint.load(tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("model", "tensor"),
    [
        ("SAM-HQ", "mask_decoder.hf_token.weight"),
        ("MobileSAM", "image_encoder.layers.0.blocks.0.conv1.c.weight"),
        ("SAM 2", "image_encoder.trunk.pos_embed"),
    ],
)
def test_successors_of_sam_are_named(tmp_path, model, tensor):
    tensors = build_sam().state_dict() | {tensor: torch.ones(1, 24)}
    whole = {"model": tensors} if model == "SAM 2" else tensors
    torch.save(whole, tmp_path / "other.pth")
    with pytest.raises(UserError, match=f"is a checkpoint of {model}, which is another architect"):
        checkpoint.load(tmp_path / "other.pth")
    (tmp_path / "config.json").write_text('{"model_type": "sam2_video"}')
    with pytest.raises(UserError, match="is SAM 2; the model of masks is a sam, such as facebook"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("name", ["wanglab/medsam-vit-base", "nielsr/slimsam-50-uniform"])
def test_any_name_on_the_hub_may_be_a_sam(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"hf download {name}"):
        checkpoint.load(name)
    with pytest.raises(UserError, match="No SAM checkpoint at some/medsam_vit_b.pth"):
        checkpoint.load("some/medsam_vit_b.pth")


def test_transformers_files_are_read(tmp_path, monkeypatch):
    """A SamModel as transformers saves it: the same masks as transformers gives."""
    from transformers import SamConfig, SamModel

    shape = {"image_size": 64, "patch_size": 8}
    made = SamConfig(
        vision_config={
            **shape, "hidden_size": 24, "output_channels": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "window_size": 3, "global_attn_indexes": [1], "mlp_dim": 48,
            "num_pos_feats": 16,
        },
        prompt_encoder_config={**shape, "hidden_size": 32, "mask_input_channels": 8},
        mask_decoder_config={
            "hidden_size": 32, "mlp_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 8,
            "iou_head_hidden_dim": 20, "iou_head_depth": 3,
        },
    )  # fmt: skip
    theirs = at_unit_scale(SamModel(made), seed=3)
    theirs.save_pretrained(tmp_path)
    ours = Sam(tmp_path)
    image = picture(64, 64)
    points = torch.tensor([[[10.0, 20.0], [30.0, 40.0]], [[50.0, 8.0], [5.0, 60.0]]])
    low = ours.point_masks(ours.embed(image), points)
    pixels = ours.model.preprocess(torch.from_numpy(image).permute(2, 0, 1))[None]
    labels = torch.ones(1, 2, 2, dtype=torch.int)
    with torch.no_grad():
        expected = theirs(pixels, input_points=points[None], input_labels=labels)
    ious, best = expected.iou_scores[0].max(1)
    np.testing.assert_allclose(low.ious, ious, atol=1e-4 * ious.abs().max())
    masks = expected.pred_masks[0][torch.arange(2), best]
    np.testing.assert_allclose(low.logits, masks, atol=1e-4 * masks.abs().max())
    tensors = checkpoint.read(tmp_path)
    assert tensors.keys() == checkpoint.load(tmp_path).state_dict().keys()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="hf download nobody/sam-vit-base"):
        Sam("nobody/sam-vit-base")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(sam, tmp_path, dtype):
    """Multiplied in half, kept in float32; nearly the same masks."""
    half = Sam(save_sam(tmp_path / "sam.pth"), dtype=dtype)
    add_spotlights_to_ours(half)
    options = config.Sam(6, 64, 0.0, 0.8, 0.7, 0.0, 1.0)
    one, other = (automatic(s, s.embed(picture(60, 90)), options)[0] for s in (sam, half))
    assert abs(len(one) - len(other)) <= 0.2 * len(one)
    points = torch.from_numpy(np.random.default_rng(0).uniform(size=(4, 5, 2)) * (90, 60))
    lows = [s.point_masks(s.embed(picture(60, 90)), points) for s in (sam, half)]
    assert {low.logits.dtype for low in lows} == {torch.float32}
    assert 0 < (lows[0].ious - lows[1].ious).abs().max() < 0.05 * lows[0].ious.abs().max()
    same = (lows[0].logits > 0) == (lows[1].logits > 0)
    assert same.float().mean() > 0.95


def test_large_images_are_measured_smaller(sam, monkeypatch):
    """Areas and stability at the encoder's resolution: nearly the same masks are kept."""
    embedding = sam.embed(picture(60, 90))
    options = config.Sam(6, 10, 0.0, 0.7, 0.7, 0.0, 0.6)
    exact, _ = automatic(sam, embedding, options)
    monkeypatch.setattr("labelling.sam.model._COUNTED_WHOLE", 0)
    near, _ = automatic(sam, embedding, options)
    assert near.shape[1:] == exact.shape[1:]
    flat = exact.flatten(1).float(), near.flatten(1).float()
    overlap = flat[0] @ flat[1].T
    union = flat[0].sum(1)[:, None] + flat[1].sum(1) - overlap
    assert abs(len(exact) - len(near)) <= 0.1 * len(exact)
    assert ((overlap / union).max(1).values > 0.99).float().mean() > 0.9
