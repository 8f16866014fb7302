"""The memory model: how much a run will hold, and what it does with less.

Every term, in bytes:

* **base**: the process after its imports, before any work. Measured; a program with a value op adds torch.
* **plan**: the plan's own columns, pieces and names.
* **slab**, one per worker, allocated once: the *pivot* strip, the *staging* strip that file order passes through, a
  *compare* strip where replicas are checked, a *mean* where they are averaged (a sum and a mark per element), and for a value
  op one strip per *output* and the kernel's *scratch*.

``peak = base + plan + workers × slab``. To fit a bound, strips are halved from 4 MiB down to 256 KiB, then workers are
taken away one by one; what still does not fit is refused with the smallest bound that works.

Strips are a function of the program and the strip size alone: `strips` cuts a box along the program's first cut axis,
on multiples of the value op's block, and along further axes only where one row is larger than a strip. A program that
must be whole in memory is one strip.

Boundary: pure arithmetic on programs; nothing is allocated here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import NamedTuple

from ...errors import MemoryBoundError, UnsupportedError
from ..plan import Output, Plan, Program, Tiles
from ..tensor.dtypes import dtype

__all__ = [
    "BASE_BYTES",
    "STRIP_BYTES",
    "STRIP_FLOOR",
    "TORCH_BASE_BYTES",
    "Fit",
    "Slab",
    "averageable",
    "fit",
    "itemsize",
    "mean_bytes",
    "mean_dtype",
    "min_memory",
    "pages",
    "plan_nbytes",
    "slab",
    "strips",
    "whole_items",
]

MIB = 1 << 20
BASE_BYTES = 60 * MIB
"""Python, numpy, dask's threaded scheduler, rich and this package after their imports."""
TORCH_BASE_BYTES = 225 * MIB
"""The same with torch and its first kernel call."""
STRIP_BYTES = 4 * MIB
"""Pivot bytes of one strip when memory allows: larger strips leave the processor's cache, smaller ones cost more calls."""
STRIP_FLOOR = 256 << 10
"""Strips are not made smaller than this."""
PAGE = 4096

Shape = tuple[int, ...]


class Slab(NamedTuple):
    """One worker's buffers for one program, each a multiple of the page size."""

    pivot: int
    staging: int
    compare: int
    outputs: tuple[int, ...]
    scratch: int
    mean: int = 0

    @property
    def nbytes(self) -> int:
        """All of them together."""
        return self.pivot + self.staging + self.compare + sum(self.outputs) + self.scratch + self.mean


@dataclass(frozen=True, slots=True)
class Fit:
    """How a set of programs runs inside a bound.

    Attributes
    ----------
    workers
        Lanes that run at the same time.
    strip_bytes
        Pivot bytes of one strip.
    slab_bytes
        One worker's buffers, large enough for every program.
    base_bytes
        The process before it starts, without the plan.
    peak_bytes
        ``base + plan + workers × slab``.
    """

    workers: int
    strip_bytes: int
    slab_bytes: int
    base_bytes: int
    peak_bytes: int


def itemsize(name: str) -> int:
    """Bytes of one element of that dtype; packed sub-byte dtypes have none of their own.

    Raises
    ------
    UnsupportedError
        A packed dtype: its programs count storage bytes as ``uint8``.

    >>> itemsize("bfloat16")
    2
    """
    size = dtype(name).itemsize
    if not size:
        raise UnsupportedError(f"elements of {name} are packed below a byte and have no size of their own")
    return size


