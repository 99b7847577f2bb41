"""A training step beside a plain PyTorch loop of the same block and loss.

    python benchmarks/training.py [--images=5] [--compute=float32] [--grow=5,10,20,40,80]

The paper's setting: 5 images of 1,024 patches of DINOv2 L, the transformer block with 16 heads,
text features of CLIP L (D = 768), K = 171 words, SGD. Features lie in memory as float16, as they
would come from disk; both read a batch in every step. PyTorch's loop is what one would write first:
SDPA, the M × M matrix of similarities, everything in float32. Median of steps in turn; --grow shows
how time and memory of ours grow with the batch, with all patches and 64 drawn from each image.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags
from loss import IMAGES, PATCHES, ROUNDS, WIDTH, WORDS, naive_torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fmbseg_jax.config import Train
from fmbseg_jax.parallel.mesh import distribute, local_mesh
from fmbseg_jax.training import step as training
from fmbseg_jax.training.batches import Example, TrainBatches

CHANNELS = flags.DEFINE_integer("channels", 1024, "Channels of a patch.")
COMPUTE = flags.DEFINE_enum("compute", "float32", ["float32", "bfloat16"], "train.compute of ours.")
GROW = flags.DEFINE_list("grow", [], "Images in a batch, for the growth of ours.")
STORED = 40


def stored() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patch features and labels of images, and the words' text features."""
    random = np.random.default_rng(0)
    patches = random.normal(size=(STORED, PATCHES.value, CHANNELS.value)).astype(np.float16)
    labels = random.integers(0, WORDS.value, (STORED, PATCHES.value)).astype(np.int32)
    text = random.normal(size=(WORDS.value, WIDTH.value)).astype(np.float32)
    return patches, labels, text / np.linalg.norm(text, axis=1, keepdims=True)


def objective_of(config: Train, steps: int) -> training.Objective:
    """The paper's: the block, TSupCon."""
    block = {"kind": "block", "output": WIDTH.value, "mlp_ratio": 4, "heads": 16}
    return training.objective(config, block, steps)


def ours(config: Train) -> Iterator[float]:
    """The loss of each step."""
    patches, labels, text = stored()

    def read(i: int) -> Example:
        return {"patches": patches[i], "labels": labels[i]}

    batches = TrainBatches(STORED, read, seed=0, batch_size=config.batch_size, epochs=10_000)
    objective = objective_of(config, batches.steps)
    mesh = local_mesh()
    state = training.create_state(objective, 0, CHANNELS.value)
    for batch in iter(batches):
        placed = distribute(mesh, batch)
        state, metrics = training.train_step(state, placed, text, {}, objective=objective)
        yield float(metrics["loss"])


def memory(config: Train) -> float:
    """XLA's temporary memory for a step of ours, in GB."""
    objective, shape = objective_of(config, 100), (config.batch_size, PATCHES.value)
    state = jax.eval_shape(lambda: training.create_state(objective, 0, CHANNELS.value))
    batch = {
        "patches": jax.ShapeDtypeStruct((*shape, CHANNELS.value), jnp.float16),
        "labels": jax.ShapeDtypeStruct(shape, jnp.int32),
    }
    text = jax.ShapeDtypeStruct((WORDS.value, WIDTH.value), jnp.float32)
    step: Any = training.train_step.lower(state, batch, text, {}, objective=objective).compile()
    return step.memory_analysis().temp_size_in_bytes / 1e9


class TorchBlock(torch.nn.Module):
    """The paper's aligner: one transformer block, then a linear layer."""

    def __init__(self, width: int, output: int, heads: int = 16):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2, self.norm = (torch.nn.LayerNorm(width, 1e-6) for _ in range(3))
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)
        self.projection = torch.nn.Linear(width, output)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, d = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, d // self.heads)
        mixed = torch.nn.functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        x = x + self.out(mixed.transpose(1, 2).reshape(b, n, d))
        x = x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))
        return torch.nn.functional.normalize(self.projection(self.norm(x)), dim=-1)


def in_torch(config: Train) -> Iterator[float]:
    """The loss of each step of the plain loop."""
    patches, labels, text = stored()
    random = np.random.default_rng(0)
    block, words = TorchBlock(CHANNELS.value, WIDTH.value), torch.from_numpy(text)
    optimizer = torch.optim.SGD(block.parameters(), lr=config.peak_lr, momentum=config.momentum)
    while True:
        chosen = random.integers(0, STORED, config.batch_size)
        x = torch.from_numpy(patches[chosen].astype(np.float32))
        y = torch.from_numpy(labels[chosen].reshape(-1)).long()
        weight = len(y) / len(torch.unique(y))
        optimizer.zero_grad()
        loss = naive_torch(block(x).flatten(0, 1), y, words, weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(block.parameters(), config.clip_norm)
        optimizer.step()
        yield loss.item()


def timed(step: Callable[[], float]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main(_: list[str]) -> None:
    config = Train(batch_size=IMAGES.value, compute=COMPUTE.value)
    runs = {"ours": ours(config), "PyTorch": in_torch(config)}
    first = {name: next(run) for name, run in runs.items()}  # compilation
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _round in range(ROUNDS.value):
        for name, run in runs.items():
            seconds[name].append(timed(run.__next__))
    print(
        f"{IMAGES.value} images of {PATCHES.value} patches, {COMPUTE.value}; first losses {first}"
    )
    medians = {name: float(np.median(some)) for name, some in seconds.items()}
    for name, median in medians.items():
        print(f"  {name:8} {median:7.2f} s a step, {1 / median:.2f} steps/s")
    print(f"  PyTorch / ours: {medians['PyTorch'] / medians['ours']:.2f}")
    for images in map(int, GROW.value):
        for name, drawn in {"all": 0, "64 drawn": 64}.items():
            growing = dataclasses.replace(config, batch_size=images, patches_per_image=drawn)
            run = ours(growing)
            next(run)  # compilation
            seconds = np.median([timed(run.__next__) for _ in range(1 if images > 20 else 3)])
            weight = memory(growing)
            passes = memory(dataclasses.replace(growing, images_per_pass=5))
            print(
                f"  {images:3} images, {name:8} {seconds:7.2f} s a step, {weight:.2f} GB, "
                f"{passes:.2f} in passes of 5",
                flush=True,
            )


if __name__ == "__main__":
    app.run(main)
