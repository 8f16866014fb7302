"""Family and dialect tables: TOML, checked on reading, turned into frozen data.

1. `_toml` parses the file and merges it over the tables that it ``extends``.
2. Keys are checked against a closed list; every expression is compiled by `expressions`.
3. The results say what exists and how it is spelled; `passes.rows` applies them to a config and a layout.

A *family* lists hub tensors: name, shape over the config, when it exists, how it is split over ranks, on which pipeline
stage it lives. Its own Hugging Face files hold each under the name that its entry gives, except where a ``[[row]]`` of the
family makes a stored tensor of them; ``spellings`` names the variants of those files, the default written first. A
*dialect* lists rows: a stored tensor's name, the hub tensors it is made of, the operations that make it, and its split;
``specs`` names its variants. A row has a name for every variant, or for some: in the others it does not exist.

Names count ``{layer}``, and ``{layer}`` with ``{expert}``. A row whose hub tensors count experts stores one tensor per
expert, or, where its own name does not count them, one for all that a rank holds: the operations before ``stack_experts``
make each expert's part. Copies of a row on several ranks are equal, and compared; ``copies = "average"`` says that the ranks
of some systems drift apart and that the mean is meant. Boundary: no checkpoint, no shapes yet.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import ConfigError, TableError, UnknownFamilyError, UsageError, short
from ._table_checks import check_family
from ._toml import FAMILY_KEYS, entries_of, extended, known_keys, listed, read, table_of, text_of, texts_of
from .expressions import Expression, parse
from .layout import SPLITS
from .operations import OPERATIONS
from .registry import Registry

__all__ = [
    "DIALECTS",
    "DIALECT_WORDS",
    "FAMILIES",
    "Alias",
    "ConfigRule",
    "Dialect",
    "Family",
    "HubTensor",
    "Ignore",
    "Refusal",
    "Row",
    "load_dialect",
    "load_family",
    "specs_of",
]

STAGES = ("first", "last", "layer")
ALWAYS = parse("true")
BASE_SPELLING = "base-model"
_FIELD = re.compile(r"\{(\w+)\}")
STACK = "stack_experts"
DIALECT_WORDS: Mapping[str, Any] = {"moe": False, "gated_mlp": True, "mla": False, "num_experts": 0, "tie_word_embeddings": False}
"""What a dialect may ask of every family, and the answer of a family that does not say."""
_SCOPE = {"family", "layer", "tp", "pp", "vpp", "ep", "etp", "padded_vocab_size", "true", "false", "none"}
_LONGEST_ARGUMENTS = 200
_MOST_SPECS = 32
_LARGEST_IN_PATTERN = 1 << 64


@dataclass(frozen=True, slots=True)
class ConfigRule:
    """One canonical field: the config.json key that holds it (and others that some versions write instead; dots lead into
    tables), what transformers assumes without it, what an explicit null means where that is something else, or a fixed value."""

    name: str
    key: str | None
    default: Expression | None
    other_keys: tuple[str, ...] = ()
    null: Expression | None = None


@dataclass(frozen=True, slots=True)
class HubTensor:
    """A tensor of the model: canonical name, shape, condition, split kind, stage, Hugging Face spelling; its dtype where that is
    not the model's."""

    name: str
    shape: tuple[Expression, ...]
    when: Expression
    split: str
    stage: str
    stored: str
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Alias:
    """A hub name that is another hub tensor (tied weights)."""

    name: str
    of: str
    when: Expression


