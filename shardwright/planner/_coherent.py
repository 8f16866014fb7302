"""What the parts of a saved plan say of each other, checked before anything relies on it.

`check` proves that a plan is a bijection (and counts what the proof costs), but takes for granted that the plan is well
formed: that indices exist, and that boxes lie in their tensors. A plan out of a file has earned none of that.

1. Paths: no target path twice, none that is a folder of another.
2. Tensors end inside their files; static bytes ascend, and checksum patches lie in them.
3. Programs: ranks of shapes agree; kernels are those that the planner itself names; every piece is in range and meets
   no element twice by itself.
4. Every read ends inside its source file.
5. Tile boxes lie inside their pivots.

Boundary: pure; raises `PlanError` and nothing else.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from math import prod

import numpy as np

from ._strict import LIMIT, fail
from .passes.memory import averageable, roundable
from .plan import KERNELS, SEAL_DIGITS, Bindings, Output, Plan, Program, TargetFile, TensorEntry
from .schemes import SCHEMES
from .tensor.dtypes import BY_NAME
from .tensor.pieces import Piece

__all__ = ["AXIS_LIMIT", "MAX_AXES", "coherent"]

MAX_AXES = 8
AXIS_LIMIT = 1 << 40
"""Longest axis of a pivot."""
_DEEPEST = 64

Shape = tuple[int, ...]


def coherent(plan: Plan) -> None:
    """Check the plan's parts against each other.

    Raises
    ------
    PlanError
        Names the field.
    """
    _paths(plan)
    sides = (("source_tensors", plan.source_tensors, plan.source_files), ("target_tensors", plan.target_tensors, plan.target_files))
    for where, tensors, files in sides:
        sizes = [f.nbytes for f in files]
        for i, tensor in enumerate(tensors):
            _tensor_inside(tensor, sizes[tensor.file], f"{where}[{i}]")
    for file in plan.target_files:
        _static(file)
        _seals(file, plan)
    kernels = {*KERNELS.values(), *(scheme.kernel for scheme in SCHEMES)}
    for number, (program, bound) in enumerate(zip(plan.programs, plan.bindings, strict=True)):
        _program(program, bound, f"programs[{number}]", kernels)
        _reads(plan, program, bound, f"programs[{number}]")
    _tiles(plan)


def _paths(plan: Plan) -> None:
    paths = [f.path for f in plan.target_files] + [to for _, to in plan.copies]
    taken = set(paths)
    if len(taken) != len(paths):
        fail("target_files.path", "names a file twice", actual=Counter(paths).most_common(1)[0][0])
    for name in paths:
        parts = name.split("/")
        if len(parts) > _DEEPEST:
            fail("target_files.path", f"is more than {_DEEPEST} folders deep", actual=name[:80])
        if any("/".join(parts[:k]) in taken for k in range(1, len(parts))):
            fail("target_files.path", "has a file where a folder must be", actual=name)
    if len({f.path for f in plan.source_files}) != len(plan.source_files):
        fail("source_files.path", "names a file twice")


def _nbytes(dtype: str, shape: Shape, where: str) -> int:
    bits = prod(shape) * BY_NAME[dtype].bits
    if bits % 8:
        fail(where, "does not fill whole bytes")
    return bits // 8


def _tensor_inside(tensor: TensorEntry, file_bytes: int, where: str) -> None:
    nbytes = _nbytes(tensor.dtype, tensor.shape, where)
    # A strided view may repeat elements; what is read of it is checked piece by piece.
    if tensor.contiguous and tensor.offset + nbytes > file_bytes:
        fail(where, "ends behind its file", expected=f"at most {file_bytes}", actual=tensor.offset + nbytes)


def _static(file: TargetFile) -> None:
    end = 0
    starts = [offset for offset, _ in file.static]
    for offset, data in file.static:
        if offset < end or not data:
            fail("target_files.static", "is not ascending and disjoint", actual=f"{file.path} at {offset}")
        end = offset + len(data)
    if end > file.nbytes:
        fail("target_files.static", "ends behind its file", actual=file.path)
    for crc in file.crcs:
        if crc.offset + crc.nbytes > file.nbytes:
            fail("target_files.crcs", "ends behind its file", actual=file.path)
        for patch in crc.patches:
            k = bisect_right(starts, patch) - 1
            if k < 0 or patch + 4 > starts[k] + len(file.static[k][1]):
                fail("target_files.crcs", "patches bytes that are not static", actual=f"{file.path} at {patch}")


def _seals(file: TargetFile, plan: Plan) -> None:
    """Digits go over static bytes; what is sealed is another file, which seals nothing."""
    starts = [offset for offset, _ in file.static]
    for seal in file.seals:
        k = bisect_right(starts, seal.offset) - 1
        if k < 0 or seal.offset + SEAL_DIGITS[seal.kind] > starts[k] + len(file.static[k][1]):
            fail("target_files.seals", "writes over bytes that are not static", actual=f"{file.path} at {seal.offset}")
        if seal.file >= len(plan.target_files) + len(plan.copies):
            fail("target_files.seals", "seals a file that there is not", actual=seal.file)
        if seal.file < len(plan.target_files) and plan.target_files[seal.file].seals:
            fail("target_files.seals", "seals a file that holds seals", actual=plan.target_files[seal.file].path)


def _program(program: Program, bound: Bindings, where: str, kernels: set[str]) -> None:
    size, axes = prod(program.shape), len(program.shape)
    sources, targets = bound.source_file.shape[1], bound.target_file.shape[1]
    if not BY_NAME[program.dtype].itemsize:
        fail(f"{where}.dtype", "is packed below a byte", actual=program.dtype)
    if len(set(program.cut)) != len(program.cut) or any(axis >= axes for axis in program.cut):
        fail(f"{where}.cut", "is not a list of axes", actual=program.cut)
    if size and not sources:
        fail(f"{where}.gather", "has no source operand")
    for piece in (*program.gather, *(p for r in program.replicas for p in r)):
        _piece(piece, f"{where}.gather", sources, size)
    for piece in program.padding:
        _region(piece, f"{where}.padding", sources)
    read = {piece.slot for piece in (*program.gather, *(p for r in program.replicas for p in r))}
    if wrong := [operand for operand in program.blank if operand in read or not 0 <= operand < sources]:
        fail(f"{where}.blank", "names an operand that is not padding alone", actual=wrong[0])
    _copies(program, where)
    if program.op is None:
        if len(program.outputs) != 1 or program.outputs[0].dtype != program.dtype:
            fail(f"{where}.outputs", "of a plain copy is not one tensor of its dtype")
    elif program.op.kernel not in kernels or len(program.op.block) != axes:
        fail(f"{where}.op", "is no value op of this version or of a scheme that is registered here", actual=program.op.kernel[:80])
    for k, output in enumerate(program.outputs):
        _output(program, output, targets, f"{where}.outputs[{k}]")


def _copies(program: Program, where: str) -> None:
    """What is said of the replicas fits their dtypes."""
    if program.average and not averageable(program.dtype):
        fail(f"{where}.average", "is of a dtype that has no mean", actual=program.dtype)
    if len(program.rounded) > len(program.replicas) or (program.average and program.rounded):
        fail(f"{where}.rounded", "has other dtypes than the last replicas", actual=program.rounded)
    if wrong_dtype := next((kind for kind in program.rounded if not roundable(program.dtype, kind)), None):
        fail(f"{where}.rounded", "is no dtype that the pivot is rounded to", actual=wrong_dtype)


def _output(program: Program, output: Output, operands: int, where: str) -> None:
    if len(output.ratio) != len(program.shape) or len(output.shape) != len(program.shape):
        fail(where, "has another number of axes than its pivot")
    wanted = tuple(-(-n // r) for n, r in zip(program.shape, output.ratio, strict=True))
    if output.shape != wanted or (program.op is None and output.shape != program.shape):
        fail(f"{where}.shape", "is not the pivot's over its ratio", expected=wanted, actual=output.shape)
    if not BY_NAME[output.dtype].itemsize:
        fail(f"{where}.dtype", "is packed below a byte", actual=output.dtype)
    for piece in output.scatter:
        _piece(piece, f"{where}.scatter", operands, prod(output.shape))
        _distinct([(n, s) for n, _, s in piece.dims], f"{where}.scatter")
    for piece in output.zeros:
        _region(piece, f"{where}.zeros", operands)


def _piece(piece: Piece, where: str, operands: int, size: int) -> None:
    """In range on the side that is `size` long, and no element of that side twice."""
    if not 0 <= piece.slot < operands:
        fail(where, "names an operand that does not exist", expected=f"0 … {operands - 1}", actual=piece.slot)
    if any(n < 1 or d < 1 for n, d, _ in piece.dims):
        fail(where, "has an extent or stride below 1", actual=piece.dims)
    _distinct([(n, d) for n, d, _ in piece.dims], where)
    last = piece.dst_off + sum((n - 1) * d for n, d, _ in piece.dims)
    if piece.dst_off < 0 or last >= size:
        fail(where, "leaves its tensor", expected=f"0 … {size - 1}", actual=f"{piece.dst_off} … {last}")


def _region(piece: Piece, where: str, operands: int) -> None:
    if not 0 <= piece.slot < operands:
        fail(where, "names an operand that does not exist", expected=f"0 … {operands - 1}", actual=piece.slot)
    if any(n < 1 or d != 0 for n, d, _ in piece.dims):
        fail(where, "is not a region of an operand", actual=piece.dims)
    _distinct([(n, s) for n, _, s in piece.dims], where)


def _distinct(dims: Sequence[tuple[int, int]], where: str) -> None:
    """Each stride steps over everything that the smaller ones reach, so no element is met twice."""
    span = 0
    for extent, stride in sorted(((n, abs(s)) for n, s in dims), key=lambda d: d[1]):
        if extent > 1 and stride <= span:
            fail(where, "meets an element twice", actual=list(dims))
        span += (extent - 1) * stride
        if span > LIMIT:
            fail(where, "leaves its tensor", actual=list(dims))


def _reads(plan: Plan, program: Program, bound: Bindings, where: str) -> None:
    """The last byte that each operand's pieces read lies inside the operand's file."""
    last: dict[int, int] = {}
    for piece in (*program.gather, *(p for r in program.replicas for p in r), *program.padding):
        low = piece.src_off + sum((n - 1) * min(s, 0) for n, _, s in piece.dims)
        high = piece.src_off + sum((n - 1) * max(s, 0) for n, _, s in piece.dims)
        if low < 0 or high > LIMIT:
            fail(where, "reads outside its source tensor", actual=low if low < 0 else high)
        last[piece.slot] = max(last.get(piece.slot, 0), high)
    sizes = np.array([f.nbytes for f in plan.source_files], dtype=np.int64)
    for operand, high in last.items():
        itemsize = BY_NAME[program.operand_dtype(operand)].itemsize
        room = sizes[bound.source_file[:, operand]] - bound.source_offset[:, operand]
        if len(room) and int(room.min()) < (high + 1) * itemsize:
            fail(where, "reads past the end of a source file", expected=f"at most {int(room.min())} bytes", actual=(high + 1) * itemsize)


def _tiles(plan: Plan) -> None:
    tiles = plan.tiles
    rows = np.array([len(b.names) for b in plan.bindings], dtype=np.int64)
    extents = np.zeros((len(plan.programs), 2), dtype=np.int64)
    for number, program in enumerate(plan.programs):
        for k, axis in enumerate(program.cut):
            extents[number, k] = program.shape[axis]
    if (tiles.row >= rows[tiles.program]).any():
        fail("tiles.row", "names a row that its program does not have")
    limit = extents[tiles.program]
    # Unused columns are 0 … 0; a used one holds something unless its axis is empty.
    if ((tiles.lo > tiles.hi) | (tiles.hi > limit) | ((tiles.lo == tiles.hi) & (limit > 0))).any():
        fail("tiles.lo", "and tiles.hi are no boxes of their pivots")
