"""Disks that fill up or fail, and sources that change while they are read.

Whatever goes wrong: the error says what and where, nothing is lost, nothing wrong is believed, and the next run finishes
what was begun, to the byte.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shardwright.errors import DiskSpaceError, PlanError, RunError
from shardwright.executors import ledger, publish, system
from tests.faults.harm import Fault, convert, raising, refused, resumes
from tests.faults.scenes import Scene, journal_of, vouched


class TestDevices:
    """System calls that fail, once or from then on."""

    @pytest.mark.parametrize("forever", [False, True], ids=["once", "forever"])
    @pytest.mark.parametrize(
        ("name", "path", "number", "code", "says"),
        [
            ("pwrite", "/data/", 50, errno.EIO, "writing failed: Input/output error"),
            ("pwrite", "/data/", 50, errno.ENOSPC, "writing failed: No space left on device"),
            ("pwrite", "/data/", 50, errno.EDQUOT, "writing failed: Disk quota exceeded"),
            ("preadv", "/source/", 50, errno.EIO, "reading failed: Input/output error"),
            ("sync", "/journal", 3, errno.EIO, "journaling failed: Input/output error"),
            ("append", "/journal", 3, errno.ENOSPC, "journaling failed: No space left on device"),
        ],
    )
    def test_an_error_in_flight(
        self, scene: Scene, out: Path, name: str, path: str, number: int, code: int, says: str, forever: bool
    ) -> None:
        with pytest.MonkeyPatch.context() as patch:
            Fault(patch, name, path, number, raising(code), after=forever)
            error = refused(RunError, 5, scene, out, says)
        assert error.file and error.remedy
        scene.look(out)
        assert resumes(scene, out) > 0

    @pytest.mark.parametrize(("file", "number"), [("model.safetensors", 4), ("model.safetensors", 6), ("shardwright.json", 2)])
    def test_a_failed_sync_is_never_believed(self, scene: Scene, out: Path, file: str, number: int) -> None:
        """The kernel reports a lost write once and then calls the pages clean: what the batch wrote must be written again."""
        unsynced: dict[int, list[tuple[int, int]]] = {}
        write, real = system.pwrite, system.sync
        syncs = 0

        def pwrite(fd: int, data: memoryview, offset: int) -> int:
            unsynced.setdefault(fd, []).append((offset, len(data)))
            return write(fd, data, offset)

        def sync(fd: int) -> None:
            nonlocal syncs
            if os.readlink(f"/proc/self/fd/{fd}").endswith(f"/data/{file}"):
                syncs += 1
                if syncs == number:
                    for offset, nbytes in unsynced.pop(fd, []):
                        os.pwrite(fd, b"\xee" * nbytes, offset)
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                unsynced.pop(fd, None)
            real(fd)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(system, "pwrite", pwrite)
            patch.setattr(system, "sync", sync)
            refused(RunError, 5, scene, out, "syncing failed: Input/output error")
        assert syncs == number  # it is not tried again
        assert resumes(scene, out) > 0

    def test_a_torn_journal_write(self, scene: Scene, out: Path) -> None:
        """The disk takes half of a line, then no more."""

        def half(real: Callable[..., int], fd: int, data: bytes) -> int:
            real(fd, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with pytest.MonkeyPatch.context() as patch:
            Fault(patch, "append", "/journal", 4, half)
            refused(RunError, 5, scene, out, "journaling failed: No space left")
        assert not journal_of(out).endswith(b"\n")
        assert resumes(scene, out) > 0

    def test_short_reads_and_writes_change_nothing(self, scene: Scene, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        read, write, append = system.preadv, system.pwrite, system.append
        chance, lock = random.Random(0), threading.Lock()

        def some(nbytes: int) -> int:
            with lock:
                return chance.randint(1, max(1, min(nbytes, 3000)))

        def preadv(fd: int, buffers: Any, offset: int) -> int:
            return read(fd, [buffers[0][: some(len(buffers[0]))]], offset) if len(buffers[0]) else read(fd, buffers, offset)

        monkeypatch.setattr(system, "preadv", preadv)
        monkeypatch.setattr(system, "pwrite", lambda fd, data, offset: write(fd, data[: some(len(data))], offset))
        monkeypatch.setattr(system, "append", lambda fd, data: append(fd, data[: some(len(data)) // 10 + 1]))
        convert(scene, out)
        scene.done(out)

    def test_the_first_cause_is_raised(self, scene: Scene, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One lane fails, others fail because of it; what began it is told."""
        lock, count = threading.Lock(), 0
        real = system.pwrite

        def pwrite(fd: int, data: memoryview, offset: int) -> int:
            nonlocal count
            with lock:
                count += 1
                mine = count
            if mine == 60:
                raise OSError(errno.EIO, "the first")
            if mine > 60:
                time.sleep(0.05)
                raise OSError(errno.ENOSPC, "a later one")
            return real(fd, data, offset)

        monkeypatch.setattr(system, "pwrite", pwrite)
        refused(RunError, 5, scene, out, "writing failed: the first", workers=4)
        monkeypatch.undo()
        resumes(scene, out)

    def test_a_bug_in_a_lane_is_no_damage(self, scene: Scene, out: Path) -> None:
        def wrong(real: Callable[..., Any], *args: Any) -> Any:
            raise ZeroDivisionError("a bug")

        with pytest.MonkeyPatch.context() as patch:
            Fault(patch, "pwrite", "/data/", 60, wrong)
            with pytest.raises(ZeroDivisionError, match="a bug"):
                convert(scene, out)
        scene.look(out)
        resumes(scene, out)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A small file system of its own, of any size; called again, it changes size."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def make(size: str) -> Path:
        nonlocal mounted
        command = (
            ["mount", "-o", f"remount,size={size}", str(place)]
            if mounted
            else ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        )
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        mounted = True
        return place

    yield make
    if mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


