"""The command `fmbseg`, also `python -m fmbseg_jax`: starts the programs by name."""

from __future__ import annotations

import difflib
import runpy
import sys

import fmbseg_jax
from fmbseg_jax.errors import UnsupportedSystem
from fmbseg_jax.io import machine
from fmbseg_jax.runs import extras

PROGRAMS = {
    "label": ("labelling", "images and words → pseudo labels, by CLIP and SAM"),
    "features": ("fmbseg_jax.features", "pseudo labels → patch features of the frozen encoder"),
    "train": ("fmbseg_jax.train", "patch features and their labels → a trained aligner"),
    "evaluate": ("fmbseg_jax.evaluate", "aligners against ground truth: tables and pictures"),
    "segment": ("fmbseg_jax.segment", "an aligner, images and any words → label maps"),
    "export": (
        "fmbseg_jax.export",
        "an aligner and its encoders → files that run without this package",
    ),
    "app": ("fmbseg_jax.app", "segmenting in the browser"),
    "config": (
        "fmbseg_jax.config.fields",
        "every field of a config, its default, what it means",
    ),
}
"""Module and a line on it, by name."""


def usage() -> str:
    lines = "\n".join(f"    {name:10}{line}" for name, (_, line) in PROGRAMS.items())
    return (
        f"FMbSeg in JAX {fmbseg_jax.__version__}: segment any image by any words.\n\n"
        f"    fmbseg PROGRAM --FLAG=VALUE ...\n\n{lines}\n\n"
        "fmbseg PROGRAM --help shows the flags of a program, and an example."
    )


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h", "help"):
        print(usage())
    elif name == "--version":
        print(fmbseg_jax.__version__)
    elif name in PROGRAMS:
        start(PROGRAMS[name][0])
    else:
        near = difflib.get_close_matches(name, PROGRAMS, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        sys.exit(f"\nerror: There is no program {name!r}.{hint} There are: {', '.join(PROGRAMS)}.")


def start(module: str) -> None:
    """Runs a module with the rest of the command line, as `python -m MODULE ...` would."""
    del sys.argv[1]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        sys.exit(extras.missing(error))
    except UnsupportedSystem as error:
        sys.exit(f"\nerror: {error}")
    except Exception as error:  # while its libraries were loaded
        told = machine.sentence(error)
        if not told:
            raise
        sys.exit(f"\nerror: {told}")


if __name__ == "__main__":
    main()
