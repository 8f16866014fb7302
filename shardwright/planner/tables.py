"""Family and dialect tables: TOML, checked on reading, turned into frozen data.

1. The file is parsed and its keys are checked against a closed list; every expression is compiled by `expressions`.
2. ``extends`` merges a table over another: config fields and tensors by name, everything else replaced.
3. The results say what exists and how it is spelled; `passes.rows` applies them to a config and a layout.

A *family* lists hub tensors: name, shape over the config, when it exists, how it is split over ranks, on which pipeline
stage it lives, and how the family's own Hugging Face files spell it. A *dialect* lists rows: a stored tensor's name, the
hub tensors it is made of, the operations that make it, and its split. Boundary: no checkpoint, no shapes yet.
"""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import TableError, UnknownFamilyError, UsageError, short
from .expressions import Expression, parse
from .layout import SPLITS
from .operations import OPERATIONS
from .registry import Registry

__all__ = ["DIALECTS", "FAMILIES", "Alias", "ConfigRule", "Dialect", "Family", "HubTensor", "Ignore", "Row", "load_dialect", "load_family"]

STAGES = ("first", "last", "layer")
ALWAYS = parse("true")
_LARGEST = 1 << 20
_MOST_DOTS = 250
_DEEPEST = 16
_MOST_BASES = 8
_LONGEST_ARGUMENTS = 200
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,99}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ConfigRule:
    """One canonical field: the config.json key that holds it, what transformers assumes without it, or a fixed value."""

    name: str
    key: str | None
    default: Expression | None


@dataclass(frozen=True, slots=True)
class HubTensor:
    """A tensor of the model: canonical name, shape, condition, split kind, stage, Hugging Face spelling."""

    name: str
    shape: tuple[Expression, ...]
    when: Expression
    split: str
    stage: str
    stored: str


@dataclass(frozen=True, slots=True)
class Alias:
    """A hub name that is another hub tensor (tied weights)."""

    name: str
    of: str
    when: Expression


@dataclass(frozen=True, slots=True)
class Ignore:
    """Stored tensors that are left out and listed, and why."""

    pattern: str
    reason: str


@dataclass(frozen=True, slots=True)
class Family:
    """A model family."""

    name: str
    origin: str
    model_types: tuple[str, ...]
    architecture: str
    infer: Expression
    config: tuple[ConfigRule, ...]
    tensors: tuple[HubTensor, ...]
    aliases: tuple[Alias, ...]
    ignore: tuple[Ignore, ...]
    keep_dtype: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """A stored tensor of a dialect, as a layout of hub tensors; `names` by spec (one key, ``""``, without specs)."""

    names: Mapping[str, str]
    hub: tuple[str, ...]
    layout: tuple[tuple[str, tuple[Any, ...]], ...]
    split: str
    stage: str
    when: Expression


@dataclass(frozen=True, slots=True)
class Dialect:
    """A naming and fusing of stored tensors. ``rows=None``: one row per hub tensor, as its family spells it."""

    name: str
    origin: str
    numbering: str
    kv_heads: str
    pad_vocab: Expression | None
    specs: tuple[str, ...]
    rows: tuple[Row, ...] | None
    ignore: tuple[Ignore, ...]


FAMILIES: Registry[Family] = Registry("family", UnknownFamilyError)
DIALECTS: Registry[Dialect] = Registry("dialect", UsageError)

_FAMILY_KEYS = {"name", "extends", "model_types", "architecture", "infer", "config", "tensor", "alias", "ignore", "keep_dtype"}
_DIALECT_KEYS = {"name", "numbering", "kv_heads", "pad_vocab", "specs", "rows", "row", "ignore"}


def load_family(path: str | Path) -> Family:
    """Read a family table.

    Raises
    ------
    TableError
        Names the file, the entry and the offending text.
    """
    return _family(_read(path), str(path))


def load_dialect(path: str | Path) -> Dialect:
    """Read a dialect table; errors as `load_family`."""
    return _dialect(_read(path), str(path))


