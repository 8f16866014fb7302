"""The plan: which byte of which source file goes to which byte of which target file, as frozen data.

How the parts hang together:

* A `Program` is what happens to one *pivot* tensor: pieces that gather it from source operands, at most one value op,
  and pieces that scatter each output to target operands. It holds no file name and is shared by every layer and expert.
* `Bindings` give, per program, one row for each pivot tensor: file number and byte offset of every operand.
* A tile is a list of *items*; an item is a box of one pivot tensor (program, binding row, coordinate range on the
  program's cut axes). `Tiles` keeps them as columns.
* `TargetFile` holds what is known before any data moves: size, headers, checksum patches.

Boundary: data and small derived figures. Nothing here reads, writes or chooses; `passes` fills it, executors obey it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .containers.base import Crc
from .tensor.dtypes import dtype
from .tensor.pieces import Piece

__all__ = [
    "KERNELS",
    "PAPER",
    "PLAN_FORMAT",
    "SEAL_DIGITS",
    "Bindings",
    "Cost",
    "Dropped",
    "Item",
    "Output",
    "Plan",
    "Program",
    "Seal",
    "SourceFile",
    "TargetFile",
    "TensorEntry",
    "Tiles",
    "ValueOp",
]

PLAN_FORMAT = 2
"""Number of the plan's own format; part of the plan hash."""
PAPER = "config"
"""The source format of a plan that was made from a config alone."""

KERNELS = {name: f"shardwright.executors.kernels:{name}" for name in ("cast", "add_one", "subtract_one")}
"""Kernels that are no scheme's."""

Ints = npt.NDArray[np.int64]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ValueOp:
    """An operation on values: strips of the pivot in, strips of each output out.

    Attributes
    ----------
    name
        ``"cast"``, ``"affine"`` or a scheme's name.
    kernel
        ``"module:function"`` that an executor imports; its contract is in `shardwright.executors.kernels`.
    block
        Smallest pivot box that is independent of all others, per axis; 0 means the whole axis. Tiles and strips are
        cut on multiples of it.
    scratch
        Bytes of scratch that the kernel needs per pivot element.
    """

    name: str
    kernel: str
    block: Shape
    scratch: int


@dataclass(frozen=True, slots=True)
class Output:
    """One result of a program (a plain copy has one, a quantisation two or more).

    Attributes
    ----------
    dtype, shape
        Of the output, in its own coordinates.
    ratio
        Pivot elements per output element on each axis: a pivot box ``[lo, hi)`` gives output ``[lo // ratio, hi // ratio)``.
    scatter
        ``dst`` is the output, ``src`` the target operand `slot`: pieces kept in output coordinates.
    zeros
        Regions of target operands that come from no pivot element and are written as zeros, once per pivot tensor:
        ``src`` is the target operand, ``dst`` strides are 0.
    """

    dtype: str
    shape: Shape
    ratio: Shape
    scatter: tuple[Piece, ...]
    zeros: tuple[Piece, ...] = ()


@dataclass(frozen=True, slots=True)
class Program:
    """What happens to one pivot tensor, whatever its name and place.

    Attributes
    ----------
    label
        Name with its counters left open, for people.
    dtype, shape
        Of the pivot, as stored in the source.
    gather
        ``dst`` is the pivot, ``src`` the source operand `slot`. Covers the pivot once.
    replicas
        Further copies of (parts of) the pivot that must equal it; each is compared while its tile is in memory.
    average
        The replicas, each of the whole pivot, may differ from it: the mean of all copies takes its place.
    padding
        Source elements that are not part of the model (vocabulary rows, ends of flat partitions): ``src`` is the source
        operand, ``dst`` strides are 0. They are read and classified (zeros, copies of the last row, other values), not copied.
    op
        Between pivot and outputs, or None for a plain copy.
    outputs
        What is written.
    cut
        Axes along which the pivot is cut into tiles: none, one or two.
    whole
        Whether an item must be gathered whole before it is scattered (a transpose), not in strips.
    blank
        Source operands that hold nothing but padding which must be zero.
    rounded
        Dtypes of the last of the replicas: these hold the pivot rounded to a dtype of at most half its size (a 16-bit module beside
        its float32 masters), and must equal that.
    """

    label: str
    dtype: str
    shape: Shape
    gather: tuple[Piece, ...]
    replicas: tuple[tuple[Piece, ...], ...]
    padding: tuple[Piece, ...]
    op: ValueOp | None
    outputs: tuple[Output, ...]
    cut: tuple[int, ...]
    whole: bool
    average: bool = False
    blank: tuple[int, ...] = ()
    rounded: tuple[str, ...] = ()

    def replica_dtype(self, replica: int) -> str:
        """What one of the replicas is stored in."""
        number = replica - (len(self.replicas) - len(self.rounded))
        return self.dtype if number < 0 else self.rounded[number]

    def operand_dtype(self, operand: int) -> str:
        """What a source operand is stored in."""
        for number in range(len(self.replicas) - len(self.rounded), len(self.replicas)):
            if any(piece.slot == operand for piece in self.replicas[number]):
                return self.replica_dtype(number)
        return self.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the pivot tensor."""
        return dtype(self.dtype).nbytes(prod(self.shape))


@dataclass(frozen=True, slots=True)
class Bindings:
    """Where the operands of one program's pivot tensors lie; row i is pivot tensor i.

    Attributes
    ----------
    names
        The pivot tensors' names (hub names joined with ``+`` where several share a pivot).
    source_file, source_offset
        ``[rows, source operands]``: number in `Plan.source_files`, byte offset.
    target_file, target_offset
        ``[rows, target operands]``: number in `Plan.target_files`, byte offset.
    """

    names: tuple[str, ...]
    source_file: Ints
    source_offset: Ints
    target_file: Ints
    target_offset: Ints


class Item(NamedTuple):
    """A box of one pivot tensor: coordinate ranges of all its axes."""

    program: int
    row: int
    lo: Shape
    hi: Shape


@dataclass(frozen=True, slots=True)
class Tiles:
    """All tiles, as columns. Tile i has items ``first[i] … first[i + 1] - 1``.

    Attributes
    ----------
    first
        ``[tiles + 1]``.
    program, row
        ``[items]``: which program, which row of its bindings.
    lo, hi
        ``[items, 2]``: range on the program's cut axes; unused columns are 0.
    requests, bytes_read, bytes_written
        ``[tiles]``: contiguous file ranges read and written, and their bytes (replicas and padding included).
    """

    first: Ints
    program: Ints
    row: Ints
    lo: Ints
    hi: Ints
    requests: Ints
    bytes_read: Ints
    bytes_written: Ints

    def __len__(self) -> int:
        return len(self.first) - 1


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A source file's path below the source root, and what identifies its content."""

    path: str
    nbytes: int
    mtime_ns: int
    header_digest: str


