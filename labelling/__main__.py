"""Stage 1 as a program: images and words → TFRecord shards of pseudo labels.

    fmbseg label --config=configs/toy.py --workdir=work/toy
    fmbseg label --config=FILE --workdir=DIR --images=DIR --words=FILE --figures=8
    fmbseg label --config=FILE --workdir=DIR --predict [--benchmark=voc20]
    fmbseg label --config=FILE --workdir=DIR --engine=ray

Reads images, words, CLIP and SAM. Writes WORKDIR/pseudo_labels: the records, and skipped.tsv with
the images that cannot be read; with --figures, pictures in WORKDIR/figures/labelling too. With
--predict it writes, instead, the label maps of stage 1 in WORKDIR/predictions. It needs PyTorch:
pip install -e ".[label]". `python -m labelling` is the same.

A run that was stopped, or killed, goes on where it was when the same command is given again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags
from etils import epath
from tqdm import tqdm

from fmbseg_jax.config import Config, flatten
from fmbseg_jax.data import finding
from fmbseg_jax.datasets.folder import open_published
from fmbseg_jax.errors import UserError
from fmbseg_jax.evaluation.protocol import of_benchmark
from fmbseg_jax.runs import program, workfolder
from fmbseg_jax.vocabulary import IGNORE, parse_words, read_words
from fmbseg_jax.vocabulary.classes import Classes
from labelling import engines
from labelling.detection import read_image_labels
from labelling.shards.counts import Counts
from labelling.shards.dataset import Dataset, ImageFiles
from labelling.shards.worker import Worker

CONFIG, WORKDIR = program.define_config()
IMAGES = flags.DEFINE_string("images", None, "Folder of images, instead of config.data.images.")
WORDS = flags.DEFINE_string("words", None, "Word list, instead of config.data.words.")
STRICT = flags.DEFINE_bool("strict", False, "Stop at the first image that cannot be read.")
FIGURES = flags.DEFINE_integer("figures", 0, "Draw the first so many records.", lower_bound=0)
ENGINE = flags.DEFINE_enum(
    "engine", "local", ["local", "ray"], "This machine, or the Ray cluster of $RAY_ADDRESS."
)
WORKERS = flags.DEFINE_integer(
    "workers", 0, "Processes; 0: one for each GPU, or one where there is none.", lower_bound=0
)
PREDICT = flags.DEFINE_bool(
    "predict", False, "Segment --images (default: config.eval.folder/images) without training."
)
BENCHMARK = flags.DEFINE_string(
    "benchmark", "", "With --predict: segment a published benchmark, such as voc20."
)


def main() -> None:
    config: Config = CONFIG.value
    config.data.words = WORDS.value or config.data.words
    if not config.data.words and not BENCHMARK.value:
        raise UserError("No words: give --words=FILE (or sky,grass,...) or set config.data.words.")
    if PREDICT.value:
        predict(config.validate())
        return
    if BENCHMARK.value:
        raise UserError("--benchmark is for --predict; labels are made of --images.")
    config.data.images = IMAGES.value or config.data.images
    if not config.data.images:
        raise UserError("No images: give --images=DIR or set config.data.images.")
    label_images(config.validate())


_USED = "data.deep", "models.clip", "models.sam", "label"


def label_images(config: Config) -> None:
    """Labels all images that are not labelled yet, and finishes the dataset."""
    words = parse_words(config.data.words)
    names = finding.find_images(config.data.images)
    given = read_image_labels(config.data.image_labels, words, names)
    folder = epath.Path(WORKDIR.value) / "pseudo_labels"
    with workfolder.hold(folder):
        files = ImageFiles(config.data)
        dataset = Dataset(folder, names, config.label.images_per_shard, files)
        missing = dataset.missing()
        if missing and not config.data.annotations:
            _check_models(config)  # before the work folder is claimed with their names
        workdir = workfolder.claim(
            # Words and image-level labels are compared by what is in them, in `dataset.open`.
            WORKDIR.value,
            config,
            ("data.images", "data.annotations", *_USED),
            "pseudo_labels/*.tfrecord-*",
        )
        given_lists = {name: indices.tolist() for name, indices in given.items()}
        dataset.open({"words": list(words), "image_labels": given_lists})
        worker = Worker(
            config, words, dataset, given, STRICT.value,
            workdir / "figures" / "labelling", FIGURES.value,
        )  # fmt: skip
        if missing:
            write_shards(worker, missing)
        else:
            print("Every shard is there: nothing to label.")
        if missing or not dataset.finished:
            dataset.finish(words, flatten(config))
        print_summary(config, dataset, words)
        if FIGURES.value:
            worker.draw_missing()
            print(f"figures in {worker.figures}")
    if STRICT.value and dataset.counts().skipped:
        raise UserError("An earlier run, without --strict, has skipped images; see above.")


def predict(config: Config) -> None:
    """Writes the label maps of stage 1 for a benchmark or a folder of images."""
    if FIGURES.value or WORKERS.value > 1 or ENGINE.value != "local":
        raise UserError(
            "--predict runs in this process and draws nothing: leave out --figures, "
            "--workers and --engine."
        )
    if config.data.image_labels:
        raise UserError("--predict takes no image-level labels: leave out data.image_labels.")
    name, root, files, classes, unlabelled = _to_predict(config)
    _check_models(config)
    workdir = workfolder.local(WORKDIR.value)
    from labelling import models
    from labelling.predict import predict_images

    out = workdir / "predictions" / name
    device = models.devices(config.label.device, 1)[0]
    with workfolder.hold(out.parent):
        workfolder.claim(workdir, config, _USED, "predictions/[!.]*")
        predict_images(
            root,
            files,
            classes,
            out,
            lambda: models.load(config, classes.words, out / "models.json", device),
            reading=config.data.reading,
            unlabelled=unlabelled,
            strict=STRICT.value,
        )


def _to_predict(config: Config) -> tuple[str, Path, Mapping[str, Path], Classes, int]:
    """Name and root of a set of images, its files, its classes, and what is given to no word."""
    if BENCHMARK.value:
        benchmark = open_published(BENCHMARK.value, config.eval.data)
        files = {name: pair[0] for name, pair in benchmark.files.items()}
        unlabelled = 0 if benchmark.has_background else IGNORE
        # Stage 1 leaves pixels unlabelled by itself: no threshold is needed.
        classes = dataclasses.replace(of_benchmark(config.eval, benchmark), threshold=None)
        return benchmark.name, benchmark.root, files, classes, unlabelled
    if not IMAGES.value and not config.eval.folder:
        raise UserError(
            "No images to segment: give --images=DIR, --benchmark=NAME or set config.eval.folder."
        )
    words = parse_words(config.data.words)
    theirs = Path(config.eval.folder, "words.txt")
    if not IMAGES.value and theirs.is_file() and read_words(theirs) != words:
        raise UserError(
            f"{config.data.words} and {theirs} differ, so the label maps could not be compared "
            f"with that benchmark's. Give --words={theirs}."
        )
    folder = workfolder.local(IMAGES.value or str(Path(config.eval.folder, "images")), "--images")
    root = folder if IMAGES.value else folder.parent
    names = finding.png_names(finding.find_images(folder))
    files = {name: folder / name for name in names}
    return root.resolve().name, root, files, Classes.of(words), IGNORE


def write_shards(worker: Worker, missing: Sequence[int]) -> None:
    """Makes the missing shards by the engine of the flags, under a progress bar."""
    dataset, start = worker.dataset, time.monotonic()
    done, made = dataset.counts(apart_from=missing), dict[int, Counts]()
    kept = dataset.counts().records - done.records  # of shards that get what was mended
    with tqdm(total=len(dataset.names), initial=done.images, unit="image") as bar:

        def progress(shard: int, counts: Counts) -> None:
            made[shard] = counts
            so_far = sum(made.values(), done)
            skipped = f", {len(so_far.skipped)} skipped" if so_far.skipped else ""
            bar.set_postfix_str(f"coverage {so_far.coverage:.1%}{skipped}", refresh=False)
            bar.update(so_far.images - bar.n)

        if ENGINE.value == "ray":
            engines.run_ray(worker, missing, progress, WORKERS.value)
        elif len(devices := _devices(worker.config)) == 1:
            worker.device = devices[0]
            engines.run_here(worker, missing, progress)
        else:
            engines.run_processes(worker, missing, progress, devices)
    dataset.refresh()
    seconds = time.monotonic() - start
    images_made = sum(counts.images for counts in made.values()) - kept
    waited = f"; the models waited {1 - worker.busy / seconds:.0%} of the time" * bool(worker.busy)
    print(f"{images_made / seconds:.2f} images/s{waited}")


def _devices(config: Config) -> list[str]:
    if config.data.annotations:
        return ["cpu"] * max(1, WORKERS.value)
    from labelling import models

    return models.devices(config.label.device, WORKERS.value)


def print_summary(config: Config, dataset: Dataset, words: Sequence[str]) -> None:
    """What is in the dataset, over all runs."""
    counts = dataset.counts()
    annotated = bool(config.data.annotations)
    void = ""
    if annotated:
        void = f"; the other {1 - counts.coverage:.1%} are void: not labelled"
    wordless = f"; none in {counts.wordless} images" if counts.wordless else ""
    if wordless and not config.data.annotations and not config.data.image_labels:
        wordless += f" (no word has {config.label.min_crops} crops for it): their maps are empty"
    print(
        f"\npseudo labels in {dataset.folder}\n"
        f"  images    {counts.images}: {counts.records} labelled, {len(counts.skipped)} skipped\n"
        f"  words     {counts.words / counts.records:.1f} in each image{wordless}\n"
        f"{_by_word(counts.images_by_word(words), annotated)}"
        f"  coverage  {counts.coverage:.1%} of the pixels{void}\n"
        f"  shards    {dataset.num_shards}, {counts.bytes / 1e6:,.1f} MB"
    )
    if told := config.data.reading.of_deep(counts.deep, counts.deep_example):
        print(told)
    if counts.skipped:
        print(f"skipped (all in {dataset.folder / 'skipped.tsv'}):\n{counts.reasons()}")
        print("Once they are mended, the same command labels them.")


_MOST = 15  # words that are told


def _by_word(counts: Mapping[str, int], annotated: bool) -> str:
    """In how many images the words were found; those never found may want another name."""
    found = [f"{word} {count}" for word, count in counts.items() if count]
    never = [word for word, count in counts.items() if not count]
    lines = ""
    for title, words in (("found in", found), ("no pixel" if annotated else "never", never)):
        more = f", and {len(words) - _MOST} more (metadata.json)" * (len(words) > _MOST)
        lines += f"  {title:10}{', '.join(words[:_MOST])}{more}\n" * bool(words)
    return lines


def _check_models(config: Config) -> None:
    from labelling import models

    if ENGINE.value == "local":  # a cluster's head may have none of its devices
        models.devices(config.label.device)
    models.check(config)


if __name__ == "__main__":
    program.run(main)
