"""What an evaluation leaves behind: tables, JSON, pictures."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import fmbseg_jax
from fmbseg_jax.config import Config, Eval, flatten
from fmbseg_jax.datasets.completeness import Check, lacking
from fmbseg_jax.datasets.folder import Benchmark
from fmbseg_jax.errors import UserError
from fmbseg_jax.evaluation.protocol import background_rule, of_benchmark
from fmbseg_jax.evaluation.scoring import Result
from fmbseg_jax.io import texts
from fmbseg_jax.io.files import write_atomically
from fmbseg_jax.vocabulary import read_templates

TITLES = {
    "clip_patches": "CLIP's patches alone",
    "clip_windows": "CLIP's patches, same windows",
    "stage1_1": "stage 1.1: points",
    "stage1_2": "stage 1.2: automatic masks",
    "stage1": "stage 1: both",
    "aligner": "the aligner",
    "oracle": "ceiling: trained on the truth",
}
"""What is scored, in the order of the tables."""

Results = Mapping[str, Sequence[Result]]
"""By what was scored, its result, and perhaps a second one, refined by PAMR."""


def notes(protocol: Eval, benchmarks: Sequence[Benchmark]) -> list[str]:
    """Sentences on how the results came about; no table goes without them."""
    parts = [
        f"Protocol: short side {protocol.short_side}, window {protocol.window}, stride "
        f"{protocol.stride}, bilinear {'with' if protocol.antialias else 'without'} antialiasing",
        f'template "{protocol.template}"',
        f"{protocol.compute}",
        "an unlabelled pixel counts as a miss",
        *([f"PAMR with {protocol.pamr} iterations"] if protocol.pamr else []),
    ]
    lines = [
        "; ".join(parts) + ". Label maps made elsewhere (stage 1, --predictions) are only counted."
    ]
    for benchmark in benchmarks:
        found = f"{benchmark.name}: {len(benchmark.names):,} images, {len(benchmark.words)} classes"
        if published := benchmark.published:
            if benchmark.has_background:
                found += f"; background by {background(protocol, benchmark)}"
            if len(benchmark.names) != published.count:
                found += f"; NOT the whole set, which has {published.count:,} images"
        lines.append(found + ".")
    return lines


def background(protocol: Eval, benchmark: Benchmark) -> str:
    """How the background is found, in a few words."""
    rule = background_rule(protocol, benchmark)
    texts = {
        "words": f"words ({protocol.background_words})",
        "threshold": f"threshold ({protocol.threshold})",
        "none": "its own name",
    }
    return texts[rule]


def rows(folder: Path, name: str) -> list[list[str]]:
    """What NAME.json says, as cells of the table."""
    facts, table = _read(folder, name), list[list[str]]()
    paper, systems = facts["paper"], facts["systems"]
    for system, found in systems.items():
        if system.endswith(_PAMR):
            continue
        refined = systems.get(system + _PAMR)
        miou, compared = 100 * found["miou"], paper is not None and system in _PAPERS
        table.append(
            [
                name,
                TITLES.get(system, system),
                f"{miou:.2f}",
                f"{100 * refined['miou']:.2f}" if refined else "",
                f"{paper:.2f}" if compared else "",
                f"{miou - paper:+.2f}" if compared and facts["whole"] else "",
                f"{100 * found['coverage']:.1f}%",
                f"{found['images']:,}",
            ]
        )
    return table


def truth(result: Result, benchmark: Benchmark) -> dict[str, Any]:
    """What the label maps lack: the share of pixels without a class, and classes without one."""
    absent = [benchmark.words[i] for i in result.absent]
    return {"void": result.void_share, "absent": absent}


def truths(folder: Path, names: Sequence[str]) -> list[str]:
    """What the label maps of these sets lack, a sentence each, by their NAME.json."""
    facts = {name: _read(folder, name) for name in names}
    truths = {name: one["truth"] for name, one in facts.items() if "truth" in one}
    return [lacking(name, one["void"], one["absent"]) for name, one in truths.items()]


def _read(folder: Path, name: str) -> dict[str, Any]:
    advice = "Delete it, and run `fmbseg evaluate` again for what it had."
    return texts.read_json(folder / f"{name}.json", _FORM, advice)


_FORM = {
    "paper": float | None,
    "whole": bool,
    "protocol": [str],
    "systems": {str: {"miou": float, "coverage": float, "images": int}},
    "truth?": {"void": float, "absent": [str]},
    "models": dict,
}
"""Of NAME.json, what is read again."""


_PAMR = " + PAMR"
_PAPERS = ("aligner",)  # what the paper's Table 1 has a number of
HEADINGS = ["set", "what", "mIoU", "PAMR", "paper", "difference", "labelled", "images"]
_WORDY = 2  # columns that are set flush left


def as_text(table: Sequence[Sequence[str]]) -> str:
    """For a terminal; columns without any value are left out."""
    columns = _filled_columns(table)
    widths = [max(len(row[j]) for row in [HEADINGS, *table]) for j in columns]
    lines = []
    for row in [HEADINGS, *table]:
        cells = [
            row[j].ljust(width) if j < _WORDY else row[j].rjust(width)
            for j, width in zip(columns, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def as_markdown(table: Sequence[Sequence[str]]) -> str:
    """As a table of Markdown."""
    columns = _filled_columns(table)
    lines = [HEADINGS, ["---" if j < _WORDY else "---:" for j in range(len(HEADINGS))], *table]
    return "\n".join("| " + " | ".join(line[j] for j in columns) + " |" for line in lines)


def _filled_columns(table: Sequence[Sequence[str]]) -> list[int]:
    return [j for j in range(len(HEADINGS)) if any(row[j] for row in table)]


def write_markdown(folder: Path) -> None:
    """results.md: a table of all that was evaluated into this folder, and how."""
    names = sorted(path.stem for path in folder.glob("*.json"))
    table = [row for name in names for row in rows(folder, name)]
    notes = dict.fromkeys(line for name in names for line in _read(folder, name)["protocol"])
    notes |= dict.fromkeys(truths(folder, names))
    text = as_markdown(table) + "\n\n" + "\n\n".join(notes) + "\n"
    write_atomically(folder / "results.md", text.encode())


def write_json(
    folder: Path,
    benchmark: Benchmark,
    results: Results,
    config: Config,
    models: dict[str, Any],
) -> None:
    """NAME.json: results, and everything that is needed to repeat them.

    What an earlier run has scored by the same protocol stays.

    Args:
      models: facts of the models, their hashes among them, by what was scored.
    """
    classes, path = of_benchmark(config.eval, benchmark), folder / f"{benchmark.name}.json"
    same = {
        "protocol": notes(config.eval, [benchmark]),
        "root": str(benchmark.root),
        "label_maps": benchmark.source,
    }
    found = {
        name + (_PAMR if i else ""): _facts(result, benchmark)
        for name, some in results.items()
        for i, result in enumerate(some)
    }
    old = _read(folder, benchmark.name) if path.exists() else {}
    kept = same.items() <= old.items()
    if old and not kept:
        print(f"{path} was made by another protocol, and is made anew.")
    facts = {
        "benchmark": benchmark.name,
        "paper": benchmark.published.paper if benchmark.published else None,
        "truth": truth(next(iter(results.values()))[0], benchmark),
        "systems": _in_order((old["systems"] if kept else {}) | found),
        "whole": not benchmark.published or benchmark.published.count == len(benchmark.names),
        **same,
        "templates": list(read_templates(config.eval.template)),
        "words": {"compared": list(classes.words), "class": list(classes.index)},
        "models": (old["models"] if kept else {}) | models,
        "config": flatten(config),
        "versions": _versions(),
        "platform": jax.devices()[0].device_kind,
        "commit": _commit(),
    }
    text = json.dumps(facts, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[\d,\s]+\]", lambda row: re.sub(r"\s+", " ", row[0]), text)  # one line each
    write_atomically(path, (text + "\n").encode())


def _in_order(systems: dict[str, Any]) -> dict[str, Any]:
    """As in TITLES; those of others last."""
    order = {name: i for i, name in enumerate(TITLES)}
    return dict(
        sorted(systems.items(), key=lambda item: order.get(item[0].removesuffix(_PAMR), len(order)))
    )


def _facts(result: Result, benchmark: Benchmark) -> dict[str, Any]:
    """IoU is null for a class that is in no label map and in no result.

    Of the confusion matrix rows are labels, columns results, the last for unlabelled pixels.
    """
    iou = [None if np.isnan(value) else float(value) for value in result.iou]
    return {
        "miou": result.miou,
        "coverage": result.coverage,
        "images": result.images,
        "iou": dict(zip(benchmark.words, iou, strict=True)),
        "confusion": result.confusion.tolist(),
    }


def _versions() -> dict[str, str]:
    names = ["jax", "flax", "numpy", "pillow"]
    return {"fmbseg_jax": fmbseg_jax.__version__} | {
        name: importlib.metadata.version(name) for name in names
    }


def _commit() -> str | None:
    """Of the checkout that this file belongs to, if it does."""
    here = Path(__file__).resolve()

    def git(*command: str) -> str:
        full = ["git", "-C", str(here.parent), *command]
        return subprocess.run(full, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def print_checks(checks: Sequence[Check]) -> None:
    """A table of what is on disk; raises UserError where a benchmark is not as published."""
    lines = [["", "images", "expected", "classes", "expected", "no class"]]
    for one in checks:
        expected = f"{one.expected:,}" if one.expected else ""
        images, seen = f"{one.images:,}", f"{one.seen}"
        lines.append([one.name, images, expected, seen, f"{one.classes}", f"{one.ignored:.1%}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        first, *rest = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *rest]))
    for one in checks:
        print(lacking(one.name, one.ignored, one.absent))
    wrong = [one.name for one in checks if one.expected not in (0, one.images)]
    if wrong:
        raise UserError(
            f"Not the number of images that is published: {', '.join(wrong)}. Results would not be "
            "comparable; docs/reproduce.md says where the whole sets come from."
        )
