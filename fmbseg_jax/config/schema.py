"""The configuration: one dataclass tree, a comment for every field, no hidden default.

A config file in `configs/` has a function `get_config() -> Config`; every field can be set on the
command line, as in `--config.train.batch_size=64`. "Ours" in a comment marks a value that the paper
leaves open (its appendix is not public).
"""

# No `from __future__ import annotations`: ml_collections reads the types of the fields.
import dataclasses
import difflib
from pathlib import Path
from typing import Any

from fmbseg_jax.config import checks
from fmbseg_jax.config.reading import Reading
from fmbseg_jax.errors import UserError


class _Section:
    """Refuses fields that do not exist, and names the nearest one that does."""

    def __setattr__(self, name: str, value: Any) -> None:
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UserError(
                f"The config section {type(self).__name__} has no field {name!r}.{hint} "
                f"It has: {', '.join(names)}."
            )
        super().__setattr__(name, value)


def _section(kind: type) -> Any:
    return dataclasses.field(default_factory=kind)


@dataclasses.dataclass
class Data(_Section):
    """The user's images and words."""

    images: str = ""
    """Folder of the images to learn from; its sub-folders count too."""
    words: str = ""
    """Word list: a text file, one word a line; or words separated by commas."""
    image_labels: str = ""
    """File of image-level labels, if there are any: lines `path<TAB>word,word`. They take the
    place of CLIP's votes for the images it names (the paper's semi-supervised variant)."""
    annotations: str = ""
    """Folder of label PNGs, if there are any: `NAME.png` with word indices for each image. They
    take the place of stage 1: this is how the ceiling, training on the truth, is measured."""
    deep: str = "file"
    """How more than 8 bits a channel become 8: "file", from an image's lowest to its highest value
    (one range for its three channels); "type", from 0 to the largest value that the type holds,
    which for floating point is 1."""
    max_megapixels: int = 178
    """The most pixels of an image, in millions: a small file may claim to be a huge image."""

    @property
    def reading(self) -> Reading:
        """How images are read for labelling, features and training."""
        return Reading(self.deep, self.max_megapixels, "--config.data.")


@dataclasses.dataclass
class Models(_Section):
    """The frozen foundation models: folders in published layout, or Hugging Face hub ids, which may
    name a commit, tag or branch: facebook/dinov2-large@REVISION."""

    clip: str = "openai/clip-vit-large-patch14"
    """CLIP: labels (stage 1), and the text features of training and inference."""
    sam: str = "sam_vit_h_4b8939.pth"
    """SAM: a checkpoint file of Meta's segment-anything, or a folder or hub id such as
    facebook/sam-vit-huge; its sizes are read from its shapes."""
    vision: str = "facebook/dinov2-large"
    """The self-supervised vision encoder that gets aligned with text."""


@dataclasses.dataclass
class Sam(_Section):
    """Automatic masks of stage 1.2. All but the areas are segment-anything's own values."""

    points_per_side: int = 32
    """Query points along each side of the image."""
    points_per_batch: int = 64
    """Query points decoded at once; memory, not results."""
    pred_iou: float = 0.88
    """Masks whose predicted IoU is lower are dropped."""
    stability: float = 0.95
    """Masks whose IoU between thresholds -1 and +1 of the logits is lower are dropped."""
    nms: float = 0.7
    """Of two masks whose boxes overlap by more (IoU), the one of lower predicted IoU is dropped."""
    min_area: float = 0.001
    """Smallest mask, as a share of the image: "constrain the masks by size". Ours."""
    max_area: float = 0.95
    """Largest mask, as a share of the image. Ours."""


