"""Source files: opened read-only when first needed, checked against the plan, read at any offset by any thread."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from ..errors import PlanError, RunError
from ..planner.plan import SourceFile
from . import system
from .descriptors import Descriptors, failed, open_regular
from .transfer import Read

__all__ = ["RESTORE", "SourceFiles", "changed", "check_unchanged", "unchecked"]

CALL_BYTES = 4 << 20
"""Longest single read."""
RESTORE = "Put the file back as it was, with its time, and resume; or start over with --fresh"
"""What to do when the source of a run that can be resumed has changed."""


def unchecked(path: str) -> SourceFile:
    """A source file that is read whatever its size and time."""
    return SourceFile(path, -1, -1, "")


def check_unchanged(root: str | os.PathLike[str], files: Sequence[SourceFile]) -> None:
    """Every source file is there, as it was when it was planned for.

    Raises
    ------
    PlanError
        Names the first that is not, and what changed.
    """
    for file in files:
        try:
            found = os.stat(Path(root) / file.path)
        except OSError as error:
            raise PlanError(f"a source file cannot be found ({error.strerror})", file=Path(root) / file.path, remedy="Plan again") from None
        if (what := changed(file, found.st_size, found.st_mtime_ns)) is not None:
            expected, actual = what
            raise PlanError(
                "a source file has changed since it was planned", file=file.path, expected=expected, actual=actual, remedy="Plan again"
            )


def changed(file: SourceFile, nbytes: int, mtime_ns: int) -> tuple[str, str] | None:
    """What has changed of a source file, as expected and actual; None if nothing has."""
    if file.nbytes < 0 or (nbytes, mtime_ns) == (file.nbytes, file.mtime_ns):
        return None
    if nbytes != file.nbytes:
        return f"{file.nbytes} bytes", f"{nbytes} bytes"
    return f"modified {_when(file.mtime_ns)}", f"modified {_when(mtime_ns)}"


def _when(ns: int) -> str:
    return f"{datetime.fromtimestamp(ns // 10**9, UTC):%Y-%m-%d %H:%M:%S}.{ns % 10**9:09d} UTC"


class SourceFiles:
    """The files of a source, by their number in the plan.

    Parameters
    ----------
    root
        Where their paths start.
    remedy
        What to do when a file has changed.
    limit
        Most files kept open.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        files: Sequence[SourceFile] | Mapping[int, SourceFile],
        *,
        remedy: str = "Run again when nothing changes the file",
        limit: int | None = None,
    ) -> None:
        self._remedy = remedy
        self.root = Path(root)
        self.files = dict(files) if isinstance(files, Mapping) else dict(enumerate(files))
        self._descriptors = Descriptors(self._open, limit)

    @contextmanager
    def reading(self, number: int) -> Iterator[Read]:
        """A function that fills buffers, one after the other, from an offset of that file on.

        Raises
        ------
        RunError
            The file is not the one that was planned for (found when it is opened), it ends early, or the system
            reports an error.
        """
        with self._descriptors.use(number) as fd:
            try:
                yield partial(self._read, fd, number)
            except OSError as error:
                raise failed(error, self.files[number].path, "reading") from error

    def pread_into(self, number: int, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers from one place of one file."""
        with self.reading(number) as read:
            read(offset, buffers)

    def check(self, numbers: Iterable[int]) -> None:
        """These files are still what they were when they were planned for.

        Raises
        ------
        RunError
            Names the first that is not, and what changed.
        """
        for number in numbers:
            file = self.files[number]
            try:
                found = os.stat(self.root / file.path)
            except OSError as error:
                raise RunError(f"a source file is gone ({error.strerror})", file=file.path, remedy=self._remedy) from error
            self._compare(file, found)

    def close(self) -> None:
        """Close every file; a later read opens it again."""
        self._descriptors.close()

    def _compare(self, file: SourceFile, found: os.stat_result) -> None:
        if (what := changed(file, found.st_size, found.st_mtime_ns)) is not None:
            raise RunError("a source file changed during the run", file=file.path, expected=what[0], actual=what[1], remedy=self._remedy)

    def _read(self, fd: int, number: int, offset: int, buffers: Sequence[memoryview]) -> None:
        if len(buffers) == 1:
            self._fill(fd, number, offset, buffers[0])
            return
        got = system.preadv(fd, buffers, offset)
        for buffer in buffers if got < sum(map(len, buffers)) else ():
            # A short vectored read: whatever is not in place yet is read plainly.
            if got < len(buffer):
                self._fill(fd, number, offset + got, buffer[got:])
            offset, got = offset + len(buffer), max(0, got - len(buffer))

    def _fill(self, fd: int, number: int, offset: int, buffer: memoryview) -> None:
        at = 0
        while at < len(buffer):
            got = system.preadv(fd, (buffer[at : at + CALL_BYTES],), offset + at)
            if not got:
                raise RunError(
                    "the source shrank while it was read",
                    file=self.files[number].path,
                    expected=f"{offset + len(buffer)} bytes",
                    actual=f"{offset + at} bytes",
                )
            at += got

    def _open(self, number: int) -> int:
        file = self.files[number]
        try:
            fd = open_regular(self.root / file.path)
        except FileNotFoundError:
            raise RunError("a source file is missing", file=file.path, remedy=self._remedy) from None
        except OSError as error:
            raise failed(error, file.path, "opening") from error
        try:
            self._compare(file, os.fstat(fd))
        except RunError:
            os.close(fd)
            raise
        return fd
