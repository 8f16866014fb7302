"""What ranks of a target hold in memory, and the plan that fills it: a conversion whose targets are tensors, not files.

1. `hold` settles the target's words as a conversion does, expands its rows, keeps those that the asked-for ranks hold under
   an asked-for name, and states each as a `Held`: rank, name, dtype, shape. Where no format is named the rows are the hub
   tensors themselves, on one rank.
2. `Holding.plan` gives some of them a place: tensor n is target file n, from byte 0 on. The others are `NOWHERE`. The rows
   are lowered, restricted to what has a place, tiled and proven, like any conversion. So whatever several ranks, or several
   tensors of one rank, need of a source byte, the tile that reads it serves them all.
3. `deal` shares the tiles among processes that run one plan together: each goes to one of those that need it, to the one
   with least to read so far. All of them compute the same.

Boundary: headers only; nothing here knows what a tensor in memory is.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod
from typing import NamedTuple

import numpy as np

from ...errors import UnsupportedError, UsageError
from ..formats.base import Source
from ..layout import Split
from ..plan import Plan, SourceFile, TargetFile, TensorEntry
from ..request import Request
from ..tensor.dtypes import dtype as dtype_of
from ..tensor.lazy import LazyTensor, leaf
from .build import bind_weights, no_collector, norm_shift, source_rows
from .check import check_filling
from .lower import lower
from .request import casts, settle_words
from .restrict import NOWHERE, restrict
from .rows import Expansion, RowClass, RowInstance, expand
from .sides import SourceSide, TargetSide, Wanted, targets
from .tiling import choose_cuts, tile

__all__ = ["Held", "Holding", "deal", "hold"]

TILE_BYTES = 32 << 20
TILE_FLOOR = 1 << 20
TILES_EACH = 8
"""Tiles for each process at least, where they are not smaller than the floor: they are what lanes and processes share."""

Shape = tuple[int, ...]


class Held(NamedTuple):
    """A tensor that a rank holds.

    Attributes
    ----------
    name
        Under the dialect; tensors of virtual chunks begin with ``model{chunk}.`` where layers are numbered by chunk.
    dtype, shape
        Of the target, after casts.
    twin
        Number of the first tensor of this rank that is the same part of the same hub tensors: itself, unless they are tied.
    """

    rank: int
    name: str
    dtype: str
    shape: Shape
    twin: int

    @property
    def nbytes(self) -> int:
        """In memory, contiguous."""
        return dtype_of(self.dtype).nbytes(prod(self.shape))


class _Spot(NamedTuple):
    """Where a held tensor is among the target's rows."""

    bound: int
    row: int
    operand: int


