"""The streaming comparison of two checkpoints: boxes of a few MiB of either side, in several lanes.

1. Every lane takes a slab, then the next tile of the facing's plan, until there is none or the stop flag is set.
2. For each strip box of each tensor all parts of both halves are read into buffers that hold the box row-major, whatever
   the layout in the files; then each copy of a part, which must equal it byte for byte, or is averaged with it.
3. Equal dtypes are compared byte by byte first, which is all there is to do for most strips. Where bytes differ, and where
   dtypes or schemes do, blocks of elements are compared (`elements`), values of quantised parts computed block by block.
4. What is found is joined per tensor; the result does not depend on lanes, strips or tiles.

Every stored byte is read once, copies included, but for gaps that are cheaper to read than to skip (`transfer`).
Boundary: knows programs, files and elements; no format, no family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from math import prod
from operator import itemgetter
from threading import Lock
from typing import NamedTuple

import numpy as np

from ..planner.passes.facing import Facing, Fitted, buffers_of, fit_facing, strip_of
from ..planner.passes.memory import itemsize, pages, strips
from ..planner.plan import Item, Output, Program
from .arena import Arena
from .averaging import Mean
from .compare import first_difference
from .elements import BLOCK, WORK_BYTES, Array, Found, Work, compare, numpy_dtype
from .kernels import values_kernel
from .layouts import Layouts, Reads, output_box
from .progress import NullProgress, Progress
from .sources import SourceFiles
from .stopping import Stop
from .transfer import gather

__all__ = ["Result", "diff"]

Shape = tuple[int, ...]
Places = list[tuple[int, int]]


@dataclass(slots=True)
class Result:
    """What a comparison found.

    Attributes
    ----------
    fitted
        How it ran.
    tensors
        By name, only where bits or values differ anywhere; indices are flat, of the whole tensor.
    copies
        By (side, name): the first element that a side's own copies do not agree on (or whose scales do not), flat.
    """

    fitted: Fitted
    tensors: dict[str, Found] = field(default_factory=dict)
    copies: dict[tuple[int, str], int] = field(default_factory=dict)


def diff(facing: Facing, *, tolerance: float | None, memory: int, workers: int, progress: Progress | None = None) -> Result:
    """Compare every pair.

    Parameters
    ----------
    tolerance
        As for `shardwright.executors.elements.compare`.
    memory
        Bound on this process's memory in bytes.

    Raises
    ------
    MemoryBoundError
        The bound is too small.
    RunError
        A file cannot be read, or changed since it was opened; a signal came.
    """
    progress = progress or NullProgress()
    lanes = _Lanes(fit_facing(facing, memory, workers, work_bytes=WORK_BYTES), tolerance, progress.advance)
    progress.start(facing.nbytes)
    try:
        with lanes.stop.on_signals():
            lanes.run()
    finally:
        progress.stop()
        lanes.close()
    lanes.stop.raise_cause()
    return lanes.result


class _Held(NamedTuple):
    """A half of a box in memory: each part as an array of its own box, whose first coordinates are `origins`."""

    outputs: tuple[Output, ...]
    arrays: tuple[Array, ...]
    origins: tuple[Shape, ...]
    kernel: str | None

    def values(self, lo: Shape, hi: Shape, room: Array) -> Array:
        """The elements of a smaller box, flat; computed ones are put into `room`."""
        cuts = []
        for output, array, origin in zip(self.outputs, self.arrays, self.origins, strict=True):
            begin, end = output_box(output, lo, hi)
            cuts.append(array[tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, origin, strict=True))])
        if self.kernel is None:
            return cuts[0].reshape(-1)
        shape = tuple(b - a for a, b in zip(lo, hi, strict=True))
        found = room[: prod(shape)]
        values_kernel(self.kernel)(cuts, found.reshape(shape))
        return found


class _Lanes:
    """What the lanes of one comparison share."""

    def __init__(self, fitted: Fitted, tolerance: float | None, advance: Callable[[int], None]) -> None:
        self.result, self.stop = Result(fitted), Stop()
        self._facing, self._strip_bytes, self._slab_bytes = fitted.facing, fitted.strip_bytes, fitted.slab_bytes
        self._tolerance, self._advance = tolerance, advance
        self._files = [SourceFiles(root, files) for root, files in zip(self._facing.roots, self._facing.files, strict=True)]
        programs = [part.program for halves in self._facing.halves for half in halves for part in half.parts]
        # Parts are programs to `Layouts`, numbered in the order of pairs, sides and parts.
        self._layouts = Layouts(dict(enumerate(programs)), fitted.strip_bytes)
        counts = [sum(len(half.parts) for half in halves) for halves in self._facing.halves]
        self._first_part = [sum(counts[:k]) for k in range(len(counts))]
        self._tiles = iter(range(len(self._facing.plan.tiles)))
        self._lock = Lock()

    def run(self) -> None:
        """All lanes, to their end."""
        workers = max(1, min(self.result.fitted.workers, len(self._facing.plan.tiles)))
        arena = Arena(workers * self._slab_bytes)
        with ThreadPoolExecutor(workers, thread_name_prefix="lane") as pool:
            for _ in range(workers):
                pool.submit(self._lane, arena)

    def close(self) -> None:
        """Close every file."""
        for files in self._files:
            files.close()

    def _lane(self, arena: Arena) -> None:
        """Compare tiles until there are no more; never raises."""
        try:
            with arena.take(self._slab_bytes) as slab:
                work = Work()
                while (tile := self._next_tile()) is not None:
                    for item in self._facing.plan.items(tile):
                        self._item(item, slab.data, work)
        except BaseException as error:
            self.stop.set(error)

    def _next_tile(self) -> int | None:
        with self._lock:
            return None if self.stop.is_set() else next(self._tiles, None)

    def _item(self, item: Item, memory: memoryview, work: Work) -> None:
        """One box of one pair, strip by strip."""
        plan, halves = self._facing.plan, self._facing.halves[item.program]
        program, bound = plan.programs[item.program], plan.bindings[item.program]
        name, found = bound.names[item.row], Found()
        places: list[Places] = [
            list(zip(files[item.row].tolist(), offsets[item.row].tolist(), strict=True))
            for files, offsets in ((bound.source_file, bound.source_offset), (bound.target_file, bound.target_offset))
        ]
        for lo, hi in strips(program, item.lo, item.hi, strip_of(program, halves, self._strip_bytes)):
            if self.stop.is_set():
                return
            one, two = self._read(item.program, name, places, lo, hi, memory)
            here = _compare(program, one, two, lo, hi, self._tolerance, work)
            if here:
                found = found.joined(here)
            self._advance(sum(array.nbytes for array in (*one.arrays, *two.arrays)))
        if found:
            with self._lock:
                self.result.tensors[name] = found.joined(self.result.tensors.get(name, Found()))

    def _read(self, number: int, name: str, places: Sequence[Places], lo: Shape, hi: Shape, memory: memoryview) -> list[_Held]:
        """Both halves of a box, in the slab; notes copies that differ."""
        halves, whole = self._facing.halves[number], self._facing.plan.programs[number].shape
        sizes = buffers_of(halves, prod(b - a for a, b in zip(lo, hi, strict=True)))
        at, part = sum(sizes), self._first_part[number]
        staging, spare = memory[at : at + self._strip_bytes], memory[at + self._strip_bytes :]
        at, held = 0, []
        for side, half in enumerate(halves):
            outputs = tuple(Output(p.program.dtype, p.program.shape, p.ratio, ()) for p in half.parts)
            boxes = [output_box(output, lo, hi) for output in outputs]
            arrays = []
            for output, (begin, end) in zip(outputs, boxes, strict=True):
                shape = tuple(b - a for a, b in zip(begin, end, strict=True))
                nbytes = prod(shape) * itemsize(output.dtype)
                buffer = memory[at : at + nbytes]
                steps = self._layouts.strip(part, begin, end)
                self._gather(side, steps.gather, places[side], buffer, staging)
                averages = self._layouts.programs[part].average
                mean = Mean(output.dtype, buffer, spare[pages(nbytes) :]) if averages else None
                for reads, partly in zip(steps.replicas, steps.partial, strict=True):
                    if reads:
                        if partly:
                            spare[:nbytes] = buffer
                        self._gather(side, reads, places[side], spare[:nbytes], staging)
                        if mean is not None:
                            mean.add(spare[:nbytes])
                        elif (byte := first_difference(buffer, spare[:nbytes])) is not None:
                            self._note_copy(side, name, _place(byte // itemsize(output.dtype), whole, begin, end, output.ratio))
                if mean is not None:
                    mean.finish()
                arrays.append(np.frombuffer(buffer, numpy_dtype(output.dtype)).reshape(shape))
                at, part = at + sizes[part - self._first_part[number]], part + 1
            held.append(_Held(outputs, tuple(arrays), tuple(begin for begin, _ in boxes), half.kernel))
        return held

    def _gather(self, side: int, reads: Reads, places: Places, strip: memoryview, staging: memoryview) -> None:
        for slot, steps in groupby(reads, itemgetter(0)):
            number, base = places[slot]
            with self._files[side].reading(number) as read:
                for _, step in steps:
                    gather(step, read, base, strip, staging, _NOTHING)

    def _note_copy(self, side: int, name: str, index: int) -> None:
        with self._lock:
            self.result.copies[side, name] = min(index, self.result.copies.get((side, name), index))


_NOTHING = memoryview(b"")
"""What filling with zeros would need: every element of a hub tensor comes from a file, so nothing is filled."""


def _compare(program: Program, one: _Held, two: _Held, lo: Shape, hi: Shape, tolerance: float | None, work: Work) -> Found:
    """What differs in a box in memory; indices are of the whole tensor."""
    place = partial(_place, shape=program.shape, lo=lo, hi=hi)
    found = Found()
    if one.kernel is None and two.kernel is None:
        x, y = one.arrays[0].reshape(-1), two.arrays[0].reshape(-1)
        for begin, end in _unlike(x, y):
            found = found.joined(compare(x[begin:end], y[begin:end], tolerance, work).moved(begin.__add__))
        return found.moved(place)
    for begin_at, end_at in strips(replace(program, whole=False), lo, hi, BLOCK * itemsize(program.dtype)):
        x, y = one.values(begin_at, end_at, work.x), two.values(begin_at, end_at, work.y)
        here = compare(x, y, tolerance or 0.0, work)
        if here:
            found = found.joined(here.moved(partial(_place, shape=program.shape, lo=begin_at, hi=end_at)))
    return found


def _unlike(one: Array, two: Array) -> Iterator[tuple[int, int]]:
    """Blocks of two flat arrays that are not the same bytes of the same dtype."""
    size = one.dtype.itemsize
    alike, x, y = one.dtype == two.dtype, _bytes(one), _bytes(two)
    begin = 0
    while begin < len(one):
        if alike:
            different = first_difference(x[begin * size :], y[begin * size :])
            if different is None:
                return
            begin += different // size // BLOCK * BLOCK
        yield begin, min(begin + BLOCK, len(one))
        begin += BLOCK


def _bytes(array: Array) -> memoryview:
    return array.view(np.uint8).data


def _place(index: int, shape: Shape, lo: Shape, hi: Shape, ratio: Shape = ()) -> int:
    """The flat index in a tensor of an element of the box ``[lo, hi)``, from its flat index in the box.

    With `ratio` the box is of a part, and the index that of the first tensor element that its element belongs to.

    >>> _place(3, (10, 10), (2, 5), (4, 7)), _place(1, (256, 256), (0, 1), (2, 2), (128, 128))
    (36, 32896)
    """
    found, step = 0, 1
    for extent, a, b, times in zip(shape[::-1], lo[::-1], hi[::-1], (ratio or (1,) * len(shape))[::-1], strict=True):
        index, c = divmod(index, b - a)
        found += (a + c) * times * step
        step *= extent
    return found
