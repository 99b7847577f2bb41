"""A second question about the same image: other words, without another look at it.

    python benchmarks/questions.py [--size=480,640] [--rounds=5]

DINOv2 ViT-B/14, CLIP ViT-B/16's text tower and an aligner of random weights, one image, 15 words;
and the toy world's, if `make demo` has left an aligner. Prints the median of the rounds, each with
a new image: the first question, the same again by other words that are known, and by a word that
is new, for which the text tower runs.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SIZE = flags.DEFINE_list("size", ["480", "640"], "Height and width of the image.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Images asked about.")
TOY = flags.DEFINE_string("toy", "work/toy/export", "The toy world's aligner.")
WORDS = [f"word {i}" for i in range(15)]


def random_segmenter(folder: Path) -> Any:
    """ViT-B/14 and ViT-B/16's text tower, with the toy world's tokenizer."""
    import jax
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

    from fmbseg_jax.config import Eval
    from fmbseg_jax.methods.aligned import Aligned
    from fmbseg_jax.segmentation.segmenter import Segmenter

    Dinov2Model(Dinov2Config(image_size=518, patch_size=14)).save_pretrained(folder / "dinov2")
    tokens = shutil.copytree(ROOT / "toyworld" / "weights" / "clip", folder / "clip")
    (tokens / "model.safetensors").unlink()
    CLIPModel(CLIPConfig(vision_config={"patch_size": 16})).save_pretrained(tokens)
    described = {"kind": "mlp", "output": 512, "mlp_ratio": 4, "heads": 1}
    aligned = Aligned({"aligner": described, "vision": {"hash": ""}}, str(folder / "dinov2"))
    random = np.random.default_rng(0)
    aligned.use(jax.tree.map(lambda leaf: random.normal(0, 0.03, leaf.shape), aligned.shapes))
    return Segmenter(aligned, str(tokens), "tokens", Eval())


def questions(segmenter: Any) -> dict[str, float]:
    """Median seconds of each kind of question."""
    from fmbseg_jax.data import images

    seconds: dict[str, list[float]] = {"first": [], "other words": [], "a new word": []}

    def ask(kind: str, image: np.ndarray, words: list[str]) -> None:
        start = time.perf_counter()
        segmenter.segment(image, words)
        seconds[kind].append(time.perf_counter() - start)

    for i in range(ROUNDS.value + 1):
        coarse = np.random.default_rng(i).integers(0, 256, (30, 40, 3), np.uint8)
        height, width = map(int, SIZE.value)
        image = images.resize(coarse, (height, width))
        ask("first", image, WORDS)
        ask("other words", image, WORDS[::-1])
        ask("a new word", image, [*WORDS[1:], f"new {i}"])
    # What the first image compiles is left out.
    return {kind: float(np.median(some[1:])) for kind, some in seconds.items()}


def report(name: str, segmenter: Callable[[], Any]) -> None:
    """Prints a line."""
    times = questions(segmenter())
    parts = [
        f"{kind} {1000 * seconds:.1f} ms ({seconds / times['first']:.1%})"
        for kind, seconds in times.items()
    ]
    print(f"{name}: {', '.join(parts)}", flush=True)


def main(_: list[str]) -> None:
    from fmbseg_jax import load

    with tempfile.TemporaryDirectory() as folder:
        os.environ["FMBSEG_CACHE"] = folder  # no word is known
        report("ViT-B/14", lambda: random_segmenter(Path(folder)))
        if Path(TOY.value).exists():
            report("toy world", lambda: load(TOY.value))


if __name__ == "__main__":
    app.run(main)
