"""Stage 1 beside the plain way, on the same images with the same models; and 2 workers beside 1.

    python benchmarks/labelling.py [--images=24] [--workers] [--memory]
    python benchmarks/labelling.py --published --random_sam=vit_h --clip=FOLDER --folder=PHOTOS

The plain way: crops one by one through CLIP, SamPredictor word by word, SamAutomaticMaskGenerator
(which encodes the image again), masks at full resolution. Prints seconds an image (the median of
passes in turn), their ratio, the share of pixels whose label agrees, and how long our models
waited.
--workers labels the scenes by 1 and by 2 processes; --memory one image of 4,000 × 3,000 pixels.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from absl import app, flags

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs import toy  # noqa: E402
from fmbseg_jax.config import Config  # noqa: E402
from fmbseg_jax.data import finding, images  # noqa: E402
from fmbseg_jax.pretrained import config_json  # noqa: E402
from fmbseg_jax.vocabulary import IGNORE, prompts  # noqa: E402
from labelling import clip, detection, models, stage1  # noqa: E402
from labelling.compose import pixel_similarities  # noqa: E402
from labelling.sam import checkpoint as sam_checkpoint  # noqa: E402
from labelling.sam import model as sam  # noqa: E402
from labelling.sam.meta import segment_anything  # noqa: E402
from labelling.shards.worker import ahead  # noqa: E402
from toyworld import scenes  # noqa: E402

ROUNDS = flags.DEFINE_integer("rounds", 3, "Timed passes over the images, by each in turn.")
COUNT = flags.DEFINE_integer("images", 24, "Toy scenes, or photographs, to label.", lower_bound=2)
FOLDER = flags.DEFINE_string("folder", "", "Folder of photographs, instead of the toy scenes.")
CLIP = flags.DEFINE_string("clip", "toyworld/weights/clip", "Folder or hub id.")
SAM = flags.DEFINE_string("sam", "toyworld/weights/sam.pth", "Checkpoint, folder or hub id.")
RANDOM = flags.DEFINE_enum("random_sam", None, ["vit_b", "vit_l", "vit_h"], "Random weights.")
PUBLISHED = flags.DEFINE_bool("published", False, "The published models' sizes and thresholds.")
WORKERS = flags.DEFINE_bool("workers", False, "Also 2 worker processes beside 1.")
MEMORY = flags.DEFINE_bool("memory", False, "Also the peak of memory for a large image.")


class Plain:
    """Stage 1 as one writes it from the libraries' own examples."""

    def __init__(self, source: str, checkpoint: str, config: Config, device: str):
        from transformers import AutoTokenizer, CLIPModel

        self._options, self._device = config.label, device
        self._clip: Any = CLIPModel.from_pretrained(source).eval().to(device)
        self._mean, self._std = config_json.normalisation(Path(source), source)
        model = sam_checkpoint.load(checkpoint, device)
        options = self._options.sam
        self._predictor = segment_anything.SamPredictor(model)
        self._generator = segment_anything.SamAutomaticMaskGenerator(
            model, options.points_per_side, options.points_per_batch, options.pred_iou,
            options.stability, box_nms_thresh=options.nms,
        )  # fmt: skip
        self._tokenizer = AutoTokenizer.from_pretrained(source)

    @torch.inference_mode()
    def text(self, words: tuple[str, ...]) -> np.ndarray:
        features = []
        for sentence in prompts(words, self._options.template):
            ids = self._tokenizer(sentence, return_tensors="pt").input_ids.to(self._device)
            features.append(self._clip.get_text_features(input_ids=ids).pooler_output[0])
        return _unit(torch.stack(features).cpu().numpy())

    @torch.inference_mode()
    def label(self, image: np.ndarray, text: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] → uint16 [H, W]."""
        size, options = image.shape[:2], self._options
        tokens, dense = self._features(image)
        found, _ = detection.vote(tokens @ text.T, options.min_crops)
        if not len(found):
            return np.full(size, IGNORE, np.uint16)
        similarities = (dense @ text.T)[..., found]
        strips = [values for _, values in pixel_similarities(similarities, size)]
        pixels = np.concatenate(strips, axis=1)
        covered = np.zeros((len(found), *size), bool)
        rows, columns = (np.arange(n) * m // n for n, m in zip(size, dense.shape, strict=False))
        full = dense[rows[:, None], columns]  # each pixel has the feature of its patch
        self._predictor.set_image(image)
        points = stage1.query_points(similarities, size, options.points_per_word)
        for i, group in enumerate(points):
            masks, scores, _ = self._predictor.predict(
                group, np.ones(len(group)), multimask_output=True
            )
            covered[i] |= masks[scores.argmax()]
        for entry in self._generator.generate(image):
            mask = entry["segmentation"]
            if options.sam.min_area <= mask.mean() <= options.sam.max_area:
                covered[int((full[mask].mean(0) @ text[found].T).argmax())] |= mask
        best = np.where(covered, pixels, -np.inf).argmax(0)
        return np.where(covered.any(0), found[best], IGNORE).astype(np.uint16)

    def _features(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Class tokens [c, D] and dense features [h, w, D], crop by crop."""
        options, vision = self._options, self._clip.vision_model
        patch = self._clip.config.vision_config.patch_size
        sides = images.resized_shape(image.shape[0], image.shape[1], options.short_side)
        height, width = (-(-side // patch) * patch for side in sides)
        pixels = images.normalise(images.resize(image, (height, width)), self._mean, self._std)
        total = np.zeros((height // patch, width // patch, self._clip.config.projection_dim))
        tokens, side = [], options.crop // patch
        for y, x in clip.crop_corners((height, width), options.crop, options.stride, patch):
            crop = pixels[y : y + options.crop, x : x + options.crop].transpose(2, 0, 1)[None]
            out = vision(
                torch.from_numpy(np.ascontiguousarray(crop)).to(self._device),
                output_hidden_states=True, interpolate_pos_encoding=True,
            )  # fmt: skip
            last = vision.encoder.layers[-1]
            values = last.self_attn.v_proj(last.layer_norm1(out.hidden_states[-2]))
            values = vision.post_layernorm(last.self_attn.out_proj(values))
            values = self._clip.visual_projection(values)[0, 1:].cpu().numpy()
            tokens.append(self._clip.visual_projection(out.pooler_output)[0].cpu().numpy())
            total[y // patch :, x // patch :][:side, :side] += values.reshape(side, side, -1)
        return _unit(np.stack(tokens)), _unit(total).astype(np.float32)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def beside(config: Config, photographs: list[np.ndarray], words: tuple[str, ...]) -> None:
    """The two ways in turn."""
    device = models.devices("auto")[0]
    dtype = "float32" if device == "cpu" else "float16"
    if device == "cpu":
        models.keep_freed_memory()  # for both: they share a process
    plain = Plain(config.models.clip, config.models.sam, config, device)
    ours = stage1.Labeller(
        clip.Clip(config.models.clip, device, dtype),
        sam.Sam(config.models.sam, device, dtype),
        words,
        config.label,
    )
    text, busy = plain.text(words), 0.0

    def seen(image: np.ndarray) -> stage1.Scene:
        nonlocal busy
        start = time.perf_counter()
        scene = ours.look(image)
        busy += time.perf_counter() - start
        return scene

    def composed(scene: stage1.Scene) -> np.ndarray:
        return scene.labels(config.label.combine)

    ways: dict[str, Callable[[], list[np.ndarray]]] = {
        "plain": lambda: [plain.label(image, text) for image in photographs],
        "ours": lambda: [*ahead(composed, map(seen, photographs), 1)],
    }
    maps, seconds = {}, {name: list[float]() for name in ways}
    for name in [*ways] * (1 + ROUNDS.value):  # the first round warms up
        busy, start = 0.0, time.perf_counter()
        maps[name] = ways[name]()
        seconds[name].append((time.perf_counter() - start) / len(photographs))
    waited = 1 - busy / (seconds["ours"][-1] * len(photographs))
    times = {name: float(np.median(some[1:])) for name, some in seconds.items()}
    agreement = [np.mean(a == b) for a, b in zip(maps["plain"], maps["ours"], strict=True)]
    print(f"{len(photographs)} images, on {device}, {dtype}")
    for name, value in times.items():
        print(f"  {name:6} {value:8.3f} s an image, {times['plain'] / value:.2f} × the plain way")
    print(f"  the models waited {waited:.1%} of the time")
    print(f"  labels agree on {np.mean(agreement):.2%} of pixels, {np.min(agreement):.2%} at least")


def workers() -> None:
    """The program with 1 and with 2 processes, on 4 × COUNT toy scenes; models are loaded in it."""
    with tempfile.TemporaryDirectory() as folder:
        scenes.write_folder(Path(folder, "scenes"), "train", 4 * COUNT.value)
        for count in (1, 2):
            command = [
                sys.executable, "-m", "labelling", "--config=configs/toy.py",
                f"--workdir={folder}/{count}", f"--images={folder}/scenes/images",
                f"--words={folder}/scenes/words.txt", f"--workers={count}",
                "--config.label.images_per_shard=6",
            ]  # fmt: skip
            done = subprocess.run(
                command, cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            speed = next(line for line in done.stdout.decode().splitlines() if "images/s" in line)
            print(f"  {count} worker{'s' * (count > 1)}: {speed}")


def memory() -> None:
    """The peak of a process that labels an image of 12 megapixels."""
    code = """
import sys
sys.path[:0] = ["."]
import numpy as np
from configs import toy
from fmbseg_jax.vocabulary import read_words
from labelling import clip, stage1
from labelling.sam import model as sam
def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1e6
config = toy.get_config()
ours = stage1.Labeller(clip.Clip(config.models.clip), sam.Sam(config.models.sam),
    ("sky", "grass", "sea", "sand"), config.label)
rng = np.random.default_rng(0)
small = rng.integers(0, 255, (30, 40, 3), np.uint8)
ours.look(small).labels("similarity")
before = peak()
config.label.sam.pred_iou = config.label.sam.stability = 0.0
config.label.sam.nms = 0.9
scene = ours.look(np.kron(small, np.ones((100, 100, 1), np.uint8)))
scene.labels("similarity")
print(f"{len(scene.masks)} masks of 4,000 x 3,000: {peak():.2f} GB at the peak, "
      f"{before:.2f} before")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    print(f"  {done.stdout.decode().strip()}")


def random_sam(kind: str, folder: Path) -> str:
    """A checkpoint of a published size, of random weights: for speed alone."""
    model = segment_anything.sam_model_registry[kind]()
    torch.save(model.state_dict(), folder / "sam.pth")
    return str(folder / "sam.pth")


def main(_: list[str]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        config = Config() if PUBLISHED.value else toy.get_config()
        config.models.clip = CLIP.value
        config.models.sam = SAM.value
        if RANDOM.value:
            config.models.sam = random_sam(RANDOM.value, Path(temporary))
            config.label.sam.pred_iou = config.label.sam.stability = 0.0  # it knows nothing
        if FOLDER.value:
            names = finding.find_images(FOLDER.value)[: COUNT.value]
            photographs = [images.decode(Path(FOLDER.value, name).read_bytes()) for name in names]
        else:
            first = scenes.SPLITS["validation"]
            photographs = [scenes.scene(first + i).image for i in range(COUNT.value)]
        beside(config, photographs, tuple(scenes.WORDS))
    if WORKERS.value:
        workers()
    if MEMORY.value:
        memory()


if __name__ == "__main__":
    app.run(main)