@dataclass(frozen=True, slots=True)
class Ignore:
    """Stored tensors that are left out and listed, and why. A family's pattern may count on the config:
    ``model.layers.{num_hidden_layers}.*``."""

    pattern: str
    reason: str

    def of(self, fields: Mapping[str, Any]) -> Ignore:
        """The same with the config's numbers in place.

        Raises
        ------
        ConfigError
            A field that the pattern counts on is no whole number.
        """
        for name in _FIELD.findall(self.pattern):
            if not isinstance(fields[name], int) or not 0 <= fields[name] < _LARGEST_IN_PATTERN:
                raise ConfigError(
                    f"a pattern of tensors to leave out counts on {name}", expected="a whole number", actual=short(fields[name])
                )
        return replace(self, pattern=_FIELD.sub(lambda match: str(fields[match[1]]), self.pattern))


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a dialect cannot hold a family, or those of its models and layouts for which `when` holds."""

    reason: str
    when: Expression


@dataclass(frozen=True, slots=True)
class Family:
    """A model family.

    Attributes
    ----------
    spellings
        Variants of its Hugging Face files, the default written first; empty where there is one.
    rows
        Stored tensors of those files that are not one hub tensor under the name that its entry gives.
    layer_words
        Words whose value depends on ``layer``; ``moe`` says whether it has experts.
    refuse
        Dialect name → why it cannot hold this family, or which of its models in which layouts.
    base_prefix
        What files of the spelling `BASE_SPELLING` lack at the beginning of every name; empty where there is no such spelling.
    carries
        Quantisation methods whose tensors the table lists: they go from file to file as they are stored.
    """

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
    spellings: tuple[str, ...]
    rows: tuple[Row, ...]
    layer_words: tuple[tuple[str, Expression], ...]
    refuse: Mapping[str, tuple[Refusal, ...]]
    base_prefix: str = ""
    carries: tuple[str, ...] = ()

    def stored_name(self, tensor: HubTensor, spelling: str) -> str:
        """What the family's files call a hub tensor that no row of that spelling holds."""
        return tensor.stored.removeprefix(self.base_prefix) if spelling == BASE_SPELLING else tensor.stored


@dataclass(frozen=True, slots=True)
class Row:
    """A stored tensor as a layout of hub tensors; `names` by spec (one key, ``""``, without specs). `average`: its copies on
    several ranks may differ, and their mean is read."""

    names: Mapping[str, str]
    hub: tuple[str, ...]
    layout: tuple[tuple[str, tuple[Any, ...]], ...]
    split: str
    stage: str
    when: Expression
    average: bool = False

    @property
    def experts(self) -> str:
        """``""``, or how it holds what every expert has: ``"each"`` under a name of its own, or ``"stack"``."""
        if "{expert}" not in self.hub[0]:
            return ""
        return "stack" if self.layout and self.layout[-1][0] == STACK else "each"


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

_DTYPES = ("float32", "uint8")
_DIALECT_KEYS = {"name", "numbering", "kv_heads", "pad_vocab", "specs", "rows", "row", "ignore"}


def load_family(path: str | Path) -> Family:
    """Read a family table.

    Raises
    ------
    TableError
        Names the file, the entry and the offending text.
    """
    return _family(read(path), str(path))


def load_dialect(path: str | Path) -> Dialect:
    """Read a dialect table; errors as `load_family`."""
    return _dialect(read(path), str(path))


def specs_of(dialect: Dialect, family: Family) -> tuple[str, ...]:
    """The dialect's variants, the default first: its own, or the family's spellings; ``("",)`` where there is one."""
    return (family.spellings if dialect.rows is None else dialect.specs) or ("",)


