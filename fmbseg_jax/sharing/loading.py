"""From an exported aligner, or CLIP alone, to a `Segmenter`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmbseg_jax import config as config_lib
from fmbseg_jax.encoders import identity
from fmbseg_jax.errors import UserError
from fmbseg_jax.methods.aligned import Aligned
from fmbseg_jax.methods.maskclip import ClipPatches
from fmbseg_jax.parallel import hosts
from fmbseg_jax.pretrained import hub
from fmbseg_jax.segmentation.segmenter import Segmenter
from fmbseg_jax.sharing import exports


def load(
    path: str | Path,
    protocol: config_lib.Eval | Mapping[str, Any] | None = None,
    *,
    vision: str = "",
    clip: str = "",
) -> Segmenter:
    """Loads an exported aligner.

    Args:
      path: the export/ folder of a work folder, or the id of one on the Hugging Face hub, perhaps
        with a commit, tag or branch: "USER/NAME@REVISION".
      protocol: sizes, windows and templates; None takes those of the training's config, with
        antialiasing where images shrink; a dict, these with changes: `{"batch_size": 64}`.
      vision, clip: where the encoders are now, a folder or hub id each; "" where they were at
        training. Other weights than those are refused.

    Raises:
      UserError: the folder is no export, an encoder cannot be found or is another one, or JAX has
        no device.
    """
    if not isinstance(protocol, config_lib.Eval | Mapping | None):
        raise UserError(
            f'The protocol is a dict of fields of Eval, {{"batch_size": 64}}; got {protocol!r}.'
        )
    folder = exports.locate(path)
    while True:
        model = exports.read_model(folder)
        try:
            segmenter = _load(folder, model, protocol, vision, clip)
        except UserError:
            if exports.read_model(folder) == model:
                raise
            continue
        if exports.read_model(folder) == model:
            return segmenter
        # A training has put a new export in its place: parts of two would not fit.


def _load(
    folder: Path,
    model: dict[str, Any],
    protocol: config_lib.Eval | Mapping[str, Any] | None,
    vision: str,
    clip: str,
) -> Segmenter:
    if isinstance(protocol, config_lib.Eval):
        protocol = config_lib.Config(eval=protocol).validate().eval
    else:
        protocol = _protocol(model["config"], protocol or {})
    segmenter, aligned = untrained(model, protocol, vision=vision, clip=clip)
    aligned.use(exports.load_export(folder, aligned.shapes))
    return segmenter


def untrained(
    model: dict[str, Any], protocol: config_lib.Eval, *, vision: str = "", clip: str = ""
) -> tuple[Segmenter, Aligned]:
    """What an export's model.json describes: a segmenter, and its model, which lacks parameters."""
    hosts.check_devices()
    aligned = Aligned(model, _same_weights(model, "vision", vision), protocol.compute)
    clip = _same_weights(model, "clip", clip)
    return Segmenter(aligned, clip, model["clip"]["hash"], protocol), aligned


def clip_patches(clip: str, protocol: config_lib.Eval) -> Segmenter:
    """CLIP's own patches as a segmenter: the paper's baseline."""
    hosts.check_devices()
    return Segmenter(
        ClipPatches(clip, protocol.compute), clip, identity.content_hash(clip), protocol
    )


def _protocol(leaves: dict[str, Any], changes: Mapping[str, Any]) -> config_lib.Eval:
    """The config's eval section, with changes; what it lacks of this version has its default."""
    ours, config = config_lib.flatten(config_lib.Eval()), config_lib.Config()
    for name, usual in ours.items():
        # How large an image this machine can hold is not for an export to say.
        value = usual if name == "max_megapixels" else leaves.get(f"eval.{name}", usual)
        setattr(config.eval, name, _typed(name, value, usual))
    config.eval.antialias = True
    if "{}" not in config.eval.template and "template" not in changes:
        raise UserError(
            f"The export names a file of templates, {config.eval.template!r}, as eval.template. "
            'Give it: load(path, {"template": FILE}).'
        )
    for name, value in changes.items():
        setattr(config.eval, name, _typed(name, value, ours.get(name, value)))
    name = "The export's config" + (", with your changes," if changes else "")
    return config.validate(name).eval


def _typed(name: str, value: Any, usual: Any) -> Any:
    """The value of a field, where it is of the field's type."""
    if type(value) is type(usual) or (type(usual) is float and type(value) is int):
        return value
    raise UserError(
        f"eval.{name} is of type {type(usual).__name__}, like {usual!r}; got {value!r}."
    )


def _same_weights(model: dict[str, Any], name: str, given: str) -> str:
    """Where the encoder "vision" or "clip" is; raises UserError where it is not, or is another.

    Of the hub it is the commit that was recorded, whatever is there now under its name.
    """
    trained = model[name]
    source = given or trained["source"]
    at_commit = f"{trained['source']}@{trained.get('revision')}"
    if not given and trained.get("revision") and hub.is_id(at_commit):
        source = at_commit
    try:
        found = identity.content_hash(source, trained["hash"])
    except UserError as error:
        raise UserError(
            f"The {name} encoder that this aligner was trained with was at {trained['source']}. "
            f"Give the place where it is now: --{name}=FOLDER (in Python {name}=...).\n{error}"
        ) from None
    if found != trained["hash"]:
        raise UserError(
            f"The {name} encoder at {source} has other values (weights, sizes, normalisation, "
            f"tokenizer) than the one that the aligner was trained with (hash {found}, then "
            f"{trained['hash']}). Give that one, "
            f"--{name}=FOLDER, or train again."
        )
    return source
