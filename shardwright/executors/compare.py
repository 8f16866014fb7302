"""Verification: the same run with a sink that compares instead of writing.

`CompareFiles` reads the target where a conversion would write and notes what differs. A difference belongs to the
target tensor that holds the bytes; each tensor is noted once, with its first differing element. Bytes outside tensors
(headers, checksums) are noted per file.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from threading import Lock

import numpy as np

from ..planner.plan import TargetFile, TensorEntry
from ..planner.tensor.dtypes import dtype
from .descriptors import Descriptors, failed, open_regular
from .extents import Checksums, Extent
from .transfer import Write

__all__ = ["CompareFiles", "Difference", "first_difference"]

BLOCK_BYTES = 256 << 10
"""Bytes read back at once; one buffer per call in flight."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Something in the target is not what the plan makes of the source.

    Attributes
    ----------
    file
        Path below the target root.
    what
        ``"tensor"``, ``"header"`` (bytes that belong to no tensor), ``"missing"`` or ``"size"`` (of a whole file).
    offset
        First differing byte in the file; for a size, the target's.
    tensor, rank
        The target tensor, if one holds that byte.
    index
        Its first differing element, flat and row-major.
    """

    file: str
    what: str
    offset: int
    tensor: str | None = None
    rank: int = 0
    index: int | None = None


def first_difference(a: memoryview, b: memoryview) -> int | None:
    """Index of the first byte that differs, or None.

    >>> first_difference(memoryview(b"abcd"), memoryview(b"abxd"))
    2
    """
    for at in range(0, len(a), BLOCK_BYTES):
        x, y = (np.frombuffer(v[at : at + BLOCK_BYTES], np.uint8) for v in (a, b))
        words = len(x) // 8 * 8
        if not np.array_equal(x[:words].view(np.uint64), y[:words].view(np.uint64)) or not np.array_equal(x[words:], y[words:]):
            return at + int(np.argmax(x != y))
    return None


class CompareFiles:
    """A sink over an existing target.

    Parameters
    ----------
    tensors
        The plan's target tensors.
    """

    def __init__(
        self, root: str | os.PathLike[str], files: Sequence[TargetFile], tensors: Sequence[TensorEntry], *, limit: int | None = None
    ) -> None:
        self.root = Path(root)
        self.files = dict(enumerate(files))
        self._checksums = Checksums(self.files)
        self._tensors = sorted((t for t in tensors if prod(t.shape)), key=lambda t: (t.file, t.offset))
        self._places = [(t.file, t.offset) for t in self._tensors]
        self._found: dict[tuple[int, int], int] = {}
        self._files_found: dict[int, Difference] = {}
        self._lock = Lock()
        self._descriptors = Descriptors(self._open, limit)

    def check_files(self) -> None:
        """Compare sizes and every static byte."""
        for number, file in self.files.items():
            try:
                size = (self.root / file.path).stat().st_size
            except OSError:
                self._files_found[number] = Difference(file.path, "missing", 0)
                continue
            if size != file.nbytes:
                self._files_found[number] = Difference(file.path, "size", size)
                continue
            patches = [(p, p + 4) for crc in file.crcs for p in crc.patches]
            for offset, data in file.static:
                for at, part in _outside(offset, memoryview(data), patches):
                    with self._descriptors.use(number) as fd:
                        self._compare(fd, number, at, part)

    @contextmanager
    def writing(self, number: int) -> Iterator[Write]:
        """A function that compares bytes with those at an offset of that file."""
        if number in self._files_found:
            yield _ignore
            return
        with self._descriptors.use(number) as fd:
            try:
                yield partial(self._compare, fd, number)
            except OSError as error:
                raise failed(error, self.files[number].path, "reading") from error

    def witnessed(self, number: int) -> bool:
        """Files that hold checksums of data are: those are compared, too."""
        return bool(self.files[number].crcs)

    def absorb(self, extents: Iterable[Extent]) -> None:
        """A tile has been compared."""
        with self._lock:
            self._checksums.absorb(extents)

    def finish(self) -> None:
        """Compare the checksums."""
        for number, file in self.files.items():
            if file.crcs and number not in self._files_found:
                for offset, data in self._checksums.seal(number)[1]:
                    with self._descriptors.use(number) as fd:
                        self._compare(fd, number, offset, memoryview(data))

    def close(self) -> None:
        """Close every file."""
        self._descriptors.close()

    def differences(self) -> list[Difference]:
        """What was found, by file and offset."""
        found = [*self._files_found.values()]
        for (number, tensor), offset in self._found.items():
            path = self.files[number].path
            if tensor < 0:
                found.append(Difference(path, "header", offset))
            else:
                entry = self._tensors[tensor]
                index = (offset - entry.offset) * 8 // dtype(entry.dtype).bits
                found.append(Difference(path, "tensor", offset, entry.name, entry.rank, index))
        return sorted(found, key=lambda d: (d.file, d.offset))

    def _compare(self, fd: int, number: int, offset: int, data: memoryview) -> None:
        buffer = memoryview(bytearray(min(len(data), BLOCK_BYTES)))
        for at in range(0, len(data), BLOCK_BYTES):
            part = data[at : at + BLOCK_BYTES]
            got = os.preadv(fd, (buffer[: len(part)],), offset + at)
            different = first_difference(part[:got], buffer[:got])
            if different is None and got < len(part):
                different = got
            if different is not None:
                self._note(number, offset + at + different)
                return

    def _note(self, number: int, offset: int) -> None:
        tensor = self._tensor_at(number, offset)
        with self._lock:
            first = self._found.get((number, tensor), offset)
            self._found[number, tensor] = min(first, offset)

    def _tensor_at(self, number: int, offset: int) -> int:
        """The tensor that holds a byte, or -1."""
        index = bisect_right(self._places, (number, offset)) - 1
        if index >= 0 and self._tensors[index].file == number:
            entry = self._tensors[index]
            if offset < entry.offset + dtype(entry.dtype).nbytes(prod(entry.shape)):
                return index
        return -1

    def _open(self, number: int) -> int:
        try:
            return open_regular(self.root / self.files[number].path)
        except OSError as error:
            raise failed(error, self.files[number].path, "opening") from error


def _outside(offset: int, data: memoryview, holes: Sequence[tuple[int, int]]) -> Iterator[tuple[int, memoryview]]:
    """The parts of data at `offset` that lie in none of the ranges."""
    at, end = offset, offset + len(data)
    for lo, hi in sorted(holes):
        if lo < end and hi > at:
            if lo > at:
                yield at, data[at - offset : lo - offset]
            at = hi
    if at < end:
        yield at, data[at - offset :]


def _ignore(offset: int, data: memoryview) -> None:
    """For a file that is known to differ as a whole."""
