"""``shardwright.json``: what a target says of itself, and what a reader believes of it.

Written into every target's root: schema, recipe, the four words, family, canonical config, the source's config.json
verbatim, companions, tensors with shape, dtype, partition and file, source fingerprints, plan hash, dropped. A reader
takes the words from it (format, dialect, spec, layout, family, config) and then checks every header against them, so a
file that lies is refused by the same checks as any other.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

from ..errors import CheckpointError, ShardwrightError
from .layout import Layout
from .registry import Registry
from .store import Store

__all__ = ["FILE_NAME", "SCHEMA", "named_in", "read_identity", "read_json", "read_object"]

FILE_NAME = "shardwright.json"
SCHEMA = 1
_LARGEST_JSON = 1 << 30
_DEEPEST_JSON = 64
T = TypeVar("T")


def read_json(store: Store, path: str) -> Any:
    """A JSON file of the store.

    Raises
    ------
    CheckpointError
        Not JSON, nested too deeply, a key given twice, or text that could not be written again.
    """
    if store.stat(path).nbytes > _LARGEST_JSON:
        raise CheckpointError("a JSON file is larger than 1 GiB", file=path)
    try:
        if not store.stat(path).nbytes:
            raise CheckpointError("the file is empty", file=path, remedy="Copy the file again")
        # UTF-8 and nothing else; the mark that some editors begin a file with is no part of the text.
        text = store.read(path).decode().removeprefix("\ufeff")
        found = json.loads(text, object_pairs_hook=lambda pairs: _once(pairs, path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"not JSON ({error})", file=path, remedy="Copy the file again, or correct it") from None
    # ASCII without escapes has no surrogates, and few brackets no depth: an index of a million names is not walked through.
    if not text.isascii() or "\\u" in text or text.count("{") + text.count("[") > _DEEPEST_JSON:
        _check_plain(found, path)
    return found


def _once(pairs: list[tuple[str, Any]], path: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise CheckpointError(f"a JSON object has the key {twice!r} twice", file=path)
    return found


def _check_plain(value: object, path: str) -> None:
    """Shallow enough to be printed, and every string of it can be encoded: one half of a surrogate pair cannot."""
    pending: list[tuple[object, int]] = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        if isinstance(item, str):
            if not item.isascii() and any("\ud800" <= c <= "\udfff" for c in item):
                raise CheckpointError("a JSON string holds half of a surrogate pair", file=path, actual=ascii(item)[:80])
        elif isinstance(item, dict | list):
            if depth > _DEEPEST_JSON:
                raise CheckpointError("a JSON file is nested too deeply", file=path, expected=f"at most {_DEEPEST_JSON} levels")
            inner = [*item, *item.values()] if isinstance(item, dict) else item
            pending += [(v, depth + 1) for v in inner if isinstance(v, str | dict | list)]


def read_object(store: Store, path: str) -> dict[str, Any]:
    """A JSON file whose top is an object."""
    value = read_json(store, path)
    if not isinstance(value, dict):
        raise CheckpointError("a JSON object was expected", file=path, actual=type(value).__name__)
    return value


def read_identity(store: Store) -> Mapping[str, Any] | None:
    """The root's ``shardwright.json``, or None where there is none.

    Raises
    ------
    CheckpointError
        It is broken, or of a schema that this version does not know.
    """
    if not store.exists(FILE_NAME):
        return None
    identity = read_object(store, FILE_NAME)
    if identity.get("schema") != SCHEMA:
        raise CheckpointError(
            "shardwright.json has a schema that this version does not know", file=FILE_NAME, expected=SCHEMA, actual=identity.get("schema")
        )
    for key, kind in {"format": str, "dialect": str, "spec": str, "layout": dict, "family": str, "config": dict}.items():
        if not isinstance(identity.get(key), kind):
            raise CheckpointError(
                f"shardwright.json lacks {key!r}", file=FILE_NAME, expected=kind.__name__, actual=type(identity.get(key)).__name__
            )
    try:
        Layout.from_json(identity["layout"])
    except ShardwrightError as error:
        raise CheckpointError(f"shardwright.json holds no layout ({error})", file=FILE_NAME, actual=identity["layout"]) from None
    return identity


def named_in(identity: Mapping[str, Any], kind: str, registry: Registry[T]) -> T:
    """The part that the identity names.

    Raises
    ------
    CheckpointError
        It is not registered here.
    """
    name = identity[kind]
    if name not in registry:
        raise CheckpointError(
            f"shardwright.json names a {kind} that is not registered here", file=FILE_NAME, actual=repr(name),
            remedy=f"Known: {', '.join(registry.names())}. "
            + ("Give its table with --family FILE" if kind == "family" else "Register it first (shardwright.register)"),
        )  # fmt: skip
    return registry.get(name)
