"""Label PNGs made by people, in the place of stage 1: training on the truth is the ceiling."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from fmbseg_jax.data import images
from fmbseg_jax.data.example import PseudoLabel
from fmbseg_jax.errors import UserError
from fmbseg_jax.vocabulary import IGNORE


def annotated_image(folder: str | Path, data: bytes, filename: str, num_words: int) -> PseudoLabel:
    """The record of an image file whose label map is `folder/NAME.png`."""
    path = Path(folder, PurePosixPath(filename).with_suffix(".png"))
    size = images.decode(data).shape[:2]
    labels = read_label_map(path, num_words)
    if labels.shape != size:
        raise UserError(
            f"{path} is {labels.shape[1]} × {labels.shape[0]} pixels, its image {filename} "
            f"{size[1]} × {size[0]} (upright). A label map has the size of its image."
        )
    return PseudoLabel(image=data, filename=filename, labels=labels)


def read_label_map(path: Path, num_words: int) -> np.ndarray:
    """A grey (8- or 16-bit) or palette PNG → uint16 [H, W]; 255 of 8 bits means IGNORE."""
    try:
        with Image.open(path) as file:
            mode, labels = file.mode, np.asarray(file)
    except FileNotFoundError:
        raise UserError(
            f"No label map at {path}. data.annotations holds NAME.png for each image NAME.jpg; "
            "give only images that have one."
        ) from None
    except Exception as error:  # Pillow's readers raise many kinds on damaged files
        raise UserError(f"The label map {path} cannot be read: {error}") from None
    if mode not in ("L", "P") and not mode.startswith("I"):
        raise UserError(
            f"The label map {path} has mode {mode}; expected one channel of 8 or 16 bits that "
            "holds word indices."
        )
    if mode in ("L", "P"):
        labels = np.where(labels == 255, IGNORE, labels.astype(np.uint16))
    wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels >= num_words))]
    if wrong.size:
        raise UserError(
            f"The label map {path} has the index {int(wrong.flat[0])}; {num_words} words allow 0 "
            f"to {num_words - 1}, and {IGNORE} (255 in 8 bits) for no word."
        )
    return labels.astype(np.uint16)
