"""Checksums: of any writes in any order they equal zlib's of the finished file; holes and double writes are seen."""

import random
import zlib
from contextlib import contextmanager
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.errors import ContradictionError
from shardwright.executors.extents import Checksums, Witness
from shardwright.planner.containers.base import Crc
from shardwright.planner.plan import TargetFile


class Memory:
    """A sink of byte arrays."""

    def __init__(self, *files):
        self.files = dict(enumerate(files))
        self.data = {n: bytearray(f.nbytes) for n, f in self.files.items()}

    def witnessed(self, number):
        return True

    @contextmanager
    def writing(self, number):
        def write(offset, data):
            self.data[number][offset : offset + len(data)] = data

        yield write


@st.composite
def layouts(draw):
    """A file of alternating static bytes and data, some of the data checksummed into the static bytes behind it."""
    static, crcs, data, at = [], [], [], 0
    for _ in range(draw(st.integers(1, 5))):
        head, body, wanted = draw(st.integers(0, 9)), draw(st.integers(0, 40)), draw(st.booleans())
        if head:
            static.append((at, bytes(draw(st.integers(0, 255)) for _ in range(head))))
        at += head
        data.append((at, body))
        if wanted:
            crcs.append(Crc(at, body, (at + body, at + body + 5)))
            static.append((at + body, b"....-...."))
            at += 9
        at += body
    return TargetFile("f", at, tuple(static), tuple(crcs)), data


@settings(max_examples=200, deadline=None)
@given(layouts(), st.integers(0, 1 << 30), st.integers(1, 4))
def test_any_writes_in_any_order_give_the_checksum_of_the_file(layout, seed, tiles):
    file, data = layout
    chance = random.Random(seed)
    sink = Memory(file)
    for offset, static in file.static:
        sink.data[0][offset : offset + len(static)] = static
    writes = []
    for offset, nbytes in data:
        cuts = sorted({0, nbytes, *(chance.randint(0, nbytes) for _ in range(3))})
        writes += [(offset + a, chance.randbytes(b - a)) for a, b in pairwise(cuts)]
    chance.shuffle(writes)
    checksums = Checksums(sink.files)
    for tile in range(tiles):
        witness = Witness(sink)
        for offset, part in writes[tile::tiles]:
            with witness.writing(0) as write:
                write(offset, memoryview(part))
        checksums.absorb(witness.extents())
    total, patches = checksums.seal(0)
    for crc in file.crcs:
        value = zlib.crc32(sink.data[0][crc.offset : crc.offset + crc.nbytes]).to_bytes(4, "little")
        assert {patch for at, patch in patches if at in crc.patches} == {value}
    for offset, patch in patches:
        sink.data[0][offset : offset + 4] = patch
    assert total == zlib.crc32(sink.data[0])


def test_a_write_over_the_edge_of_a_range_is_cut_there():
    sink = Memory(TargetFile("f", 12, (), (Crc(4, 4, ()),)))
    witness = Witness(sink)
    with witness.writing(0) as write:
        write(0, memoryview(b"abcdefghijkl"))
    assert [extent[1:3] for extent in witness.extents()] == [(0, 4), (4, 4), (8, 4)]
    checksums = Checksums(sink.files)
    checksums.absorb(witness.extents())
    assert checksums.seal(0) == (zlib.crc32(b"abcdefghijkl"), [])


def test_a_hole_and_a_double_write_are_seen():
    file = TargetFile("f", 10, ((0, b"ab"),))
    checksums = Checksums({0: file})
    checksums.absorb([(0, 2, 4, 1)])
    with pytest.raises(ContradictionError, match=r"never written: file f; expected 10 bytes from 0, actual 6 bytes"):
        checksums.seal(0)
    with pytest.raises(ContradictionError, match="written twice: file f"):
        checksums.absorb([(0, 5, 1, 1)])


def test_an_empty_file_has_a_checksum():
    assert Checksums({0: TargetFile("f", 0)}).seal(0) == (0, [])
