"""Mutations that know a structure: bytes, numbers in fixed places, and JSON. Those of pickles and zip archives lie beside.

Each takes an input and a `random.Random` and gives another input; the same draw gives the same result. Harmless edits are
frequent, so that many results are still accepted and the next mutation starts from behind the parser's first checks.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["EDGES", "TEXTS", "edge", "mutate_bytes", "mutate_json", "mutate_tree", "set_number", "text"]

EDGES = tuple(
    sorted(
        {
            0,
            1,
            2,
            3,
            7,
            8,
            16,
            63,
            64,
            100,
            255,
            1000,
            *(sign + (1 << bits) for bits in (8, 15, 16, 31, 32, 53, 62, 63, 64) for sign in (-1, 0, 1)),
        }
    )
)
"""Whole numbers near where widths end."""
TEXTS = (
    *(
        "",
        " ",
        ".",
        "..",
        "../x",
        "/etc/passwd",
        "a/../../b",
        "\\",
        "C:x",
        "a\0b",
        "a\nb",
        "é",
        "\u202e",
        "\U0001f600",
        "\udc80",
        "x" * 300,
    ),
    *("__proto__", "__class__", "null", "true", "-1", "1e999", "%s%n", "{0}", "*", "[", "weight", "model", "NaN"),
)
"""Names that have meant something to somebody's parser."""


def edge(rng: random.Random, near: Sequence[int] = ()) -> int:
    """A number at an edge, or next to one of `near`, or a small one."""
    draw = rng.random()
    if near and draw < 0.5:
        return max(0, rng.choice(near) + rng.choice((-1, 1, -8, 8, 0)))
    return rng.choice(EDGES) if draw < 0.8 else rng.randrange(300)


def text(rng: random.Random) -> str:
    return rng.choice(TEXTS) if rng.random() < 0.7 else "".join(rng.choice("abz._/0") for _ in range(rng.randrange(12)))


def set_number(data: bytes, at: int, width: int, value: int) -> bytes:
    """`data` with an unsigned little-endian number of `width` bytes at `at`, cut to that width."""
    return data[:at] + (value & (1 << 8 * width) - 1).to_bytes(width, "little") + data[at + width :]


def _flip(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _set(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, 32, 34, 46, rng.randrange(256)))]) + data[at + 1 :]


def _number(data: bytes, rng: random.Random) -> bytes:
    width = rng.choice((2, 4, 8))
    return set_number(data, rng.randrange(max(1, len(data) - width)), width, edge(rng, (len(data),)))


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 1, 2, 4, 8, 30))) + data[at:]


def _span(data: bytes, rng: random.Random) -> tuple[int, int]:
    begin = rng.randrange(len(data))
    return begin, min(len(data), begin + 1 + int(rng.expovariate(1 / 12)))


def _delete(data: bytes, rng: random.Random) -> bytes:
    begin, end = _span(data, rng)
    return data[:begin] + data[end:]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    begin, end = _span(data, rng)
    return data[:end] + data[begin:end] * rng.choice((1, 1, 2, 5)) + data[end:]


def _splice(data: bytes, rng: random.Random) -> bytes:
    begin, end = _span(data, rng)
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[begin:end] + data[at:]


def _truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _extend(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice((b"\0", b" ", b"\n", b"}", b"x" * 9, data[:40]))


_BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(_flip, _flip, _set, _set, _number, _number, _insert, _delete, _repeat, _splice, _truncate, _extend),
)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One edit that knows nothing: flip, set, overwrite a number, insert, delete, repeat, splice, truncate, extend."""
    return rng.choice(_BYTES)(data, rng) if data else rng.randbytes(rng.randrange(1, 9))


# JSON. A tree is edited as Python values; what a tree cannot hold (a key twice, NaN, a huge number) as text.


def _value(rng: random.Random) -> Any:
    return rng.choice(
        (
            *(None, True, False, 0, 1, -1, 1.5, -0.0, 1e300, "", [], {}, [0], {"a": 1}, [[]], [1, 2, 3]),
            *(edge(rng), -edge(rng), text(rng), [edge(rng)] * rng.randrange(5), {text(rng): edge(rng)}),
        )
    )


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a tree."""
    found: list[tuple[Any, Any]] = []
    pending = [tree]
    while pending:
        node = pending.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            pending.append(node[key])
    return found


