"""Checksums of target data that many threads write in any order.

Each range that a container wants a CRC-32 of has a `RunningCrc`, each file a lock. A checksum is computed outside the
lock and joined under it. On a cluster each process exports its extents and the client absorbs them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Iterable, Iterator, Mapping
from threading import Lock

from ..errors import ContradictionError
from ..planner.plan import TargetFile
from .checksums import RunningCrc, crc32
from .transfer import Write

__all__ = ["Checksums", "Extent"]

Extent = tuple[int, int, int, int, int]
"""``(file, range, offset, nbytes, crc)``: what one process has written of one range."""


class Checksums:
    """The checksummed ranges of a set of files, by number."""

    def __init__(self, files: Mapping[int, TargetFile]) -> None:
        self._files = files
        self._starts = {n: [c.offset for c in file.crcs] for n, file in files.items() if file.crcs}
        self._locks = {n: Lock() for n in self._starts}
        self._ranges = {n: [RunningCrc(c.offset, c.nbytes) for c in files[n].crcs] for n in self._starts}

    def watching(self, number: int, write: Write) -> Write:
        """`write` for a file, which also adds to its checksums."""

        def watched(offset: int, data: memoryview) -> None:
            write(offset, data)
            self.add(number, offset, data)

        return watched

    def add(self, number: int, offset: int, data: memoryview) -> None:
        """`data` is in the file at `offset`."""
        ranges = self._files[number].crcs
        index = max(0, bisect_right(self._starts[number], offset) - 1)
        while index < len(ranges) and ranges[index].offset < offset + len(data):
            lo = max(offset, ranges[index].offset)
            hi = min(offset + len(data), ranges[index].offset + ranges[index].nbytes)
            if lo < hi:
                crc = crc32(data[lo - offset : hi - offset])
                with self._locks[number]:
                    self._ranges[number][index].add(lo, hi - lo, crc)
            index += 1

    def export(self) -> list[Extent]:
        """Every extent, to be absorbed elsewhere."""
        return [
            (number, index, *extent)
            for number, ranges in self._ranges.items()
            for index, running in enumerate(ranges)
            for extent in running.extents
        ]

    def absorb(self, extents: Iterable[Extent]) -> None:
        """Join extents that another process exported."""
        for number, index, offset, nbytes, crc in extents:
            with self._locks[number]:
                self._ranges[number][index].add(offset, nbytes, crc)

    def patches(self, skip: Container[int] = ()) -> Iterator[tuple[int, int, bytes]]:
        """``(file, offset, 4 bytes)`` for every place that a checksum goes to, except in the files to skip.

        Raises
        ------
        ContradictionError
            A range was not written completely.
        """
        for number, ranges in self._ranges.items():
            for region, running in zip(self._files[number].crcs, () if number in skip else ranges, strict=number not in skip):
                if not running.complete:
                    raise ContradictionError(
                        "a checksummed range was not written completely",
                        file=self._files[number].path,
                        expected=f"{region.nbytes} bytes from {region.offset}",
                        actual=f"{sum(n for _, n, _ in running.extents)} bytes",
                    )
                for offset in region.patches:
                    yield number, offset, running.value.to_bytes(4, "little")
