"""TSupCon without the M × M matrix beside the naive one, in JAX and in PyTorch.

    python benchmarks/loss.py [--images=5] [--patches=1024] [--large=16384]
    python benchmarks/loss.py --throughput=65536 --dtype=bfloat16

Forward and backward at the paper's batch (5 images of 1,024 patches, D = 768, K = 171), float32:
the median of passes in turn, and XLA's temporary memory. --large shows the memory of ours at that
many patches, and what the naive one would take. --throughput measures ours alone at that many
patches: 6 M² D operations over its time, and the share of what a large matrix product reaches.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fmbseg_jax import losses  # noqa: E402

IMAGES = flags.DEFINE_integer("images", 5, "Images in the batch.")
PATCHES = flags.DEFINE_integer("patches", 1024, "Patches of an image.")
LARGE = flags.DEFINE_integer("large", 16384, "Patches of the large batch.")
WIDTH = flags.DEFINE_integer("width", 768, "D.")
WORDS = flags.DEFINE_integer("words", 171, "K.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.1, "τ.")
THROUGHPUT = flags.DEFINE_integer("throughput", 0, "Patches for the throughput of ours.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "For --throughput.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed passes of each.")


def naive(z: Any, y: Any, t: Any) -> Any:
    """Equations 1-4 as they stand, with the matrix; all patches labelled."""
    tau, size, words = TEMPERATURE.value, z.shape[0], t.shape[0]
    pairs = jnp.where(jnp.eye(size, dtype=bool), -jnp.inf, z @ z.T / tau)
    others = jax.nn.logsumexp(pairs, axis=1)
    to_text = z @ t.T / tau
    everything = jnp.logaddexp(jax.nn.logsumexp(to_text, axis=1), others)
    member = jax.nn.one_hot(y, words)
    count = jnp.maximum(member.sum(0), 1)
    text_terms = ((everything[:, None] - to_text) * member).sum(0) / count
    same = (y[:, None] == y) / count[y][:, None]
    image_terms = others - (same * (z @ z.T / tau)).sum(1)
    return (text_terms.sum() + image_terms.sum()) / (size + words)


def naive_torch(
    z: torch.Tensor, y: torch.Tensor, t: torch.Tensor, weight: float | torch.Tensor = 1.0
) -> torch.Tensor:
    """The same in PyTorch; `weight` is that of the text terms."""
    tau, size, words = TEMPERATURE.value, len(z), len(t)
    similarity = z @ z.T / tau
    others = similarity.masked_fill(torch.eye(size, dtype=torch.bool), -torch.inf).logsumexp(1)
    to_text = z @ t.T / tau
    everything = torch.logaddexp(to_text.logsumexp(1), others)
    member = torch.nn.functional.one_hot(y, words).float()
    count = member.sum(0).clamp(min=1)
    text_terms = ((everything[:, None] - to_text) * member).sum(0) / count
    same = (y[:, None] == y) / count[y][:, None]
    image_terms = others - (same * similarity).sum(1)
    return (weight * text_terms.sum() + image_terms.sum()) / (size + words)


def ours(z: Any, y: Any, t: Any) -> Any:
    return losses.tsupcon(z, y, t, temperature=TEMPERATURE.value)


def batch(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    z, t = (random.normal(size=(n, WIDTH.value)) for n in (size, WORDS.value))
    z, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (z, t))
    return z.astype(np.float32), random.integers(0, WORDS.value, size), t.astype(np.float32)


def compiled(loss: Callable[..., Any], size: int) -> Any:
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.asarray(x[:1]).dtype) for x in batch(size)]
    return jax.jit(jax.value_and_grad(loss)).lower(*shapes).compile()


def fastest(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of some passes; the first compiles."""
    seconds = []
    for _round in range(1 + ROUNDS.value):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def throughput(size: int) -> None:
    """Prints TFLOP/s of ours, and the share of a large product's."""
    z, y, t = (jnp.asarray(x) for x in batch(size))
    z, t = z.astype(DTYPE.value), t.astype(DTYPE.value)
    step = jax.jit(jax.value_and_grad(ours))
    rate = 6 * size**2 * WIDTH.value / fastest(lambda: step(z, y, t)) / 1e12
    side = 8192 if jax.default_backend() != "cpu" else 4096
    matrix = jnp.ones((side, side), DTYPE.value)
    multiply = jax.jit(jnp.matmul)
    peak = 2 * side**3 / fastest(lambda: multiply(matrix, matrix)) / 1e12
    print(
        f"M = {size}, {DTYPE.value}, {jax.devices()[0].device_kind}: {rate:.3f} TFLOP/s, "
        f"{rate / peak:.0%} of the {peak:.3f} of a product of {side} x {side}"
    )


def main(_: list[str]) -> None:
    if THROUGHPUT.value:
        throughput(THROUGHPUT.value)
        return
    size = IMAGES.value * PATCHES.value
    z, y, t = batch(size)
    programs = {"ours": compiled(ours, size), "naive": compiled(naive, size)}
    arrays = [jnp.asarray(x) for x in (z, y, t)]
    tensors = [torch.from_numpy(x) for x in (z, y, t)]
    tensors[0].requires_grad_()

    def in_torch() -> float:
        tensors[0].grad = None
        loss = naive_torch(*tensors)
        loss.backward()
        return loss.item()

    def in_jax(name: str) -> Callable[[], float]:
        return lambda: float(jax.block_until_ready(programs[name](*arrays))[0])

    runs = {"ours": in_jax("ours"), "naive": in_jax("naive"), "naive, PyTorch": in_torch}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    values: dict[str, float] = {}
    for _round in range(1 + ROUNDS.value):
        for name, run in runs.items():
            start = time.perf_counter()
            values[name] = run()
            seconds[name].append(time.perf_counter() - start)
    print(f"M = {size}, D = {WIDTH.value}, K = {WORDS.value}; losses {[*values.values()]}")
    base = np.median(seconds["naive"][1:])
    memory = {name: p.memory_analysis().temp_size_in_bytes / 1e6 for name, p in programs.items()}
    for name, some in seconds.items():
        median = np.median(some[1:])
        held = ""
        if name in memory:
            held = f"; {memory[name]:,.0f} MB, {memory[name] / memory['naive']:.2f}"
        print(f"  {name:15} {1e3 * median:8.0f} ms, {median / base:.2f} of the naive time{held}")
    for large in (LARGE.value, 2 * LARGE.value):
        held = compiled(ours, large).memory_analysis().temp_size_in_bytes / 1e6
        matrix = large**2 * 4 / 1e6
        print(f"  at {large} patches ours holds {held:,.0f} MB; one matrix is {matrix:,.0f}")


if __name__ == "__main__":
    app.run(main)
