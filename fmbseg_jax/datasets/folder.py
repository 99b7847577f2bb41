"""Annotated images on disk, for evaluation: any folder, and the published benchmarks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fmbseg_jax.data import finding, images, label_maps
from fmbseg_jax.data.sources import state
from fmbseg_jax.datasets import coco
from fmbseg_jax.datasets.published import PUBLISHED, Published, Source
from fmbseg_jax.errors import UserError
from fmbseg_jax.io import files, spelling, texts
from fmbseg_jax.vocabulary import IGNORE, read_words


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Images, each with a label map."""

    name: str
    root: Path
    words: tuple[str, ...]
    """Class names."""
    files: Mapping[str, tuple[Path, Path]]
    """By name of the image, its file and that of its label map."""
    read: Callable[[Path], np.ndarray]
    """File of a label map → uint16 [H, W], class or IGNORE."""
    source: str = ""
    """Where the label maps came from, relative to `root`, with `{}` for a name."""
    published: Published | None = None
    reading: images.Reading = images.USUAL
    """How the image files are read."""

    @property
    def title(self) -> str:
        """For people."""
        return self.published.title if self.published else self.name

    @property
    def has_background(self) -> bool:
        """Whether class 0 is what is no other class."""
        return bool(self.published and self.published.background is not None)

    @property
    def fingerprint(self) -> str:
        """Differs between any two sets, as far as sizes and times of change of their files tell."""
        states = [(name, state(*paths)) for name, paths in self.files.items()]
        facts = self.name, self.root.resolve(), self.words, self.source, self.published
        return repr((facts, states))

    @property
    def names(self) -> Sequence[str]:
        """Of the images."""
        return tuple(self.files)

    def image(self, name: str) -> np.ndarray:
        """uint8 [H, W, 3]."""
        path = self.files[name][0]
        try:
            return images.decode(files.read_file(path), self.reading, path.name)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
        except images.ImageError as error:
            raise UserError(f"{path} {error}") from None

    def is_deep(self, name: str) -> bool:
        """Whether an image has more than 8 bits a channel."""
        path = self.files[name][0]
        if not path.is_file():  # `image` says why
            return False
        try:
            with open(path, "rb") as file:
                return images.is_deep(file, path.name)
        except OSError:  # `image` says why
            return False

    def labels(self, name: str) -> np.ndarray:
        """uint16 [H, W], class or IGNORE."""
        return self.read(self.files[name][1])


def open_folder(root: str | Path, reading: images.Reading = images.USUAL) -> Benchmark:
    """Any folder with `images/`, `labels/` (PNGs of word indices) and `words.txt`.

    `labels/` mirrors `images/` with the ending .png. In an 8-bit PNG 255 means "not labelled", in a
    16-bit one 65535 does.

    Raises:
      UserError: it is laid out otherwise; the message lists what was looked for and is not there.
    """
    root = Path(root)
    missing = [name for name in ("images/", "labels/", "words.txt") if not (root / name).exists()]
    if missing:
        raise UserError(
            f"{root or 'eval.folder'} is no annotated folder: it lacks {', '.join(missing)}. "
            "Expected images/NAME.jpg, labels/NAME.png with word indices, and words.txt."
        )
    words = read_words(root / "words.txt")
    names = finding.png_names(finding.find_images(root / "images"))
    files = {
        name: (root / "images" / name, spelling.beside(root / "labels", png))
        for name, png in names.items()
    }
    _check_labels(root, files)
    read = functools.partial(label_maps.read, num_words=len(words), megapixels=reading.megapixels)
    return Benchmark(root.resolve().name, root, words, files, read, "labels/{}", reading=reading)


def open_published(
    name: str, data: str | Path, reading: images.Reading = images.USUAL
) -> Benchmark:
    """The published benchmark `name`, under the folder `data`.

    Raises:
      UserError: there is no such benchmark, or its files are not there; the message lists what was
        looked for, and where.
    """
    if name not in PUBLISHED:
        raise UserError(f"There is no benchmark {name!r}. There are: {', '.join(PUBLISHED)}.")
    published = PUBLISHED[name]
    looked_for: list[tuple[Path, list[str], list[str]]] = []
    for root in (Path(data) / place for place in published.roots):
        for pattern in published.images:
            names = _names_of(published, root, pattern)
            for source in published.sources:
                wanted = _wanted(published, pattern, source)
                missing = [path for path in wanted if not _is_there(root, path, names)]
                if not missing:
                    found = _found(name, root, names, pattern, source)
                    return dataclasses.replace(found, reading=reading)
                looked_for.append((root, wanted, missing))
    raise UserError(_not_there(name, published, Path(data), looked_for))


