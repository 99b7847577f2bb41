"""Program: draws the scenes of the demo, with ground truth.

    python -m toyworld --out=data/toy

Writes OUT/train, OUT/validation and OUT/test, each with images/, labels/ and words.txt. Run again
to continue; what is there stays.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from fmbseg_jax import program
from toyworld import scenes

COUNTS = {"train": 160, "validation": 60, "test": 60}


def main() -> None:
    for split, count in COUNTS.items():
        scenes.write_folder(Path(OUT.value) / split, split, count)
        print(f"{count} {split} scenes are in {Path(OUT.value) / split}")


if __name__ == "__main__":
    OUT = flags.DEFINE_string("out", "data/toy", "Where the scenes go; made if needed.")
    program.run(main)
