"""Tiling: pivot tensors become boxes of bounded size, in source order.

1. Per program, choose the axis to cut: the one that keeps the smaller of (read run, write run) longest; two axes if both
   runs fall under 16 KiB. If strips of a few MiB along it would shorten the runs further, the item must be in memory
   whole (a transpose), and tiles are smaller.
2. Cut on multiples of the op's block and of the rows that a chunked container wants written by one tile.
3. Order all items by (source file, offset), and let neighbours share a tile until it is full.
4. Count, per tile, the contiguous file ranges and bytes it reads and writes; nothing but counts is kept.

Tile boundaries are a function of the recipe alone: memory, workers and device never move them. Boundary: pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import lcm, prod

import numpy as np

from ..plan import Bindings, Program, Tiles
from ..tensor.dtypes import dtype as dtype_of
from ..tensor.pieces import Box, Piece, align, count, select
from .lower import Lowered

__all__ = ["STRIP_BYTES", "TILE_BYTES", "TILE_BYTES_WHOLE", "choose_cuts", "tile"]

TILE_BYTES = 128 << 20
TILE_BYTES_WHOLE = 64 << 20
STRIP_BYTES = 4 << 20
SHORT_RUN = 16 << 10

Shape = tuple[int, ...]


def choose_cuts(lowered: Lowered, tile_bytes: int = TILE_BYTES) -> list[Program]:
    """The programs with their cut axes chosen."""
    return [_choose(program, grain, tile_bytes) for program, grain in zip(lowered.programs, lowered.grains, strict=True)]


def _choose(program: Program, grain: int, tile_bytes: int) -> Program:
    block = _block(program)
    axes = [k for k, extent in enumerate(program.shape) if extent > 1 and block[k] != 0]
    if not axes or not prod(program.shape):
        return replace(program, cut=(), whole=False)
    if grain > 1 and 0 in axes:
        return replace(program, cut=(0,), whole=False)
    sides = _sides(program)
    best_strip = max(axes, key=lambda k: (_shortest(sides, program, {k: _rows(program, k, STRIP_BYTES)}), -k))
    run = _shortest(sides, program, {best_strip: _rows(program, best_strip, STRIP_BYTES)})
    if program.nbytes <= STRIP_BYTES or run >= min(SHORT_RUN, _shortest(sides, program, {})):
        return replace(program, cut=(best_strip,), whole=False)
    limit = min(tile_bytes, TILE_BYTES_WHOLE)
    best = max(axes, key=lambda k: (_shortest(sides, program, {k: _rows(program, k, limit)}), -k))
    if program.nbytes > limit and len(axes) > 1 and _shortest(sides, program, {best: _rows(program, best, limit)}) < SHORT_RUN:
        return replace(program, cut=tuple(sorted(axes, key=lambda k: -program.shape[k])[:2]), whole=True)
    return replace(program, cut=(best,), whole=True)


def _block(program: Program) -> Shape:
    return program.op.block if program.op else (1,) * len(program.shape)


def _rows(program: Program, axis: int, nbytes: int) -> int:
    """Coordinates of `axis` that fit in `nbytes` of pivot."""
    return max(1, nbytes * program.shape[axis] // program.nbytes)


def _sides(program: Program) -> list[tuple[list[Box], int]]:
    """Boxes of the gather side and of each plain output, with their item sizes."""
    sides = [(_aligned(program.gather, program.shape), dtype_of(program.dtype).itemsize)]
    plain = [output for output in program.outputs if output.shape == program.shape]
    return sides + [(_aligned(output.scatter, program.shape), dtype_of(output.dtype).itemsize) for output in plain]


def _aligned(pieces: Iterable[Piece], shape: Shape) -> list[Box]:
    return [box for piece in pieces for box in align(piece, shape)]


def _shortest(sides: Sequence[tuple[list[Box], int]], program: Program, limit: dict[int, int]) -> int:
    """Bytes of the shortest file run on any side when the axes in `limit` are cut to that many coordinates."""
    shortest = program.nbytes
    for boxes, itemsize in sides:
        for axis, rows in limit.items():
            boxes = [part for box in boxes for part in select(box, axis, box.start[axis], box.start[axis] + rows)]
        shortest = min([shortest, *(_run(box) * itemsize for box in boxes)])
    return shortest


def _run(box: Box) -> int:
    """Elements of the box's contiguous runs on the file side."""
    run = 1
    for _, extent, _, src in sorted(box.dims, key=lambda d: abs(d[3])):
        if src != run:
            break
        run *= extent
    return run


def tile(programs: Sequence[Program], bindings: Sequence[Bindings], grains: Sequence[int], tile_bytes: int = TILE_BYTES) -> Tiles:
    """All tiles of the plan."""
    columns: list[np.ndarray[tuple[int, int], np.dtype[np.int64]]] = []
    for number, (program, bound, grain) in enumerate(zip(programs, bindings, grains, strict=True)):
        columns.append(_items(number, program, bound, grain, tile_bytes))
    items = np.concatenate(columns) if columns else np.zeros((0, 13), dtype=np.int64)
    items = items[np.lexsort((items[:, 8], items[:, 7], items[:, 6]))]
    first = _pack(items[:, 9], tile_bytes)
    sums = [np.add.reduceat(items[:, k], first[:-1]) if len(items) else np.zeros(0, dtype=np.int64) for k in (10, 11, 12)]
    return Tiles(first, items[:, 0], items[:, 1], items[:, 2:4], items[:, 4:6], sums[0], sums[1], sums[2])


