"""model.json of an exported aligner: read, and held against how we write it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from fmbseg_jax.config.checks import AT_MOST
from fmbseg_jax.errors import UserError
from fmbseg_jax.io import texts
from fmbseg_jax.io.replacing import files_of, moved_aside
from fmbseg_jax.io.spelling import printable
from fmbseg_jax.nn.aligner import KINDS
from fmbseg_jax.pretrained.hub import COMMIT
from fmbseg_jax.vocabulary import IGNORE

_DESCRIPTIONS = "_", "manifest"
_LONGEST = 4096  # letters of a word, and of a path
_LARGEST = 16_000_000  # bytes; with 65,535 words it has 2 million
_SIZES = {
    "output": 65_536, "mlp_ratio": AT_MOST["train.mlp_ratio"], "heads": AT_MOST["train.heads"],
}  # fmt: skip
"""The most that an aligner may ask for."""


def sizes(folder: Path) -> dict[str, int]:
    """By path in the folder, the size of each file.

    Raises:
      UserError: something there is no file of its own, or one of Orbax's descriptions is huge;
        reading it would never end.
    """
    found = {}
    for path in files_of(folder):
        size = path.stat().st_size
        if path.name.startswith(_DESCRIPTIONS) and size > _LARGEST:
            raise UserError(f"{path} has {size:,} bytes, and {_LARGEST:,} at most. Fetch it again.")
        found[path.relative_to(folder).as_posix()] = size
    return found


_FORM: dict[str, type] = {
    "aligner": dict,
    "vision": dict,
    "clip": dict,
    "words": list,
    "config": dict,
    "images": int,
}


def read_model(folder: str | Path) -> dict[str, Any]:
    """model.json of an export.

    Raises:
      UserError: the folder is none, lacks some of its files, or its model.json is not as we write
        it; the message says which.
    """
    path, old = Path(folder) / "model.json", moved_aside(Path(folder))
    if not Path(folder).exists() and old.is_dir():
        raise UserError(
            f"{folder} is not there: a program was ended as it was replacing it. The export that "
            f"was there is whole, in {old}: rename it to {Path(folder).name}, or train again."
        )
    if not path.is_file() or not (Path(folder) / "params").is_dir():
        raise UserError(
            f"{folder} is no exported aligner (no model.json, or no params/). Give the export/ "
            "folder of a work folder in which train.py has finished, or the id of an export on "
            "the Hugging Face hub, USER/NAME."
        )
    try:
        size = path.stat().st_size
        if size > _LARGEST:
            faults = [f"it has {size:,} bytes, and {_LARGEST:,} at most"]
        else:
            model = texts.parse(path.read_bytes(), object)
            faults = list(_faults(model))
    except ValueError as error:
        faults = [str(error)]
    if faults:
        raise UserError(f"{path} is not the model.json of an export: {'; '.join(faults[:5])}.")
    there = sizes(Path(folder) / "params")
    known = model.get("params", {}).get("files", {})
    if wrong := [name for name, size in known.items() if there.get(name) != size]:
        raise UserError(
            f"{folder} lacks {len(wrong)} of {len(known)} files of its parameters, or they are cut "
            f"short, such as params/{wrong[0]}. Fetch or copy it again."
        )
    return model


def check(model: dict[str, Any], made_of: epath.PathLike) -> None:
    """Raises UserError where nobody could load an export with such a model.json.

    Args:
      made_of: where its words and encoders were read, for the message.
    """
    if faults := list(_faults(json.loads(json.dumps(model)))):
        raise UserError(
            f"What is trained on {made_of} could not be loaded again: in its model.json "
            f"{'; '.join(faults[:5])}. Mend metadata.json there."
        )


def _is_line(value: Any) -> bool:
    """Whether this is a string that a terminal can show."""
    return isinstance(value, str) and len(value) <= _LONGEST and printable(value) == value


def _faults(model: Any) -> Iterator[str]:
    """What is not as `save_export` writes it."""
    if not isinstance(model, dict):
        yield "it is no object"
        return
    for name, kind in _FORM.items():
        if not isinstance(model.get(name), kind):
            yield f"{name!r} is no {kind.__name__}"
        elif name in ("vision", "clip"):
            for part in ("source", "hash"):
                if not _is_line(model[name].get(part)):
                    yield f"{name}.{part} is no string of one line"
            if not re.fullmatch(f"({COMMIT})?", str(model[name].get("revision", ""))):
                yield f"{name}.revision is no commit"
    aligner = model.get("aligner")
    if isinstance(aligner, dict):
        numbers = {name: aligner.get(name) for name in ("output", "mlp_ratio", "heads")}
        if aligner.keys() != {"kind", *numbers} or aligner["kind"] not in KINDS:
            yield f"'aligner' is not a kind ({', '.join(KINDS)}) with its sizes"
        for name, value in numbers.items():
            if type(value) is not int or value < 1:
                yield f"aligner.{name} is no positive number"
            elif value > _SIZES[name]:
                yield f"aligner.{name} is {value}; it is at most {_SIZES[name]}"
    words = model.get("words")
    if isinstance(words, list) and (texts.fault(words, [str]) or not all(map(_is_line, words))):
        yield "'words' are not strings of one line"
    elif isinstance(words, list) and len(words) > IGNORE:
        yield f"'words' are {len(words)}; label maps have room for {IGNORE}"
    params = model.get("params", {"files": {}, "hash": ""})
    if not (
        isinstance(params, dict) and isinstance(params.get("files"), dict) and "hash" in params
    ):
        yield "'params' is not their hash and files"
