"""The system calls of a run: everything that reads a source, changes a target or makes a change durable.

They are called as ``system.pwrite(…)``, so that tests can count them, fail them, shorten them, or stop the process
before and after any of them. What the Python standard library lacks (``fallocate`` without its slow fallback,
``sync_file_range``, ``renameat2``) is called through the C library.

Boundary: errors are the system's own (`OSError`); who calls turns them into ours.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys

__all__ = ["allocate", "append", "exchange", "ftruncate", "preadv", "pwrite", "rename", "start_writeback", "sync", "unlink"]

_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)

preadv = os.preadv
"""``(fd, buffers, offset)`` → bytes read, perhaps fewer than asked for; 0 at the end of the file."""
ftruncate = os.ftruncate
"""``(fd, nbytes)``."""
rename = os.rename
"""``(old, new)``: atomic; a folder takes the place of nothing or of an empty folder."""
unlink = os.unlink
"""``(path)``."""


def pwrite(fd: int, data: memoryview, offset: int) -> int:
    """Write at an offset; bytes written, perhaps fewer than given."""
    return os.pwrite(fd, data, offset)


def append(fd: int, data: bytes) -> int:
    """Write at the end of the journal; bytes written."""
    return os.write(fd, data)


def sync(fd: int) -> None:
    """Flush a file's data, or a folder's entries, to the device."""
    os.fsync(fd)


def allocate(fd: int, nbytes: int) -> None:
    """Reserve a file's blocks where that is cheap.

    `os.posix_fallocate` is not used: where the file system cannot reserve, it writes to every block instead.

    Raises
    ------
    OSError
        There is no room, or the quota is used up.
    """
    if nbytes and _LIBC is not None and _LIBC.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)) != 0:
        code = ctypes.get_errno()
        if code in _NO_ROOM:
            raise OSError(code, os.strerror(code))


def start_writeback(fd: int) -> None:
    """Ask the kernel to begin writing a file's pages, without waiting for it."""
    if _LIBC is not None:
        _LIBC.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)


def exchange(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Swap two paths atomically; False where the kernel or the file system cannot (then nothing has changed).

    Raises
    ------
    OSError
        It failed for another reason.
    """
    if _LIBC is None or not hasattr(_LIBC, "renameat2"):
        return False
    if _LIBC.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), os.fspath(one))
