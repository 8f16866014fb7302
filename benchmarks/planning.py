"""Planning, in process after imports: how long from opening headers to a proven plan; and what starting costs.

Each model is made sparse (headers and holes), opened and planned; CPU seconds are the median of the repetitions. A further
run, not counted, times the planner's own steps, which build on one another in the order shown. Peak memory is that of a whole
process that plans the largest model; `inspect` of it stands beside. ``python -m
benchmarks.planning --profile CASE`` prints cProfile's view of one case instead. Start-up is that of whole processes.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from shardwright import api
from shardwright.planner.layout import Layout
from shardwright.planner.passes import build

from .measure import measure
from .model import A_MILLION_TENSORS, DEEPSEEK_V3, LLAMA_70B, MANY_TENSORS, Config, sparse

__all__ = ["CASES", "PlanCase", "processes", "run", "start_up"]

STEPS = {
    "source_rows": "expand source rows",
    "bind": "bind source rows",
    "expand": "expand target rows",
    "targets": "state what is stored",
    "_file": "file it",
    "_lay_out": "lay out containers",
    "place": "place operands",
    "lower": "lower to programs",
    "tile": "cut into tiles",
    "check": "prove",
    "with_identity": "write the identity",
}
"""Functions that `build` calls, and what each does."""


class PlanCase(NamedTuple):
    """A model and a request; `limit_s` is the goal."""

    name: str
    config: Config
    files: int
    limit_s: float
    to: str
    layout: Layout
    options: dict[str, Any]


CASES: tuple[PlanCase, ...] = (
    PlanCase("70B, tp 8 × pp 4 to megatron-legacy", LLAMA_70B, 30, 1.0, "megatron-legacy", Layout(tp=8, pp=4), {}),
    PlanCase("100,002 tensors to huggingface", MANY_TENSORS, 50, 3.0, "huggingface", Layout(), {"max_shard_size": 1_000_000}),
    PlanCase("100,002 tensors to ranks, tp 1", MANY_TENSORS, 50, 3.0, "ranks", Layout(), {}),
    PlanCase("100,002 tensors to ranks, tp 8", MANY_TENSORS, 50, 3.0, "ranks", Layout(tp=8), {}),
    PlanCase("1,000,002 tensors to huggingface", A_MILLION_TENSORS, 100, 15.0, "huggingface", Layout(), {"max_shard_size": 10_000_000}),
    PlanCase(
        "DeepSeek-V3, tp 8 × pp 4 × ep 32 to megatron-legacy", DEEPSEEK_V3, 163, 10.0, "megatron-legacy",
        Layout(tp=8, pp=4, ep=32, stages=(16, 15, 15, 15)), {},
    ),
)  # fmt: skip
"""The last one is also planned, and inspected, in processes of its own."""


def run(work: Path, rounds: int, cases: tuple[PlanCase, ...] = CASES) -> list[dict[str, Any]]:
    """Every case: seconds of opening and planning, and of the steps."""
    found = []
    for case in cases:
        source = _source(work, case)
        samples = [_timed(source, case) for _ in range(rounds + 1)][1:]
        with _steps() as seconds:
            _plan(source, case)
        tensors = len(_plan(source, case).plan.target_tensors)
        middle = {name: median(s[name] for s in samples) for name in samples[0]}
        facts = {"name": case.name, "limit_s": case.limit_s, "target_tensors": tensors}
        found.append({**facts, **middle, "samples": samples, "steps": seconds})
    return found


def _source(work: Path, case: PlanCase) -> Path:
    folder = work / f"sparse-{case.config['num_hidden_layers']}"
    return folder if folder.exists() else sparse(folder, case.config, case.files)


def _plan(source: Path, case: PlanCase) -> api.Conversion:
    return api.plan(api.open(source), None, to=case.to, layout=case.layout, **case.options)


def _timed(source: Path, case: PlanCase) -> dict[str, float]:
    wall, begun = time.perf_counter(), time.process_time()
    checkpoint = api.open(source)
    opened = time.process_time()
    made = api.plan(checkpoint, None, to=case.to, layout=case.layout, **case.options)
    ended = time.process_time()
    del made  # not part of the figure, but of the next one if it were left
    return {"open_cpu_s": opened - begun, "plan_cpu_s": ended - opened, "cpu_s": ended - begun, "wall_s": time.perf_counter() - wall}


@contextmanager
def _steps() -> Iterator[dict[str, float]]:
    """CPU seconds of each of `STEPS`, while the block runs."""
    seconds: dict[str, float] = {}
    kept = {name: getattr(build, name) for name in STEPS if hasattr(build, name)}
    for name, function in kept.items():
        setattr(build, name, _timing(function, STEPS[name], seconds))
    try:
        yield seconds
    finally:
        for name, function in kept.items():
            setattr(build, name, function)


def _timing(function: Callable[..., Any], what: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def timed(*args: Any, **options: Any) -> Any:
        begun = time.process_time()
        try:
            return function(*args, **options)
        finally:
            seconds[what] = seconds.get(what, 0.0) + time.process_time() - begun

    return timed


def processes(work: Path) -> list[dict[str, Any]]:
    """CPU seconds and peak memory of whole processes over the largest model, and the goals."""
    case = CASES[-1]
    source, size = str(_source(work, case)), case.layout
    stages = ",".join(map(str, size.stages or ()))
    words = ["--to", case.to, "--tp", str(size.tp), "--pp", str(size.pp), "--ep", str(size.ep), "--pp-layers", stages, "--json"]
    found = []
    for command, limit_s, limit_bytes in (("plan", case.limit_s, 500 << 20), ("inspect", 2.0, None)):
        sample = measure(
            [str(Path(sys.executable).with_name("shardwright")), command, source, *(words if command == "plan" else ["--json"])]
        )
        facts = {"name": f"shardwright {command}, {case.name}", "limit_s": limit_s, "limit_bytes": limit_bytes}
        found.append({**facts, "cpu_s": sample.cpu_s, "peak_rss_bytes": sample.peak_rss_bytes})
    return found


def start_up(repeat: int = 5) -> dict[str, float]:
    """Median CPU seconds of whole processes that do nothing but start; the interpreter alone beside them."""
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import shardwright": [sys.executable, "-c", "import shardwright"],
        "shardwright --help": [str(Path(sys.executable).with_name("shardwright")), "--help"],
    }
    return {name: median(measure(command).cpu_s for _ in range(repeat)) for name, command in commands.items()}


def main() -> None:
    """``python -m benchmarks.planning [--json] [--profile CASE] [--rounds N] [--work DIR]``."""
    parser = argparse.ArgumentParser(description="Planning and start-up; figures as JSON on standard output.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", metavar="CASE", help="cProfile one case (part of its name) instead")
    parser.add_argument("--work", type=Path, help="where sparse models are made and kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shardwright-bench-") as temporary:
        work = options.work or Path(temporary)
        if options.profile is None:
            json.dump({"planning": run(work, options.rounds), "processes": processes(work), "start_up": start_up()}, sys.stdout)
            return
        case = next(c for c in CASES if options.profile in c.name)
        source = _source(work, case)
        _plan(source, case)
        profile = cProfile.Profile()
        profile.runcall(_plan, source, case)
        pstats.Stats(profile).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    main()
