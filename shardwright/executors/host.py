"""What this machine offers: memory that may be used, and cores."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["default_memory", "default_workers", "held_bytes", "memory_room"]

_MOST = 2 << 30
_CGROUPS = Path("/sys/fs/cgroup")


def default_memory() -> int:
    """A quarter of what the host or cgroup has free, at most 2 GiB, in bytes."""
    return min(_MOST, memory_room() // 4)


def memory_room() -> int:
    """Bytes that this process may still take: of the host, and of every cgroup that it is in."""
    return min([_available(), *_cgroup_rooms()])


def default_workers() -> int:
    """Cores that this process may run on, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


def held_bytes(field: str) -> int | None:
    """A figure of this process in ``/proc/self/status``, such as ``"VmHWM"``; None where the system does not say."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass  # not Linux
    return None


def _available() -> int:
    """Bytes that the kernel could give without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: fall back to the size of the machine
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _cgroup_rooms() -> list[int]:
    """Bytes left under each memory limit of the process's cgroup and of those around it, of either version."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        parts = Path(group.strip().lstrip("/")).parts
        for depth in range(len(parts) + 1):
            if number == "0":
                room = _room(_CGROUPS.joinpath(*parts[:depth]), "memory.max", "memory.current", "")
            elif "memory" in controllers.split(","):
                room = _room(_CGROUPS.joinpath("memory", *parts[:depth]), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            else:
                continue
            if room is not None:
                found.append(room)
    return found


def _room(folder: Path, limit_name: str, used_name: str, prefix: str) -> int | None:
    """What one cgroup may still take; pages of files count as free, since the kernel gives them up first."""
    try:
        limit = (folder / limit_name).read_text().strip()
        if limit == "max":
            return None
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        pages = int(stat.get(f"{prefix}inactive_file", 0)) + int(stat.get(f"{prefix}active_file", 0))
        return max(0, int(limit) - max(0, int((folder / used_name).read_text()) - pages))
    except (OSError, ValueError):
        return None
