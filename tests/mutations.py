"""Damage of files, seeded: what disks, cut transfers, editors and careless scripts do to bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

_OTHER_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 3, 10**30, 1.5, float("nan"), float("inf"), "", "a", "a\0b", "\ud800",
    [], [[]], [1], ["a"], {}, {"a": None}, [None],
)  # fmt: skip


def mutations(data: bytes, rng: random.Random, count: int) -> Iterator[bytes]:
    """`count` damaged copies of some bytes, none of which is whole.

    Bits flip, ends and middles are cut, bytes are inserted, doubled and zeroed. Of JSON, and of
    JSON lines, every other one stays JSON: a value is another, its name is gone, or it is nested
    deeply.
    """
    made = 0
    kinds = _flipped, _cut, _without, _inserted, _doubled, _zeroed
    while made < count:
        changed = _as_json(data, rng) if made % 2 else None
        changed = rng.choice(kinds)(data, rng) if changed is None else changed
        if changed != data:
            made += 1
            yield changed


def _range(data: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(max(len(data), 1))
    return start, start + rng.choice((1, 2, 8, 64, len(data)))


def _flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 5))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice((0, 1, len(data) - 1, rng.randrange(len(data) + 1)))]


def _without(data: bytes, rng: random.Random) -> bytes:
    start, end = _range(data, rng)
    return data[:start] + data[end:]


def _inserted(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    extra = rng.choice((b"\0", b"\xe9", b"\n", b"[" * 100_000, b"9" * 5000, rng.randbytes(9)))
    return data[:at] + extra + data[at:]


def _doubled(data: bytes, rng: random.Random) -> bytes:
    start, end = _range(data, rng)
    return data[:end] + data[start:]


def _zeroed(data: bytes, rng: random.Random) -> bytes:
    start, end = _range(data, rng)
    return data[:start] + bytes(len(data[start:end])) + data[end:]


def _as_json(data: bytes, rng: random.Random) -> bytes | None:
    """The JSON, or a line of it, with another value; None where it is none."""
    lines = data.split(b"\n")
    try:
        return _changed(json.loads(data), rng)
    except (ValueError, RecursionError):
        pass
    chosen = rng.randrange(len(lines))
    try:
        lines[chosen] = _changed(json.loads(lines[chosen]), rng)
    except (ValueError, RecursionError):
        return None
    return b"\n".join(lines)


def _changed(value: Any, rng: random.Random) -> bytes:
    """A JSON value in which one at random, or the whole, is gone or another."""
    holders = list(_holders(value))
    if not holders or rng.random() < 0.05:
        return json.dumps(rng.choice(_OTHER_VALUES)).encode()
    holder = rng.choice(holders)
    name = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    if rng.random() < 0.2:
        del holder[name]
    elif rng.random() < 0.2:
        holder[name] = [holder[name]] if rng.random() < 0.5 else str(holder[name])
    else:
        holder[name] = rng.choice(_OTHER_VALUES)
    return json.dumps(value).encode()


def _holders(value: Any) -> Iterator[Any]:
    """All objects and lists in a JSON value that hold something."""
    if isinstance(value, (dict, list)) and value:
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _holders(inner)
