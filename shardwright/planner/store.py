"""Where source files are: the `Store` protocol, and the local one.

The planner reads headers through a store that is handed to it and never opens a file itself. A store knows names
(POSIX paths relative to its root), sizes and byte ranges; it cannot write.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import CheckpointError, ContainerError

__all__ = ["LocalStore", "Stat", "Store"]


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
    """A directory, or a single file (then the root is its folder and `only` its name)."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        given = Path(path)
        if not given.exists():
            raise CheckpointError("no such file or directory", file=given)
        self.only = given.name if given.is_file() else None
        self._root = given.parent if given.is_file() else given
        self._names: tuple[str, ...] | None = None

    @property
    def root(self) -> str:
        return str(self._root)

    def list(self) -> tuple[str, ...]:
        if self._names is None:
            if self.only is not None:
                self._names = (self.only,)
            else:
                found = []
                for folder, folders, files in os.walk(self._root):
                    folders[:] = sorted(d for d in folders if not d.startswith("."))
                    base = os.path.relpath(folder, self._root)
                    found += [name if base == "." else f"{base}/{name}".replace(os.sep, "/") for name in files]
                self._names = tuple(sorted(found))
        return self._names

    def exists(self, path: str) -> bool:
        return self._path(path).is_file()

    def stat(self, path: str) -> Stat:
        try:
            found = self._path(path).stat()
        except OSError as error:
            raise _unreadable(error, path) from None
        return Stat(found.st_size, found.st_mtime_ns)

    def read(self, path: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        try:
            with open(self._path(path), "rb", buffering=0) as file:
                end = os.fstat(file.fileno()).st_size
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

    def _path(self, path: str) -> Path:
        # A name out of an index or manifest is untrusted: it must stay below the root.
        if path.startswith("/") or ".." in path.split("/") or "\0" in path:
            raise CheckpointError("a path leaves the checkpoint's folder", file=path, remedy="Correct the index or manifest that names it")
        return self._root / path


def _unreadable(error: OSError, path: str) -> CheckpointError:
    if isinstance(error, FileNotFoundError):
        return CheckpointError("a file is missing", file=path)
    return CheckpointError(f"a file cannot be read ({error.strerror})", file=path, remedy="Check its permissions and its disk")
