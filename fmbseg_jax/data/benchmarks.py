"""Annotated images on disk, for evaluation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from fmbseg_jax.data import images, label_maps
from fmbseg_jax.errors import UserError
from fmbseg_jax.vocabulary import read_words


@dataclasses.dataclass(frozen=True)
class Folder:
    """Any folder with `images/`, `labels/` (PNGs of word indices) and `words.txt`.

    `labels/` mirrors `images/` with the ending .png. In an 8-bit PNG 255 means "not labelled", in a
    16-bit one 65535 does.
    """

    root: Path
    words: tuple[str, ...]
    names: tuple[str, ...]
    """Images, relative to `images/`."""

    @classmethod
    def open(cls, root: str | Path) -> Folder:
        """Checks the layout; raises UserError that lists what was looked for and is not there."""
        root = Path(root)
        wanted = {"images/": root / "images", "labels/": root / "labels", "words.txt": root / "words.txt"}
        missing = [name for name, path in wanted.items() if not path.exists()]
        if missing:
            raise UserError(
                f"{root or 'eval.folder'} is no annotated folder: it lacks {', '.join(missing)}. "
                "Expected images/NAME.jpg, labels/NAME.png with word indices, and words.txt."
            )
        names = images.find_images(root / "images")
        images.png_names(names)
        without = [name for name in names if not _label_path(root, name).exists()]
        if without:
            raise UserError(
                f"{root} has {len(without)} images without a label map, such as {without[0]} "
                f"(looked for {_label_path(root, without[0])})."
            )
        return cls(root, read_words(root / "words.txt"), tuple(names))

    def image(self, name: str) -> np.ndarray:
        """uint8 [H, W, 3]."""
        try:
            return images.decode((self.root / "images" / name).read_bytes())
        except images.ImageError as error:
            raise UserError(f"{self.root / 'images' / name} {error}") from None

    def labels(self, name: str) -> np.ndarray:
        """uint16 [H, W], word index or IGNORE."""
        return label_maps.read(_label_path(self.root, name), len(self.words))


def _label_path(root: Path, name: str) -> Path:
    return (root / "labels" / name).with_suffix(".png")
