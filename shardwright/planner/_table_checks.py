"""Checks of a whole family table: what no single entry can tell.

1. Fields and words have names of their own; a default looks at fields before it; what the splits count is among the fields.
2. Patterns and names of dialects that are misspelt would do nothing, and nobody would know: they must name something.

Boundary: parsed entries in, a `TableError` out that names file, entry and text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from ..errors import TableError
from ._toml import table_of, texts_of

if TYPE_CHECKING:
    from .tables import ConfigRule, HubTensor, Row

__all__ = ["check_family"]

_COUNTED = {
    "heads": {"num_attention_heads"}, "head_columns": {"num_attention_heads"}, "kv_heads": {"num_key_value_heads"},
    "qkv": {"num_attention_heads", "num_key_value_heads"}, "vocab": {"vocab_size"},
}  # fmt: skip
"""What splits count, among the config's fields."""


def check_family(
    table: Mapping[str, Any],
    rules: Sequence[ConfigRule],
    tensors: Sequence[HubTensor],
    rows: Sequence[Row],
    words: set[str],
    dialects: Sequence[str],
    origin: str,
) -> None:
    """Refuse a family that cannot be computed, or says what means nothing.

    Parameters
    ----------
    table
        The merged TOML.
    words
        What expressions know besides config fields.
    dialects
        Names that ``[refuse]`` may have; empty while the built-in families are read.

    Raises
    ------
    TableError
        Names the file, the entry and the offending text.
    """
    fields = _config(rules, words, origin)
    for word in table_of(table, "layer", origin):
        _own_name(word, words | fields, f"{origin} [layer] {word}")
    _splits(tensors, rows, fields, origin)
    _names(table, [tensor.name for tensor in tensors], dialects, origin)


def _config(rules: Sequence[ConfigRule], words: set[str], origin: str) -> set[str]:
    """The fields; each can be computed from those before it."""
    fields: set[str] = set()
    for rule in rules:
        _own_name(rule.name, words, f"{origin} [config] {rule.name}")
        if rule.default is not None and (unknown := rule.default.names - fields - {"true", "false", "none"}):
            raise TableError(
                f"a default looks at {min(unknown)!r}, which is no field before it",
                file=f"{origin} [config] {rule.name}",
                actual=repr(rule.default.text),
                remedy=f"Before it: {', '.join(sorted(fields))}",
            )
        fields.add(rule.name)
    if "num_hidden_layers" not in fields:
        raise TableError("a family needs the config field num_hidden_layers", file=f"{origin} [config]")
    return fields


def _own_name(name: str, taken: set[str], where: str) -> None:
    if name in taken:
        raise TableError(f"the name {name!r} means something else already", file=where, remedy="Call it otherwise")


def _splits(tensors: Sequence[HubTensor], rows: Sequence[Row], fields: set[str], origin: str) -> None:
    entries = [(f"[[tensor]] {t.name}", t.split) for t in tensors] + [(f"[[row]] {i + 1}", row.split) for i, row in enumerate(rows)]
    for entry, split in entries:
        if lacking := sorted(_COUNTED.get(split, set()) - fields):
            raise TableError(f"the split {split!r} needs the config field {lacking[0]}", file=f"{origin} {entry}")
    for tensor in tensors:
        if tensor.split in ("columns", "head_columns") and len(tensor.shape) < 2:
            raise TableError(
                f"the split {tensor.split!r} cuts a second axis",
                file=f"{origin} [[tensor]] {tensor.name}",
                expected="two extents",
                actual=[extent.text for extent in tensor.shape],
            )


def _names(table: Mapping[str, Any], tensors: Iterable[str], dialects: Sequence[str], origin: str) -> None:
    counted = [name.replace("{layer}", "0").replace("{expert}", "0") for name in tensors]
    for pattern in texts_of(table, "keep_dtype", origin):
        if not any(fnmatchcase(name, pattern) for name in counted):
            raise TableError("a pattern names no tensor of the family", file=f"{origin} keep_dtype", actual=repr(pattern))
    for name in table_of(table, "refuse", origin):
        if dialects and name not in dialects:
            raise TableError(f"there is no dialect {name!r}", file=f"{origin} [refuse]", remedy=f"Known: {', '.join(dialects)}")
