"""The folder of pseudo labels: which images, which shards are done, and what they hold.

    pseudo_labels/
      pseudo_labels-train.tfrecord-00000-of-00004 ...   the records; a shard that exists is done
      progress/manifest.json                            images and words, as the first run saw them
      progress/models.json                              hashes of the models, by the first run
      progress/00000.json ...                           counts of each shard
      progress/00000.sources.json ...                   sizes and times of its images' files
      skipped.tsv                                       images left out, and why
      dataset_info.json  features.json  metadata.json   written last

The counts of a shard are on disk before the shard gets its name. So a run killed anywhere loses at
most its unfinished shard, which the next run makes again, and the sums are always over all runs.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from fmbseg_jax.config import Data
from fmbseg_jax.data import example, images
from fmbseg_jax.data.example import PseudoLabel
from fmbseg_jax.data.images import ImageError
from fmbseg_jax.data.records import open_records
from fmbseg_jax.data.sources import STATE, State, state
from fmbseg_jax.data.tfrecord import (
    MOST_SHARDS,
    RecordError,
    RecordSource,
    ShardWriter,
    shard_name,
)
from fmbseg_jax.errors import UserError
from fmbseg_jax.io import texts
from fmbseg_jax.io.files import is_remote, write_json, write_table
from fmbseg_jax.io.files import read_file as read_local
from fmbseg_jax.runs.workfolder import holds, recorded, remember
from labelling.shards.annotated import annotation_path
from labelling.shards.counts import Counts


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """The files that the records are made from."""

    data: Data

    def can_read(self, name: str) -> bool:
        """Whether an image can be read and decoded."""
        try:
            images.decode(read_file(self.data.images, name), self.data.reading, name)
        except ImageError:
            return False
        return True

    def state(self, name: str) -> State | None:
        """Of an image's file, and of its label map if people made one; None in a store."""
        if is_remote(self.data.images) or is_remote(self.data.annotations):
            return None
        folder = self.data.annotations
        maps = [annotation_path(folder, name)] if folder else []
        try:
            return state(Path(self.data.images, name), *maps)
        except OSError:  # labelling says why
            return None

    def is_image_of(self, label: PseudoLabel) -> bool:
        """Whether a record is of the image as it is now; with label maps of people, never."""
        if self.data.annotations:  # the record does not tell which of the two files changed
            return False
        try:
            return read_file(self.data.images, label.filename) == label.image
        except ImageError:
            return False


