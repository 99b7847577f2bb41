"""Label PNGs made by people, in the place of stage 1: training on the truth is the ceiling."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from fmbseg_jax.data import images, label_maps
from fmbseg_jax.data.example import PseudoLabel
from fmbseg_jax.errors import UserError
from fmbseg_jax.io import spelling


def annotated_image(
    folder: str | Path,
    data: bytes,
    filename: str,
    num_words: int,
    reading: images.Reading = images.USUAL,
) -> PseudoLabel:
    """The record of an image file whose label map is `folder/NAME.png`."""
    path = annotation_path(folder, filename)
    size = images.decode(data, reading, filename).shape[:2]
    if not path.exists():
        raise UserError(
            f"No label map at {path}. data.annotations holds NAME.png for each image NAME.jpg; "
            "give only images that have one."
        )
    labels = label_maps.read(path, num_words, reading.megapixels)
    if fault := label_maps.size_fault(labels, size, filename):
        raise UserError(f"{path} {fault}")
    return PseudoLabel(image=data, filename=filename, labels=labels)


def annotation_path(folder: str | Path, filename: str) -> Path:
    """Where the label map of an image is looked for."""
    return spelling.beside(Path(folder), PurePosixPath(filename).with_suffix(".png").as_posix())
