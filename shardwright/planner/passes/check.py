"""The proof that a plan is a bijection, up to what it declares.

1. Per program: the gather pieces cover the pivot once; no piece of a replica overlaps another, and those of a mean cover the
   pivot too; every element of every output goes to some target, and to each copy of it once.
2. Per source tensor: what all programs read of it (replicas and padding included) covers it once. Per target tensor:
   what all programs scatter into it, and the zeros, cover it once. Tensors served by the same (program, operand) pairs
   are proven once.
3. Per target file: tensors and static bytes fill it from first to last byte without overlap.
4. Per pivot tensor: its tile boxes cover it once.
5. Every source tensor is read, or listed in `dropped`. Copies that are trusted need not be read whole.

A plan that fills some ranks' memory leaves the rest of the source alone: `check_filling` proves 1, the targets of 2, and 4.

Coverage is decided exactly on aligned boxes, which are products of per-axis index sets (`disjoint`), in a number of steps
in proportion to the plan. Boundary: reads the plan only; nothing is trusted but the plan's own numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import prod

import numpy as np

from ...errors import PlanError
from ..plan import Ints, Output, Plan, Program, TensorEntry
from ..tensor.pieces import FILL, Box, Piece, align, count
from .alike import Columns, alike
from .disjoint import Allowance, clash

__all__ = ["check", "check_filling"]

_FREE_STEPS = 200_000
_STEPS_PER_PART = 64

Shape = tuple[int, ...]


def check(plan: Plan) -> None:
    """Prove the plan, or raise.

    Raises
    ------
    PlanError
        Names the program, tensor or file, and what is uncovered or covered twice.
    """
    allowance = Allowance(_FREE_STEPS + _STEPS_PER_PART * _parts(plan))
    for program in plan.programs:
        covers(_boxes(program.gather, program.shape, program.label, allowance), program.shape, f"gather of {program.label}", allowance)
        for replica in program.replicas:
            boxes, what = _boxes(replica, program.shape, program.label, allowance), f"replica of {program.label}"
            if program.average:
                covers(boxes, program.shape, what, allowance)
            else:
                _disjoint(boxes, what, allowance)
        for output in program.outputs:
            _reaches_targets(output, program.label, allowance)
    _check_sources(plan, allowance)
    targets = Columns(plan.target_tensors)
    _check_targets(plan, targets, allowance)
    _check_files(plan, targets)
    _check_tiles(plan, allowance)


def check_filling(plan: Plan) -> None:
    """Prove a plan that reads only what some targets need: as `check`, but what it does not read may be anything.

    Raises
    ------
    PlanError
        As `check`.
    """
    allowance = Allowance(_FREE_STEPS + _STEPS_PER_PART * _parts(plan))
    for program in plan.programs:
        covers(_boxes(program.gather, program.shape, program.label, allowance), program.shape, f"gather of {program.label}", allowance)
        for replica in program.replicas:
            _disjoint(_boxes(replica, program.shape, program.label, allowance), f"replica of {program.label}", allowance)
    _check_targets(plan, Columns(plan.target_tensors), allowance)
    _check_tiles(plan, allowance)


def _parts(plan: Plan) -> int:
    """The plan's own size: pieces, tile boxes and tensors."""
    pieces = sum(
        len(p.gather) + sum(map(len, p.replicas)) + len(p.padding) + sum(len(o.scatter) + len(o.zeros) for o in p.outputs)
        for p in plan.programs
    )
    return pieces + len(plan.tiles.program) + len(plan.source_tensors) + len(plan.target_tensors)


def covers(boxes: Sequence[Box], shape: Shape, what: str, allowance: Allowance) -> None:
    """The boxes cover the shape exactly once."""
    total = sum(prod(d[1] for d in box.dims) for box in boxes)
    if total != prod(shape):
        raise PlanError("pieces do not cover their tensor once", tensor=what, expected=f"{prod(shape)} elements", actual=total)
    _disjoint(boxes, what, allowance)


def _boxes(pieces: Iterable[Piece], shape: Shape, what: str, allowance: Allowance) -> list[Box]:
    size = prod(shape)
    boxes = []
    for piece in pieces:
        low = piece.dst_off + sum((n - 1) * min(d, 0) for n, d, _ in piece.dims)
        high = piece.dst_off + sum((n - 1) * max(d, 0) for n, d, _ in piece.dims)
        if low < 0 or high >= size:
            raise PlanError("a piece leaves its tensor", tensor=what, expected=f"elements 0 … {size - 1}", actual=f"{low} … {high}")
        boxes += align(piece, shape, allowance.spend)
    return boxes


def _disjoint(boxes: Sequence[Box], what: str, allowance: Allowance) -> None:
    """No two boxes share an element."""
    if found := clash(boxes, allowance):
        raise PlanError("two pieces write the same element", tensor=what, actual=f"at {found[0].start} and {found[1].start}")


