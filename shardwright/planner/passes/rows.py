"""From tables to rows: which stored tensors a dialect has for one model at one layout, and what each is made of.

1. Hub tensors: every tensor of the family whose condition holds, with its shape, per layer, and per expert where its name
   counts them (expert by expert).
2. Layers are sorted into kinds: layers for which every condition and shape that looks at the layer gives the same. For the
   first layer of each kind, each row of the dialect (or of the family, and each hub tensor that none of those holds, for a
   dialect that spells as its family does) is decided: its condition, its hub tensors, its `RowClass`, which is lowered once:
   the operations applied to leaves, the split, the shards. The other layers, and all experts, only get their names.
3. Experts are dealt to expert-parallel ranks in order. A row of theirs is lowered for one expert, or for the stack that one
   rank holds, with etp in the place of tp.
4. Every hub tensor must lie in exactly one row that is no alias; otherwise the dialect cannot hold the family.

Boundary: pure; knows no file.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

from ...errors import CheckpointError, ConfigError, LayoutError, Refusal, TableError, UnsupportedError, UsageError, short
from ..config import ModelConfig, layer_scope
from ..expressions import Expression, parse
from ..layout import SPLITS, Layout, Place, Split
from ..operations import OPERATIONS
from ..tables import ALWAYS, DIALECT_WORDS, Dialect, Family, HubTensor, Row
from ..tensor.lazy import LazyTensor, leaf

__all__ = ["Expansion", "RowClass", "RowInstance", "apply_split", "expand", "hub_tensors", "scope"]

Shape = tuple[int, ...]
Kind = tuple[object, ...]
_SEVERAL_STAGES = parse("pp > 1")
_MOST_ELEMENTS = 1 << 56
"""Sizes and offsets in bits stay far below 63 bits."""


@dataclass(frozen=True, slots=True)
class RowClass:
    """All stored tensors of one row with the same shapes.

    Attributes
    ----------
    label
        The stored name with its counters open.
    hub
        Hub names with their counters open; aliases resolved. In a stack, those of one rank's experts, counted from 0.
    shapes
        Of the hub tensors.
    whole
        The stored tensor before rank cuts, over hub slots.
    split
        Its partition over the ranks that hold it.
    shards
        One lazy tensor per part, over hub slots.
    build
        The row's operations: hub tensors in, the whole stored tensor out. `whole` is `build` of leaves.
    alias
        Whether it repeats a hub tensor that another row holds.
    average
        Whether its copies on several ranks may differ, and their mean is read.
    """

    label: str
    hub: tuple[str, ...]
    shapes: tuple[Shape, ...]
    whole: LazyTensor
    split: Split
    shards: tuple[LazyTensor, ...]
    build: Callable[[Sequence[LazyTensor]], LazyTensor]
    alias: bool
    average: bool = False


class RowInstance(NamedTuple):
    """One stored tensor (of every rank that holds it): its class, key, hub names, pipeline stage, expert-parallel rank (None:
    all of them hold it), and virtual chunk."""

    row: int
    name: str
    hub: tuple[str, ...]
    pp: int
    ep: int | None
    chunk: int


@dataclass(frozen=True, slots=True)
class Expansion:
    """Everything a dialect stores for one model at one layout, in file order."""

    classes: tuple[RowClass, ...]
    instances: tuple[RowInstance, ...]


def scope(config: ModelConfig, layout: Layout, padded_vocab: int | None) -> dict[str, Any]:
    """What expressions and operations may see: config fields, parallel sizes, the padded vocabulary, the family's name."""
    vocab = padded_vocab if padded_vocab is not None else config.fields.get("vocab_size")
    sizes = {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "ep": layout.ep, "etp": layout.expert_tp}
    return {**DIALECT_WORDS, **config.fields, "family": config.family, **sizes, "padded_vocab_size": vocab}


