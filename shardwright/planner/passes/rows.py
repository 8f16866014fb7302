"""From tables to rows: which stored tensors a dialect has for one model at one layout, and what each is made of.

1. Hub tensors: every tensor of the family whose condition holds, with its shape, per layer.
2. For each row of the dialect (or each hub tensor, for a dialect that spells hub tensors one by one) and each layer:
   resolve aliases, evaluate the condition, take the hub shapes. Layers with equal shapes share a `RowClass`, which is
   lowered once: the operations applied to leaves, the split, the shards. Where no condition and no shape looks at the
   layer, all this is decided for the first one, and the others only get their names.
3. Every hub tensor must lie in exactly one row that is no alias; otherwise the dialect cannot hold the family.

Boundary: pure; knows no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, NamedTuple

from ...errors import ConfigError, TableError, UnsupportedError, short
from ..config import ModelConfig
from ..expressions import Expression, parse
from ..layout import SPLITS, Layout, Place, Split
from ..operations import OPERATIONS
from ..tables import ALWAYS, Dialect, Family, HubTensor, Row
from ..tensor.lazy import LazyTensor, leaf

__all__ = ["Expansion", "RowClass", "RowInstance", "apply_split", "expand", "hub_tensors", "scope"]

Shape = tuple[int, ...]
_SEVERAL_STAGES = parse("pp > 1")
_MOST_ELEMENTS = 1 << 56
"""Sizes and offsets in bits stay far below 63 bits."""


@dataclass(frozen=True, slots=True)
class RowClass:
    """All stored tensors of one row with the same shapes.

    Attributes
    ----------
    label
        The stored name with its counter open.
    hub
        Hub names with their counters open; aliases resolved.
    shapes
        Of the hub tensors.
    whole
        The stored tensor before rank cuts, over hub slots.
    split
        Its partition over tp ranks.
    shards
        One lazy tensor per part, over hub slots.
    build
        The row's operations: hub tensors in, the whole stored tensor out. `whole` is `build` of leaves.
    alias
        Whether it repeats a hub tensor that another row holds.
    """

    label: str
    hub: tuple[str, ...]
    shapes: tuple[Shape, ...]
    whole: LazyTensor
    split: Split
    shards: tuple[LazyTensor, ...]
    build: Callable[[Sequence[LazyTensor]], LazyTensor]
    alias: bool

    def shard_of(self, tp: int) -> int:
        """Which shard tensor-parallel rank `tp` holds."""
        return tp // self.split.repeat


class RowInstance(NamedTuple):
    """One stored tensor (of every tp rank): its class, key, hub names, and pipeline place."""

    row: int
    name: str
    hub: tuple[str, ...]
    pp: int
    chunk: int


@dataclass(frozen=True, slots=True)
class Expansion:
    """Everything a dialect stores for one model at one layout, in file order."""

    classes: tuple[RowClass, ...]
    instances: tuple[RowInstance, ...]


def scope(config: ModelConfig, layout: Layout, padded_vocab: int | None) -> dict[str, Any]:
    """What expressions and operations may see: config fields, parallel sizes, the padded vocabulary."""
    vocab = padded_vocab if padded_vocab is not None else config.fields.get("vocab_size")
    return {**config.fields, "tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "ep": layout.ep, "padded_vocab_size": vocab}


def hub_tensors(family: Family, config: ModelConfig) -> dict[str, Shape]:
    """Every hub tensor of the model: name → shape, in the family's order (first, layers, last)."""
    found: dict[str, Shape] = {}
    fields, layers = config.fields, config["num_hidden_layers"]
    for stage in ("first", "layer", "last"):
        entries = [(t, _constant_shape(t, fields)) for t in family.tensors if t.stage == stage]
        for layer in range(layers) if stage == "layer" else (-1,):
            number = str(layer)
            for tensor, constant in entries:
                shape = constant if constant != () else _shape_in_layer(tensor, {**fields, "layer": layer})
                if shape is None:
                    continue
                name = tensor.name.replace("{layer}", number)
                if name in found:
                    raise TableError("two tensors of a family have one name", file=family.origin, tensor=name)
                found[name] = shape
    return found


