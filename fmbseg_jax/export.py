"""Program: an exported aligner for others: without this package, for PyTorch, on the hub.

    fmbseg export --model=EXPORT --words="sky,grass"
    fmbseg export --model=EXPORT --push=USER/NAME

Reads the aligner at EXPORT (the export/ folder of a work folder, or an id of the Hugging Face hub).
Writes, into --out (a copy of the export), or else into EXPORT itself, all at once or nothing,

    aligner.safetensors       the aligner's weights, named and laid out for PyTorch
    aligner.json              its sizes and encoders
    similarities.stablehlo    images → similarities with the words, by jax.export, weights included;
                              runs with jax alone on a CPU, an NVIDIA GPU or a TPU
    similarities.json         what goes into it and what comes out

and with --push uploads the whole folder to the Hugging Face hub, from where `fmbseg_jax.load` reads
it by its name. Each JSON has the SHA-256 of the file that it describes. docs/export.md shows how
they are used.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
from absl import flags

import fmbseg_jax
from fmbseg_jax import vocabulary
from fmbseg_jax.errors import UserError
from fmbseg_jax.io.files import write_atomically, write_json
from fmbseg_jax.io.replacing import copy, replaced
from fmbseg_jax.pretrained import hub, weights
from fmbseg_jax.runs import program, workfolder
from fmbseg_jax.segmentation.segmenter import Segmenter
from fmbseg_jax.sharing import exports, stablehlo
from fmbseg_jax.sharing.loading import load
from fmbseg_jax.vocabulary.classes import Classes

_LARGEST = 16_000_000
"""Pixels of the images that a program is written for; all their windows are in memory at once."""
_ARTIFACTS = "aligner.safetensors", "aligner.json", "similarities.stablehlo", "similarities.json"


def write_stablehlo(
    out: Path, segmenter: Segmenter, words: tuple[str, ...], size: tuple[int, int]
) -> None:
    """Writes similarities.stablehlo and .json, for images of `size` (H, W)."""
    classes = Classes.of(words)
    function = stablehlo.similarity_function(
        segmenter.dense, segmenter.layout(size), segmenter.text(classes.words), classes
    )
    contents = stablehlo.serialise(function, size)
    facts: dict[str, Any] = {
        "words": words,
        "input": f"uint8 [b, {size[0]}, {size[1]}, 3], RGB, for any b",
        "output": f"float32 [b, {size[0]}, {size[1]}, {len(words)}], cosine similarity of each "
        "pixel with each word",
        "platforms": stablehlo.PLATFORMS,
        "model": segmenter.fingerprint,
        "sha256": hashlib.sha256(contents).hexdigest(),
        "versions": {"fmbseg_jax": fmbseg_jax.__version__, "jax": jax.__version__},
    }
    write_atomically(out / "similarities.stablehlo", contents)
    write_json(out / "similarities.json", facts)


def write_safetensors(out: Path, segmenter: Segmenter, model: dict[str, Any]) -> None:
    """Writes aligner.safetensors and .json, with the aligner's sizes and encoders in both."""
    facts = {**model["aligner"], **{name: model[name] for name in ("vision", "clip")}}
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}
    digest = weights.write_pytorch(
        out / "aligner.safetensors", segmenter.dense.params["aligner"], {"format": "pt", **texts}
    )
    write_json(out / "aligner.json", {**facts, "sha256": digest})


def _size(argument: list[str], window: int) -> tuple[int, int]:
    """(H, W) of --size, "" being one window."""
    if not argument:
        return window, window
    if len(argument) != 2 or not all(part.isdecimal() for part in argument):
        raise UserError(f"--size is H,W in pixels, such as {window},{window}; got {argument}.")
    height, width = map(int, argument)
    if height * width > _LARGEST:
        raise UserError(
            f"--size={height},{width} has {height * width:,} pixels; {_LARGEST:,} are possible."
        )
    if min(height, width) < window:
        raise UserError(
            f"--size={height},{width} is smaller than the model's window of {window} pixels. "
            f"Images are given to it with their short side at {window} or more."
        )
    return height, width


def _check_out(folder: Path, out: Path) -> None:
    """Raises UserError where --out cannot be replaced: it may be an earlier copy, nothing else."""
    if out.resolve() == folder.resolve():
        return
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--out={out} lies in the export. Give a folder elsewhere.")
    if out.exists() and not _is_copy(folder, out):
        raise UserError(
            f"--out={out} is there already, and is no copy of {folder}. Give a folder that is new."
        )


def _is_copy(folder: Path, out: Path) -> bool:
    """Whether all in a folder is what this program has put there, from the same export."""
    known = {*_ARTIFACTS, *(path.name for path in folder.iterdir())}
    if not out.is_dir() or {path.name for path in out.iterdir()} - known:
        return False
    same = "model.json", "README.md"
    return filecmp.cmpfiles(folder, out, same, shallow=False)[0] == list(same)


def main() -> None:
    program.require("model")
    folder = exports.locate(FLAGS.model)
    model = exports.read_model(folder)
    if not FLAGS.out and not Path(FLAGS.model).exists():
        raise UserError(f"{FLAGS.model} is on the hub: give --out=FOLDER for a copy of it.")
    out = workfolder.local(FLAGS.out, "--out").resolve() if FLAGS.out else folder
    _check_out(folder, out)
    if FLAGS.push:
        hub.check_id(FLAGS.push)  # before anything is made
    jax.config.update("jax_platforms", "cpu")  # where programs for all platforms can be written
    words = vocabulary.parse_words(FLAGS.words) if FLAGS.words else tuple(model["words"])
    changes = {"compute": FLAGS.compute} if FLAGS.compute else {}
    segmenter = load(folder, changes, vision=FLAGS.vision, clip=FLAGS.clip)
    size = _size(FLAGS.size, segmenter.window)
    with replaced(out) as new:
        copy(folder, new, without=_ARTIFACTS)
        write_safetensors(new, segmenter, model)
        write_stablehlo(new, segmenter, words, size)
        if not exports.read_model(new) == exports.read_model(folder) == model:
            raise UserError(f"{folder} was replaced in the meantime: run the same command again.")
    for name in _ARTIFACTS:
        print(f"{out / name}: {(out / name).stat().st_size / 1e6:.1f} MB")
    if FLAGS.push:
        _push(out, model)


def _push(out: Path, model: dict[str, Any]) -> None:
    address = hub.push(out, FLAGS.push, private=FLAGS.private)
    print(f'Pushed to {address}: fmbseg_jax.load("{FLAGS.push}")')
    for name in ("vision", "clip"):
        source = model[name]["source"]
        if not hub.is_id(source):
            print(
                f"Its {name} encoder is a folder of this machine, {source}; whoever loads it has "
                f'to give theirs: load("{FLAGS.push}", {name}=FOLDER).'
            )


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    program.define_model()
    flags.DEFINE_string("words", "", 'Words: "sky,grass", or a file; "": those of the training.')
    flags.DEFINE_list(
        "size", [], "H,W of the images, in pixels; one window of the model if left out."
    )
    flags.DEFINE_string(
        "out", "", "Folder for a copy of the export; the export itself if left out."
    )
    flags.DEFINE_string("compute", "", 'What is multiplied in: "float32", or "bfloat16".')
    flags.DEFINE_string("push", "", "USER/NAME of a repository on the Hugging Face hub.")
    flags.DEFINE_bool("private", False, "Whether that repository, if it is new, is private.")
    program.run(main)
