"""Reading JSON and shapes that come out of a file and may say anything.

`parse_json` accepts what a strict JSON reader accepts: no duplicate keys, no ``NaN``, no text that cannot be encoded
again, and no nesting or number so large that parsing it would be the attack. `count_elements` multiplies a shape
without ever growing a number past 63 bits. Pure: bytes in, plain values or a `ContainerError` out.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from ...errors import ContainerError, short

__all__ = ["STRICT", "count_elements", "object_of", "parse_json"]

_MAX_COUNT = 2**63 - 1
_MAX_RANK = 64
"""What torch and numpy allow; a tensor of a million axes would cost every later step."""


class _DuplicateKeyError(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _DuplicateKeyError(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
"""Refuses duplicate keys and constants with a `ValueError`."""


def parse_json(data: bytes, *, file: str, what: str, remedy: str | None = None) -> dict[str, Any]:
    """The JSON object that `data` spells; `what` names it in messages, e.g. ``"header"``.

    Raises
    ------
    ContainerError
        Not UTF-8, not JSON, not an object, a key given twice, nested too deeply.

    >>> parse_json(b'{"a": [1]}', file="f", what="header")
    {'a': [1]}
    """
    try:
        text = data.decode()
        found = STRICT.decode(text)
        if "\\u" in text:
            _reject_lone_surrogates(found)
    except _DuplicateKeyError as error:
        raise ContainerError(f"the {what} gives the key {short(error.key)} twice", file=file) from None
    except RecursionError:
        raise ContainerError(f"the {what} is nested too deeply to be genuine", file=file, remedy=remedy) from None
    except ValueError as error:
        raise ContainerError(f"the {what} is not valid JSON ({error})", file=file, remedy=remedy) from None
    if type(found) is not dict:
        raise ContainerError(f"the {what} is not a JSON object", file=file, actual=type(found).__name__, remedy=remedy)
    return found


def object_of(value: object, *, file: str, tensor: str | None, what: str) -> dict[str, Any]:
    """`value`, which must be a JSON object."""
    if type(value) is not dict:
        raise ContainerError(f"{what} is not a JSON object", file=file, tensor=tensor, actual=type(value).__name__)
    return value


def count_elements(shape: object) -> int:
    """Elements of a shape out of JSON, or -1 where it is no list of at most 64 whole numbers, or their product passes 63 bits.

    >>> count_elements([2, 3]), count_elements([]), count_elements([True]), count_elements([2**62, 4]), count_elements([1] * 65)
    (6, 1, -1, -1, -1)
    """
    if type(shape) is not list or len(shape) > _MAX_RANK:
        return -1
    count = 1
    for extent in shape:
        # `type(...) is`: JSON's true is an int to isinstance. The product is bounded at every step, so it stays cheap.
        if type(extent) is not int or extent < 0 or extent > _MAX_COUNT:
            return -1
        count *= extent
        if count > _MAX_COUNT:
            return -1
    return count


def _reject_lone_surrogates(value: object) -> None:
    # A lone surrogate parses, but no name or file that holds it could be written again.
    for text in _strings(value):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{short(text)} holds half of a surrogate pair") from None


def _strings(value: object) -> list[str]:
    found: list[str] = []
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            pending += item
    return found
