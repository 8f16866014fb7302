"""Transfers: how a move is carried out by file calls, decided once and obeyed for every row of a binding.

Reading (file → strip buffer), the first that applies:

1. **fill**: elements of no operand are set to zero.
2. **direct**: the contiguous file range is contiguous in memory too: `pread` straight into place.
3. **vector**: a contiguous file range whose memory runs are long: `preadv` scatters it. The one fast path; switched off
   with `VECTOR`, and a test shows that it equals the general way. Measured: below 16 KiB a run, the cost of one Python
   buffer object per run exceeds the copy that it saves.
4. **stage**, the general way: read the file range that covers a block into the staging buffer, then copy strided.
   Gaps of up to 8 KiB between runs are read and skipped, for that is cheaper than another call; larger gaps end the
   block. Where the gaps of one move are the runs of another, as in a fused tensor, one reading serves both (`shared`).

Writing (strip buffer → file), never reading first and never touching a byte between runs:

1. **direct**: contiguous in both: written from the strip buffer.
2. **stage**: a block is copied to staging in file order, then each contiguous file run is written.

A block never exceeds the staging buffer; a dim that is too long is cut into equal blocks and a remainder.

Boundary: `read_steps`, `shared` and `write_steps` are pure; `gather` and `scatter` do IO through the two callables they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from math import prod
from typing import NamedTuple

from ..planner.tensor.pieces import FILL
from .move import Dim, Move, copy, dense, offsets

__all__ = ["VECTOR", "Read", "ReadStep", "Write", "WriteStep", "gather", "read_steps", "scatter", "shared", "write_steps"]

VECTOR = True
"""Whether `preadv` may scatter; off, every such read takes the general way."""

DIRECT_MIN = 16 << 10
"""Shortest run, of several, that is worth a call of its own."""
VECTOR_MIN = 16 << 10
"""Shortest memory run for which a vectored read beats staging."""
VECTOR_MAX = 1024
"""Most buffers in one vectored read (IOV_MAX)."""
GAP = 8 << 10
"""Longest gap between runs that is read rather than skipped with another call."""

Read = Callable[[int, Sequence[memoryview]], None]
"""Fill the buffers from a file offset on."""
Write = Callable[[int, memoryview], None]


class ReadStep(NamedTuple):
    """For each index of `outer`: read `nbytes` at the file offset and bring them to memory by `kind` and `inner`.

    `more` are further parts of what is staged: offset in the staging buffer, offset in memory from `mem` on, dims.
    """

    kind: str
    outer: tuple[Dim, ...]
    file: int
    mem: int
    nbytes: int
    inner: tuple[Dim, ...]
    size: int
    more: tuple[tuple[int, int, tuple[Dim, ...]], ...] = ()


class WriteStep(NamedTuple):
    """For each index of `outer`: pack `inner` from memory into staging unless direct, then write each of `runs`."""

    kind: str
    outer: tuple[Dim, ...]
    file: int
    mem: int
    nbytes: int
    inner: tuple[Dim, ...]
    runs: tuple[Dim, ...]
    size: int


def read_steps(move: Move, staging: int) -> list[ReadStep]:
    """How to read a move through a staging buffer of that many bytes."""
    size, dims = move.size, move.dims
    if move.slot == FILL:
        return [ReadStep("fill", (), 0, move.mem, move.nbytes, dims, size)]
    outside, nbytes = dense(dims, size)
    run = _run(dims, size)
    if run == nbytes and (not outside or run >= DIRECT_MIN):
        return [ReadStep("direct", dims[:outside], move.file, move.mem, nbytes, (), size)]
    if VECTOR and nbytes > run >= VECTOR_MIN and run > size and all(dim[1] for dim in dims):
        return [ReadStep("vector", dims[:outside], move.file, move.mem, nbytes, (*dims[outside:-1], (1, run, run)), size)]
    return _staged_reads(move, staging)


def _run(dims: Sequence[Dim], size: int) -> int:
    """Bytes of the innermost run that is contiguous in file and memory."""
    return size * dims[-1][0] if dims and dims[-1][1] == dims[-1][2] == size else size


def _staged_reads(move: Move, staging: int) -> list[ReadStep]:
    size = extent = move.size
    dims = [dim for dim in move.dims if dim[1]]
    still = [dim for dim in move.dims if not dim[1]]  # one element of the file for many in memory
    outside = len(dims)
    while outside:
        count, stride, in_memory = dims[outside - 1]
        if stride - extent > GAP:
            break
        block = 1 + max(0, staging - extent) // stride
        if block < count:
            if block == 1:
                break
            inner = (*dims[outside:], *still)
            outer = tuple(dims[: outside - 1])
            whole, rest = divmod(count, block)
            reach = extent + (block - 1) * stride
            steps = [_stage((*outer, (whole, block * stride, block * in_memory)), move, reach, ((block, stride, in_memory), *inner))]
            if rest:
                after = move._replace(file=move.file + whole * block * stride, mem=move.mem + whole * block * in_memory)
                steps.append(_stage(outer, after, extent + (rest - 1) * stride, ((rest, stride, in_memory), *inner)))
            return steps
        extent += (count - 1) * stride
        outside -= 1
    return [ReadStep("stage", tuple(dims[:outside]), move.file, move.mem, extent, (*dims[outside:], *still), size)]


def _stage(outer: tuple[Dim, ...], move: Move, nbytes: int, inner: tuple[Dim, ...]) -> ReadStep:
    return ReadStep("stage", outer, move.file, move.mem, nbytes, inner, move.size)


def shared(steps: Sequence[ReadStep], staging: int) -> list[ReadStep]:
    """Steps of one operand by file offset; those that stage overlapping ranges of at most the staging buffer are one."""
    found: list[ReadStep] = []
    for step in sorted(steps, key=lambda step: step.file):
        first = found[-1] if found else step
        end = max(first.file + first.nbytes, step.file + step.nbytes) - first.file
        overlap = found and step.file < first.file + first.nbytes
        if overlap and first.kind == step.kind == "stage" and first.outer == step.outer and end <= staging:
            part = step.file - first.file, step.mem - first.mem, step.inner
            found[-1] = first._replace(nbytes=end, more=(*first.more, part))
        else:
            found.append(step)
    return found


def gather(step: ReadStep, read: Read, base: int, strip: memoryview, staging: memoryview, zeros: memoryview) -> int:
    """Carry out one step for an operand at byte `base`; bytes read."""
    kind, nbytes, inner = step.kind, step.nbytes, step.inner
    if kind == "fill":
        # Source strides of 0 repeat one zero element.
        copy([(n, 0, m) for n, _, m in inner], step.size, strip, step.mem, zeros, 0)
        return 0
    calls = 0
    for file, mem in offsets(step.outer, base + step.file, step.mem):
        calls += 1
        if kind == "direct":
            read(file, (strip[mem : mem + nbytes],))
        elif kind == "stage":
            read(file, (staging[:nbytes],))
            copy(inner, step.size, strip, mem, staging, 0)
            for at, to, dims in step.more:
                copy(dims, step.size, strip, mem + to, staging, at)
        else:
            _read_scattered(step, read, file, mem, strip)
    return calls * nbytes


def _read_scattered(step: ReadStep, read: Read, file: int, mem: int, strip: memoryview) -> None:
    run = step.inner[-1][1]
    places = offsets(step.inner[:-1], 0, mem)
    while batch := [strip[at : at + run] for _, at in islice(places, VECTOR_MAX)]:
        read(file, batch)
        file += run * len(batch)


def write_steps(move: Move, staging: int) -> list[WriteStep]:
    """How to write a move through a staging buffer of that many bytes."""
    size, dims = move.size, move.dims
    if move.slot == FILL:
        return []
    outside, nbytes = dense(dims, size)
    if _run(dims, size) == nbytes and (not outside or nbytes >= DIRECT_MIN):
        return [WriteStep("direct", dims[:outside], move.file, move.mem, nbytes, (), (), size)]
    packed, inside = size, len(dims)
    while inside and packed * dims[inside - 1][0] <= staging:
        inside -= 1
        packed *= dims[inside][0]
    steps = []
    at = move
    blocks = [(1, dims[:inside], dims[inside:])]
    if inside and (block := staging // packed) > 1:
        count, in_file, in_memory = dims[inside - 1]
        whole, rest = divmod(count, block)
        outer = (*dims[: inside - 1], (whole, block * in_file, block * in_memory))
        blocks = [(whole * block, outer, ((block, in_file, in_memory), *dims[inside:]))]
        if rest:
            blocks.append((rest, dims[: inside - 1], ((rest, in_file, in_memory), *dims[inside:])))
    for count, outer, inner in blocks:
        steps.append(_pack(at, outer, inner))
        if inside:
            at = at._replace(file=at.file + count * dims[inside - 1][1], mem=at.mem + count * dims[inside - 1][2])
    return steps


def _pack(move: Move, outer: tuple[Dim, ...], inner: tuple[Dim, ...]) -> WriteStep:
    """One block: memory → staging in file order, then one write per contiguous file run."""
    outside, nbytes = dense(inner, move.size)
    packing, stride = [], move.size
    for count, _, in_memory in reversed(inner):
        packing.append((count, in_memory, stride))
        stride *= count
    packing.reverse()
    runs = tuple((count, in_file, to) for (count, in_file, _), (_, _, to) in zip(inner[:outside], packing, strict=False))
    return WriteStep("stage", outer, move.file, move.mem, nbytes, tuple(packing), runs, move.size)


def scatter(step: WriteStep, write: Write, base: int, strip: memoryview, staging: memoryview) -> int:
    """Carry out one step for an operand at byte `base`; bytes written."""
    nbytes = step.nbytes
    written = 0
    for file, mem in offsets(step.outer, base + step.file, step.mem):
        if step.kind == "direct":
            write(file, strip[mem : mem + nbytes])
            written += nbytes
            continue
        copy(step.inner, step.size, staging, 0, strip, mem)
        for to, at in offsets(step.runs, file):
            write(to, staging[at : at + nbytes])
        written += nbytes * prod(dim[0] for dim in step.runs)
    return written
