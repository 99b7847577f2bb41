"""What lies beside a published model's weights: config.json, and how its pixels are normalised."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from fmbseg_jax.errors import UserError
from fmbseg_jax.io import texts
from fmbseg_jax.nn.transformer import ACTIVATIONS, Spec

CLIP = "clip"
DINO = "dinov2", "dinov2_with_registers", "dinov3_vit"
SAM = "sam"
READ = (CLIP, *DINO, SAM)
"""Kinds of models that are read here, as config.json has them in `model_type`."""

PROCESSORS = "processor_config.json", "preprocessor_config.json"
"""Where the normalisation stands: as transformers 5 writes it, and as those before did."""

_NAMES = {
    "siglip": "SigLIP", "siglip2": "SigLIP 2", "siglip_vision_model": "SigLIP's image tower",
    "clip_vision_model": "CLIP's image tower alone", "clip_text_model": "CLIP's text tower alone",
    "sam_hq": "SAM-HQ", "sam2": "SAM 2", "sam2_video": "SAM 2", "sam3": "SAM 3",
    "sam3_video": "SAM 3", "edgetam": "EdgeTAM", "timm_wrapper": "a model of timm",
    "dinov3_convnext": "a ConvNeXt of DINOv3", "radio": "C-RADIO", "vit": "ViT", "swin": "Swin",
}  # fmt: skip
_EXAMPLES = {
    CLIP: "openai/clip-vit-base-patch16",
    SAM: "facebook/sam-vit-base",
    **dict.fromkeys(DINO, "facebook/dinov2-base"),
}


def read(folder: Path, source: str) -> dict[str, Any]:
    """The config.json of a published model.

    Raises:
      UserError: there is none, or it is no JSON object; the message names the layout that the
        folder has instead, where it is a known one.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{source} has no config.json{other_layout(folder)}; give a folder in Hugging Face "
            "layout, or a hub id such as facebook/dinov2-base."
        )
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; raises UserError where it is none."""
    return texts.read_json(path, dict, _ADVICE)


_ADVICE = "Fetch it again."


def check_kind(
    config: dict[str, Any], source: str, kinds: Collection[str] = READ, role: str = "a model here"
) -> str:
    """The `model_type` of a config.json, if it is one of `kinds`.

    Args:
      role: what the model is for, for the message.

    Raises:
      UserError: it is another; the message names it as people know it, and what to give instead.
    """
    kind = config.get("model_type")
    if kind in kinds:
        return str(kind)
    name = _NAMES.get(str(kind), f"a {kind!r} model")
    if kind is None:
        name = "a model of timm" if "architecture" in config else "a model without model_type"
    examples = dict.fromkeys(_EXAMPLES[known] for known in kinds)
    raise UserError(
        f"{source} is {name}; {role} is {'one of ' if len(kinds) > 1 else 'a '}"
        f"{', '.join(kinds)}, such as {' or '.join(examples)}."
    )


def other_layout(folder: Path) -> str:
    """Which other layout a folder has, as the end of a clause; "" where none is known."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if any(name.startswith("open_clip") for name in names):
        return " (it is in OpenCLIP's layout; many such models are published in both)"
    if {"model.safetensors", "pytorch_model.bin"} & names and "config.json" in names:
        return ""
    pickles = sorted(name for name in names if name.endswith((".pt", ".pth")))
    return f" (it has {pickles[0]}: give that file's path, if it is the model)" if pickles else ""


Channels = tuple[float, float, float]


def normalisation(
    folder: Path, source: str, usual: tuple[Channels, Channels] | None = None
) -> tuple[Channels, Channels]:
    """Mean and standard deviation of pixels in [0, 1], by channel, as the model was trained with.

    Args:
      usual: what its kind of model takes where the folder does not say; None: it has to.

    Raises:
      UserError: the folder does not say, or the model wants other pixels than these.
    """
    for path in (folder / name for name in PROCESSORS):
        settings = read_json(path) if path.is_file() else {}
        if path.name == PROCESSORS[0]:
            settings = settings.get("image_processor") or {}
            if not isinstance(settings, dict):
                raise UserError(f"{path} is damaged: image_processor is no object. {_ADVICE}")
        if settings:
            return _mean_and_std(settings, path)
    if usual is None:
        raise UserError(
            f"{source} has no preprocessor_config.json with image_mean and image_std (nor a "
            "processor_config.json of transformers 5): copy it from where the model was published."
        )
    return usual


