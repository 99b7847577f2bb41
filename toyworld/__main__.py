"""Program: draws the scenes of the demo, with ground truth.

    python -m toyworld --out=data/toy

Reads nothing; writes OUT/train, OUT/validation and OUT/test, each with images/, labels/ and
words.txt. Run again to continue; what is there stays.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from fmbseg_jax.runs import program
from toyworld import scenes

COUNTS = {"train": 160, "validation": 60, "test": 60}  # what the demo needs


def main() -> None:
    for split, usual in COUNTS.items():
        count = SCENES.value or usual
        scenes.write_folder(Path(OUT.value) / split, split, count)
        print(f"{count} {split} scenes are in {Path(OUT.value) / split}")


if __name__ == "__main__":
    OUT = flags.DEFINE_string("out", "data/toy", "Where the scenes go; made if needed.")
    SCENES = flags.DEFINE_integer("scenes", 0, "Scenes in each split; 0: 160, 60 and 60.")
    program.run(main)