def hub_tensors(family: Family, config: ModelConfig, *, most: int | None = None) -> dict[str, Shape]:
    """Every hub tensor of the model: name → shape, in the family's order (first, layers, last).

    Raises
    ------
    CheckpointError
        They are more than `most`, if that is given: what a checkpoint can hold.
    """
    found: dict[str, Shape] = {}
    layers, experts = config["num_hidden_layers"], range(config.fields.get("num_experts", 0))
    for stage in ("first", "layer", "last"):
        looks = _looks(family, [e for t in family.tensors if t.stage == stage for e in (t.when, *t.shape)]) if stage == "layer" else []
        alike: dict[Kind, dict[str, Shape]] = {}
        for layer in range(layers) if stage == "layer" else (-1,):
            kind = _kind_of(family, config.fields, looks, layer)
            if kind not in alike:
                alike[kind] = _shapes(family, stage, layer_scope(family, config.fields, layer) if stage == "layer" else config.fields)
            shapes, number = alike[kind], str(layer)
            for expert, open_name in _in_order(shapes, experts):
                name = open_name.replace("{layer}", number).replace("{expert}", str(expert))
                if name in found:
                    raise TableError("two tensors of a family have one name", file=family.origin, tensor=name)
                found[name] = shapes[open_name]
            if most is not None and len(found) > most:
                raise CheckpointError(
                    "the config has more tensors than the checkpoint",
                    expected=f"{layers} layers, {len(experts)} experts",
                    actual=f"room for {most} tensors",
                    remedy="Copy the checkpoint again, or give the config.json that belongs to it (--config)",
                )
    return found


def _looks(family: Family, expressions: Iterable[Expression]) -> list[Expression]:
    """What must be equal for two layers to be alike: the expressions that look at ``layer``, and the words that others use."""
    distinct = {e.text: e for e in expressions}.values()
    used = frozenset[str]().union(*(e.names for e in distinct))
    return [e for e in distinct if "layer" in e.names] + [parse(name) for name, _ in family.layer_words if name in used]


def _kind_of(family: Family, fields: Mapping[str, Any], looks: Sequence[Expression], layer: int) -> Kind:
    """Equal for layers that are alike in all of `looks`."""
    if not looks:
        return ()
    found = layer_scope(family, fields, layer)
    kind = tuple([expression(found) for expression in looks])
    for expression, value in zip(looks, kind, strict=True):
        if isinstance(value, list | tuple | Mapping):
            raise TableError(
                "what depends on the layer is a number, true or false, or a string",
                file=family.origin,
                actual=f"{expression.text}: {short(value)}",
            )
    return kind


def _shapes(family: Family, stage: str, fields: Mapping[str, Any]) -> dict[str, Shape]:
    """Open names and shapes of the tensors that exist in one layer, or on the first or last stage."""
    tensors = [t for t in family.tensors if t.stage == stage and (fields.get("num_experts", 0) or not _counts_experts(t.name))]
    return {t.name: _shape(t.shape, fields, t.name) for t in tensors if t.when(fields)}


def _in_order(names: Iterable[str], experts: Sequence[int]) -> Iterator[tuple[int, str]]:
    """(expert, open name): neighbours that count experts are gone through expert by expert; the others have expert -1."""
    for counted, group in groupby(names, _counts_experts):
        members = list(group)
        for expert in experts if counted else (-1,):
            for name in members:
                yield expert, name


def _counts_experts(name: str) -> bool:
    return "{expert}" in name


def _shape(extents: tuple[Expression, ...], fields: Mapping[str, Any], name: str) -> Shape:
    shape = tuple(extent(fields) for extent in extents)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape) or prod(shape) > _MOST_ELEMENTS:
        raise ConfigError("the config gives a tensor an impossible shape", tensor=name, actual=short(shape))
    return shape


def expand(
    family: Family,
    config: ModelConfig,
    dialect: Dialect,
    spec: str,
    layout: Layout,
    padded_vocab: int | None,
    *,
    hub: Mapping[str, Shape] | None = None,
    reading: bool = False,
) -> Expansion:
    """Lower the dialect's rows for this model and layout.

    `hub` is what `hub_tensors` gives, where it is at hand. With `reading`, rows of aliases are included whatever their
    condition: files may hold them, and then they are compared.

    Raises
    ------
    LayoutError
        Heads, rows, experts or layers do not divide; with `reading`, those of the source.
    UnsupportedError
        The dialect has no row for a hub tensor of the family, or the family's table refuses it.
    """
    fields = scope(config, layout, padded_vocab)
    if refusal := next((r for r in family.refuse.get(dialect.name, ()) if r.when(fields)), None):
        what = f"family {family.name!r}" if refusal.when == ALWAYS else f"a model of family {family.name!r} where {refusal.when.text}"
        raise UnsupportedError(f"dialect {dialect.name!r} cannot hold {what}: {refusal.reason}")
    experts = config.fields.get("num_experts", 0)
    if layout.ep > 1 and (not experts or experts % layout.ep):
        raise LayoutError(
            f"ep {layout.ep} does not divide the experts" if experts else "ep needs experts, and this model has none",
            expected=f"a divisor of {experts}" if experts else "ep 1",
            actual=f"ep {layout.ep}",
        )
    found = hub_tensors(family, config) if hub is None else hub
    return _Expander(family, config, dialect, spec, layout, padded_vocab, found, reading).run()


