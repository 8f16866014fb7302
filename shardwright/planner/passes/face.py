"""Facing two checkpoints: where each hub tensor lies on either side.

1. Bind each side's rows to its headers. Of a quantised side a tensor that its scheme took is read as what is stored
   instead of it (payload, scales), each as a tensor under the hub's name and the scheme's suffix.
2. Pair the names that both sides have with equal shapes; the others are listed.
3. Lower each distinct pair once: pieces that gather either side, and what decides its boxes (`facing`).

Copies (replicas of a tensor over ranks, tied tensors stored twice) belong to their half, to be read and compared with it.
Rows that only pad the vocabulary belong to no tensor and are not read.
Boundary: headers and metadata only, through the sources' stores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import lcm, prod

import numpy as np

from ...errors import PlanError, UnsupportedError
from ..formats.base import Source
from ..plan import Bindings, Output, Plan, Program, SourceFile, ValueOp
from ..schemes import Scheme, SchemeOutput
from ..tensor.lazy import leaf
from ..tensor.pieces import Piece, count
from .build import no_collector, read_names, read_side, source_rows
from .facing import Facing, Half, Part, Unequal
from .lower import averaged, gather_row
from .rows import Expansion, RowClass, RowInstance, apply_split
from .sides import Bound, SourceSide, resolve
from .tiling import tile

__all__ = ["face"]

_FLOATS = ("bfloat16", "float16", "float32", "float64")

Shape = tuple[int, ...]
Places = list[tuple[int, int]]


def face(one: Source, two: Source, *, values: bool) -> Facing:
    """Pair the tensors of two checkpoints.

    Parameters
    ----------
    values
        Compare the values of quantised tensors. Otherwise, where both sides have one scheme, what is stored is compared:
        payloads and scales as tensors of their own.

    Raises
    ------
    CheckpointError
        A side has missing, unknown or wrongly shaped tensors.
    UnsupportedError
        A side's values cannot be computed from what is stored.
    """
    with no_collector():
        stored = not values and one.scheme is not None and one.scheme is two.scheme
        sides = _Side(one, stored), _Side(two, stored)
        names = [dict.fromkeys(side.names()) for side in sides]
        drafts: dict[object, _Draft] = {}
        shapes = []
        for name in names[0]:
            if name not in names[1]:
                continue
            found = sides[0].shape(name), sides[1].shape(name)
            if found[0] != found[1]:
                shapes.append(Unequal(name, found, (sides[0].dtype(name), sides[1].dtype(name))))
                continue
            key = tuple(side.key(name) for side in sides)
            if key not in drafts:
                drafts[key] = _Draft(name, sides[0].half(name), sides[1].half(name))
            drafts[key].add(name, sides[0].places(name), sides[1].places(name))
        lowered = [draft.lowered() for draft in drafts.values()]
        files = tuple(_fingerprints(source) for source in (one, two))
        plan = Plan({}, one.store.root, {}, files[0], (), (), tuple(p for p, _ in lowered), tuple(b for _, b in lowered), _NO_TILES, (), ())
        return Facing(
            plan,
            tuple((draft.one, draft.two) for draft in drafts.values()),
            (one.store.root, two.store.root),
            (files[0], files[1]),
            tuple(name for name in names[0] if name not in names[1]),
            tuple(name for name in names[1] if name not in names[0]),
            tuple(shapes),
            (sides[0].dropped, sides[1].dropped),
        )


_NO_TILES = tile((), (), ())


def _fingerprints(source: Source) -> tuple[SourceFile, ...]:
    stats = ((path, digest, source.store.stat(path)) for path, digest in source.files.items())
    return tuple(SourceFile(path, stat.nbytes, stat.mtime_ns, digest) for path, digest, stat in stats)


class _Side:
    """One checkpoint's stored tensors under hub names.

    Parameters
    ----------
    stored
        Whether what a scheme stores counts as tensors of their own.
    """

    def __init__(self, source: Source, stored: bool) -> None:
        self.source, self.stored = source, stored
        self.taken: dict[str, tuple[SchemeOutput, ...]] = {}
        if source.scheme is None:
            self.side: SourceSide = read_side(source)
        else:
            read_names(source)  # payloads and scales are there and fit
            self.side = self._read_quantised(source, source.scheme)
        self.dropped = (*source.dropped, *self.side.dropped)

    def _read_quantised(self, source: Source, scheme: Scheme) -> SourceSide:
        """The rows, and one more for each further output of a tensor that the scheme took."""
        read = source_rows(source)
        classes, instances = list(read.classes), list(read.instances)
        known: dict[tuple[int, int], int] = {}
        for at in read.instances:
            row = read.classes[at.row]
            before = next((d for d in _FLOATS if scheme.takes(at.hub[0], row.shapes[0], d)), None)
            if before is None or row.alias:
                continue
            if row.whole != leaf(0, row.shapes[0]):
                raise UnsupportedError(f"scheme {scheme.name!r} cannot be read in a fused or padded tensor", tensor=at.name)
            # The order of outputs, not their dtypes, is what is used: those are as stored.
            outputs = self.taken[at.hub[0]] = tuple(scheme.outputs(at.hub[0], row.shapes[0], before))
            for number, output in enumerate(outputs[1:]):
                if (at.row, number) not in known:
                    known[at.row, number] = len(classes)
                    classes.append(_scale_class(row, output, output.name.removeprefix(at.hub[0])))
                suffix = output.name.removeprefix(at.hub[0])
                instances.append(RowInstance(known[at.row, number], at.name + suffix, (output.name,), at.pp, at.ep, at.chunk))
        numbers = {path: i for i, path in enumerate(source.files)}
        ignore = (*source.dialect.ignore, *(entry.of(source.config.fields) for entry in source.family.ignore))
        return resolve(Expansion(tuple(classes), tuple(instances)), source.layout, source.units, numbers, ignore, source.dialect.name)

    def names(self) -> Iterator[str]:
        """Tensors in the hub's order, a quantised one followed by its scales where those count."""
        for name in self.source.hub:
            yield name
            if self.stored:
                yield from (output.name for output in self.taken.get(name, ())[1:])

    def shape(self, name: str) -> Shape:
        bound, _, slot = self._at(name)
        return bound.row.shapes[slot]

    def dtype(self, name: str) -> str:
        return self.side.dtype(name)

    def key(self, name: str) -> object:
        """Equal for tensors that are read alike."""
        found = []
        for part in self._parts(name):
            number, _, slot = self.side.holders[part]
            found.append((number, slot, tuple([a for a, _ in self.side.aliases.get(part, ())])))
        return tuple(found)

    def places(self, name: str) -> Places:
        """(file, offset) of every operand of the half."""
        found: Places = []
        for part in self._parts(name):
            number, row, _ = self.side.holders[part]
            for bound, at in ((number, row), *self.side.aliases.get(part, ())):
                held = self.side.bounds[bound]
                found += zip(held.files[at].tolist(), held.offsets[at].tolist(), strict=True)
        return found

    def half(self, name: str) -> Half:
        names = self._parts(name)
        ones = (1,) * len(self.shape(name))
        ratios = [output.ratio for output in self.taken[name]] if len(names) > 1 else [ones]
        parts, base = [], 0
        for part, ratio in zip(names, ratios, strict=True):
            program, width = self._program(part, base)
            parts.append(Part(program, ratio))
            base += width
        return Half(tuple(parts), self._kernel(name) if name in self.taken and not self.stored else None)

    def _parts(self, name: str) -> tuple[str, ...]:
        if self.stored or name not in self.taken:
            return (name,)
        return (name, *(output.name for output in self.taken[name][1:]))

    def _kernel(self, name: str) -> str:
        scheme = self.source.scheme
        kernel: str | None = getattr(scheme, "dequantise", None)
        if scheme is None or kernel is None:
            raise UnsupportedError(
                f"scheme {scheme.name if scheme else None!r} does not say how its values are computed",
                file=self.source.store.root,
                tensor=name,
                remedy="Compare two checkpoints of this scheme bit by bit (without a tolerance)",
            )
        return kernel

    def _at(self, name: str) -> tuple[Bound, int, int]:
        number, row, slot = self.side.holders[name]
        return self.side.bounds[number], row, slot

    def _program(self, name: str, base: int) -> tuple[Program, int]:
        """A stored tensor over operands ``base …``, and how many those are."""
        bound, _, slot = self._at(name)
        shape = bound.row.shapes[slot]
        found = gather_row(bound, bound.row.shards, slot, shape, base)
        copies: list[tuple[Piece, ...]] = list(found.replicas)
        mean = averaged(bound) and bool(copies)
        width = bound.files.shape[1]
        for number, _ in self.side.aliases.get(name, ()):
            tied = self.side.bounds[number]
            more = gather_row(tied, tied.row.shards, 0, shape, base + width)
            copies += [more.tensor.pieces, *more.replicas]
            width += tied.files.shape[1]
        if sum(map(count, found.tensor.pieces)) != prod(shape):
            raise PlanError("the stored tensors do not cover a tensor", tensor=name, expected=prod(shape), file=self.source.store.root)
        label = bound.row.hub[slot]
        return Program(label, bound.dtype, shape, found.tensor.pieces, tuple(copies), (), None, (), (), False, average=mean), width


