"""Two checkpoints face to face, as data, and the boxes in which they are compared.

1. A `Facing` holds the pairs of tensors that both sides have; `face` makes it. Tensors that lie alike on both sides share a
   `Program`, whose *cut* decides the boxes, and two `Half`s, which say how either side is read.
2. `fit_facing` cuts the pairs into boxes that keep the shorter read run of the two sides long, in the order of the first
   side's files, as small as the memory bound asks for.

Boundary: pure; knows no format.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from ...errors import MemoryBoundError
from ..plan import Dropped, Plan, Program, SourceFile
from .lower import Lowered
from .memory import BASE_BYTES, STRIP_BYTES, STRIP_FLOOR, itemsize, mean_bytes, pages, plan_nbytes, slab, whole_items
from .tiling import TILE_BYTES_WHOLE, choose_cuts, tile

__all__ = ["Facing", "Fitted", "Half", "Part", "Unequal", "buffers_of", "fit_facing", "strip_of"]

MIB = 1 << 20

Shape = tuple[int, ...]


class Part(NamedTuple):
    """One stored tensor of a half.

    Attributes
    ----------
    program
        Its gather pieces and its replicas, over the operands of the half; a program without outputs.
    ratio
        Hub elements per element on each axis.
    """

    program: Program
    ratio: Shape


@dataclass(frozen=True, slots=True)
class Half:
    """How one side of a pair is read.

    Attributes
    ----------
    parts
        The tensor itself, or what a scheme stores instead of it, in the scheme's order.
    kernel
        Makes values of the parts (contract in `shardwright.executors.kernels`); None where the one part is the tensor.
    """

    parts: tuple[Part, ...]
    kernel: str | None = None

    @property
    def dtype(self) -> str:
        """Stored dtype of the tensor, or of its payload."""
        return self.parts[0].program.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of one tensor, without copies."""
        return sum(part.program.nbytes for part in self.parts)


class Unequal(NamedTuple):
    """A tensor that both sides have, in two shapes."""

    name: str
    shapes: tuple[Shape, Shape]
    dtypes: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Facing:
    """Two checkpoints, tensor against tensor.

    Attributes
    ----------
    plan
        Programs, bindings and tiles of the pairs. The first side is its source, the second its target, which is only read.
    halves
        By program: both sides.
    roots, files
        Of each side.
    missing, extra
        Names that only the first, only the second side has.
    shapes
        Tensors of unequal shapes.
    dropped
        Of each side: what is stored and not compared, and why.
    """

    plan: Plan
    halves: tuple[tuple[Half, Half], ...]
    roots: tuple[str, str]
    files: tuple[tuple[SourceFile, ...], tuple[SourceFile, ...]]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    shapes: tuple[Unequal, ...]
    dropped: tuple[tuple[Dropped, ...], tuple[Dropped, ...]]

    @property
    def nbytes(self) -> int:
        """Bytes of all pairs on both sides, without copies."""
        rows = (len(bound.names) for bound in self.plan.bindings)
        return sum(n * (one.nbytes + two.nbytes) for n, (one, two) in zip(rows, self.halves, strict=True))


class Fitted(NamedTuple):
    """A facing cut for a memory bound: lanes, bytes of a strip of the wider side, and of one lane's buffers."""

    facing: Facing
    workers: int
    strip_bytes: int
    slab_bytes: int
    peak_bytes: int


def fit_facing(facing: Facing, memory_bytes: int, workers: int, *, work_bytes: int) -> Fitted:
    """Lanes and boxes under a bound: the most lanes that fit, then the largest boxes.

    A lane holds one strip of both sides, a staging strip, a strip for copies where there are any, and the work space of
    the comparison. Strips are halved from 4 MiB down to 256 KiB, and boxes that must be in memory whole (one side is
    transposed) from 64 MiB down to 4 MiB.

    Parameters
    ----------
    work_bytes
        What comparing one block takes besides.

    Raises
    ------
    MemoryBoundError
        Even one lane with the smallest boxes needs more; `expected` is what it needs.
    """
    base = BASE_BYTES + plan_nbytes(facing.plan)
    halvings = range((STRIP_BYTES // STRIP_FLOOR).bit_length())
    cuts: dict[int, tuple[Facing, int]] = {}
    for lanes in range(max(1, workers), 0, -1):
        for k in halvings:
            if k not in cuts:
                cut = _cut(facing, TILE_BYTES_WHOLE >> k)
                cuts[k] = cut, _slab_bytes(cut, STRIP_BYTES >> k)
            cut, slab_bytes = cuts[k]
            if (peak := base + lanes * (slab_bytes + work_bytes)) <= memory_bytes:
                return Fitted(cut, lanes, STRIP_BYTES >> k, slab_bytes, peak)
    needed = base + min(slab_bytes for _, slab_bytes in cuts.values()) + work_bytes
    raise MemoryBoundError(
        "the memory bound is too small for one worker",
        expected=needed,
        actual=memory_bytes,
        remedy=f"Pass --memory {-(-needed // MIB)}MiB or more",
    )


def _cut(facing: Facing, tile_bytes: int) -> Facing:
    plan = facing.plan
    grains = [1] * len(plan.programs)
    programs = choose_cuts(Lowered(list(plan.programs), list(plan.bindings), grains), tile_bytes)
    return replace(facing, plan=replace(plan, programs=tuple(programs), tiles=tile(programs, plan.bindings, grains, tile_bytes)))


def strip_of(program: Program, halves: tuple[Half, Half], strip_bytes: int) -> int:
    """Bytes of the first side's strip, where the wider side's has `strip_bytes`."""
    own = itemsize(program.dtype)
    return strip_bytes * own // max(itemsize(half.dtype) for half in halves)


def buffers_of(halves: tuple[Half, Half], elements: int) -> tuple[int, ...]:
    """Bytes of a buffer for each part of both halves, for a box of that many elements."""
    programs = [part.program for half in halves for part in half.parts]
    return tuple(pages(min(elements, prod(p.shape)) * itemsize(p.dtype)) for p in programs)


def _slab_bytes(facing: Facing, strip_bytes: int) -> int:
    """The largest lane's buffers of any pair."""
    largest = whole_items(facing.plan.programs, facing.plan.tiles)
    most = 0
    for number, (program, halves) in enumerate(zip(facing.plan.programs, facing.halves, strict=True)):
        pivot = slab(program, strip_of(program, halves, strip_bytes), largest.get(number)).pivot
        parts = buffers_of(halves, pivot // itemsize(program.dtype))
        sides = [part.program for half in halves for part in half.parts]
        copies = max(parts) if any(side.replicas for side in sides) else 0
        means = [mean_bytes(side.dtype, pivot // itemsize(program.dtype)) for side in sides if side.average]
        most = max(most, sum(parts) + copies + max(means, default=0))
    return most + pages(strip_bytes)