def _reaches_targets(output: Output, what: str, allowance: Allowance) -> None:
    """Operands, in their order, make up whole copies of the output; those that take the same elements (copies on further
    tensor- or expert-parallel ranks) count once."""
    by_operand: dict[int, list[Piece]] = defaultdict(list)
    for piece in output.scatter:
        by_operand[piece.slot].append(piece)
    size, copy, taken = prod(output.shape), list[Piece](), 0
    seen: set[object] = set()
    for _, pieces in sorted(by_operand.items()):
        shares = tuple(sorted((p.dst_off, tuple((n, d) for n, d, _ in p.dims)) for p in pieces))
        if shares in seen:
            continue
        seen.add(shares)
        copy += pieces
        taken += sum(map(count, pieces))
        if taken == size:
            covers(_boxes(copy, output.shape, what, allowance), output.shape, f"scatter of {what}", allowance)
            copy, taken = [], 0
    if taken or (size and not seen):
        raise PlanError("elements reach no target", tensor=what, expected=f"{size} elements", actual=taken)


Read = tuple[int, int]
"""(program, source operand)"""


def _check_sources(plan: Plan, allowance: Allowance) -> None:
    """What is read of each source tensor covers it once."""
    taken = [_reads(program) for program in plan.programs]
    reads: list[tuple[Read, Ints, Ints]] = [
        ((number, operand), bound.source_file[:, operand], bound.source_offset[:, operand])
        for number, bound in enumerate(plan.bindings)
        for operand in taken[number]
    ]
    groups, stray, idle = alike(Columns(plan.source_tensors), reads)
    if stray is not None:
        raise PlanError("a program reads where no source tensor begins", tensor=plan.programs[stray[0][0]].label, actual=stray[1:])
    if idle is not None:
        raise PlanError("a source tensor is neither read nor dropped", tensor=idle.name, file=plan.source_files[idle.file].path)
    trusted = bool(plan.recipe.get("trust_replicas"))
    for found, users in groups:
        used = [(plan.programs[number].operand_dtype(operand), taken[number][operand]) for number, operand in users]
        _check_source(plan, found, used, trusted, allowance)


def _reads(program: Program) -> dict[int, list[Piece]]:
    """Per source operand, its elements that the program reads: gathered, compared, or looked at as padding."""
    found: dict[int, list[Piece]] = defaultdict(list)
    for piece in [*program.gather, *(p for replica in program.replicas for p in replica), *program.padding]:
        if piece.slot != FILL:
            found[piece.slot].append(Piece(0, piece.src_off, 0, tuple((n, s, 0) for n, _, s in piece.dims)))
    return found


def _check_source(
    plan: Plan, entries: Sequence[TensorEntry], reads: Sequence[tuple[str, list[Piece]]], trusted: bool, allowance: Allowance
) -> None:
    """The reads of one tensor, or of several that are one storage, each of which is read."""
    entry, size = entries[0], prod(entries[0].shape)
    for expected, _ in reads:
        if entry.dtype != expected:
            raise PlanError("a program reads a source tensor of another dtype", tensor=entry.name, expected=expected, actual=entry.dtype)
    pieces = [piece for _, found in reads for piece in found]
    if any(_lowest(piece) < 0 for piece in pieces):
        raise PlanError("a piece reads before its source tensor", tensor=entry.name, file=plan.source_files[entry.file].path)
    if entry.contiguous and any(n > 1 and not s for piece in pieces for n, s, _ in piece.dims):
        raise PlanError("a piece reads one element many times", tensor=entry.name, file=plan.source_files[entry.file].path)
    boxes = _boxes(pieces, entry.shape, entry.name, allowance) if entry.contiguous else []
    if entry.contiguous and len(entries) == 1:
        _disjoint(boxes, entry.name, allowance)
    total = sum(map(count, pieces))
    if total != sum(prod(e.shape) for e in entries) and not (trusted and total < size):
        raise PlanError("a source tensor is not read once", tensor=entry.name, expected=f"{size} elements", actual=total)


def _lowest(piece: Piece) -> int:
    return piece.dst_off + sum((n - 1) * min(d, 0) for n, d, _ in piece.dims)


Write = tuple[int, int, int]
"""(program, output, target operand)"""


def _check_targets(plan: Plan, targets: Columns, allowance: Allowance) -> None:
    """Everything scattered into each target tensor covers it once."""
    writes: list[tuple[Write, Ints, Ints]] = [
        ((number, k, operand), bound.target_file[:, operand], bound.target_offset[:, operand])
        for number, (program, bound) in enumerate(zip(plan.programs, plan.bindings, strict=True))
        for k, output in enumerate(program.outputs)
        for operand in sorted({p.slot for p in (*output.scatter, *output.zeros)})
    ]
    groups, stray, idle = alike(targets, writes)
    if stray is not None:
        raise PlanError("a program writes where no target tensor begins", file=plan.target_files[stray[1]].path, actual=stray[2])
    if idle is not None:
        raise PlanError("a target tensor is never written", tensor=idle.name, file=plan.target_files[idle.file].path)
    scatters = [[(_by_operand(o.scatter), _by_operand(o.zeros)) for o in program.outputs] for program in plan.programs]
    for entries, users in groups:
        for entry in entries:
            _check_target(plan, entry, users, scatters, allowance)


