"""Conversions beside `cp -r` of the same bytes, interleaved.

1. A random checkpoint is made (`model`) and split once: that is the merge's source.
2. Every round runs every case once, each on a warm source and an absent target. The order turns around from round to
   round (A B C, C B A, …), so that whatever the machine does beside is shared out.
3. The first round is discarded. Ratios are taken within a round, against the `cp -r` of that round and direction; what is
   reported is the median of the rounds, so a round that was slow for everyone cancels out.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from . import plain
from .measure import Sample, measure, warm
from .model import make

__all__ = ["CASES", "Case", "Result", "run"]

TP = 8


@dataclass(frozen=True, slots=True)
class Case:
    """A way to make a target: `split` starts from the Hugging Face checkpoint, `merge` from the ranks.

    `words` are the command's own, with SOURCE and OUT for the paths. `planned` says that it prints shardwright's summary.
    """

    name: str
    direction: str
    words: tuple[str, ...]
    planned: bool = False


def _shardwright(name: str, direction: str, *options: str) -> Case:
    command = (str(Path(sys.executable).with_name("shardwright")), "convert", "SOURCE", "OUT", "--json", *options)
    return Case(name, direction, command, planned=True)


def _unjournaled(name: str, direction: str, *options: str) -> Case:
    command = (sys.executable, "-m", "benchmarks.unjournaled", "convert", "SOURCE", "OUT", "--json", *options)
    return Case(name, direction, command, planned=True)


_RANKS = ("--to", "ranks", "--tp", str(TP))
_PLAIN = (sys.executable, plain.__file__)
_SMALL = ("--memory", "128MiB")

CASES: tuple[Case, ...] = (
    Case("split: cp -r", "split", ("cp", "-r", "SOURCE", "OUT")),
    _shardwright("split: shardwright", "split", *_RANKS),
    _unjournaled("split: shardwright, no journal", "split", *_RANKS),
    _shardwright("split: shardwright 128MiB", "split", *_RANKS, *_SMALL),
    _shardwright("split: shardwright megatron-legacy", "split", "--to", "megatron-legacy", "--tp", str(TP)),
    Case("split: get_slice + save_file", "split", (*_PLAIN, "split", "SOURCE", "OUT", str(TP))),
    Case("merge: cp -r", "merge", ("cp", "-r", "SOURCE", "OUT")),
    _shardwright("merge: shardwright", "merge", "--to", "huggingface"),
    _unjournaled("merge: shardwright, no journal", "merge", "--to", "huggingface"),
    _shardwright("merge: shardwright 128MiB", "merge", "--to", "huggingface", *_SMALL),
    Case("merge: cat + save_file", "merge", (*_PLAIN, "merge", "SOURCE", "OUT")),
)
"""The first case of a direction is what the others are compared with."""


@dataclass(slots=True)
class Result:
    """A case's samples, round by round, the discarded first one included, and the last plan's summary."""

    case: Case
    samples: list[Sample] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> list[Sample]:
        """Without the first round."""
        return self.samples[1:] or self.samples

    def middle(self, name: str) -> float:
        """Median of one figure."""
        return median(getattr(sample, name) for sample in self.kept)

    def ratios(self, base: Result) -> dict[str, float]:
        """Medians of the pairwise ratios to `base`: wall and CPU, as they are and with both sides synced."""
        pairs = list(zip(self.kept, base.kept, strict=True))
        return {
            "wall": median(a.wall_s / b.wall_s for a, b in pairs),
            "cpu": median(a.cpu_s / b.cpu_s for a, b in pairs),
            "wall_synced": median((a.wall_s + a.sync_s) / (b.wall_s + b.sync_s) for a, b in pairs),
            "cpu_synced": median((a.cpu_s + a.sync_cpu_s) / (b.cpu_s + b.sync_cpu_s) for a, b in pairs),
        }

    def io(self) -> dict[str, float]:
        """Bytes by /proc over bytes by the plan."""
        if not self.plan:
            return {}
        return {
            "read": self.middle("bytes_read") / self.plan["bytes_read"],
            "write": self.middle("bytes_written") / self.plan["bytes_written"],
        }


def run(work: Path, nbytes: int, rounds: int, wanted: Sequence[str] = ()) -> list[Result]:
    """All wanted cases (all by default), `rounds` times and one more; `cp -r` is always among them.

    Parameters
    ----------
    work
        An empty folder with room for about three checkpoints.
    wanted
        Parts of case names.
    """
    chosen = [c for c in CASES if not wanted or any(w in c.name for w in wanted)]
    chosen = [c for c in CASES if c in chosen or (c.name.endswith("cp -r") and any(d.direction == c.direction for d in chosen))]
    sources = {"split": make(work / "source", nbytes), "merge": work / "ranks"}
    if any(case.direction == "merge" for case in chosen):
        _once(next(c for c in CASES if c.name == "split: shardwright"), sources["split"], sources["merge"])
    results = [Result(case) for case in chosen]
    for number in range(rounds + 1):
        for result in results if number % 2 == 0 else reversed(results):
            source, out = sources[result.case.direction], work / "out"
            warm(source)
            sample = _once(result.case, source, out)
            shutil.rmtree(out)
            result.samples.append(sample)
            if result.case.planned:
                result.plan = json.loads(sample.stdout)
            print(f"round {number} {result.case.name}: {sample.wall_s:.2f} s, CPU {sample.cpu_s:.2f} s", file=sys.stderr, flush=True)
    return results


def _once(case: Case, source: Path, out: Path) -> Sample:
    return measure([{"SOURCE": str(source), "OUT": str(out)}.get(word, word) for word in case.words], target=out)