def _items(number: int, program: Program, bound: Bindings, grain: int, tile_bytes: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Rows of (program, row, lo×2, hi×2, source file, offset, order, pivot bytes, requests, bytes read, bytes written)."""
    boxes = _boxes(program, grain, tile_bytes)
    counts = [_counts(program, lo, hi) for lo, hi in boxes]
    rows = len(bound.names)
    table = np.zeros((rows, len(boxes), 13), dtype=np.int64)
    table[:, :, 0] = number
    table[:, :, 1] = np.arange(rows)[:, None]
    for k, ((lo, hi), (nbytes, requests, read, written)) in enumerate(zip(boxes, counts, strict=True)):
        for column, axis in enumerate(program.cut):
            table[:, k, 2 + column], table[:, k, 4 + column] = lo[axis], hi[axis]
        table[:, k, 8:] = (k, nbytes, requests, read, written)
    table[:, :, 6] = bound.source_file[:, :1]
    table[:, :, 7] = bound.source_offset[:, :1]
    return table.reshape(rows * len(boxes), 13)


def _boxes(program: Program, grain: int, tile_bytes: int) -> list[tuple[Shape, Shape]]:
    """The boxes into which one pivot tensor is cut."""
    limit = min(tile_bytes, TILE_BYTES_WHOLE) if program.whole else tile_bytes
    shape, block = program.shape, _block(program)
    if not program.cut or program.nbytes <= limit:
        return [((0,) * len(shape), shape)]
    if len(program.cut) == 1:
        sides = {program.cut[0]: _rows(program, program.cut[0], limit)}
    else:
        sides = _square(program, limit)
    steps = {k: _multiple(rows, lcm(block[k], grain if k == 0 else 1)) for k, rows in sides.items()}
    ranges = [[(0, n)] if k not in steps else [(at, min(at + steps[k], n)) for at in range(0, n, steps[k])] for k, n in enumerate(shape)]
    boxes: list[tuple[Shape, Shape]] = [((), ())]
    for axis in ranges:
        boxes = [((*lo, a), (*hi, b)) for lo, hi in boxes for a, b in axis]
    return boxes


def _square(program: Program, limit: int) -> dict[int, int]:
    """Sides of a tile cut on two axes: as square as the axes allow."""
    a, b = program.cut
    cell = program.nbytes // (program.shape[a] * program.shape[b]) or 1
    side = int((limit // cell) ** 0.5)
    rows = min(program.shape[a], max(side, limit // cell // program.shape[b]))
    return {a: max(1, rows), b: max(1, min(program.shape[b], limit // cell // max(1, rows)))}


def _multiple(rows: int, step: int) -> int:
    """`rows` rounded down to a multiple of `step`, at least one step."""
    return max(step, rows // step * step)


def _counts(program: Program, lo: Shape, hi: Shape) -> tuple[int, int, int, int]:
    """Pivot bytes, contiguous file ranges, bytes read and bytes written of one box."""
    itemsize = dtype_of(program.dtype).itemsize
    last = hi == program.shape
    requests, elements = _ranges(program.gather, program.shape, lo, hi)
    read = elements * itemsize
    for number, replica in enumerate(program.replicas):
        more, elements = _ranges(replica, program.shape, lo, hi)
        requests, read = requests + more, read + elements * dtype_of(program.replica_dtype(number)).itemsize
    for piece in program.padding if last else ():
        requests, read = requests + _region_ranges(piece), read + count(piece) * itemsize
    written = 0
    for output in program.outputs:
        size = dtype_of(output.dtype).itemsize
        low = tuple(a // r for a, r in zip(lo, output.ratio, strict=True))
        high = tuple(-(-b // r) for b, r in zip(hi, output.ratio, strict=True))
        more, elements = _ranges(output.scatter, output.shape, low, high)
        requests, written = requests + more, written + elements * size
        for piece in output.zeros if last else ():
            requests, written = requests + _region_ranges(piece), written + count(piece) * size
    return prod(b - a for a, b in zip(lo, hi, strict=True)) * itemsize, requests, read, written


def _ranges(pieces: Iterable[Piece], shape: Shape, lo: Shape, hi: Shape) -> tuple[int, int]:
    """Contiguous file ranges and elements of the pieces inside ``[lo, hi)``."""
    boxes = _aligned(pieces, shape)
    for axis, (a, b) in enumerate(zip(lo, hi, strict=True)):
        if (a, b) != (0, shape[axis]):
            boxes = [part for box in boxes for part in select(box, axis, a, b)]
    requests = elements = 0
    for box in boxes:
        size = prod(d[1] for d in box.dims)
        requests, elements = requests + size // _run(box), elements + size
    return requests, elements


def _region_ranges(piece: Piece) -> int:
    """Contiguous ranges of a region (``dst`` strides 0)."""
    run = 1
    for extent, _, src in sorted(piece.dims, key=lambda d: d[2]):
        if src != run:
            break
        run *= extent
    return count(piece) // run


def _pack(nbytes: np.ndarray[tuple[int], np.dtype[np.int64]], tile_bytes: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Start of each tile: consecutive items until the next would overfill it."""
    first, filled = [0], 0
    for i, size in enumerate(nbytes.tolist()):
        if filled and filled + size > tile_bytes:
            first.append(i)
            filled = 0
        filled += size
    return np.array([*first, len(nbytes)] if len(nbytes) else [0], dtype=np.int64)
