"""CRC-32 (zip's polynomial) of data that is written in pieces, in any order, by several threads.

1. `crc32` is `isal`'s where it is installed, which is many times faster than zlib; the numbers are the same.
2. `crc32_combine` joins the checksums of two neighbours without their bytes: appending n bytes multiplies the first
   checksum by x^(8n) modulo the polynomial.
3. `RunningCrc` collects a range's extents, joins neighbours as they meet, and yields the total once nothing is missing.

Boundary: pure arithmetic; no IO, no locks.
"""

from __future__ import annotations

import zlib
from bisect import bisect_left
from functools import lru_cache
from types import ModuleType

from ..errors import UsageError

try:
    from isal import isal_zlib as _found
except ImportError:
    isal: ModuleType | None = None
else:
    isal = _found

__all__ = ["RunningCrc", "combine_in_python", "crc32", "crc32_combine"]

_POLYNOMIAL = 0xEDB88320  # bit-reversed: the highest bit is x^0


def crc32(data: bytes | bytearray | memoryview, value: int = 0) -> int:
    """CRC-32 of `data`, continuing from `value`.

    >>> hex(crc32(b"123456789"))
    '0xcbf43926'
    """
    return int(isal.crc32(data, value)) if isal is not None else zlib.crc32(data, value)


def crc32_combine(crc1: int, crc2: int, len2: int) -> int:
    """CRC-32 of two neighbours, from the checksums of both and the length of the second.

    >>> crc32_combine(crc32(b"shard"), crc32(b"wright"), 6) == crc32(b"shardwright")
    True
    """
    return int(isal.crc32_combine(crc1, crc2, len2)) if isal is not None else combine_in_python(crc1, crc2, len2)


def combine_in_python(crc1: int, crc2: int, len2: int) -> int:
    """`crc32_combine` without isal; a few microseconds for a length seen before, and a run has few."""
    return _multiply(_shift(len2), crc1) ^ crc2


def _multiply(a: int, b: int) -> int:
    """a·b modulo the polynomial, over GF(2)."""
    product = 0
    while a:
        if a & 0x80000000:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


@lru_cache(maxsize=4096)
def _shift(nbytes: int) -> int:
    """x^(8·nbytes) modulo the polynomial, by squaring."""
    power, square = 0x80000000, 0x00800000  # x^0, x^8
    while nbytes:
        if nbytes & 1:
            power = _multiply(square, power)
        square = _multiply(square, square)
        nbytes >>= 1
    return power


class RunningCrc:
    """The CRC-32 of ``[offset, offset + nbytes)``, from extents in any order.

    Not thread-safe: the caller locks around `add`.

    >>> whole = RunningCrc(100, 6)
    >>> whole.add(103, 3, crc32(b"def"))
    >>> whole.complete
    False
    >>> whole.add(100, 3, crc32(b"abc"))
    >>> whole.complete, whole.value == crc32(b"abcdef")
    (True, True)
    """

    __slots__ = ("_runs", "_starts", "nbytes", "offset")

    def __init__(self, offset: int, nbytes: int) -> None:
        self.offset = offset
        self.nbytes = nbytes
        self._starts: list[int] = []
        self._runs: dict[int, tuple[int, int]] = {}  # start -> (end, crc)

    def add(self, offset: int, nbytes: int, crc: int) -> None:
        """Take one extent.

        Raises
        ------
        UsageError
            It lies outside the range, or overlaps what was added before.
        """
        end = offset + nbytes
        if nbytes < 0 or offset < self.offset or end > self.offset + self.nbytes:
            raise UsageError("an extent lies outside the range it belongs to", expected=(self.offset, self.nbytes), actual=(offset, nbytes))
        if nbytes == 0:
            return
        at = bisect_left(self._starts, offset)
        before = self._starts[at - 1] if at else None
        after = self._starts[at] if at < len(self._starts) else None
        if (before is not None and self._runs[before][0] > offset) or (after is not None and after < end):
            raise UsageError("two extents of one range overlap", actual=(offset, nbytes))
        if after == end:
            end, crc_after = self._runs.pop(end)
            crc = crc32_combine(crc, crc_after, end - self._starts.pop(at))
        if before is not None and self._runs[before][0] == offset:
            self._runs[before] = (end, crc32_combine(self._runs[before][1], crc, end - offset))
        else:
            self._starts.insert(at, offset)
            self._runs[offset] = (end, crc)

    @property
    def complete(self) -> bool:
        """Whether every byte of the range has been added."""
        return self.nbytes == 0 or (len(self._starts) == 1 and self._runs[self._starts[0]][0] - self._starts[0] == self.nbytes)

    @property
    def value(self) -> int:
        """The checksum of the whole range, once `complete`."""
        if not self.complete:
            raise UsageError("a checksum is asked for before its range is complete", expected=f"{self.nbytes} bytes")
        return self._runs[self.offset][1] if self.nbytes else 0

    @property
    def extents(self) -> list[tuple[int, int, int]]:
        """What has been added so far: ``(offset, nbytes, crc)``, joined and ascending."""
        return [(start, self._runs[start][0] - start, self._runs[start][1]) for start in self._starts]