@dataclasses.dataclass
class Label(_Section):
    """Stage 1: CLIP and SAM write pseudo labels (paper, section 3.2)."""

    short_side: int = 448
    """The image is resized to this short side before it is cropped, in pixels. Ours."""
    crop: int = 224
    """Side of CLIP's crops, in pixels: its native input. Ours."""
    stride: int = 112
    """Step between crops, in pixels, rounded down to whole patches of CLIP. Ours."""
    min_crops: int = 2
    """A word is in the image if at least so many crops vote for it: "more than a predefined
    number of crops". Ours."""
    points_per_word: int = 5
    """Query points for each word: the patches most similar to it (stage 1.1)."""
    template: str = "a photo of a {}."
    """The sentence given to CLIP's text encoder: "one standard template"."""
    stages: str = "both"
    """"1.1" (masks from points), "1.2" (automatic masks, classified), or "both"."""
    combine: str = "similarity"
    """Where masks of several words overlap: "similarity" gives the pixel to the word with the
    highest dense similarity, "area" to the smallest mask, as if larger masks were painted first.
    The paper says only that both stages together beat each. Ours."""
    images_per_shard: int = 250
    """Images in each TFRecord shard: the unit of work, and of what a killed run does again."""
    device: str = "auto"
    """Where CLIP and SAM run: "cpu", "cuda" (all GPUs), "cuda:1", ..., or "auto"."""
    compute: str = "auto"
    """What they multiply in: "float32", "float16" or "bfloat16"; "auto" is float16 on a GPU and
    float32 on a CPU. Results are float32."""
    sam: Sam = _section(Sam)


@dataclasses.dataclass
class Features(_Section):
    """Patch features of the frozen vision encoder, cached for training."""

    size: int = 448
    """Images are resized to size × size pixels, 32 × 32 patches of 14: the evaluation's window. The
    aspect ratio gives way so that all images have one shape and no pixel is lost. Ours."""
    batch_size: int = 8
    """Images encoded at once by each process, over its devices; memory and speed, not results."""
    compute: str = "float32"
    """What the encoder computes in: "float32", or "bfloat16", for accelerators."""
    dtype: str = "float16"
    """What is kept: "float16", or "int8" with a scale for each patch, half the size. Ours."""
    threads: int = 16
    """Images decoded, or records read, at once by each process; speed, not results."""


@dataclasses.dataclass
class Train(_Section):
    """Stage 2: the aligner (paper, section 3.3)."""

    aligner: str = "block"
    """"linear", "mlp" or "block": Table 2 of the paper."""
    heads: int = 16
    """Attention heads of the block; 64 channels each for ViT-L. Ours."""
    mlp_ratio: int = 4
    """Hidden width of the block's MLP over its width. Ours."""
    features: str = "cached"
    """"cached": patch features that `fmbseg_jax.features` wrote; "online": the frozen encoder runs
    in every step, which needs no disk."""
    compute: str = "float32"
    """What the aligner and the loss multiply in: "float32", or "bfloat16", for accelerators.
    Parameters, sums and the optimizer are float32."""
    start_from: str = ""
    """Export of an aligner to start from, on other images and words: the paper's fine-tuning on the
    target data set. "" starts afresh."""
    loss: str = "tsupcon"
    """"tsupcon", "supcon" or "prototype": Table 2 of the paper."""
    temperature: float = 0.03
    """Similarities are divided by it. The equations have none (1.0), and a softmax over cosines is
    then nearly flat. Ours, by benchmarks/sweep.py."""
    text_weight: float = 1.0
    """Weight of the text terms of equation 1; 1.0 is as printed, and the best of
    benchmarks/sweep.py."""
    balanced: bool = True
    """Whether each of the two sums of equation 1 is divided by its own number of terms. As printed
    (False), a few text terms stand against thousands of patch terms, and patches cluster without
    meeting their words. Of "tsupcon" alone. Ours."""
    optimizer: str = "sgd"
    """"sgd" (the paper) or "adamw"."""
    momentum: float = 0.9
    """Momentum of SGD. Ours."""
    peak_lr: float = 0.1
    """Highest learning rate, at the end of the warm-up; falls to 0 along a cosine. Ours, for the
    block by benchmarks/sweep.py."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises linearly. Ours."""
    weight_decay: float = 0.0
    """Decay of the weight matrices (not of norms and biases). Ours."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them. Ours."""
    batch_size: int = 5
    """Images in a step, over all devices."""
    images_per_pass: int = 0
    """Images that a device puts through the aligner at once, 0 for all: memory, not results. The
    loss and its gradient are those of the whole batch; adding up the gradients of smaller batches
    would leave out the pairs between them, so there is no such option."""
    patches_per_image: int = 0
    """Patches drawn anew from each image in each step for the loss, labelled ones first; 0 takes
    all. For batches of hundreds of images: the loss takes time quadratic in the patches. Ours."""
    epochs: int = 10
    """Passes over the images."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints that stay: so many of the last, and the best by validation, or else by loss."""
    log_every: int = 20
    """Steps between lines of the log."""
    validate_on: str = ""
    """A small annotated folder (images/, labels/, words.txt), or a work folder with pseudo labels,
    to measure the zero-shot mIoU on while training; "" measures nothing."""
    validate_every: int = 500
    """Steps between these measurements."""
    validate_images: int = 20
    """How many of its images are looked at, evenly spread."""
    export: str = "last"
    """Which aligner is exported: "last", or "best", of the checkpoints."""


