"""Training-free segmentation: the label maps of stage 1 themselves, for evaluation.

    predictions/SET/clip_patches/NAME.png   each pixel's most similar of all words: CLIP alone
    predictions/SET/stage1_1/NAME.png       masks from points
    predictions/SET/stage1_2/NAME.png       automatic masks
    predictions/SET/stage1/NAME.png         both

SET is the folder's or benchmark's name. 16-bit PNGs of class indices; where no mask is, the last
three have IGNORE (65535), or 0 in a benchmark whose class 0 is the background.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fmbseg_jax.data import images, label_maps
from fmbseg_jax.data.images import ImageError
from fmbseg_jax.data.sources import Sources, State, state
from fmbseg_jax.errors import NotFiniteError, UserError
from fmbseg_jax.io import files
from fmbseg_jax.runs.workfolder import remember
from fmbseg_jax.vocabulary import IGNORE
from fmbseg_jax.vocabulary.classes import Classes
from labelling.compose import most_similar
from labelling.shards.dataset import read_file
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


def predict_images(
    root: Path,
    files: Mapping[str, Path],
    classes: Classes,
    out: Path,
    load: Callable[[], Labeller],
    *,
    reading: images.Reading,
    unlabelled: int,
    strict: bool,
) -> None:
    """Segments images into `out`; what is there already, of the images as they are, stays.

    Args:
      root: what is remembered as their origin.
      files: by name.
      load: makes the labeller of the classes' words; called only if there is something to do.
      reading: how image files are read.
      unlabelled: what a pixel gets that no mask covers.
      strict: stop at the first image that cannot be read.
    """
    out.mkdir(parents=True, exist_ok=True)
    facts = {"images": str(root.resolve()), "words": list(classes.words)}
    remember(out / "manifest.json", facts, "Delete that folder, or give another --workdir.")
    made_from = Sources(out / "made_from.jsonl")

    def done(name: str) -> bool:
        # The last kind is written last: where it is, so are the others.
        there = label_maps.path(out / KINDS[-1], name).exists()
        return there and made_from.is_current(name, files[name])

    todo = [name for name in files if not done(name)]
    skipped, deep = list[str](), list[str]()
    if todo:
        labeller = load()
        with tqdm(total=len(files), initial=len(files) - len(todo), unit="image") as bar:
            for name in todo:
                try:
                    source = _state(files[name])
                    data = read_file(files[name].parent, files[name].name)
                    if images.is_deep(data, name):
                        deep.append(name)
                    image = images.decode(data, reading, files[name].name)
                    for kind, found in predict(labeller, image).items():
                        known = classes.labels(np.where(found == IGNORE, 0, found))
                        labels = np.where(found == IGNORE, np.uint16(unlabelled), known)
                        _write(label_maps.path(out / kind, name), labels)
                    made_from.add(name, source)
                except ImageError as error:
                    if strict:
                        raise UserError(f"{name} {error}.") from None
                    skipped.append(f"  {name} {error}")
                except NotFiniteError as error:
                    raise NotFiniteError(f"{name}: {error}") from None
                bar.update()
    print(f"\npredictions of {len(files) - len(skipped)} images in {out}: {', '.join(KINDS)}")
    if deep:
        print(reading.of_deep(len(deep), deep[0]))
    if skipped:
        print(f"{len(skipped)} images skipped:", *skipped, sep="\n")


def _state(path: Path) -> State:
    try:
        return state(path)
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror}") from None


def _write(path: Path, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, label_maps.encode(labels))
