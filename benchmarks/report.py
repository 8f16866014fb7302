"""Figures as tables on a terminal, and as one JSON object with every sample and the machine's facts."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .conversions import Result

__all__ = ["conversions_json", "machine", "show_conversions", "show_planning"]

_PACKAGES = ("shardwright", "numpy", "dask", "safetensors", "torch", "zarr")


def machine(work: Path) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _first("/proc/cpuinfo", "model name"),
        "memory": _first("/proc/meminfo", "MemTotal"),
        "kernel": platform.release(),
        "file_system": _file_system(work),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "load": os.getloadavg(),
    }


def _first(path: str, key: str) -> str:
    """The value of the first line that begins with `key`."""
    try:
        return next(line.split(":", 1)[1].strip() for line in Path(path).read_text().splitlines() if line.startswith(key))
    except (OSError, StopIteration):
        return ""


def _file_system(path: Path) -> str:
    """Type of the file system that holds `path`: the longest mount point above it."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return ""
    above = [(len(point), kind) for point, kind in mounts if path.resolve().is_relative_to(point)]
    return max(above)[1] if above else ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def conversions_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Every case: command, samples, ratios, and the plan's own figures."""
    bases = _bases(results)
    names = ("bytes_read", "bytes_written", "source_bytes", "target_bytes", "read_amplification", "write_amplification", "peak_bytes")
    return [
        {
            "name": r.case.name,
            "command": list(r.case.words),
            "ratios": r.ratios(bases[r.case.direction]),
            "plan": {name: r.plan[name] for name in names if name in r.plan},
            "io_over_plan": r.io(),
            "discarded": [s.to_json() for s in r.samples[:1]],
            "samples": [s.to_json() for s in r.kept],
        }
        for r in results
    ]


def _bases(results: Sequence[Result]) -> dict[str, Result]:
    """The `cp -r` of each direction."""
    return {r.case.direction: r for r in results if r.case.name.endswith("cp -r")}


def show_conversions(console: Console, results: Sequence[Result]) -> None:
    """One line per case: medians, and medians of pairwise ratios."""
    table = Table(title="conversions, medians; ratios to the cp -r of the same round")
    figures = ("wall s", "× cp", "CPU s", "× cp", "sync s", "wall × cp, synced", "CPU × cp, synced", "peak RSS", "anonymous", "io / plan")
    table.add_column("case")
    for head in figures:
        table.add_column(head, justify="right")
    bases = _bases(results)
    for r in results:
        ratios, io = r.ratios(bases[r.case.direction]), r.io()
        table.add_row(
            r.case.name, f"{r.middle('wall_s'):.2f}", f"{ratios['wall']:.2f}", f"{r.middle('cpu_s'):.2f}", f"{ratios['cpu']:.2f}",
            f"{r.middle('sync_s'):.2f}", f"{ratios['wall_synced']:.2f}", f"{ratios['cpu_synced']:.2f}",
            f"{max(s.peak_rss_bytes for s in r.kept) / 2**20:.0f} MiB", f"{max(s.peak_anon_bytes for s in r.kept) / 2**20:.0f} MiB",
            f"{io['read']:.4f} {io['write']:.4f}" if io else "",
        )  # fmt: skip
    console.print(table)


def show_planning(console: Console, planning: dict[str, Any]) -> None:
    """Planning and start-up."""
    table = Table(title="planning, CPU seconds in process")
    for head in ("case", "stored tensors", "open", "plan", "together", "goal", "steps"):
        table.add_column(head, justify="left" if head in ("case", "steps") else "right")
    for case in planning["planning"]:
        steps = ", ".join(f"{name} {seconds:.2f}" for name, seconds in case["steps"].items())
        figures = [f"{case[name]:.2f}" for name in ("open_cpu_s", "plan_cpu_s", "cpu_s", "limit_s")]
        table.add_row(case["name"], f"{case['target_tensors']:,}", *figures, steps)
    console.print(table)
    started = Table(title="starting, CPU seconds of whole processes (goal 0.30)")
    started.add_column("command")
    started.add_column("CPU s", justify="right")
    for process in planning.get("processes", []):
        limit = "" if process["limit_bytes"] is None else f" of {process['limit_bytes'] >> 20} MiB"
        console.print(
            f"{process['name']}: {process['cpu_s']:.2f} s of {process['limit_s']:.0f} s, peak {process['peak_rss_bytes'] >> 20} MiB{limit}"
        )
    for name, seconds in planning["start_up"].items():
        started.add_row(name, f"{seconds:.2f}")
    console.print(started)
