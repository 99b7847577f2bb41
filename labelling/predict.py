"""Training-free segmentation: the label maps of stage 1 themselves, for evaluation.

    predictions/clip_patches/NAME.png   each pixel's most similar of all words: CLIP alone
    predictions/stage1_1/NAME.png       masks from points
    predictions/stage1_2/NAME.png       automatic masks
    predictions/stage1/NAME.png         both

16-bit PNGs of word indices, in the last three IGNORE (65535) where no mask is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fmbseg_jax.data import images, label_maps
from fmbseg_jax.data.images import ImageError
from fmbseg_jax.errors import UserError
from fmbseg_jax.workfolder import remember
from labelling.compose import most_similar
from labelling.dataset import read_file
from labelling.stage1 import Labeller

KINDS = "clip_patches", "stage1_1", "stage1_2", "stage1"


def predict(labeller: Labeller, image: np.ndarray) -> dict[str, np.ndarray]:
    """All four label maps, uint16 [H, W], of an image, uint8 [H, W, 3], from one pass."""
    scene = labeller.look(image, stages="both")
    combine = labeller.options.combine
    return {
        "clip_patches": most_similar(scene.similarities, image.shape[:2]),
        "stage1_1": scene.labels(combine, "1.1"),
        "stage1_2": scene.labels(combine, "1.2"),
        "stage1": scene.labels(combine),
    }


def predict_folder(
    folder: Path, out: Path, words: Sequence[str], load: Callable[[], Labeller], strict: bool
) -> None:
    """Segments all images of a folder into `out`; those that are there already are passed over.

    Args:
      load: makes the labeller; called only if there is something to do.
    """
    names = images.find_images(folder)
    targets = images.png_names(names)
    out.mkdir(parents=True, exist_ok=True)
    facts = {"images": str(folder.resolve()), "words": list(words)}
    remember(out / "manifest.json", facts, "Delete that folder, or give another --workdir.")
    # The last kind is written last: where it is, so are the others.
    todo = [name for name in names if not (out / KINDS[-1] / targets[name]).exists()]
    skipped = []
    if todo:
        labeller = load()
        with tqdm(total=len(names), initial=len(names) - len(todo), unit="image") as bar:
            for name in todo:
                try:
                    image = images.decode(read_file(folder, name))
                    _write(out, targets[name], predict(labeller, image))
                except ImageError as error:
                    if strict:
                        raise UserError(f"{name} {error}.") from None
                    skipped.append(f"  {name} {error}")
                bar.update()
    print(f"\npredictions of {len(names) - len(skipped)} images in {out}: {', '.join(KINDS)}")
    if skipped:
        print(f"{len(skipped)} images skipped:", *skipped, sep="\n")


def _write(out: Path, target: str, found: dict[str, np.ndarray]) -> None:
    for kind in KINDS:
        path = out / kind / target
        path.parent.mkdir(parents=True, exist_ok=True)
        images.write_atomically(path, label_maps.encode(found[kind]))
