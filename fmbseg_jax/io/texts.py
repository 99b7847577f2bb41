"""Text and JSON files, whole or refused by their names: another's, edited, cut, or damaged.

A form says what a JSON value has to be:

    str, int, float, bool, dict, list, float | None   a value of this type
    [form]                                            a list of such values
    {str: form}                                       an object of such values, by any names
    {"name": form, "other?": form}                    an object with these; `other` may be missing
    (form, form)                                      a list of as many values, each of its form
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from etils import epath

from fmbseg_jax.errors import UserError

_INTEGERS = range(-(1 << 63), 1 << 63)


def read(path: epath.PathLike, advice: str = "Save it as UTF-8.") -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
      UserError: it is no UTF-8 text; the message says where.
      OSError: it cannot be read.
    """
    data = epath.Path(path).read_bytes()
    try:
        return decode(data)
    except ValueError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}). {advice}") from None


def decode(data: bytes) -> str:
    """UTF-8 → text, without a byte order mark; raises ValueError with the place of what is not."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at, byte = error.start, error.object[error.start]
    else:
        at, byte = data.find(0), 0
        if at < 0:
            return text
    raise ValueError(f"byte 0x{byte:02X} in line {data.count(10, 0, at) + 1}")


def read_json(path: epath.PathLike, form: Any, advice: str) -> Any:
    """What a JSON file holds.

    Args:
      form: what that has to be; see above.
      advice: what to do where it is not; the end of the message.

    Raises:
      UserError: it is no JSON, or of another form.
      OSError: it cannot be read.
    """
    try:
        return parse(epath.Path(path).read_bytes(), form)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}. {advice}") from None


def parse(data: bytes, form: Any) -> Any:
    """The value of some JSON; raises ValueError, with the reason, where it is not of a form."""
    try:
        text = decode(data)
    except ValueError as error:
        raise ValueError(f"it is not UTF-8 text ({error})") from None
    if not text.strip():
        raise ValueError("it is empty")
    try:
        value = json.loads(text)
        reason = fault(value, form)
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:
        too_long = "integer string conversion" in str(error)
        reason = f"it is not JSON ({'a number of thousands of digits' if too_long else error})"
    if reason:
        raise ValueError(reason)
    return value


def parse_lines(data: bytes, form: Any) -> Iterator[Any]:
    """The value of each line of JSON lines; None for one that is damaged, or was cut by a kill."""
    for line in data.split(b"\n"):
        if line.strip():
            try:
                yield parse(line, form)
            except ValueError:
                yield None


def fault(value: Any, form: Any, place: str = "") -> str:
    """How a JSON value differs from a form, the first difference; "" where it does not."""
    name = place or "it"
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{name} is no list"
        if form[0] is int and _are_integers(value):  # lists of thousands, quickly
            return ""
        return _first(fault(one, form[0], f"{place}[{i}]") for i, one in enumerate(value))
    if isinstance(form, tuple):
        if not isinstance(value, list) or len(value) != len(form):
            return f"{name} is no list of {len(form)}"
        pairs = enumerate(zip(value, form, strict=True))
        return _first(fault(one, wanted, f"{place}[{i}]") for i, (one, wanted) in pairs)
    if isinstance(form, dict):
        return _fault_of_object(value, form, place)
    if form is object or (_is(value, form) and _is_sound(value)):
        return ""
    return f"{name} is no {_TITLES.get(form, form)}"


def _are_integers(values: list[Any]) -> bool:
    same = all(type(value) is int for value in values)
    return same and (not values or (min(values) in _INTEGERS and max(values) in _INTEGERS))


_TITLES = {
    str: "text", int: "integer", float: "number", bool: "true or false", dict: "object",
    list: "list",
}  # fmt: skip


def _fault_of_object(value: Any, form: dict[Any, Any], place: str) -> str:
    if not isinstance(value, dict):
        return f"{place or 'it'} is no object"
    prefix = f"{place}." if place else ""
    if str in form:
        whole = (_first((fault(n, str), fault(v, form[str], prefix + n))) for n, v in value.items())
        return _first(whole)
    for wanted, inner in form.items():
        name = wanted.removesuffix("?")
        if name in value:
            if found := fault(value[name], inner, prefix + name):
                return found
        elif name == wanted:
            return f"it lacks {prefix}{name}"
    return ""


def _first(faults: Iterable[str]) -> str:
    return next(filter(None, faults), "")


def _is(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):  # which Python takes for integers
        return bool in (get_args(kind) or (kind,))
    if isinstance(value, int) and isinstance(0.0, kind):
        return True
    return isinstance(value, kind)


def _is_sound(value: Any) -> bool:
    """Whether a number is finite and fits 64 bits, and a text can be written as UTF-8."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return value in _INTEGERS
    if isinstance(value, str):
        return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)
    return True
