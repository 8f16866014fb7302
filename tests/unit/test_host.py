"""What the machine offers, as the kernel says it: memory under every limit around the process, and cores."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardwright.executors import host


def test_here() -> None:
    assert 0 < host.default_memory() <= 2 << 30
    assert 1 <= host.default_workers() <= 8


@pytest.mark.parametrize(("free", "expected"), [(400 << 20, 100 << 20), (64 << 30, 2 << 30), (0, 0)])
def test_quarter_of_what_is_free(monkeypatch: pytest.MonkeyPatch, free: int, expected: int) -> None:
    monkeypatch.setattr(host, "_available", lambda: free)
    monkeypatch.setattr(host, "_cgroup_rooms", list)
    assert host.default_memory() == expected


def test_the_tightest_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_available", lambda: 64 << 30)
    monkeypatch.setattr(host, "_cgroup_rooms", lambda: [4 << 30, 1 << 30])
    assert host.default_memory() == 256 << 20


def group(folder: Path, limit: str, current: int, file: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {file}\nactive_file 0\n")


def test_limits_of_groups_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A limit may stand on any group above the process's own, and the page cache is not in use."""
    own = next((line.split("::")[1] for line in Path("/proc/self/cgroup").read_text().splitlines() if "::" in line), None)
    if own is None:
        pytest.skip("no cgroup of version 2")
    monkeypatch.setattr(host, "_CGROUPS", tmp_path)
    folder = tmp_path.joinpath(*Path(own.strip().lstrip("/")).parts)
    group(tmp_path, "1000", 900, file=850)
    assert host._cgroup_rooms() == [950]
    if folder != tmp_path:
        group(folder, "max", 900)
        assert host._cgroup_rooms() == [950]
    group(folder, "500", 700)
    assert 0 in host._cgroup_rooms()


def test_no_cgroups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "_CGROUPS", tmp_path / "none")
    assert host._cgroup_rooms() == []


def test_workers_follow_the_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert host.default_workers() == 8
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3}, raising=False)
    assert host.default_workers() == 1
