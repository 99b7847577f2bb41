"""Stage 1 as a program: images and words → TFRecord shards of pseudo labels.

    python -m labelling --config=configs/toy.py --workdir=work/toy
    python -m labelling --config=FILE --workdir=DIR --images=DIR --words=FILE --figures=8
    python -m labelling --config=FILE --workdir=DIR --predict

A run that was stopped, or killed, goes on where it was when the same command is given again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags
from tqdm import tqdm

from fmbseg_jax import program, workfolder
from fmbseg_jax.config import Config, flatten
from fmbseg_jax.data import images
from fmbseg_jax.data.example import PseudoLabel
from fmbseg_jax.errors import UserError
from fmbseg_jax.vocabulary import parse_words, read_words
from labelling.annotated import annotated_image
from labelling.counts import Counts
from labelling.dataset import Dataset, read_file
from labelling.detection import ImageLabels, read_image_labels

if TYPE_CHECKING:  # PyTorch takes seconds to import: only where there is something to label
    from labelling.stage1 import Labeller

CONFIG, WORKDIR = program.define_config()
IMAGES = flags.DEFINE_string("images", None, "Folder of images, instead of config.data.images.")
WORDS = flags.DEFINE_string("words", None, "Word list, instead of config.data.words.")
STRICT = flags.DEFINE_bool("strict", False, "Stop at the first image that cannot be read.")
FIGURES = flags.DEFINE_integer("figures", 0, "Draw the first so many records.", lower_bound=0)
PREDICT = flags.DEFINE_bool(
    "predict", False, "Segment --images (default: config.eval.folder/images) without training."
)


def main() -> None:
    config: Config = CONFIG.value
    config.data.words = WORDS.value or config.data.words
    if not config.data.words:
        raise UserError("No words: give --words=FILE (or sky,grass,...) or set config.data.words.")
    if PREDICT.value:
        predict_images(config.validate())
        return
    config.data.images = IMAGES.value or config.data.images
    if not config.data.images:
        raise UserError("No images: give --images=DIR or set config.data.images.")
    label_images(config.validate())


_USED = "models.clip", "models.sam", "label"


def label_images(config: Config) -> None:
    """Labels all images that are not labelled yet, and finishes the dataset."""
    words = parse_words(config.data.words)
    names = images.find_images(config.data.images)
    given = read_image_labels(config.data.image_labels, words, names)
    folder = Path(WORKDIR.value, "pseudo_labels")
    dataset = Dataset(folder, names, config.label.images_per_shard)
    missing = dataset.missing()
    if missing and not config.data.annotations:
        _check_models(config)  # before the work folder is claimed with their names
    workdir = workfolder.claim(
        WORKDIR.value, config, ("data", *_USED), "pseudo_labels/*.tfrecord-*"
    )
    given_lists = {name: indices.tolist() for name, indices in given.items()}
    dataset.open({"words": list(words), "image_labels": given_lists})

    labeller = None
    if not config.data.annotations and (missing or FIGURES.value):
        labeller = _load_models(config, words, folder / "progress" / "models.json")
    if missing:
        write_shards(dataset, missing, label_function(config, words, labeller, given))
    else:
        print("Every shard is there: nothing to label.")
    if missing or not dataset.finished:
        dataset.finish({"words": list(words), "config": flatten(config)})
    print_summary(config, dataset)
    if FIGURES.value:
        from labelling.figures import draw_records

        out = workdir / "figures" / "labelling"
        draw_records(folder, out, FIGURES.value, words, labeller=labeller, given=given)


def predict_images(config: Config) -> None:
    """Writes the label maps of stage 1 for a folder of images."""
    words = parse_words(config.data.words)
    if not IMAGES.value and not config.eval.folder:
        raise UserError("No images to segment: give --images=DIR or set config.eval.folder.")
    theirs = Path(config.eval.folder, "words.txt")
    if not IMAGES.value and theirs.is_file() and read_words(theirs) != words:
        raise UserError(
            f"{config.data.words} and {theirs} differ, so the label maps could not be compared "
            f"with that benchmark's. Give --words={theirs}."
        )
    folder = Path(IMAGES.value or Path(config.eval.folder, "images"))
    images.find_images(folder)
    _check_models(config)
    workdir = workfolder.claim(WORKDIR.value, config, _USED, "predictions/*/*")
    from labelling.predict import predict_folder

    out = workdir / "predictions"
    predict_folder(
        folder, out, words, lambda: _load_models(config, words, out / "models.json"), STRICT.value
    )


def label_function(
    config: Config, words: Sequence[str], labeller: Labeller | None, given: ImageLabels
) -> Callable[[str], PseudoLabel]:
    """From an image's name to its record: by the labeller, or without one by the annotations."""

    def label(name: str) -> PseudoLabel:
        data = read_file(Path(config.data.images, name))
        if labeller is None:
            return annotated_image(config.data.annotations, data, name, len(words))
        return labeller.label_image(data, name, given.get(name))

    return label


def write_shards(
    dataset: Dataset, missing: Sequence[int], label: Callable[[str], PseudoLabel]
) -> None:
    """Makes the missing shards, one after the other, under a progress bar."""
    done = dataset.counts(apart_from=missing)
    with tqdm(total=len(dataset.names), initial=done.images, unit="image") as bar:

        def show(counts: Counts) -> None:
            so_far = done + counts
            skipped = f", {len(so_far.skipped)} skipped" if so_far.skipped else ""
            bar.set_postfix_str(f"coverage {so_far.coverage:.1%}{skipped}", refresh=False)
            bar.update()

        for shard in missing:
            done += dataset.write(shard, label, show, STRICT.value)


def print_summary(config: Config, dataset: Dataset) -> None:
    """What is in the dataset, over all runs."""
    counts = dataset.counts()
    wordless = f"; none in {counts.wordless} images" if counts.wordless else ""
    if wordless and not config.data.annotations:
        wordless += f" (no word has {config.label.min_crops} crops for it): their maps are empty"
    print(
        f"\npseudo labels in {dataset.folder}\n"
        f"  images    {counts.images}: {counts.records} labelled, {len(counts.skipped)} skipped\n"
        f"  words     {counts.words / counts.records:.1f} in each image{wordless}\n"
        f"  coverage  {counts.coverage:.1%} of the pixels\n"
        f"  shards    {dataset.num_shards}, {counts.bytes / 1e6:,.1f} MB"
    )
    if counts.skipped:
        print(f"skipped (all in {dataset.folder / 'skipped.tsv'}):\n{counts.reasons()}")
        if shards := " ".join(str(path) for path in dataset.with_skipped()):
            print(f"To label them once they are mended, delete {shards} and run again.")


def _check_models(config: Config) -> None:
    from labelling import models

    models.check(config)


def _load_models(config: Config, words: Sequence[str], identity: Path) -> Labeller:
    from labelling import models

    return models.load(config, words, identity)


if __name__ == "__main__":
    program.run(main)
