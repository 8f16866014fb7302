"""``python -m benchmarks [--size 6GB] [--rounds 5] [--json FILE] [--work DIR] [CASE…]``.

CASE is part of a conversion's name, or ``planning``; everything by default.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from shardwright.api import parse_size

from .conversions import CASES, run
from .report import conversions_json, machine, show_conversions, show_planning


def main(words: list[str] | None = None) -> None:
    """Measure, show, and keep the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="shardwright beside cp -r. See benchmarks/README.md.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"part of a name: {', '.join(c.name for c in CASES)}; or planning")
    parser.add_argument("--size", default="6GB", help="of the checkpoint (default 6GB); about three times that much disk is used")
    parser.add_argument("--rounds", type=int, default=5, help="that count; one more runs first and is discarded (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample here")
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder to work in (default: the system's temporary one)")
    options = parser.parse_args(words)
    wanted = [case for case in options.cases if case != "planning"]
    if unknown := [case for case in wanted if not any(case in c.name for c in CASES)]:
        parser.error(f"no case is named {unknown[0]!r}")
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="shardwright-bench-", dir=options.work) as folder:
        found = _measure(Path(folder), options, wanted)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def _measure(work: Path, options: argparse.Namespace, wanted: list[str]) -> dict[str, Any]:
    console = Console(width=None if sys.stdout.isatty() else 200)
    found: dict[str, Any] = {"machine": machine(work), "size": options.size, "rounds": options.rounds}
    console.print(", ".join(f"{k} {v}" for k, v in found["machine"].items()))
    if wanted or not options.cases:
        results = run(work, parse_size(options.size), options.rounds, wanted)
        found["conversions"] = conversions_json(results)
        show_conversions(console, results)
    if "planning" in options.cases or not options.cases:
        # A process of its own: this one stays small, and planning starts from a fresh heap.
        command = [sys.executable, "-m", "benchmarks.planning", "--rounds", str(options.rounds)]
        planning = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=Path(__file__).parents[1]).stdout)
        found.update(planning)
        show_planning(console, planning)
    return found


if __name__ == "__main__":
    main()
