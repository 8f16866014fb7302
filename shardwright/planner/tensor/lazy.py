"""Lazy tensors: a shape, a dtype and disjoint pieces that cover it.

Every operation returns a new lazy tensor and touches no data. Reshape changes the shape alone; the others bring each
piece to coordinates with `align`, rewrite those, and flatten back. Layout operations applied to a lazy tensor whose
leaves are themselves lazy compose by construction, so a stored tensor can be followed through any chain to its file.

`invert` swaps the sides: a stored tensor as a layout of hub tensors becomes each hub tensor as a layout of stored ones.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from ...errors import UsageError
from .pieces import FILL, Box, Piece, align, coalesce, count, flatten, normalise, select, thin

__all__ = ["LazyTensor", "concat", "fill", "invert", "leaf", "stack"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is only described.

    Attributes
    ----------
    shape
        In elements.
    pieces
        Disjoint, sorted by destination, covering ``[0, size)``.
    """

    shape: Shape
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def reshape(self, *shape: int) -> LazyTensor:
        """The same elements under another shape; one extent may be -1."""
        if -1 in shape:
            known = prod(n for n in shape if n != -1)
            shape = tuple(self.size // known if n == -1 and known else n for n in shape)
        if prod(shape) != self.size:
            raise UsageError("reshape changes the number of elements", expected=self.shape, actual=shape)
        return LazyTensor(shape, self.pieces)

    def permute(self, *axes: int) -> LazyTensor:
        """Axes in the given order, as ``numpy.transpose``."""
        if sorted(axes) != list(range(len(self.shape))):
            raise UsageError("permute needs each axis once", expected=tuple(range(len(self.shape))), actual=axes)
        where = {axis: k for k, axis in enumerate(axes)}
        shape = tuple(self.shape[axis] for axis in axes)
        moved = [
            Box(b.slot, tuple(b.start[axis] for axis in axes), b.src_off, tuple((where[k], n, m, s) for k, n, m, s in b.dims))
            for b in self._boxes()
        ]
        return _from_boxes(shape, moved)

    @property
    def T(self) -> LazyTensor:
        """Axes reversed."""
        return self.permute(*reversed(range(len(self.shape))))

    def slice(self, axis: int, start: int, stop: int, step: int = 1) -> LazyTensor:
        """Elements ``range(start, stop, step)`` of one axis; `step` may be negative, both ends as in `range`.

        Raises
        ------
        UsageError
            The range leaves the axis.
        """
        wanted = range(start, stop, step)
        extent = self.shape[axis]
        if wanted and not (0 <= wanted[0] < extent and 0 <= wanted[-1] < extent):
            raise UsageError(f"slice leaves axis {axis}", expected=f"within [0, {extent})", actual=(start, stop, step))
        shape = (*self.shape[:axis], len(wanted), *self.shape[axis + 1 :])
        if not wanted or not self.size:
            return LazyTensor(shape, ())
        lo, hi = min(wanted[0], wanted[-1]), max(wanted[0], wanted[-1]) + 1
        boxes = [part for box in self._boxes(axis, lo, hi) for part in select(box, axis, lo, hi)]
        if abs(step) > 1:
            boxes = [part for box in boxes for part in thin(box, axis, lo, abs(step))]
        place = _flipped if step < 0 else _shifted
        return _from_boxes(shape, [place(box, axis, lo, hi - 1, abs(step)) for box in boxes])

    def split(self, axis: int, sizes: Sequence[int]) -> list[LazyTensor]:
        """Consecutive slices of the given sizes, which must add up to the axis."""
        if sum(sizes) != self.shape[axis]:
            raise UsageError(f"split sizes do not add up to axis {axis}", expected=self.shape[axis], actual=tuple(sizes))
        parts, at = [], 0
        for size in sizes:
            parts.append(self.slice(axis, at, at + size))
            at += size
        return parts

    def chunk(self, axis: int, parts: int) -> list[LazyTensor]:
        """`parts` equal slices; the axis must divide."""
        if self.shape[axis] % parts:
            raise UsageError(f"axis {axis} of {self.shape} does not divide into {parts} parts")
        return self.split(axis, [self.shape[axis] // parts] * parts)

    def pad(self, axis: int, before: int, after: int) -> LazyTensor:
        """Zeros before and after along one axis."""
        sides = [fill((*self.shape[:axis], n, *self.shape[axis + 1 :])) for n in (before, after)]
        return concat([sides[0], self, sides[1]], axis)

    def expand(self, axis: int, extent: int) -> LazyTensor:
        """An axis of extent 1 repeated `extent` times."""
        if self.shape[axis] != 1:
            raise UsageError(f"expand needs extent 1 on axis {axis}", actual=self.shape)
        shape = (*self.shape[:axis], extent, *self.shape[axis + 1 :])
        if extent == 0:
            return LazyTensor(shape, ())
        return _from_boxes(shape, [b._replace(dims=(*b.dims, (axis, extent, 1, 0))) for b in self._boxes()])

    def _boxes(self, axis: int = 1, lo: int = 0, hi: int | None = None) -> list[Box]:
        """All pieces in coordinates; for a range of axis 0 only the pieces that can touch it."""
        pieces: Sequence[Piece] = self.pieces
        if axis == 0 and hi is not None:
            row = self.size // self.shape[0]
            end = bisect_left(pieces, hi * row, key=lambda p: p.dst_off)
            pieces = [p for p in pieces[:end] if p.dst_off + sum((n - 1) * d for n, d, _ in p.dims) >= lo * row]
        return [box for piece in pieces for box in align(piece, self.shape)]


def _shifted(box: Box, axis: int, lo: int, last: int, step: int) -> Box:
    """Coordinates on `axis` become ``(c - lo) // step``."""
    start = (*box.start[:axis], (box.start[axis] - lo) // step, *box.start[axis + 1 :])
    return box._replace(start=start, dims=tuple((k, n, m // step if k == axis else m, s) for k, n, m, s in box.dims))


def _flipped(box: Box, axis: int, lo: int, last: int, step: int) -> Box:
    """Coordinates on `axis` become ``(last - c) // step``; the box is walked backwards there."""
    back = [(n, m, s) for k, n, m, s in box.dims if k == axis]
    end = box.start[axis] + sum((n - 1) * m for n, m, _ in back)
    start = (*box.start[:axis], (last - end) // step, *box.start[axis + 1 :])
    dims = tuple((k, n, m // step, -s) if k == axis else (k, n, m, s) for k, n, m, s in box.dims)
    return box._replace(start=start, src_off=box.src_off + sum((n - 1) * s for n, _, s in back), dims=dims)


def _from_boxes(shape: Shape, boxes: Sequence[Box]) -> LazyTensor:
    return LazyTensor(shape, coalesce(flatten(box, shape) for box in boxes))


def leaf(slot: int, shape: Shape, strides: Shape | None = None, offset: int = 0) -> LazyTensor:
    """Operand `slot` itself, row-major, or strided (a view of a storage).

    >>> leaf(0, (2, 3)).pieces
    (Piece(slot=0, dst_off=0, src_off=0, dims=((6, 1, 1),)),)
    """
    if 0 in shape:
        return LazyTensor(shape, ())
    if strides is None:
        size = prod(shape)
        return LazyTensor(shape, (Piece(slot, 0, offset, ((size, 1, 1),) if size > 1 else ()),))
    box = Box(slot, (0,) * len(shape), offset, tuple((k, n, 1, s) for k, (n, s) in enumerate(zip(shape, strides, strict=True))))
    return LazyTensor(shape, (flatten(box, shape),))


def fill(shape: Shape) -> LazyTensor:
    """Zeros."""
    size = prod(shape)
    return LazyTensor(shape, (normalise(Piece(FILL, 0, 0, ((size, 1, 0),))),) if size else ())


def concat(tensors: Sequence[LazyTensor], axis: int) -> LazyTensor:
    """Tensors joined along an axis; the other extents must agree."""
    first = tensors[0].shape
    for tensor in tensors:
        if (*tensor.shape[:axis], *tensor.shape[axis + 1 :]) != (*first[:axis], *first[axis + 1 :]):
            raise UsageError(f"concat along axis {axis}: the other extents differ", expected=first, actual=tensor.shape)
    shape = (*first[:axis], sum(t.shape[axis] for t in tensors), *first[axis + 1 :])
    inner = prod(shape[axis + 1 :])
    if all(n == 1 for n in shape[:axis]):  # whole tensors follow each other: no coordinates needed
        pieces, at = [], 0
        for tensor in tensors:
            pieces += [p._replace(dst_off=p.dst_off + at) for p in tensor.pieces]
            at += tensor.shape[axis] * inner
        return LazyTensor(shape, coalesce(pieces))
    boxes, begin = [], 0
    for tensor in tensors:
        boxes += [b._replace(start=(*b.start[:axis], b.start[axis] + begin, *b.start[axis + 1 :])) for b in tensor._boxes()]
        begin += tensor.shape[axis]
    return _from_boxes(shape, boxes)


def stack(tensors: Sequence[LazyTensor], axis: int) -> LazyTensor:
    """Tensors of one shape along a new axis."""
    shape = tensors[0].shape
    return concat([t.reshape(*t.shape[:axis], 1, *t.shape[axis:]) if t.shape == shape else t for t in tensors], axis)


def invert(tensor: LazyTensor, slot: int, shapes: Sequence[Shape]) -> list[LazyTensor]:
    """Each operand of `tensor` as a layout of `tensor` itself, which becomes operand `slot`.

    Parameters
    ----------
    tensor
        A layout of ``len(shapes)`` operands. Fill pieces are skipped: they come from no operand.
    slot
        Slot number that `tensor` gets in the results.
    shapes
        Shape of each operand.

    Raises
    ------
    UsageError
        An operand's element appears twice (`expand`), or an operand is not covered.
    """
    found: list[list[Piece]] = [[] for _ in shapes]
    for piece in tensor.pieces:
        if piece.slot == FILL:
            continue
        if any(src == 0 for _, _, src in piece.dims):
            raise UsageError("an expanded tensor cannot be inverted", actual=tensor.shape)
        swapped = Piece(slot, piece.src_off, piece.dst_off, tuple((n, s, d) for n, d, s in piece.dims))
        found[piece.slot].append(swapped)
    inverses = [LazyTensor(shape, coalesce(pieces)) for shape, pieces in zip(shapes, found, strict=True)]
    for inverse in inverses:
        if sum(map(count, inverse.pieces)) != inverse.size:
            raise UsageError("the layout does not cover its operand", expected=inverse.size, actual=sum(map(count, inverse.pieces)))
    return inverses
