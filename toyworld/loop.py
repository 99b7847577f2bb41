"""The training loop that the three models share: schedule, progress, and going on after a kill."""

from __future__ import annotations

import io
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from fmbseg_jax.io.files import write_atomically

CHECKPOINT_SECONDS = 45


def save(path: Path, value: object) -> None:
    """torch.save, whole or not at all."""
    stream = io.BytesIO()
    torch.save(value, stream)
    write_atomically(path, stream.getvalue())


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear over the first 5 %, then half a cosine down to 1 % of the peak."""
    warm = max(1, steps // 20)
    progress = max(0, step - warm) / max(1, steps - warm)
    return peak * min((step + 1) / warm, 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * progress)))


def fit(
    name: str,
    modules: torch.nn.Module,
    loss: Callable[[torch.Generator, int], torch.Tensor],
    steps: int,
    peak: float,
    work: Path,
    seed: int = 0,
) -> dict[str, float]:
    """Minimises `loss(random, step)` over the parameters of `modules`; returns the time it took.

    Step i draws from a generator seeded by (seed, i), so a run that was killed and went on from
    its checkpoint in `work` draws what it would have drawn.
    """
    decay = [p for p in modules.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in modules.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    path, first, spent = work / f"{name}.pt", 0, (0.0, 0.0)
    if path.exists():
        kept = torch.load(path, weights_only=True)
        modules.load_state_dict(kept["modules"])
        optimizer.load_state_dict(kept["optimizer"])
        first, spent = kept["step"], kept["spent"]
    clocks = (time.monotonic, time.process_time)
    starts = [clock() - before for clock, before in zip(clocks, spent, strict=True)]
    saved = time.monotonic()
    position = int(os.environ.get("TOYWORLD_BAR", "0"))
    bar = tqdm(range(first, steps), name, steps, initial=first, position=position, mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        value = loss(torch.Generator().manual_seed(seed * 1_000_003 + step), step)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{value.item():.3f}", refresh=False)
        now = time.monotonic()
        if now - saved > CHECKPOINT_SECONDS or step + 1 == steps:
            parts = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict()}
            spent = (clocks[0]() - starts[0], clocks[1]() - starts[1])
            save(path, {**parts, "step": step + 1, "spent": spent})
            saved = now
    return dict(zip(("seconds", "processor_seconds"), spent, strict=True))
