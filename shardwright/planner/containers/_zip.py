"""Zip archives of stored members: where each member's bytes are, and where they will be.

Reading: the end record is found (and its 64-bit form), the central directory read whole, each local header read to learn
where its data begins. Every number is checked against the file's end and against its neighbour; members may not overlap.

Writing: members are appended on paper, as torch's writer does it: data aligned by a padded extra field, sizes and CRC in
the central directory and in a descriptor behind the data (torch computes offsets from exactly this structure, so the
sizes in the local header stay zero and flag bit 3 is set), 64-bit extra fields only where a number needs them. What is not
known yet, the CRC of reserved data, is zero in two places and declared as a `Crc`.

Boundary: reads headers through a store; knows nothing of torch beyond its alignment.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from itertools import pairwise

from ...errors import ContainerError
from ..store import Store
from .base import Crc, FileLayout

__all__ = ["ALIGNMENT", "Directory", "Layout", "Member", "read_directory"]

ALIGNMENT = 64
MAX_DIRECTORY = 1 << 28
"""Bytes of a central directory; about four million members."""
_GAP, _RUN = 1 << 14, 1 << 20
"""Local headers closer than the first are read together, in reads of at most about the second."""

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_M16, _M32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED, _DESCRIPTOR, _UTF8 = 1, 8, 0x800
_DATE = 1 << 5 | 1  # 1 January 1980, the first day zip knows


@dataclass(frozen=True, slots=True)
class Member:
    """One member: `offset` is where its bytes begin; `plain` that they are neither compressed nor encrypted."""

    name: str
    offset: int
    nbytes: int
    plain: bool


@dataclass(frozen=True, slots=True)
class Directory:
    """All members by name in the directory's order, and the directory's own bytes."""

    members: dict[str, Member]
    raw: bytes


@dataclass(frozen=True, slots=True)
class _Entry:
    name: bytes
    header: int
    flags: int
    method: int
    packed: int
    nbytes: int


def read_directory(store: Store, path: str) -> Directory:
    """Parse the archive at `path`.

    Raises
    ------
    ContainerError
        Truncated, overlapping, duplicated, escaping or otherwise malformed; names the member.
    """
    size = store.stat(path).nbytes
    start, nbytes, count = _find_directory(store, path, size)
    if nbytes > MAX_DIRECTORY:
        raise ContainerError("the zip directory is too large", file=path, expected=f"{MAX_DIRECTORY} bytes", actual=nbytes)
    raw = store.read(path, start, nbytes)
    try:
        entries = _entries(raw, path)
    except struct.error:
        raise ContainerError("the zip directory ends in the middle of an entry", file=path) from None
    if not entries:
        raise ContainerError("the zip archive is empty", file=path)
    if len(entries) != count:
        raise ContainerError("the zip directory lacks or repeats entries", file=path, expected=count, actual=len(entries))
    begins = _data_offsets(store, path, entries, start)
    members: dict[str, Member] = {}
    for entry, offset in zip(entries, begins, strict=True):
        name = _safe_name(entry.name, path)
        if name in members:
            raise ContainerError(f"the zip entry {name!r} appears twice", file=path)
        members[name] = Member(name, offset, entry.nbytes, entry.method == 0 and not entry.flags & _ENCRYPTED)
    return Directory(members, raw)


def _find_directory(store: Store, path: str, size: int) -> tuple[int, int, int]:
    """Offset, size and entry count of the central directory."""
    tail_at = max(0, size - _END.size - _M16 - _LOCATOR.size)
    tail = store.read(path, tail_at)
    limit = len(tail) - _END.size + 4
    while (at := tail.rfind(b"PK\5\6", 0, max(limit, 0))) >= 0:
        if at + _END.size + int.from_bytes(tail[at + 20 : at + 22], "little") == len(tail):
            break
        limit = at + 3
    if at < 0:
        raise ContainerError("no zip end record: the file is truncated or no zip archive", file=path, remedy="Copy or download it again")
    _, disk, first_disk, here, count, nbytes, start, _ = _END.unpack_from(tail, at)
    trailer = tail_at + at
    if at >= _LOCATOR.size and tail[at - _LOCATOR.size : at - _LOCATOR.size + 4] == b"PK\6\7":
        trailer = _LOCATOR.unpack_from(tail, at - _LOCATOR.size)[2]
        wide = store.read(path, trailer, _END64.size)
        signature, _, _, _, disk64, first64, here64, count64, nbytes64, start64 = _END64.unpack(wide)
        narrow = ((disk, disk64), (first_disk, first64), (here, here64), (count, count64), (nbytes, nbytes64), (start, start64))
        # Two readers must not see two archives: where both records speak, they must agree.
        if signature != b"PK\6\6" or any(a != b and a not in (_M16, _M32) for a, b in narrow):
            raise ContainerError("the zip file's two end records disagree", file=path)
        disk, first_disk, here, count, nbytes, start = disk64, first64, here64, count64, nbytes64, start64
    if disk or first_disk or here != count:
        raise ContainerError("the zip archive is split over several files", file=path)
    if start + nbytes > trailer:
        raise ContainerError("the zip directory lies outside the file", file=path, expected=f"<= {trailer}", actual=start + nbytes)
    if start + nbytes < trailer:
        # Readers that allow for something before the archive would take all offsets to begin that much later.
        raise ContainerError(
            "the zip directory does not end where its end record begins", file=path, expected=trailer, actual=start + nbytes
        )
    return start, nbytes, count


def _entries(raw: bytes, path: str) -> list[_Entry]:
    entries, at = [], 0
    while at < len(raw):
        fields = _CENTRAL.unpack_from(raw, at)
        signature, flags, method, packed, nbytes = fields[0], fields[3], fields[4], fields[8], fields[9]
        name_len, extra_len, comment_len, header = fields[10], fields[11], fields[12], fields[16]
        extra_at = at + _CENTRAL.size + name_len
        at = extra_at + extra_len + comment_len
        if signature != b"PK\1\2" or at > len(raw):
            raise ContainerError("the zip directory is malformed", file=path)
        name = raw[extra_at - name_len : extra_at]
        if _M32 in (packed, nbytes, header):
            nbytes, packed, header = _wide(raw[extra_at : extra_at + extra_len], (nbytes, packed, header), path)
        if method == 0 and not flags & _ENCRYPTED and packed != nbytes:
            raise ContainerError(f"the zip entry {_text(name)} is stored in two sizes", file=path, expected=nbytes, actual=packed)
        entries.append(_Entry(name, header, flags, method, packed, nbytes))
    return entries


def _wide(extra: bytes, values: tuple[int, int, int], path: str) -> tuple[int, int, int]:
    """`values` with those that do not fit 32 bits taken from the zip64 extra field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{min(length, len(extra) - at - 4) // 8}Q", extra, at + 4))
            found = [next(wide, -1) if value == _M32 else value for value in values]
            if -1 in found:
                break
            return found[0], found[1], found[2]
        at += 4 + length
    raise ContainerError("a zip entry lacks its 64-bit sizes", file=path)


def _data_offsets(store: Store, path: str, entries: list[_Entry], end: int) -> list[int]:
    """Where each entry's data begins; checks local headers against the directory, and that nothing overlaps."""
    order = sorted(range(len(entries)), key=lambda i: entries[i].header)
    offsets = [0] * len(entries)
    headers = _read_headers(store, path, [entries[i] for i in order], end)
    for i, header in zip(order, headers, strict=True):
        entry = entries[i]
        signature, _, flags, method, _, _, _, packed, nbytes, name_len, extra_len = _LOCAL.unpack_from(header)
        same_kind = signature == b"PK\3\4" and (flags, method, name_len) == (entry.flags, entry.method, len(entry.name))
        same_size = flags & _DESCRIPTOR or (packed in (entry.packed, _M32) and nbytes in (entry.nbytes, _M32))
        if not same_kind or not same_size or header[_LOCAL.size :] != entry.name:
            raise ContainerError(f"the zip entry {_text(entry.name)} and its local header disagree", file=path)
        offsets[i] = entry.header + _LOCAL.size + name_len + extra_len
    limits = [*(entries[i].header for i in order[1:]), end]
    for i, limit in zip(order, limits, strict=True):
        if offsets[i] + entries[i].packed > limit:
            raise ContainerError(
                f"the zip entry {_text(entries[i].name)} overlaps its neighbour or leaves the file",
                file=path,
                expected=f"<= {limit}",
                actual=offsets[i] + entries[i].packed,
            )
    return offsets


def _read_headers(store: Store, path: str, entries: list[_Entry], end: int) -> list[bytes]:
    """Each entry's local header up to its name; near ones in one read, so that many small members cost few requests."""
    spans = [(entry.header, entry.header + _LOCAL.size + len(entry.name)) for entry in entries]
    for (_, stop), (begin, _), entry in zip(spans, [*spans[1:], (end, end)], entries, strict=True):
        if stop > begin:
            raise ContainerError(f"the zip entry {_text(entry.name)} overlaps its neighbour or leaves the file", file=path)
    cuts = [i for i, ((_, stop), (begin, _)) in enumerate(pairwise(spans), 1) if begin - stop > _GAP]
    headers: list[bytes] = []
    for first, last in pairwise([0, *cuts, len(spans)]):
        at, block = 0, b""
        for begin, stop in spans[first:last]:
            if stop > at + len(block):
                at, block = begin, store.read(path, begin, min(spans[last - 1][1] - begin, max(_RUN, stop - begin)))
            headers.append(block[begin - at : stop - at])
    return headers


def _safe_name(name: bytes, path: str) -> str:
    try:
        text = name.decode()
    except UnicodeDecodeError:
        raise ContainerError(f"the zip entry {_text(name)} has a name that is no UTF-8", file=path) from None
    if not text or "\0" in text or "\\" in text or text.startswith("/") or ".." in text.split("/") or text[1:2] == ":":
        raise ContainerError(f"the zip entry {_text(name)} has a name that leaves the archive", file=path)
    return text


def _text(name: bytes) -> str:
    return repr(name[:200].decode("utf-8", "backslashreplace"))


class Layout:
    """An archive laid out member by member; `finish` gives the `FileLayout`."""

    def __init__(self, path: str, folder: str) -> None:
        self._path = path
        self._folder = folder
        self._at = 0
        self._static: list[tuple[int, bytes]] = []
        self._piece = bytearray()
        self._central = bytearray()
        self._count = 0
        self._open: list[tuple[int, int, int, int]] = []

    def add(self, name: str, payload: bytes) -> None:
        """A member whose bytes are known."""
        crc = zlib.crc32(payload)
        header_at, _ = self._begin(name, len(payload), crc)
        self._write(payload)
        self._describe(header_at, len(payload), crc)

    def reserve(self, name: str, nbytes: int) -> int:
        """A member whose bytes come later; returns their offset."""
        header_at, central_crc = self._begin(name, nbytes, 0)
        offset = self._at
        if nbytes:
            self._flush()
            self._at += nbytes
            self._open.append((offset, nbytes, self._at + 4, central_crc))
            self._describe(header_at, nbytes, 0)
        return offset

    def finish(self) -> FileLayout:
        """Close the archive."""
        start, nbytes, count = self._at, len(self._central), self._count
        crcs = tuple(Crc(offset, size, (descriptor, start + central)) for offset, size, descriptor, central in self._open)
        self._write(self._central)
        self._write(_END64.pack(b"PK\6\6", _END64.size - 12, 45, 45, 0, 0, count, count, nbytes, start))
        self._write(_LOCATOR.pack(b"PK\6\7", 0, start + nbytes, 1))
        self._write(_END.pack(b"PK\5\6", 0, 0, min(count, _M16), min(count, _M16), min(nbytes, _M32), min(start, _M32), 0))
        self._flush()
        return FileLayout(self._path, self._at, tuple(self._static), crcs)

    def _begin(self, name: str, nbytes: int, crc: int) -> tuple[int, int]:
        """Write a local header and record its directory entry; returns where the header and the entry's CRC (in the directory) are."""
        raw, at = f"{self._folder}/{name}".encode(), self._at
        wide = b"".join(struct.pack("<Q", v) for v in ((nbytes, nbytes) if nbytes >= _M32 else ()) + ((at,) if at >= _M32 else ()))
        extra = struct.pack("<2H", 1, len(wide)) + wide if wide else b""
        flags = _UTF8 | (_DESCRIPTOR if nbytes else 0)  # as torch: nothing to describe behind an empty member
        needed = 45 if wide else 20
        padding = -(at + _LOCAL.size + len(raw) + len(extra) + 4) % ALIGNMENT
        local = extra + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        self._write(_LOCAL.pack(b"PK\3\4", needed, flags, 0, 0, _DATE, 0, 0, 0, len(raw), len(local)) + raw + local)
        central_crc = len(self._central) + 16
        sizes = (crc, min(nbytes, _M32), min(nbytes, _M32), len(raw), len(extra))
        self._central += _CENTRAL.pack(b"PK\1\2", needed, needed, flags, 0, 0, _DATE, *sizes, 0, 0, 0, 0, min(at, _M32)) + raw + extra
        self._count += 1
        return at, central_crc

    def _describe(self, header_at: int, nbytes: int, crc: int) -> None:
        wide = nbytes >= _M32 or header_at >= _M32
        self._write(struct.pack("<4sL2Q" if wide else "<4s3L", b"PK\7\10", crc, nbytes, nbytes))

    def _write(self, data: bytes | bytearray) -> None:
        self._piece += data
        self._at += len(data)

    def _flush(self) -> None:
        if self._piece:
            self._static.append((self._at - len(self._piece), bytes(self._piece)))
            self._piece.clear()
