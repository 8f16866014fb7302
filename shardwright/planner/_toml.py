"""Reading a table's TOML, and merging it over the tables that it extends; checked as far as that needs.

1. `read` parses a file of bounded size and depth; `known_keys`, `text_of`, `texts_of`, `entries_of`, `table_of` look into
   the result and name what is wrong.
2. `extended` merges: fields and words by name; tensors and aliases by name, rows by what they hold in which spellings, in
   place; spellings that a table does not name again are gone, with what only they have; the rest is replaced.

Boundary: dictionaries; what entries mean is `tables`'s business.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import TableError, short

__all__ = ["FAMILY_KEYS", "entries_of", "extended", "known_keys", "listed", "read", "table_of", "text_of", "texts_of"]

FAMILY_KEYS = {
    "name", "extends", "model_types", "architecture", "infer", "config", "tensor", "alias", "ignore", "keep_dtype",
    "spellings", "row", "layer", "refuse", "base_prefix", "carries",
}  # fmt: skip
_LARGEST = 1 << 20
_MOST_DOTS = 250
_DEEPEST = 16
_MOST_BASES = 8
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,99}", re.ASCII)


def read(path: str | Path) -> dict[str, Any]:
    """A file's TOML.

    Raises
    ------
    TableError
        It cannot be read, is too large, or is no TOML.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_LARGEST + 1)
    except OSError as error:
        raise TableError(f"the table cannot be read ({error.strerror})", file=path) from None
    if len(data) > _LARGEST:
        raise TableError("a table is larger than 1 MiB", file=path)
    # A key of n parts takes the parser n² steps: no name in a table has nearly so many, nor a line of a list of names.
    if wrong := next((n for n, line in enumerate(data.split(b"\n"), 1) if line.count(b".") > _MOST_DOTS), None):
        raise TableError(f"a line with more than {_MOST_DOTS} dots", file=path, actual=f"line {wrong}", remedy="Break it into several")
    try:
        table = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise TableError(f"not TOML ({error})", file=path) from None
    _shallow(table, path)
    return table


def _shallow(table: object, path: str | Path) -> None:
    """Nothing is nested more deeply than a table's grammar needs, so that every value can be walked and printed."""
    pending = [(table, 0)]
    while pending:
        value, depth = pending.pop()
        if depth > _DEEPEST:
            raise TableError("a table is nested too deeply", file=path, expected=f"at most {_DEEPEST} levels")
        if isinstance(value, dict | list):
            inner = value.values() if isinstance(value, dict) else value
            pending += [(v, depth + 1) for v in inner if isinstance(v, dict | list)]


def extended(table: dict[str, Any], origin: str) -> dict[str, Any]:
    """The table over those it extends, the first of them below the others.

    Raises
    ------
    TableError
        One of them is not known or extends itself, or they are more than 8 in all.
    """
    return _extended(table, origin, (), [])


def _extended(table: dict[str, Any], origin: str, below: tuple[str, ...], all_read: list[str]) -> dict[str, Any]:
    """`below` are the tables on the way to this one, `all_read` every base so far: those that share a base could double it at each
    level."""
    merged: dict[str, Any] = {}
    for base in listed(table.get("extends", [])):
        merged = _merged(merged, _base_table(base, origin, below, all_read), origin)
    return _merged(merged, table, origin)


def _base_table(name: Any, origin: str, below: tuple[str, ...], all_read: list[str]) -> dict[str, Any]:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise TableError("a family extends another by its name: letters, digits, - and _", file=origin, actual=short(name))
    if len(all_read) == _MOST_BASES:
        raise TableError(f"a family extends more than {_MOST_BASES} others", file=origin)
    own = Path(str(resources.files(__package__) / "families"))
    for folder in (Path(origin).parent, own):
        path = folder / f"{name}.toml"
        if path.is_file():
            if str(path) in (*below, origin):
                raise TableError("a family extends itself", file=origin, actual=short(name))
            all_read.append(str(path))
            base = _package_table(path) if folder == own else read(path)
            known_keys(base, FAMILY_KEYS, str(path), "the family")
            return _extended(base, str(path), (*below, origin), all_read)
    known = sorted(Path(str(entry)).stem for entry in (resources.files(__package__) / "families").iterdir())
    raise TableError("the family it extends is not known", file=origin, actual=repr(name), remedy=f"Known: {', '.join(known)}")


