"""What only some programs need, and the extra of the package that installs it."""

from __future__ import annotations

EXTRAS = {
    "torch": "label",
    "segment_anything": "label",
    "ray": "ray",
    "gradio": "app",
    "gcsfs": "gcs",
    "s3fs": "s3",
}
"""Extra by the name that is imported."""


def how_to_install(name: str) -> str:
    """The command for an import that failed, such as "torch.nn"; "" if it belongs to no extra."""
    extra = EXTRAS.get(name.split(".")[0])
    return f'pip install -e ".[{extra}]", in the project\'s folder' if extra else ""


def missing(error: ModuleNotFoundError) -> str:
    """What to say of a failed import; raises it again where no extra has what is missing."""
    command = how_to_install(error.name or "")
    if not command:
        raise error
    return f"\nerror: {error.name} is not installed. This needs: {command}"
