"""Reading a saved plan, part by part.

Every field is read with its type, range and length checked; unknown and missing keys are refused; then `coherent`
checks what the parts say of each other and the plan hash is computed again and compared. What remains is the proof,
`check`, which `codec` runs. Boundary: plain JSON values in, a `Plan` or a `PlanError` out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import MISSING, fields
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ._coherent import AXIS_LIMIT, MAX_AXES, coherent
from ._strict import LIMIT, column, fail, flag, index_column, items, path, pick, plain, record, text, texts, unpack, whole
from .containers.base import Crc
from .fingerprint import plan_hash
from .layout import Layout
from .plan import (
    PLAN_FORMAT,
    SEAL_DIGITS,
    Bindings,
    Dropped,
    Ints,
    Output,
    Plan,
    Program,
    Seal,
    SourceFile,
    TargetFile,
    TensorEntry,
    Tiles,
    ValueOp,
)
from .request import Request
from .tensor.dtypes import BY_NAME
from .tensor.pieces import Piece

__all__ = ["SEAL_KINDS", "TENSOR_COLUMNS", "TILE_COLUMNS", "SavedPlan", "read"]

TENSOR_COLUMNS = ("name", "rank", "kind", "file", "offset", "contiguous")
TILE_COLUMNS = ("first", "program", "row", "lo0", "lo1", "hi0", "hi1", "requests", "bytes_read", "bytes_written")
SEAL_KINDS = tuple(SEAL_DIGITS)
_LARGEST_STATIC = 1 << 30
_MAX_DIMS = 16
_SUMMARY = ("source_format", "source_layout", "family", "target_format", "target_layout")
_TOP = (
    "plan_format", "plan_hash", "recipe", "source_root", "target_root", "summary", "source_files", "target_files", "copies", "copied_bytes",
    "names", "kinds", "programs", "bindings", "tiles", "source_tensors", "target_tensors", "dropped", "warnings",
)  # fmt: skip

Shape = tuple[int, ...]
Kind = tuple[str, Shape]


class SavedPlan(NamedTuple):
    """What a plan file holds: the plan, and the folder it was made for (None if none was named)."""

    plan: Plan
    target_root: str | None


def read(value: object) -> SavedPlan:
    """The plan of `codec.to_json`, with everything checked but what `check` proves.

    Raises
    ------
    PlanError
        Names the field.
    """
    if type(value) is dict and value.get("plan_format", PLAN_FORMAT) != PLAN_FORMAT:
        fail("plan_format", "is not this version's", expected=PLAN_FORMAT, actual=repr(value["plan_format"])[:80])
    top = record(value, "top", _TOP)
    whole(top["plan_format"], "plan_format", PLAN_FORMAT, PLAN_FORMAT)
    names = texts(top["names"], "names")
    kinds = [_kind(k, f"kinds[{i}]") for i, k in enumerate(items(top["kinds"], "kinds"))]
    sources = _read_sources(top["source_files"])
    targets = _read_targets(top["target_files"])
    copies = [items(c, f"copies[{i}]", 2) for i, c in enumerate(items(top["copies"], "copies"))]
    programs = tuple(_read_program(p, f"programs[{i}]") for i, p in enumerate(items(top["programs"], "programs")))
    bindings = tuple(
        _read_bindings(b, f"bindings[{i}]", names, len(sources), len(targets))
        for i, b in enumerate(items(top["bindings"], "bindings", len(programs)))
    )
    dropped = [texts(items(d, f"dropped[{i}]", 2), f"dropped[{i}]") for i, d in enumerate(items(top["dropped"], "dropped"))]
    plan = Plan(
        recipe=_read_recipe(top["recipe"]),
        source_root=_root(top["source_root"], "source_root"),
        summary=_read_summary(top["summary"]),
        source_files=sources,
        target_files=targets,
        copies=tuple((path(a, f"copies[{i}]"), path(b, f"copies[{i}]")) for i, (a, b) in enumerate(copies)),
        programs=programs,
        bindings=bindings,
        tiles=_read_tiles(top["tiles"], programs, bindings),
        source_tensors=_read_tensors(top["source_tensors"], "source_tensors", names, kinds, len(sources)),
        target_tensors=_read_tensors(top["target_tensors"], "target_tensors", names, kinds, len(targets)),
        dropped=tuple(Dropped(name, reason) for name, reason in dropped),
        warnings=tuple(texts(top["warnings"], "warnings")),
        copied_bytes=whole(top["copied_bytes"], "copied_bytes"),
    )
    target_root = None if top["target_root"] is None else _root(top["target_root"], "target_root")
    coherent(plan)
    found = plan_hash(plan)
    if text(top["plan_hash"], "plan_hash") != found:
        fail("plan_hash", "does not belong to this plan", expected=found, actual=top["plan_hash"][:80])
    return SavedPlan(plan, target_root)


def _root(value: object, where: str) -> str:
    found = text(value, where, 4096)
    if not os.path.isabs(found) or "\0" in found:
        fail(where, "is not an absolute path", actual=repr(found[:200]))
    return found


_REQUEST_KINDS = {"str": str, "int": int, "bool": bool}


def _read_recipe(value: object) -> dict[str, Any]:
    """The recipe: plain values; those that a `Request` takes have its types."""
    if type(value) is not dict:
        fail("recipe", "is not an object", actual=type(value).__name__)
    plain(value, "recipe")
    for field in fields(Request):
        where = f"recipe.{field.name}"
        if field.name not in value:
            # An older version of the same plan format knew fewer options, and did what their defaults say.
            if field.default is MISSING:
                fail("recipe", f"lacks the key {field.name!r}")
            continue
        found, kind = value[field.name], str(field.type)
        if found is None and kind.endswith("| None"):
            continue
        kind = kind.removesuffix(" | None")
        if kind == "Layout":
            _layout(found, where)
        elif kind.startswith("tuple[str"):
            texts(found, where)
        elif kind in _REQUEST_KINDS and type(found) is not _REQUEST_KINDS[kind]:
            fail(where, "has the wrong type", expected=kind, actual=type(found).__name__)
    return value


def _read_summary(value: object) -> dict[str, Any]:
    found = record(value, "summary", _SUMMARY)
    for key in _SUMMARY:
        _layout(found[key], f"summary.{key}") if key.endswith("_layout") else text(found[key], f"summary.{key}")
    return found


def _layout(value: object, where: str) -> None:
    found = record(value, where, (f.name for f in fields(Layout)))
    for axis, size in found.items():
        if axis == "stages":
            if size is not None:
                column(items(size, f"{where}.stages"), f"{where}.stages")
        elif axis != "etp" or size is not None:
            whole(size, f"{where}.{axis}", 1)
    try:
        Layout.from_json(found)
    except ValueError as error:
        fail(where, f"is no layout ({error})")


def _kind(value: object, where: str) -> Kind:
    dtype, shape = items(value, where, 2)
    return pick(dtype, where, BY_NAME), _shape(shape, where, LIMIT)


def _shape(value: object, where: str, longest: int = AXIS_LIMIT) -> Shape:
    shape = tuple(column(items(value, where, most=MAX_AXES), where, high=longest))
    elements = 1
    for extent in shape:
        elements *= extent
        if elements > LIMIT:
            fail(where, "has too many elements")
    return shape


def _read_sources(value: object) -> tuple[SourceFile, ...]:
    found = record(value, "source_files", ("path", "nbytes", "mtime_ns", "header_digest"))
    paths = [path(p, f"source_files.path[{i}]") for i, p in enumerate(items(found["path"], "source_files.path"))]
    nbytes = column(found["nbytes"], "source_files.nbytes", len(paths))
    mtimes = column(found["mtime_ns"], "source_files.mtime_ns", len(paths), -8 * LIMIT, 8 * LIMIT - 1)
    digests = texts(items(found["header_digest"], "source_files.header_digest", len(paths)), "source_files.header_digest", 256)
    return tuple(map(SourceFile, paths, nbytes, mtimes, digests))


def _read_targets(value: object) -> tuple[TargetFile, ...]:
    found = record(value, "target_files", ("path", "nbytes", "static", "crcs", "seals"))
    paths = [path(p, f"target_files.path[{i}]") for i, p in enumerate(items(found["path"], "target_files.path"))]
    nbytes = column(found["nbytes"], "target_files.nbytes", len(paths))
    static: list[list[tuple[int, bytes]]] = [[] for _ in paths]
    for file, offset, data in _read_static(found["static"], len(paths)):
        static[file].append((offset, data))
    crcs: list[list[Crc]] = [[] for _ in paths]
    for file, crc in _read_crcs(found["crcs"], len(paths)):
        crcs[file].append(crc)
    seals: list[list[Seal]] = [[] for _ in paths]
    for file, seal in _read_seals(found["seals"], len(paths)):
        seals[file].append(seal)
    rows = zip(paths, nbytes, static, crcs, seals, strict=True)
    return tuple(TargetFile(p, n, tuple(s), tuple(c), tuple(e)) for p, n, s, c, e in rows)


def _read_static(value: object, files: int) -> list[tuple[int, int, bytes]]:
    where = "target_files.static"
    found = record(value, where, ("file", "offset", "nbytes", "data"))
    numbers = index_column(found["file"], f"{where}.file", files)
    offsets = column(found["offset"], f"{where}.offset", len(numbers))
    sizes = column(found["nbytes"], f"{where}.nbytes", len(numbers))
    if sum(sizes) > _LARGEST_STATIC:
        fail(where, "is larger than 1 GiB", actual=sum(sizes))
    data = unpack(found["data"], f"{where}.data", sum(sizes))
    ends = np.cumsum([0, *sizes]).tolist()
    return [(i, offset, data[a:b]) for i, offset, a, b in zip(numbers, offsets, ends, ends[1:], strict=False)]


def _read_crcs(value: object, files: int) -> list[tuple[int, Crc]]:
    where = "target_files.crcs"
    found = record(value, where, ("file", "offset", "nbytes", "patches", "patch"))
    numbers = index_column(found["file"], f"{where}.file", files)
    offsets, sizes, counts = (column(found[key], f"{where}.{key}", len(numbers)) for key in ("offset", "nbytes", "patches"))
    patches = column(found["patch"], f"{where}.patch", sum(counts))
    ends = np.cumsum([0, *counts]).tolist()
    return [(i, Crc(o, n, tuple(patches[a:b]))) for i, o, n, a, b in zip(numbers, offsets, sizes, ends, ends[1:], strict=False)]


def _read_seals(value: object, files: int) -> list[tuple[int, Seal]]:
    where = "target_files.seals"
    found = record(value, where, ("in", "kind", "file", "offset"))
    numbers = index_column(found["in"], f"{where}.in", files)
    kinds = index_column(found["kind"], f"{where}.kind", len(SEAL_KINDS), len(numbers))
    sealed, offsets = (column(found[key], f"{where}.{key}", len(numbers)) for key in ("file", "offset"))
    return [(i, Seal(SEAL_KINDS[k], f, o)) for i, k, f, o in zip(numbers, kinds, sealed, offsets, strict=True)]


def _read_program(value: object, where: str) -> Program:
    keys = ("label", "dtype", "shape", "gather", "replicas", "padding", "op", "outputs", "cut", "whole")
    found = record(value, where, keys, ("average", "blank", "rounded"))
    return Program(
        text(found["label"], f"{where}.label"),
        pick(found["dtype"], f"{where}.dtype", BY_NAME),
        _shape(found["shape"], f"{where}.shape"),
        _read_pieces(found["gather"], f"{where}.gather"),
        tuple(_read_pieces(r, f"{where}.replicas") for r in items(found["replicas"], f"{where}.replicas")),
        _read_pieces(found["padding"], f"{where}.padding"),
        None if found["op"] is None else _read_op(found["op"], f"{where}.op"),
        tuple(_read_output(o, f"{where}.outputs[{i}]") for i, o in enumerate(items(found["outputs"], f"{where}.outputs", most=16))),
        tuple(column(items(found["cut"], f"{where}.cut", most=2), f"{where}.cut", high=MAX_AXES)),
        flag(found["whole"], f"{where}.whole"),
        average=flag(found.get("average", False), f"{where}.average"),
        blank=tuple(column(items(found.get("blank", []), f"{where}.blank"), f"{where}.blank")),
        rounded=tuple(pick(kind, f"{where}.rounded", BY_NAME) for kind in items(found.get("rounded", []), f"{where}.rounded")),
    )


def _read_op(value: object, where: str) -> ValueOp:
    found = record(value, where, ("name", "kernel", "block", "scratch"))
    block = tuple(column(items(found["block"], f"{where}.block", most=MAX_AXES), f"{where}.block"))
    name, kernel = text(found["name"], f"{where}.name"), text(found["kernel"], f"{where}.kernel")
    return ValueOp(name, kernel, block, whole(found["scratch"], f"{where}.scratch", 0, 4096))


def _read_output(value: object, where: str) -> Output:
    found = record(value, where, ("dtype", "shape", "ratio", "scatter", "zeros"))
    return Output(
        pick(found["dtype"], f"{where}.dtype", BY_NAME),
        _shape(found["shape"], f"{where}.shape"),
        tuple(column(items(found["ratio"], f"{where}.ratio", most=MAX_AXES), f"{where}.ratio", low=1)),
        _read_pieces(found["scatter"], f"{where}.scatter"),
        _read_pieces(found["zeros"], f"{where}.zeros"),
    )


def _read_pieces(value: object, where: str) -> tuple[Piece, ...]:
    pieces = []
    for i, piece in enumerate(items(value, where)):
        numbers = column(items(piece, f"{where}[{i}]", most=3 + 3 * _MAX_DIMS), f"{where}[{i}]", low=-LIMIT)
        if len(numbers) < 3 or len(numbers) % 3:
            fail(f"{where}[{i}]", "has the wrong length", actual=len(numbers))
        dims = tuple((numbers[k], numbers[k + 1], numbers[k + 2]) for k in range(3, len(numbers), 3))
        pieces.append(Piece(numbers[0], numbers[1], numbers[2], dims))
    return tuple(pieces)


def _read_bindings(value: object, where: str, names: Sequence[str], sources: int, targets: int) -> Bindings:
    found = record(value, where, ("names", "source_file", "source_offset", "target_file", "target_offset"))
    rows = index_column(found["names"], f"{where}.names", len(names))
    columns = []
    for side, files in (("source", sources), ("target", targets)):
        numbers = items(found[f"{side}_file"], f"{where}.{side}_file")
        offsets = items(found[f"{side}_offset"], f"{where}.{side}_offset", len(numbers))
        columns.append(_table([index_column(c, f"{where}.{side}_file", files, len(rows)) for c in numbers], len(rows)))
        columns.append(_table([column(c, f"{where}.{side}_offset", len(rows)) for c in offsets], len(rows)))
    return Bindings(tuple(names[i] for i in rows), *columns)


def _table(columns: list[list[int]], rows: int) -> Ints:
    return np.ascontiguousarray(np.array(columns, dtype=np.int64).reshape(len(columns), rows).T)


def _read_tiles(value: object, programs: Sequence[Program], bindings: Sequence[Bindings]) -> Tiles:
    found = record(value, "tiles", TILE_COLUMNS)
    program = index_column(found["program"], "tiles.program", len(programs))
    first = index_column(found["first"], "tiles.first", len(program) + 1)
    if not first or first[0] != 0 or first[-1] != len(program) or any(a >= b for a, b in pairwise(first)):
        fail("tiles.first", "does not ascend from 0 to the number of items")
    row, lo0, lo1, hi0, hi1 = (column(found[key], f"tiles.{key}", len(program)) for key in ("row", "lo0", "lo1", "hi0", "hi1"))
    sums = [column(found[key], f"tiles.{key}", len(first) - 1) for key in ("requests", "bytes_read", "bytes_written")]
    arrays = [np.array(c, dtype=np.int64) for c in (first, program, row, *sums)]
    lo, hi = (_table(pair, len(program)) for pair in ([lo0, lo1], [hi0, hi1]))
    return Tiles(arrays[0], arrays[1], arrays[2], lo, hi, *arrays[3:])


def _read_tensors(value: object, where: str, names: Sequence[str], kinds: Sequence[Kind], files: int) -> tuple[TensorEntry, ...]:
    found = record(value, where, TENSOR_COLUMNS)
    name = index_column(found["name"], f"{where}.name", len(names))
    rank, offset = column(found["rank"], f"{where}.rank", len(name)), column(found["offset"], f"{where}.offset", len(name))
    kind = index_column(found["kind"], f"{where}.kind", len(kinds), len(name))
    file = index_column(found["file"], f"{where}.file", files, len(name))
    contiguous = index_column(found["contiguous"], f"{where}.contiguous", 2, len(name))
    rows = zip(name, rank, kind, file, offset, contiguous, strict=True)
    return tuple(TensorEntry(names[n], r, kinds[k][0], kinds[k][1], f, o, bool(c)) for n, r, k, f, o, c in rows)
