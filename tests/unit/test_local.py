"""Lanes: plan order, one first cause, nothing after the end, no threads left; signals and memory in a child process."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from shardwright.errors import MemoryBoundError, RunError, StoppedError
from shardwright.executors import local, system
from shardwright.executors.execute import execute
from shardwright.executors.local import run
from shardwright.executors.sources import SourceFiles
from tests.unit.hand_made import fit_of, split_plan

ROOMY = 1 << 30


class CountingSink:
    """Counts calls; raises at one of them; knows when something is written too late."""

    def __init__(self, fail_at=None, error=None, delay=0.0):
        self.calls = 0
        self.late = 0
        self.over = False
        self.fail_at = fail_at
        self.error = error or RunError("injected")
        self.delay = delay
        self.lock = threading.Lock()
        self.files = {}

    def witnessed(self, number):
        return False

    @contextmanager
    def writing(self, number):
        yield self.write

    def write(self, offset, data):
        with self.lock:
            self.calls += 1
            self.late += self.over
            mine = self.calls
        if mine == self.fail_at:
            raise self.error
        time.sleep(self.delay)


def drive(plan, sink, *, strip=64, workers=3):
    sources = SourceFiles(plan.source_root, plan.source_files)
    try:
        tiles = range(len(plan.tiles))
        return run(plan, sources, sink, fit_of(plan, strip, workers), tiles=tiles, finished=lambda tile, receipt: None)
    finally:
        sink.over = True
        sources.close()


def test_tiles_start_in_plan_order(tmp_path, monkeypatch):
    plan, _ = split_plan(tmp_path, rows=64, layers=4, step=4)
    started, real = [], local.jobs
    monkeypatch.setattr(local, "jobs", lambda plan, tile: started.append(tile) or real(plan, tile))
    drive(plan, CountingSink(), workers=1)
    assert started == list(range(64))
    started.clear()
    drive(plan, CountingSink(), workers=4)
    # Lanes hand tiles out in order and then race; none can be further ahead than there are lanes.
    assert sorted(started) == list(range(64)) and all(abs(at - tile) <= 4 for at, tile in enumerate(started))


@pytest.mark.parametrize("fail_at", [1, 7, 40])
@pytest.mark.parametrize("workers", [1, 4])
def test_after_an_error_nothing_is_written_and_the_first_cause_is_raised(tmp_path, fail_at, workers):
    plan, _ = split_plan(tmp_path, rows=64, layers=4, step=4)
    cause = RunError("injected", file="x")
    sink = CountingSink(fail_at, cause, delay=0.001)
    before = set(threading.enumerate())
    with pytest.raises(RunError) as caught:
        drive(plan, sink, workers=workers)
    calls = sink.calls
    time.sleep(0.05)
    assert caught.value is cause
    assert sink.calls == calls and sink.late == 0
    assert calls <= fail_at + 2 * workers
    assert set(threading.enumerate()) <= before


def test_a_system_error_becomes_a_run_error(tmp_path):
    plan, _ = split_plan(tmp_path)
    with pytest.raises(RunError, match="No space left") as caught:
        drive(plan, CountingSink(2, OSError(errno.ENOSPC, "No space left on device", "out.bin")))
    assert caught.value.exit_code == 5 and caught.value.file == "out.bin"
    assert isinstance(caught.value.__cause__, OSError)


def test_a_full_disk_names_the_file_and_can_be_resumed(tmp_path, monkeypatch):
    (tmp_path / "src").mkdir()
    plan, _ = split_plan(tmp_path / "src", rows=64, layers=4, step=4)
    calls, real = iter(range(1000)), system.pwrite

    def pwrite(fd, data, offset):
        if next(calls) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(system, "pwrite", pwrite)
    with pytest.raises(RunError, match=r"writing failed: No space left on device: file rank\d.bin. The disk is full") as caught:
        execute(plan, tmp_path / "out", memory=ROOMY)
    assert caught.value.partial == str(tmp_path / "out.partial")
    assert sorted(os.listdir(tmp_path)) == ["out.partial", "src"]


def test_a_bug_is_raised_as_it_is(tmp_path):
    plan, _ = split_plan(tmp_path)
    with pytest.raises(ZeroDivisionError):
        drive(plan, CountingSink(1, ZeroDivisionError()))


def test_a_bound_that_is_too_small_writes_nothing(tmp_path):
    (tmp_path / "src").mkdir()
    plan, _ = split_plan(tmp_path / "src")
    with pytest.raises(MemoryBoundError) as caught:
        execute(plan, tmp_path / "out", memory=1 << 20)
    assert os.listdir(tmp_path) == ["src"]
    execute(plan, tmp_path / "out", memory=caught.value.expected)


def test_handlers_are_restored(tmp_path):
    plan, _ = split_plan(tmp_path)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    drive(plan, CountingSink())
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def child(code, *arguments, **more):
    """A fresh process that runs `code`."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


STOPPABLE = """
    import sys, time
    from pathlib import Path
    from shardwright.errors import StoppedError
    from shardwright.executors import system
    from shardwright.executors.execute import execute
    from tests.unit.hand_made import split_plan
    real = system.pwrite
    def slow(fd, data, offset):
        print("writing", flush=True)
        time.sleep(0.02)
        return real(fd, data, offset)
    system.pwrite = slow
    root = Path(sys.argv[1])
    plan, _ = split_plan(root / "src", rows=256, layers=8, step=2)
    try:
        execute(plan, root / "out", memory=1 << 30, workers=2)
    except StoppedError as error:
        print(error)
        sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run(tmp_path, number):
    (tmp_path / "src").mkdir()
    process = child(STOPPABLE, tmp_path)
    for _ in range(8):  # the first ones are headers
        assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == StoppedError.exit_code, err
    assert f"stopped by {number.name}" in out
    assert sorted(os.listdir(tmp_path)) == ["out.partial", "src"]


MEASURED = """
    import os, sys, threading, time
    from pathlib import Path
    from shardwright.executors.execute import execute, fit_plan
    from tests.unit.hand_made import split_plan
    root, memory, axis = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    import pickle
    plan = pickle.loads((root / "plan").read_bytes())
    most = 0
    def watch():
        global most
        while True:
            fields = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Rss"))
            most = max(most, int(fields["RssAnon"].split()[0]) << 10)
            time.sleep(0.002)
    threading.Thread(target=watch, daemon=True).start()
    outcome = execute(plan, root / "out", memory=memory, workers=4)
    print(most, outcome.peak_rss_bytes, fit_plan(plan, memory, 4).peak_bytes, outcome.workers, "torch" in sys.modules)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("axis", [0, 1])
def test_a_run_stays_inside_its_bound(tmp_path, axis):
    import pickle

    (tmp_path / "src").mkdir()
    plan, arrays = split_plan(tmp_path / "src", rows=8192, width=4096, layers=2, axis=axis, step=2048)
    (tmp_path / "plan").write_bytes(pickle.dumps(plan))
    memory = 96 << 20
    process = child(MEASURED, tmp_path, memory, axis)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    anonymous, resident, projected, workers, torch = out.split()
    assert int(anonymous) <= int(projected) <= memory
    assert int(resident) <= 200 << 20 and int(workers) >= 2 and torch == "False"
    parts = [np.split(a, 2, axis)[1] for a in arrays]
    assert (tmp_path / "out" / "rank1.bin").read_bytes() == b"00000001" + b"".join(p.tobytes() for p in parts)
