"""Small hand-made plans: a pivot, source files and target files from lazy tensors and numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np

from shardwright.planner.passes.memory import Fit, slab, whole_items
from shardwright.planner.plan import Bindings, Output, Plan, Program, SourceFile, TargetFile, TensorEntry, Tiles
from shardwright.planner.tensor.lazy import concat, leaf


def fit_of(plan: Plan, strip_bytes: int, workers: int) -> Fit:
    """A fit that no memory bound chose: strips of any size."""
    largest = whole_items(plan.programs, plan.tiles)
    nbytes = max(slab(p, strip_bytes, largest.get(i)).nbytes for i, p in enumerate(plan.programs))
    return Fit(workers, strip_bytes, nbytes, 0, workers * nbytes)


@dataclass
class Maker:
    """Collects files, programs and items; `plan` puts them together."""

    root: Path
    sources: list[SourceFile] = field(default_factory=list)
    targets: list[TargetFile] = field(default_factory=list)
    programs: list[Program] = field(default_factory=list)
    bindings: list[Bindings] = field(default_factory=list)
    items: list[tuple[int, int, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    tile_of_item: list[int] = field(default_factory=list)
    entries: list[TensorEntry] = field(default_factory=list)

    def source(self, name: str, data: bytes) -> int:
        """Write a source file; its number."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        found = path.stat()
        self.sources.append(SourceFile(name, found.st_size, found.st_mtime_ns, ""))
        return len(self.sources) - 1

    def target(self, name: str, nbytes: int, **more: object) -> int:
        """Declare a target file; its number."""
        self.targets.append(TargetFile(name, nbytes, **more))  # type: ignore[arg-type]
        return len(self.targets) - 1

    def entry(self, name: str, kind: str, shape: tuple[int, ...], file: int, offset: int) -> None:
        self.entries.append(TensorEntry(name, 0, kind, shape, file, offset))

    def program(self, program: Program, rows: Sequence[tuple[Sequence[tuple[int, int]], Sequence[tuple[int, int]]]]) -> int:
        """A program with the places ``(file, offset)`` of each row's source and target operands; its number."""
        columns = [np.array([[place[k] for place in row[side]] for row in rows], np.int64) for side in (0, 1) for k in (0, 1)]
        self.programs.append(program)
        self.bindings.append(Bindings(tuple(f"{program.label}.{i}" for i in range(len(rows))), *columns))
        return len(self.programs) - 1

    def tiles(self, number: int, row: int, *, step: int | None = None) -> None:
        """Cut one pivot tensor into tiles of `step` rows of its cut axis."""
        program = self.programs[number]
        extent = program.shape[program.cut[0]] if program.cut else 1
        for at in range(0, extent, step or extent):
            tile = self.tile_of_item[-1] + 1 if self.tile_of_item else 0
            self.tile_of_item.append(tile)
            lo, hi = (at, 0), (min(extent, at + (step or extent)), 0)
            self.items.append((number, row, lo, hi) if program.cut else (number, row, (0, 0), (0, 0)))

    def plan(self) -> Plan:
        count = self.tile_of_item[-1] + 1 if self.tile_of_item else 0
        first = np.searchsorted(np.array(self.tile_of_item, np.int64), np.arange(count + 1))
        lo = np.array([i[2] for i in self.items], np.int64).reshape(-1, 2)
        hi = np.array([i[3] for i in self.items], np.int64).reshape(-1, 2)
        zero = np.zeros(count, np.int64)
        program = np.array([i[0] for i in self.items], np.int64)
        row = np.array([i[1] for i in self.items], np.int64)
        tiles = Tiles(first, program, row, lo, hi, zero, zero, zero)
        files = (tuple(self.sources), tuple(self.targets))
        return Plan({}, str(self.root), {}, *files, (), tuple(self.programs), tuple(self.bindings), tiles, (), tuple(self.entries))


def copy_program(label: str, kind: str, shape: tuple[int, ...], gather: tuple, scatter: tuple, **more: object) -> Program:
    """A program without an op."""
    fields = {"replicas": (), "padding": (), "op": None, "cut": (0,) if shape else (), "whole": False, "zeros": ()} | more
    zeros = fields.pop("zeros")
    outputs = fields.pop("outputs", (Output(kind, shape, (1,) * len(shape), scatter, zeros),))  # type: ignore[arg-type]
    return Program(label, kind, shape, gather, outputs=outputs, **fields)  # type: ignore[arg-type]


def split_plan(
    root: Path, *, parts: int = 2, rows: int = 16, width: int = 8, layers: int = 2, axis: int = 0, step: int | None = None
) -> tuple[Plan, list[np.ndarray]]:
    """`layers` matrices in one file, each cut along `axis` into one file per part."""
    shape = (rows, width)
    part = (rows // parts, width) if axis == 0 else (rows, width // parts)
    arrays = [np.random.default_rng(n).integers(0, 1 << 16, shape, np.uint16) for n in range(layers)]
    maker = Maker(root)
    source = maker.source("model.bin", b"head" + b"".join(a.tobytes() for a in arrays))
    nbytes = prod(part) * 2
    files = [maker.target(f"rank{p}.bin", 8 + layers * nbytes, static=((0, b"%08d" % p),)) for p in range(parts)]
    scatter = concat([leaf(i, part) for i in range(parts)], axis).pieces
    program = copy_program("w", "bfloat16", shape, leaf(0, shape).pieces, scatter)
    places = [([(source, 4 + n * prod(shape) * 2)], [(f, 8 + n * nbytes) for f in files]) for n in range(layers)]
    number = maker.program(program, places)
    for n in range(layers):
        maker.tiles(number, n, step=step)
        for f in files:
            maker.entry(f"w.{n}", "bfloat16", part, f, 8 + n * nbytes)
    return maker.plan(), arrays
