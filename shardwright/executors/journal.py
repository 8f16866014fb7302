"""The journal: which tiles of a plan are safe on the device, and what was written by each.

A text file of lines, only ever appended to. A line is the CRC-32 of its JSON in eight hexadecimal digits, a space, a
JSON array, and a newline:

* ``["shardwright journal", 1, plan hash]``, the first line;
* ``["tile", number, bytes read, bytes written, [file, offset, nbytes, crc, …], {pivot: padding}, {pivot: averaged}]``, once
  per finished tile: a CRC-32 for each contiguous range that it wrote; the last object only where it says something;
* ``["publish", inode]``, when every file is whole and synced, before the first rename; the inode is that of ``data/``.

Writing: whoever appends a line has synced what the line vouches for (`ledger`). `append` returns when the lines
themselves are on the device.

Reading: lines count up to the first that is torn, garbled or not terminated: a crash can leave any mixture behind the
last sync. `Journal.resume` cuts that rest off before it appends. A line whose CRC is right but which contradicts the
plan is no accident, and refused.

Boundary: knows lines; what to sync, when, and what follows from them is decided elsewhere.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import PlanError, short
from ..planner.containers._untrusted import STRICT
from ..planner.plan import TargetFile
from . import system
from .checksums import crc32
from .descriptors import failed, sync_path
from .extents import Extent
from .padding import Padding
from .tile import Receipt

__all__ = ["Journal", "Recorded", "parse", "publish_line", "tile_line"]

_NAME = "shardwright journal"
_VERSION = 1
_LONGEST_LINE = 64 << 20
_LARGEST = 2**63 - 1


@dataclass(slots=True)
class Recorded:
    """What a journal says.

    Attributes
    ----------
    plan_hash
        Of the plan that it belongs to; empty if not even the first line is whole.
    tiles
        Receipts of the finished tiles.
    publishing
        The inode of ``data/``, once everything in it is whole.
    nbytes
        Length of the lines that count.
    """

    plan_hash: str = ""
    tiles: dict[int, Receipt] = field(default_factory=dict)
    publishing: int | None = None
    nbytes: int = 0


class Journal:
    """A journal that is appended to. Not thread-safe."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path

    @classmethod
    def create(cls, path: Path, plan_hash: str) -> Journal:
        """A new journal, its first line and its place in the folder synced.

        Raises
        ------
        RunError
            The system reports an error.
        """
        journal = cls(_open(path, os.O_CREAT | os.O_EXCL), path)
        journal.append([_line([_NAME, _VERSION, plan_hash])])
        sync_path(path.parent)
        return journal

    @classmethod
    def resume(cls, path: Path, nbytes: int) -> Journal:
        """The journal at `path`, cut to its first `nbytes` bytes."""
        journal = cls(_open(path, 0), path)
        try:
            system.ftruncate(journal._fd, nbytes)
            system.sync(journal._fd)
        except OSError as error:
            journal.close()
            raise failed(error, path, "cutting") from error
        return journal

    def append(self, lines: Iterable[bytes]) -> None:
        """Append lines; returns when they are on the device."""
        data = b"".join(lines)
        try:
            while data:
                data = data[system.append(self._fd, data) :]
            system.sync(self._fd)
        except OSError as error:
            raise failed(error, self._path, "journaling") from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | flags, 0o666)
    except OSError as error:
        raise failed(error, path, "opening") from error


def tile_line(tile: int, receipt: Receipt) -> bytes:
    """The line that vouches for a tile."""
    padding = {name: [p.zeros, p.copies, p.other, p.nbytes] for name, p in receipt.padding.items()}
    flat = [number for extent in receipt.extents for number in extent]
    averaged = [receipt.averaged] if receipt.averaged else []
    return _line(["tile", tile, receipt.bytes_read, receipt.bytes_written, flat, padding, *averaged])


def publish_line(inode: int) -> bytes:
    """The line that says that ``data/`` is whole and is about to be renamed."""
    return _line(["publish", inode])