@dataclass(frozen=True)
class Holding:
    """What some ranks hold.

    Attributes
    ----------
    ranks
        In ascending order.
    held
        All tensors, rank by rank in the order of the target's files; their positions are their numbers.
    sources
        The source's files as they were when this was made; a load refuses those that have changed.
    """

    source: Source
    request: Request
    ranks: tuple[int, ...]
    include: tuple[str, ...]
    held: tuple[Held, ...]
    side: SourceSide
    target: TargetSide
    spots: tuple[_Spot, ...]
    sources: tuple[SourceFile, ...]

    def numbers(self, rank: int) -> dict[str, int]:
        """Names of what a rank holds, with their numbers."""
        return {held.name: number for number, held in enumerate(self.held) if held.rank == rank}

    @cached_property
    def _files(self) -> tuple[TargetFile, ...]:
        return tuple(TargetFile(f"{held.name}@{held.rank}", held.nbytes) for held in self.held)

    def plan(self, numbers: Collection[int] | None = None, *, trust_replicas: bool = False, processes: int = 1) -> Plan:
        """The plan that fills these tensors (all by default); tensor n is target file n, row-major from byte 0 on.

        Parameters
        ----------
        processes
            Among which its tiles will be shared.

        Raises
        ------
        UnsupportedError
            One hub tensor would go through different value ops.
        PlanError
            The plan contradicts itself: a mistake in a table.
        """
        chosen = range(len(self.held)) if numbers is None else sorted(set(numbers))
        each = sum(self.held[number].nbytes for number in chosen) // (TILES_EACH * processes)
        tile_bytes = min(TILE_BYTES, max(TILE_FLOOR, each))
        with no_collector():
            lowered = restrict(lower(self.side, self._placed(chosen), trust_replicas=trust_replicas))
            programs = choose_cuts(lowered, tile_bytes)
            tiles = tile(programs, lowered.bindings, lowered.grains, tile_bytes)
            held = [self.held[n] for n in chosen]
            plan = Plan(
                self._recipe(len(chosen) == len(self.held) or chosen, trust_replicas),
                self.source.store.root,
                {"source_format": self.source.format, "family": self.source.family.name, "target_format": self.request.to},
                self.sources,
                self._files,
                (),
                tuple(programs),
                tuple(lowered.bindings),
                tiles,
                (),
                tuple(TensorEntry(h.name, h.rank, h.dtype, h.shape, n, 0) for n, h in zip(chosen, held, strict=True)),
            )
            check_filling(plan)
        return plan

    def _recipe(self, chosen: object, trust_replicas: bool) -> dict[str, object]:
        """With the tiles and the source's fingerprints, what makes two plans the same work."""
        asked = {**self.request.to_json(), "trust_replicas": trust_replicas, "ranks": self.ranks, "include": self.include}
        return {**asked, "chosen": chosen, "family": self.source.family.name, "config": dict(self.source.config.fields)}

    def _placed(self, chosen: Sequence[int]) -> TargetSide:
        """The rows of these tensors, each with its places."""
        side, numbers = TargetSide(), dict[int, int]()
        rows: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number in chosen:
            rows[self.spots[number][:2]].append(number)
        for bound, row in rows:
            old = self.target.bounds[bound]
            if bound not in numbers:
                numbers[bound] = len(side.bounds)
                side.bounds.append(replace(old, hub=[]))
            new = side.bounds[numbers[bound]]
            side.instances.append((numbers[bound], len(new.hub)))
            new.hub.append(old.hub[row])
        for new in side.bounds:
            new.files = np.full((len(new.hub), new.row.split.width), NOWHERE, dtype=np.int64)
            new.offsets = np.zeros_like(new.files)
        for (bound, at), placed in zip(side.instances, rows.values(), strict=True):
            for number in placed:
                side.bounds[bound].files[at, self.spots[number].operand] = number
        return side


def hold(source: Source, request: Request, ranks: Sequence[int], include: Sequence[str] = ("*",)) -> Holding:
    """What these ranks of a target hold under names that match one of the patterns.

    Parameters
    ----------
    request
        As for a conversion; where it names no format (``""``) the tensors are the hub's own, unsplit.
    ranks
        Numbers of the request's layout.

    Raises
    ------
    UsageError
        A rank that the layout does not have, a pattern that no name matches, or words that do not go together.
    Refusal
        The source is quantised or not whole, or it and the request do not fit.
    """
    if source.scheme is not None:
        raise UnsupportedError(
            "a quantised checkpoint's values are not read yet",
            file=source.store.root,
            actual=source.scheme.name,
            remedy="Load the original weights; the stored tensors are in `stored`",
        )
    layout = request.layout
    for rank in ranks:
        layout.coordinates(rank)
    with no_collector():
        expansion, prefixed, dtype = _rows(source, request)
        _refuse_idle([_name(i, prefixed) for i in expansion.instances], include)
        stages = {layout.coordinates(rank)["pp"] for rank in ranks}
        kept = tuple(i for i in expansion.instances if i.pp in stages and _matches(_name(i, prefixed), include))
        side = bind_weights(source, request, source_rows(source))
        target = targets(replace(expansion, instances=kept), layout, side, casts(source.family, dtype), None, norm_shift(source, request))
        wanted = tuple(sorted(set(ranks)))
        held, spots = _held(kept, target, prefixed, wanted)
    stats = {path: source.store.stat(path) for path in source.files}
    sources = tuple(SourceFile(path, stats[path].nbytes, stats[path].mtime_ns, digest) for path, digest in source.files.items())
    return Holding(source, request, wanted, tuple(include), held, side, target, spots, sources)


