"""A plan as JSON and back: programs once, everything of which there are many as columns.

Writing:

1. Strings go to one table (`names`), distinct (dtype, shape) pairs to another (`kinds`); tensors, bindings and tiles
   are columns of whole numbers, each plain or as differences, whichever is shorter.
2. Static bytes of all target files are one blob, base64, compressed when large.
3. The plan-format number and the plan hash stand beside them, and the two roots.

Reading trusts nothing: a saved plan may have been edited, cut short or made to harm.

1. Every field is read with its type, range and length checked (`_saved`, `_strict`); unknown keys are refused.
2. `coherent` checks what the parts say of each other: indices, paths, reads inside files, cost of proving the plan.
3. The plan hash is computed again and compared, and `check` proves the plan.

Whatever is wrong is a `PlanError` that names the field. That the *source* is still the one that was planned is not
decided here: its fingerprints are in the plan and executors compare them. Boundary: one file is read or written, the
plan's own.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import PlanError
from ._saved import SEAL_KINDS, TENSOR_COLUMNS, TILE_COLUMNS, SavedPlan, read
from .containers._untrusted import STRICT
from .fingerprint import plan_hash
from .passes.check import check
from .plan import PLAN_FORMAT, Bindings, Plan, Program, TargetFile, TensorEntry, Tiles
from .tensor.pieces import Piece

__all__ = ["SavedPlan", "dumps", "from_json", "load", "save", "to_json"]

_LARGEST_FILE = 1 << 30
_COMPRESS_FROM = 4096


def to_json(plan: Plan, *, target_root: str | None) -> dict[str, Any]:
    """The plan as plain JSON values; roots are made absolute."""
    tables = _Tables({}, {})
    made: dict[str, Any] = {
        "plan_format": PLAN_FORMAT,
        "plan_hash": plan_hash(plan),
        "recipe": plan.recipe,
        "source_root": os.path.abspath(plan.source_root),
        "target_root": None if target_root is None else os.path.abspath(target_root),
        "summary": plan.summary,
        "source_files": {
            "path": [f.path for f in plan.source_files],
            "nbytes": [f.nbytes for f in plan.source_files],
            "mtime_ns": _column(f.mtime_ns for f in plan.source_files),
            "header_digest": [f.header_digest for f in plan.source_files],
        },
        "target_files": _target_files(plan.target_files),
        "copies": [list(pair) for pair in plan.copies],
        "copied_bytes": plan.copied_bytes,
        "programs": [_program(p) for p in plan.programs],
        "bindings": [_bindings(b, tables) for b in plan.bindings],
        "tiles": _tiles(plan.tiles),
        "source_tensors": _tensors(plan.source_tensors, tables),
        "target_tensors": _tensors(plan.target_tensors, tables),
        "dropped": [[d.name, d.reason] for d in plan.dropped],
        "warnings": list(plan.warnings),
    }
    made["names"] = list(tables.names)
    made["kinds"] = [[dtype, list(shape)] for dtype, shape in tables.kinds]
    return made


def from_json(value: object) -> Plan:
    """The plan of `to_json`, proven.

    Raises
    ------
    PlanError
        Names the field and what is wrong with it.
    """
    return _proven(value).plan


def dumps(plan: Plan, *, target_root: str | None = None) -> str:
    """The plan as JSON text."""
    return _text(to_json(plan, target_root=target_root))


def save(plan: Plan, file: str | os.PathLike[str], *, target_root: str | None = None) -> None:
    """Write the plan to `file`, which is replaced whole or not at all.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    beside = Path(f"{os.fspath(file)}.new")
    with open(beside, "w", encoding="utf-8") as out:
        # One field at a time, so that the text of a large plan is never held whole.
        fields = to_json(plan, target_root=target_root).items()
        out.writelines(f"{',' if number else '{'}{_text(key)}:{_text(value)}" for number, (key, value) in enumerate(fields))
        out.write("}\n")
        out.flush()
        os.fsync(out.fileno())
    os.replace(beside, file)


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def load(file: str | os.PathLike[str]) -> SavedPlan:
    """The plan in `file`, and the target folder it names.

    Raises
    ------
    PlanError
        The file cannot be read, is not a plan, or is a plan that does not hold together.
    """
    try:
        with open(file, "rb") as stream:
            if os.fstat(stream.fileno()).st_size > _LARGEST_FILE:
                raise PlanError("a plan file larger than 1 GiB is not read", file=file)
            data = stream.read()
    except OSError as error:
        raise PlanError("the plan cannot be read", file=file, actual=error.strerror) from None
    try:
        value = STRICT.decode(data.decode())
    except (ValueError, RecursionError) as error:
        raise PlanError("the plan is not valid JSON", file=file, actual=str(error)[:200], remedy="Plan again") from None
    try:
        return _proven(value)
    except PlanError as error:
        error.file = error.file or os.fspath(file)
        raise


