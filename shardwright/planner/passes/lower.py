"""Lowering: bound rows of both sides become programs and bindings.

1. For each hub tensor, who holds it in the source (and which copies repeat it), and which target rows use it.
2. Choose the *pivot*, the tensor in whose coordinates the two sides meet. By default it is the hub tensor. Where a row
   joins several hub tensors in runs below 64 KiB (or in chunks that one tile must own), the row's whole tensor is the
   pivot instead, so that those runs are read or written together: the target's row first, else the source's.
   What repeats a source row, perhaps rounded to a narrower dtype (`SourceSide.copies`), is read along with it and compared.
3. Lower once per distinct (source row, target rows, slots): gather pieces (pivot ← source operands), replicas, padding,
   the value op, scatter pieces (target operands ← pivot, kept in pivot coordinates), zero regions. A tensor that is stored
   as several runs has an operand for each.
4. Append a binding row (file numbers and offsets) for every pivot tensor.

The two sides are never composed with each other: raggedness adds, it does not multiply. Boundary: pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...errors import UnsupportedError
from ..containers.base import Cut
from ..plan import Bindings, Ints, Output, Program, ValueOp
from ..tensor.dtypes import dtype as dtype_of
from ..tensor.lazy import LazyTensor, invert, leaf
from ..tensor.pieces import FILL, Piece, align, coalesce, normalise
from .memory import averageable
from .rows import RowClass, apply_split
from .sides import Bound, Form, SourceSide, TargetSide

__all__ = ["INTERLEAVE", "Lowered", "averaged", "gather_row", "lower"]

INTERLEAVE = 64 * 1024
"""Runs of a fused tensor below this many bytes are moved together with their neighbours."""

Shape = tuple[int, ...]
Use = tuple[int, int, int]
"""(target bound, row, slot)"""
Echo = tuple[str, tuple[Piece, ...]]
"""A copy of a pivot: its dtype and its pieces."""


@dataclass(slots=True)
class Lowered:
    """Programs with their bindings, and per program the rows that one tile must own whole."""

    programs: list[Program] = field(default_factory=list)
    bindings: list[Bindings] = field(default_factory=list)
    grains: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Gathered:
    """One pivot tensor from the operands of one bound row."""

    tensor: LazyTensor
    replicas: list[tuple[Piece, ...]]
    padding: list[Piece]
    blanks: list[Piece]


@dataclass(slots=True)
class _Draft:
    """A program while its binding rows are collected.

    `sources` and `targets` are the numbers of the bounds whose operands follow one another, the same for every row;
    `source_rows` and `target_rows` are the rows of those bounds, one after the other.
    """

    program: Program
    grain: int
    names: list[str] = field(default_factory=list)
    sources: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()
    source_rows: list[int] = field(default_factory=list)
    target_rows: list[int] = field(default_factory=list)


def lower(source: SourceSide, target: TargetSide, *, trust_replicas: bool = False) -> Lowered:
    """Lower both sides.

    Raises
    ------
    UnsupportedError
        One hub tensor would be stored under different value ops at once.
    """
    return _Lowering(source, target, trust_replicas).run()


class _Lowering:
    """The state of one lowering."""

    def __init__(self, source: SourceSide, target: TargetSide, trust_replicas: bool) -> None:
        self.source, self.target, self.trust = source, target, trust_replicas
        self.copies = {} if trust_replicas else source.copies
        self.drafts: dict[object, _Draft] = {}
        self.plain: dict[tuple[int, int, int, int], _Draft] = {}
        self.uses: dict[str, tuple[Use, ...]] = {}
        for number, row in target.instances:
            for slot, name in enumerate(target.bounds[number].hub[row]):
                before = self.uses.get(name)
                self.uses[name] = ((number, row, slot),) if before is None else (*before, (number, row, slot))
        self.joins_target = [_joins(b) for b in target.bounds]
        self.joins_source = [_joins(b) for b in source.bounds]

    def run(self) -> Lowered:
        done: set[str] = set()
        holders, target = self.source.holders, self.target.bounds
        for number, row in self.target.instances:
            names = target[number].hub[row]
            if names[0] in done:
                continue
            if self.joins_target[number]:
                self._pivot_target(number, row)
                done.update(names)
                continue
            for name in names:
                if name not in done:
                    done.add(name)
                    if self.joins_source[holders[name][0]]:
                        done.update(self._pivot_source(name))
                    else:
                        self._pivot_hub(name)
        lowered = Lowered()
        for draft in self.drafts.values():
            lowered.programs.append(draft.program)
            lowered.grains.append(draft.grain)
            sources = _columns(self.source.bounds, draft.sources, draft.source_rows)
            targets = _columns(self.target.bounds, draft.targets, draft.target_rows)
            lowered.bindings.append(Bindings(tuple(draft.names), *sources, *targets))
        return lowered

    def _pivot_hub(self, name: str) -> None:
        """The hub tensor itself is the pivot."""
        number, row, slot = self.source.holders[name]
        aliases = () if self.trust else self.source.aliases.get(name, ())
        copy = self.copies.get(name)
        uses = self.uses[name]
        if len(uses) == 1 and not aliases and copy is None:  # nearly always: one lookup by four numbers
            ((bound, target_row, member),) = uses
            known = self.plain.get((number, slot, bound, member))
            if known is not None:
                known.names.append(name)
                known.source_rows.append(row)
                known.target_rows.append(target_row)
                return
        repeated = None if copy is None else (copy[0], copy[2])
        key = ("hub", number, slot, tuple([a for a, _ in aliases]) if aliases else (), repeated, tuple([(b, s) for b, _, s in uses]))
        draft = self.drafts.get(key)
        if draft is None:
            draft = self.drafts[key] = self._hub_draft(number, slot, [a for a, _ in aliases], repeated, [(b, s) for b, _, s in uses])
            draft.sources = (number, *(a for a, _ in aliases), *(() if copy is None else copy[:1]))
            draft.targets = tuple([b for b, _, _ in uses])
            if len(uses) == 1 and not aliases and copy is None:
                self.plain[number, slot, uses[0][0], uses[0][2]] = draft
        draft.names.append(name)
        draft.source_rows.append(row)
        draft.source_rows += [r for _, r in aliases] if aliases else ()
        draft.source_rows += () if copy is None else copy[1:2]
        draft.target_rows += [r for _, r, _ in uses]

    def _hub_draft(
        self, number: int, slot: int, aliases: Sequence[int], repeated: tuple[int, int] | None, uses: Sequence[tuple[int, int]]
    ) -> _Draft:
        bound = self.source.bounds[number]
        shape = bound.row.shapes[slot]
        found = gather_row(bound, bound.row.shards, slot, shape, 0)
        replicas, base = found.replicas, _operands(bound)
        padding, blanks = (found.padding, found.blanks) if slot == 0 else ([], [])
        if averaged(bound) and aliases:
            raise UnsupportedError("a tensor whose copies are averaged is tied to another", tensor=bound.row.hub[slot])
        for alias in aliases:
            copy = self.source.bounds[alias]
            more = gather_row(copy, copy.row.shards, 0, shape, base)
            replicas += [more.tensor.pieces, *more.replicas]
            padding += more.padding
            blanks += more.blanks
            base += _operands(copy)
        echoes: list[Echo] = []
        if repeated is not None:
            copy = self.source.bounds[repeated[0]]
            echoes = _echoes(copy, gather_row(copy, copy.row.shards, repeated[1], shape, base))
        shards = [(b, [(j, o.shards, 0 if len(b.outputs) > 1 else s) for j, o in enumerate(b.outputs)]) for b, s in self._bounds_of(uses)]
        mean = averaged(bound)
        return self._draft(bound.row.hub[slot], bound.dtype, shape, found.tensor, replicas, padding, blanks, shards, mean, echoes)

    def _bounds_of(self, uses: Sequence[tuple[int, int]]) -> list[tuple[Bound, int]]:
        return [(self.target.bounds[b], s) for b, s in uses]

    def _pivot_target(self, number: int, row: int) -> None:
        """The target row's whole tensor is the pivot: its hub tensors are gathered into it."""
        bound = self.target.bounds[number]
        held = [self.source.holders[name] for name in bound.hub[row]]
        order = list(dict.fromkeys((b, r) for b, r, _ in held))
        members = [(order.index((b, r)), b, s) for b, r, s in held]
        repeated = [self.copies.get(name) for name in bound.hub[row]]
        copied = list(dict.fromkeys(copy[:2] for copy in repeated if copy is not None))
        again = [None if copy is None else (copied.index(copy[:2]), copy[0], copy[2]) for copy in repeated]
        key = ("target", number, tuple(members), tuple(again))
        if key not in self.drafts:
            bases = np.cumsum([0] + [_operands(self.source.bounds[b]) for b, _ in (*order, *copied)]).tolist()
            parts = []
            for position, b, slot in members:
                holder = self.source.bounds[b]
                if averaged(holder):
                    raise UnsupportedError("the target joins a tensor whose copies are averaged with others", tensor=bound.row.label)
                parts.append(gather_row(holder, holder.row.shards, slot, holder.row.shapes[slot], bases[position]))
            whole = bound.row.build([p.tensor for p in parts])
            blanks = [blank for p, (_, _, slot) in zip(parts, members, strict=True) if slot == 0 for blank in p.blanks]
            depth = max(len(p.replicas) for p in parts)
            replicas = [bound.row.build([LazyTensor(p.tensor.shape, _nth(p.replicas, i)) for p in parts]).pieces for i in range(depth)]
            shards = tuple(apply_split(leaf(0, whole.shape), bound.row.split))
            label = "+".join(bound.row.hub)
            before = self.source.bounds[held[0][0]].dtype
            echoes = self._joined_echoes(bound, [p.tensor.shape for p in parts], again, bases[len(order) :])
            self.drafts[key] = self._draft(
                label, before, whole.shape, whole, replicas, [], blanks, [(bound, [(0, shards, 0)])], echoes=echoes
            )
        self._append(self.drafts[key], "+".join(bound.hub[row]), [*order, *copied], [(number, row)])

    def _joined_echoes(
        self, bound: Bound, shapes: Sequence[Shape], again: Sequence[tuple[int, int, int] | None], bases: Sequence[int]
    ) -> list[Echo]:
        """What repeats the parts of a joined tensor, joined as they are; parts that nothing repeats are left out of it."""
        kinds = {self.source.bounds[copy[1]].dtype for copy in again if copy is not None}
        found: list[Echo] = []
        for kind in sorted(kinds):
            parts: list[list[tuple[Piece, ...]]] = []
            for copy, shape in zip(again, shapes, strict=True):
                held = None if copy is None else self.source.bounds[copy[1]]
                if copy is None or held is None or held.dtype != kind:
                    parts.append([])
                    continue
                parts.append([pieces for _, pieces in _echoes(held, gather_row(held, held.row.shards, copy[2], shape, bases[copy[0]]))])
            for i in range(max(map(len, parts))):
                tensors = [LazyTensor(shape, _nth(pieces, i)) for pieces, shape in zip(parts, shapes, strict=True)]
                found.append((kind, bound.row.build(tensors).pieces))
        return found

    def _pivot_source(self, name: str) -> tuple[str, ...]:
        """The source row's whole tensor is the pivot, unless the target takes its members apart; what has been lowered."""
        number, row, _ = self.source.holders[name]
        bound = self.source.bounds[number]
        names = bound.hub[row]
        uses = list(dict.fromkeys((b, r) for member in names for b, r, _ in self.uses.get(member, ())))
        repeated = {None if (copy := self.copies.get(n)) is None else copy[:2] for n in names}
        if not self._closed(names, uses) or len(repeated) > 1:
            self._pivot_hub(name)
            return (name,)
        (copy_of,) = repeated
        slots = tuple((b, tuple(names.index(n) for n in self.target.bounds[b].hub[r])) for b, r in uses)
        key = ("source", number, slots, None if copy_of is None else copy_of[0])
        if key not in self.drafts:
            shape = bound.row.whole.shape
            cuts = tuple(apply_split(leaf(0, shape), bound.row.split))
            found = gather_row(bound, cuts, 0, shape, 0)
            members = invert(bound.row.whole, 0, bound.row.shapes)
            shards = []
            for b, used in slots:
                to = self.target.bounds[b]
                shards.append((to, [(0, tuple(apply_split(to.row.build([members[k] for k in used]), to.row.split)), 0)]))
            label = "+".join(bound.row.hub)
            echoes: list[Echo] = []
            if copy_of is not None:
                held = self.source.bounds[copy_of[0]]
                echoes = _echoes(held, gather_row(held, cuts, 0, shape, _operands(bound)))
            self.drafts[key] = self._draft(label, bound.dtype, shape, found.tensor, found.replicas, [], found.blanks, shards, echoes=echoes)
        self._append(self.drafts[key], "+".join(names), [(number, row), *(() if copy_of is None else (copy_of,))], uses)
        return names

    def _closed(self, names: tuple[str, ...], uses: Sequence[tuple[int, int]]) -> bool:
        """Whether the uses take only these hub tensors, all of them, under one elementwise op."""
        bounds = [self.target.bounds[b] for b, _ in uses]
        inside = all(set(self.target.bounds[b].hub[r]) <= set(names) for b, r in uses)
        covered = {n for b, r in uses for n in self.target.bounds[b].hub[r]} == set(names)
        return (
            inside
            and covered
            and all(len(b.outputs) == 1 and b.op == bounds[0].op for b in bounds)
            and not any(self.source.aliases.get(n) for n in names)
        )

    def _draft(
        self,
        label: str,
        dtype: str,
        shape: Shape,
        gathered: LazyTensor,
        replicas: Sequence[tuple[Piece, ...]],
        padding: Sequence[Piece],
        blanks: Sequence[Piece],
        uses: Sequence[tuple[Bound, list[tuple[int, tuple[LazyTensor, ...], int]]]],
        average: bool = False,
        echoes: Sequence[Echo] = (),
    ) -> _Draft:
        """A program; `uses` are target bounds with ``(output, shards, slot of the pivot in them)``."""
        first = uses[0][0]
        if any(b.op != first.op or [o.dtype for o in b.outputs] != [o.dtype for o in first.outputs] for b, _ in uses):
            raise UnsupportedError("a tensor would be stored under different value ops at once", tensor=label)
        outputs = []
        for j, model in enumerate(first.outputs):
            scatter: list[Piece] = []
            zeros: list[Piece] = []
            base = 0
            for bound, shards in uses:
                _, cut, slot = shards[j]
                width = _width(bound)
                for operand in range(j * width, (j + 1) * width):
                    shard = cut[bound.outputs[j].split.shard_of(operand - j * width)]
                    scatter += [_swap(p, base + operand) for p in shard.pieces if p.slot == slot]
                    zeros += [_region(p, base + operand) for p in shard.pieces if p.slot == FILL and slot == 0]
                base += width * len(bound.outputs)
            out_shape = shape if len(first.outputs) == 1 else model.shape
            outputs.append(
                Output(model.dtype, out_shape, model.ratio if len(first.outputs) > 1 else (1,) * len(shape), _sorted(scatter), tuple(zeros))
            )
        op = (
            None
            if first.op is None
            else ValueOp(
                first.op.name, first.op.kernel, first.op.block if len(first.op.block) == len(shape) else (1,) * len(shape), first.op.scratch
            )
        )
        copies = () if self.trust else (*replicas, *(pieces for kind, pieces in echoes if kind == dtype))
        average = average and bool(replicas) and not self.trust
        rounded = [(kind, pieces) for kind, pieces in echoes if kind != dtype]
        copies = (*copies, *(pieces for _, pieces in rounded))
        blank = tuple([piece.slot for piece in blanks])
        left = (*padding, *blanks)
        program = Program(
            label,
            dtype,
            shape,
            gathered.pieces,
            copies,
            left,
            op,
            tuple(outputs),
            (),
            False,
            average=average,
            blank=blank,
            rounded=tuple([kind for kind, _ in rounded]),
        )
        return _Draft(program, max(b.grain for b, _ in uses))

    def _append(self, draft: _Draft, name: str, sources: Sequence[tuple[int, int]], uses: Sequence[tuple[int, int]]) -> None:
        draft.names.append(name)
        draft.sources, draft.targets = tuple([b for b, _ in sources]), tuple([b for b, _ in uses])
        draft.source_rows += [r for _, r in sources]
        draft.target_rows += [r for _, r in uses]


