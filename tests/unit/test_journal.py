"""Journals: what was appended is read; what is torn counts as absent; what contradicts the plan is refused."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.errors import PlanError, RunError
from shardwright.executors import system
from shardwright.executors.checksums import crc32
from shardwright.executors.journal import Journal, parse, publish_line, tile_line
from shardwright.executors.padding import Padding
from shardwright.executors.tile import Receipt
from shardwright.planner.plan import TargetFile

FILES = (TargetFile("a", 1000), TargetFile("b", 50))
HASH = "ab" * 32


def receipt(n: int) -> Receipt:
    return Receipt(10 + n, 20 + n, {"w": Padding(1, 2, 3, n)}, [(0, 10 * n, 5, n), (1, n, 1, 2**32 - 1)])


def written(path, tiles=3, publish=None) -> bytes:
    journal = Journal.create(path, HASH)
    journal.append([tile_line(n, receipt(n)) for n in range(tiles)])
    if publish is not None:
        journal.append([publish_line(publish)])
    journal.close()
    return path.read_bytes()


def test_what_was_appended_is_read(tmp_path):
    data = written(tmp_path / "journal", publish=2**63)
    found = parse(data, 3, FILES)
    assert found.plan_hash == HASH and found.publishing == 2**63 and found.nbytes == len(data)
    assert found.tiles == {n: receipt(n) for n in range(3)}


def test_every_cut_is_tolerated(tmp_path):
    data = written(tmp_path / "journal", tiles=2)
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(len(data)):
        found = parse(data[:cut], 2, FILES)
        whole = sum(end <= cut for end in ends)
        assert found.nbytes == (ends[whole - 1] if whole else 0)
        assert len(found.tiles) == max(0, whole - 1) and bool(found.plan_hash) == bool(whole)


@settings(deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 4))
def test_garbage_hides_what_comes_behind_it_and_nothing_else(tmp_path_factory, seed, length):
    path = tmp_path_factory.mktemp("journal") / "journal"
    data, chance = bytearray(written(path, tiles=6)), random.Random(seed)
    at = chance.randrange(len(data) - length)
    data[at : at + length] = bytes(b ^ 0x55 for b in data[at : at + length])
    line = bytes(written(path.with_name("other"), tiles=6))[:at].count(b"\n")
    found = parse(bytes(data), 6, FILES)
    assert len(found.tiles) == max(0, line - 1)


def test_resuming_cuts_the_torn_rest_off(tmp_path):
    path = tmp_path / "journal"
    data = written(path, tiles=1)
    path.write_bytes(data + b"deadbeef [torn")
    journal = Journal.resume(path, parse(path.read_bytes(), 9, FILES).nbytes)
    journal.append([tile_line(7, receipt(1))])
    journal.close()
    assert sorted(parse(path.read_bytes(), 9, FILES).tiles) == [0, 7]


def line(text: str) -> bytes:
    return b"%08x %s\n" % (crc32(text.encode()), text.encode())


FIRST = line(f'["shardwright journal",1,"{HASH}"]')


@pytest.mark.parametrize(
    "data",
    [
        line("{}"),
        line('["shardwright journal",2,"x"]'),
        FIRST + line('["tile",9,1,1,[],{}]'),
        FIRST + line('["tile",-1,1,1,[],{}]'),
        FIRST + line('["tile",true,1,1,[],{}]'),
        FIRST + line('["tile",0,1,1,[],{}]') * 2,
        FIRST + line('["tile",0,-1,1,[],{}]'),
        FIRST + line('["tile",0,1,1,[0,0,1],{}]'),
        FIRST + line('["tile",0,1,1,[2,0,1,0],{}]'),
        FIRST + line('["tile",0,1,1,[0,999,2,0],{}]'),
        FIRST + line('["tile",0,1,1,[0,0,1,4294967296],{}]'),
        FIRST + line('["tile",0,1,1,[],{"w":[1,2,3]}]'),
        FIRST + line('["tile",0,1,1,[],[]]'),
        FIRST + line('["publish","x"]'),
        FIRST + line('["what"]'),
        FIRST + line("1"),
    ],
)
def test_a_whole_line_that_makes_no_sense_is_refused(data):
    with pytest.raises(PlanError, match=r"the journal .*--fresh"):
        parse(data, 3, FILES)


def test_short_appends_are_completed_and_errors_named(tmp_path, monkeypatch):
    monkeypatch.setattr(system, "append", lambda fd, data, real=system.append: real(fd, data[:3]))
    data = written(tmp_path / "journal")
    assert len(parse(data, 3, FILES).tiles) == 3

    def fail(fd):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(system, "sync", fail)
    with pytest.raises(RunError, match="journaling failed: Input/output error"):
        Journal.create(tmp_path / "second", HASH)
