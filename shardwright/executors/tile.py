"""One tile: for each item, for each strip box: gather, compare replicas, compute, scatter.

1. The lane's slab is cut into the buffers that the memory model counted: pivot strip, staging, compare strip, one strip
   per output, scratch.
2. Source pieces inside the box are read into the pivot strip. Each replica is read into the compare strip (which starts
   as a copy where the replica covers the box only in part) and must be equal, byte for byte; or it is averaged with the
   pivot (`averaging`), and how many elements differed goes into the receipt. A copy in a narrower dtype must be the pivot
   rounded (`rounding`).
3. The value op's kernel fills the output strips; without one the pivot strip is the output.
4. Each output's pieces inside the box are written to their targets. Where a target is memory, and the box goes to one run of
   it as it is, step 2 reads straight into that.
5. With the last box of a pivot its `zeros` are written, and its `padding` is read and classified: zeros, copies of the
   last real row, or other values. What was found goes into the receipt, not into the target. Padding that must be zero is
   refused where it is not.

Boundary: works through `SourceFiles` and a `Sink`, with a `Witness` between; knows tiles as lists of `Job` and nothing of
plans, lanes or clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from ..errors import PaddingError, ReplicaMismatchError
from ..planner.passes.memory import Slab, itemsize, slab, strips
from ..planner.plan import Program
from ..planner.tensor.pieces import FILL, align
from .arena import Buffer
from .averaging import Mean
from .compare import first_difference
from .extents import Extent, Sink, Witness
from .layouts import Layouts, Reads, Shape, Strip, Writes, extents_of, output_box
from .move import offsets
from .padding import Padding, all_zero, classify
from .rounding import Odd, Rounded
from .sources import SourceFiles
from .transfer import gather, scatter

if TYPE_CHECKING:
    import torch

__all__ = ["Job", "Memory", "Receipt", "Runner", "Stopped"]

Place = tuple[int, int]
"""``(file number, byte offset)``."""

Memory = Callable[[int], memoryview | None]

_ZEROS = bytes(256 << 10)


class Stopped(Exception):
    """The stop flag is set: no error, but another lane has one, or a signal came."""


class Job(NamedTuple):
    """An item with its operands' places."""

    program: int
    name: str
    lo: Shape
    hi: Shape
    sources: tuple[Place, ...]
    targets: tuple[Place, ...]


@dataclass(slots=True)
class Receipt:
    """What a tile (or a run) did.

    Attributes
    ----------
    padding
        By pivot tensor: what its padding held.
    averaged
        By pivot tensor whose copies were averaged: how many elements differed, where any did.
    extents
        A tile's: what it wrote, with checksums.
    sources
        A tile's: the source files that it read.
    """

    bytes_read: int = 0
    bytes_written: int = 0
    padding: dict[str, Padding] = field(default_factory=dict)
    extents: list[Extent] = field(default_factory=list)
    sources: frozenset[int] = frozenset()
    averaged: dict[str, int] = field(default_factory=dict)

    def add(self, other: Receipt) -> None:
        """Count another receipt's bytes, padding and averages in."""
        self.bytes_read += other.bytes_read
        self.bytes_written += other.bytes_written
        self.found(other)

    def found(self, other: Receipt) -> None:
        """Count in what another receipt says of padding and averages, as its bytes are not this run's."""
        self.padding.update(other.padding)
        for name, count in other.averaged.items():
            self.averaged[name] = self.averaged.get(name, 0) + count


class _Buffers(NamedTuple):
    pivot: memoryview
    staging: memoryview
    compare: memoryview
    outputs: tuple[memoryview, ...]
    scratch: memoryview
    mean: memoryview