def _columns(bounds: Sequence[Bound], numbers: Sequence[int], rows: Sequence[int]) -> tuple[Ints, Ints]:
    """File numbers and offsets of every row's operands."""
    picked = np.array(rows, dtype=np.int64).reshape(-1, len(numbers)).T
    files = [bounds[number].files[at] for number, at in zip(numbers, picked, strict=True)]
    offsets = [bounds[number].offsets[at] for number, at in zip(numbers, picked, strict=True)]
    return np.concatenate(files, axis=1), np.concatenate(offsets, axis=1)


def averaged(bound: Bound) -> bool:
    """Whether the copies of a source row are averaged: the table says so, and their dtype has a mean."""
    return bound.row.average and averageable(bound.dtype)


def gather_row(bound: Bound, shards: Sequence[LazyTensor], slot: int, shape: Shape, base: int) -> _Gathered:
    """Hub (or whole) tensor `slot` of a source row as pieces over operands ``base …``, with its copies and its padding."""
    split = bound.row.split
    covers: list[list[Piece]] = [[] for _ in range(split.repeat * split.cycles)]
    padding, blanks, operand = [], [], base
    for rank in range(split.width):
        form = bound.forms[rank] if bound.forms else None
        for stored in _stored(shards[split.shard_of(rank)], form):
            covers[split.copy_of(rank)] += [_swap(p, operand) for p in stored if p.slot == slot]
            padding += [_region(p, operand) for p in stored if p.slot == FILL]
            operand += 1
        for size in form.blanks if isinstance(form, Cut) else ():
            blanks.append(normalise(Piece(operand, 0, 0, ((size, 0, 1),))))
            operand += 1
    return _Gathered(LazyTensor(shape, coalesce(covers[0])), [coalesce(c) for c in covers[1:]], padding, blanks)


