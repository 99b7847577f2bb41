"""Learning rate, temperature and text weight on the toy world, for what the configs recommend.

    python benchmarks/sweep.py --work=work/sweep [--aligners=mlp,block] [--seeds=1]

For each aligner every learning rate with every temperature, then, at the best pair, every weight of
the text terms. Scored on validation scenes, which no table of results is made from. What is there
stays: run again to continue.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ablation import Seed  # noqa: E402

from fmbseg_jax.runs import program

RATES = (0.03, 0.1, 0.3, 1.0)
TEMPERATURES = (0.03, 0.05, 0.1)
WEIGHTS = (0.3, 1.0, 3.0)


def sweep(aligner: str, seeds: Sequence[Seed]) -> None:
    """Prints the two tables of one aligner."""

    def miou(rate: float, temperature: float, weight: float) -> float:
        changes: dict[str, object] = {
            "aligner": aligner, "peak_lr": rate, "temperature": temperature, "text_weight": weight,
        }  # fmt: skip
        name = f"{aligner} rate {rate} temperature {temperature} weight {weight}"
        return 100 * float(np.mean([seed.aligner(name, changes) for seed in seeds]))

    found = {(rate, t): miou(rate, t, 1.0) for rate in RATES for t in TEMPERATURES}
    rate, temperature = max(found, key=found.__getitem__)
    weights = {weight: miou(rate, temperature, weight) for weight in WEIGHTS}
    print(f"\n| {aligner}: mIoU | " + " | ".join(f"τ = {t}" for t in TEMPERATURES) + " |")
    print("|---" * (len(TEMPERATURES) + 1) + "|")
    for row in RATES:
        cells = " | ".join(f"{found[row, t]:.2f}" for t in TEMPERATURES)
        print(f"| learning rate {row} | {cells} |")
    print(f"\n| {aligner}, rate {rate}, τ = {temperature}: text weight | mIoU |\n|---|---|")
    for weight, value in weights.items():
        print(f"| {weight} | {value:.2f} |")


def main() -> None:
    seeds = [Seed(Path(WORK.value), number, "validation") for number in range(SEEDS.value)]
    for aligner in ALIGNERS.value:
        sweep(aligner, seeds)


if __name__ == "__main__":
    WORK = flags.DEFINE_string("work", "work/sweep", "Where the runs go.")
    ALIGNERS = flags.DEFINE_list("aligners", ["mlp", "block"], "Aligners to sweep.")
    SEEDS = flags.DEFINE_integer("seeds", 1, "How many seeds to average over.")
    program.run(main)