def _line(value: Sequence[Any]) -> bytes:
    text = json.dumps(value, separators=(",", ":")).encode()
    return b"%08x %s\n" % (crc32(text), text)


def parse(data: bytes | mmap.mmap, tiles: int, files: Sequence[TargetFile], *, file: object = "journal") -> Recorded:
    """What the bytes of a journal say about a plan of that many tiles and those target files.

    Raises
    ------
    PlanError
        A whole line says something that the plan cannot mean.

    >>> parse(_line([_NAME, _VERSION, "abc"]) + b"00000000 torn", 1, ()).plan_hash
    'abc'
    """
    found, at = Recorded(), 0
    while (end := data.find(b"\n", at, at + _LONGEST_LINE)) >= 0:
        value = _value(data[at:end])
        if value is None:
            break
        if at == 0:
            found.plan_hash = _first(value, file)
        else:
            _add(found, value, tiles, files, file)
        at = found.nbytes = end + 1
    return found


def _value(line: bytes) -> Any:
    """The JSON of a whole line, or None."""
    head, _, text = line.partition(b" ")
    if len(head) != 8 or head != b"%08x" % crc32(text):
        return None
    try:
        return STRICT.decode(text.decode())
    except (ValueError, RecursionError):
        return None


def _first(value: Any, file: object) -> str:
    if type(value) is not list or len(value) != 3 or value[0] != _NAME or type(value[2]) is not str:
        raise _wrong(file, "does not begin as a journal does", short(value))
    if value[1] != _VERSION:
        raise _wrong(file, "was written by another version", short(value[1]))
    return value[2]


def _add(found: Recorded, value: Any, tiles: int, files: Sequence[TargetFile], file: object) -> None:
    if type(value) is list and len(value) in (6, 7) and value[0] == "tile" and _whole(value[1], tiles - 1):
        if value[1] in found.tiles:
            raise _wrong(file, "finishes a tile twice", value[1])
        found.tiles[value[1]] = _receipt(value, files, file)
    elif type(value) is list and len(value) == 2 and value[0] == "publish" and _whole(value[1], 2 * _LARGEST + 1):
        found.publishing = value[1]
    else:
        raise _wrong(file, "has a line that the plan cannot mean", short(value))


def _receipt(value: list[Any], files: Sequence[TargetFile], file: object) -> Receipt:
    _, tile, read, written, flat, padding, averaged = value if len(value) == 7 else (*value, {})
    if not (_whole(read, _LARGEST) and _whole(written, _LARGEST) and type(flat) is list and len(flat) % 4 == 0 and type(padding) is dict):
        raise _wrong(file, "has a malformed line", f"tile {tile}")
    extents: list[Extent] = []
    for number, offset, nbytes, crc in zip(*(iter(flat),) * 4, strict=True):
        inside = _whole(number, len(files) - 1) and _whole(offset, _LARGEST) and _whole(nbytes, _LARGEST) and _whole(crc, 2**32 - 1)
        if not inside or offset + nbytes > files[number].nbytes:
            raise _wrong(file, "has a range outside the target's files", f"tile {tile}: {[number, offset, nbytes, crc]}"[:80])
        extents.append((number, offset, nbytes, crc))
    held = {}
    for name, counts in padding.items():
        if type(counts) is not list or len(counts) != 4 or not all(_whole(n, _LARGEST) for n in counts):
            raise _wrong(file, "has a malformed line", f"tile {tile}: padding of {name[:80]}")
        held[name] = Padding(*counts)
    if type(averaged) is not dict or not all(_whole(count, _LARGEST) for count in averaged.values()):
        raise _wrong(file, "has a malformed line", f"tile {tile}: averages")
    return Receipt(read, written, held, extents, averaged=averaged)


def _whole(value: object, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _wrong(file: object, what: str, actual: object) -> PlanError:
    return PlanError(f"the journal {what}", file=file, actual=actual, remedy="Start over with --fresh")