def _mean_and_std(settings: dict[str, Any], path: Path) -> tuple[Channels, Channels]:
    values = [settings.get(name) for name in ("image_mean", "image_std")]
    three = not texts.fault(values, [(float, float, float)])
    factor = settings.get("rescale_factor") or 1 / 255
    scaled = type(factor) in (int, float) and abs(factor * 255 - 1) < 1e-3
    off = [name for name in ("do_rescale", "do_normalize") if settings.get(name) is False]
    if not three or not scaled or off or min(values[1]) <= 0:  # type: ignore[type-var, arg-type]
        raise UserError(
            f"{path} does not say how pixels in [0, 1] are normalised: expected image_mean and "
            f"image_std of three numbers each, the latter above 0, rescale_factor 1/255, "
            f"do_rescale and do_normalize; it has {values}, {factor!r}"
            f"{', without '.join(['', *off])}."
        )
    (a, b, c), (d, e, f) = values  # type: ignore[misc]
    return (a, b, c), (d, e, f)


# Older published configs hold only what differs from these (transformers' CLIPTextConfig).
_CLIP_DEFAULTS: dict[str, dict[str, Any]] = {
    "text": {
        "hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8,
        "intermediate_size": 2048, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
        "vocab_size": 49408, "max_position_embeddings": 77,
    },
    "vision": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
        "image_size": 224, "patch_size": 32,
    },
}  # fmt: skip


_TOWERS = {
    f"{tower}_config{ending}?": dict | None for tower in _CLIP_DEFAULTS for ending in ("", "_dict")
}


def clip_tower(config: dict[str, Any], tower: str) -> dict[str, Any]:
    """The sizes of one tower in the config.json of a CLIPModel, with transformers' defaults.

    Older files say them twice, in `text_config` and in `text_config_dict`. transformers takes the
    second, with its own defaults for what is not there.

    Args:
      tower: "text" or "vision".
    """
    first, second = config.get(f"{tower}_config") or {}, config.get(f"{tower}_config_dict") or {}
    return _CLIP_DEFAULTS[tower] | (second or first)


def read_clip(folder: Path, source: str) -> dict[str, Any]:
    """The config.json of a CLIP.

    Raises:
      UserError: it is of another model; or what it says twice contradicts itself, so that nobody
        can tell which is meant.
    """
    config = read(folder, source)
    check_kind(config, source, (CLIP,), "the model of words")
    if found := texts.fault(config, _TOWERS):
        raise UserError(f"{folder / 'config.json'} is damaged: {found}. {_ADVICE}")
    for tower, defaults in _CLIP_DEFAULTS.items():
        first, whole = config.get(f"{tower}_config") or {}, clip_tower(config, tower)
        wrong = [name for name in defaults if first.get(name, whole[name]) != whole[name]]
        if wrong:
            listed = "; ".join(f"{name}: {first[name]!r} and {whole[name]!r}" for name in wrong)
            raise UserError(
                f"The config.json of {source} contradicts itself in {tower}_config and "
                f"{tower}_config_dict ({listed}). Delete the one that is wrong."
            )
    return config


def blocks(tower: dict[str, Any]) -> Spec:
    """The transformer of a tower whose sizes have the names that DINOv3 and CLIP give them."""
    return Spec(
        width=tower["hidden_size"],
        depth=tower["num_hidden_layers"],
        heads=tower["num_attention_heads"],
        mlp_width=tower["intermediate_size"],
        activation=activation(tower),
        epsilon=tower["layer_norm_eps"],
    )


def activation(config: dict[str, Any]) -> str:
    """The activation of the MLP; raises ValueError where it is none of ours."""
    if config["hidden_act"] not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"its activation, {config['hidden_act']!r}, is not one of {known}")
    return config["hidden_act"]


def check_range(name: str, value: Any, least: int, most: int) -> None:
    """Raises ValueError where a size is out of bounds: a config.json may be another person's."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}, not a whole number from {least} to {most}")


def described(describe: Callable[[Any], Any], config: dict[str, Any], source: str) -> Any:
    """What a family makes of a config.json; raises UserError where that is of no model."""
    try:
        return describe(config)
    except KeyError as error:
        fault = f"lacks {error}"
    except UserError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        fault = f"describes no model: {error}"
    raise UserError(
        f"The config.json of {source} {fault}. Take it from where the model is published."
    )
