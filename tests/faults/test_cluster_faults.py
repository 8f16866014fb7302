"""A cluster that loses workers, is stopped, or hands over to threads: the run finishes, or the next one does.

The workers are slowed down (every write takes a while), so that there is a middle of a run to disturb.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shardwright.errors import RunError
from shardwright.executors import ledger, system
from shardwright.executors.execute import execute
from shardwright.planner import codec
from tests.faults.scenes import BATCH_BYTES, MEMORY, Scene, digests, journal_of, make_scene, vouched

DELAY = 0.02


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scenes") / "megatron", "megatron")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Any]:
    """Two worker processes under nannies, which start another when one dies."""
    from distributed import LocalCluster

    with warnings.catch_warnings():
        # dask's own housekeeping of its sockets and loops is not what is tested here.
        warnings.simplefilter("ignore")
        with LocalCluster(
            processes=True,
            n_workers=2,
            threads_per_worker=1,
            dashboard_address=None,
            local_directory=str(tmp_path / "dask"),
            silence_logs=50,
        ) as found:
            yield found


@pytest.fixture
def client(cluster: Any) -> Iterator[Any]:
    from distributed import Client

    with Client(cluster, set_as_default=False) as found:
        yield found


def slow(seconds: float) -> None:
    """Runs in a worker: every write takes that long."""
    write = os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        time.sleep(seconds)
        return write(fd, data, offset)

    system.pwrite = pwrite


def fail(number: int) -> None:
    """Runs in a worker: that write and all after it find a full disk."""
    write, done = os.pwrite, 0

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        nonlocal done
        done += 1
        if done >= number:
            raise OSError(28, os.strerror(28))
        return write(fd, data, offset)

    system.pwrite = pwrite


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "BATCH_BYTES", BATCH_BYTES)


def later(when: Callable[[], bool], what: Callable[[], object]) -> threading.Thread:
    """Do something as soon as something is true."""

    def run() -> None:
        until = time.monotonic() + 60
        while not when():
            if time.monotonic() > until:
                return
            time.sleep(0.01)
        what()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def half_done(scene: Scene, out: Path) -> bool:
    return len(vouched(journal_of(out))) >= len(scene.plan.tiles) // 3


def resumes(scene: Scene, out: Path, **options: Any) -> int:
    kept = len(vouched(journal_of(out)))
    outcome = execute(scene.plan, out, memory=MEMORY, **options)
    scene.done(out)
    assert outcome.tiles_resumed == kept
    assert outcome.padding == scene.padding
    return kept


def test_a_killed_worker(scene: Scene, tmp_path: Path, client: Any) -> None:
    """The scheduler gives its tiles to another worker; if it gives up, the next run goes on."""
    out = tmp_path / "out"
    client.run(slow, DELAY)
    pids = list(client.run(os.getpid).values())
    thread = later(lambda: half_done(scene, out), lambda: os.kill(pids[0], signal.SIGKILL))
    try:
        execute(scene.plan, out, memory=MEMORY, scheduler=client)
    except RunError as error:
        print(error)
        assert resumes(scene, out, scheduler=client) > 0
    thread.join()
    scene.done(out)


def test_all_workers_killed_and_then_threads(scene: Scene, tmp_path: Path, client: Any) -> None:
    """Nobody is left who could write; this machine finishes it."""
    out = tmp_path / "out"
    client.run(slow, DELAY)

    def kill() -> None:
        for pid in client.run(os.getpid).values():
            os.kill(pid, signal.SIGKILL)

    thread = later(lambda: half_done(scene, out), kill)
    try:
        execute(scene.plan, out, memory=MEMORY, scheduler=client)
    except RunError as error:
        print(error)
        scene.look(out)
        assert resumes(scene, out, workers=2) > 0
    thread.join()
    scene.done(out)


def test_a_worker_with_a_full_disk_and_then_another_cluster(scene: Scene, tmp_path: Path, client: Any) -> None:
    out = tmp_path / "out"
    client.run(fail, 30)
    with pytest.raises(RunError, match="No space left on device"):
        execute(scene.plan, out, memory=MEMORY, scheduler=client)
    scene.look(out)
    client.restart()
    assert resumes(scene, out, scheduler=client) > 0


def test_threads_begin_and_a_cluster_finishes(scene: Scene, tmp_path: Path, client: Any) -> None:
    out, real, done = tmp_path / "out", system.pwrite, 0

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        nonlocal done
        done += 1
        if done == 100:
            raise OSError(5, os.strerror(5))
        return real(fd, data, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system, "pwrite", pwrite)
        with pytest.raises(RunError, match="Input/output error"):
            execute(scene.plan, out, memory=MEMORY, workers=2)
    assert resumes(scene, out, scheduler=client) > 0


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.soak)])
def test_ctrl_c_on_a_cluster_and_threads_finish(scene: Scene, tmp_path: Path, cluster: Any, client: Any, number: signal.Signals) -> None:
    """The real command; what workers had finished counts, and none of them writes afterwards."""
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    codec.save(scene.plan, plan, target_root=str(out))
    client.run(slow, DELAY)
    command = [Path(sys.executable).parent / "shardwright", "convert", "--plan", plan, "--scheduler", cluster.scheduler_address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        data = out.with_name("out.partial") / "data"
        later((data.parent / "journal").exists, lambda: None).join()
        before = digests(data)
        later(lambda: digests(data) != before, lambda: process.send_signal(number)).join()
        _, err = process.communicate(timeout=60)
    print(err)
    assert process.returncode == 5, err
    left = [(p, p.stat().st_mtime_ns) for p in sorted((tmp_path / "out.partial").rglob("*"))]
    scene.look(out)
    time.sleep(1)
    assert [(p, p.stat().st_mtime_ns) for p in sorted((tmp_path / "out.partial").rglob("*"))] == left
    assert 0 < len(vouched(journal_of(out))) < len(scene.plan.tiles)
    assert resumes(scene, out, workers=2) > 0
