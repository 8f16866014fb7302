"""The bytes of a target are a function of source and request alone.

Memory bound, workers, strip size and tile size change how a run goes, never what it writes: plans of 50 tiles and more,
with pieces that cross the edges of tiles and strips, are run in many ways and the hashes of the whole target compared.
Then the order in which tiles start, and what an error leaves behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import shardwright as sw
from shardwright.errors import MemoryBoundError, RunError
from shardwright.executors import execute as execute_module
from shardwright.executors.targets import TargetFiles
from shardwright.planner.passes import memory
from shardwright.planner.passes.build import build
from shardwright.planner.plan import Plan
from shardwright.planner.request import Request
from tests.unit import reference as ref
from tests.unit.reference import Model

MODEL = Model(layers=3, heads=6, kv=3, head_dim=16, hidden=96, ffn=96, vocab=131, tied=True)
MIB = 1 << 20

CASES = {
    # source, request, tile bytes: none of them divides a row, a head or a matrix
    "split": ("hf", Request("ranks", sw.Layout(tp=3, pp=3), dialect="megatron"), 3500),
    "legacy": ("hf", Request("megatron-legacy", sw.Layout(tp=3, pp=1)), 2500),
    "one hop": ("legacy", Request("megatron-legacy", sw.Layout(tp=6), spec="local"), 3000),
    "replicas": ("serving", Request("huggingface"), 3100),
    "zarr": ("hf", Request("ranks", sw.Layout(tp=3), dialect="megatron", container="zarr"), 2700),
    "cast": ("hf", Request("ranks", sw.Layout(tp=3), pad_vocab_to=3, dtype="bfloat16"), 2900),
    "int8": ("hf", Request("huggingface", quantize="int8"), 2300),
}


@pytest.fixture(scope="module", autouse=True)
def no_sync() -> Iterator[None]:
    """These tests look at bytes, not at what survives a power cut: waiting for the disk is most of their time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("invariance")
    # Values that a cast and a quantisation can work on: small finite floats.
    weights = {name: (bits & 0x3FFFFFFF) | 0x30000000 for name, bits in MODEL.weights().items()}
    found = {"hf": ref.write(root / "hf", MODEL, weights)}
    sw.convert(found["hf"], root / "legacy", to="megatron-legacy", layout=sw.Layout(tp=3, pp=3))
    sw.convert(found["hf"], root / "serving", to="ranks", layout=sw.Layout(tp=6, pp=3), pad_vocab_to=6)
    return found | {"legacy": root / "legacy", "serving": root / "serving"}


def plan_of(case: str, sources: dict[str, Path], tile_bytes: int | None = None) -> Plan:
    source, request, usual = CASES[case]
    return build(sw.open(sources[source]).source, request, tile_bytes=tile_bytes or usual)


def digest(root: Path, skip: tuple[str, ...] = ()) -> str:
    """SHA-256 over every file's path and bytes."""
    total = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = path.relative_to(root).as_posix()
        if name not in skip:
            total.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


