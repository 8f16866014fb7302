"""The plan as one static HTML page.

1. `figures` are the fields of ``plan --json``: what the cost says and what the plan says, nothing computed here.
2. `data` adds what the page draws: files, ranks and tensors as columns, programs once with the passages of each target
   operand spelled out, bindings as columns of tensor numbers. A click on a tensor is answered in the page from these.
3. `render` puts the data (as JSON, ``<`` escaped), the style and the script into one document that asks for nothing else:
   its content policy forbids every request, and names, which are untrusted, only ever become text.

Boundary: text out; `write` alone touches a file.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterable, Sequence
from importlib.resources import files
from math import prod
from typing import Any

from ...errors import UsageError
from ..cost import figures
from ..plan import Bindings, Cost, Plan, Program, TensorEntry
from ..relations import Places, operands_of, output_of, passages, region_in_words
from ..tensor.dtypes import dtype as dtype_of

__all__ = ["data", "render", "write"]

_SHOWN = 12
"""Passages of one target operand that the page carries."""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<noscript>This page draws itself with JavaScript; the figures are in its JSON.</noscript>
<script type="application/json" id="plan">{data}</script>
<script>
{script}</script>
</body>
</html>
"""


def render(plan: Plan, cost: Cost) -> str:
    """The page."""
    words = (plan.summary.get("source_format"), plan.summary.get("target_format"))
    folder = files(__name__)
    return _PAGE.format(
        title=html.escape(f"Plan: {words[0]} → {words[1]}"),
        style=folder.joinpath("page.css").read_text(encoding="utf-8"),
        # Inside a script element only `<` can end it or open a comment.
        data=json.dumps(data(plan, cost), separators=(",", ":")).replace("<", "\\u003c"),
        script=folder.joinpath("page.js").read_text(encoding="utf-8"),
    )


def write(plan: Plan, cost: Cost, file: str | os.PathLike[str]) -> None:
    """Write the page to `file`.

    Raises
    ------
    UsageError
        The file cannot be written.
    """
    page = render(plan, cost)
    try:
        with open(file, "w", encoding="utf-8") as out:
            out.write(page)
    except OSError as error:
        raise UsageError("the report cannot be written", file=file, actual=error.strerror) from None


def data(plan: Plan, cost: Cost) -> dict[str, Any]:
    """Everything that the page draws, as plain values."""
    names: dict[str, int] = {}
    kinds: dict[tuple[str, tuple[int, ...]], int] = {}
    sources, targets = (_tensors(side, names, kinds) for side in (plan.source_tensors, plan.target_tensors))
    places = Places.of(plan)
    return {
        "cost": figures(plan, cost),
        "source_files": _files((f.path, f.nbytes) for f in plan.source_files),
        "target_files": _files((f.path, f.nbytes) for f in plan.target_files),
        "ranks": _ranks(plan),
        "sources": sources,
        "targets": targets,
        "programs": [_program(places, n) for n in range(len(plan.programs))],
        "bindings": [_bindings(places, b, names) for b in plan.bindings],
        "kinds": [[dtype, list(shape), dtype_of(dtype).nbytes(prod(shape))] for dtype, shape in kinds],
        "names": list(names),
    }


def _files(found: Iterable[tuple[str, int]]) -> dict[str, list[Any]]:
    rows = list(found)
    return {"path": [path for path, _ in rows], "bytes": [nbytes for _, nbytes in rows]}


def _ranks(plan: Plan) -> dict[str, list[int]]:
    """Stored tensors and their bytes on each rank."""
    held: dict[int, list[int]] = {}
    for t in plan.target_tensors:
        row = held.setdefault(t.rank, [0, 0])
        row[0] += 1
        row[1] += dtype_of(t.dtype).nbytes(prod(t.shape))
    order = sorted(held)
    return {"rank": order, "tensors": [held[r][0] for r in order], "bytes": [held[r][1] for r in order]}


def _tensors(tensors: Sequence[TensorEntry], names: dict[str, int], kinds: dict[tuple[str, tuple[int, ...]], int]) -> dict[str, list[int]]:
    return {
        "name": [names.setdefault(t.name, len(names)) for t in tensors],
        "rank": [t.rank for t in tensors],
        "kind": [kinds.setdefault((t.dtype, t.shape), len(kinds)) for t in tensors],
        "file": [t.file for t in tensors],
        "offset": [t.offset for t in tensors],
    }


def _program(places: Places, number: int) -> dict[str, Any]:
    """A program in words; passages are those of its first row, and alike in all others."""
    plan, program = places.plan, places.plan.programs[number]
    bound = plan.bindings[number]
    rows = len(bound.names)
    held = [places.source(number, 0, operand) if rows else None for operand in range(bound.source_file.shape[1])]
    entries = [None if i is None else plan.source_tensors[i] for i in held]
    shapes = [e.shape if e is not None and e.contiguous else None for e in entries]
    made = []
    for operand in range(bound.target_file.shape[1]):
        target = places.target(number, 0, operand) if rows else None
        made.append(None if target is None else _made(program, operand, plan.target_tensors[target], shapes))
    return {
        "label": program.label,
        "dtype": program.dtype,
        "shape": list(program.shape),
        "op": None if program.op is None else program.op.name,
        "sources": operands_of(program),
        "replicas": [sorted({p.slot for p in replica}) for replica in program.replicas],
        "padding": len(program.padding),
        "made": made,
    }


def _made(program: Program, operand: int, target: TensorEntry, shapes: Sequence[tuple[int, ...] | None]) -> dict[str, Any]:
    found = passages(program, operand, target.shape, shapes)
    output = output_of(program, operand)
    zeros = [p for p in output.zeros if p.slot == operand] if output else []
    return {
        "from": list(dict.fromkeys(p.operand for p in found)),
        "passages": [[p.target, p.operand, p.source] for p in found[:_SHOWN]],
        "more": max(0, len(found) - _SHOWN),
        "zeros": region_in_words(zeros, target.shape) if zeros else None,
    }


def _bindings(places: Places, bound: Bindings, names: dict[str, int]) -> dict[str, Any]:
    """Names of the pivots, and per operand the number of the tensor bound to it in each row (-1 for none)."""
    sides = ((bound.source_file, bound.source_offset, places.sources), (bound.target_file, bound.target_offset, places.targets))
    columns = [
        [[known.get(place, -1) for place in zip(f, o, strict=True)] for f, o in zip(file.T.tolist(), offset.T.tolist(), strict=True)]
        for file, offset, known in sides
    ]
    return {"names": [names.setdefault(n, len(names)) for n in bound.names], "sources": columns[0], "targets": columns[1]}
