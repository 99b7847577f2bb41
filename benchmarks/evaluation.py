"""Evaluation beside the plain way, with the same encoder weights, in one run.

    python benchmarks/evaluation.py [--images=12] [--words=171] [--model=facebook/dinov2-small]
    python benchmarks/evaluation.py --memory [--size=1024,2048 --words=150]

The plain way is what one writes first in PyTorch: one image at a time, one window at a time,
similarities of every window upsampled to its pixels, added, divided, resized, argmax, numpy's
bincount. Random weights of a published size; images of 480 × 640 pixels, as COCO's mostly are.
Prints the whole evaluation, and stitching + argmax + counting alone; the label maps are compared.
--memory prints the peak of a process for one large image, by each.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

IMAGES = flags.DEFINE_integer("images", 12, "Images in a pass.")
SIZE = flags.DEFINE_list("size", ["480", "640"], "Their height and width.")
WORDS = flags.DEFINE_integer("words", 171, "K.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Passes of each, in turn.")
NAMES = [f"facebook/dinov2-{size}" for size in ("small", "base", "large", "giant")]
NAME = flags.DEFINE_enum("model", NAMES[0], NAMES, "Whose architecture.")
COMPUTE = flags.DEFINE_enum("compute", "float32", ["float32", "bfloat16"], "The encoder's dtype.")
BATCH = flags.DEFINE_integer("batch", 8, "Windows at once, of ours.")
MEMORY = flags.DEFINE_bool("memory", False, "Weigh one image instead.")
FOLDER = flags.DEFINE_string("folder", "", "Where the random model lies; made if empty.")
ONLY = flags.DEFINE_enum("only", "", ["", "ours", "plain"], "Run one alone, to weigh its memory.")
OUTPUT, WINDOW, STRIDE = 512, 448, 224


class Photographs:
    """Images, labels and text features, the same for both."""

    def __init__(self, count: int):
        from fmbseg_jax.data import images

        height, width = map(int, SIZE.value)
        random = np.random.default_rng(0)
        coarse = random.integers(0, 256, (count, 30, 40, 3), np.uint8)
        self.images = [images.resize(one, (height, width)) for one in coarse]
        blocks = random.integers(0, WORDS.value, (count, 15, 20))
        self.labels = [images.resize_labels(one, (height, width)) for one in blocks]
        text = random.normal(size=(WORDS.value, OUTPUT)).astype(np.float32)
        self.text = text / np.linalg.norm(text, axis=1, keepdims=True)


def aligner_params(width: int) -> dict[str, Any]:
    random = np.random.default_rng(1)

    def layer(inputs: int, outputs: int) -> dict[str, Any]:
        kernel = random.normal(size=(inputs, outputs)).astype(np.float32) * inputs**-0.5
        return {"kernel": kernel, "bias": np.zeros(outputs, np.float32)}

    return {"hidden": layer(width, 4 * width), "projection": layer(4 * width, OUTPUT)}


class Ours:
    """Our segmenter and counts."""

    def __init__(self, folder: Path, photographs: Photographs):
        from fmbseg_jax.config import Eval
        from fmbseg_jax.methods.aligned import Aligned
        from fmbseg_jax.segmentation.segmenter import Segmenter
        from fmbseg_jax.vocabulary.classes import Classes

        described = {"kind": "mlp", "output": OUTPUT, "mlp_ratio": 4, "heads": 1}
        model = {"aligner": described, "vision": {"hash": ""}}
        aligned = Aligned(model, str(folder), COMPUTE.value)
        aligned.use(aligner_params(aligned.shapes["hidden"]["kernel"].shape[0]))
        protocol = Eval(batch_size=BATCH.value, compute=COMPUTE.value)
        toy = Path(__file__).resolve().parent.parent / "toyworld" / "weights" / "clip"
        segmenter: Any = Segmenter(aligned, str(toy), "toy", protocol)
        segmenter._text = lambda *_, **__: photographs.text  # no words are encoded
        self._segmenter = segmenter
        self._classes = Classes.of([f"word {i}" for i in range(WORDS.value)])

    def evaluate(self, photographs: Photographs) -> tuple[list[np.ndarray], np.ndarray]:
        """Label maps, and the confusion matrix."""
        from fmbseg_jax.evaluation.scoring import Counts
        from fmbseg_jax.io.threads import in_order

        def read(i: int) -> Any:
            return i, self._segmenter.prepare(photographs.images[i])

        prepared = in_order(len(photographs.images), read, 2)
        found, total = [], np.zeros((WORDS.value, WORDS.value + 1), np.int64)
        for i, labels, *_ in self._segmenter.label_maps(prepared, self._classes):
            counts = Counts.of(labels, photographs.labels[i], WORDS.value)
            total += counts.confusion(WORDS.value)
            found.append(labels)
        return found, total

    def stitch(self, similarities: Any, photographs: Photographs) -> Callable[[], Any]:
        from fmbseg_jax.evaluation.scoring import Counts

        layout = self._segmenter.prepare(photographs.images[0]).layout

        def run() -> Any:
            labels = layout.segment(similarities).labels.astype(np.uint16)
            return Counts.of(labels, photographs.labels[0], WORDS.value)

        return run


class Plain:
    """The same in PyTorch, one image and one window at a time."""

    def __init__(self, folder: Path, photographs: Photographs):
        import torch
        from transformers import Dinov2Model

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, COMPUTE.value)
        model: Any = Dinov2Model.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        self._model, self._dtype = model.to(self._device).eval(), dtype
        params = aligner_params(model.config.hidden_size)
        self._layers = [
            {name: torch.from_numpy(value).to(self._device) for name, value in layer.items()}
            for layer in (params["hidden"], params["projection"])
        ]
        self._text = torch.from_numpy(photographs.text).to(self._device)

    def windows(self, image: np.ndarray) -> tuple[tuple[int, int], list[Any]]:
        """Size of the resized image, and by window its corner and similarities [1, K, h, w]."""
        import torch
        from torch.nn.functional import gelu, interpolate, normalize

        from fmbseg_jax.data import images

        height, width = images.resized_shape(image.shape[0], image.shape[1], WINDOW)
        planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        resized = interpolate(planes, size=(height, width), mode="bilinear").round()
        normal = images.normalise(
            resized[0].permute(1, 2, 0).numpy(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        )
        pixels = torch.from_numpy(np.asarray(normal, np.float32)).permute(2, 0, 1)[None]
        pixels = pixels.to(self._device)
        found, side = [], WINDOW // 14
        for y in sorted({*range(0, height - WINDOW, STRIDE), height - WINDOW}):
            for x in sorted({*range(0, width - WINDOW, STRIDE), width - WINDOW}):
                window = pixels[..., y : y + WINDOW, x : x + WINDOW].to(self._dtype)
                patches = self._model(window).last_hidden_state[0, 1:].float()
                hidden = gelu(patches @ self._layers[0]["kernel"] + self._layers[0]["bias"])
                out = normalize(
                    hidden @ self._layers[1]["kernel"] + self._layers[1]["bias"], dim=-1
                )
                similarities = (out @ self._text.T).T.reshape(1, -1, side, side)
                found.append(((y, x), similarities))
        return (height, width), found

    def stitched(self, size: tuple[int, int], windows: list[Any], labels: np.ndarray) -> Any:
        """Label map, and the confusion matrix."""
        import torch
        from torch.nn.functional import interpolate

        total = torch.zeros(1, WORDS.value, *size, device=self._device)
        count = torch.zeros(size, device=self._device)
        for (y, x), similarities in windows:
            up = interpolate(similarities, size=(WINDOW, WINDOW), mode="bilinear")
            total[..., y : y + WINDOW, x : x + WINDOW] += up
            count[y : y + WINDOW, x : x + WINDOW] += 1
        whole = interpolate(total / count, size=labels.shape, mode="bilinear")
        found = whole[0].argmax(0).cpu().numpy()
        index = labels.reshape(-1) * WORDS.value + found.reshape(-1)
        return found, np.bincount(index, minlength=WORDS.value**2)

    def evaluate(self, photographs: Photographs) -> tuple[list[np.ndarray], np.ndarray]:
        """Label maps, and the confusion matrix."""
        import torch

        maps, total = [], np.zeros(WORDS.value**2, np.int64)
        with torch.inference_mode():
            for image, labels in zip(photographs.images, photographs.labels, strict=True):
                found, counts = self.stitched(*self.windows(image), labels)
                maps.append(found)
                total += counts
        return maps, total.reshape(WORDS.value, WORDS.value)


def save_random(folder: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    from fmbseg_jax.encoders.loading import VISION

    spec = VISION[NAME.value]
    config = Dinov2Config(
        hidden_size=spec.transformer.width,
        num_hidden_layers=spec.transformer.depth,
        num_attention_heads=spec.transformer.heads,
        image_size=518,
        patch_size=14,
        use_swiglu_ffn=spec.transformer.gated,
        layer_norm_eps=1e-6,
    )
    Dinov2Model(config).save_pretrained(folder)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def compare(folder: Path) -> None:
    """Prints times of the whole and of its last part, and how far the label maps agree."""
    import jax.numpy as jnp
    import torch

    photographs = Photographs(IMAGES.value)
    ours, plain = Ours(folder, photographs), Plain(folder, photographs)
    whole: dict[str, Callable[[], Any]] = {
        "ours": functools.partial(ours.evaluate, photographs),
        "plain": functools.partial(plain.evaluate, photographs),
    }
    size, windows = plain.windows(photographs.images[0])
    with torch.inference_mode():
        grids = [one[0].permute(1, 2, 0).float().cpu().numpy() for _, one in windows]
    part: dict[str, Callable[[], Any]] = {
        "ours": ours.stitch(jnp.asarray(np.stack(grids)), photographs),
        "plain": lambda: plain.stitched(size, windows, photographs.labels[0]),
    }
    first = {name: timed(run) for name, run in whole.items()}
    maps = (first[name][1][0] for name in whole)
    agree = np.mean([np.mean(a == b) for a, b in zip(*maps, strict=True)])
    print(f"{NAME.value}, {COMPUTE.value}, {IMAGES.value} images, K = {WORDS.value}; ms an image")
    for title, runs, images, repeat in (("whole", whole, IMAGES.value, 1), ("stitch", part, 1, 5)):
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        with torch.inference_mode():
            for _ in range(ROUNDS.value * repeat):
                for name, run in runs.items():
                    seconds[name].append(timed(run)[0])
        times = {name: 1000 * float(np.median(some)) / images for name, some in seconds.items()}
        ratio = times["plain"] / times["ours"]
        print(f"  {title:7} ours {times['ours']:8.1f}  plain {times['plain']:8.1f}  {ratio:.2f} x")
    print(f"  first pass: ours {first['ours'][0]:.1f} s, compilation included")
    print(f"  the same label on {agree:.4%} of the pixels")


def weigh(folder: Path) -> None:
    """Peaks of processes of their own, for one image."""
    same = {"words": WORDS.value, "model": NAME.value, "compute": COMPUTE.value}
    given = {**same, "size": ",".join(SIZE.value), "batch": BATCH.value, "folder": folder}
    for name in ("ours", "plain"):
        flags_ = [f"--{flag}={value}" for flag, value in given.items()]
        subprocess.run([sys.executable, __file__, *flags_, f"--only={name}"], check=True)


def alone(folder: Path) -> None:
    photographs = Photographs(1)
    one: Any = {"ours": Ours, "plain": Plain}[ONLY.value](folder, photographs)
    one.evaluate(photographs)
    status = Path("/proc/self/status").read_text()
    peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    print(f"  {ONLY.value:6} peak of memory {peak / 1e6:.2f} GB, {' x '.join(SIZE.value)}, "
          f"K = {WORDS.value}")  # fmt: skip


def main(_: list[str]) -> None:
    if ONLY.value:
        alone(Path(FOLDER.value))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(FOLDER.value or temporary)
        if not (folder / "config.json").exists():
            save_random(folder)
        (weigh if MEMORY.value else compare)(folder)


if __name__ == "__main__":
    app.run(main)
