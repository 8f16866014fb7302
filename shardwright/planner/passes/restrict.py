"""Restriction: of every program only what reaches a target that is wanted.

A target operand whose file number is `NOWHERE` is not wanted. Lowering knows nothing of that: it states what all ranks hold.

1. The rows of a program are sorted by which of their operands are wanted; rows that want none are left out.
2. For each such set the scatter pieces of its operands say which coordinates of the pivot are needed: along the axis that
   keeps least, as ranges. Each range becomes a program of its own, whose pivot is that part of the old one: gather, replicas
   and scatter pieces are cut to it. Where everything is needed the program stays as it is.
3. Zeros are kept for the operands that are wanted. Padding of the source is not looked at, for it reaches nobody; only what
   must be zero is, as it says where tensors end.

Boundary: pure; programs of one output in the pivot's own coordinates (all but quantisations).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod

import numpy as np

from ..plan import Bindings, Output, Program
from ..tensor.pieces import Box, Piece, align, coalesce, flatten, normalise, select
from .lower import Lowered

__all__ = ["NOWHERE", "restrict"]

NOWHERE = -1
"""File number of a target operand that is not wanted."""
MOST_RANGES = 64
"""Ranges of one pivot: beyond, a single one that holds them all costs less than it saves."""

Shape = tuple[int, ...]
Region = tuple[Shape, Shape]


def restrict(lowered: Lowered) -> Lowered:
    """What is left of the programs and their bindings."""
    found = Lowered()
    for program, bound, grain in zip(lowered.programs, lowered.bindings, lowered.grains, strict=True):
        sets, which = np.unique(bound.target_file != NOWHERE, axis=0, return_inverse=True)
        for number, wanted in enumerate(sets):
            if not wanted.any():
                continue
            rows = np.flatnonzero(which.reshape(-1) == number)
            for part in _parts(program, frozenset(np.flatnonzero(wanted).tolist())):
                found.programs.append(part)
                found.bindings.append(_rows(bound, rows))
                found.grains.append(grain)
    return found


def _rows(bound: Bindings, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Bindings:
    names = tuple([bound.names[row] for row in rows.tolist()])
    return Bindings(names, bound.source_file[rows], bound.source_offset[rows], bound.target_file[rows], bound.target_offset[rows])


def _parts(program: Program, wanted: frozenset[int]) -> Iterator[Program]:
    """The program's parts that reach these operands, zeros and blanks with the last of them."""
    (output,) = program.outputs
    regions = _regions(_aligned((p for p in output.scatter if p.slot in wanted), program.shape), program.shape)
    zeros = tuple(p for p in output.zeros if p.slot in wanted)
    blanks = tuple(p for p in program.padding if p.slot in program.blank)
    for index, region in enumerate(regions):
        last = index == len(regions) - 1
        yield replace(_part(program, output, wanted, region, zeros if last else ()), padding=blanks if last else ())


def _part(program: Program, output: Output, wanted: frozenset[int], region: Region, zeros: tuple[Piece, ...]) -> Program:
    shape = tuple(b - a for a, b in zip(*region, strict=True))
    scatter = tuple(p for p in output.scatter if p.slot in wanted)
    if shape == program.shape:
        return replace(program, outputs=(replace(output, scatter=scatter, zeros=zeros),))
    cut = sorted(map(normalise, _cut(scatter, program.shape, region)), key=lambda p: (p.dst_off, p.slot))
    return replace(
        program,
        shape=shape,
        gather=coalesce(_cut(program.gather, program.shape, region)),
        replicas=tuple(coalesce(_cut(replica, program.shape, region)) for replica in program.replicas),
        outputs=(replace(output, shape=shape, scatter=tuple(cut), zeros=zeros),),
    )


def _cut(pieces: Iterable[Piece], shape: Shape, region: Region) -> list[Piece]:
    """The parts of the pieces inside a region, in its own coordinates."""
    lo, hi = region
    boxes = _aligned(pieces, shape)
    for axis, (a, b) in enumerate(zip(lo, hi, strict=True)):
        if (a, b) != (0, shape[axis]):
            boxes = [part for box in boxes for part in select(box, axis, a, b)]
    inside = tuple(b - a for a, b in zip(lo, hi, strict=True))
    return [flatten(box._replace(start=tuple(c - a for c, a in zip(box.start, lo, strict=True))), inside) for box in boxes]


def _regions(boxes: Sequence[Box], shape: Shape) -> list[Region]:
    """Regions that hold all boxes: ranges along the axis that keeps least, in order; an empty one where there are no boxes."""
    if not boxes:
        return [((0,) * len(shape), (0,) * len(shape))]
    spans = [_span(box) for box in boxes]
    choices = [_along(axis, spans) for axis in range(len(shape))] or [_along(0, spans)]
    return min(choices, key=lambda regions: sum(prod(b - a for a, b in zip(*region, strict=True)) for region in regions))


def _along(axis: int, spans: Sequence[Region]) -> list[Region]:
    """Regions whose ranges on one axis do not touch."""
    found: list[Region] = []
    for lo, hi in sorted(spans, key=lambda span: span[0][axis : axis + 1]):
        if found and lo[axis : axis + 1] <= found[-1][1][axis : axis + 1]:
            found[-1] = _hull(found[-1], (lo, hi))
        else:
            found.append((lo, hi))
    if len(found) <= MOST_RANGES:
        return found
    whole = found[0]
    for region in found[1:]:
        whole = _hull(whole, region)
    return [whole]


def _hull(one: Region, two: Region) -> Region:
    return tuple(map(min, one[0], two[0])), tuple(map(max, one[1], two[1]))


def _span(box: Box) -> Region:
    """The range of coordinates on every axis."""
    last = list(box.start)
    for axis, extent, step, _ in box.dims:
        last[axis] += (extent - 1) * step
    return box.start, tuple(n + 1 for n in last)


def _aligned(pieces: Iterable[Piece], shape: Shape) -> list[Box]:
    return [box for piece in pieces for box in align(piece, shape)]
