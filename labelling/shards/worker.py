"""The worker: shards of images → shards of records; the same here, in a process, on a cluster."""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from etils import epath

from fmbseg_jax.config import Config
from fmbseg_jax.data import images
from fmbseg_jax.data.example import PseudoLabel
from fmbseg_jax.data.images import ImageError
from fmbseg_jax.errors import NotFiniteError
from fmbseg_jax.runs.workfolder import holds
from labelling.detection import ImageLabels
from labelling.shards.annotated import annotated_image
from labelling.shards.counts import Counts
from labelling.shards.dataset import Dataset, read_file

if TYPE_CHECKING:  # PyTorch takes seconds to import: only where there is something to label
    from labelling.stage1 import Labeller, Scene

T, U = TypeVar("T"), TypeVar("U")


@dataclasses.dataclass
class Worker:
    """Makes shards. It can be sent to another process; models are loaded with the first image."""

    config: Config
    words: tuple[str, ...]
    dataset: Dataset
    given: ImageLabels
    strict: bool = False
    """Whether an image that cannot be read stops the run."""
    figures: epath.Path | None = None
    """Where the first `num_figures` images are drawn."""
    num_figures: int = 0
    device: str = ""
    """Where its models run; that of the config if empty."""
    busy: float = 0.0
    """Seconds in which the models ran."""

    def write(self, shard: int, progress: Callable[[Counts], None] = lambda counts: None) -> Counts:
        """Makes one shard; `progress` gets its counts after each image."""
        return self.dataset.write(shard, self.labels, progress, self.strict)

    def labels(self, names: Sequence[str]) -> Iterator[PseudoLabel | ImageError]:
        """The record of each image, or why there is none, in order.

        The next image is decoded, and the last one composed, while the models look at one.
        """
        if self.config.data.annotations:
            return ahead(self._annotated, names, 4)
        return ahead(self._composed, map(self._seen, ahead(self._read, names, 2)), 1)

    @functools.cached_property
    def labeller(self) -> Labeller:
        """The models, loaded."""
        from labelling import models

        identity = self.dataset.folder / "progress" / "models.json"
        device = self.device or models.devices(self.config.label.device, 1)[0]
        fresh = not holds(self.dataset.folder, "*.tfrecord-*")  # then nothing is bound to them
        return models.load(self.config, self.words, identity, device, fresh)

    def draw(self, label: PseudoLabel, scene: Scene | None) -> None:
        """Draws a record, if it is one of the first."""
        if self.figures and label.filename in self._first:
            from labelling.figures import draw

            draw(self.figures, label, self.words, scene, self.config.data.reading)

    def draw_missing(self) -> None:
        """Draws those of the first records that an earlier run made."""
        from labelling.figures import draw_records

        assert self.figures
        folder, reading = self.dataset.folder, self.config.data.reading
        draw_records(folder, self.figures, self.num_figures, self.words, self._look, reading)

    def _look(self, label: PseudoLabel) -> Scene | None:
        if self.config.data.annotations:
            return None
        return self.labeller.look(
            self._decode(label.image, label.filename), self.given.get(label.filename)
        )

    @functools.cached_property
    def _first(self) -> set[str]:
        return set(self.dataset.names[: self.num_figures])

    def _annotated(self, name: str) -> PseudoLabel | ImageError:
        try:
            data = read_file(self.config.data.images, name)
            label = self._annotate(data, name)
        except ImageError as error:
            return error
        self.draw(label, None)
        return label

    def _annotate(self, data: bytes, name: str) -> PseudoLabel:
        options = self.config.data
        return annotated_image(options.annotations, data, name, len(self.words), options.reading)

    def _decode(self, data: bytes, name: str) -> np.ndarray:
        return images.decode(data, self.config.data.reading, name)

    def _read(self, name: str) -> _Image | ImageError:
        try:
            data = read_file(self.config.data.images, name)
            return _Image(name, data, self._decode(data, name))
        except ImageError as error:
            return error

    def _seen(self, image: _Image | ImageError) -> tuple[_Image, Scene] | ImageError:
        if isinstance(image, ImageError):
            return image
        labeller, start = self.labeller, time.monotonic()
        try:
            scene = labeller.look(image.pixels, self.given.get(image.name))
        except NotFiniteError as error:
            raise NotFiniteError(f"{image.name}: {error}") from None
        self.busy += time.monotonic() - start
        return image, scene

    def _composed(self, seen: tuple[_Image, Scene] | ImageError) -> PseudoLabel | ImageError:
        if isinstance(seen, ImageError):
            return seen
        image, scene = seen
        label = scene.pseudo_label(image.data, image.name, self.config.label.combine)
        self.draw(label, scene)
        return label


@dataclasses.dataclass(frozen=True)
class _Image:
    name: str
    data: bytes
    pixels: np.ndarray


def ahead(function: Callable[[T], U], items: Iterable[T], most: int) -> Iterator[U]:
    """function(item) of each, in order; threads compute up to `most` ahead of whoever takes them.

    The items themselves are taken by the caller's own thread.
    """
    with ThreadPoolExecutor(most) as pool:
        waiting: collections.deque[Future[U]] = collections.deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
