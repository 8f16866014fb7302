"""Reading JSON values that may say anything, one small function per kind of value.

Each function is handed a value and the name of its field, and returns it with a plain type or raises a `PlanError` that
names the field. Sizes are bounded before anything is allocated: a list is as long as the file made it, a delta column
no longer than its list, compressed bytes no longer than they said they would be. Boundary: pure; knows no plan.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Iterable
from itertools import accumulate
from math import isfinite
from typing import Any, NoReturn

from ..errors import PlanError

__all__ = [
    "LIMIT", "column", "fail", "flag", "index_column", "items", "path", "pick", "plain", "record", "text", "texts", "unpack", "whole",
]  # fmt: skip

LIMIT = 1 << 60
"""No number of a plan is larger: offsets, sizes and their sums stay far below 63 bits."""
_DEEPEST = 32
_LONGEST_PATH = 4096


def fail(where: str, what: str, expected: object = None, actual: object = None) -> NoReturn:
    """Refuse the field `where`."""
    raise PlanError(f"the saved plan's {where} {what}", expected=expected, actual=actual, remedy="Plan again")


def record(value: object, where: str, keys: Iterable[str], optional: Iterable[str] = ()) -> dict[str, Any]:
    """An object with exactly these keys, and perhaps some of the optional ones."""
    if type(value) is not dict:
        fail(where, "is not an object", actual=type(value).__name__)
    wanted = set(keys)
    known = wanted.union(optional)
    for key in value:
        if key not in known:
            fail(where, f"has an unknown key {str(key)[:80]!r}")
    for key in wanted:
        if key not in value:
            fail(where, f"lacks the key {key!r}")
    return value


def items(value: object, where: str, count: int | None = None, most: int | None = None) -> list[Any]:
    """A list, of `count` items if given, of at most `most`."""
    if type(value) is not list:
        fail(where, "is not a list", actual=type(value).__name__)
    if count is not None and len(value) != count:
        fail(where, "has the wrong length", expected=count, actual=len(value))
    if most is not None and len(value) > most:
        fail(where, "is too long", expected=f"at most {most}", actual=len(value))
    return value


def text(value: object, where: str, longest: int = 1 << 16) -> str:
    """A string that can be written again."""
    if type(value) is not str:
        fail(where, "is not a string", actual=type(value).__name__)
    if len(value) > longest:
        fail(where, "is too long", expected=f"at most {longest} characters", actual=len(value))
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            fail(where, "holds half of a surrogate pair")
    return value


def texts(value: object, where: str, longest: int = 1 << 16) -> list[str]:
    """A list of strings."""
    return [text(v, f"{where}[{i}]", longest) for i, v in enumerate(items(value, where))]


def path(value: object, where: str) -> str:
    """A relative path that stays below its root."""
    found = text(value, where, _LONGEST_PATH)
    if not found or "\0" in found or any(part in ("", ".", "..") for part in found.split("/")):
        fail(where, "is not a path below the root", actual=repr(found[:200]))
    return found


def whole(value: object, where: str, low: int = 0, high: int = LIMIT) -> int:
    """A whole number in ``[low, high]``."""
    # `type(...) is`: JSON's true is an int to isinstance.
    if type(value) is not int:
        fail(where, "is not a whole number", actual=type(value).__name__)
    if not low <= value <= high:
        fail(where, "is out of range", expected=f"{low} … {high}", actual=_short(value))
    return value


def flag(value: object, where: str) -> bool:
    """True or false."""
    if type(value) is not bool:
        fail(where, "is neither true nor false", actual=type(value).__name__)
    return value


def pick(value: object, where: str, known: Iterable[str]) -> str:
    """One of the known words."""
    choices = list(known)
    if type(value) is not str or value not in choices:
        fail(where, "is not known", expected=" or ".join(choices[:20]), actual=repr(value)[:80])
    return value


def column(value: object, where: str, rows: int | None = None, low: int = 0, high: int = LIMIT) -> list[int]:
    """A column of whole numbers: a list, or ``{"delta": list}`` of first value and differences."""
    delta = type(value) is dict
    if delta:
        value = record(value, where, ("delta",))["delta"]
    found = items(value, where, rows)
    if not set(map(type, found)) <= {int}:
        fail(where, "is not a column of whole numbers", actual=next(type(v).__name__ for v in found if type(v) is not int))
    if delta and found:
        if max(map(abs, found)) > 2 * LIMIT:
            fail(where, "has a difference out of range")
        found = list(accumulate(found))
    if found and not (low <= min(found) and max(found) <= high):
        fail(where, "has a number out of range", expected=f"{low} … {high}", actual=f"{_short(min(found))} … {_short(max(found))}")
    return found


def index_column(value: object, where: str, length: int, rows: int | None = None) -> list[int]:
    """A column of indices into a list of `length`."""
    return column(value, where, rows, 0, length - 1)


def unpack(value: object, where: str, nbytes: int) -> bytes:
    """``{"base64": text}`` or ``{"zlib": text}`` of exactly `nbytes` bytes."""
    if type(value) is not dict or len(value) != 1:
        fail(where, "is not packed bytes")
    kind, packed = next(iter(value.items()))
    if kind not in ("base64", "zlib"):
        fail(where, f"has an unknown key {str(kind)[:80]!r}")
    if type(packed) is not str:
        fail(where, "is not a string", actual=type(packed).__name__)
    try:
        data = base64.b64decode(packed, validate=True)
        if kind == "zlib":
            # One byte more than promised is enough to see that the promise is false.
            data = zlib.decompressobj().decompress(data, nbytes + 1)
    except (binascii.Error, ValueError, zlib.error):
        fail(where, "is not packed bytes")
    if len(data) != nbytes:
        fail(where, "has the wrong number of bytes", expected=nbytes, actual=len(data))
    return data


def plain(value: object, where: str) -> Any:
    """Plain JSON values, not nested too deeply."""
    pending: list[tuple[object, int]] = [(value, 0)]
    while pending:
        found, depth = pending.pop()
        if depth > _DEEPEST:
            fail(where, "is nested too deeply")
        if type(found) is dict:
            pending += [(text(k, f"{where} key"), depth + 1) for k in found]
            pending += [(v, depth + 1) for v in found.values()]
        elif type(found) is list:
            pending += [(v, depth + 1) for v in found]
        elif type(found) is str:
            text(found, where)
        elif type(found) is int:
            whole(found, where, -LIMIT)
        elif type(found) is float:
            if not isfinite(found):
                fail(where, "holds a number that is not finite")
        elif found is not None and type(found) is not bool:
            fail(where, "holds a value that is no JSON", actual=type(found).__name__)
    return value


def _short(number: int) -> str:
    """The number, unless its digits would fill the screen (or take minutes to make)."""
    return str(number) if number.bit_length() < 200 else f"a number of {number.bit_length()} bits"