def _proven(value: object) -> SavedPlan:
    saved = read(value)
    try:
        check(saved.plan)
    except MemoryError:
        raise PlanError("the saved plan is too ragged to be proven in this memory", remedy="Plan again") from None
    return saved


@dataclass(frozen=True, slots=True)
class _Tables:
    """Strings and kinds, each with its number."""

    names: dict[str, int]
    kinds: dict[tuple[str, tuple[int, ...]], int]

    def name(self, name: str) -> int:
        return self.names.setdefault(name, len(self.names))

    def kind(self, tensor: TensorEntry) -> int:
        return self.kinds.setdefault((tensor.dtype, tensor.shape), len(self.kinds))


def _column(values: Iterable[int]) -> list[int] | dict[str, list[int]]:
    """The values or their differences, whichever is shorter as text."""
    found = list(values)
    delta = found[:1] + [b - a for a, b in pairwise(found)]
    return {"delta": delta} if len(str(delta)) + 10 < len(str(found)) else found


def _target_files(files: Sequence[TargetFile]) -> dict[str, Any]:
    static = [(i, offset, data) for i, f in enumerate(files) for offset, data in f.static]
    crcs = [(i, crc) for i, f in enumerate(files) for crc in f.crcs]
    seals = [(i, seal) for i, f in enumerate(files) for seal in f.seals]
    data = b"".join(d for _, _, d in static)
    kind, packed = ("zlib", zlib.compress(data, 6)) if len(data) >= _COMPRESS_FROM else ("base64", data)
    return {
        "path": [f.path for f in files],
        "nbytes": [f.nbytes for f in files],
        "static": {
            "file": _column(i for i, _, _ in static),
            "offset": _column(offset for _, offset, _ in static),
            "nbytes": _column(len(d) for _, _, d in static),
            "data": {kind: base64.b64encode(packed).decode()},
        },
        "crcs": {
            "file": _column(i for i, _ in crcs),
            "offset": _column(c.offset for _, c in crcs),
            "nbytes": _column(c.nbytes for _, c in crcs),
            "patches": _column(len(c.patches) for _, c in crcs),
            "patch": _column(p for _, c in crcs for p in c.patches),
        },
        "seals": {
            "in": _column(i for i, _ in seals),
            "kind": _column(SEAL_KINDS.index(seal.kind) for _, seal in seals),
            "file": _column(seal.file for _, seal in seals),
            "offset": _column(seal.offset for _, seal in seals),
        },
    }


def _program(program: Program) -> dict[str, Any]:
    op = program.op
    return {
        "label": program.label,
        "dtype": program.dtype,
        "shape": list(program.shape),
        "gather": _pieces(program.gather),
        "replicas": [_pieces(r) for r in program.replicas],
        "padding": _pieces(program.padding),
        "op": None if op is None else {"name": op.name, "kernel": op.kernel, "block": list(op.block), "scratch": op.scratch},
        "outputs": [
            {"dtype": o.dtype, "shape": list(o.shape), "ratio": list(o.ratio), "scatter": _pieces(o.scatter), "zeros": _pieces(o.zeros)}
            for o in program.outputs
        ],
        "cut": list(program.cut),
        "whole": program.whole,
        **({"average": True} if program.average else {}),
        **({"blank": list(program.blank)} if program.blank else {}),
        **({"rounded": list(program.rounded)} if program.rounded else {}),
    }


def _pieces(pieces: Iterable[Piece]) -> list[list[int]]:
    return [[p.slot, p.dst_off, p.src_off, *(n for dim in p.dims for n in dim)] for p in pieces]


def _bindings(bound: Bindings, tables: _Tables) -> dict[str, Any]:
    made: dict[str, Any] = {"names": _column(map(tables.name, bound.names))}
    for key in ("source_file", "source_offset", "target_file", "target_offset"):
        made[key] = [_column(operand) for operand in getattr(bound, key).T.tolist()]
    return made


def _tiles(tiles: Tiles) -> dict[str, Any]:
    arrays = (
        tiles.first, tiles.program, tiles.row, tiles.lo[:, 0], tiles.lo[:, 1], tiles.hi[:, 0], tiles.hi[:, 1], tiles.requests,
        tiles.bytes_read, tiles.bytes_written,
    )  # fmt: skip
    return {key: _column(array.tolist()) for key, array in zip(TILE_COLUMNS, arrays, strict=True)}


def _tensors(tensors: Sequence[TensorEntry], tables: _Tables) -> dict[str, Any]:
    columns = (
        (tables.name(t.name) for t in tensors), (t.rank for t in tensors), (tables.kind(t) for t in tensors), (t.file for t in tensors),
        (t.offset for t in tensors), (int(t.contiguous) for t in tensors),
    )  # fmt: skip
    return {key: _column(values) for key, values in zip(TENSOR_COLUMNS, columns, strict=True)}