class Runner:
    """Runs tiles, for any number of threads.

    Parameters
    ----------
    strip_bytes
        Pivot bytes of one strip.
    stopping
        Asked between strips; when it says yes, `Stopped` is raised.
    advance
        Told the bytes written after each strip.
    memory
        Gives a target file's own bytes, where it is memory that may be read into.
    """

    def __init__(
        self,
        layouts: Layouts,
        sources: SourceFiles,
        *,
        strip_bytes: int,
        stopping: Callable[[], bool] = lambda: False,
        advance: Callable[[int], None] = lambda nbytes: None,
        memory: Memory = lambda number: None,
    ) -> None:
        self.layouts = layouts
        self.sources = sources
        self.strip_bytes = strip_bytes
        self.stopping = stopping
        self.advance = advance
        self.memory = memory

    def run(self, jobs: Sequence[Job], sink: Sink, buffer: Buffer) -> Receipt:
        """Run one tile in a lane's slab.

        Raises
        ------
        ReplicaMismatchError
            Two copies differ.
        PaddingError
            Padding that must be zero is not.
        Stopped
            The stop flag was set; the tile is not complete.
        """
        receipt, witness = Receipt(), Witness(sink)
        memory = buffer.data
        for job in jobs:
            self._item(job, witness, memory, receipt)
        receipt.extents = witness.extents()
        receipt.sources = frozenset(number for job in jobs for number, _ in job.sources)
        return receipt

    def _item(self, job: Job, sink: Witness, memory: memoryview, receipt: Receipt) -> None:
        program = self.layouts.programs[job.program]
        elements = prod(b - a for a, b in zip(job.lo, job.hi, strict=True))
        buffers = _carve(memory, slab(program, self.strip_bytes, elements))
        last = None
        for lo, hi in strips(program, job.lo, job.hi, self.strip_bytes):
            if self.stopping():
                raise Stopped
            before = receipt.bytes_written
            self._strip(job, program, sink, lo, hi, buffers, receipt)
            self.advance(receipt.bytes_written - before)
            last = lo, hi
        if job.hi == program.shape:
            self._finish(job, program, sink, last, buffers, receipt)

    def _strip(self, job: Job, program: Program, sink: Witness, lo: Shape, hi: Shape, buffers: _Buffers, receipt: Receipt) -> None:
        steps: Strip = self.layouts.strip(job.program, lo, hi)
        nbytes = prod(b - a for a, b in zip(lo, hi, strict=True)) * itemsize(program.dtype)
        if program.op is None and (place := self._place(job, steps, nbytes)) is not None:
            receipt.bytes_read += self._gather(job, steps.gather, place, buffers.staging)
            receipt.bytes_written += nbytes
            return
        receipt.bytes_read += self._gather(job, steps.gather, buffers.pivot, buffers.staging)
        self._copies(job, program, steps, nbytes, lo, hi, buffers, receipt)
        sides: Sequence[memoryview] = [buffers.pivot] * len(steps.scatter)
        if program.op is not None:
            _compute(program, lo, hi, buffers)
            sides = buffers.outputs
        for writes, side in zip(steps.scatter, sides, strict=True):
            receipt.bytes_written += self._scatter(job, writes, sink, side, buffers.staging)

    def _copies(
        self, job: Job, program: Program, steps: Strip, nbytes: int, lo: Shape, hi: Shape, buffers: _Buffers, receipt: Receipt
    ) -> None:
        """Read the strip's other copies, and compare or average them."""
        mean = Mean(program.dtype, buffers.pivot[:nbytes], buffers.mean) if program.average else None
        for index, reads in enumerate(steps.replicas):
            if reads and (kind := program.replica_dtype(index)) != program.dtype:
                rounded = Rounded(program.dtype, kind, buffers.pivot[:nbytes], buffers.compare)
                if steps.partial[index]:
                    rounded.copy[:] = rounded.expected
                receipt.bytes_read += self._gather(job, reads, rounded.copy, buffers.staging)
                if (odd := rounded.first_difference()) is not None:
                    raise self._mismatch(job, program, index, lo, hi, odd.element, odd)
            elif reads:
                if steps.partial[index]:
                    buffers.compare[:nbytes] = buffers.pivot[:nbytes]
                receipt.bytes_read += self._gather(job, reads, buffers.compare, buffers.staging)
                if mean is not None:
                    mean.add(buffers.compare[:nbytes])
                elif (at := first_difference(buffers.pivot[:nbytes], buffers.compare[:nbytes])) is not None:
                    raise self._mismatch(job, program, index, lo, hi, at // itemsize(program.dtype))
        if mean is not None and (count := mean.finish()):
            receipt.averaged[job.name] = receipt.averaged.get(job.name, 0) + count

    def _place(self, job: Job, steps: Strip, nbytes: int) -> memoryview | None:
        """The target's own memory, if the strip is one run of it and nothing else is to be done."""
        if any(steps.replicas) or len(steps.scatter) != 1 or len(steps.scatter[0]) != 1:
            return None
        slot, step = steps.scatter[0][0]
        if (step.kind, step.outer, step.mem, step.nbytes) != ("direct", (), 0, nbytes):
            return None
        number, base = job.targets[slot]
        memory = self.memory(number)
        return None if memory is None else memory[base + step.file : base + step.file + nbytes]

    def _gather(self, job: Job, reads: Reads, strip: memoryview, staging: memoryview) -> int:
        total = 0
        zeros = memoryview(_ZEROS)
        for slot, steps in groupby(reads, itemgetter(0)):
            if slot == FILL:
                for _, step in steps:
                    gather(step, _no_file, 0, strip, staging, zeros)
                continue
            number, base = job.sources[slot]
            with self.sources.reading(number) as read:
                for _, step in steps:
                    total += gather(step, read, base, strip, staging, zeros)
        return total

    def _scatter(self, job: Job, writes: Writes, sink: Witness, strip: memoryview, staging: memoryview) -> int:
        total = 0
        for slot, steps in groupby(writes, itemgetter(0)):
            number, base = job.targets[slot]
            with sink.writing(number) as write:
                for _, step in steps:
                    total += scatter(step, write, base, strip, staging)
        return total

    def _finish(
        self, job: Job, program: Program, sink: Witness, last: tuple[Shape, Shape] | None, buffers: _Buffers, receipt: Receipt
    ) -> None:
        """Zeros and padding, once per pivot tensor, after its last strip."""
        before = receipt.bytes_written
        for output in program.outputs:
            for piece in output.zeros:
                number, base = job.targets[piece.slot]
                start, ranges, nbytes = extents_of(piece, itemsize(output.dtype))
                with sink.writing(number) as write:
                    for offset, _ in offsets(ranges, base + start):
                        for at in range(0, nbytes, len(_ZEROS)):
                            write(offset + at, memoryview(_ZEROS)[: nbytes - at])
                        receipt.bytes_written += nbytes
        self.advance(receipt.bytes_written - before)
        if program.padding:
            size = itemsize(program.dtype)
            row = prod(program.shape[1:]) * size
            real = _last_row(program, last, buffers.pivot, row, size)
            found = Padding()
            for piece in program.padding:
                number, base = job.sources[piece.slot]
                start, ranges, nbytes = extents_of(piece, size)
                with self.sources.reading(number) as read:
                    for offset, _ in offsets(ranges, base + start):
                        if piece.slot not in program.blank:
                            classify(found, read, offset, nbytes, row, real, buffers.staging)
                        elif not all_zero(read, offset, nbytes, buffers.staging):
                            raise self._not_blank(job, number, offset, nbytes)
                        receipt.bytes_read += nbytes
            if found.nbytes:
                receipt.padding[job.name] = found

    def _not_blank(self, job: Job, number: int, offset: int, nbytes: int) -> PaddingError:
        return PaddingError(
            "the padding of a flat partition is not zero, so its tensors do not end where their shapes say",
            tensor=job.name,
            file=self.sources.files[number].path,
            expected="zeros",
            actual=f"other values in bytes {offset} … {offset + nbytes - 1}",
            remedy="Copy the checkpoint again; a file of another run may lie in its place",
        )

    def _mismatch(
        self, job: Job, program: Program, replica: int, lo: Shape, hi: Shape, element: int, odd: Odd | None = None
    ) -> ReplicaMismatchError:
        """The error for an element of the strip, or for an odd one of a rounded copy: where it is, and the two files that disagree."""
        index, where = element, []
        for a, b in zip(reversed(lo), reversed(hi), strict=True):
            index, c = divmod(index, b - a)
            where.append(a + c)
        where.reverse()
        files, places = [], []
        for pieces in (program.gather, program.replicas[replica]):
            boxes = (box for piece in pieces for box in align(piece, program.shape) if _holds(box.start, box.dims, where))
            slot = next((box.slot for box in boxes), FILL)
            files.append("zeros" if slot == FILL else self.sources.files[job.sources[slot][0]].path)
            places += [] if slot == FILL else [job.sources[slot]]
        what = "two copies that must be equal differ,"
        remedy = "Find out which copy is right; --trust-replicas takes the first without comparing"
        if odd is not None:
            what = f"{program.replica_dtype(replica)} weights are not the {program.dtype} ones rounded;"
            remedy = "Files of two runs or steps lie here, or the masters were never updated; --trust-replicas takes the masters"
        error = ReplicaMismatchError(
            f"{what} first at element {tuple(where)}",
            tensor=job.name,
            file=" and ".join(files),
            expected=None if odd is None else odd.expected,
            actual=None if odd is None else f"{odd.actual}; largest difference near it {odd.largest:.3g}",
            remedy=remedy,
        )
        error.places = tuple(places)
        return error


def _no_file(offset: int, buffers: Sequence[memoryview]) -> None:
    raise AssertionError("zeros come from no file")


def _carve(memory: memoryview, sizes: Slab) -> _Buffers:
    at, parts = 0, []
    for nbytes in (sizes.pivot, sizes.staging, sizes.compare, *sizes.outputs, sizes.scratch, sizes.mean):
        parts.append(memory[at : at + nbytes])
        at += nbytes
    return _Buffers(parts[0], parts[1], parts[2], tuple(parts[3:-2]), parts[-2], parts[-1])


def _compute(program: Program, lo: Shape, hi: Shape, buffers: _Buffers) -> None:
    import torch

    from .kernels import kernel

    op = program.op
    assert op is not None
    run = kernel(op.kernel)
    source = _tensor(buffers.pivot, program.dtype, lo, hi)
    outputs = [_tensor(m, o.dtype, *output_box(o, lo, hi)) for m, o in zip(buffers.outputs, program.outputs, strict=True)]
    # An op without scratch has a buffer of length 0, which torch does not take.
    scratch = torch.frombuffer(buffers.scratch, dtype=torch.uint8) if len(buffers.scratch) else torch.empty(0, dtype=torch.uint8)
    run(source, outputs, scratch)


def _tensor(memory: memoryview, dtype: str, lo: Shape, hi: Shape) -> torch.Tensor:
    import torch

    shape = [b - a for a, b in zip(lo, hi, strict=True)]
    return torch.frombuffer(memory, dtype=getattr(torch, dtype), count=prod(shape)).view(shape)


def _last_row(program: Program, last: tuple[Shape, Shape] | None, pivot: memoryview, row: int, size: int) -> bytes | None:
    """The last row of axis 0, if the last strip holds it whole."""
    if last is None or not program.shape or any(last[0][1:]):
        return None
    end = prod(b - a for a, b in zip(*last, strict=True)) * size
    return bytes(pivot[end - row : end])


def _holds(start: Shape, dims: Sequence[tuple[int, int, int, int]], where: Sequence[int]) -> bool:
    """Whether a box has an element at these coordinates."""
    reached = {tuple(start)}
    for axis, extent, step, _ in dims:
        # Only steps that can still reach the coordinate are followed, so the set stays small.
        reached = {
            (*c[:axis], c[axis] + i * step, *c[axis + 1 :])
            for c in reached
            for i in _candidates(where[axis] - c[axis], extent, step, sum(k == axis for k, *_ in dims) == 1)
        }
    return tuple(where) in reached


def _candidates(distance: int, extent: int, step: int, only: bool) -> Iterable[int]:
    if not only:
        return range(extent)
    return (distance // step,) if distance % step == 0 and 0 <= distance // step < extent else ()
