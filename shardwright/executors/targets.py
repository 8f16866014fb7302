"""Target files: laid out before data, then written at final offsets in any order by any thread.

1. `TargetFiles.create` makes every folder and every file at its full size and reserves the blocks where the file system
   can, so that a full disk shows before any work; then it writes every byte that is not tensor data. `reopen` takes the
   files of an earlier run instead.
2. `writing` lends a function that writes at an offset, in calls of at most 1 MiB (longer calls make the kernel use
   page-cache units that are several times slower to fill).
3. `sync` flushes files, then folders.

A sink is anything with `files`, `writing` and `witnessed`; `CompareFiles` in `compare` is the other one.
"""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock

from ..errors import DiskSpaceError, PlanError
from ..planner.plan import TargetFile
from . import system
from .descriptors import Descriptors, failed, sync_path
from .stopping import Stop
from .transfer import Write

__all__ = ["CALL_BYTES", "TargetFiles"]

CALL_BYTES = 1 << 20
"""Longest single write."""
WRITEBACK_BYTES = 16 << 20
"""Bytes written to a file before the kernel is asked to start writing them back, so that a sync has little left."""


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
        self._descriptors = Descriptors(self._open, limit)
        self._unsynced: dict[int, int] = {}
        # The kernel lets one write at a time into a file, and others wait for it by spinning: here they sleep instead.
        self._turns: defaultdict[int, Lock] = defaultdict(Lock)
        self._stop = stop or Stop()

    def create(self) -> None:
        """Make every file at full size, with its static bytes.

        Raises
        ------
        DiskSpaceError
            The disk or the quota has too little room.
        RunError
            The system reports another error.
        """
        for number, file in self.files.items():
            self._stop.raise_cause()
            path = self._path(number)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                try:
                    system.ftruncate(fd, file.nbytes)
                    system.allocate(fd, file.nbytes)
                finally:
                    os.close(fd)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    what = "disk has" if error.errno == errno.ENOSPC else "quota leaves"
                    raise DiskSpaceError(
                        f"the target's {what} too little room",
                        file=file.path,
                        expected=f"{file.nbytes} bytes",
                        remedy="Free some space or choose another disk",
                    ) from error
                raise failed(error, file.path, "creating") from error
            self._write_static(number)

    def reopen(self) -> None:
        """Take the files that `create` made in an earlier run; static bytes are written again, for what was sealed may have been torn.

        Raises
        ------
        PlanError
            One is not there, or has another size.
        """
        for number, file in self.files.items():
            self._stop.raise_cause()
            path = self._path(number)
            size = path.stat().st_size if path.is_file() else None
            if size != file.nbytes:
                raise PlanError(
                    "a file of the unfinished target is not what the plan says",
                    file=path,
                    expected=f"{file.nbytes} bytes",
                    actual="missing" if size is None else f"{size} bytes",
                    remedy="Start over with --fresh",
                )
            self._write_static(number)

    def witnessed(self, number: int) -> bool:
        """Every file is."""
        return True

    @contextmanager
    def writing(self, number: int) -> Iterator[Write]:
        """A function that writes bytes at an offset of that file.

        Raises
        ------
        RunError
            The system reports an error.
        """
        with self._descriptors.use(number) as fd:
            try:
                yield partial(self._pwrite, fd, number)
            except OSError as error:
                raise failed(error, self.files[number].path, "writing") from error

    def sync(self, numbers: Iterable[int] | None = None) -> None:
        """Flush files to the device; with all of them (looking at `stop`) the folders that hold them, too."""
        for number in self.files if numbers is None else numbers:
            if numbers is None:  # the batch of finished tiles that a stopped run ends with is synced all the same
                self._stop.raise_cause()
            with self._descriptors.use(number) as fd:
                try:
                    system.sync(fd)
                except OSError as error:
                    raise failed(error, self.files[number].path, "syncing") from error
        if numbers is None:
            for folder, _, _ in os.walk(self.root, topdown=False):
                sync_path(Path(folder))

    def close(self) -> None:
        """Close every file."""
        self._descriptors.close()

    def _write_static(self, number: int) -> None:
        with self.writing(number) as write:
            for offset, data in self.files[number].static:
                write(offset, memoryview(data))

    def _pwrite(self, fd: int, number: int, offset: int, data: memoryview) -> None:
        at, end = 0, len(data)
        with self._turns[number]:
            while at < end:
                at += system.pwrite(fd, data[at : at + CALL_BYTES], offset + at)
        # Lanes may count one another's bytes twice or not at all: the figure only says when.
        self._unsynced[number] = self._unsynced.get(number, 0) + end
        if self._unsynced[number] >= WRITEBACK_BYTES:
            self._unsynced[number] = 0
            system.start_writeback(fd)

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
