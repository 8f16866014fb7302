"""A loss of power: what it may take of a target that is being made.

1. Bytes written to a file since its last sync: each write may be there, or not, or be zeros or garbage.
2. Of the journal's unsynced end a part of any length is there, in a random case followed by garbage.
3. A file that was never synced may be empty.
4. An entry that its folder did not have when the folder was last synced may be missing, with all below it.
5. Renames and exchanges since the last sync of a folder that they changed: the latest ones, any number, are undone. (A
   removal that is undone, with all that came after it, is a stop before it.)

What was on disk when the run began is safe. Nothing is flushed for real: the model alone says what is durable.

Boundary: follows the calls that are handed to it, one at a time.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

__all__ = ["Volatile"]

Inode = tuple[int, int]


class Volatile:
    """Follows the calls of one run: methods have the names of `system`'s functions, and take the real one first."""

    def __init__(self, out: Path, seed: int) -> None:
        self.out, self.partial = out, out.with_name(out.name + ".partial")
        self.chance = random.Random(seed)
        self._files: dict[Inode, int] = {}  # descriptors of our own, which outlive the run's
        self._undo: dict[Inode, list[tuple[str, int, bytes]]] = {}
        self._appended: dict[Inode, int] = {}  # length at the last sync
        self._synced: set[Inode] = set()
        self._entries: dict[Inode, set[str]] = {}
        self._moves: list[tuple[Callable[[], object], set[Inode], Path]] = []
        self._entries[_inode(out.parent)] = set(os.listdir(out.parent))
        for root in (self.out, self.partial):
            for folder, _, names in os.walk(root):
                self._entries[_inode(folder)] = set(os.listdir(folder))
                self._synced |= {_inode(Path(folder, name)) for name in names}

    def pwrite(self, real: Callable[..., int], fd: int, data: memoryview, offset: int) -> int:
        inode, own = self._own(fd)
        before = os.pread(own, len(data), offset)
        done = real(fd, data, offset)
        self._undo.setdefault(inode, []).append(("write", offset, before[:done].ljust(done, b"\0")))
        return done

    def append(self, real: Callable[..., int], fd: int, data: bytes) -> int:
        inode, own = self._own(fd)
        self._appended.setdefault(inode, os.fstat(own).st_size if inode in self._synced else 0)
        return real(fd, data)

    def ftruncate(self, real: Callable[..., None], fd: int, nbytes: int) -> None:
        inode, own = self._own(fd)
        size = os.fstat(own).st_size
        cut = os.pread(own, max(0, size - nbytes), nbytes)
        real(fd, nbytes)
        if cut:
            self._undo.setdefault(inode, []).append(("cut", nbytes, cut))

    def sync(self, real: Callable[..., None], fd: int) -> None:
        found = os.fstat(fd)
        inode = found.st_dev, found.st_ino
        if stat.S_ISDIR(found.st_mode):
            self._entries[inode] = set(os.listdir(fd))
            self._moves = [move for move in self._moves if inode not in move[1]]
            return
        self._synced.add(inode)
        self._undo.pop(inode, None)
        if inode in self._appended:
            self._appended[inode] = found.st_size

    def rename(self, real: Callable[..., None], old: Any, new: Any) -> None:
        real(old, new)
        self._moves.append((partial(real, new, old), {_inode(Path(old).parent), _inode(Path(new).parent)}, Path(new)))

    def exchange(self, real: Callable[..., bool], one: Any, other: Any) -> bool:
        done = real(one, other)
        if done:
            self._moves.append((partial(real, one, other), {_inode(Path(one).parent), _inode(Path(other).parent)}, Path(other)))
        return done

    def kept(self) -> bytes:
        """What is synced of the file that is appended to."""
        return b"".join(os.pread(self._files[inode], length, 0) for inode, length in self._appended.items())

    def lose(self) -> None:
        """Take it."""
        for inode, length in self._appended.items():
            self._cut_short(self._files[inode], length)
        for inode, done in self._undo.items():
            for what, offset, before in reversed(done):
                self._take_back(self._files[inode], what, offset, before)
        for _ in range(self.chance.randint(0, len(self._moves))):
            self._moves.pop()[0]()
        for _, _, new in self._moves:  # what is not undone has reached the device
            self._entries.setdefault(_inode(new.parent), set()).add(new.name)
        self._forget(self.out.parent)

    def _cut_short(self, fd: int, length: int) -> None:
        size = os.fstat(fd).st_size
        at = self.chance.randint(length, max(length, size))
        os.ftruncate(fd, at)
        if at < size and self.chance.random() < 0.5:
            os.pwrite(fd, self._noise(size - at), at)

    def _take_back(self, fd: int, what: str, offset: int, before: bytes) -> None:
        fate = self.chance.choice(("stays", "undone", "zeros", "noise"))
        if fate == "undone" or (what == "cut" and fate != "stays"):
            os.pwrite(fd, before, offset)
        elif fate != "stays":
            os.pwrite(fd, bytes(len(before)) if fate == "zeros" else self._noise(len(before)), offset)

    def _noise(self, nbytes: int) -> bytes:
        return self.chance.randbytes(nbytes)

    def _forget(self, folder: Path) -> None:
        """Entries and files that were never synced."""
        durable = self._entries.get(_inode(folder), set())
        for name in sorted(os.listdir(folder)):
            path = folder / name
            if folder == self.out.parent and path not in (self.out, self.partial):
                continue
            if name not in durable and self.chance.random() < 0.5:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif path.is_dir():
                self._forget(path)
            elif _inode(path) not in self._synced and self.chance.random() < 0.5:
                os.truncate(path, 0)

    def _own(self, fd: int) -> tuple[Inode, int]:
        found = os.fstat(fd)
        inode = found.st_dev, found.st_ino
        if inode not in self._files:
            self._files[inode] = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        return inode, self._files[inode]


def _inode(path: str | Path) -> Inode:
    found = os.stat(path)
    return found.st_dev, found.st_ino
