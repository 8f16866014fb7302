"""Moves: a box of a tensor as strided bytes in memory and in a file, and the general way to copy between the two.

1. `local` brings a `Box` into bytes: memory offsets relative to a strip buffer that holds ``[lo, hi)`` row-major, file
   offsets relative to the operand. Dims are sorted by file stride, largest first, made ascending in the file, and
   merged where both sides allow it.
2. `dense` says how many of the innermost dims are contiguous in the file.
3. `copy` copies any strided bytes between two buffers: `numpy.copyto` between two strided views, block by block where
   the two sides run along different axes. Strides may be negative or zero; numpy refuses a view that leaves its buffer.

Boundary: arithmetic and memory; no file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import numpy as np

from ..planner.tensor.pieces import FILL, Box, row_strides

__all__ = ["Dim", "Move", "copy", "dense", "local", "merge", "offsets"]

Dim = tuple[int, int, int]
"""``(extent, file stride, memory stride)`` in bytes."""

Shape = tuple[int, ...]


class Move(NamedTuple):
    """``memory[mem + Σ iₖ·memₖ] = file[file + Σ iₖ·fileₖ]`` for elements of `size` bytes; file strides ≥ 0, descending."""

    slot: int
    file: int
    mem: int
    dims: tuple[Dim, ...]
    size: int

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return prod(dim[0] for dim in self.dims) * self.size


def local(box: Box, lo: Shape, hi: Shape, size: int) -> Move:
    """The box as a move to or from a row-major buffer that holds the coordinates ``[lo, hi)``.

    >>> local(Box(0, (2, 0), 7, ((0, 2, 1, 4), (1, 4, 1, 1))), (2, 0), (4, 4), 2)
    Move(slot=0, file=14, mem=0, dims=((8, 2, 2),), size=2)
    """
    strides = row_strides(tuple(b - a for a, b in zip(lo, hi, strict=True)))
    mem = sum((c - a) * s for c, a, s in zip(box.start, lo, strides, strict=True)) * size
    file = box.src_off * size
    dims: list[Dim] = []
    for axis, extent, step, src in box.dims:
        in_file, in_memory = src * size, step * strides[axis] * size
        if extent == 1:
            continue
        if in_file < 0:
            file += (extent - 1) * in_file
            mem += (extent - 1) * in_memory
            in_file, in_memory = -in_file, -in_memory
        dims.append((extent, in_file, in_memory))
    dims.sort(key=lambda dim: (dim[1], dim[2]), reverse=True)
    return Move(box.slot, 0 if box.slot == FILL else file, mem, merge(dims), size)


def merge(dims: Sequence[Dim]) -> tuple[Dim, ...]:
    """Neighbouring dims that both sides walk as one."""
    merged: list[Dim] = []
    for dim in dims:
        if merged and merged[-1][1] == dim[0] * dim[1] and merged[-1][2] == dim[0] * dim[2]:
            merged[-1] = (merged[-1][0] * dim[0], dim[1], dim[2])
        else:
            merged.append(dim)
    return tuple(merged)


def dense(dims: Sequence[Dim], size: int) -> tuple[int, int]:
    """How many leading dims are left outside the contiguous file range, and the bytes of that range.

    >>> dense(((3, 100, 8), (4, 2, 24)), 2)
    (1, 8)
    """
    outside = len(dims)
    while outside and dims[outside - 1][1] == size:
        outside -= 1
        size *= dims[outside][0]
    return outside, size


def offsets(dims: Sequence[Dim], file: int = 0, mem: int = 0) -> Iterator[tuple[int, int]]:
    """``(file, memory)`` offsets of every index, the last dim fastest."""
    if not dims:
        yield file, mem
    elif len(dims) == 1:
        extent, in_file, in_memory = dims[0]
        for i in range(extent):
            yield file + i * in_file, mem + i * in_memory
    else:
        extent, in_file, in_memory = dims[0]
        for i in range(extent):
            yield from offsets(dims[1:], file + i * in_file, mem + i * in_memory)


_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_ALONG_SOURCE, _ALONG_TARGET = 512, 8
"""Elements of one block of a transpose. Measured: model matrices have strides of a power of two, whose lines share a few
places of the cache; narrow blocks are five times faster there than numpy's own order, and not slower elsewhere."""

Array = np.ndarray[tuple[int, ...], np.dtype[np.unsignedinteger]]


def copy(dims: Sequence[Dim], size: int, dst: memoryview, dst_off: int, src: memoryview, src_off: int) -> None:
    """Copy elements of `size` bytes; each dim is ``(extent, source stride, destination stride)`` in bytes."""
    shape = [dim[0] for dim in dims]
    word = _WORDS[size]
    source: Array = np.ndarray(shape, word, src, src_off, [dim[1] for dim in dims])
    target: Array = np.ndarray(shape, word, dst, dst_off, [dim[2] for dim in dims])
    if (axes := _transposed(dims)) is None:
        np.copyto(target, source)
        return
    index = [slice(None)] * len(dims)
    for i in range(0, shape[axes[0]], _ALONG_SOURCE):
        index[axes[0]] = slice(i, i + _ALONG_SOURCE)
        for j in range(0, shape[axes[1]], _ALONG_TARGET):
            index[axes[1]] = slice(j, j + _ALONG_TARGET)
            at = tuple(index)
            np.copyto(target[at], source[at])


def _transposed(dims: Sequence[Dim]) -> tuple[int, int] | None:
    """The dims that run fastest in the source and in the target, where they differ and are long enough to cut."""
    if len(dims) < 2:
        return None
    in_source = min(range(len(dims)), key=lambda k: abs(dims[k][1]) or sys.maxsize)
    in_target = min(range(len(dims)), key=lambda k: abs(dims[k][2]) or sys.maxsize)
    if in_source == in_target or dims[in_source][0] < _ALONG_TARGET or dims[in_target][0] <= _ALONG_TARGET:
        return None
    return in_source, in_target
