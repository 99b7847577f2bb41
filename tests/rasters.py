"""PNGs and TIFFs byte by byte, by their specifications: also those that Pillow cannot write."""

import io
import struct
import zlib

import numpy as np

_ADAM7 = [
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
]
"""Of each pass of interlacing: first row, first column, steps."""


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values, colour: int, bits: int, *chunks: bytes, interlaced=False) -> bytes:
    """A PNG of integers [H, W] or [H, W, C]; `colour` is the type of the header, 0 for grey."""
    values = np.asarray(values)
    height, width = values.shape[:2]
    passes = _ADAM7 if interlaced else [(0, 0, 1, 1)]
    rows = [
        row
        for top, left, down, right in passes
        for row in values[top::down, left::right]
        if row.size
    ]
    packed = b"".join(b"\0" + _packed(row.reshape(-1), bits) for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(packed))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def _packed(row: np.ndarray, bits: int) -> bytes:
    """Integers of so many bits, one after the other, the last byte filled up."""
    shifts = np.arange(bits - 1, -1, -1)
    return np.packbits((row[:, None].astype(np.int64) >> shifts & 1).astype(np.uint8)).tobytes()


def tiff(
    values, order="<", *, compressed=False, planar=False, extra=(), photometric=None, pages=1
) -> bytes:
    """A TIFF of an array [H, W] or [H, W, C], in one strip, or one for each channel."""
    values = np.asarray(values)
    channels = np.atleast_3d(values)
    height, width, count = channels.shape
    strips = [channels[..., i] for i in range(count)] if planar else [channels]
    strips = [strip.astype(values.dtype.newbyteorder(order)).tobytes() for strip in strips]
    strips = [zlib.compress(strip) for strip in strips] if compressed else strips
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    meaning = (2 if count >= 3 else 1) if photometric is None else photometric
    file = io.BytesIO()
    file.write({"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8))
    for page in range(pages):
        tags = {
            256: [width], 257: [height], 258: [values.dtype.itemsize * 8] * count,
            259: [8 if compressed else 1], 262: [meaning], 273: [], 277: [count], 278: [height],
            279: [len(strip) for strip in strips], 284: [2 if planar else 1], 338: [*extra],
            339: [kind] * count,
        }  # fmt: skip
        tags = {tag: of for tag, of in tags.items() if of or tag == 273}
        place = file.tell() + 2 + 12 * len(tags) + 4
        room = sum(4 * max(len(of), len(strips)) for of in tags.values())
        starts = np.cumsum([place + room, *map(len, strips)]).tolist()
        tags[273], end = starts[:-1], starts[-1]
        entries, longer = b"", b""
        for tag, of in tags.items():
            data = struct.pack(f"{order}{len(of)}I", *of)
            if len(of) > 1:
                data, longer = struct.pack(order + "I", place + len(longer)), longer + data
            entries += struct.pack(order + "HHI", tag, 4, len(of)) + data
        following = end if page < pages - 1 else 0
        file.write(
            struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", following)
        )
        file.write(longer.ljust(room, b"\0") + b"".join(strips))
    return file.getvalue()
