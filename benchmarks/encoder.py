"""The frozen DINOv2 ViT-L/14 beside Hugging Face's PyTorch, with the same random weights.

    python benchmarks/encoder.py [--size=448,518] [--batch=1] [--dtype=float32] [--rounds=5]

Prints milliseconds for each image (the median of the rounds, taken in turn), the ratio, the share
of the measured matmul peak, and the peak of host memory of a process of its own for each. Layers
unrolled, as the encoder has them, stand beside layers scanned, with the time to compile either.
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
from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SIZES = flags.DEFINE_list("size", ["448", "518"], "Sides of the image in pixels.")
BATCH = flags.DEFINE_integer("batch", 1, "Images at once.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "What both compute in.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed runs of each.")
NAMES = [f"facebook/dinov2-{size}" for size in ("small", "base", "large", "giant")]
NAME = flags.DEFINE_enum("model", NAMES[2], NAMES, "Whose architecture.")
FOLDER = flags.DEFINE_string("folder", "", "Where the random model lies; made if empty.")
ONLY = flags.DEFINE_enum("only", "", ["", "ours", "theirs"], "Run one alone, to weigh its memory.")


def ours(folder: Path, images: np.ndarray) -> Callable[[], Any]:
    import jax

    from fmbseg_jax.encoders import loading

    module, params = loading.load_vision(str(folder), DTYPE.value)
    apply = jax.jit(lambda params, images: module.apply({"params": params}, images).patches)
    on_device = jax.device_put(images)
    return lambda: jax.block_until_ready(apply(params, on_device))


def scanned(folder: Path, images: np.ndarray) -> Callable[[], Any]:
    """The same blocks as one `jax.lax.scan` over stacked params; without the last norm."""
    import jax
    import jax.numpy as jnp

    from fmbseg_jax.encoders import loading
    from fmbseg_jax.encoders.vision import Embedding
    from fmbseg_jax.nn.transformer import Block

    module, params = loading.load_vision(str(folder), DTYPE.value)
    blocks = [params["transformer"][f"block{i}"] for i in range(module.spec.transformer.depth)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    block = Block(module.spec.transformer)

    @jax.jit
    def apply(params: Any, stacked: Any, images: Any) -> Any:
        embedding = Embedding(module.spec)
        tokens = embedding.apply({"params": params["embedding"]}, images)
        return jax.lax.scan(
            lambda x, layer: (block.apply({"params": layer}, x), None), tokens, stacked
        )[0]

    on_device = jax.device_put(images)
    return lambda: jax.block_until_ready(apply(params, stacked, on_device))


def theirs(folder: Path, images: np.ndarray) -> Callable[[], Any]:
    import torch
    from transformers import Dinov2Model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, DTYPE.value)
    model: Any = Dinov2Model.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    model = model.to(device).eval()
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(device, dtype)
    if device == "cuda":
        model = torch.compile(model)

    @torch.inference_mode()
    def run() -> None:
        model(pixels)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


PEERS = {"ours": ours, "scanned": scanned, "theirs": theirs}


def in_turn(runs: dict[str, Callable[[], Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of the first run, compilation included, and the median of the later ones."""
    first, later = {}, {name: [] for name in runs}  # type: ignore[var-annotated]
    for name, run in runs.items():
        start = time.perf_counter()
        run()
        first[name] = time.perf_counter() - start
    for _ in range(ROUNDS.value):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            later[name].append(time.perf_counter() - start)
    return first, {name: float(np.median(times)) for name, times in later.items()}


def memory(size: str, folder: Path) -> dict[str, float]:
    """GB at the peak of a process that runs one of the two alone."""
    found = {}
    for name in ("ours", "theirs"):
        same = [f"--{f}={flags.FLAGS[f].value}" for f in ("batch", "dtype", "model")]
        command = [sys.executable, __file__, f"--only={name}", f"--size={size}", "--rounds=2"]
        output = subprocess.run(
            [*command, *same, f"--folder={folder}"], check=True, capture_output=True, text=True
        )
        found[name] = float(output.stdout.split()[-1])
    return found


def peak_memory() -> float:
    """GB this process held at most; of its own, where getrusage counts the parent's too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e6


def save_random(folder: Path) -> None:
    import torch
    from transformers import Dinov2Config, Dinov2Model

    from fmbseg_jax.encoders.loading import VISION

    spec = VISION[NAME.value]
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=spec.transformer.width, num_hidden_layers=spec.transformer.depth,
        num_attention_heads=spec.transformer.heads, image_size=518, patch_size=spec.patch,
        use_swiglu_ffn=spec.transformer.gated,
    )  # fmt: skip
    Dinov2Model(config).save_pretrained(folder)


def matmul_flops(size: int) -> float:
    """Floating-point operations of one image: two for each multiplication in a matrix product."""
    from fmbseg_jax.encoders.loading import VISION

    spec = VISION[NAME.value]
    blocks, tokens = spec.transformer, (size // spec.patch) ** 2 + 1
    layers = 3 if blocks.gated else 2
    per_token = 4 * blocks.width**2 + layers * blocks.width * blocks.mlp_width
    attention = 2 * tokens * blocks.width
    patches = tokens * spec.patch**2 * 3 * blocks.width
    return 2.0 * (blocks.depth * tokens * (per_token + attention) + patches)


def product() -> tuple[Callable[[], Any], float]:
    """A large matrix product in this dtype, on JAX's device, and its floating-point operations."""
    import jax
    import jax.numpy as jnp

    side = 8192 if jax.default_backend() == "gpu" else 4096
    x = jnp.ones((side, side), DTYPE.value)
    apply = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(apply(x, x)), 2.0 * side**3


def main(_: list[str]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(FOLDER.value or temporary)
        if not FOLDER.value:
            save_random(folder)
        for size in SIZES.value:
            side = int(size)
            images = np.random.default_rng(0).normal(size=(BATCH.value, side, side, 3))
            images = images.astype(np.float32)
            if ONLY.value:
                run = PEERS[ONLY.value](folder, images)
                run()
                run()
                print(peak_memory())
                continue
            runs = {name: make(folder, images) for name, make in PEERS.items()}
            runs["product"], flops = product()
            first, median = in_turn(runs)
            report(side, first, median, flops / median.pop("product"))
            weighed = memory(size, folder)
            ratio = weighed["ours"] / weighed["theirs"]
            print(
                f"  memory   {weighed['ours']:.2f} GB, theirs {weighed['theirs']:.2f}: {ratio:.2f}"
            )


def report(side: int, first: dict[str, float], median: dict[str, float], peak: float) -> None:
    print(f"{NAME.value}, {BATCH.value} × {side} × {side}, {DTYPE.value}")
    for name, seconds in median.items():
        each, ratio = 1000 * seconds / BATCH.value, seconds / median["theirs"]
        print(
            f"  {name:8} {each:8.1f} ms/image, {1000 / each:7.2f} images/s, "
            f"{ratio:.2f} of theirs; the first run took {first[name]:.1f} s"
        )
    work = matmul_flops(side) * BATCH.value
    ours, theirs = (work / median[name] / peak for name in ("ours", "theirs"))
    print(
        f"  a large product reaches {peak / 1e9:,.0f} GFLOP/s: ours {ours:.0%} of it, "
        f"theirs {theirs:.0%}"
    )


if __name__ == "__main__":
    app.run(main)