def _family(table: dict[str, Any], origin: str) -> Family:
    known_keys(table, FAMILY_KEYS, origin, "the family")
    table = extended(table, origin)
    name = text_of(table, "name", origin, "the family")
    tensors = tuple(_hub_tensor(entry, f"{origin} [[tensor]] {i + 1}") for i, entry in enumerate(entries_of(table, "tensor", origin)))
    if not tensors:
        raise TableError("a family needs at least one [[tensor]]", file=origin)
    _unique([t.name for t in tensors], origin, "[[tensor]]")
    _unique([t.stored for t in tensors], origin, "[[tensor]] huggingface")
    known = {t.name for t in tensors}
    aliases = tuple(_alias(entry, f"{origin} [[alias]] {i + 1}", known) for i, entry in enumerate(entries_of(table, "alias", origin)))
    rules = tuple(_config_rule(key, rule, f"{origin} [config] {key}") for key, rule in table_of(table, "config", origin).items())
    words = tuple((key, parse(text, f"{origin} [layer] {key}")) for key, text in table_of(table, "layer", origin).items())
    spellings = _variants(table, "spellings", origin)
    rows = tuple(_row(entry, spellings, f"{origin} [[row]] {i + 1}") for i, entry in enumerate(entries_of(table, "row", origin)))
    prefix = text_of(table, "base_prefix", origin, "the family") if "base_prefix" in table else ""
    if prefix:
        spellings, rows = _with_base(spellings, rows, prefix, origin)
        _unique([t.stored.removeprefix(prefix) for t in tensors], origin, f"[[tensor]] {BASE_SPELLING}")
    for i, row in enumerate(rows):
        if unknown := set(row.hub) - known - {a.name for a in aliases}:
            raise TableError(
                "a row is made of a tensor that the family does not have", file=f"{origin} [[row]] {i + 1}", actual=short(min(unknown))
            )
    _unique_names(rows, spellings, origin)
    fields = {rule.name for rule in rules} | {"layer", "true", "false", "none"}
    if taken := {name for name, _ in words} & (fields | _SCOPE | {"num_experts"}):
        raise TableError("a word of [layer] has the name of something else", file=origin, actual=short(min(taken)))
    _fields_known([(f"[layer] {name}", e) for name, e in words], fields, origin)
    fields |= {name for name, _ in words}
    _fields_known([(t.name, e) for t in tensors for e in (*t.shape, t.when)] + [(a.name, a.when) for a in aliases], fields, origin)
    refuse = {name: _refusals(found, f"{origin} [refuse] {name}") for name, found in table_of(table, "refuse", origin).items()}
    _fields_known(
        [(f"[refuse] {name}", r.when) for name, found in refuse.items() for r in found],
        fields - {"layer"} - {name for name, _ in words} | _SCOPE - {"layer"} | set(DIALECT_WORDS),
        origin,
    )
    _fields_known([(f"[[row]] {i + 1}", row.when) for i, row in enumerate(rows)], fields | _SCOPE | set(DIALECT_WORDS), origin)
    ignore = _ignores(table, origin)
    if unknown := {name for i in ignore for name in _FIELD.findall(i.pattern)} - {rule.name for rule in rules}:
        raise TableError("a pattern counts on a field that is not in [config]", file=f"{origin} [[ignore]]", actual=short(min(unknown)))
    if any("{expert}" in t.name for t in tensors) and "num_experts" not in fields:
        raise TableError("tensors of experts need the config field num_experts", file=origin)
    check_family(table, rules, tensors, rows, _SCOPE, DIALECTS.names(), origin)
    return Family(
        name,
        origin,
        tuple(texts_of(table, "model_types", origin)),
        text_of(table, "architecture", origin, "the family"),
        parse(table.get("infer", "false"), f"{origin} infer"),
        rules,
        tensors,
        aliases,
        ignore,
        tuple(texts_of(table, "keep_dtype", origin)),
        spellings,
        rows,
        words,
        refuse,
        prefix,
        tuple(texts_of(table, "carries", origin)),
    )


def _with_base(spellings: tuple[str, ...], rows: tuple[Row, ...], prefix: str, origin: str) -> tuple[tuple[str, ...], tuple[Row, ...]]:
    """The spellings and rows, and those of files saved from the model without its head, which lack the prefix."""
    if "{" in prefix or not prefix.endswith(".") or BASE_SPELLING in spellings:
        raise TableError(
            f"base_prefix is what names begin with, up to a dot, and makes the spelling {BASE_SPELLING}", file=origin, actual=short(prefix)
        )
    known = spellings or ("causal-lm",)
    named = []
    for row in rows:
        names = dict(row.names) if spellings else {known[0]: row.names[""]}
        if known[0] in names:
            names[BASE_SPELLING] = names[known[0]].removeprefix(prefix)
        named.append(replace(row, names=names))
    return (*known, BASE_SPELLING), tuple(named)


def _refusals(found: Any, where: str) -> tuple[Refusal, ...]:
    entries = [{"reason": found}] if isinstance(found, str) else listed(found)
    refusals = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise TableError('a refusal is "why", or { when = "…", reason = "…" }, or several of these', file=where, actual=short(entry))
        known_keys(entry, {"when", "reason"}, where, "a refusal")
        refusals.append(Refusal(text_of(entry, "reason", where, "a refusal"), parse(entry.get("when", "true"), f"{where} when")))
    return tuple(refusals)


def _fields_known(expressions: Sequence[tuple[str, Expression]], fields: set[str], origin: str) -> None:
    for where, expression in expressions:
        if unknown := expression.names - fields:
            raise TableError(
                f"the field {min(unknown)!r} is not in [config]",
                file=f"{origin} {where}",
                actual=repr(expression.text),
                remedy=f"Known: {', '.join(sorted(fields - {'true', 'false', 'none'}))}",
            )


