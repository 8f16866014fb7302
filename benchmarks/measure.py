"""One command as a child process, and everything it cost.

1. The command is started with its output in files, and watched every 20 ms: `VmHWM` (peak resident memory) and `RssAnon`
   (what is not a mapped file) out of ``/proc/PID/status``.
2. When it has ended but is not yet reaped (`os.waitid` with ``WNOWAIT``), ``/proc/PID/io`` still holds the bytes that
   all its threads read and wrote by system calls: exact, and nothing has to be added to the command.
3. `os.wait4` reaps it and gives user and system CPU seconds.
4. Syncing its target afterwards is timed on its own: what a plain copy leaves for later is a cost too.

`ru_maxrss` is not used: a child inherits it from the process that it was forked from. Linux only.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread
from typing import IO, Any

__all__ = ["Sample", "measure", "sync", "warm"]

_EVERY = 0.02


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of one command.

    Attributes
    ----------
    wall_s, user_s, system_s
        From start to end, without the sync.
    peak_rss_bytes, peak_anon_bytes
        Resident memory: all of it, and what is not backed by a file.
    bytes_read, bytes_written
        By system calls, page cache included (`rchar`, `wchar`).
    sync_s, sync_cpu_s
        Making the target durable afterwards; 0 where it was durable already.
    stdout
        What it printed.
    """

    wall_s: float
    user_s: float
    system_s: float
    peak_rss_bytes: int
    peak_anon_bytes: int
    bytes_read: int
    bytes_written: int
    sync_s: float
    sync_cpu_s: float
    stdout: str

    @property
    def cpu_s(self) -> float:
        """User and system."""
        return self.user_s + self.system_s

    def to_json(self) -> dict[str, Any]:
        """As plain values, without the output."""
        return {k: v for k, v in asdict(self).items() if k != "stdout"}


def measure(command: Sequence[str], *, target: Path | None = None) -> Sample:
    """Run a command that must succeed.

    Parameters
    ----------
    target
        File or folder that it writes, to be synced afterwards.

    Raises
    ------
    RuntimeError
        It failed; holds the end of what it said.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.perf_counter()
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        with _Watch(child.pid) as watch:
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            wall = time.perf_counter() - began
        counts = _fields(Path(f"/proc/{child.pid}/io"))
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise RuntimeError(f"{' '.join(command)} exited with {child.returncode}:\n{_text(err)[-2000:]}")
        syncing = sync(target) if target is not None else (0.0, 0.0)
        moved = counts.get("rchar", 0), counts.get("wchar", 0)
        return Sample(wall, usage.ru_utime, usage.ru_stime, watch.rss, watch.anon, *moved, *syncing, _text(out))


class _Watch:
    """The peaks of a process's memory, looked at by a thread."""

    def __init__(self, pid: int) -> None:
        self.rss = self.anon = 0
        self._status = Path(f"/proc/{pid}/status")
        self._ended = Event()
        self._thread = Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            found = _fields(self._status)
            self.rss = max(self.rss, found.get("VmHWM", 0) << 10)
            self.anon = max(self.anon, found.get("RssAnon", 0) << 10)
            if self._ended.wait(_EVERY):
                return


def _fields(path: Path) -> dict[str, int]:
    """The ``name: number`` lines of a file in /proc."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def sync(target: Path) -> tuple[float, float]:
    """Make a file or a folder durable; wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    for path in _files(target):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    return time.perf_counter() - wall, time.process_time() - cpu


def warm(source: Path) -> None:
    """Read a file or a folder once, so that every command finds it in the page cache."""
    buffer = bytearray(1 << 20)
    for path in _files(source):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _files(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