def _read(path: str | Path) -> dict[str, Any]:
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


def _family(table: dict[str, Any], origin: str) -> Family:
    _known_keys(table, _FAMILY_KEYS, origin, "the family")
    if base := table.get("extends"):
        table = _merged(_base_table(base, origin), table, origin)
    name = _text(table, "name", origin, "the family")
    tensors = tuple(_hub_tensor(entry, f"{origin} [[tensor]] {i + 1}") for i, entry in enumerate(_entries(table, "tensor", origin)))
    if not tensors:
        raise TableError("a family needs at least one [[tensor]]", file=origin)
    _unique([t.name for t in tensors], origin, "[[tensor]]")
    _unique([t.stored for t in tensors], origin, "[[tensor]] huggingface")
    known = {t.name for t in tensors}
    aliases = tuple(_alias(entry, f"{origin} [[alias]] {i + 1}", known) for i, entry in enumerate(_entries(table, "alias", origin)))
    rules = tuple(_config_rule(key, rule, f"{origin} [config] {key}") for key, rule in _config(table, origin).items())
    fields = {rule.name for rule in rules} | {"layer", "true", "false", "none"}
    for where, expression in [(t.name, e) for t in tensors for e in (*t.shape, t.when)] + [(a.name, a.when) for a in aliases]:
        if unknown := expression.names - fields:
            raise TableError(
                f"the field {min(unknown)!r} is not in [config]",
                file=f"{origin} {where}",
                actual=repr(expression.text),
                remedy=f"Known: {', '.join(sorted(fields - {'true', 'false', 'none'}))}",
            )
    return Family(
        name,
        origin,
        tuple(_texts(table, "model_types", origin)),
        _text(table, "architecture", origin, "the family"),
        parse(table.get("infer", "false"), f"{origin} infer"),
        rules,
        tensors,
        aliases,
        _ignores(table, origin),
        tuple(_texts(table, "keep_dtype", origin)),
    )