Scatters = Sequence[Sequence[tuple[dict[int, list[Piece]], dict[int, list[Piece]]]]]
"""Per program and output, its scatter pieces and its zeros by target operand."""


def _by_operand(pieces: Iterable[Piece]) -> dict[int, list[Piece]]:
    found: dict[int, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.slot, []).append(piece)
    return found


def _check_target(plan: Plan, entry: TensorEntry, pairs: Sequence[Write], scatters: Scatters, allowance: Allowance) -> None:
    written = []
    for number, k, operand in pairs:
        output = plan.programs[number].outputs[k]
        if output.dtype != entry.dtype:
            raise PlanError("a target tensor gets another dtype", tensor=entry.name, expected=entry.dtype, actual=output.dtype)
        scatter, zeros = (side.get(operand, []) for side in scatters[number][k])
        # No pivot element goes to one operand twice, and none lies outside the pivot.
        _disjoint(_boxes(scatter, output.shape, entry.name, allowance), entry.name, allowance)
        written += [Piece(operand, p.src_off, p.dst_off, tuple((n, s, d) for n, d, s in p.dims)) for p in (*scatter, *zeros)]
    covers(_boxes(written, entry.shape, entry.name, allowance), entry.shape, entry.name, allowance)


def _check_files(plan: Plan, targets: Columns) -> None:
    """Static bytes and tensors fill each file without overlap."""
    static = [(number, at, len(data)) for number, f in enumerate(plan.target_files) for at, data in f.static]
    # An empty extent at each file's end: everything is filled if each extent begins where the one before it ended.
    ends = [(number, f.nbytes, 0) for number, f in enumerate(plan.target_files)]
    extra = np.array([*static, *ends], dtype=np.int64).reshape(-1, 3).T
    file, begin, nbytes = np.concatenate([[targets.file, targets.offset, targets.nbytes], extra], axis=1)
    order = np.lexsort((nbytes == 0, begin, file))
    file, begin, end = file[order], begin[order], (begin + nbytes)[order]
    expected = np.where(np.diff(file, prepend=-1) != 0, 0, np.roll(end, 1))
    wrong = np.flatnonzero(begin != expected)
    if len(wrong):
        at, index = int(wrong[0]), int(order[wrong[0]])
        path, due, actual = plan.target_files[int(file[at])].path, int(expected[at]), int(begin[at])
        if index >= len(targets) + len(static):
            raise PlanError("a target file is not filled", file=path, expected=actual, actual=due)
        what = targets[index].name if index < len(targets) else "static bytes"
        raise PlanError("a target file has a gap or an overlap", file=path, tensor=what, expected=f"next byte {due}", actual=actual)


def _check_tiles(plan: Plan, allowance: Allowance) -> None:
    """Each pivot tensor's boxes cover it once."""
    tiles = plan.tiles
    order = np.lexsort((tiles.lo[:, 1], tiles.lo[:, 0], tiles.row, tiles.program))
    program, row, lo, hi = (a[order] for a in (tiles.program, tiles.row, tiles.lo, tiles.hi))
    starts = (
        np.flatnonzero(np.concatenate(([True], (program[1:] != program[:-1]) | (row[1:] != row[:-1]))))
        if len(order)
        else np.zeros(0, dtype=np.int64)
    )
    ends = np.append(starts[1:], len(order))
    proven: set[tuple[int, bytes]] = set()
    whole = ends - starts == 1
    for number, *box in set(map(tuple, np.column_stack([program, lo, hi])[starts[whole]].tolist())):
        _check_boxes(plan.programs[number], [box[:2]], [box[2:]], allowance)
    seen = np.bincount(program[starts], minlength=len(plan.programs)).tolist()
    for begin, end in zip(starts[~whole].tolist(), ends[~whole].tolist(), strict=True):
        number = int(program[begin])
        key = (number, lo[begin:end].tobytes() + hi[begin:end].tobytes())
        if key not in proven:
            proven.add(key)
            _check_boxes(plan.programs[number], lo[begin:end].tolist(), hi[begin:end].tolist(), allowance)
    for number, bound in enumerate(plan.bindings):
        if seen[number] != len(bound.names):
            raise PlanError(
                "pivot tensors without a tile", tensor=plan.programs[number].label, expected=len(bound.names), actual=seen[number]
            )


def _check_boxes(program: Program, lo: list[list[int]], hi: list[list[int]], allowance: Allowance) -> None:
    shape = tuple(program.shape[axis] for axis in program.cut)
    boxes = []
    for low, high in zip(lo, hi, strict=True):
        start = tuple(low[: len(shape)])
        dims = tuple((k, b - a, 1, 0) for k, (a, b) in enumerate(zip(low, high, strict=True)) if k < len(shape) and b - a != 1)
        boxes.append(Box(0, start, 0, dims))
    covers(boxes, shape, f"tiles of {program.label}", allowance)
