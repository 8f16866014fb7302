"""Target files: laid out before data, then written at final offsets in any order by any thread.

1. `TargetFiles.create` makes every folder and every file at its full size and reserves the blocks where the file system
   can, so that a full disk shows before any work; then it writes every byte that is not tensor data.
2. `writing` lends a function that writes at an offset, in calls of at most 1 MiB (longer calls make the kernel use
   page-cache units that are several times slower to fill).
3. Where a container wants checksums of data, the CRC of each written extent is kept; neighbours are joined at once.
   `finish` patches the checksums in.
4. `sync` flushes files, then folders.

A sink is anything with `writing` and `finish`; `CompareFiles` in `compare` is the other one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Protocol

from ..errors import PlanError
from ..planner.plan import TargetFile
from .descriptors import Descriptors, failed, sync_path
from .extents import Checksums
from .stopping import Stop
from .transfer import Write

__all__ = ["CALL_BYTES", "Sink", "TargetFiles"]

CALL_BYTES = 1 << 20
"""Longest single write."""
WRITEBACK_BYTES = 16 << 20
"""Bytes written to a file before the kernel is asked to start writing them back, so that the final sync has little left."""


_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_SYNC_FILE_RANGE_WRITE = 2


class Sink(Protocol):
    """Where a run's bytes go."""

    def writing(self, number: int) -> AbstractContextManager[Write]:
        """A function that takes bytes for an offset of that file."""

    def finish(self) -> None:
        """Everything was written: fill in what depends on all of it."""


class TargetFiles:
    """The files of a target below `root`, by their number in the plan.

    Parameters
    ----------
    limit
        Most files kept open.
    stop
        Looked at between files while they are made and synced.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        files: Sequence[TargetFile] | Mapping[int, TargetFile],
        *,
        limit: int | None = None,
        stop: Stop | None = None,
    ) -> None:
        self.root = Path(root)
        self.files = dict(files) if isinstance(files, Mapping) else dict(enumerate(files))
        self.checksums = Checksums(self.files)
        self._descriptors = Descriptors(self._open, limit)
        self._unsynced: dict[int, int] = {}
        # The kernel lets one write at a time into a file, and others wait for it by spinning: here they sleep instead.
        self._turns: defaultdict[int, Lock] = defaultdict(Lock)
        self._stop = stop or Stop()

    def create(self) -> None:
        """Make every file at full size, with its static bytes."""
        for number, file in self.files.items():
            self._stop.raise_cause()
            path = self._path(number)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                try:
                    _reserve(fd, file.nbytes)
                finally:
                    os.close(fd)
            except OSError as error:
                raise failed(error, file.path, "creating") from error
            with self.writing(number) as write:
                for offset, data in file.static:
                    write(offset, memoryview(data))

    @contextmanager
    def writing(self, number: int) -> Iterator[Write]:
        """A function that writes bytes at an offset of that file.

        Raises
        ------
        RunError
            The system reports an error.
        """
        with self._descriptors.use(number) as fd:
            write = partial(self._pwrite, fd, number)
            try:
                yield self.checksums.watching(number, write) if self.files[number].crcs else write
            except OSError as error:
                raise failed(error, self.files[number].path, "writing") from error

    def finish(self) -> None:
        """Patch in the checksums."""
        for number, offset, data in self.checksums.patches():
            with self._descriptors.use(number) as fd:
                self._pwrite(fd, number, offset, memoryview(data))

    def sync(self, numbers: Iterable[int] | None = None) -> None:
        """Flush files to the device, and with all of them the folders that hold them."""
        for number in self.files if numbers is None else numbers:
            self._stop.raise_cause()
            with self._descriptors.use(number) as fd:
                try:
                    os.fsync(fd)
                except OSError as error:
                    raise failed(error, self.files[number].path, "syncing") from error
        if numbers is None:
            for folder, _, _ in os.walk(self.root, topdown=False):
                sync_path(Path(folder))

    def close(self) -> None:
        """Close every file."""
        self._descriptors.close()

    def _pwrite(self, fd: int, number: int, offset: int, data: memoryview) -> None:
        at, end = 0, len(data)
        with self._turns[number]:
            while at < end:
                at += os.pwrite(fd, data[at : at + CALL_BYTES], offset + at)
        # Lanes may count one another's bytes twice or not at all: the figure only says when.
        self._unsynced[number] = self._unsynced.get(number, 0) + end
        if self._unsynced[number] >= WRITEBACK_BYTES:
            self._unsynced[number] = 0
            _start_writeback(fd)

    def _path(self, number: int) -> Path:
        path = self.files[number].path
        # A plan may have been read from a file: its paths must stay below the target.
        if path.startswith("/") or ".." in path.split("/") or "\0" in path:
            raise PlanError("a target path leaves the target's folder", file=path)
        return self.root / path

    def _open(self, number: int) -> int:
        try:
            return os.open(self._path(number), os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise failed(error, self.files[number].path, "opening") from error


def _reserve(fd: int, nbytes: int) -> None:
    """Full size, with blocks reserved where that is cheap.

    `os.posix_fallocate` is not used: where the file system cannot reserve, it writes to every block instead.
    """
    os.ftruncate(fd, nbytes)
    if nbytes and _LIBC is not None:
        if _LIBC.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)) != 0:
            code = ctypes.get_errno()
            if code in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
                raise OSError(code, os.strerror(code))


def _start_writeback(fd: int) -> None:
    if _LIBC is not None:
        _LIBC.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)
