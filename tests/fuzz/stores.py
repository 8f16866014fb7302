"""A checkpoint's files inside one fuzz input: a store in memory, and the frames that spell it as bytes.

A frame is ``<path>\\n<bytes here> <size>\\n`` and then that many bytes. The size may exceed the bytes: the rest reads as
zeros, as in a sparse file, so that a small input can claim a large file. `unpack` takes any bytes whatever: a broken
frame ends the tree, and a path that no file system could hold below a folder is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping

from shardwright.errors import CheckpointError, ContainerError
from shardwright.planner.store import Stat

__all__ = ["MemoryStore", "pack", "store_of", "unpack"]

MAX_SIZE = 1 << 45
"""Bytes of a claimed file: 32 TiB."""


class MemoryStore:
    """A `Store` over a dict; refuses what `LocalStore` refuses.

    Parameters
    ----------
    files
        Path to bytes.
    sizes
        Sizes of files that are longer than their bytes; the rest is zeros.
    """

    def __init__(self, files: Mapping[str, bytes], sizes: Mapping[str, int] | None = None, root: str = "/memory") -> None:
        self._files = dict(files)
        self._sizes = dict(sizes or {})
        self._root = root
        self._names = tuple(sorted(files))

    @property
    def root(self) -> str:
        return self._root

    def list(self) -> tuple[str, ...]:
        return self._names

    def exists(self, path: str) -> bool:
        return self._path(path) in self._files

    def stat(self, path: str) -> Stat:
        data = self._data(path)
        return Stat(max(len(data), self._sizes.get(path, 0)), 0)

    def read(self, path: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        data, end = self._data(path), self.stat(path).nbytes
        want = end - offset if nbytes is None else nbytes
        if offset < 0 or want < 0 or offset + want > end:
            raise ContainerError("a read would go past the end of the file", file=path, expected=offset + want, actual=end)
        part = data[offset : offset + want]
        return part if len(part) == want else part + bytes(want - len(part))

    def _data(self, path: str) -> bytes:
        try:
            return self._files[self._path(path)]
        except KeyError:
            raise CheckpointError("a file is missing", file=path) from None

    def _path(self, path: str) -> str:
        if path.startswith("/") or ".." in path.split("/") or "\0" in path:
            raise CheckpointError("a path leaves the checkpoint's folder", file=path)
        return path


def pack(files: Mapping[str, bytes], sizes: Mapping[str, int] | None = None) -> bytes:
    """A tree as one input.

    >>> pack({"a/b": b"xyz"}, {"a/b": 10})
    b'a/b\\n3 10\\nxyz'
    """
    claimed = {path: max(len(data), (sizes or {}).get(path, 0)) for path, data in files.items()}
    heads = {path: f"{path}\n{len(data)} {claimed[path]}\n".encode("utf-8", "replace") for path, data in files.items()}
    return b"".join(heads[path] + data for path, data in files.items())


def unpack(data: bytes) -> tuple[dict[str, bytes], dict[str, int]]:
    """Files and sizes of an input, whatever it is.

    >>> unpack(pack({"a": b"12", "b/c": b""}))
    ({'a': b'12', 'b/c': b''}, {'a': 2, 'b/c': 0})
    >>> unpack(b"../a\\n1 1\\nxa\\n2 2\\nx")
    ({'a': b'x'}, {'a': 2})
    """
    files: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    at = 0
    while at < len(data):
        name, _, rest = data[at : at + 5000].partition(b"\n")
        numbers, newline, _ = rest[:50].partition(b"\n")
        here, _, size = numbers.partition(b" ")
        if not newline or not here.isdigit() or not size.isdigit():
            break
        at += len(name) + len(numbers) + 2
        path = name.decode("utf-8", "replace")
        if _possible(path):
            files[path] = data[at : at + int(here)]
            sizes[path] = min(int(size), MAX_SIZE)
        at += int(here)
    return files, sizes


def _possible(path: str) -> bool:
    parts = path.split("/")
    return "\0" not in path and all(part not in ("", ".", "..") and len(part.encode()) < 256 for part in parts)


def store_of(data: bytes) -> MemoryStore:
    """The store that an input spells."""
    return MemoryStore(*unpack(data))
