"""The model card of an exported aligner: what it is, what it was made from, how it is used."""

from __future__ import annotations

from typing import Any

from fmbseg_jax.pretrained import hub


def model_card(model: dict[str, Any]) -> str:
    """Markdown, with the header that the Hugging Face hub reads."""
    words = ", ".join(model["words"][:60]) + (", ..." if len(model["words"]) > 60 else "")
    encoders = [model[name]["source"] for name in ("vision", "clip")]
    published = "".join(f"\n- {hub.split(one)[0]}" for one in encoders if hub.is_id(one))
    base = f"base_model:{published}\n" if published else ""
    if model["config"].get("data.annotations"):
        labels = "It learnt from labels that people gave."
    elif model["config"].get("data.image_labels"):
        labels = "People said which words an image has; where they are, models found, with errors."
    else:
        labels = (
            "It learnt from labels that models made, with their errors and biases; no person has "
            "checked them."
        )
    versions = ", ".join(f"{name} {version}" for name, version in model["versions"].items())
    return f"""---
library_name: fmbseg-jax
pipeline_tag: image-segmentation
tags:
- open-vocabulary
- zero-shot
- jax
{base}---

# An FMbSeg aligner

Maps the patch features of a frozen vision encoder to CLIP's text space, so that any image is
segmented by any words.

    import fmbseg_jax
    labels = fmbseg_jax.load("path/of/this/folder").segment("photo.jpg", ["sky", "grass"])

| | |
|---|---|
| vision encoder | {_encoder(model["vision"])} |
| text encoder | {_encoder(model["clip"])} |
| aligner | {model["aligner"]["kind"]} |
| loss | {model["config"]["train.loss"]}, temperature {model["config"]["train.temperature"]} |
| trained on | {model["images"]} images, {model["steps"]} steps, {len(model["words"])} words |
| words | {words} |
| trained with | {versions} |
| started from | {model["config"]["train.start_from"] or "random parameters"} |

{labels}
model.json has the whole config.
"""


def _encoder(facts: dict[str, str]) -> str:
    commit = f", commit {facts['revision']}" if "revision" in facts else ""
    return f"{facts['source']}{commit} (weights {facts['hash']})"