class _Decision(NamedTuple):
    """A row in the layers of one kind: its number, its class, the stored name (open), and its hub tensors as positions among
    the layer's open names; for an alias, the hub name itself."""

    row: int
    cls: int
    stored: str
    members: tuple[int, ...]
    experts: str
    alias: str | None


class _Kind(NamedTuple):
    """What layers of one kind hold: each open name's first position among the layer's hub tensors and the step from expert to
    expert, the number of those tensors, and the rows."""

    at: tuple[int, ...]
    step: tuple[int, ...]
    width: int
    decisions: tuple[_Decision, ...]


class _Expander:
    """The state of one expansion."""

    def __init__(
        self,
        family: Family,
        config: ModelConfig,
        dialect: Dialect,
        spec: str,
        layout: Layout,
        padded_vocab: int | None,
        hub: Mapping[str, Shape],
        reading: bool,
    ) -> None:
        self.family, self.dialect, self.spec, self.layout, self.reading = family, dialect, spec, layout, reading
        self.origin = family.origin if dialect.rows is None else dialect.origin
        self.fields = scope(config, layout, padded_vocab)
        self.hub = hub
        self.experts: int = self.fields["num_experts"]
        self.places = layout.places(config["num_hidden_layers"])
        self.aliases = {a.name: a.of for a in family.aliases if a.when(config.fields)}
        self.classes: list[RowClass] = []
        self.instances: list[RowInstance] = []
        self.known: dict[tuple[int, tuple[Shape, ...], bool], int] = {}
        self.rows, self.fallback = self._rows()

    def run(self) -> Expansion:
        self._ends("first", Place(0, 0, 0))
        self._layers()
        self._ends("last", Place(self.layout.pp - 1, self.layout.vpp - 1, 0))
        return Expansion(tuple(self.classes), tuple(self.instances))

    def _rows(self) -> tuple[list[Row], int]:
        """All rows of the spec, and the number from which on they only hold what no row before holds."""
        if self.dialect.rows is not None:
            rows = [row for row in self.dialect.rows if self.spec in row.names]
            return rows, len(rows)
        own = [row for row in self.family.rows if self.spec in row.names]
        return own + _plain_rows(self.family, self.aliases, self.spec), len(own)

    def _ends(self, stage: str, place: Place) -> None:
        """Rows outside the layers."""
        for decision in self._decide(stage, self.fields, [t.name for t in self.family.tensors if t.stage == stage], self.hub, ""):
            names = self.classes[decision.cls].hub
            self.instances.append(RowInstance(decision.cls, decision.stored, names, place.pp, None, self._chunk(place)))

    def _chunk(self, place: Place) -> int:
        """Global numbers need no chunks to tell layers apart."""
        return place.chunk if self.dialect.numbering == "local" else 0

    def _layers(self) -> None:
        kinds: dict[Kind, _Kind] = {}
        hub = list(self.hub)
        begin = sum(t.name in self.hub for t in self.family.tensors if t.stage == "first")
        looks = None if self._aliases_in_layers() else _looks(self.family, self._conditions())
        for layer, place in enumerate(self.places):
            key = (layer,) if looks is None else _kind_of(self.family, self.fields, looks, layer)
            kind = kinds.get(key)
            if kind is None:
                kind = kinds[key] = self._kind(layer_scope(self.family, self.fields, layer), str(layer))
            self._emit(kind, hub[begin : begin + kind.width], layer, place)
            begin += kind.width

    def _aliases_in_layers(self) -> bool:
        """Whether an alias may name a tensor of a layer: then every layer is its own kind."""
        names = sorted(self.aliases)
        heads = {name.partition("{layer}")[0] for row in self.rows if row.stage == "layer" for name in row.hub}
        return any(names[at].startswith(head) for head in heads if (at := bisect_left(names, head)) < len(names))

    def _conditions(self) -> Iterator[Expression]:
        """What decides which rows a layer has, and their shapes."""
        for tensor in self.family.tensors:
            if tensor.stage == "layer":
                yield from (tensor.when, *tensor.shape)
        yield from (row.when for row in self.rows if row.stage == "layer")

    def _kind(self, fields: Mapping[str, Any], layer: str) -> _Kind:
        shapes = _shapes(self.family, "layer", fields)
        first: dict[str, int] = {}
        width = 0
        for expert, name in _in_order(shapes, range(self.experts)):
            if expert in (-1, 0):
                first[name] = width
            width += 1
        names = list(first)
        steps: list[int] = []
        for _, group in groupby(names, _counts_experts):
            block = len(list(group))
            steps += [block] * block
        decisions = self._decide("layer", fields, names, shapes, layer)
        return _Kind(tuple(first.values()), tuple(steps), width, tuple(decisions))

    def _decide(
        self, stage: str, fields: Mapping[str, Any], names: Sequence[str], shapes: Mapping[str, Shape], layer: str
    ) -> list[_Decision]:
        """The rows of one layer, or of an end; every hub tensor among `names` is held once."""
        present = {name: at for at, name in enumerate(name for name in names if name in shapes)}
        held: set[str] = set()
        found = []
        for index, row in enumerate(self.rows):
            if row.stage != stage or (index >= self.fallback and row.hub[0] in held):
                continue
            alias = self._alias(row, layer)
            absent = [name for name in row.hub if name not in shapes] if alias is None else []
            if len(absent) == len(row.hub) or (alias is not None and alias not in self.hub):
                continue
            if not (alias is not None and self.reading) and row.when is not ALWAYS and not row.when(fields):
                continue
            if absent:
                raise UnsupportedError(
                    f"a row of dialect {self.dialect.name!r} joins tensors that family {self.family.name!r} has only in part",
                    tensor=_numbered(absent[0], layer),
                    expected=[_numbered(name, layer) for name in row.hub],
                )
            if alias is None and (twice := next((name for name in row.hub if name in held), None)):
                raise TableError("two rows hold the same hub tensor", file=self.origin, tensor=_numbered(twice, layer))
            held.update(row.hub if alias is None else ())
            hub = row.hub if alias is None else (alias,)
            cls = self._class(index, row, hub, tuple([self.hub[alias] if alias else shapes[name] for name in hub]), alias is not None)
            members = () if alias is not None or stage != "layer" else tuple([present[name] for name in row.hub])
            found.append(_Decision(index, cls, row.names[self.spec], members, row.experts, alias))
        for name in present:
            if name not in held:
                raise UnsupportedError(
                    f"dialect {self.dialect.name!r} has no row for this tensor of family {self.family.name!r}",
                    tensor=_numbered(name, layer),
                )
        # Rows that hold what is left stand where their tensors do.
        order = {name: i for i, name in enumerate(names)}
        if self.fallback < len(self.rows):
            found.sort(key=lambda d: order.get(self.rows[d.row].hub[0], len(order)))
        return found

    def _alias(self, row: Row, layer: str) -> str | None:
        """The hub tensor that the row's own is another name of."""
        return self.aliases.get(row.hub[0].replace("{layer}", layer)) if len(row.hub) == 1 else None

    def _emit(self, kind: _Kind, own: Sequence[str], layer: int, place: Place) -> None:
        """The stored tensors of one layer; `own` are its hub tensors in order."""
        local = self.dialect.numbering == "local"
        number, chunk = (str(place.local), place.chunk) if local else (str(layer), 0)
        per = self.experts // self.layout.ep
        add = self.instances.append
        for _, cls, stored, members, experts, alias in kind.decisions:
            at = [(kind.at[i], kind.step[i]) for i in members]
            name = stored.replace("{layer}", number)
            if alias is not None:
                add(RowInstance(cls, name, (alias,), place.pp, None, chunk))
            elif not experts:
                names = tuple([own[i] for i, _ in at])
                # A tensor that is stored under its hub name shares the hub's string: a plan has many, and looks them up often.
                add(RowInstance(cls, names[0] if name == names[0] else name, names, place.pp, None, chunk))
            elif experts == "stack":
                for ep in range(self.layout.ep):
                    names = tuple([own[i + n * e] for e in range(ep * per, (ep + 1) * per) for i, n in at])
                    add(RowInstance(cls, name, names, place.pp, ep, chunk))
            else:
                head, _, tail = name.partition("{expert}")
                for expert in range(self.experts):
                    ep, inside = divmod(expert, per)
                    names = tuple([own[i + n * expert] for i, n in at])
                    numbered = f"{head}{inside if local else expert}{tail}"
                    add(RowInstance(cls, names[0] if numbered == names[0] else numbered, names, place.pp, ep, chunk))

    def _class(self, index: int, row: Row, hub: tuple[str, ...], shapes: tuple[Shape, ...], alias: bool) -> int:
        key = (index, shapes, alias)
        if key not in self.known:
            self.known[key] = len(self.classes)
            tp = self.layout.expert_tp if row.experts else self.layout.tp
            build = partial(_compose, row, {**self.fields, "tp": tp})
            stacked = row.experts == "stack"
            if stacked:
                count = self.experts // self.layout.ep
                hub = tuple([name.replace("{expert}", str(e)) for e in range(count) for name in hub])
                shapes = shapes * count
            with self._explained(index, row, hub, shapes):
                whole = build([leaf(slot, shape) for slot, shape in enumerate(shapes)])
                split = SPLITS[row.split](whole.shape[stacked:], tp, self.fields, self.dialect.kv_heads)
            if stacked and split.axis is not None:
                split = replace(split, axis=split.axis + 1)
            split = replace(split, cycles=self.layout.tp // tp if row.experts else self.layout.ep)
            shards = tuple(apply_split(whole, split))
            self.classes.append(RowClass(row.names[self.spec], hub, shapes, whole, split, shards, build, alias, row.average))
        return self.known[key]

    @contextmanager
    def _explained(self, index: int, row: Row, hub: Sequence[str], shapes: Sequence[Shape]) -> Iterator[None]:
        """An operation or split that these tensors do not allow is the table's mistake: say where and what."""
        try:
            yield
        except Refusal as error:  # the layout's or the config's mistake, explained already
            if self.reading and isinstance(error, LayoutError):  # what helps a target does not help what is there
                error.message += " of the source, as its config has it"
                error.remedy = "Give the config.json that belongs to the checkpoint (--config, --vocab-size), or copy the checkpoint again"
            raise
        except (UsageError, ValueError, TypeError, LookupError, ArithmeticError) as error:
            entry = f"[[{'row' if index < self.fallback else 'tensor'}]] {row.names[self.spec]}"
            raise TableError(
                f"the layout or split does not fit these tensors ({error})",
                file=f"{self.origin} {entry}",
                tensor=hub[0],
                expected=f"tensors for {' then '.join(name for name, _ in row.layout) or 'no operation'}, split {row.split!r}",
                actual=[*shapes[:3], "…"] if len(shapes) > 3 else list(shapes),
            ) from None


def _numbered(name: str, layer: str) -> str:
    """An open name of one layer, for messages."""
    return name.replace("{layer}", layer).replace("{expert}", "0")


def _compose(row: Row, fields: Mapping[str, Any], parts: Sequence[LazyTensor]) -> LazyTensor:
    """The row's operations, applied to its hub tensors; in a stack, to those of each expert and then to all."""
    operations = row.layout
    if row.experts == "stack":
        (join, arguments), operations = operations[-1], operations[:-1]
        each = [_apply(operations, fields, parts[at : at + len(row.hub)]) for at in range(0, len(parts), len(row.hub))]
        return OPERATIONS.get(join)(each, fields, *arguments)
    return _apply(operations, fields, parts)


def _apply(operations: Sequence[tuple[str, tuple[Any, ...]]], fields: Mapping[str, Any], parts: Sequence[LazyTensor]) -> LazyTensor:
    for name, arguments in operations:
        parts = [OPERATIONS.get(name)(parts, fields, *arguments)]
    return parts[0]


def apply_split(whole: LazyTensor, split: Split) -> list[LazyTensor]:
    """The distinct shards of a whole tensor."""
    return [whole] if split.axis is None or split.parts == 1 else whole.chunk(split.axis, split.parts)


def _plain_rows(family: Family, aliases: Mapping[str, str], spec: str) -> list[Row]:
    """One row per hub tensor, and one per alias: the last pipeline stage needs its copy where it is not the first too."""
    by_name = {t.name: t for t in family.tensors}
    own = [t for t in family.tensors if t.name not in aliases]
    rows = [Row({spec: family.stored_name(t, spec)}, (t.name,), _padding(t), t.split, t.stage, ALWAYS) for t in own]
    return rows + [
        Row({spec: name}, (name,), _padding(by_name[of]), by_name[of].split, "last", _SEVERAL_STAGES) for name, of in aliases.items()
    ]


def _padding(tensor: HubTensor) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """Tables over the vocabulary grow where the user asks for padding."""
    return (("pad_vocab", ()),) if tensor.split == "vocab" else ()