def _base_table(name: Any, origin: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise TableError("a family extends another by its name: letters, digits, - and _", file=origin, actual=short(name))
    if len(seen) > _MOST_BASES:
        raise TableError(f"a family extends more than {_MOST_BASES} others, one over the other", file=origin)
    for folder in (Path(origin).parent, resources.files(__package__) / "families"):
        path = Path(str(folder / f"{name}.toml"))
        if path.is_file():
            if str(path) in (*seen, origin):
                raise TableError("a family extends itself", file=origin, actual=short(name))
            base = _read(path)
            _known_keys(base, _FAMILY_KEYS, str(path), "the family")
            if parent := base.get("extends"):
                base = _merged(_base_table(parent, str(path), (*seen, origin)), base, str(path))
            return base
    raise TableError("the family it extends is not known", file=origin, actual=repr(name), remedy=f"Known: {', '.join(FAMILIES.names())}")


def _merged(base: dict[str, Any], over: dict[str, Any], origin: str) -> dict[str, Any]:
    """`over` on top of `base`: config fields and tensors by name, the rest replaced."""
    merged = {**base, **over, "config": {**_config(base, origin), **_config(over, origin)}}
    for kind in ("tensor", "alias", "ignore"):
        mine = _entries(over, kind, origin)
        names = {_text(entry, "name", f"{origin} [[{kind}]]", "it") for entry in mine if kind != "ignore"}
        merged[kind] = [entry for entry in _entries(base, kind, origin) if kind == "ignore" or entry.get("name") not in names] + mine
    return merged


def _hub_tensor(entry: dict[str, Any], where: str) -> HubTensor:
    _known_keys(entry, {"name", "shape", "when", "split", "stage", "huggingface"}, where, "a tensor")
    name = _text(entry, "name", where, "a tensor")
    if not isinstance(entry.get("shape"), list):
        raise TableError("a tensor needs a shape: a list of expressions", file=where, actual=short(entry.get("shape")))
    stage, stored = entry.get("stage", "layer" if "{layer}" in name else "first"), entry.get("huggingface", name)
    return HubTensor(
        name,
        tuple(parse(e, f"{where} shape") for e in entry["shape"]),
        parse(entry.get("when", "true"), f"{where} when"),
        _choice(entry.get("split", "none"), SPLITS, where, "split"),
        _stage(stage, [name, stored], where),
        stored,
    )


def _alias(entry: dict[str, Any], where: str, known: set[str]) -> Alias:
    _known_keys(entry, {"name", "of", "when"}, where, "an alias")
    target = _text(entry, "of", where, "an alias")
    if target not in known:
        raise TableError("an alias names a tensor that the family does not have", file=where, actual=repr(target))
    return Alias(_text(entry, "name", where, "an alias"), target, parse(entry.get("when", "true"), f"{where} when"))


def _config(table: Mapping[str, Any], origin: str) -> dict[str, Any]:
    config = table.get("config", {})
    if not isinstance(config, dict):
        raise TableError("[config] must be a table", file=origin, actual=short(config))
    return config


def _config_rule(name: str, rule: Any, where: str) -> ConfigRule:
    if (
        not isinstance(rule, dict)
        or not set(rule) <= {"key", "default", "value"}
        or ("value" in rule) == ("key" in rule)
        or not isinstance(rule.get("key", ""), str)
    ):
        raise TableError('a config field is { key = "…", default = "…" } or { value = "…" }', file=where, actual=short(rule))
    text = rule.get("value", rule.get("default"))
    return ConfigRule(name, rule.get("key"), None if text is None else parse(text, where))


def _dialect(table: dict[str, Any], origin: str) -> Dialect:
    _known_keys(table, _DIALECT_KEYS, origin, "the dialect")
    specs = tuple(_texts(table, "specs", origin))
    rows: tuple[Row, ...] | None = None
    if "rows" in table:
        _choice(table["rows"], ("family",), origin, "rows")
        if specs:
            raise TableError("a dialect that takes its rows from the family has no specs", file=origin, actual=short(list(specs)))
    else:
        rows = tuple(_row(entry, specs, f"{origin} [[row]] {i + 1}") for i, entry in enumerate(_entries(table, "row", origin)))
        for spec in specs or ("",):
            _unique([row.names[spec] for row in rows], origin, f"[[row]] {spec}")
    pad = table.get("pad_vocab")
    return Dialect(
        _text(table, "name", origin, "the dialect"),
        origin,
        _choice(table.get("numbering", "global"), ("global", "local"), origin, "numbering"),
        _choice(table.get("kv_heads", "cut"), ("cut", "replicate"), origin, "kv_heads"),
        None if pad is None else parse(pad, f"{origin} pad_vocab"),
        specs,
        rows,
        _ignores(table, origin),
    )


def _row(entry: dict[str, Any], specs: tuple[str, ...], where: str) -> Row:
    _known_keys(entry, {"name", "hub", "layout", "split", "stage", "when"}, where, "a row")
    name = entry.get("name")
    names = dict.fromkeys(specs or ("",), name) if isinstance(name, str) else name
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()) or set(names) != set(specs or ("",)):
        raise TableError("a row needs a name, or one per spec", file=where, expected=list(specs) or "a string", actual=short(name))
    hub = tuple(_texts(entry, "hub", where))
    if not hub:
        raise TableError("a row needs the hub tensors it is made of", file=where)
    layout = tuple(_operation(text, where) for text in _texts(entry, "layout", where))
    if len(hub) > 1 and not layout:
        raise TableError("a row of several hub tensors needs a layout that joins them", file=where, actual=list(hub))
    stage = entry.get("stage", "layer" if "{layer}" in hub[0] else "first")
    return Row(
        names,
        hub,
        layout,
        _choice(entry.get("split", "none"), SPLITS, where, "split"),
        _stage(stage, [*names.values(), *hub], where),
        parse(entry.get("when", "true"), f"{where} when"),
    )


