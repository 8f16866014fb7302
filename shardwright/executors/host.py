"""What this machine offers: memory that may be used, and cores."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["default_memory", "default_workers"]

_MOST = 2 << 30


def default_memory() -> int:
    """A quarter of what the host or cgroup has free, at most 2 GiB, in bytes."""
    free = _available()
    limit, used = _cgroup()
    if limit is not None:
        free = min(free, max(0, limit - used))
    return min(_MOST, free // 4)


def default_workers() -> int:
    """Cores that this process may run on, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


def _available() -> int:
    """Bytes that the kernel could give without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: fall back to the size of the machine
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _cgroup() -> tuple[int | None, int]:
    """(limit, use) of the process's cgroup, version 2; (None, 0) where there is none."""
    try:
        group = next(line.split("::")[1] for line in Path("/proc/self/cgroup").read_text().splitlines() if "::" in line)
        folder = Path("/sys/fs/cgroup") / group.strip().lstrip("/")
        limit = (folder / "memory.max").read_text().strip()
        return (None if limit == "max" else int(limit)), int((folder / "memory.current").read_text())
    except (OSError, StopIteration, ValueError):
        return None, 0