def _hub_tensor(entry: dict[str, Any], where: str) -> HubTensor:
    known_keys(entry, {"name", "shape", "when", "split", "stage", "huggingface", "dtype"}, where, "a tensor")
    name = text_of(entry, "name", where, "a tensor")
    if not isinstance(entry.get("shape"), list):
        raise TableError("a tensor needs a shape: a list of expressions", file=where, actual=short(entry.get("shape")))
    stage, stored = entry.get("stage", "layer" if "{layer}" in name else "first"), entry.get("huggingface", name)
    return HubTensor(
        name,
        tuple(parse(e, f"{where} shape") for e in entry["shape"]),
        parse(entry.get("when", "true"), f"{where} when"),
        _choice(entry.get("split", "none"), SPLITS, where, "split"),
        _stage(stage, [name, stored], "{expert}" in name, where),
        stored,
        _choice(entry["dtype"], _DTYPES, where, "dtype") if "dtype" in entry else None,
    )


def _alias(entry: dict[str, Any], where: str, known: set[str]) -> Alias:
    known_keys(entry, {"name", "of", "when"}, where, "an alias")
    target = text_of(entry, "of", where, "an alias")
    if target not in known:
        raise TableError("an alias names a tensor that the family does not have", file=where, actual=repr(target))
    return Alias(text_of(entry, "name", where, "an alias"), target, parse(entry.get("when", "true"), f"{where} when"))


def _config_rule(name: str, rule: Any, where: str) -> ConfigRule:
    if (
        not isinstance(rule, dict)
        or not set(rule) <= {"key", "default", "null", "value"}
        or {"null", "value"} <= set(rule)
        or ("value" in rule) == ("key" in rule)
        or not all(isinstance(key, str) for key in listed(rule.get("key", "")) or [None])
    ):
        raise TableError('a config field is { key = "…", default = "…", null = "…" } or { value = "…" }', file=where, actual=short(rule))
    text, keys = rule.get("value", rule.get("default")), listed(rule.get("key", []))
    default, null = (None if part is None else parse(part, where) for part in (text, rule.get("null")))
    return ConfigRule(name, keys[0] if keys else None, default, tuple(keys[1:]), null)


def _dialect(table: dict[str, Any], origin: str) -> Dialect:
    known_keys(table, _DIALECT_KEYS, origin, "the dialect")
    specs = _variants(table, "specs", origin)
    rows: tuple[Row, ...] | None = None
    if "rows" in table:
        _choice(table["rows"], ("family",), origin, "rows")
        if specs:
            raise TableError("a dialect that takes its rows from the family has no specs", file=origin, actual=short(list(specs)))
    else:
        rows = tuple(_row(entry, specs, f"{origin} [[row]] {i + 1}") for i, entry in enumerate(entries_of(table, "row", origin)))
        _unique_names(rows, specs, origin)
    pad = table.get("pad_vocab")
    return Dialect(
        text_of(table, "name", origin, "the dialect"),
        origin,
        _choice(table.get("numbering", "global"), ("global", "local"), origin, "numbering"),
        _choice(table.get("kv_heads", "cut"), ("cut", "replicate"), origin, "kv_heads"),
        None if pad is None else parse(pad, f"{origin} pad_vocab"),
        specs,
        rows,
        _ignores(table, origin),
    )


def _variants(table: dict[str, Any], key: str, origin: str) -> tuple[str, ...]:
    found = tuple(texts_of(table, key, origin))
    if len(found) > _MOST_SPECS:
        raise TableError(f"{key} names more than {_MOST_SPECS} variants", file=origin, actual=len(found))
    return found


def _row(entry: dict[str, Any], specs: tuple[str, ...], where: str) -> Row:
    known_keys(entry, {"name", "hub", "layout", "split", "stage", "when", "copies"}, where, "a row")
    names = _names_of(entry.get("name"), specs or ("",), where)
    hub = tuple(texts_of(entry, "hub", where))
    if not hub:
        raise TableError("a row needs the hub tensors it is made of", file=where)
    layout = tuple(_operation(text, where) for text in texts_of(entry, "layout", where))
    if len(hub) > 1 and not layout:
        raise TableError("a row of several hub tensors needs a layout that joins them", file=where, actual=short(list(hub)))
    stage = entry.get("stage", "layer" if "{layer}" in hub[0] else "first")
    _stacked(layout, list(names.values()), hub, where)
    average = _choice(entry.get("copies", "equal"), ("equal", "average"), where, "kind of copies") == "average"
    if average and (len(hub) > 1 or layout):
        raise TableError("copies are averaged of a row that is one hub tensor as it is", file=where, actual=short(list(hub)))
    return Row(
        names,
        hub,
        layout,
        _choice(entry.get("split", "none"), SPLITS, where, "split"),
        _stage(stage, [*names.values(), *hub], None, where),
        parse(entry.get("when", "true"), f"{where} when"),
        average,
    )


