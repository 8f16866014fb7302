"""What one tensor is made of, or where it goes, in words.

1. The name is looked up among target tensors, hub tensors and source tensors, in that order; ``name@3`` is rank 3's only.
2. A target tensor is told range by range: which part comes from which part of which source tensor, first passages first;
   then padding zeros, the value op, the copies that are compared, and the tiles that write it.
3. A hub tensor is told by what it is read from and stored as; a source tensor by what becomes of it.

Boundary: text about a plan; every number is the plan's.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from math import prod

import numpy as np

from ..errors import UsageError
from .plan import Plan, Program, TensorEntry
from .relations import MOST_PASSAGES, Passage, Places, Use, operands_of, output_of, passages, region_in_words, sources_of
from .tensor.dtypes import dtype as dtype_of
from .tensor.pieces import align, select

__all__ = ["explain"]

_SHOWN = 8
"""Passages, operands and tensors listed before "… n more"."""


def explain(plan: Plan, name: str) -> str:
    """What is made of what, for the tensor of that name.

    Parameters
    ----------
    name
        A target's stored name, a hub name or a source's stored name; with ``@rank`` only that rank's.

    Raises
    ------
    UsageError
        No such tensor; lists the nearest names.
    """
    places = Places.of(plan)
    spellings: list[tuple[str, int | None]] = [(name, None), *_with_rank(name)]
    # Megatron's files keep a dialect's names under the key "model".
    spellings += [(f"model.{plain}", rank) for plain, rank in spellings]
    for plain, rank in spellings:
        targets = [t for t in plan.target_tensors if t.name == plain and rank in (None, t.rank)]
        if targets:
            return "\n\n".join("\n".join(_target(places, t)) for t in targets)
        rows = (
            [(n, row) for n, b in enumerate(plan.bindings) for row, hub in enumerate(b.names) if plain in hub.split("+")]
            if rank is None
            else []
        )
        if rows:
            return "\n\n".join("\n".join(_hub(places, plain, number, row)) for number, row in rows)
        sources = [t for t in plan.source_tensors if t.name == plain and rank in (None, t.rank)]
        if sources:
            return "\n\n".join("\n".join(_source(places, t)) for t in sources)
    raise _unknown(plan, name)


def _with_rank(name: str) -> list[tuple[str, int]]:
    plain, _, rank = name.rpartition("@")
    return [(plain, int(rank))] if plain and rank.isdecimal() and len(rank) < 10 else []


def _unknown(plan: Plan, name: str) -> UsageError:
    known = dict.fromkeys(t.name for t in (*plan.target_tensors, *plan.source_tensors))
    known |= dict.fromkeys(part for bound in plan.bindings for hub in bound.names for part in hub.split("+"))
    plain = next((p for p, _ in _with_rank(name)), name)
    if plain in known:
        ranks = sorted({t.rank for t in (*plan.target_tensors, *plan.source_tensors) if t.name == plain})
        return UsageError("that rank does not hold the tensor", tensor=plain, remedy=f"Ranks that do: {', '.join(map(str, ranks[:20]))}")
    near = difflib.get_close_matches(name, list(known)[:20_000], n=3, cutoff=0.3)
    return UsageError("no tensor of the plan has this name", tensor=name, remedy=f"Nearest: {', '.join(near)}" if near else None)


def _target(places: Places, tensor: TensorEntry) -> Iterator[str]:
    plan = places.plan
    yield f"{tensor.name} @ rank {tensor.rank}"
    yield f"  {_kind(tensor)}, stored in {plan.target_files[tensor.file].path} @ {tensor.offset:,}"
    if not prod(tensor.shape):
        yield "  it has no elements"
    for use in places.writers(tensor):
        program = plan.programs[use.program]
        yield from _made_of(places, use, tensor)
        yield from _op(program, use.operand)
        yield from _replicas(places, use.program, use.row)
        yield from _tiles(plan, use)


def _made_of(places: Places, use: Use, tensor: TensorEntry) -> Iterator[str]:
    plan, program = places.plan, places.plan.programs[use.program]
    held = [_bound(places, use, operand) for operand in range(plan.bindings[use.program].source_file.shape[1])]
    shapes = [t.shape if t is not None and t.contiguous else None for t in held]
    found = passages(program, use.operand, tensor.shape, shapes)
    yield f"  through {plan.bindings[use.program].names[use.row]} {program.dtype} {list(program.shape)}:"
    yield from _more((_passage(plan, p, held[p.operand], program) for p in found[:_SHOWN]), len(found), len(found) >= MOST_PASSAGES)
    output = output_of(program, use.operand)
    zeros = [p for p in output.zeros if p.slot == use.operand] if output else []
    if zeros:
        yield f"    {region_in_words(zeros, tensor.shape)} ← zeros (padding)"


def _bound(places: Places, use: Use, operand: int) -> TensorEntry | None:
    number = places.source(use.program, use.row, operand)
    return None if number is None else places.plan.source_tensors[number]


def _passage(plan: Plan, passage: Passage, source: TensorEntry | None, program: Program) -> str:
    if source is None:
        return f"{passage.target} ← {passage.source}"
    at = source.offset + passage.first * dtype_of(program.dtype).itemsize
    return f"{passage.target} ← {source.name} {passage.source} ({plan.source_files[source.file].path} @ {at:,})"


def _more(lines: Iterable[str], total: int, clipped: bool = False) -> Iterator[str]:
    shown = 0
    for line in lines:
        shown += 1
        yield f"    {line}"
    if total > shown:
        yield f"    … {total - shown:,} more{' or beyond' if clipped else ''}"


def _op(program: Program, operand: int) -> Iterator[str]:
    output = output_of(program, operand)
    if program.op is not None and output is not None:
        part = f", output {program.outputs.index(output) + 1} of {len(program.outputs)}" if len(program.outputs) > 1 else ""
        yield f"  value op: {program.op.name} {program.dtype} → {output.dtype}{part}"


def _replicas(places: Places, number: int, row: int) -> Iterator[str]:
    program = places.plan.programs[number]
    what = "averaged" if program.average else "compared"
    for index, replica in enumerate(program.replicas):
        kind = program.replica_dtype(index)
        rounded = "" if kind == program.dtype else f" as {kind}"
        yield f"  {what}{rounded} with a copy in {_names(places, number, row, sorted({p.slot for p in replica}))}"


def _names(places: Places, number: int, row: int, operands: Sequence[int]) -> str:
    plan, words = places.plan, []
    for operand in operands[:_SHOWN]:
        found = places.source(number, row, operand)
        if found is not None:
            t = plan.source_tensors[found]
            words.append(f"{t.name} @ rank {t.rank} ({plan.source_files[t.file].path} @ {t.offset:,})")
    more = f", … {len(operands) - _SHOWN} more" if len(operands) > _SHOWN else ""
    return ", ".join(words) + more


def _tiles(plan: Plan, use: Use) -> Iterator[str]:
    """The tiles whose items scatter into the operand."""
    program, tiles = plan.programs[use.program], plan.tiles
    output = output_of(program, use.operand)
    if output is None:
        return
    boxes = [box for p in output.scatter if p.slot == use.operand for box in align(p, output.shape)]
    items = np.flatnonzero((tiles.program == use.program) & (tiles.row == use.row))
    found = []
    for item in items.tolist():
        parts = boxes
        for column, axis in enumerate(program.cut):
            lo, hi, ratio = int(tiles.lo[item, column]), int(tiles.hi[item, column]), output.ratio[axis]
            parts = [part for box in parts for part in select(box, axis, lo // ratio, -(-hi // ratio))]
        if parts:
            found.append(int(np.searchsorted(tiles.first, item, side="right")) - 1)
    yield f"  written by tile{'s' if len(set(found)) != 1 else ''} {_numbers(sorted(set(found)))} of {len(tiles):,}"


def _numbers(values: Sequence[int]) -> str:
    """Whole numbers, runs joined.

    >>> _numbers([1, 2, 3, 7])
    '1…3, 7'
    """
    cuts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(values)) if b != a + 1), len(values)]
    runs = [values[a:b] for a, b in pairwise(cuts) if a < b]
    words = [str(r[0]) if len(r) == 1 else f"{r[0]}…{r[-1]}" for r in runs[:_SHOWN]]
    return ", ".join(words) + (f", … {len(runs) - _SHOWN} more" if len(runs) > _SHOWN else "")


def _hub(places: Places, name: str, number: int, row: int) -> Iterator[str]:
    plan, program = places.plan, places.plan.programs[number]
    joined = plan.bindings[number].names[row]
    yield f"{name} (hub)"
    yield f"  {program.dtype} {list(program.shape)}" + ("" if joined == name else f", moved as one with its neighbours: {joined}")
    yield f"  read from {_names(places, number, row, operands_of(program))}"
    yield from _replicas(places, number, row)
    if rows := len(program.padding) - len(program.blank):
        yield f"  padding rows of the source that are checked and not copied: {rows} regions"
    if program.blank:
        yield f"  padding that must be zero: {_names(places, number, row, program.blank)}"
    if program.op is not None:
        yield f"  value op: {program.op.name}"
    held = [(operand, places.target(number, row, operand)) for operand in range(plan.bindings[number].target_file.shape[1])]
    stored = [plan.target_tensors[i] for _, i in held if i is not None]
    yield "  stored as:"
    lines = (f"{t.name} @ rank {t.rank}, {_kind(t)} ({plan.target_files[t.file].path} @ {t.offset:,})" for t in stored[:_SHOWN])
    yield from _more(lines, len(stored))


def _source(places: Places, tensor: TensorEntry) -> Iterator[str]:
    plan = places.plan
    yield f"{tensor.name} (source, rank {tensor.rank})"
    yield f"  {_kind(tensor)}, in {plan.source_files[tensor.file].path} @ {tensor.offset:,}"
    for use in places.readers(tensor):
        program, bound = plan.programs[use.program], plan.bindings[use.program]
        if use.operand not in operands_of(program):
            yield f"  a copy of {bound.names[use.row]}: {'averaged with it' if program.average else 'compared'}, not stored again"
            continue
        stored = []
        for operand in range(bound.target_file.shape[1]):
            number = places.target(use.program, use.row, operand)
            if number is not None and use.operand in sources_of(program, operand):
                stored.append(plan.target_tensors[number])
        yield f"  through {bound.names[use.row]}, part of:"
        lines = (f"{t.name} @ rank {t.rank}, {_kind(t)} ({plan.target_files[t.file].path} @ {t.offset:,})" for t in stored[:_SHOWN])
        yield from _more(lines, len(stored))


def _kind(tensor: TensorEntry) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}, {dtype_of(tensor.dtype).nbytes(prod(tensor.shape)):,} bytes"
