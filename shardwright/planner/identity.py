"""``shardwright.json``: what a target says of itself, and what a reader believes of it.

Written into every target's root: schema, recipe, the four words, family, canonical config, the source's config.json
verbatim, companions, tensors with shape, dtype, partition and file, source fingerprints, plan hash, dropped. A reader
takes the words from it (format, dialect, spec, layout, family, config) and then checks every header against them, so a
file that lies is refused by the same checks as any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from .store import Store

__all__ = ["FILE_NAME", "SCHEMA", "read_identity", "read_json"]

FILE_NAME = "shardwright.json"
SCHEMA = 1
_LARGEST_JSON = 1 << 30


def read_json(store: Store, path: str) -> Any:
    """A JSON file of the store.

    Raises
    ------
    CheckpointError
        Not JSON, nested too deeply, or a key given twice.
    """
    if store.stat(path).nbytes > _LARGEST_JSON:
        raise CheckpointError("a JSON file is larger than 1 GiB", file=path)
    try:
        return json.loads(store.read(path), object_pairs_hook=lambda pairs: _once(pairs, path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"not JSON ({error})", file=path) from None


def _once(pairs: list[tuple[str, Any]], path: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise CheckpointError(f"a JSON object has the key {twice!r} twice", file=path)
    return found


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
    return identity