def _stored(shard: LazyTensor, form: Form) -> Iterator[Sequence[Piece]]:
    """The shard's pieces in each run that it is stored as, with destinations counted from the run's first element."""
    if form is None:
        yield shard.pieces
    elif isinstance(form, Cut):
        flat, at = shard.reshape(shard.size), 0
        for size in form.sizes:
            yield flat.slice(0, at, at + size).pieces
            at += size
    else:
        yield _strided(shard, form)


def _strided(shard: LazyTensor, strides: Shape) -> list[Piece]:
    """The shard's pieces with destinations in a storage where the shard is a strided view."""
    return [
        Piece(
            b.slot,
            sum(c * s for c, s in zip(b.start, strides, strict=True)),
            b.src_off,
            tuple((n, m * strides[k], src) for k, n, m, src in b.dims),
        )
        for piece in shard.pieces
        for b in align(piece, shard.shape)
    ]


def _swap(piece: Piece, slot: int) -> Piece:
    """The same copy seen from the other side; `slot` is the operand that now is the source."""
    return normalise(Piece(slot, piece.src_off, piece.dst_off, tuple((n, s, d) for n, d, s in piece.dims)))


def _region(piece: Piece, slot: int) -> Piece:
    """The destination of a fill piece as a region of operand `slot` (``dst`` strides 0)."""
    return Piece(slot, 0, piece.dst_off, tuple((n, 0, d) for n, d, _ in piece.dims))