@dataclasses.dataclass
class Eval(_Section):
    """Evaluation and inference (TCL's protocol, which the paper follows)."""

    folder: str = ""
    """Annotated folder to evaluate on: images/, labels/ and words.txt."""
    data: str = "data"
    """Folder that the published benchmarks lie in; docs/reproduce.md says how."""
    template: str = "a photo of a {}."
    """The sentence given to CLIP's text encoder; or a text file with several, one a line."""
    classes: str = ""
    """Class names in place of the benchmark's own, as many: a file with one a line, or `sofa;couch`
    where the best of several stands for the class."""
    average: str = "unit"
    """Of several templates: "unit" averages features of unit length (SCLIP's family), "plain" as
    they come from CLIP (TCL)."""
    short_side: int = 448
    """The image is resized to this short side, in pixels; the long side is at most 2048."""
    antialias: bool = False
    """Whether shrinking takes the mean of what falls on a pixel. The protocol's bilinear does not;
    `fmbseg_jax.load`, for photographs many times larger than a benchmark's, does."""
    window: int = 448
    """Side of the sliding window, in pixels of the resized image."""
    stride: int = 224
    """Step between windows, in pixels."""
    batch_size: int = 8
    """Windows encoded at once on each device; more where a GPU or TPU has room."""
    compute: str = "float32"
    """What the vision encoder multiplies in: "float32", or "bfloat16", for accelerators."""
    background: str = "auto"
    """How class 0 is found where it is the background: "words", as the best of `background_words`;
    "threshold", as what no class reaches `threshold` at; "none", by its own name; "auto", as the
    published benchmark has it (data/published.py), and "none" for a folder of one's own."""
    background_words: str = "background26"
    """"background26" (SCLIP's), "stuff91" (COCO-Stuff's), a file, or words separated by commas.
    The paper adds "different stuff categories" for PV-21; which, it does not say."""
    threshold: float = 0.0
    """Cosine similarity below which a pixel is background, with background = "threshold"."""
    pamr: int = 0
    """Iterations of PAMR over the similarities; 0 is none, the protocol's way. Peers take 10."""
    deep: str = "file"
    """As data.deep, of the images that are segmented."""
    max_megapixels: int = 178
    """As data.max_megapixels, of the images that are segmented."""

    @property
    def reading(self) -> Reading:
        """How images are read for evaluating and segmenting."""
        return Reading(self.deep, self.max_megapixels, "--config.eval.")


@dataclasses.dataclass
class Config(_Section):
    """One experiment, all stages."""

    seed: int = 0
    """Seeds the aligner's parameters and the order of the images."""
    data: Data = _section(Data)
    models: Models = _section(Models)
    label: Label = _section(Label)
    features: Features = _section(Features)
    train: Train = _section(Train)
    eval: Eval = _section(Eval)

    def validate(self, name: str = "The config") -> "Config":
        """Returns self; raises UserError with every fault at once, which calls it `name`."""
        faults = list(checks.faults(flatten(self)))
        if faults:
            raise UserError(f"{name} cannot be used:\n  " + "\n  ".join(faults))
        return self


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """All leaves of a config by dotted name, as `train.batch_size`."""
    leaves: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            leaves |= flatten(value, f"{prefix}{field.name}.")
        else:
            leaves[prefix + field.name] = value
    return leaves


def unflatten(leaves: dict[str, Any]) -> Config:
    """The inverse of `flatten`; fields that `leaves` lacks keep their defaults."""
    config = Config()
    for name, value in leaves.items():
        *sections, field = name.split(".")
        part: Any = config
        for section in sections:
            part = getattr(part, section)
        setattr(part, field, value)
    return config


def resolve(source: str) -> str:
    """A model source as an absolute path; a hub id, which is no path, unchanged."""
    return str(Path(source).resolve()) if Path(source).exists() else source
