"""How much of each parser its inputs reach, counted with `coverage`.

1. ``python -m coverage run -m tests.fuzz replay`` parses kept inputs in a fresh process: lines that run on import are
   counted under no context, and what a target's inputs run is counted under the target's name.
2. A line of a target's modules counts as reached in either. Lines of its `elsewhere` do not count at all, but for one
   thing: an input that reaches them shows that they belong to the parser after all.
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import coverage

from .harness import Target

__all__ = ["Reach", "measure"]

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Reach:
    """Of one target: lines that count, and by ``file:line`` those that no input reached and those reached in `elsewhere`."""

    lines: int
    missed: tuple[str, ...]
    strayed: tuple[str, ...]

    @property
    def share(self) -> float:
        return 1 - len(self.missed) / self.lines


def measure(targets: Mapping[str, Target], folders: Sequence[Path] = ()) -> dict[str, Reach]:
    """Replay the corpus, and the inputs under ``<folder>/<target>/`` of each of `folders`, and count lines."""
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "coverage"
        more = [part for folder in folders for part in ("--more", str(folder))]
        command = [
            sys.executable,
            "-m",
            "coverage",
            "run",
            f"--data-file={data}",
            "-m",
            "tests.fuzz",
            "replay",
            *targets,
            "--runs",
            "0",
            *more,
        ]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        found = coverage.Coverage(data_file=str(data))
        found.load()
        return {name: _reach(target, found) for name, target in targets.items()}


def _reach(target: Target, found: coverage.Coverage) -> Reach:
    lines, missed, strayed = 0, [], []
    for module in target.modules:
        file = importlib.import_module(module).__file__ or ""
        _, statements, _, _, _ = found.analysis2(file)
        contexts = found.get_data().contexts_by_lineno(file)
        inputs = {line for line, names in contexts.items() if target.name in names}
        reached = inputs | {line for line, names in contexts.items() if "" in names}
        beside = _lines_of(Path(file), [name for where, _, name in (one.partition(":") for one in target.elsewhere) if where == module])
        counted = [line for line in statements if line not in beside]
        lines += len(counted)
        short = module.removeprefix("shardwright.")
        missed += [f"{short}:{line}" for line in counted if line not in reached]
        strayed += [f"{short}:{line}" for line in sorted(inputs & beside)]
    return Reach(lines, tuple(missed), tuple(strayed))


def _lines_of(file: Path, names: Sequence[str]) -> set[int]:
    """The lines of the bodies of the functions and classes called `names`; every name must exist."""
    found: dict[str, set[int]] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                found[prefix + child.name] = set(range(child.lineno, (child.end_lineno or child.lineno) + 1))
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(file.read_text()), "")
    if unknown := set(names) - set(found):
        raise ValueError(f"{file} has no {', '.join(sorted(unknown))}")
    return set().union(*(found[name] for name in names)) if names else set()
