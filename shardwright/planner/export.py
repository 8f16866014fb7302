"""Family tables as plain data, complete: ``shardwright families --json``, for other projects to use.

Every field of a family is exported by its own name, whatever it is, so that nothing of a table can be left out; expressions
are their text, operations ``[name, [arguments]]``. ``docs/families.md`` has the schema. Boundary: pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from .expressions import Expression
from .tables import Family

__all__ = ["SCHEMA", "family_json"]

SCHEMA = 1
_SPELLED = {"stored": "huggingface", "layer_words": "layer"}
"""Fields that tables call otherwise."""
_LEFT_OUT = {"origin"}
"""Where the table lies on this machine."""


def family_json(family: Family) -> dict[str, Any]:
    """A family's table, what it extends included.

    >>> from .tables import FAMILIES
    >>> family_json(FAMILIES.get("llama"))["tensors"][0]["shape"]
    ['vocab_size', 'hidden_size']
    """
    found = _plain(family)
    return {"schema": SCHEMA, **found, "layer": dict(found["layer"])}


def _plain(value: Any) -> Any:
    match value:
        case Expression():
            return value.text
        case Mapping():
            return {key: _plain(item) for key, item in value.items()}
        case tuple() | list():
            return [_plain(item) for item in value]
        case _ if is_dataclass(value):
            kept = [f.name for f in fields(value) if f.name not in _LEFT_OUT]
            return {_SPELLED.get(name, name): _plain(getattr(value, name)) for name in kept}
        case _:
            return value