@pytest.mark.parametrize("case", CASES)
def test_memory_workers_and_strips_never_change_a_byte(case, sources, tmp_path, monkeypatch):
    plan = plan_of(case, sources)
    assert len(plan.tiles) >= 50
    items = [int((plan.tiles.program == n).sum()) // len(b.names) for n, b in enumerate(plan.bindings)]
    assert any(len(p.gather) < n for p, n in zip(plan.programs, items, strict=True)), "no source piece crosses a tile's edge"
    if case != "zarr":  # there each chunk is a piece, and a tile owns whole ones
        assert any(len(p.outputs[0].scatter) < n for p, n in zip(plan.programs, items, strict=True)), (
            "no target piece crosses a tile's edge"
        )
    smallest = sw.Conversion(plan, memory="8GiB", workers=1).cost.min_memory_bytes
    with pytest.raises(MemoryBoundError) as refused:
        sw.Conversion(plan, tmp_path / "refused", memory=smallest - 1, workers=1).execute()
    assert refused.value.expected == smallest and not list(tmp_path.iterdir())
    found = {}
    ways: list[tuple[int, int, int | None]] = [
        (smallest, 1, None),
        (smallest, 5, None),
        (max(smallest, 128 * MIB), 2, None),
        (1 << 30, 5, None),
    ]
    ways += [(1 << 30, 1, 200), (1 << 30, 5, 1000), (1 << 30, 2, 4096 * 3 + 4)]
    for number, (bound, workers, strip) in enumerate(ways):
        out = tmp_path / f"out{number}"
        with monkeypatch.context() as patch:
            if strip is not None:
                patch.setattr(memory, "STRIP_BYTES", strip)
                patch.setattr(memory, "STRIP_FLOOR", strip)
            outcome = sw.Conversion(plan, out, memory=bound, workers=workers).execute()
        assert outcome.workers <= workers and (strip is None or outcome.strip_bytes == strip)
        assert (outcome.bytes_read, outcome.bytes_written) == (int(plan.tiles.bytes_read.sum()), int(plan.tiles.bytes_written.sum()))
        found[bound, workers, strip] = digest(out)
    assert len(set(found.values())) == 1, found
    assert sw.verify(tmp_path / "out0", sources[CASES[case][0]]).ok


@pytest.mark.parametrize("case", ["split", "legacy", "one hop", "replicas", "cast", "int8"])
def test_tiles_change_nothing_but_what_is_said_of_them(case, sources, tmp_path):
    found, counts = set(), set()
    for tile_bytes in (700, CASES[case][2], 40_001, 128 * MIB):
        plan = plan_of(case, sources, tile_bytes)
        out = tmp_path / str(tile_bytes)
        sw.Conversion(plan, out, workers=2).execute()
        found.add(digest(out, skip=("shardwright.json",)))
        counts.add(len(plan.tiles))
        said = json.loads((out / "shardwright.json").read_text())
        assert said.pop("recipe").pop("tile_bytes") == tile_bytes and said.pop("plan_hash")
        said["source"] = None
        found.add(json.dumps(said))
    assert len(counts) == 4 and len(found) == 2


class Recording(TargetFiles):
    """Target files that remember every write, and may refuse one."""

    log: list[tuple[int, int, int]]
    on_write: Callable[[int], None]

    @contextmanager
    def writing(self, number: int) -> Iterator[Callable[[int, memoryview], None]]:
        with super().writing(number) as write:

            def recorded(offset: int, data: memoryview) -> None:
                with self.lock:
                    self.log.append((number, offset, len(data)))
                    count = len(self.log)
                self.on_write(count)
                write(offset, data)

            yield recorded


@pytest.fixture
def recording(monkeypatch) -> type[Recording]:
    kind = type("Recorder", (Recording,), {"log": [], "lock": threading.Lock(), "on_write": staticmethod(lambda count: None)})
    monkeypatch.setattr(execute_module, "TargetFiles", kind)
    return kind


def tile_of_write(plan: Plan) -> Callable[[int, int], int | None]:
    """Which tile writes a byte of a target file, for plans whose tiles are whole row blocks of unsplit tensors."""
    starts: list[tuple[int, int, int]] = []
    for tile in range(len(plan.tiles)):
        for program, row, lo, _ in plan.items(tile):
            bound = plan.bindings[program]
            width = plan.programs[program].nbytes // max(plan.programs[program].shape[0], 1)
            starts.append((int(bound.target_file[row, 0]), int(bound.target_offset[row, 0]) + lo[0] * width, tile))
    starts.sort()
    static = {(n, offset) for n, f in enumerate(plan.target_files) for offset, _ in f.static}

    def find(file: int, offset: int) -> int | None:
        return None if (file, offset) in static else starts[bisect_right(starts, (file, offset, 1 << 60)) - 1][2]

    return find


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_tiles_start_in_plan_order(workers, sources, tmp_path, recording):
    """A tile's first write comes when all earlier tiles have begun, but for those that other lanes have only just taken."""
    plan = build(sw.open(sources["hf"]).source, Request("huggingface"), tile_bytes=2000)
    assert len(plan.tiles) >= 50 and all(p.cut == (0,) for p in plan.programs)
    sw.Conversion(plan, tmp_path / "out", workers=workers, memory="1GiB").execute()
    find = tile_of_write(plan)
    order = [t for t in dict.fromkeys(find(file, offset) for file, offset, _ in recording.log) if t is not None]
    assert sorted(order) == list(range(len(plan.tiles)))
    for position, tile in enumerate(order):
        missing = set(range(tile)) - set(order[:position])
        assert len(missing) < workers, f"tile {tile} started before {sorted(missing)}"


def lanes() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("lane")]


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("at", [0.1, 0.5, 0.95])
def test_after_an_error_nothing_is_written_and_the_first_cause_is_told(workers, at, sources, tmp_path, recording):
    plan = plan_of("split", sources)
    sw.Conversion(plan, tmp_path / "whole", workers=workers).execute()
    fails = int(len(recording.log) * at)
    recording.log.clear()

    def on_write(count: int) -> None:
        if count == fails:
            raise RunError("the first cause", file=f"write {count}")
        if count > fails:
            time.sleep(0.02)  # the other lanes fail as well, later
            raise ValueError("a consequence")

    recording.on_write = staticmethod(on_write)
    with pytest.raises(RunError, match=f"the first cause: file write {fails}"):
        sw.Conversion(plan, tmp_path / "out", workers=workers).execute()
    written = len(recording.log)
    assert lanes() == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.partial", "whole"]
    time.sleep(0.05)
    assert len(recording.log) == written <= fails + workers
    recording.on_write = staticmethod(lambda count: None)
    sw.Conversion(plan, tmp_path / "out", workers=workers).execute()
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_an_error_of_the_system_names_the_file_and_keeps_its_cause(sources, tmp_path, recording):
    plan = plan_of("split", sources)
    files = sum(len(f.static) for f in plan.target_files)

    def on_write(count: int) -> None:
        if count > files:
            raise OSError(28, "No space left on device")

    recording.on_write = staticmethod(on_write)
    with pytest.raises(RunError, match=r"No space left on device.*rank_0000|rank_0000.*No space left on device") as caught:
        sw.Conversion(plan, tmp_path / "out", workers=3).execute()
    assert isinstance(caught.value.__cause__, OSError)
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]


def test_a_lane_that_waits_for_memory_does_not_start(sources, tmp_path, recording):
    """With the smallest bound one lane runs, whatever was asked for."""
    plan = plan_of("split", sources)
    smallest = sw.Conversion(plan, memory="8GiB", workers=1).cost.min_memory_bytes
    seen: set[str] = set()
    recording.on_write = staticmethod(lambda count: seen.add(threading.current_thread().name))
    outcome = sw.Conversion(plan, tmp_path / "out", memory=smallest, workers=5).execute()
    assert outcome.workers == 1 and len([name for name in seen if name.startswith("lane")]) == 1