def _sorted(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    return tuple(sorted(pieces, key=lambda p: (p.dst_off, p.slot)))


def _width(bound: Bound) -> int:
    """Operands per output of a target's bound: the ranks that hold it."""
    return bound.row.split.width


def _operands(bound: Bound) -> int:
    """Operands of a source's bound: the runs and the padding of all ranks that hold it."""
    return int(bound.files.shape[1])


def _echoes(bound: Bound, found: _Gathered) -> list[Echo]:
    """What a row that repeats another holds, each of its own copies too."""
    return [(bound.dtype, pieces) for pieces in (found.tensor.pieces, *found.replicas)]


def _nth(replicas: Sequence[tuple[Piece, ...]], index: int) -> tuple[Piece, ...]:
    return replicas[index] if index < len(replicas) else ()


def _joins(bound: Bound) -> bool:
    """Whether the row must be moved whole: several hub tensors in runs below `INTERLEAVE`, or in chunks owned whole."""
    if len(bound.row.hub) == 1 or len(bound.outputs) > 1:
        return False
    return bound.grain > 1 or _shortest_run(bound.row) * dtype_of(bound.dtype).itemsize < INTERLEAVE


def _shortest_run(row: RowClass) -> int:
    """Elements of the shortest contiguous run of one hub tensor in the whole stored tensor."""
    shortest = row.whole.size
    for piece in row.whole.pieces:
        run = 1
        for extent, dst, src in reversed(piece.dims):
            if dst != run or src != run:
                break
            run *= extent
        shortest = min(shortest, run)
    return shortest