class TestFullDisk:
    """A file system that is really full."""

    def test_known_beforehand(self, scene: Scene, disk: Callable[[str], Path]) -> None:
        place = disk("256k")
        error = refused(DiskSpaceError, 3, scene, place / "out", "too little room")
        assert "bytes free" in str(error.expected)
        assert list(place.iterdir()) == []

    def test_found_when_files_are_laid_out(self, scene: Scene, disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
        """`statvfs` promised more than there is."""
        monkeypatch.setattr(publish, "SPARE_BYTES", -(1 << 40))
        place = disk("256k")
        refused(DiskSpaceError, 3, scene, place / "out", "too little room")
        assert list(place.iterdir()) == []

    @pytest.mark.parametrize("workers", [1, 4])
    def test_in_flight(self, scene: Scene, disk: Callable[[str], Path], workers: int) -> None:
        """Nothing reserved the blocks; when room is made, the run goes on."""
        place = disk("256k")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(publish, "SPARE_BYTES", -(1 << 40))
            patch.setattr(system, "allocate", lambda fd, nbytes: None)
            refused(RunError, 5, scene, place / "out", "failed: No space left on device.*free some space", workers=workers)
        scene.look(place / "out")
        disk("64m")
        assert resumes(scene, place / "out", workers=workers) > 0

    def test_quota(self, scene: Scene, out: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            Fault(patch, "allocate", "/data/", 1, raising(errno.EDQUOT))
            refused(DiskSpaceError, 3, scene, out, "quota leaves too little room")
        assert list(out.parent.iterdir()) == []


class TestSources:
    """Source files that change while they are read."""

    def harm(self, scene: Scene, out: Path, harm: Callable[[Path], None], *, match: str) -> tuple[RunError, Path, bytes, int]:
        """Do something to a source file in the middle of a run; the error, the file, and what it was."""
        path = Path(scene.plan.source_root) / scene.plan.source_files[0].path
        before, mtime = path.read_bytes(), path.stat().st_mtime_ns
        real, state = ledger.Ledger.finished, {"tiles": 0}

        def finished(found: ledger.Ledger, tile: int, receipt: Any) -> None:
            state["tiles"] += 1
            if state["tiles"] == 20:
                harm(path)
            real(found, tile, receipt)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ledger.Ledger, "finished", finished)
            error = refused(RunError, 5, scene, out, match, workers=1)
        assert isinstance(error, RunError)
        assert error.file is not None and path.name in error.file
        # Tile 19 was being handed in: it and all later ones may have been read from the other content.
        assert vouched(journal_of(out)) <= set(range(19))
        return error, path, before, mtime

    def restore(self, path: Path, before: bytes, mtime: int) -> None:
        path.write_bytes(before)
        os.utime(path, ns=(mtime, mtime))

    def test_truncated(self, scene: Scene, out: Path) -> None:
        error, path, before, mtime = self.harm(scene, out, lambda path: os.truncate(path, 4096), match="changed during the run|shrank")
        assert "bytes" in str(error.expected) and "bytes" in str(error.actual)
        refused(PlanError, 3, scene, out, rf"changed.*file {path.name}; expected {len(before)} bytes, actual 4096 bytes")
        self.restore(path, before, mtime + 1)
        refused(PlanError, 3, scene, out, rf"changed.*file {path.name}; expected modified .*, actual modified")
        self.restore(path, before, mtime)
        resumes(scene, out)

    def test_changed_in_place(self, scene: Scene, out: Path) -> None:
        """No line vouches for a tile that may have been read from the other content."""

        def scribble(path: Path) -> None:
            size = path.stat().st_size
            with open(path, "r+b") as file:
                file.seek(size // 4)
                file.write(b"\xa5" * (size // 2))

        _, path, before, mtime = self.harm(scene, out, scribble, match="changed during the run")
        self.restore(path, before, mtime)
        resumes(scene, out)

    def test_replaced(self, scene: Scene, out: Path) -> None:
        """Another file under that name: what is open still reads the old one, but nobody can say what is read next."""

        def swap(path: Path) -> None:
            path.with_suffix(".new").write_bytes(bytes(path.stat().st_size))
            os.replace(path.with_suffix(".new"), path)

        _, path, before, mtime = self.harm(scene, out, swap, match="changed during the run")
        self.restore(path, before, mtime)
        resumes(scene, out)

    def test_removed(self, scene: Scene, out: Path) -> None:
        _, path, before, mtime = self.harm(scene, out, os.unlink, match="gone|missing")
        refused(PlanError, 3, scene, out, "cannot be found|missing|gone")
        self.restore(path, before, mtime)
        resumes(scene, out)
