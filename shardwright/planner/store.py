"""Where source files are: the `Store` protocol, and the local one.

The planner reads headers through a store that is handed to it and never opens a file itself. A store knows names
(POSIX paths relative to its root), sizes and byte ranges; it cannot write.

A name out of a manifest is untrusted: absolute names and ``..`` are refused. A link that lies in the folder is followed
(the Hugging Face cache is made of them), but only regular files are opened, so that a pipe or a device that is called
``model.safetensors`` neither hangs the reader nor is read.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Protocol

from ..errors import CheckpointError, ContainerError

__all__ = ["LocalStore", "Stat", "Store"]

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


@dataclass(frozen=True, slots=True)
class Stat:
    """Size in bytes and modification time in nanoseconds."""

    nbytes: int
    mtime_ns: int


class Store(Protocol):
    """Read-only access to one checkpoint's files."""

    @property
    def root(self) -> str:
        """What the user called it, for messages and plans."""

    def list(self) -> tuple[str, ...]:
        """Every file below the root, sorted, as relative POSIX paths."""

    def exists(self, path: str) -> bool:
        """Whether `path` is a file of this store."""

    def stat(self, path: str) -> Stat:
        """Size and modification time."""

    def read(self, path: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        """Exactly `nbytes` bytes from `offset`, or the rest of the file."""


class LocalStore:
    """A directory, or a single file (then the root is its folder and `only` its name).

    Parameters
    ----------
    names
        The files that `list` tells, where the folder is not to be walked.
    """

    def __init__(self, path: str | os.PathLike[str], names: tuple[str, ...] | None = None) -> None:
        given = Path(path)
        if not given.exists():
            raise CheckpointError("no such file or directory", file=given)
        if not given.is_file() and not given.is_dir():
            raise CheckpointError("neither a folder nor a regular file", file=given)
        self.only = given.name if given.is_file() else None
        self._root = given.parent if given.is_file() else given
        self._names = names

    @property
    def root(self) -> str:
        return str(self._root)

    def list(self) -> tuple[str, ...]:
        if self._names is None:
            self._names = (self.only,) if self.only is not None else tuple(sorted(self._walk()))
        return self._names

    def exists(self, path: str) -> bool:
        try:
            return S_ISREG(os.stat(self._path(path)).st_mode)
        except OSError as error:
            if error.errno in _ABSENT:
                return False
            raise _unreadable(error, path) from None

    def stat(self, path: str) -> Stat:
        try:
            found = os.stat(self._path(path))
        except OSError as error:
            raise _unreadable(error, path) from None
        _regular(found, path)
        return Stat(found.st_size, found.st_mtime_ns)

    def read(self, path: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        # Before it is opened too: opening a device can be an act.
        self.stat(path)
        try:
            with open(self._path(path), "rb", buffering=0, opener=_open_at_once) as file:
                _regular(found := os.fstat(file.fileno()), path)
                end = found.st_size
                want = end - offset if nbytes is None else nbytes
                # Checked against the file's end first: a length read from the file must not size an allocation.
                if offset < 0 or want < 0 or offset + want > end:
                    raise ContainerError(
                        "a read would go past the end of the file", file=path, expected=f"{offset + want} bytes", actual=f"{end} bytes"
                    )
                file.seek(offset)
                data = bytearray()
                while len(data) < want:
                    part = file.read(want - len(data))
                    if not part:
                        raise ContainerError("the file shrank while it was read", file=path)
                    data += part
                return bytes(data)
        except CheckpointError:
            raise
        except OSError as error:
            raise _unreadable(error, path) from None

    def _walk(self) -> Iterator[str]:
        """Every file below the root. Hidden folders and links to folders are not entered; depth is the file system's affair."""
        pending = [""]
        while pending:
            base = pending.pop()
            try:
                with os.scandir(self._root / base) as entries:
                    found = [*entries]
            except PermissionError as error:
                if base:  # a mount's lost+found, for example, is nobody's business
                    continue
                raise _unreadable(error, self.root) from None
            except OSError as error:
                raise _unreadable(error, base or self.root) from None
            for entry in found:
                name = _writable(f"{base}{entry.name}", self.root)
                if not _is_folder(entry):
                    yield name
                elif not entry.is_symlink() and not entry.name.startswith("."):
                    pending.append(f"{name}/")

    def _path(self, path: str) -> Path:
        # A name out of an index or manifest is untrusted: it must stay below the root.
        if path.startswith("/") or ".." in path.split("/") or "\0" in path:
            raise CheckpointError("a path leaves the checkpoint's folder", file=path, remedy="Correct the index or manifest that names it")
        return self._root / _writable(path, self.root)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads round in circles: a file that nobody can read
        return False


def _writable(path: str, root: str) -> str:
    """The path, if it could be written into a manifest again."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise CheckpointError("a file's name is not UTF-8", file=root, actual=ascii(path), remedy="Rename it") from None
    return path


def _open_at_once(path: str, flags: int) -> int:
    # A pipe that took the file's place since it was looked at would make a plain open wait for a writer.
    return os.open(path, flags | os.O_NONBLOCK)


def _regular(found: os.stat_result, path: str) -> None:
    if not S_ISREG(found.st_mode):
        raise CheckpointError("not a regular file", file=path, remedy="Remove the pipe, device or folder of that name")


def _unreadable(error: OSError, path: str) -> CheckpointError:
    if isinstance(error, FileNotFoundError):
        return CheckpointError("a file is missing", file=path)
    return CheckpointError(f"a file cannot be read ({error.strerror})", file=path, remedy="Check its permissions and its disk")
