"""Mutations of zip archives.

1. `parse` takes a sound archive apart into members (`zipfile` does it), `build` writes one with every offset, size and
   checksum true, in the forms that writers use: plain, with data descriptors, with 64-bit fields.
2. An edit changes a member, or their list, or what `build` writes for one: a name that escapes, a name or an offset twice,
   the two headers apart, sizes, method, flags, extra fields, the end records.
3. In some draws the finished bytes are edited instead, at a field of one of its records.
"""

from __future__ import annotations

import io
import random
import struct
import zipfile
import zlib
from dataclasses import dataclass, field, replace

from .mutators import edge, mutate_bytes, set_number

__all__ = ["Archive", "Member", "build", "mutate_archive", "mutate_fields", "parse"]

_LOCAL, _CENTRAL, _END, _END64, _LOCATOR = b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7"
_FIELDS = {
    _LOCAL: ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)),
    _CENTRAL: ((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (34, 2), (42, 4)),
    _END: ((4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
    _END64: ((4, 8), (16, 4), (20, 4), (24, 8), (32, 8), (40, 8), (48, 8)),
    _LOCATOR: ((4, 4), (8, 8), (16, 4)),
}
"""Of each record: offset and width of the fields worth lying in."""
_NAMES = (
    "../x",
    "/x",
    "a\\b",
    "C:x",
    "",
    "\0",
    "archive/../../x",
    "x" * 300,
    "archive/data/0",
    "archive/data.pkl",
    "archive/constants.pkl",
    "é",
)


@dataclass(frozen=True)
class Member:
    """One member, and how it is to be written: `sizes` and `name_there` are lies in the local header, `at` in the directory."""

    name: bytes
    payload: bytes
    method: int = 0
    flags: int = 0
    extra: bytes = b""
    wide: bool = False
    name_there: bytes | None = None
    sizes: tuple[int, int] | None = None
    at: int | None = None


@dataclass(frozen=True)
class Archive:
    """Members, and how the archive ends."""

    members: tuple[Member, ...]
    wide: bool = False
    comment: bytes = b""
    gap: bytes = b""
    gap_after: bytes = b""
    order: tuple[int, ...] = field(default=())


def parse(data: bytes) -> Archive | None:
    """The archive that `data` is, or None where `zipfile` does not find one."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as found:
            members = tuple(
                Member(info.filename.encode("utf-8", "surrogateescape"), _payload(data, info), info.compress_type, info.flag_bits & 0x809)
                for info in found.infolist()
            )
            return Archive(members, wide=_END64 in data[-200:])
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, UnicodeError, OSError, IndexError, OverflowError):
        return None


def _payload(data: bytes, info: zipfile.ZipInfo) -> bytes:
    """A member's bytes as they are stored."""
    at = min(info.header_offset, len(data))
    name, extra = struct.unpack_from("<2H", data, at + 26)
    begin = at + 30 + name + extra
    return data[begin : begin + info.compress_size]


def build(archive: Archive) -> bytes:
    """The archive's bytes, sound but for the lies that its members tell."""
    out, central = bytearray(), bytearray()
    members = [archive.members[i] for i in archive.order] if archive.order else archive.members
    for member in members:
        at, crc, size = len(out), zlib.crc32(member.payload), len(member.payload)
        later = bool(member.flags & 8)
        packed, plain = member.sizes or ((0, 0) if later else (size, size))
        name = member.name_there if member.name_there is not None else member.name
        padding = -(at + 30 + len(name) + 4) % 64
        local = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        out += struct.pack(
            "<4s5H3L2H", _LOCAL, 20, member.flags, member.method, 0, 33, 0 if later else crc, packed, plain, len(name), len(local)
        )
        out += name + local + member.payload
        if later:
            out += struct.pack("<4s3L", b"PK\7\10", crc, size, size)
        where = at if member.at is None else member.at
        extra = struct.pack("<2H3Q", 1, 24, size, size, where) + member.extra if member.wide else member.extra
        narrow = (0xFFFFFFFF,) * 3 if member.wide else (size, size, where & 0xFFFFFFFF)
        central += struct.pack(
            "<4s6H3L5H2L",
            _CENTRAL,
            20,
            20,
            member.flags,
            member.method,
            0,
            33,
            crc,
            *narrow[:2],
            len(member.name),
            len(extra),
            0,
            0,
            0,
            0,
            narrow[2],
        )
        central += member.name + extra
    out += archive.gap
    start, count = len(out), len(members)
    out += central + archive.gap_after
    if archive.wide:
        out += struct.pack("<4sQ2H2L4Q", _END64, 44, 45, 45, 0, 0, count, count, len(central), start)
        out += struct.pack("<4sLQL", _LOCATOR, 0, start + len(central) + len(archive.gap_after), 1)
    return bytes(out + struct.pack("<4s4H2LH", _END, 0, 0, count, count, len(central), start, len(archive.comment)) + archive.comment)


def mutate_archive(archive: Archive, rng: random.Random) -> Archive:
    """One edit of the members or the end; a third of the edits leave a sound archive."""
    members = list(archive.members)
    if not members:
        return replace(archive, members=(Member(b"archive/data.pkl", b"N."),))
    at = rng.randrange(len(members))
    chosen = members[at]
    draw = rng.randrange(16)
    if draw < 2:
        return (
            replace(archive, wide=not archive.wide)
            if draw
            else replace(archive, comment=rng.choice((b"", b"x", b"PK\5\6" + bytes(18), b"c" * 300)))
        )
    if draw < 4:
        order = list(range(len(members)))
        rng.shuffle(order)
        return replace(archive, order=tuple(order))
    if draw == 4:
        gap = rng.choice((b"x", bytes(100), b"PK\1\2" * 20))
        return replace(archive, gap=gap) if rng.random() < 0.7 else replace(archive, gap_after=gap)
    if draw == 5:
        del members[at]
    elif draw == 6:
        members.insert(
            rng.randrange(len(members) + 1),
            rng.choice((chosen, replace(chosen, name=chosen.name + b"x"), Member(b"archive/new", b"hello"))),
        )
    else:
        members[at] = _edited(chosen, draw, members, rng)
    return replace(archive, members=tuple(members), order=())


def _edited(member: Member, draw: int, members: list[Member], rng: random.Random) -> Member:
    name = rng.choice((*(one.encode() for one in _NAMES), rng.choice(members).name, mutate_bytes(member.name, rng)))
    match draw:
        case 7:
            return replace(member, name=name)
        case 8:
            return replace(member, name_there=name)
        case 9:
            return replace(member, flags=member.flags ^ rng.choice((1, 8, 8, 0x800, 0x800, 1 << rng.randrange(16))))
        case 10:
            return replace(member, method=rng.choice((8, 8, 12, 14, 93, 99)))
        case 11:
            return replace(member, sizes=(edge(rng, (len(member.payload),)) & 0xFFFFFFFF, edge(rng, (len(member.payload),)) & 0xFFFFFFFF))
        case 12:
            return replace(member, at=edge(rng, (0, 64, 128)))
        case 13:
            return replace(
                member, wide=not member.wide, extra=rng.choice((b"", b"", struct.pack("<2H", 1, 8) + bytes(8), struct.pack("<2H", 7, 500)))
            )
        case 14:
            return replace(member, payload=mutate_bytes(member.payload, rng))
        case _:
            return replace(member, extra=rng.choice((b"x", struct.pack("<2H", 0x7075, 4) + b"abcd", b"\0" * 40)))


def mutate_fields(data: bytes, rng: random.Random) -> bytes:
    """One field of one record of the finished archive."""
    spots = [(at, kind) for kind in _FIELDS for at in _all(data, kind)]
    if not spots:
        return mutate_bytes(data, rng)
    at, kind = rng.choice(spots)
    offset, width = rng.choice(_FIELDS[kind])
    now = int.from_bytes(data[at + offset : at + offset + width], "little")
    value = rng.choice((edge(rng, (now, len(data))), now ^ 1 << rng.randrange(8 * width), (1 << 8 * width) - 1, 0))
    return set_number(data, at + offset, width, value)


def _all(data: bytes, kind: bytes) -> list[int]:
    found, at = [], data.find(kind)
    while at >= 0 and len(found) < 50:
        found.append(at)
        at = data.find(kind, at + 1)
    return found
