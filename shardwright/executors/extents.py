"""Checksums of target files that many threads write in any order, and the ranges that make them up.

1. A file is cut into ranges: those that its container wants a CRC-32 of, and what lies between. `Witness` stands between
   a tile and its sink: it keeps the CRC-32 of every contiguous extent that the tile wrote, neighbours joined, never
   across the edge of a range.
2. `Checksums` absorbs the extents of all tiles, from this process, from workers, and from the journal of an earlier run.
3. `Checksums.seal` adds a file's static bytes. By then every byte of the file must be accounted for, once: a hole would
   be zeros that nobody wrote. It gives the container's patches and the checksum of the whole file, patches included.

Boundary: numbers and bytes; files are written by whoever calls.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Protocol

from ..errors import ContradictionError, UsageError
from ..planner.plan import TargetFile
from .checksums import RunningCrc, crc32, crc32_combine
from .transfer import Write

__all__ = ["Checksums", "Extent", "Sink", "Witness"]

Extent = tuple[int, int, int, int]
"""``(file, offset, nbytes, crc)``: a contiguous range that one tile wrote."""


class Sink(Protocol):
    """Where a run's bytes go."""

    @property
    def files(self) -> Mapping[int, TargetFile]:
        """By number."""

    def writing(self, number: int) -> AbstractContextManager[Write]:
        """A function that takes bytes for an offset of that file."""

    def witnessed(self, number: int) -> bool:
        """Whether checksums are kept of what goes into that file."""


class _Ranges:
    """The ranges of one file that something has been written to, each with its running checksum."""

    def __init__(self, file: TargetFile) -> None:
        edges = sorted({0, file.nbytes, *(c.offset for c in file.crcs), *(c.offset + c.nbytes for c in file.crcs)})
        self.path = file.path
        self.edges = edges if len(edges) > 1 else [0, 0]
        self.running: dict[int, RunningCrc] = {}

    def at(self, offset: int) -> tuple[RunningCrc, int]:
        """The range that holds an offset, and its end."""
        index = min(max(0, bisect_right(self.edges, offset) - 1), len(self.edges) - 2)
        lo, hi = self.edges[index], self.edges[index + 1]
        if lo not in self.running:
            self.running[lo] = RunningCrc(lo, hi - lo)
        return self.running[lo], hi

    def add(self, offset: int, data: memoryview) -> None:
        """`data` was written at `offset`."""
        at, end = offset, offset + len(data)
        while at < end:
            hi = self.at(at)[1]
            stop = min(end, hi) if hi > at else end
            self.absorb(at, stop - at, crc32(data[at - offset : stop - offset]))
            at = stop

    def absorb(self, offset: int, nbytes: int, crc: int) -> None:
        """That much was written, within one range."""
        try:
            self.at(offset)[0].add(offset, nbytes, crc)
        except UsageError as error:
            raise ContradictionError(
                "a part of a target file was written twice", file=self.path, actual=f"{nbytes} bytes from {offset}"
            ) from error


class Witness:
    """A tile's way to a sink, which remembers the checksums of what the tile wrote. For one thread."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._ranges: dict[int, _Ranges] = {}

    @contextmanager
    def writing(self, number: int) -> Iterator[Write]:
        """As the sink's."""
        with self._sink.writing(number) as write:
            if not self._sink.witnessed(number):
                yield write
                return
            if number not in self._ranges:
                self._ranges[number] = _Ranges(self._sink.files[number])
            yield partial(_witnessed, write, self._ranges[number])

    def extents(self) -> list[Extent]:
        """What was written, by file and offset."""
        return [
            (number, *extent)
            for number, ranges in sorted(self._ranges.items())
            for _, running in sorted(ranges.running.items())
            for extent in running.extents
        ]


def _witnessed(write: Write, ranges: _Ranges, offset: int, data: memoryview) -> None:
    write(offset, data)
    ranges.add(offset, data)


class Checksums:
    """The checksums of a set of files, from extents in any order. Not thread-safe."""

    def __init__(self, files: Mapping[int, TargetFile]) -> None:
        self._files = files
        self._ranges: dict[int, _Ranges] = {}

    def absorb(self, extents: Iterable[Extent]) -> None:
        """Count in what a tile wrote.

        Raises
        ------
        ContradictionError
            Something was written twice.
        """
        for number, offset, nbytes, crc in extents:
            self._of(number).absorb(offset, nbytes, crc)

    def seal(self, number: int) -> tuple[int, list[tuple[int, bytes]]]:
        """The CRC-32 of a whole file, and what has to be patched into it first: ``(offset, 4 bytes)``.

        Raises
        ------
        ContradictionError
            Some byte of the file is nobody's.
        """
        file, ranges = self._files[number], self._of(number)
        wanted = {crc.offset: crc for crc in file.crcs if crc.nbytes}
        for offset, data in file.static:
            for at, part in _split(ranges.edges, offset, data):
                if ranges.at(at)[0].offset in wanted:
                    ranges.add(at, memoryview(part))
        patches = []
        for crc in file.crcs:
            value = self._whole(number, ranges.at(crc.offset)[0]) if crc.nbytes else 0
            patches += [(at, value.to_bytes(4, "little")) for at in crc.patches]
        patches.sort()
        for offset, data in file.static:
            for at, part in _split(ranges.edges, offset, data):
                if ranges.at(at)[0].offset not in wanted:
                    ranges.add(at, memoryview(_patched(at, part, patches)))
        total, at = 0, 0
        while at < file.nbytes:
            running, hi = ranges.at(at)
            total = crc32_combine(total, self._whole(number, running), hi - at) if at else self._whole(number, running)
            at = hi
        return total, patches

    def _of(self, number: int) -> _Ranges:
        if number not in self._ranges:
            self._ranges[number] = _Ranges(self._files[number])
        return self._ranges[number]

    def _whole(self, number: int, running: RunningCrc) -> int:
        if not running.complete:
            raise ContradictionError(
                "a part of a target file was never written",
                file=self._files[number].path,
                expected=f"{running.nbytes} bytes from {running.offset}",
                actual=f"{sum(n for _, n, _ in running.extents)} bytes",
            )
        return running.value


def _split(edges: list[int], offset: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    """The parts of static bytes that lie in one range each."""
    at, end = offset, offset + len(data)
    while at < end:
        index = bisect_right(edges, at)
        stop = min(end, edges[index]) if index < len(edges) else end
        yield at, data[at - offset : stop - offset]
        at = stop


def _patched(offset: int, data: bytes, patches: Sequence[tuple[int, bytes]]) -> bytes:
    """Static bytes with the patches, ascending, that fall into them."""
    made = bytearray(data)
    for at, patch in patches[bisect_left(patches, (offset, b"")) : bisect_left(patches, (offset + len(data), b""))]:
        made[at - offset : at - offset + len(patch)] = patch
    return bytes(made)