def _constant_shape(tensor: HubTensor, fields: Mapping[str, Any]) -> Shape | None:
    """The tensor's shape if it is the same in every layer (None: absent in every layer), else ``()``."""
    if "layer" in tensor.when.names.union(*(e.names for e in tensor.shape)):
        return ()
    return _shape_in_layer(tensor, fields)


def _shape_in_layer(tensor: HubTensor, fields: Mapping[str, Any]) -> Shape | None:
    return _shape(tensor.shape, fields, tensor.name) if tensor.when(fields) else None


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
        Heads, rows or layers do not divide.
    UnsupportedError
        The dialect has no row for a hub tensor of the family.
    """
    found = hub_tensors(family, config) if hub is None else hub
    return _Expander(family, config, dialect, spec, layout, padded_vocab, found, reading).run()


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
        self.fields = scope(config, layout, padded_vocab)
        self.hub = hub
        self.places = layout.places(config["num_hidden_layers"])
        self.aliases = {a.name: a.of for a in family.aliases if a.when(config.fields)}
        self.classes: list[RowClass] = []
        self.instances: list[RowInstance] = []
        self.known: dict[tuple[int, tuple[Shape, ...]], int] = {}
        self.held: set[str] = set()

    def run(self) -> Expansion:
        rows = list(enumerate(self.dialect.rows if self.dialect.rows is not None else _family_rows(self.family, self.aliases)))
        last = Place(self.layout.pp - 1, self.layout.vpp - 1, 0)
        self._stage([(i, r) for i, r in rows if r.stage == "first"], -1, Place(0, 0, 0))
        layer_rows = [(i, r) for i, r in rows if r.stage == "layer"]
        alike = self._layers_are_alike([row for _, row in layer_rows])
        for layer, place in enumerate(self.places[:1] if alike else self.places):
            self._stage(layer_rows, layer, place)
        if alike:
            self._repeat(layer_rows)
        self._stage([(i, r) for i, r in rows if r.stage == "last"], -1, last)
        for name in self.hub:
            if name not in self.held:
                raise UnsupportedError(
                    f"dialect {self.dialect.name!r} has no row for this tensor of family {self.family.name!r}", tensor=name
                )
        return Expansion(tuple(self.classes), tuple(self.instances))

    def _layers_are_alike(self, rows: Iterable[Row]) -> bool:
        """Whether what is decided for one layer holds for all: nothing looks at the layer's number but names do."""
        tensors = [t for t in self.family.tensors if t.stage == "layer"]
        expressions = [e for t in tensors for e in (t.when, *t.shape)] + [row.when for row in rows]
        names = [t.name for t in tensors] + [name for row in rows for name in row.hub]
        heads = [name.partition("{layer}")[0] for name in names]
        return (
            not any("layer" in e.names for e in expressions)
            and all("{layer}" in name for name in names)
            and not any(alias.startswith(head) for alias in self.aliases for head in heads)
        )

    def _repeat(self, rows: Iterable[tuple[int, Row]]) -> None:
        """What was decided for the first layer, for all others. The hub lists alike layers one after the other."""
        first = [name for t in self.family.tensors if t.stage == "layer" and (name := t.name.replace("{layer}", "0")) in self.hub]
        hub, width, local = list(self.hub), len(first), self.dialect.numbering == "local"
        begin = hub.index(first[0]) if first else 0
        decided = []
        for index, row in rows:
            at = [name.replace("{layer}", "0") for name in row.hub]
            cls = self.known.get((index, tuple([self.hub[name] for name in at if name in self.hub])))
            if cls is not None:
                # A tensor that is stored under its hub name shares the hub's string: a plan has many, and looks them up often.
                shared = row.names[self.spec] == row.hub[0] and not local
                decided.append((cls, None if shared else row.names[self.spec], [first.index(name) for name in at]))
        for layer, place in enumerate(self.places[1:], start=1):
            number, chunk = (str(place.local), place.chunk) if local else (str(layer), 0)
            own = hub[begin + layer * width : begin + (layer + 1) * width]
            self.held.update(own)
            for cls, stored, members in decided:
                names = tuple([own[i] for i in members])
                name = names[0] if stored is None else stored.replace("{layer}", number)
                self.instances.append(RowInstance(cls, name, names, place.pp, chunk))

    def _stage(self, rows: Iterable[tuple[int, Row]], layer: int, place: Place) -> None:
        number = str(layer if self.dialect.numbering == "global" else place.local)
        for index, row in rows:
            names, alias = self._resolve(row, str(layer))
            absent = [name for name in names if name not in self.hub]
            if len(absent) == len(names):
                continue
            if absent:
                raise UnsupportedError(
                    f"a row of dialect {self.dialect.name!r} joins tensors that family {self.family.name!r} has only in part",
                    tensor=absent[0],
                    expected=list(names),
                )
            if not (alias and self.reading) and row.when is not ALWAYS and not row.when({**self.fields, "layer": layer}):
                continue
            self._hold(names, alias)
            cls = self._class(index, row, tuple([self.hub[name] for name in names]), alias)
            chunk = place.chunk if self.dialect.numbering == "local" else 0  # global numbers need no chunks to tell layers apart
            self.instances.append(RowInstance(cls, row.names[self.spec].replace("{layer}", number), names, place.pp, chunk))

    def _resolve(self, row: Row, layer: str) -> tuple[tuple[str, ...], bool]:
        names = tuple([name.replace("{layer}", layer) for name in row.hub])
        if len(names) == 1 and names[0] in self.aliases:
            return (self.aliases[names[0]],), True
        return names, False

    def _hold(self, names: tuple[str, ...], alias: bool) -> None:
        if alias:
            return
        for name in names:
            if name in self.held:
                raise TableError("two rows hold the same hub tensor", file=self.dialect.origin, tensor=name)
            self.held.add(name)

    def _class(self, index: int, row: Row, shapes: tuple[Shape, ...], alias: bool) -> int:
        key = (index, shapes)
        if key not in self.known:
            self.known[key] = len(self.classes)
            build = partial(_compose, row, self.fields)
            whole = build([leaf(slot, shape) for slot, shape in enumerate(shapes)])
            split = SPLITS[row.split](whole.shape, self.layout.tp, self.fields, self.dialect.kv_heads)
            hub = tuple(self.aliases.get(name, name) if alias else name for name in row.hub)
            shards = tuple(apply_split(whole, split))
            self.classes.append(RowClass(row.names[self.spec], hub, shapes, whole, split, shards, build, alias))
        return self.known[key]


