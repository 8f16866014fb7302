"""The harness sees what it is there to see: each guard fails on a parser that does the one thing it forbids."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import shardwright
from shardwright.errors import CheckpointError, ContainerError

from . import harness
from .evolve import evolve, minimise
from .guard import scratch
from .harness import FailedInputError, Target, attempt, corpus, fresh, run
from .mutators import mutate_bytes, mutate_json
from .mutators_pickle import instructions, mutate_pickle
from .mutators_zip import build, mutate_archive, mutate_fields, parse
from .reach import _lines_of
from .stores import MemoryStore, pack, unpack
from .targets_containers import SAFETENSORS, TORCH_ZIP, UNPICKLE, ZARR


@pytest.fixture(autouse=True)
def _own_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "CORPUS", tmp_path / "tests" / "fuzz" / "corpus")


def target(parse: Callable[[bytes], object]) -> Target:
    return Target("mine", ("tests.fuzz.stores",), parse, lambda: [b"seed"], mutate_bytes)


def swallows(data: bytes) -> None:
    try:
        Path("/etc/hostname").read_bytes()
    except BaseException:
        raise ContainerError("looks like any refusal") from None


def runs_out(data: bytes) -> None:
    try:
        raise MemoryError
    except MemoryError:
        raise ContainerError("malformed") from None


def spins(data: bytes) -> None:
    while True:
        pass


CRIMES: dict[str, Callable[[bytes], object]] = {
    "an uncaught error": lambda data: {}[data],
    "recursion": lambda data: CRIMES["recursion"](data),
    "reading a file": lambda data: Path("/etc/hostname").read_bytes(),
    "writing a file": lambda data: Path("x").write_bytes(data),
    "writing beside the tests": lambda data: Path(harness.__file__).with_name("x").write_bytes(data),
    "writing into the package": lambda data: Path(shardwright.__file__).with_name("x").write_bytes(data),
    "removing": lambda data: os.remove("/nowhere"),
    "listing": lambda data: os.listdir("/"),
    "a shell": lambda data: os.system("true"),
    "a process": lambda data: subprocess.run(["true"], check=True),
    "a socket": lambda data: socket.socket(),
    "an import": lambda data: __import__("this"),
    "eval": lambda data: eval("1"),
    "exec": lambda data: exec("pass"),
    "swallowing the guard's error": swallows,
    "hiding that memory ran out": runs_out,
    "no end": spins,
    "a number from the file": lambda data: bytearray(64 << 20),
    "leaving the scratch folder": lambda data: (scratch() / ".." / "x").write_bytes(data),
}


@pytest.mark.parametrize("crime", CRIMES)
def test_a_crime_is_seen_and_its_input_kept(crime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.guard.SECONDS", 0.2)
    mine = target(CRIMES[crime])
    with pytest.raises(FailedInputError, match=r"python -m tests.fuzz repeat mine --input .*crash-"):
        attempt(mine, b"data")
    assert corpus(mine) == [b"data"]


def test_refusals_and_what_is_allowed_pass() -> None:
    def parse(data: bytes) -> None:
        (scratch() / "x").write_bytes(data)
        Path(shardwright.__file__).read_bytes()
        if data == b"no":
            raise CheckpointError("no")

    assert attempt(target(parse), b"yes") is None
    assert isinstance(attempt(target(parse), b"no"), CheckpointError)
    found = run(target(parse), [b"yes", b"no", b"no"])
    assert (found.accepted, found.refused, found.inputs, dict(found.errors)) == (1, 2, 3, {"CheckpointError": 2})


def test_time_in_a_call_that_cannot_be_interrupted_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.guard.SECONDS", 0.2)
    started = time.process_time()
    with pytest.raises(FailedInputError):
        attempt(target(lambda data: sum(range(40_000_000))), b"")
    assert time.process_time() - started > 0.2


@pytest.mark.parametrize("mine", [SAFETENSORS, UNPICKLE, TORCH_ZIP, ZARR], ids=lambda mine: mine.name)
def test_mutations_repeat_and_take_anything(mine: Target) -> None:
    first, second = list(fresh(mine, 200)), list(fresh(mine, 200))
    assert first == second and len(set(first)) > 150
    assert first != list(fresh(mine, 200, seed=1))
    rng = random.Random(0)
    for data in (b"", b"\0", b"{}", b"PK\3\4PK\1\2PK\5\6", rng.randbytes(300), b"[" * 3000):
        assert all(isinstance(mine.mutate(data, rng), bytes) for _ in range(30))


def test_an_input_that_kills_its_process_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness._Last, "descriptor", None)
    harness.remember_in(tmp_path / "last")
    for data in (b"the longest of all", b"2\nshort"):
        attempt(SAFETENSORS, data)
    assert "repeat safetensors" in harness.recover(tmp_path / "last")
    assert corpus(SAFETENSORS) == [b"2\nshort"]


def test_evolution_finds_its_way_in_and_minimising_keeps_it(tmp_path: Path) -> None:
    """Four bytes in a row, each checked on a line of its own: blind mutation would need billions of inputs."""
    probe = tmp_path / "fuzz_probe.py"
    probe.write_text(
        "from shardwright.errors import ContainerError\n"
        "def parse(data):\n"
        "    if data[:1] == b'S':\n"
        "        if data[1:2] == b'H':\n"
        "            if data[2:3] == b'R':\n"
        "                if data[3:4] == b'D':\n"
        "                    return 4\n"
        "    raise ContainerError('no')\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        import fuzz_probe
    finally:
        sys.path.remove(str(tmp_path))

    def mutate(data: bytes, rng: random.Random) -> bytes:
        at = rng.randrange(4)
        return data[:at] + bytes([rng.randrange(64, 96)]) + data[at + 1 :]

    mine = Target("probe", ("fuzz_probe",), fuzz_probe.parse, lambda: [b"@@@@"], mutate)
    found = evolve(mine, 8000, seed=0, into=tmp_path / "new")
    kept = [file.read_bytes() for file in (tmp_path / "new").iterdir()]
    assert found.accepted and found.inputs == 8000 and any(data == b"SHRD" for data in kept)
    few = minimise(mine, [*kept, *[b"SHRD" + bytes(i) for i in range(9)]])
    assert len(few) < len(kept) + 1 and b"SHRD" in few


def test_the_store_refuses_what_the_local_one_refuses() -> None:
    store = MemoryStore({"a/b": b"xyz", "c": b""}, {"c": 10})
    assert store.list() == ("a/b", "c") and store.exists("a/b") and not store.exists("a")
    assert store.read("a/b", 1) == b"yz" and store.read("c", 4) == bytes(6) and store.stat("c").nbytes == 10
    for path in ("/a", "../a", "a/../c", "a\0"):
        with pytest.raises(CheckpointError, match="leaves"):
            store.read(path)
    with pytest.raises(CheckpointError, match="missing"):
        store.stat("d")
    for offset, nbytes in ((4, None), (0, 4), (-1, 1), (0, -1)):
        with pytest.raises(ContainerError, match="past the end"):
            store.read("a/b", offset, nbytes)


def test_trees_survive_packing_and_anything_unpacks() -> None:
    files, sizes = {"a/b": b"1\n2", "é": b""}, {"a/b": 3, "é": 1 << 40}
    assert unpack(pack(files, sizes)) == (files, sizes)
    rng = random.Random(0)
    for _ in range(500):
        assert all(".." not in path.split("/") for path in unpack(mutate_bytes(pack(files, sizes), rng))[0])


def test_archives_and_pickles_come_back_as_they_were() -> None:
    for data in TORCH_ZIP.seeds():
        archive = parse(data)
        assert archive is not None and attempt(TORCH_ZIP, build(archive)) is None
        rng = random.Random(0)
        for _ in range(50):
            assert isinstance(build(mutate_archive(archive, rng)), bytes) and isinstance(mutate_fields(data, rng), bytes)
    for data in UNPICKLE.seeds():
        assert b"".join(instructions(data)) == data
        assert mutate_pickle(data, random.Random(1)) == mutate_pickle(data, random.Random(1))


def test_json_stays_json_most_of_the_time() -> None:
    import json

    rng, sound = random.Random(0), 0
    for _ in range(500):
        try:
            json.loads(mutate_json(b'{"a": [1, {"b": "x"}], "c": null}', rng, ("a", 1)))
            sound += 1
        except (ValueError, RecursionError):
            pass
    assert 250 < sound < 500


def test_lines_beside_the_parser_are_named_exactly() -> None:
    file = Path(harness.__file__)
    assert len(_lines_of(file, ["Statistics.count"])) in range(4, 12)
    assert _lines_of(file, []) == set()
    with pytest.raises(ValueError, match="nonsense"):
        _lines_of(file, ["nonsense"])