def _rows(source: Source, request: Request) -> tuple[Expansion, bool, str | None]:
    """The target's rows, whether names of virtual chunks have a prefix, and what floating tensors are cast to."""
    layout = request.layout
    if request.to:
        words = settle_words(source, request)
        rows = expand(source.family, source.config, words.dialect, words.spec, layout, words.padded_vocab, hub=source.hub)
        return rows, layout.vpp > 1 and words.dialect.numbering == "local", words.dtype
    if layout.ranks > 1 or request.dialect or request.spec or request.pad_vocab_to:
        raise UsageError("hub tensors are not split, spelled or padded otherwise", remedy="Say what for: to=FORMAT")
    classes: dict[Shape, int] = {}
    instances = [RowInstance(classes.setdefault(shape, len(classes)), name, (name,), 0, None, 0) for name, shape in source.hub.items()]
    return Expansion(tuple(map(_whole, classes)), tuple(instances)), False, request.dtype


def _whole(shape: Shape) -> RowClass:
    """The row of a hub tensor as it is."""
    tensor = leaf(0, shape)
    return RowClass("hub tensor", ("hub tensor",), (shape,), tensor, Split(None, 1, 1), (tensor,), _only, False)


def _only(parts: Sequence[LazyTensor]) -> LazyTensor:
    return parts[0]


def _name(instance: RowInstance, prefixed: bool) -> str:
    return f"model{instance.chunk}.{instance.name}" if prefixed else instance.name


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_idle(names: Sequence[str], include: Sequence[str]) -> None:
    """Every pattern must match some name of some rank; which ranks those are is the layout's business."""
    for pattern in include:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, sorted(names)[:20_000], n=1, cutoff=0.0)
            raise UsageError("no tensor has a name like that", actual=pattern, remedy=f"Nearest name: {near[0]}" if near else None)


def _held(
    instances: Sequence[RowInstance], target: TargetSide, prefixed: bool, ranks: Sequence[int]
) -> tuple[tuple[Held, ...], tuple[_Spot, ...]]:
    """Everything that the ranks hold, rank by rank."""
    found: dict[int, list[tuple[RowInstance, Wanted, int]]] = {rank: [] for rank in ranks}
    for instance, wanted in zip(instances, target.wanted, strict=True):
        for operand, rank in enumerate(wanted.ranks):
            if rank in found:
                found[rank].append((instance, wanted, operand))
    held: list[Held] = []
    spots: list[_Spot] = []
    for rank, tensors in found.items():
        first: dict[object, int] = {}
        for instance, wanted, operand in tensors:
            bound = target.bounds[wanted.bound]
            content = instance.hub, bound.row.shards[bound.row.split.shard_of(operand)], bound.op, wanted.dtype
            twin = first.setdefault(content, len(held))
            held.append(Held(rank, _name(instance, prefixed), wanted.dtype, wanted.shape, twin))
            spots.append(_Spot(wanted.bound, wanted.row, operand))
    return tuple(held), tuple(spots)


def deal(plan: Plan, takers: Mapping[int, Collection[int]], processes: int) -> list[list[int]]:
    """The tiles that each process reads.

    Parameters
    ----------
    takers
        By number of a target file: the processes that hold that tensor.
    """
    dealt: list[list[int]] = [[] for _ in range(processes)]
    load = [0] * processes
    for number in range(len(plan.tiles)):
        needy: set[int] = set()
        for item in plan.items(number):
            for file in plan.bindings[item.program].target_file[item.row].tolist():
                if file != NOWHERE:
                    needy.update(takers[file])
        reader = min(needy, key=lambda process: (load[process], process))
        dealt[reader].append(number)
        load[reader] += int(plan.tiles.bytes_read[number])
    return dealt