SEAL_DIGITS = {"crc32": 8, "sha256": 64}
"""Kinds of checksums of whole files, and their hexadecimal digits."""


class Seal(NamedTuple):
    """Where the checksum of a whole file is written, in lower-case hexadecimal, when that file is complete.

    Attributes
    ----------
    kind
        A key of `SEAL_DIGITS`.
    file
        Number of the file: target files first, then copies.
    offset
        Of the first digit.
    """

    kind: str
    file: int
    offset: int


@dataclass(frozen=True, slots=True)
class TargetFile:
    """A target file: path below the target root, final size, and every byte that is not tensor data.

    `static` is ``(offset, bytes)`` ascending and disjoint; `crcs` are filled in when the data is complete, `seals` when
    all other files are.
    """

    path: str
    nbytes: int
    static: tuple[tuple[int, bytes], ...] = ()
    crcs: tuple[Crc, ...] = ()
    seals: tuple[Seal, ...] = ()


class TensorEntry(NamedTuple):
    """A stored tensor of the source or the target.

    Attributes
    ----------
    name
        The key in its file.
    rank
        Rank whose file holds it (0 where files belong to no rank).
    dtype, shape
        As stored.
    file
        Number in the plan's file list.
    offset
        Byte offset of its first byte.
    contiguous
        False for a strided view of a larger storage.
    """

    name: str
    rank: int
    dtype: str
    shape: Shape
    file: int
    offset: int
    contiguous: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return dtype(self.dtype).nbytes(prod(self.shape))


@dataclass(frozen=True, slots=True)
class Dropped:
    """A source item that reaches no target, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Cost:
    """What the plan moves; every figure exact, known before any byte moves.

    Attributes
    ----------
    tensors, files
        Stored tensors and files of the target.
    bytes_read, bytes_written
        Bytes that the run reads and writes.
    source_bytes, target_bytes
        Bytes needed: source bytes used (each compared replica included), target files with padding and headers.
    requests
        Contiguous file ranges read and written.
    base_bytes, peak_bytes, min_memory_bytes
        Memory: the process before it starts, the most it will use under the given bound, the smallest bound that works.
    """

    tensors: int
    files: int
    bytes_read: int
    bytes_written: int
    source_bytes: int
    target_bytes: int
    requests: int
    tiles: int
    pieces: int
    programs: int
    base_bytes: int
    peak_bytes: int
    min_memory_bytes: int

    @property
    def read_amplification(self) -> float:
        """Bytes read over source bytes needed."""
        return self.bytes_read / self.source_bytes if self.source_bytes else 1.0

    @property
    def write_amplification(self) -> float:
        """Bytes written over target bytes needed."""
        return self.bytes_written / self.target_bytes if self.target_bytes else 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole conversion on paper.

    Attributes
    ----------
    recipe
        What was asked for, as plain JSON values; with the tiles and the source's fingerprints it makes the plan hash.
    source_root
        Where source paths start.
    summary
        ``source_format, source_layout, family, target_format, target_layout``.
    copies
        Small files carried over as they are: (source path, target path).
    """

    recipe: dict[str, Any]
    source_root: str
    summary: dict[str, Any]
    source_files: tuple[SourceFile, ...]
    target_files: tuple[TargetFile, ...]
    copies: tuple[tuple[str, str], ...]
    programs: tuple[Program, ...]
    bindings: tuple[Bindings, ...]
    tiles: Tiles
    source_tensors: tuple[TensorEntry, ...]
    target_tensors: tuple[TensorEntry, ...]
    dropped: tuple[Dropped, ...] = ()
    warnings: tuple[str, ...] = ()
    copied_bytes: int = field(default=0)

    @property
    def on_paper(self) -> bool:
        """Whether its source is a config alone, so that there is nothing to read."""
        return bool(self.summary.get("source_format") == PAPER)

    def items(self, tile: int) -> Iterator[Item]:
        """The boxes of one tile, in the order they run."""
        tiles = self.tiles
        for i in range(int(tiles.first[tile]), int(tiles.first[tile + 1])):
            program = self.programs[number := int(tiles.program[i])]
            lo, hi = [0] * len(program.shape), list(program.shape)
            for column, axis in enumerate(program.cut):
                lo[axis], hi[axis] = int(tiles.lo[i, column]), int(tiles.hi[i, column])
            yield Item(number, int(tiles.row[i]), tuple(lo), tuple(hi))
