"""TFRecord files: atomic shard writing, and random access with every CRC checked.

A record is `length (uint64) | masked CRC32C of length | data | masked CRC32C of data`, all
little-endian (TensorFlow's record_writer.h). A dataset is split over shards named
`NAME-SPLIT.tfrecord-00003-of-00016`; a shard that exists under that name is whole.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import os
import re
import struct
from collections.abc import Iterator, Sequence
from types import TracebackType

import google_crc32c
import numpy as np
from etils import epath

from fmbseg_jax.errors import UserError
from fmbseg_jax.io.files import incomplete, is_remote, naming

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_OVERHEAD = _HEADER.size + _FOOTER.size
_SHARD = re.compile(r"(?P<stem>.+\.tfrecord)-(?P<index>\d{5})-of-(?P<count>\d{5})$")


MOST_SHARDS = 99_999
"""The names of shards have five digits."""


class RecordError(UserError):
    """A TFRecord file is damaged or missing; the message names the file and the record."""


def _masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def shard_name(dataset: str, split: str, index: int, count: int) -> str:
    """File name of one shard, as tensorflow-datasets names it."""
    return f"{dataset}-{split}.tfrecord-{index:05d}-of-{count:05d}"


def find_shards(folder: epath.PathLike, split: str = "train") -> list[epath.Path]:
    """All shards of the one dataset in `folder`, in order.

    Raises:
      RecordError: there is none, or shards of the set are missing (the message lists them).
    """
    folder = epath.Path(folder)
    found: dict[tuple[str, int], dict[int, epath.Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _SHARD.fullmatch(path.name)
        if match and match["stem"].endswith(f"-{split}.tfrecord"):
            key = match["stem"], int(match["count"])
            found.setdefault(key, {})[int(match["index"])] = path
    if not found:
        raise RecordError(
            f"No TFRecord shards of split {split!r} in {folder}. Run the stage that writes them."
        )
    if len(found) > 1:
        kinds = ", ".join(f"{stem} in {count} shards" for stem, count in sorted(found))
        raise RecordError(f"{folder} holds several datasets ({kinds}); give each its own folder.")
    ((stem, count), shards), *_ = found.items()
    missing = [f"{stem}-{i:05d}-of-{count:05d}" for i in range(count) if i not in shards]
    if missing:
        raise RecordError(
            f"{folder} lacks {len(missing)} of {count} shards: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}. Run the stage that writes them again: it "
            "makes only what is missing."
        )
    for path in () if is_remote(folder) else shards.values():
        if not os.path.isfile(path):  # a pipe would keep whoever reads it waiting
            raise RecordError(f"{path} is not a file. Run the stage that writes it again.")
    return [shards[i] for i in range(count)]


class ShardWriter:
    """Writes one shard; it appears under its name only when it is whole and on disk.

        with ShardWriter(path) as writer:
            writer.write(record)

    An error of the disk names the file. A run killed in between leaves one that ends in
    `.incomplete`.
    """

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        self._incomplete = incomplete(self.path)
        self.num_records = 0
        self.num_bytes = 0

    def __enter__(self) -> ShardWriter:
        with naming(self.path):
            self._file = self._incomplete.open("wb")
        return self

    def write(self, data: bytes) -> None:
        """Appends one record."""
        length = struct.pack("<Q", len(data))
        with naming(self.path):
            self._file.write(length + _FOOTER.pack(_masked_crc(length)))
            self._file.write(data)
            self._file.write(_FOOTER.pack(_masked_crc(data)))
        self.num_records += 1
        self.num_bytes += len(data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with naming(self.path):
                if error is None and not is_remote(self.path):
                    self._file.flush()
                    os.fsync(self._file.fileno())
                self._file.close()
                if error is None:
                    self._incomplete.replace(self.path)
        finally:
            self._incomplete.unlink(missing_ok=True)


class RecordSource(Sequence[bytes]):
    """Random access to the records of some shards, in order; CRCs are checked on every read.

    Opening reads lengths and CRCs only (16 bytes a record). It keeps no file open, so one source
    serves many threads and can be pickled to other processes.
    """

    def __init__(self, paths: Sequence[epath.PathLike]):
        self.paths = [epath.Path(path) for path in paths]
        self._offsets, checksums = [], hashlib.sha256()
        for path in self.paths:
            offsets, checksum = _index(path)
            self._offsets.append(offsets)
            checksums.update(checksum)
        self.digest = checksums.hexdigest()[:16]
        """Differs between records that differ; made of their lengths and CRCs alone."""
        self.counts = [len(offsets) - 1 for offsets in self._offsets]
        """Records of each shard."""
        self._ends = np.cumsum(self.counts).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index):  # type: ignore[no-untyped-def, override]
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard, record = self._place(index)
        start, end = self._offsets[shard][record : record + 2]
        with self.paths[shard].open("rb") as file:
            file.seek(int(start))
            raw = file.read(int(end - start))
        data = raw[_HEADER.size : -_FOOTER.size]
        if len(raw) != end - start or _FOOTER.unpack(raw[-_FOOTER.size :])[0] != _masked_crc(data):
            raise RecordError(_damage(self.paths[shard], record, "its data does not match its CRC"))
        return data

    @contextlib.contextmanager
    def naming(self, index: int, advice: str = "") -> Iterator[None]:
        """Has errors of what is in a record name its place, as RecordErrors.

        Args:
          advice: what to do; the end of the message.
        """
        try:
            yield
        except RecordError:  # which does
            raise
        except UserError as error:
            shard, record = self._place(index)
            told = f"{self.paths[shard]}, record {record}: {error} {advice}"
            raise RecordError(told.strip()) from error

    def _place(self, index: int) -> tuple[int, int]:
        """The shard that a record is in, and its number there."""
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def __repr__(self) -> str:  # grain puts it into the iterator's state: no addresses, no paths
        return f"RecordSource({len(self)} records in {len(self.paths)} shards)"


def _index(path: epath.Path) -> tuple[np.ndarray, bytes]:
    """Byte offsets int64 [records + 1] of a shard, the last one the file's size; and a checksum."""
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise RecordError(f"Cannot read {path}: {error.strerror or error}.") from None
    offsets, checksum = [0], hashlib.sha256()
    with file:
        size = file.seek(0, os.SEEK_END)
        while offsets[-1] < size:
            record = len(offsets) - 1
            file.seek(offsets[-1])
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                raise RecordError(_damage(path, record, "the file ends inside its header"))
            length, crc = _HEADER.unpack(header)
            if crc != _masked_crc(header[:8]):
                raise RecordError(_damage(path, record, "its length does not match its CRC"))
            if offsets[-1] + length + _OVERHEAD > size:
                raise RecordError(
                    _damage(path, record, f"the file ends inside it, at byte {size:,}")
                )
            offsets.append(offsets[-1] + length + _OVERHEAD)
            file.seek(offsets[-1] - _FOOTER.size)
            checksum.update(header + file.read(_FOOTER.size))
    return np.asarray(offsets, np.int64), checksum.digest()


def _damage(path: epath.Path, record: int, what: str) -> str:
    return (
        f"{path}: record {record} is damaged: {what}. Delete this shard and run the stage that "
        "wrote it again: it makes only what is missing."
    )