def _scale_class(row: RowClass, output: SchemeOutput, suffix: str) -> RowClass:
    """The row of a scheme's further output, split over ranks as its tensor is, or repeated where it has no such axis."""
    whole, split = leaf(0, output.shape), row.split
    if split.axis is not None and output.shape[split.axis] == 1:
        split = replace(split, axis=None, parts=1, repeat=split.parts * split.repeat)
    shards = tuple(apply_split(whole, split))
    return RowClass(row.label + suffix, (row.hub[0] + suffix,), (output.shape,), whole, split, shards, row.build, False)


class _Draft:
    """A pair of halves while its tensors are collected."""

    def __init__(self, label: str, one: Half, two: Half) -> None:
        self.label, self.one, self.two = label, one, two
        self.names: list[str] = []
        self.rows: tuple[list[Places], list[Places]] = ([], [])

    def add(self, name: str, one: Places, two: Places) -> None:
        self.names.append(name)
        self.rows[0].append(one)
        self.rows[1].append(two)

    def lowered(self) -> tuple[Program, Bindings]:
        one, two = self.one.parts[0].program, self.two.parts[0].program
        ones = (1,) * len(one.shape)
        # Boxes are cut where no part of either side is cut inside an element.
        ratios = [part.ratio for half in (self.one, self.two) for part in half.parts]
        block = tuple(lcm(*(_unit(ratio, axis, one.shape) for ratio in ratios)) for axis in range(len(ones)))
        op = ValueOp("values", "", block, 0) if self.one.kernel or self.two.kernel else None
        program = Program(
            self.label, one.dtype, one.shape, one.gather, (), (), op, (Output(two.dtype, two.shape, ones, two.gather),), (), False
        )
        columns = [np.array(rows, dtype=np.int64).reshape(len(self.names), -1, 2) for rows in self.rows]
        places = [np.ascontiguousarray(column[:, :, k]) for column in columns for k in (0, 1)]
        return program, Bindings(tuple(self.names), *places)


def _unit(ratio: Shape, axis: int, shape: Shape) -> int:
    """Rows of an axis that share an element of a part; where all of them do, any may be cut off."""
    return ratio[axis] if ratio[axis] < shape[axis] else 1