class Dataset:
    """The pseudo labels of some images, shard by shard."""

    def __init__(
        self, folder: epath.PathLike, names: Sequence[str], images_per_shard: int, files: ImageFiles
    ):
        self.folder, self.files = epath.Path(folder), files
        self.names = list(names)
        self.per_shard = images_per_shard
        self.num_shards = -(-len(self.names) // images_per_shard)
        if self.num_shards > MOST_SHARDS:
            raise UserError(
                f"{len(self.names)} images make {self.num_shards} shards; names have room for "
                f"{MOST_SHARDS}. Raise label.images_per_shard."
            )
        self._progress = self.folder / "progress"

    def open(self, facts: dict[str, Any]) -> None:
        """Makes the folder, or checks that it was made from the same images and facts (words)."""
        try:
            self._progress.mkdir(parents=True, exist_ok=True)
            remember(
                self._progress / "manifest.json",
                {"images": self.names, **facts},
                "Put them back as they were, or give the new data another --workdir.",
                fresh=not holds(self.folder, "*.tfrecord-*"),
            )
        except OSError as error:
            raise UserError(f"Cannot write to {self.folder}: {error.strerror or error}.") from None

    def path(self, shard: int) -> epath.Path:
        """Where a shard lies."""
        name = example.dataset_name(PseudoLabel)
        return self.folder / shard_name(name, "train", shard, self.num_shards)

    def missing(self) -> list[int]:
        """The shards that are still to be made, or to which an image can be added."""
        return [shard for shard in range(self.num_shards) if not self._whole(shard)]

    def _whole(self, shard: int) -> bool:
        """Whether a shard is there, with all of its images that can be read, as they are now."""
        counts = self._written.get(shard)
        if counts is None or any(map(self.files.can_read, counts.skipped_names)):
            return False
        return not self._changed(shard)

    def _changed(self, shard: int) -> set[str]:
        """The images of a shard whose files are others than its records were made from.

        Files that only have another time, as copies have, hold the bytes of their records.
        """
        path, known = self._sources_path(shard), self._read_sources(shard)
        differing = {name for name, state in known.items() if self.files.state(name) != state}
        if not differing:
            return set()
        same = {label.filename for label in self._read(shard) if self.files.is_image_of(label)}
        if not (changed := differing - same):
            write_json(path, {name: self.files.state(name) for name in known})
        return changed

    @functools.cached_property
    def _written(self) -> dict[int, Counts]:
        """The counts of the shards that are there, whole."""
        shards = {s: self._read_counts(s) for s in range(self.num_shards)}
        return {s: counts for s, counts in shards.items() if counts is not None}

    def write(
        self,
        shard: int,
        label: Callable[[Sequence[str]], Iterator[PseudoLabel | ImageError]],
        after_image: Callable[[Counts], None] = lambda counts: None,
        strict: bool = False,
    ) -> Counts:
        """Labels the images of a shard and writes it; records that it held before are kept.

        Args:
          label: from images' names to their records, in order; an ImageError skips the image.
          after_image: gets the counts of this shard so far.
          strict: an ImageError stops instead.
        """
        counts, kept, names = Counts(), self._records(shard), self._names_of(shard)
        sources = {name: self.files.state(name) for name in names}  # before they are read
        labelled = label([name for name in names if name not in kept])
        try:
            with ShardWriter(self.path(shard)) as writer:
                for name in names:
                    one = kept.get(name) or _next(labelled)
                    if isinstance(one, ImageError):
                        if strict:
                            raise UserError(
                                f"{name} {one}. Without --strict it would be skipped and listed."
                            )
                        counts.skip(name, str(one))
                    else:
                        record = example.encode(one)
                        writer.write(record)
                        counts.add(one, len(record))
                    after_image(counts)
                write_json(self._sources_path(shard), sources)
                write_json(self._counts_path(shard), dataclasses.asdict(counts))
        except OSError as error:
            raise UserError(
                f"Cannot write {self.path(shard)}: {error.strerror or error}. Shards that are done "
                "stay; run the same command again to continue."
            ) from None
        return counts

    def _records(self, shard: int) -> dict[str, PseudoLabel]:
        """What an earlier run wrote in a shard, by image, of files that are as they were.

        Nothing if it is damaged.
        """
        changed = self._changed(shard)
        labels = {label.filename: label for label in self._read(shard)}
        return {name: label for name, label in labels.items() if name not in changed}

    def _read(self, shard: int) -> list[PseudoLabel]:
        if shard not in self._written:
            return []
        try:
            source = RecordSource([self.path(shard)])
            return [example.read_pseudo_label(source, i) for i in range(len(source))]
        except RecordError:
            return []

    def counts(self, apart_from: Sequence[int] = ()) -> Counts:
        """Sums over all shards that are there, by whatever run."""
        chosen = (counts for s, counts in self._written.items() if s not in apart_from)
        return sum(chosen, Counts())

    def refresh(self) -> None:
        """Looks at the folder anew: shards were made."""
        vars(self).pop("_written", None)

    @property
    def finished(self) -> bool:
        """Whether the metadata, which come last, are there and whole."""
        try:
            example.read_metadata(self.folder)
            open_records(self.folder)
        except UserError:
            return False
        return True

    def finish(self, words: Sequence[str], config: dict[str, Any]) -> None:
        """Writes the list of skipped images, and last what makes this a finished dataset."""
        shards = [self._written[shard] for shard in range(self.num_shards)]
        total = sum(shards, Counts())
        if not total.records:
            raise UserError(f"None of the images can be read:\n{total.reasons()}")
        models = self._progress / "models.json"
        metadata = {
            "words": list(words),
            "config": config,
            "models": recorded(models, dict, "Delete it, if the models have not changed."),
            "coverage": total.coverage,
            "images_by_word": total.images_by_word(words),
            "skipped": len(total.skipped),
            "deep": [total.deep, total.deep_example],
        }
        write_table(self.folder / "skipped.tsv", dict(total.skipped))
        example.write_metadata(
            self.folder, PseudoLabel, [counts.records for counts in shards], total.bytes, metadata
        )

    def _counts_path(self, shard: int) -> epath.Path:
        return self._progress / f"{shard:05d}.json"

    def _sources_path(self, shard: int) -> epath.Path:
        return self._progress / f"{shard:05d}.sources.json"

    def _read_counts(self, shard: int) -> Counts | None:
        """The counts of a shard; None if it, or they, are missing or damaged."""
        path = self._counts_path(shard)
        try:
            counts = Counts.of(texts.read_json(path, dict, ""))
            whole = counts.records == len(RecordSource([self.path(shard)]))
        except (FileNotFoundError, UserError):
            return None
        return counts if whole and counts.images == len(self._names_of(shard)) else None

    def _read_sources(self, shard: int) -> dict[str, State | None]:
        """The states of the files of a shard as it was written; impossible ones if damaged."""
        path, names = self._sources_path(shard), self._names_of(shard)
        if not path.exists():  # version 0.1 has none
            return {}
        try:
            known = texts.read_json(path, {str: object}, "")
            sound = all(state is None or not texts.fault(state, STATE) for state in known.values())
        except UserError:
            sound = False
        return known if sound and known.keys() == set(names) else dict.fromkeys(names, [])

    def _names_of(self, shard: int) -> list[str]:
        return self.names[shard * self.per_shard :][: self.per_shard]


def _next(labelled: Iterator[PseudoLabel | ImageError]) -> PseudoLabel | ImageError:
    """The next record. Its OSErrors are not those of the disk that the shard is written to."""
    try:
        return next(labelled)
    except OSError as error:
        raise UserError(
            f"Labelling stopped ({type(error).__name__}: {error}). Shards that are done stay; run "
            "the same command again to continue."
        ) from error


def read_file(folder: epath.PathLike, name: str) -> bytes:
    """The bytes of an image file.

    Raises:
      ImageError: there is none, or it must not be read: it is skipped, like a damaged one.
      UserError: the disk or store does not answer, several times: the image may be good.
    """
    for wait in _WAITS:
        try:
            if not is_remote(folder):
                return read_local(Path(folder, name))
            return (epath.Path(folder) / name).read_bytes()
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            raise ImageError(f"cannot be read: {error.strerror or error}") from None
        except MemoryError:
            raise
        except Exception as error:  # stores have their own kinds
            if isinstance(error, OSError) and error.errno == errno.EINVAL:  # no time mends a pipe
                raise ImageError(f"cannot be read: {error.strerror}") from None
            reason = error
            time.sleep(wait)
    raise UserError(
        f"{epath.Path(folder) / name} cannot be read, tried {len(_WAITS)} times "
        f"({type(reason).__name__}: {reason}). Is its disk or store there? Shards that are done "
        "stay; run the same command again to continue."
    )


_WAITS = 1, 5, 15, 0
"""Seconds after each attempt."""