def _names_of(name: Any, specs: Sequence[str], where: str) -> dict[str, str]:
    """A row's name in each spec: one for all of them, or a table of names by spec, where ``"te*"`` is all specs of that pattern."""
    given: Any = {"*": name} if isinstance(name, str) else name
    if not isinstance(given, dict) or not given or not all(isinstance(n, str) for n in given.values()):
        raise TableError("a row needs a name, or one per spec", file=where, expected=list(specs), actual=short(name))
    names: dict[str, str] = {}
    for pattern, text in given.items():
        found = [spec for spec in specs if fnmatchcase(spec, pattern)]
        if not found or any(spec in names for spec in found):
            what = "names a spec twice" if found else "needs a name, or one per spec"
            raise TableError(f"a row {what}", file=where, expected=list(specs), actual=short(pattern))
        for spec in found:
            names[spec] = text
    return {spec: names[spec] for spec in specs if spec in names}


def _stacked(layout: Sequence[tuple[str, Any]], names: Sequence[str], hub: Sequence[str], where: str) -> None:
    """Hub tensors that count experts are stored under names that do, or stacked by the last operation."""
    counted = {"{expert}" in name for name in hub}
    if len(counted) > 1:
        raise TableError("a row joins what every expert has with what no expert has", file=where, actual=short(list(hub)))
    stacks = [name for name, _ in layout].count(STACK)
    if stacks and (stacks > 1 or layout[-1][0] != STACK or counted != {True}):
        raise TableError(f"{STACK} is the last operation of a row of experts", file=where, actual=short([name for name, _ in layout]))
    for name in names:
        if ("{expert}" in name) != (counted == {True} and not stacks):
            raise TableError(
                "a row of experts counts {expert} in its name or ends in stack_experts, and no other row does",
                file=where,
                actual=short(name),
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


def _stage(value: Any, names: Sequence[Any], expert: bool | None, where: str) -> str:
    """A stage; what every layer has counts ``{layer}`` in each of its names, and nothing else does.

    ``{expert}`` stands in all names or in none as `expert` says; None leaves that to the caller.
    """
    stage = _choice(value, STAGES, where, "stage")
    for name in names:
        if not isinstance(name, str) or not name:
            raise TableError("a name is a string", file=where, actual=short(name))
        counters = name.count("{layer}"), name.count("{expert}")
        if not name.count("{") == name.count("}") == sum(counters):
            raise TableError("a name can count only {layer} and {expert}", file=where, actual=short(name))
        if counters[1] and not counters[0]:
            raise TableError("a name that counts {expert} counts {layer} too", file=where, actual=short(name))
        if expert is not None and bool(counters[1]) != expert:
            raise TableError(
                "what every expert has needs {expert} in each of its names, and nothing else may have it", file=where, actual=short(name)
            )
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


def _ignores(table: Mapping[str, Any], origin: str) -> tuple[Ignore, ...]:
    entries = entries_of(table, "ignore", origin)
    for entry in entries:
        known_keys(entry, {"pattern", "reason"}, origin, "[[ignore]]")
    return tuple(Ignore(text_of(e, "pattern", origin, "[[ignore]]"), text_of(e, "reason", origin, "[[ignore]]")) for e in entries)


def _unique_names(rows: Sequence[Row], specs: Sequence[str], origin: str) -> None:
    """One name, one row, but for rows whose conditions differ: those of dense layers and of layers with experts."""
    for spec in specs or ("",):
        named = [row for row in rows if spec in row.names]
        always = {row.names[spec] for row in named if row.when.text == ALWAYS.text}
        _unique([row.names[spec] for row in named if row.names[spec] in always], origin, f"[[row]] {spec}")
        _unique([f"{row.names[spec]} when {row.when.text}" for row in named], origin, f"[[row]] {spec}")


def _unique(names: Sequence[str], where: str, what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise TableError(f"{what} names one tensor twice", file=where, actual=short(name))
        seen.add(name)


def _builtin(folder: str, load: Callable[[str | Path], Any], registry: Registry[Any]) -> None:
    for entry in sorted((resources.files(__package__) / folder).iterdir(), key=lambda p: p.name):
        if entry.name.endswith(".toml") and not entry.name.startswith("_"):  # those are parts of tables, for `extends`
            part = load(Path(str(entry)))
            registry.add(part.name, part)


_builtin("families", load_family, FAMILIES)
_builtin("dialects", load_dialect, DIALECTS)
