"""The harness by hand, and the process in which tests run it: `python -m tests.fuzz --help`.

Every command loads all targets first, parses their seeds once without a guard (what they need lazily is then there), and
caps its own memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from shardwright.errors import ShardwrightError

from .evolve import evolve, minimise
from .guard import limit_memory
from .harness import CORPUS, FailedInputError, Statistics, Target, attempt, corpus, fresh, keep, load_targets, remember_in, run
from .reach import measure


def main() -> int:
    given = _arguments()
    known = load_targets()
    if given.last is not None:
        remember_in(given.last)
    targets = {name: known[name] for name in given.targets or known}
    return given.command(given, targets)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzzes shardwright's parsers.")
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Callable[..., int], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(command=run)
        made.add_argument("--last", type=Path, help="a file that holds each input while it is parsed")
        made.add_argument("targets", nargs="*", metavar="TARGET", help="targets by name; all by default")
        return made

    repeat = command("repeat", _repeat, "Parse one input and show what becomes of it.")
    repeat.add_argument("--input", type=Path, required=True)
    replay = command("replay", _replay, "Parse the corpus, then fresh mutations; print what became of them as JSON.")
    replay.add_argument("--runs", type=int, default=1000, help="mutations of each target")
    replay.add_argument("--seed", type=int, default=0)
    replay.add_argument("--more", type=Path, action="append", default=[], help="a folder of inputs, one folder in it per target")
    grow = command("evolve", _evolve, "Fuzz guided by coverage; print what became of the inputs as JSON.")
    grow.add_argument("--runs", type=int, default=10_000, help="mutations of each target")
    grow.add_argument("--seed", type=int, default=0)
    grow.add_argument("--into", type=Path, help="where inputs that reached something new go, one folder per target")
    shrink = command("minimise", _minimise, "Make the corpus anew from itself and more inputs.")
    shrink.add_argument("--more", type=Path, action="append", default=[])
    command("reach", _reach, "Count the lines of each parser that its inputs reach.").add_argument(
        "--more", type=Path, action="append", default=[]
    )
    return parser.parse_args()


def _repeat(given: argparse.Namespace, targets: dict[str, Target]) -> int:
    data = given.input.read_bytes()
    for target in targets.values():
        limit_memory()
        print(repr(attempt(target, data)))
    return 0


def _replay(given: argparse.Namespace, targets: dict[str, Target]) -> int:
    if given.runs:
        _warm_up(targets)  # the seeds' writers must not run otherwise: their lines would count as reached by parsing

    def inputs(target: Target) -> Statistics:
        run(target, corpus(target) + _more(given, target), measured=1)
        return run(target, fresh(target, given.runs, given.seed) if given.runs else ())

    return _each(targets, inputs)


def _evolve(given: argparse.Namespace, targets: dict[str, Target]) -> int:
    _warm_up(targets)

    def inputs(target: Target) -> Statistics:
        return evolve(target, given.runs, given.seed, None if given.into is None else given.into / target.name)

    return _each(targets, inputs)


def _each(targets: dict[str, Target], inputs: Callable[[Target], Statistics]) -> int:
    """Run every target, whatever becomes of the others, and print one JSON object."""
    limit_memory()
    report: dict[str, object] = {}
    failed = False
    for name, target in targets.items():
        _context(name)
        started = time.perf_counter()
        try:
            report[name] = {**inputs(target).report(), "seconds": time.perf_counter() - started}
        except FailedInputError as error:
            report[name] = {"failure": str(error)}
            failed = True
    print(json.dumps(report, indent=1))
    return int(failed)


def _context(name: str) -> None:
    """Under `coverage run`, what follows is counted for that target."""
    if "coverage" in sys.modules:
        import coverage

        if (current := coverage.Coverage.current()) is not None:
            current.switch_context(name)


def _minimise(given: argparse.Namespace, targets: dict[str, Target]) -> int:
    _warm_up(targets)
    for target in targets.values():
        inputs = corpus(target) + _more(given, target)
        kept = minimise(target, inputs)
        for file in (CORPUS / target.name).glob("*"):
            if not file.name.startswith("crash-"):  # what once failed stays
                file.unlink()
        for data in kept:
            keep(target, data)
        print(f"{target.name}: {len(kept)} of {len(inputs)} inputs, {sum(map(len, kept))} bytes")
    return 0


def _reach(given: argparse.Namespace, targets: dict[str, Target]) -> int:
    for name, reach in measure(targets, given.more).items():
        print(f"{name}: {reach.share:.1%} of {reach.lines} lines", *reach.missed, *(f"(elsewhere) {line}" for line in reach.strayed))
    return 0


def _more(given: argparse.Namespace, target: Target) -> list[bytes]:
    return [file.read_bytes() for folder in given.more for file in sorted((folder / target.name).glob("*"))]


def _warm_up(targets: dict[str, Target]) -> None:
    """Make and parse all seeds, so that whatever is loaded lazily is there before the guards are up."""
    for target in targets.values():
        for data in target.seeds():
            try:
                target.parse(data)
            except ShardwrightError as error:
                raise AssertionError(f"{target.name} refuses a seed of its own") from error


if __name__ == "__main__":
    sys.exit(main())