def strips(program: Program, lo: Shape, hi: Shape, strip_bytes: int) -> Iterator[tuple[Shape, Shape]]:
    """Boxes that cover ``[lo, hi)`` in row-major order, each at most `strip_bytes` where blocks allow it.

    Edges lie on multiples of the value op's block, counted from the pivot's origin.
    """
    extents = tuple(b - a for a, b in zip(lo, hi, strict=True))
    if 0 in extents:
        return
    steps, units = _steps(program, extents, strip_bytes), _units(program, extents)
    edges = []
    for a, b, step, unit in zip(lo, hi, steps, units, strict=True):
        starts = [a, *range(a - a % unit + step, b, step)] if step < b - a else [a]
        edges.append(list(zip(starts, [*starts[1:], b], strict=True)))
    for ranges in product(*edges):
        yield tuple(r[0] for r in ranges), tuple(r[1] for r in ranges)


def _units(program: Program, extents: Shape) -> Shape:
    """Smallest step along each axis: the op's block, or one element."""
    if program.op is None:
        return (1,) * len(extents)
    return tuple(block or extent for block, extent in zip(program.op.block, extents, strict=True))


def _steps(program: Program, extents: Shape, strip_bytes: int) -> Shape:
    """Extents of one strip of a box."""
    if program.whole:
        return extents
    units, steps = _units(program, extents), list(extents)
    room = strip_bytes // itemsize(program.dtype)
    first = program.cut or tuple(range(len(extents)))[:1]
    for axis in (*first, *(k for k in range(len(extents)) if k not in first)):
        fits = room // (prod(steps) // steps[axis])
        if fits >= steps[axis]:
            break
        steps[axis] = min(extents[axis], max(units[axis], fits // units[axis] * units[axis]))
        if fits >= units[axis]:
            break
    return tuple(steps)


def slab(program: Program, strip_bytes: int, largest: int | None = None) -> Slab:
    """The buffers of one program.

    Parameters
    ----------
    largest
        Elements of the largest item of a program that must be whole; its whole pivot by default.
    """
    size = itemsize(program.dtype)
    if program.whole:
        elements = prod(program.shape) if largest is None else largest
    else:
        # A box of a tile may be narrower than the pivot and so fill a strip better than the pivot's own rows do.
        elements = 0 if 0 in program.shape else max(prod(_steps(program, program.shape, strip_bytes)), strip_bytes // size)
        elements = min(elements, prod(program.shape))
    pivot = pages(elements * size)
    compare = pivot if program.replicas else 0
    mean = mean_bytes(program.dtype, elements) if program.average else 0
    if program.op is None:
        return Slab(pivot, pages(strip_bytes), compare, (), 0, mean)
    outputs = tuple(pages(_output_elements(program, output, elements) * itemsize(output.dtype)) for output in program.outputs)
    return Slab(pivot, pages(strip_bytes), compare, outputs, pages(elements * program.op.scratch), mean)


def averageable(name: str) -> bool:
    """Whether copies of tensors of that dtype have a mean: floats of 16 bits and more."""
    kind = dtype(name)
    return kind.kind == "float" and kind.bits >= 16


def roundable(pivot: str, name: str) -> bool:
    """Whether copies of a pivot may be stored rounded to that dtype: floats of at most half its size, so that one strip's buffer
    holds both the copy and the pivot rounded."""
    wide, narrow = dtype(pivot), dtype(name)
    return wide.kind == narrow.kind == "float" and narrow.bits >= 16 and 2 * narrow.bits <= wide.bits


def mean_dtype(name: str) -> str:
    """The dtype in which copies of that dtype are added up."""
    return "float64" if name == "float64" else "float32"


def mean_bytes(name: str, elements: int) -> int:
    """What averaging a strip of that many elements takes besides: a sum and a mark for each."""
    return pages(elements * (itemsize(mean_dtype(name)) + 1))


def _output_elements(program: Program, output: Output, elements: int) -> int:
    """Most output elements that a box of that many pivot elements gives."""
    if all(n % ratio == 0 for n, ratio in zip(program.shape, output.ratio, strict=True)):
        return elements // prod(output.ratio)
    # A narrow box at an uneven end counts a whole block for a few elements.
    return min(elements, prod(output.shape))


def pages(nbytes: int) -> int:
    """Bytes rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


def whole_items(programs: Sequence[Program], tiles: Tiles) -> dict[int, int]:
    """Elements of the largest item of each program that must be whole in memory."""
    found = {}
    for number, program in enumerate(programs):
        if program.whole:
            rows = tiles.program == number
            found[number] = prod(n for k, n in enumerate(program.shape) if k not in program.cut)
            sizes = (tiles.hi[rows] - tiles.lo[rows])[:, : len(program.cut)].prod(axis=1)
            found[number] *= int(sizes.max()) if len(sizes) else 0
    return found


def fit(
    programs: Sequence[Program],
    memory_bytes: int,
    workers: int,
    plan_bytes: int,
    largest: Mapping[int, int] | None = None,
    *,
    base: int | None = None,
) -> Fit:
    """Workers and strips under a bound: the most workers that fit, then the largest strips.

    Parameters
    ----------
    largest
        `whole_items` of the plan; without it a whole program counts with its whole pivot.
    base
        What the process holds; 0 where the bound is on what comes on top of that.

    Raises
    ------
    MemoryBoundError
        Even one worker with the smallest strips needs more; `expected` is what it needs.
    """
    base = _base(programs) if base is None else base
    for count in range(max(1, workers), 0, -1):
        strip = STRIP_BYTES
        while strip >= STRIP_FLOOR:
            per_worker = _largest_slab(programs, strip, largest)
            peak = base + plan_bytes + count * per_worker
            if peak <= memory_bytes:
                return Fit(count, strip, per_worker, base, peak)
            strip //= 2
    needed = base + plan_bytes + _largest_slab(programs, STRIP_FLOOR, largest)
    raise MemoryBoundError(
        "the memory bound is too small for one worker",
        expected=needed,
        actual=memory_bytes,
        remedy=f"Pass --memory {-(-needed // MIB)}MiB or more",
    )


def min_memory(programs: Sequence[Program], plan_bytes: int = 0, largest: Mapping[int, int] | None = None) -> int:
    """The smallest bound that works: one worker, the smallest strips."""
    return _base(programs) + plan_bytes + _largest_slab(programs, STRIP_FLOOR, largest)


def _base(programs: Sequence[Program]) -> int:
    return BASE_BYTES if all(p.op is None for p in programs) else TORCH_BASE_BYTES


def _largest_slab(programs: Sequence[Program], strip_bytes: int, largest: Mapping[int, int] | None) -> int:
    sizes = largest or {}
    return max((slab(p, strip_bytes, sizes.get(i)).nbytes for i, p in enumerate(programs)), default=PAGE)


# Measured with tracemalloc on CPython 3.11: what one of each holds, names and tuples included.
_PIECE_BYTES, _ENTRY_BYTES, _NAME_BYTES = 700, 420, 110


def plan_nbytes(plan: Plan) -> int:
    """Memory that a plan holds: its columns exactly, its objects by count."""
    arrays = [*(b.source_file for b in plan.bindings), *(b.source_offset for b in plan.bindings)]
    arrays += [*(b.target_file for b in plan.bindings), *(b.target_offset for b in plan.bindings)]
    tiles = plan.tiles
    arrays += [tiles.first, tiles.program, tiles.row, tiles.lo, tiles.hi, tiles.requests, tiles.bytes_read, tiles.bytes_written]
    pieces = sum(
        len(p.gather) + len(p.padding) + sum(map(len, p.replicas)) + sum(len(o.scatter) + len(o.zeros) for o in p.outputs)
        for p in plan.programs
    )
    static = sum(len(data) for file in plan.target_files for _, data in file.static)
    entries = len(plan.source_tensors) + len(plan.target_tensors) + len(plan.source_files) + len(plan.target_files)
    names = sum(len(b.names) for b in plan.bindings)
    return sum(a.nbytes for a in arrays) + static + pieces * _PIECE_BYTES + entries * _ENTRY_BYTES + names * _NAME_BYTES