@cache
def _package_table(path: Path) -> dict[str, Any]:
    """A table of this package, which several extend; nobody changes it."""
    return read(path)


def _merged(base: dict[str, Any], over: dict[str, Any], origin: str) -> dict[str, Any]:
    """`over` on top of `base`: fields and words by name; tensors and aliases by name, rows by what they hold in which spellings,
    in place. Spellings that `over` does not name again are gone, with what only they have."""
    merged = {**base, **over}
    if "spellings" in over:
        spellings = set(texts_of(over, "spellings", origin))
        base = {**base, "row": [left for entry in entries_of(base, "row", origin) if (left := _within(entry, spellings))]}
    for kind in ("config", "layer", "refuse"):
        merged[kind] = {**table_of(base, kind, origin), **table_of(over, kind, origin)}
    for kind in ("tensor", "alias", "row", "ignore"):
        mine: dict[str, list[dict[str, Any]]] = {}
        for entry in entries_of(over, kind, origin):
            mine.setdefault(_identity(kind, entry, origin), []).append(entry)
        replaced, kept = set(mine), []
        for entry in entries_of(base, kind, origin):
            at = _identity(kind, entry, origin)
            kept += mine.pop(at, []) if at in replaced else [entry]
        merged[kind] = kept + [entry for own in mine.values() for entry in own]
    return merged


def _within(entry: dict[str, Any], spellings: set[str]) -> dict[str, Any] | None:
    """The row in these spellings only; None if it is in none of them."""
    name = entry.get("name")
    if not isinstance(name, dict):
        return entry
    left = {spelling: text for spelling, text in name.items() if spelling in spellings}
    return {**entry, "name": left} if left else None


def _identity(kind: str, entry: Mapping[str, Any], origin: str) -> str:
    """What makes an entry the same in a table and in the one it extends."""
    if kind == "row":
        name = entry.get("name")
        return str((entry.get("hub"), sorted(name) if isinstance(name, dict) else ""))
    return text_of(entry, "pattern" if kind == "ignore" else "name", f"{origin} [[{kind}]]", "it")


def table_of(table: Mapping[str, Any], key: str, origin: str) -> dict[str, Any]:
    """The sub-table under a key, empty where there is none."""
    found = table.get(key, {})
    if not isinstance(found, dict):
        raise TableError(f"[{key}] must be a table", file=origin, actual=short(found))
    return found


def listed(value: Any) -> list[Any]:
    """A list, or one value as a list of it."""
    return value if isinstance(value, list) else [value]


def known_keys(table: Mapping[str, Any], known: set[str], where: str, what: str) -> None:
    """Refuse an entry that has a key which means nothing."""
    if unknown := sorted(set(table) - known):
        raise TableError(f"{what} has no entry {short(unknown[0])}", file=where, remedy=f"Known: {', '.join(sorted(known))}")


def text_of(table: Mapping[str, Any], key: str, where: str, what: str) -> str:
    """A string that must be there."""
    value = table.get(key)
    if not isinstance(value, str) or not value:
        raise TableError(f"{what} needs {key!r}: a string", file=where, actual=short(value))
    return value


def texts_of(table: Mapping[str, Any], key: str, where: str) -> list[str]:
    """A list of strings, empty where there is none."""
    value = table.get(key, [])
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise TableError(f"{key!r} must be a list of strings", file=where, actual=short(value))
    return value


def entries_of(table: Mapping[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    """An array of tables, empty where there is none."""
    value = table.get(key, [])
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise TableError(f"[[{key}]] must be a list of tables", file=where)
    return value
