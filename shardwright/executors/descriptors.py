"""Open files: opened when first needed, kept open within the process's limit, closed together.

`Descriptors.use` lends a file descriptor; one that is lent is never closed. When the cache is full the file that was
used longest ago is closed. Errors of the system become `RunError`, with the file and what to do.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from ..errors import RunError
from . import system

__all__ = ["Descriptors", "descriptor_limit", "failed", "open_regular", "sync_path"]

_REMEDIES = {
    errno.ENOSPC: "The disk is full: free some space and run again",
    errno.EDQUOT: "The disk quota is used up: free some space and run again",
    errno.EIO: "The device reported an error: see the system's log",
    errno.EACCES: "Check the permissions",
    errno.EMFILE: "Raise the limit on open files (ulimit -n)",
    errno.ENFILE: "Raise the system's limit on open files",
}


def failed(error: OSError, file: object, doing: str) -> RunError:
    """The system's error as ours.

    >>> print(failed(OSError(errno.ENOSPC, "No space left on device"), "a.bin", "writing"))
    writing failed: No space left on device: file a.bin. The disk is full: free some space and run again
    """
    text = error.strerror or str(error)
    return RunError(f"{doing} failed: {text}", file=file, remedy=_REMEDIES.get(error.errno or 0))


def descriptor_limit() -> int:
    """Files that one side (sources or targets) may keep open: half of what the process may, less a reserve."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if soft == resource.RLIM_INFINITY else max(4, min(4096, (soft - 64) // 2))


class Descriptors:
    """A cache of file descriptors by file number.

    Parameters
    ----------
    open_file
        Opens a file by number.
    limit
        Most files kept open; files in use may exceed it.
    """

    def __init__(self, open_file: Callable[[int], int], limit: int | None = None) -> None:
        self._open = open_file
        self._limit = descriptor_limit() if limit is None else limit
        self._lock = Lock()
        self._fds: OrderedDict[int, int] = OrderedDict()
        self._users: dict[int, int] = {}

    @contextmanager
    def use(self, number: int) -> Iterator[int]:
        """The open descriptor of a file, for the length of a ``with`` block."""
        with self._lock:
            fd = self._fds.get(number)
            if fd is None:
                self._evict()
                fd = self._fds[number] = self._open(number)
            else:
                self._fds.move_to_end(number)
            self._users[number] = self._users.get(number, 0) + 1
        try:
            yield fd
        finally:
            with self._lock:
                self._users[number] -= 1

    def _evict(self) -> None:
        if len(self._fds) >= self._limit:
            oldest = next((n for n in self._fds if not self._users.get(n)), None)
            if oldest is not None:
                os.close(self._fds.pop(oldest))

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            while self._fds:
                os.close(self._fds.popitem()[1])


def open_regular(path: str | os.PathLike[str]) -> int:
    """A descriptor that reads an ordinary file; anything else (a pipe would wait for ever) is refused without waiting.

    Raises
    ------
    OSError
        It cannot be opened, or is no ordinary file.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not an ordinary file", os.fspath(path))
    return fd


def sync_path(path: Path) -> None:
    """Flush a file or directory to its device."""
    fd = os.open(path, os.O_RDONLY)
    try:
        system.sync(fd)
    except OSError as error:
        raise failed(error, path, "syncing") from error
    finally:
        os.close(fd)
