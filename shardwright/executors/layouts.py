"""Programs made ready to run: aligned once, cut per strip, and turned into file calls.

1. `Layouts` aligns every piece of a program to the pivot's (or output's) shape, once per process.
2. For a strip box it selects the parts of those boxes that lie inside, brings them to memory and file bytes, and
   decides the calls. The result depends on the program and the box alone, so it is kept and used again for every other
   row of the binding.

Boundary: pure; no IO.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..planner.passes.memory import itemsize
from ..planner.plan import Output, Program
from ..planner.tensor.pieces import FILL, Box, Piece, align, select
from .move import Dim, Move, dense, local, merge
from .transfer import ReadStep, WriteStep, read_steps, shared, write_steps

__all__ = ["Layouts", "Reads", "Strip", "Writes", "extents_of", "moves", "output_box"]

Shape = tuple[int, ...]
Reads = tuple[tuple[int, ReadStep], ...]
"""``(source operand, step)``."""
Writes = tuple[tuple[int, WriteStep], ...]
"""``(target operand, step)``."""


class Strip(NamedTuple):
    """The calls of one strip. `partial` replicas do not cover it."""

    gather: Reads
    replicas: tuple[Reads, ...]
    partial: tuple[bool, ...]
    scatter: tuple[Writes, ...]


class _Boxes(NamedTuple):
    """Aligned pieces with their bounds ``[boxes, axes]`` as arrays, to find those that meet a range."""

    boxes: list[Box]
    lo: npt.NDArray[np.int64]
    hi: npt.NDArray[np.int64]


def output_box(output: Output, lo: Shape, hi: Shape) -> tuple[Shape, Shape]:
    """The output coordinates that a pivot box gives."""
    return (
        tuple(a // r for a, r in zip(lo, output.ratio, strict=True)),
        tuple(-(-b // r) for b, r in zip(hi, output.ratio, strict=True)),
    )


class Layouts:
    """The programs of a plan, ready to run.

    Parameters
    ----------
    programs
        By number; a worker has only those that it was sent.
    strip_bytes
        Size of the staging buffer.
    """

    def __init__(self, programs: Mapping[int, Program], strip_bytes: int) -> None:
        self.programs = dict(programs)
        self.strip_bytes = strip_bytes
        self._aligned: dict[tuple[int, str, int], _Boxes] = {}
        self.strip = lru_cache(maxsize=128)(self._strip)

    def _strip(self, number: int, lo: Shape, hi: Shape) -> Strip:
        """The calls for one box of one program."""
        program = self.programs[number]
        size = itemsize(program.dtype)
        gather = self._moves(number, "gather", 0, program.gather, program.shape, lo, hi, size)
        sizes = [itemsize(program.replica_dtype(i)) for i in range(len(program.replicas))]
        replicas = [self._moves(number, "replica", i, r, program.shape, lo, hi, sizes[i]) for i, r in enumerate(program.replicas)]
        scatter = []
        for index, output in enumerate(program.outputs):
            begin, end = output_box(output, lo, hi)
            found = self._moves(number, "scatter", index, output.scatter, output.shape, begin, end, itemsize(output.dtype))
            scatter.append(tuple((move.slot, step) for move in found for step in write_steps(move, self.strip_bytes)))
        whole = int(np.prod([b - a for a, b in zip(lo, hi, strict=True)], dtype=np.int64))
        return Strip(
            _reads(gather, self.strip_bytes),
            tuple(_reads(r, self.strip_bytes) for r in replicas),
            tuple(sum(m.nbytes for m in r) < whole * n for r, n in zip(replicas, sizes, strict=True)),
            tuple(scatter),
        )

    def _moves(
        self, number: int, side: str, index: int, pieces: Sequence[Piece], shape: Shape, lo: Shape, hi: Shape, size: int
    ) -> list[Move]:
        key = (number, side, index)
        aligned = self._aligned.get(key)
        if aligned is None:
            # Two lanes may both do this; the results are equal.
            aligned = self._aligned[key] = _align(pieces, shape)
        return _cut(aligned, shape, lo, hi, size)


def moves(pieces: Sequence[Piece], shape: Shape, lo: Shape, hi: Shape, size: int) -> list[Move]:
    """The moves of one box, without keeping anything."""
    return _cut(_align(pieces, shape), shape, lo, hi, size)


def _align(pieces: Sequence[Piece], shape: Shape) -> _Boxes:
    boxes = [box for piece in pieces for box in align(piece, shape)]
    lo = np.array([b.start for b in boxes], np.int64).reshape(len(boxes), len(shape))
    hi = lo + 1
    for row, box in enumerate(boxes):
        for axis, extent, step, _ in box.dims:
            hi[row, axis] += (extent - 1) * step
    return _Boxes(boxes, lo, hi)


def _cut(aligned: _Boxes, shape: Shape, lo: Shape, hi: Shape, size: int) -> list[Move]:
    """The parts of the boxes inside ``[lo, hi)``, in file order per operand."""
    meets = ((aligned.lo < np.array(hi, np.int64)) & (aligned.hi > np.array(lo, np.int64))).all(axis=1)
    found = []
    for index in np.flatnonzero(meets):
        parts = [aligned.boxes[index]]
        for axis, (a, b, extent) in enumerate(zip(lo, hi, shape, strict=True)):
            if b - a < extent:
                parts = [cut for part in parts for cut in select(part, axis, a, b)]
        found += [local(part, lo, hi, size) for part in parts]
    found.sort(key=lambda m: (m.slot, m.file))
    return _join(found)


def _join(found: Sequence[Move]) -> list[Move]:
    """Neighbouring runs, contiguous in file and memory, as one; also where both repeat at the same strides, as interleaved
    parts of a fused tensor do that lie in memory as in the file."""
    joined: list[Move] = []
    for move in found:
        if joined and (longer := _continued(joined[-1], move)) is not None:
            joined[-1] = longer
        else:
            joined.append(move)
    return joined


def _continued(first: Move, second: Move) -> Move | None:
    """One move for both, if the runs of the second follow those of the first."""
    if first.slot != second.slot or first.slot == FILL:
        return None
    (outer, run), (others, more) = _runs(first), _runs(second)
    follows = second.file - first.file == second.mem - first.mem == run
    # A longer run must not reach into the next repetition.
    if not follows or outer != others or any(dim[1] < run + more or abs(dim[2]) < run + more for dim in outer):
        return None
    return first._replace(dims=merge([*outer, ((run + more) // first.size, first.size, first.size)]))


def _runs(move: Move) -> tuple[tuple[Dim, ...], int]:
    """The dims around a move's contiguous runs, and the bytes of one."""
    if move.dims and move.dims[-1][1] == move.dims[-1][2] == move.size:
        return move.dims[:-1], move.dims[-1][0] * move.size
    return move.dims, move.size


def _reads(found: Sequence[Move], staging: int) -> Reads:
    """The steps of all moves, operand by operand."""
    reads: list[tuple[int, ReadStep]] = []
    for slot, group in groupby(found, attrgetter("slot")):
        several = list(group)
        # Blocks of several moves leave room for one another in the staging buffer.
        room = staging if len(several) == 1 else staging - staging // 8
        steps = [step for move in several for step in read_steps(move, room)]
        reads += [(slot, step) for step in (steps if slot == FILL else shared(steps, staging))]
    return tuple(reads)


def extents_of(piece: Piece, size: int) -> tuple[int, tuple[Dim, ...], int]:
    """The contiguous file ranges of a piece that has no memory side: ``(first offset, dims of ranges, bytes of one)``."""
    start, dims = piece.src_off * size, []
    for extent, _, src in piece.dims:
        if extent > 1 and src:
            start += min(0, (extent - 1) * src * size)
            dims.append((extent, abs(src) * size, 0))
    dims.sort(reverse=True, key=lambda dim: dim[1])
    outside, nbytes = dense(dims, size)
    return start, tuple(dims[:outside]), nbytes