def _nudge(value: Any, rng: random.Random, words: Sequence[Any]) -> Any:
    """A value of the same type, most often."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, value * 2, value // 2, -value, edge(rng), float(value) if abs(value) < 1 << 1000 else 0.5))
    if isinstance(value, float):
        return rng.choice((value + 1, -value, value * 1e-9, int(value) if abs(value) < 1e15 else 0, 1e300, 0.0))
    if isinstance(value, str):
        return rng.choice((value + "x", value[:-1], value.upper(), value[1:], text(rng), _word(rng, words)))
    if isinstance(value, list):
        return rng.choice((value + value[-1:], value[:-1], value[::-1], value * 2, [*value, _value(rng)]))
    return _value(rng)


def mutate_tree(tree: Any, rng: random.Random, words: Sequence[Any] = ()) -> Any:
    """One edit of a JSON value, in place where it can be: nudge, replace, delete, add, rename, swap, copy, nest.

    Parameters
    ----------
    words
        Values that mean something to this parser: its keys, its enumerations.
    """
    places = _places(tree)
    if not places:
        return _value(rng) if rng.random() < 0.5 or not isinstance(tree, dict) else {str(_word(rng, words)): _value(rng)}
    node, key = rng.choice(places)
    other, other_key = rng.choice(places)
    draw = rng.random()
    if draw < 0.4:
        node[key] = _nudge(node[key], rng, words)
    elif draw < 0.55:
        node[key] = _word(rng, words) if rng.random() < 0.6 else _value(rng)
    elif draw < 0.65:
        del node[key]
    elif draw < 0.8 and isinstance(node, dict):
        name = _word(rng, words) if rng.random() < 0.6 else text(rng)
        node[str(name)] = node.pop(key) if rng.random() < 0.5 else _value(rng)
    elif draw < 0.9:
        node[key], other[other_key] = _copied(other[other_key]), _copied(node[key])
    elif draw < 0.97:
        node[key] = _copied(other[other_key])
    else:
        node[key] = [node[key]] if rng.random() < 0.5 else {"a": node[key]}
    return tree


def _word(rng: random.Random, words: Sequence[Any]) -> Any:
    # A copy: what is planted may be edited later, and the next draw must not see that.
    return _copied(rng.choice(words)) if words else text(rng)


def _copied(value: Any) -> Any:
    return json.loads(json.dumps(value)) if isinstance(value, dict | list) else value


def _key_twice(found: str, rng: random.Random) -> str:
    keys = list(re.finditer(r'"(?:[^"\\]|\\.)*":', found))
    if not keys:
        return found
    match = rng.choice(keys)
    return found[: match.start()] + match.group() + "0," + found[match.start() :]


def _odd_number(found: str, rng: random.Random) -> str:
    numbers = list(re.finditer(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?", found))
    if not numbers:
        return found
    match = rng.choice(numbers)
    odd = rng.choice(("9" * 5000, "1" + "0" * 400, "NaN", "Infinity", "-Infinity", "1e400", "-0", "01", "1.0", "1e2", "0x10", "1_0", "٣"))
    return found[: match.start()] + odd + found[match.end() :]


def _deep(found: str, rng: random.Random) -> str:
    depth = rng.choice((50, 900, 5000, 100_000))
    opened, closed = rng.choice((("[", "]"), ('{"a":', "}")))
    return found.replace(rng.choice(("0", "1", '"', "[", "{")), opened * depth + "0" + closed * depth, 1)


def _escapes(found: str, rng: random.Random) -> str:
    spots = [match.start() + 1 for match in re.finditer('"', found)]
    at = rng.choice(spots) if spots else 0
    return (
        found[:at]
        + rng.choice((r"\u0041", r"\ud800", r"\udc00\ud800", r"\ud83d\ude00", r"\n", r"\x", "\\", "\x01", "\u2028", "\ufeff"))
        + found[at:]
    )


def _spaces(found: str, rng: random.Random) -> str:
    return rng.choice((found + "  ", " " + found, "\ufeff" + found, found.replace(",", " ,\n", 1), found.replace(":", ": "), found + "}"))


_TEXT_EDITS = (_key_twice, _odd_number, _deep, _escapes, _spaces, _spaces)


def mutate_json(data: bytes, rng: random.Random, words: Sequence[Any] = ()) -> bytes:
    """One edit of a JSON document: of its tree in most draws, else of its text or its bytes."""
    draw = rng.random()
    try:
        tree = json.loads(data)
        if draw < 0.78:
            tree = mutate_tree(tree, rng, words)
            indent = 2 if rng.random() < 0.1 else None
            data = json.dumps(tree, indent=indent, ensure_ascii=rng.random() < 0.3, separators=None if indent else (",", ":")).encode(
                "utf-8", "surrogatepass"
            )
            return data if rng.random() < 0.85 else mutate_json(data, rng, words)
        if draw < 0.93:
            return rng.choice(_TEXT_EDITS)(data.decode(), rng).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        pass
    return mutate_bytes(data, rng)