def _compose(row: Row, fields: Mapping[str, Any], parts: Sequence[LazyTensor]) -> LazyTensor:
    """The row's operations, applied to its hub tensors."""
    for name, arguments in row.layout:
        parts = [OPERATIONS.get(name)(parts, fields, *arguments)]
    return parts[0]


def apply_split(whole: LazyTensor, split: Split) -> list[LazyTensor]:
    """The distinct shards of a whole tensor."""
    return [whole] if split.axis is None or split.parts == 1 else whole.chunk(split.axis, split.parts)


def _family_rows(family: Family, aliases: Mapping[str, str]) -> list[Row]:
    """One row per hub tensor, and one per alias: the last pipeline stage needs its copy where it is not the first too."""
    by_name = {t.name: t for t in family.tensors}
    rows = [Row({"": t.stored}, (t.name,), _padding(t), t.split, t.stage, ALWAYS) for t in family.tensors if t.name not in aliases]
    return rows + [
        Row({"": name}, (name,), _padding(by_name[of]), by_name[of].split, "last", _SEVERAL_STAGES) for name, of in aliases.items()
    ]


def _padding(tensor: HubTensor) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """Tables over the vocabulary grow where the user asks for padding."""
    return (("pad_vocab", ()),) if tensor.split == "vocab" else ()