def _operation(text: str, where: str) -> tuple[str, tuple[Any, ...]]:
    """``"pad(0, 128)"`` → ``("pad", (0, 128))``: a registered name with literal arguments."""
    name, bracket, inside = text.partition("(")
    if bracket and not inside.rstrip().endswith(")"):
        raise TableError("a bracket is not closed", file=where, actual=short(text))
    if len(inside) > _LONGEST_ARGUMENTS:
        raise TableError("the arguments of an operation are too long", file=where, actual=repr(text[:80]))
    try:
        arguments = ast.literal_eval(f"({inside.removesuffix(')')},)") if inside.strip(") ") else ()
    except (ValueError, SyntaxError, TypeError, RecursionError):
        raise TableError("the arguments of an operation must be literals", file=where, actual=short(text)) from None
    known = _choice(name.strip(), OPERATIONS, where, "operation")
    try:
        inspect.signature(OPERATIONS.get(known)).bind((), {}, *arguments)
    except TypeError as error:
        raise TableError(f"the operation does not take these arguments ({error})", file=where, actual=repr(text)) from None
    return known, tuple(arguments)


def _stage(value: Any, names: Sequence[Any], where: str) -> str:
    """A stage; what every layer has counts ``{layer}`` in each of its names, and nothing else does."""
    stage = _choice(value, STAGES, where, "stage")
    for name in names:
        if not isinstance(name, str) or not name:
            raise TableError("a name is a string", file=where, actual=short(name))
        if not name.count("{") == name.count("}") == name.count("{layer}"):
            raise TableError("a name can count only {layer}", file=where, actual=short(name))
        if ("{layer}" in name) != (stage == "layer"):
            raise TableError(
                "what every layer has needs {layer} in each of its names, and nothing else may have it", file=where, actual=repr(name)
            )
    return stage


def _choice(value: Any, known: Any, where: str, what: str) -> str:
    if not isinstance(value, str) or value not in known:
        names = known.names() if isinstance(known, Registry) else list(known)
        raise TableError(f"unknown {what}", file=where, actual=short(value), remedy=f"Known: {', '.join(names)}")
    return value


def _known_keys(table: Mapping[str, Any], known: set[str], where: str, what: str) -> None:
    if unknown := sorted(set(table) - known):
        raise TableError(f"{what} has no entry {unknown[0]!r}", file=where, remedy=f"Known: {', '.join(sorted(known))}")


def _text(table: Mapping[str, Any], key: str, where: str, what: str) -> str:
    value = table.get(key)
    if not isinstance(value, str) or not value:
        raise TableError(f"{what} needs {key!r}: a string", file=where, actual=short(value))
    return value


def _texts(table: Mapping[str, Any], key: str, where: str) -> list[str]:
    value = table.get(key, [])
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise TableError(f"{key!r} must be a list of strings", file=where, actual=short(value))
    return value


def _entries(table: Mapping[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    value = table.get(key, [])
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise TableError(f"[[{key}]] must be a list of tables", file=where)
    return value


def _ignores(table: Mapping[str, Any], origin: str) -> tuple[Ignore, ...]:
    entries = _entries(table, "ignore", origin)
    for entry in entries:
        _known_keys(entry, {"pattern", "reason"}, origin, "[[ignore]]")
    return tuple(Ignore(_text(e, "pattern", origin, "[[ignore]]"), _text(e, "reason", origin, "[[ignore]]")) for e in entries)


def _unique(names: Sequence[str], where: str, what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise TableError(f"{what} names one tensor twice", file=where, actual=short(name))
        seen.add(name)


def _builtin(folder: str, load: Callable[[str | Path], Any], registry: Registry[Any]) -> None:
    for entry in sorted((resources.files(__package__) / folder).iterdir(), key=lambda p: p.name):
        if entry.name.endswith(".toml"):
            part = load(Path(str(entry)))
            registry.add(part.name, part)


_builtin("families", load_family, FAMILIES)
_builtin("dialects", load_dialect, DIALECTS)
