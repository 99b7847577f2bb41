"""TIFFs that Pillow would read wrongly or in part: how they are told, by their header."""

from __future__ import annotations

import io
from typing import Any

from PIL.TiffImagePlugin import ImageFileDirectory_v2

from fmbseg_jax.io import machine

_COLOURS = {2: 3, 5: 4, 6: 3, 8: 3}
"""By the tag of what colours mean, their channels: RGB, CMYK, YCbCr, L*a*b*; 1 for grey."""
_KINDS = {1: "unsigned", 2: "signed", 3: "floating point"}
_READABLE = "8 or 16 unsigned bits, or in grey 32 bits of floating point; or as a PNG"
_REDUCED = 1 | 4  # flags of a page: a smaller copy, a mask
_MOST_PAGES = 1000


def fault(data: bytes) -> str:
    """Why a TIFF is not to be read, and what to do; "" for all others, and for other files."""
    try:
        pages = _pages(data)
    except Exception as error:  # damaged: whoever reads it says so
        machine.let_through(error)
        return ""
    if not pages:
        return ""
    if reason := fault_of(pages[0]):
        return reason
    if len(pages) > 1:
        return (
            f"it has {len(pages)} pages, each an image or a band of one; save each image, or "
            "three bands together, as a file"
        )
    return ""


def fault_of(tags: Any) -> str:
    """Why one page, by its tags, would come out wrong, and what to do; "" where it would not."""
    samples, bits, kind = _layout(tags)
    if _is_multispectral(tags):
        return f"it has {samples} channels; choose three of them and save those as an image"
    if bits == 8 and kind == "signed":
        return f"it has signed 8-bit values; save it with {_READABLE}"
    if bits > 8 and samples > 1 and tags.get(284, 1) == 2:
        return "its channels of 16 bits lie one after the other (planar); save them interleaved"
    if bits > 8 and samples > 1 and tags.get(338) == (1,):
        return "its colours of 16 bits are multiplied by their opacity; save it without opacity"
    return ""


def description(data: bytes) -> str:
    """What a TIFF that cannot be opened holds, and what can be; "" for other files."""
    try:
        pages = _pages(data)
    except Exception as error:  # damaged
        machine.let_through(error)
        return ""
    if not pages:
        return ""
    samples, bits, kind = _layout(pages[0])
    kind += ", with 0 for white" * (pages[0].get(262) == 0)
    order = "big-endian " * data.startswith(b"MM")
    return (
        f"a {order}TIFF of {samples} channel{'s' * (samples > 1)} of {bits} bits, {kind}, is not "
        f"read; save it with {_READABLE}"
    )


def largest(file: Any) -> int:
    """The largest value that the type of an open TIFF's channels holds; 0: floating point."""
    _, bits, kind = _layout(file.tag_v2)
    return {"unsigned": (1 << bits) - 1, "signed": (1 << (bits - 1)) - 1}.get(kind, 0)


def is_unsigned_32(file: Any) -> bool:
    """Whether an open TIFF has 32 bits without a sign, which Pillow takes for signed ones."""
    return _layout(file.tag_v2)[1:] == (32, "unsigned")


def is_inverted(file: Any) -> bool:
    """Whether the lowest value of an open grey TIFF is white."""
    return file.tag_v2.get(262) == 0


def _pages(data: bytes) -> list[Any]:
    """The tags of each page, smaller copies and masks apart; none for other files."""
    if data[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return []
    stream, pages, visited = io.BytesIO(data), list[Any](), set[int]()
    header = data[: 16 if b"+" in data[:4] else 8]  # of a BigTIFF longer
    place: Any = ImageFileDirectory_v2(header).next
    while place and place not in visited and len(visited) < _MOST_PAGES:
        visited.add(place)
        stream.seek(place)
        page: Any = ImageFileDirectory_v2(header)
        page.load(stream)
        if not pages or not page.get(254, 0) & _REDUCED:
            pages.append(page)
        place = page.next
    return pages


def _layout(tags: Any) -> tuple[int, int, str]:
    """Channels, bits of each, and what they are."""
    bits, kinds = tags.get(258, (1,)), tags.get(339, (1,))
    return tags.get(277, 1), max(bits), _KINDS.get(max(kinds), "of another type")


def _is_multispectral(tags: Any) -> bool:
    """Whether there are more channels than colours and opacity."""
    samples, meaning, extra = tags.get(277, 1), tags.get(262), tags.get(338, ())
    more = samples - _COLOURS.get(meaning, 1)
    # Old files have opacity in a fourth channel of RGB without a word.
    opacity = more == 1 and (extra in ((1,), (2,)) or (not extra and meaning == 2))
    return more > 0 and not opacity
