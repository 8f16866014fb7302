"""Who is made of whom: a plan's programs and bindings as relations between tensors, for people.

1. `Places` finds the stored tensor that begins at a (file, offset), and the rows of bindings that use a tensor.
2. `sources_of` says which source operands of a program reach one target operand: boxes of the scatter side against boxes
   of the gather side, in pivot coordinates. It is decided per program, so a million tensors cost no more than one.
3. `passages` spells that relation out as ranges ("rows 0…63 ← rows 128…191"), first ones first. Here, and only here, the
   two sides are composed, up to a limit: a ragged plan has more passages than anyone would read.

Boundary: pure; nothing is decided, every number comes from the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from math import prod
from typing import NamedTuple

import numpy as np

from .plan import Output, Plan, Program, TensorEntry
from .tensor.pieces import Box, Piece, align, flatten, row_strides, select

__all__ = [
    "MOST_PASSAGES",
    "Passage",
    "Places",
    "Use",
    "operands_of",
    "output_of",
    "passages",
    "ranges_in_words",
    "region_in_words",
    "sources_of",
]

MOST_PASSAGES = 10_000
"""Passages of one target tensor that are looked at; beyond, "or more" is said."""

Shape = tuple[int, ...]
Range = tuple[int, int]


class Use(NamedTuple):
    """One row of bindings that uses a tensor as its operand."""

    program: int
    row: int
    operand: int


class Passage(NamedTuple):
    """A range of a target tensor and the range of a source operand that it comes from.

    `first` is the source element at which the range begins.
    """

    target: str
    operand: int
    source: str
    first: int


@dataclass(frozen=True)
class Places:
    """Stored tensors by where they begin."""

    plan: Plan
    sources: dict[tuple[int, int], int] = field(default_factory=dict)
    targets: dict[tuple[int, int], int] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan) -> Places:
        """The places of all tensors that hold something."""
        sides = (plan.source_tensors, plan.target_tensors)
        return cls(plan, *({(t.file, t.offset): i for i, t in enumerate(side) if prod(t.shape)} for side in sides))

    def source(self, program: int, row: int, operand: int) -> int | None:
        """Number of the source tensor bound to an operand."""
        bound = self.plan.bindings[program]
        return self.sources.get((int(bound.source_file[row, operand]), int(bound.source_offset[row, operand])))

    def target(self, program: int, row: int, operand: int) -> int | None:
        """Number of the target tensor bound to an operand."""
        bound = self.plan.bindings[program]
        return self.targets.get((int(bound.target_file[row, operand]), int(bound.target_offset[row, operand])))

    def readers(self, tensor: TensorEntry) -> list[Use]:
        """The binding rows that read a source tensor."""
        return [u for n, b in enumerate(self.plan.bindings) for u in _uses(n, b.source_file, b.source_offset, tensor)]

    def writers(self, tensor: TensorEntry) -> list[Use]:
        """The binding rows that write a target tensor."""
        return [u for n, b in enumerate(self.plan.bindings) for u in _uses(n, b.target_file, b.target_offset, tensor)]


def _uses(
    number: int,
    files: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    offsets: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    tensor: TensorEntry,
) -> list[Use]:
    if not prod(tensor.shape):
        return []
    rows, operands = np.nonzero((files == tensor.file) & (offsets == tensor.offset))
    return [Use(number, row, operand) for row, operand in zip(rows.tolist(), operands.tolist(), strict=True)]


def output_of(program: Program, operand: int) -> Output | None:
    """The output whose pieces or zeros go to a target operand."""
    return next((o for o in program.outputs if any(p.slot == operand for p in (*o.scatter, *o.zeros))), None)


def operands_of(program: Program) -> list[int]:
    """Source operands that the pivot is gathered from."""
    return sorted({p.slot for p in program.gather})


def sources_of(program: Program, operand: int) -> list[int]:
    """Source operands that reach a target operand (compared copies not counted)."""
    output = output_of(program, operand)
    if output is None:
        return []
    wanted = [_span(box, output.ratio, program.shape) for box in _scatter(output, operand)]
    found: dict[int, None] = {}
    for box in _boxes(program.gather, program.shape):
        if box.slot not in found and any(next(_inside(box, span), None) is not None for span in wanted):
            found[box.slot] = None
    return list(found)


def passages(program: Program, operand: int, target: Shape, sources: Sequence[Shape | None]) -> list[Passage]:
    """What a target operand is made of, in the order of its elements; at most `MOST_PASSAGES`.

    Parameters
    ----------
    target
        Shape of the target tensor.
    sources
        Shape of each source operand, None where it is a view of something else.
    """
    output = output_of(program, operand)
    if output is None:
        return []
    found = sorted(islice(_compose(program, output, operand, target), MOST_PASSAGES), key=lambda c: c[0])
    return [
        Passage(ranges_in_words(into, target), slot, _source_in_words(piece, sources[slot]), piece.src_off) for into, slot, piece in found
    ]


def _compose(program: Program, output: Output, operand: int, target: Shape) -> Iterator[tuple[tuple[Range, ...], int, Piece]]:
    """(ranges of the target, source operand, piece whose ``src`` is the source and whose dims follow the target's axes)."""
    gather = _boxes(program.gather, program.shape)
    plain = set(output.ratio) <= {1}
    for scatter in _scatter(output, operand):
        for simple in _intervals(scatter, output.shape):
            span = _span(simple, output.ratio, program.shape)
            for box in gather:
                for part in _inside(box, span):
                    if plain:
                        yield from _spelled(part, simple, target)
                    else:
                        yield _ranges(_target_box(simple, target)), part.slot, flatten(part, program.shape)


def _spelled(part: Box, scatter: Box, target: Shape) -> Iterator[tuple[tuple[Range, ...], int, Piece]]:
    """The part of a pivot box inside one simple scatter box, as intervals of the target."""
    stride = {axis: to for axis, _, _, to in scatter.dims}
    offset = scatter.src_off + sum((a - b) * stride.get(k, 0) for k, (a, b) in enumerate(zip(part.start, scatter.start, strict=True)))
    piece = Piece(part.slot, offset, part.src_off, tuple((n, m * stride.get(axis, 0), src) for axis, n, m, src in part.dims))
    for box in align(piece, target):
        for simple in _intervals(box, target):
            yield _ranges(simple), simple.slot, flatten(simple, target)


def _target_box(scatter: Box, target: Shape) -> Box:
    """A simple scatter box in coordinates of the target."""
    piece = Piece(scatter.slot, scatter.src_off, 0, tuple((n, to, 1) for _, n, _, to in scatter.dims))
    return align(piece, target)[0]


def _boxes(pieces: Sequence[Piece], shape: Shape) -> list[Box]:
    return [box for piece in pieces for box in align(piece, shape)]


def _scatter(output: Output, operand: int) -> list[Box]:
    """Boxes of the output that go to the operand, in the operand's order."""
    return _boxes(sorted((p for p in output.scatter if p.slot == operand), key=lambda p: p.src_off), output.shape)


def _span(box: Box, ratio: Shape, shape: Shape) -> list[Range]:
    """Pivot ranges from the first to the last coordinate of an output box."""
    last = [a + sum((n - 1) * m for k, n, m, _ in box.dims if k == axis) for axis, a in enumerate(box.start)]
    return [(a * r, min((b + 1) * r, n)) for a, b, r, n in zip(box.start, last, ratio, shape, strict=True)]


def _inside(box: Box, ranges: Sequence[Range]) -> Iterator[Box]:
    """The parts of the box inside the ranges."""
    parts: Iterator[Box] = iter((box,))
    for axis, (lo, hi) in enumerate(ranges):
        parts = _selected(parts, axis, lo, hi)
    return parts


def _selected(parts: Iterator[Box], axis: int, lo: int, hi: int) -> Iterator[Box]:
    for part in parts:
        yield from select(part, axis, lo, hi)


def _intervals(box: Box, shape: Shape) -> Iterator[Box]:
    """The box as boxes that are an interval on every axis: dims with a step are unrolled."""
    inner: dict[int, int] = {}
    kept, outer = [], []
    for dim in reversed(box.dims):
        axis, extent, step, _ = dim
        if step == 1 and axis not in inner:
            inner[axis] = extent
            kept.append(dim)
        else:
            outer.append(dim)
    for at in product(*(range(dim[1]) for dim in reversed(outer))):
        start, src = list(box.start), box.src_off
        for i, (axis, _, step, move) in zip(at, reversed(outer), strict=True):
            start[axis] += i * step
            src += i * move
        yield Box(box.slot, tuple(start), src, tuple(reversed(kept)))


def _ranges(box: Box) -> tuple[Range, ...]:
    extent = {axis: n for axis, n, _, _ in box.dims}
    return tuple((a, a + extent.get(k, 1)) for k, a in enumerate(box.start))


def _source_in_words(piece: Piece, shape: Shape | None) -> str:
    """The source side of a piece, as ranges of the source tensor if it is a box of it."""
    swapped = Piece(0, piece.src_off, 0, tuple((n, s, i) for i, (n, _, s) in enumerate(piece.dims)))
    if shape is None or any(s < 1 for _, s, _ in swapped.dims):
        last = piece.src_off + sum((n - 1) * s for n, _, s in piece.dims)
        return f"elements {min(piece.src_off, last)}…{max(piece.src_off, last)}, strided"
    boxes = align(swapped, shape)
    words = [ranges_in_words(_ranges(simple), shape) for box in boxes for simple in islice(_intervals(box, shape), 3)][:3]
    turned = len(shape) == 2 and _turned(piece, shape)
    return ", ".join(words) + (" …" if len(words) == 3 else "") + (", transposed" if turned else "")


def _turned(piece: Piece, shape: Shape) -> bool:
    """Whether the target's rows run along the source's columns."""
    rows = row_strides(shape)[0]
    return len(piece.dims) > 1 and abs(piece.dims[0][2]) < rows <= abs(piece.dims[-1][2])


def region_in_words(pieces: Sequence[Piece], shape: Shape) -> str:
    """Regions of a tensor (``src`` side) in words.

    >>> region_in_words([Piece(0, 0, 8, ((8, 0, 1),))], (4, 4))
    'rows 2…3'
    """
    words = []
    for piece in pieces:
        for box in align(Piece(0, piece.src_off, 0, tuple((n, s, 0) for n, _, s in piece.dims)), shape):
            words += [ranges_in_words(_ranges(simple), shape) for simple in islice(_intervals(box, shape), 5)]
    return ", ".join(words[:4]) + (f", … {len(words) - 4} more" if len(words) > 4 else "")


def ranges_in_words(ranges: Sequence[Range], shape: Shape) -> str:
    """Ranges of a tensor's axes in words; last numbers are included.

    >>> ranges_in_words([(0, 4), (2, 4)], (4, 8)), ranges_in_words([(0, 4), (0, 8)], (4, 8)), ranges_in_words([(3, 4)], (9,))
    ('columns 2…3', 'all', 'element 3')
    """
    names = {1: ("element",), 2: ("row", "column")}.get(len(shape), tuple(f"axis {k}: " for k in range(len(shape))))
    words = []
    for name, (lo, hi), extent in zip(names, ranges, shape, strict=True):
        if (lo, hi) == (0, extent):
            continue
        if len(shape) > 2:
            words.append(f"{name}{lo}…{hi - 1}")
        else:
            words.append(f"{name} {lo}" if hi - lo == 1 else f"{name}s {lo}…{hi - 1}")
    return " ".join(words) or "all"