def _names_of(published: Published, root: Path, pattern: str) -> list[str]:
    """Of the images, as far as they are there."""
    split = root / published.split
    if not published.split:
        return _names(root, pattern)
    if not split.is_file():
        return []
    return [files.inside(name, str(split)) for name in texts.read(split).split()]


def _wanted(published: Published, pattern: str, source: Source) -> list[str]:
    """Files of one layout, relative to its root; some for each image."""
    wanted = [pattern, source.labels, source.things, published.split, source.panoptic]
    return [path for path in wanted if path]


def _is_there(root: Path, path: str, names: Sequence[str]) -> bool:
    """Whether there is such a file; where there is one for each image, of the first."""
    if "{}" not in path:
        return (root / path).is_file()
    return bool(names) and spelling.beside(root, path.format(names[0])).is_file()


def _found(name: str, root: Path, names: Sequence[str], pattern: str, source: Source) -> Benchmark:
    published = PUBLISHED[name]
    files = {
        one: (
            spelling.beside(root, pattern.format(one)),
            spelling.beside(root, source.labels.format(one)),
        )
        for one in names
    }
    _check_labels(root, files)
    table = _table(published, source)
    read = functools.partial(_read, table=table, raw=_reader(root, source))
    return Benchmark(name, root, published.words, files, read, source.labels, published)


def _names(root: Path, pattern: str) -> list[str]:
    """What stands for {} in the files that match a pattern, sorted."""
    folder, _, suffix = pattern.partition("{}")
    found = files.walk(root / folder) if (root / folder).is_dir() else ()
    return sorted(name.removesuffix(suffix) for name in found if name.endswith(suffix))


def _not_there(
    name: str,
    published: Published,
    data: Path,
    looked_for: list[tuple[Path, list[str], list[str]]],
) -> str:
    """Of folders that are there, what they lack; of others only their names."""
    lines = [f"{name} ({published.title}) is not under {data}."]
    layouts = dict.fromkeys(", ".join(wanted) for _, wanted, _ in looked_for)
    lines += ["It has one of:", *(f"  {layout}" for layout in layouts)]
    roots = dict.fromkeys(root for root, _, _ in looked_for)
    lines.append(f"in one of: {', '.join(map(str, roots))}.")
    for root, wanted, missing in looked_for:
        if len(missing) < len(wanted):
            lines.append(f"{root} has some of them, but not {', '.join(missing)}.")
    lines.append(
        "docs/reproduce.md says where it comes from. Give its place: --config.eval.data=DIR."
    )
    return "\n".join(dict.fromkeys(lines)).replace("{}", "*")


def _check_labels(root: Path, files: Mapping[str, tuple[Path, Path]]) -> None:
    """Raises UserError where an image or a label map is not there."""
    for i, kind in enumerate(("image", "label map")):
        without = [(name, pair[i]) for name, pair in files.items() if not pair[i].exists()]
        if without:
            name, path = without[0]
            raise UserError(
                f"{root} has {len(without)} of {len(files)} images without "
                f"{'their file' if kind == 'image' else 'a label map'}, such as {name} "
                f"(looked for {path})."
            )


_UNKNOWN = IGNORE - 1  # a value that a label map of the benchmark should not have


def _table(published: Published, source: Source) -> np.ndarray:
    """uint16 [65536]: a map's value → class, IGNORE or _UNKNOWN."""
    table = np.full(1 << 16, _UNKNOWN, np.uint16)
    values = source.values or {value: value for value in published.classes}
    for value, category in values.items():
        table[value] = published.classes.get(category, _UNKNOWN)
    return table


def _reader(root: Path, source: Source) -> Callable[[Path], np.ndarray]:
    """File of a label map → its values, [H, W]."""
    segments = root / source.panoptic

    def with_things(path: Path) -> np.ndarray:
        values = label_maps.read_values(path)
        things = coco.read_panoptic(root / source.things.format(path.stem), segments)
        things = np.where(np.isin(things, coco.THINGS), things, coco.UNLABELLED)
        return np.where(values == coco.OTHER, things, values)

    if source.things:
        return with_things
    if source.panoptic:
        return functools.partial(coco.read_panoptic, segments=segments)
    return label_maps.read_values


def _read(path: Path, table: np.ndarray, raw: Callable[[Path], np.ndarray]) -> np.ndarray:
    values = raw(path)
    labels = table[values]
    unknown = values[labels == _UNKNOWN]
    if unknown.size:
        raise UserError(
            f"The label map {path} has the value {int(unknown[0])}, which this benchmark does not "
            "know. Is it the right file, as docs/reproduce.md describes it?"
        )
    return labels
