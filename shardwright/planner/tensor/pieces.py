"""Pieces: flat strided copies, the one vocabulary in which every layout change is written.

A `Piece` says which elements of a tensor come from where: both sides are *flat row-major element offsets*, so reshape is
free, and a piece's two sides are symmetric. Algorithm, in the order the functions appear:

1. `normalise` brings one piece to its simplest form: extents above 1, destination strides positive and descending,
   neighbouring dims merged where both sides allow it. `coalesce` sorts pieces and joins those that continue each other.
2. `align` splits a piece until each dim moves along one logical axis of a shape *without carry*. The result is a `Box`:
   per-axis coordinates instead of flat offsets. A dim that carries is factored where its period divides it (a reshape
   of whole rows), else cut where it leaves the axis; a dim that moves diagonally is unrolled by its period.
3. `select` keeps the part of a box inside a coordinate range, `thin` every n-th coordinate; `flatten` turns a box back
   into a piece of any shape that has those axes.

Boundary: pure integers; no dtype, no file, no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from math import gcd, prod
from typing import NamedTuple

__all__ = ["FILL", "Box", "Dim", "Piece", "align", "coalesce", "count", "flatten", "normalise", "row_strides", "select", "thin"]

FILL = -1
"""The slot of elements that come from no operand: they are zero."""

Dim = tuple[int, int, int]
"""``(extent, dst_stride, src_stride)``, in elements."""

Shape = tuple[int, ...]


class Piece(NamedTuple):
    """``dst[dst_off + Σ iₖ·dst_strideₖ] = operand[slot][src_off + Σ iₖ·src_strideₖ]`` for all ``0 ≤ iₖ < extentₖ``."""

    slot: int
    dst_off: int
    src_off: int
    dims: tuple[Dim, ...] = ()


class Box(NamedTuple):
    """A piece in coordinates of a shape: `dims` are ``(axis, extent, step, src_stride)``, outermost first."""

    slot: int
    start: Shape
    src_off: int
    dims: tuple[tuple[int, int, int, int], ...]


def count(piece: Piece) -> int:
    """Elements moved by the piece."""
    return prod(dim[0] for dim in piece.dims)


def row_strides(shape: Shape) -> Shape:
    """Row-major strides in elements.

    >>> row_strides((2, 3, 4))
    (12, 4, 1)
    """
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


def normalise(piece: Piece) -> Piece:
    """The same copy in its simplest form.

    >>> normalise(Piece(0, 0, 0, ((2, 6, 6), (3, 2, 2), (2, 1, 1))))
    Piece(slot=0, dst_off=0, src_off=0, dims=((12, 1, 1),))
    >>> normalise(Piece(0, 3, 0, ((4, -1, 1),)))
    Piece(slot=0, dst_off=0, src_off=3, dims=((4, 1, -1),))
    """
    dst_off, src_off, dims = piece.dst_off, piece.src_off, []
    for extent, dst, src in piece.dims:
        if extent == 1:
            continue
        if dst < 0:
            dst_off += (extent - 1) * dst
            src_off += (extent - 1) * src
            dst, src = -dst, -src
        dims.append((extent, dst, src))
    dims.sort(key=_by_dst_stride, reverse=True)
    merged: list[Dim] = []
    for dim in dims:
        if merged and merged[-1][1] == dim[0] * dim[1] and merged[-1][2] == dim[0] * dim[2]:
            merged[-1] = (merged[-1][0] * dim[0], dim[1], dim[2])
        else:
            merged.append(dim)
    return Piece(piece.slot, dst_off, src_off, tuple(merged))


def _by_dst_stride(dim: Dim) -> int:
    return dim[1]


def coalesce(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """Normalise, sort by destination, and join pieces that continue each other.

    >>> coalesce([Piece(0, 4, 4, ((4, 1, 1),)), Piece(0, 0, 0, ((4, 1, 1),))])
    (Piece(slot=0, dst_off=0, src_off=0, dims=((8, 1, 1),)),)
    """
    done: list[Piece] = []
    for piece in sorted(map(normalise, pieces), key=lambda p: p.dst_off):
        while done and (joined := _join(done[-1], piece)) is not None:
            done.pop()
            piece = joined
        done.append(piece)
    return tuple(done)


def _join(first: Piece, second: Piece) -> Piece | None:
    """One piece for both, if `second` continues the outermost dim of `first` or repeats `first` further on."""
    if first.slot != second.slot:
        return None
    dst_gap, src_gap = second.dst_off - first.dst_off, second.src_off - first.src_off
    if first.dims:
        (extent, dst, src), inner = first.dims[0], first.dims[1:]
        continues = dst_gap == extent * dst and src_gap == extent * src
        if continues and second.dims and second.dims[0][1:] == (dst, src) and second.dims[1:] == inner:
            return normalise(first._replace(dims=((extent + second.dims[0][0], dst, src), *inner)))
        if continues and second.dims == inner:
            return normalise(first._replace(dims=((extent + 1, dst, src), *inner)))
    if first.dims == second.dims and dst_gap > sum((n - 1) * d for n, d, _ in first.dims):
        return normalise(first._replace(dims=((2, dst_gap, src_gap), *first.dims)))
    return None


def align(piece: Piece, shape: Shape, spend: Callable[[int], None] | None = None) -> list[Box]:
    """Split the piece into boxes of `shape`: each dim moves along one axis and never carries into the next.

    `spend` is told how many pieces the next step makes, before it is taken: a diagonal may fall apart into as many pieces
    as it has elements.

    >>> align(Piece(0, 0, 5, ((12, 1, 1),)), (3, 4))
    [Box(slot=0, start=(0, 0), src_off=5, dims=((0, 3, 1, 4), (1, 4, 1, 1)))]
    """
    strides = row_strides(shape)
    axes = [k for k, extent in enumerate(shape) if extent > 1]
    boxes: list[Box] = []
    work = [normalise(piece)]
    while work:
        at = work.pop()
        if spend is not None:
            spend(1 + _unrolled(at, strides, axes))
        found = _align_once(at, shape, strides, axes)
        if isinstance(found, Box):
            boxes.append(found)
        else:
            work.extend(found)
    boxes.sort(key=lambda b: b.start)
    return boxes


def _align_once(piece: Piece, shape: Shape, strides: Shape, axes: list[int]) -> Box | list[Piece]:
    """The box of the piece, or two or more smaller pieces (or one with a factored dim) to try again."""
    start = tuple((piece.dst_off // stride) % extent if extent > 1 else 0 for stride, extent in zip(strides, shape, strict=True))
    span = [0] * len(shape)
    dims = []
    for index in range(len(piece.dims) - 1, -1, -1):
        extent, dst, src = piece.dims[index]
        axis = next(k for k in axes if strides[k] <= dst)
        step, diagonal = divmod(dst, strides[axis])
        if diagonal:
            return _unroll(piece, index, strides[axis] // gcd(dst, strides[axis]))
        room = shape[axis] - 1 - start[axis] - span[axis]
        if (extent - 1) * step > room:
            period = shape[axis] // step if shape[axis] % step == 0 else 0
            if period and start[axis] + span[axis] < step:
                if extent % period == 0:
                    factored = ((extent // period, dst * period, src * period), (period, dst, src))
                    return [piece._replace(dims=piece.dims[:index] + factored + piece.dims[index + 1 :])]
                return _split(piece, index, extent // period * period)
            return _split(piece, index, room // step + 1)
        span[axis] += (extent - 1) * step
        dims.append((axis, extent, step, src))
    return Box(piece.slot, start, piece.src_off, tuple(reversed(dims)))


def _unrolled(piece: Piece, strides: Shape, axes: list[int]) -> int:
    """Pieces into which one step of `align` may unroll a diagonal dim."""
    most = 0
    for extent, dst, _ in piece.dims:
        stride = next(strides[k] for k in axes if strides[k] <= dst)
        if dst % stride:
            most = max(most, min(extent, stride // gcd(dst, stride)))
    return most


def _split(piece: Piece, index: int, at: int) -> list[Piece]:
    """Two pieces: dim `index` below and from `at`."""
    extent, dst, src = piece.dims[index]
    before, after = piece.dims[:index], piece.dims[index + 1 :]
    head = piece._replace(dims=(*before, (at, dst, src), *after))
    tail = Piece(piece.slot, piece.dst_off + at * dst, piece.src_off + at * src, (*before, (extent - at, dst, src), *after))
    return [normalise(head), normalise(tail)]


def _unroll(piece: Piece, index: int, period: int) -> list[Piece]:
    """One piece per residue of dim `index` modulo `period`."""
    extent, dst, src = piece.dims[index]
    before, after = piece.dims[:index], piece.dims[index + 1 :]
    return [
        normalise(
            Piece(
                piece.slot,
                piece.dst_off + r * dst,
                piece.src_off + r * src,
                (*before, ((extent - r + period - 1) // period, dst * period, src * period), *after),
            )
        )
        for r in range(min(period, extent))
    ]


def select(box: Box, axis: int, lo: int, hi: int) -> Iterator[Box]:
    """The parts of the box whose coordinate on `axis` lies in ``[lo, hi)``; coordinates keep their meaning.

    >>> b = Box(0, (0,), 0, ((0, 10, 1, 1),))
    >>> list(select(b, 0, 3, 5))
    [Box(slot=0, start=(3,), src_off=3, dims=((0, 2, 1, 1),))]
    """
    first = box.start[axis]
    span = sum((n - 1) * m for k, n, m, _ in box.dims if k == axis)
    if lo <= first and first + span < hi:
        yield box
        return
    if first + span < lo or first >= hi:
        return
    index = next(i for i, dim in enumerate(box.dims) if dim[0] == axis)
    _, extent, step, src = box.dims[index]
    inner = span - (extent - 1) * step
    rest = box.dims[:index] + box.dims[index + 1 :]
    touched = range(max(0, -((first + inner - lo) // step)), min(extent, (hi - 1 - first) // step + 1))
    whole = range(max(0, -((first - lo) // step)), min(extent, (hi - 1 - inner - first) // step + 1))
    if len(whole) > 1:
        kept = (axis, len(whole), step, src)
        yield _moved(box, axis, whole[0] * step, whole[0] * src)._replace(dims=(*box.dims[:index], kept, *box.dims[index + 1 :]))
    elif len(whole) == 1:
        yield _moved(box, axis, whole[0] * step, whole[0] * src)._replace(dims=rest)
    # Only the two ends: an axis may have any number of coordinates in between.
    ends = chain(range(touched.start, whole.start), range(whole.stop, touched.stop)) if len(whole) else touched
    for i in ends:
        yield from select(_moved(box, axis, i * step, i * src)._replace(dims=rest), axis, lo, hi)


def _moved(box: Box, axis: int, by: int, src: int) -> Box:
    return box._replace(start=(*box.start[:axis], box.start[axis] + by, *box.start[axis + 1 :]), src_off=box.src_off + src)


def thin(box: Box, axis: int, first: int, step: int) -> Iterator[Box]:
    """The parts of the box whose coordinate on `axis` is ``first`` modulo `step`."""
    for index, (k, extent, move, src) in enumerate(box.dims):
        period = step // gcd(move, step)
        if k == axis and period > 1:
            before, after = box.dims[:index], box.dims[index + 1 :]
            for r in range(min(period, extent)):
                kept = ((axis, (extent - r + period - 1) // period, move * period, src * period),)
                yield from thin(_moved(box, axis, r * move, r * src)._replace(dims=before + kept + after), axis, first, step)
            return
    if (box.start[axis] - first) % step == 0:
        yield box


def flatten(box: Box, shape: Shape) -> Piece:
    """The box as a piece of a tensor of `shape`, whose axes are the box's."""
    strides = row_strides(shape)
    offset = sum(c * s for c, s in zip(box.start, strides, strict=True))
    return normalise(Piece(box.slot, offset, box.src_off, tuple((n, m * strides[k], s) for k, n, m, s in box.dims)))
