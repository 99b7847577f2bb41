"""Program: a folder of images and words → label maps, overlays and a COCO file.

    fmbseg segment --model=EXPORT --images=DIR --words="sky,grass" --out=DIR

Reads the aligner at EXPORT (the export/ folder of a work folder, or an id of the Hugging Face hub),
and every image in DIR and its sub-folders, of a file, or of a pattern such as 'photos/**/*.jpg'.
Writes, under the images' own names and sub-folders,

    OUT/labels/NAME.png     word index of each pixel (255, of many words 65535: background)
    OUT/overlays/NAME.jpg   the image in the colours of its words, with a legend
    OUT/scores/NAME.npz     with --scores: similarities of each pixel with each word
    OUT/coco.json           all masks, run-length encoded, for annotation tools
    OUT/contact_sheet.png, OUT/words.txt, OUT/skipped.tsv (images that cannot be read)

Run again to continue.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from fmbseg_jax import vocabulary
from fmbseg_jax.data import finding, images
from fmbseg_jax.data.finding import Found, find
from fmbseg_jax.data.sources import State, state
from fmbseg_jax.errors import UserError
from fmbseg_jax.io import files, machine
from fmbseg_jax.io.threads import Room, Writers, in_order
from fmbseg_jax.outputs.folder import Outputs
from fmbseg_jax.outputs.overlays import percent
from fmbseg_jax.runs import program, workfolder
from fmbseg_jax.runs.progress import progress
from fmbseg_jax.segmentation.image_features import Prepared
from fmbseg_jax.segmentation.segmenter import Segmented, Segmenter
from fmbseg_jax.segmentation.similarities import by_pixel
from fmbseg_jax.sharing.loading import load
from fmbseg_jax.vocabulary.classes import Background, Classes

_THREADS = 8  # images read, and results written, at once
_PIXELS = 64_000_000  # of their images, in their own sizes, together


class _Read(NamedTuple):
    """An image, ready for the model."""

    name: str
    made_from: State
    """Of its file, before it was read."""
    prepared: Prepared


def segment_images(
    segmenter: Segmenter, found: Found, classes: Classes, outputs: Outputs, *, strict: bool
) -> dict[str, str]:
    """Segments images in batches; returns the reasons of those that cannot be read.

    What is large, the images in their own sizes, is held by few threads at a time; so each is
    decoded twice, for the model and for its overlay.
    """
    todo = [name for name in found.names if not outputs.done(name)]
    skipped: dict[str, str] = {}
    deep: list[str] = []
    reading, room = outputs.reading, Room(_PIXELS)

    def read(i: int) -> _Read | UserError:
        path = found.folder / todo[i]
        try:
            made_from, data = state(path), files.read_file(path)
            with room.take(math.prod(images.size(data, todo[i]))):
                image = images.decode(data, reading, todo[i])
                if images.is_deep(data, todo[i]):
                    deep.append(todo[i])
                return _Read(todo[i], made_from, segmenter.prepare(image))
        except images.ImageError as error:
            reason = str(error)
        except OSError as error:
            if not isinstance(error, PermissionError):
                machine.let_through(error, path)
            reason = f"cannot be read: {error.strerror}"
        return UserError(f"{path} {reason}" if strict else reason)

    def readable() -> Iterator[tuple[_Read, Prepared]]:
        for name, one in zip(todo, in_order(len(todo), read, _THREADS), strict=True):
            if isinstance(one, _Read):
                yield one, one.prepared
            elif strict:
                raise one
            else:
                skipped[name] = str(one)
                bar.update()

    def write(one: Segmented[_Read]) -> None:
        name, made_from, prepared = one.key
        scores = None
        with room.take(one.labels.size):
            image = images.decode(files.read_file(found.folder / name), reading, name)
            if outputs.with_scores:
                scores = by_pixel(prepared.layout, one.compared, classes, np.float16)
            outputs.write(name, made_from, image, one.final, scores)

    done = len(found.names) - len(todo)
    at_once = 1 if outputs.with_scores else _THREADS  # scores take gigabytes
    with (
        progress(len(found.names), "segment", done) as bar,
        Writers(at_once, bar.update) as writers,
    ):
        for one in segmenter.label_maps(readable(), classes):
            writers.submit(write, one)
    if deep:
        print(reading.of_deep(len(deep), min(deep)))
    return skipped


def _told(shares: Mapping[str, float], classes: Classes, background: str) -> str:
    """The words by their share of all pixels, and what is strange about it."""
    told = ", ".join(f"{word} {percent(share)}" for word, share in shares.items())
    if len(classes.words) == 1 and classes.threshold is None:
        told += (
            "\nOne word alone has every pixel: give --background=WORDS for what else there is, or "
            "--threshold=SIMILARITY."
        )
    if shares.get(background, 0) > 0.95:
        told += (
            "\nNearly everything is background: give a lower --threshold, or fewer background "
            "words; --scores writes the similarities."
        )
    return f"Of all pixels: {told}"


def _claim(outputs: Outputs, segmenter: Segmenter, classes: Classes) -> None:
    """Refuses results made with other words, another model, or from another folder of images."""
    made = {
        "words": list(outputs.words),
        "compared": list(classes.words),
        "threshold": classes.threshold,
        "protocol": segmenter.protocol,
        "weights": segmenter.weights_hash,
        "images": str(Path(FLAGS.images).absolute()),
    }
    advice = "Give another --out, or delete that folder."
    workfolder.remember(outputs.out / "segment.json", made, advice)
    words = "\n".join(outputs.words) + "\n"
    files.write_atomically(outputs.out / "words.txt", words.encode())


def _background() -> Background:
    if FLAGS.background and FLAGS.threshold is not None:
        raise UserError("Give --background=WORDS or --threshold=SIMILARITY, not both.")
    if re.fullmatch(r"[-+.\d]+", FLAGS.background):
        raise UserError(
            f"--background has words; --threshold={FLAGS.background} is the flag for a similarity."
        )
    if FLAGS.background:
        return vocabulary.parse_words(FLAGS.background)
    return FLAGS.threshold


_PROTOCOL = "batch_size", "compute", "pamr", "short_side", "deep", "max_megapixels"


def _changes() -> Mapping[str, Any]:
    """Fields of the protocol that flags set."""
    given = {name: FLAGS[name].value for name in _PROTOCOL}
    return {name: value for name, value in given.items() if value}


def main() -> None:
    program.require("model", "images", "words", "out")
    words, out = vocabulary.parse_words(FLAGS.words), workfolder.local(FLAGS.out, "--out")
    classes = Classes.of(words, _background())
    found = find(str(workfolder.local(FLAGS.images, "--images")), out)  # before the model is loaded
    pngs = finding.png_names(found.names, whole=True)
    segmenter = load(FLAGS.model, _changes(), vision=FLAGS.vision, clip=FLAGS.clip)
    reading = dataclasses.replace(segmenter.reading, prefix="--")
    outputs = Outputs(out, found.folder, words, pngs, FLAGS.scores, reading)
    with workfolder.hold(out):
        _claim(outputs, segmenter, classes)
        skipped = segment_images(segmenter, found, classes, outputs, strict=FLAGS.strict)
        for name, reason in skipped.items():
            print(f"skipped {name}: {reason}")
        if len(skipped) == len(found.names):
            raise UserError(f"None of the images in {FLAGS.images} can be read.")
        print("Writing coco.json and the contact sheet ...", flush=True)
        names = [name for name in found.names if name not in skipped]
        shares = outputs.finish(names, skipped, f"Segmented by {FLAGS.model} (FMbSeg)")
    print(_told(shares, classes, outputs.background))
    print(f"Label maps, overlays, coco.json and contact_sheet.png are in {out}; ", end="")
    print(f"skipped: {len(skipped)}" + (", listed in skipped.tsv." if skipped else "."))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    program.define_model()
    flags.DEFINE_string("images", "", "Folder of images, one file, or a pattern 'photos/**/*.jpg'.")
    flags.DEFINE_string("words", "", 'Words to segment by: "sky,grass", or a file with one a line.')
    flags.DEFINE_string("out", "", "Where the results go; made if needed.")
    flags.DEFINE_string("background", "", "Words for what is none of the words: they get no index.")
    flags.DEFINE_float(
        "threshold", None, "Cosine similarity that a pixel's word has to reach; else background."
    )
    flags.DEFINE_bool("scores", False, "Also write the similarities: 2 bytes a pixel and word.")
    flags.DEFINE_integer("batch_size", 0, "Windows at once on each device; 0: training's.")
    flags.DEFINE_string("compute", "", 'What is multiplied in: "float32", or "bfloat16" (faster).')
    flags.DEFINE_integer("pamr", 0, "Iterations of PAMR, which lets borders follow the colours.")
    flags.DEFINE_integer(
        "short_side", 0, "Short side that images are resized to, in pixels; 0: training's."
    )
    flags.DEFINE_string(
        "deep", "", 'How more than 8 bits a channel are scaled: by the "file" (default) or "type".'
    )
    flags.DEFINE_integer("max_megapixels", 0, "Most pixels of an image, in millions; 0: 178.", 0)
    flags.DEFINE_bool("strict", False, "Stop at the first image that cannot be read.")
    program.run(main)
