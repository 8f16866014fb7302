"""Differences: two checkpoints of any formats and layouts, tensor against tensor under their hub names.

1. Pair the hub tensors of both (headers only); names and shapes that differ are known then.
2. Stream the pairs through `shardwright.executors.diff` inside the memory bound.
3. Say per tensor what differs, and whether it counts: without a tolerance any bit and any dtype does; with one, only values
   that are farther apart, while dtypes and smaller differences are told and do not count.

Configs, families, layouts and formats are told, too, and never count: two checkpoints are equal if their tensors are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint, PathLike, open
from .errors import UsageError
from .planner.layout import Layout
from .planner.passes.face import face
from .planner.passes.facing import Facing
from .planner.plan import Dropped
from .planner.tables import Family
from .sizes import parse_size

if TYPE_CHECKING:
    from .executors.diff import Result
    from .executors.elements import Found, Spot
    from .executors.progress import Progress

__all__ = ["ConfigDifference", "CopyDifference", "DiffReport", "DiffSide", "Element", "TensorDifference", "diff"]

Shape = tuple[int, ...]
Value = float | int | complex


@dataclass(frozen=True, slots=True)
class Element:
    """One element on both sides: its index, and its values (of a quantised tensor: what the stored numbers stand for)."""

    index: Shape
    values: tuple[Value, Value]


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """A tensor that is not the same on both sides.

    Attributes
    ----------
    shapes, dtypes
        Of both sides, as stored. Tensors of unequal shapes are not read.
    elements, differing
        How many there are, and how many of them differ by more than the tolerance (or in any bit).
    first
        The first that does, row-major.
    largest
        Largest absolute difference of any two values, within the tolerance or not; infinite between a NaN and a number.
    largest_at
        The first element that has it; None where all values are equal (bits of zeros and NaNs may differ).
    relative
        Largest difference relative to the larger magnitude of the two values.
    """

    name: str
    shapes: tuple[Shape, Shape]
    dtypes: tuple[str, str]
    elements: int
    differing: int = 0
    first: Element | None = None
    largest: float | int = 0
    largest_at: Element | None = None
    relative: float = 0.0

    @property
    def what(self) -> tuple[str, ...]:
        """``"shape"``, ``"dtype"``, ``"values"``: what differs."""
        facts = {
            "shape": self.shapes[0] != self.shapes[1],
            "dtype": self.dtypes[0] != self.dtypes[1],
            "values": self.differing > 0 or self.largest > 0,
        }
        return tuple(name for name, differs in facts.items() if differs)


@dataclass(frozen=True, slots=True)
class ConfigDifference:
    """A canonical config field with two values; None where a side's family has no such field."""

    field: str
    values: tuple[Any, Any]


@dataclass(frozen=True, slots=True)
class CopyDifference:
    """A side stores copies of one tensor (on several ranks, or tied) that are not equal; `index` is the first such element."""

    path: str
    name: str
    index: Shape


@dataclass(frozen=True, slots=True)
class DiffSide:
    """What one side is. `dropped`: what is stored there and was not compared, and why."""

    path: str
    format: str
    dialect: str
    container: str
    layout: Layout
    family: str
    padded_vocab: int | None
    quantization: str | None
    dropped: tuple[Dropped, ...]


@dataclass(frozen=True, slots=True)
class DiffReport:
    """What `diff` found.

    Attributes
    ----------
    tolerance
        As given.
    sides
        What the two checkpoints are.
    tensors, equal
        Names on either side, and those that are on both and do not differ at all.
    different
        Tensors with a difference that counts.
    within
        Tensors whose dtype alone differs or whose values differ by no more than the tolerance; only with a tolerance.
    missing, extra
        Names that only the first, only the second side has.
    copies
        Copies within one side that are not equal; they count as a difference.
    config
        Config fields that differ; they do not count.
    """

    tolerance: float | None
    sides: tuple[DiffSide, DiffSide]
    tensors: int
    equal: int
    different: tuple[TensorDifference, ...]
    within: tuple[TensorDifference, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    copies: tuple[CopyDifference, ...]
    config: tuple[ConfigDifference, ...]

    @property
    def ok(self) -> bool:
        """Whether no difference counts."""
        return not (self.different or self.missing or self.extra or self.copies)


def diff(
    a: Checkpoint | PathLike,
    b: Checkpoint | PathLike,
    *,
    tolerance: float | None = None,
    family: str | Family | PathLike | None = None,
    config: PathLike | Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
    drop: str | Sequence[str] = (),
    memory: int | str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> DiffReport:
    """Compare two checkpoints, whatever their formats and layouts.

    Vocabulary padding belongs to no tensor and is not compared. A checkpoint whose embeddings are tied has no
    ``lm_head.weight``; one that stores it apart has it as ``extra`` (or ``missing``).

    Parameters
    ----------
    tolerance
        Largest absolute difference between two values that counts as none. Values are compared as float64 (64-bit
        integers exactly); two NaNs are equal. A quantised tensor stands for its dequantised values, so that it can be
        compared with the original.

        None compares bits: ``-0.0`` and ``0.0`` differ, and so do NaNs of unequal payloads. Unequal dtypes are a
        difference, and values are compared nonetheless to tell whether they differ as well. Two checkpoints quantised
        by one scheme are compared as stored: payloads and scales as tensors of their own.
    family, config, vocab_size, drop
        As for `open`, of both; open them yourself where they need different hints.
    memory, workers
        As for `plan`.

    Raises
    ------
    UsageError
        The tolerance is negative or not finite.
    Refusal
        A side cannot be opened, or its values cannot be computed.
    RunError
        A file cannot be read; a signal came.
    """
    from .executors.diff import diff as compare
    from .executors.host import default_memory, default_workers

    if tolerance is not None and not (0 <= tolerance < math.inf):
        raise UsageError("a tolerance is a number from 0 on", actual=tolerance)
    if workers is not None and workers < 1:
        raise UsageError("workers must be at least 1", actual=workers)
    hints: dict[str, Any] = {"family": family, "config": config, "vocab_size": vocab_size, "drop": drop}
    one, two = (side if isinstance(side, Checkpoint) else open(side, **hints) for side in (a, b))
    facing = face(one.source, two.source, values=tolerance is not None)
    found = compare(
        facing,
        tolerance=tolerance,
        memory=default_memory() if memory is None else parse_size(memory),
        workers=default_workers() if workers is None else workers,
        progress=progress,
    )
    return _report((one, two), facing, found, tolerance)


def _report(pair: tuple[Checkpoint, Checkpoint], facing: Facing, found: Result, tolerance: float | None) -> DiffReport:
    different = [TensorDifference(s.name, s.shapes, s.dtypes, 0) for s in facing.shapes]
    within: list[TensorDifference] = []
    shapes: dict[str, Shape] = {}
    for program, halves, bound in zip(facing.plan.programs, facing.halves, facing.plan.bindings, strict=True):
        dtypes = halves[0].dtype, halves[1].dtype
        for name in bound.names:
            shapes[name] = program.shape
            here = found.tensors.get(name)
            if here is None and dtypes[0] == dtypes[1]:
                continue
            entry = _tensor(name, program.shape, dtypes, here)
            counts = entry.differing > 0 or (tolerance is None and dtypes[0] != dtypes[1])
            (different if counts else within).append(entry)
    order = {name: number for number, name in enumerate(pair[0])}

    def by_name(entry: TensorDifference | CopyDifference) -> tuple[int, str]:
        # A scale is no hub tensor: it follows the tensor whose name its own begins with.
        return order.get(entry.name, order.get(entry.name.rpartition("_")[0], len(order))), entry.name

    copies = [CopyDifference(facing.roots[side], name, _index(at, shapes[name])) for (side, name), at in found.copies.items()]
    return DiffReport(
        tolerance,
        (_side(pair[0], facing.dropped[0]), _side(pair[1], facing.dropped[1])),
        len(shapes) + len(facing.shapes) + len(facing.missing) + len(facing.extra),
        len(shapes) + len(facing.shapes) - len(different) - len(within),
        tuple(sorted(different, key=by_name)),
        tuple(sorted(within, key=by_name)),
        facing.missing,
        facing.extra,
        tuple(sorted(copies, key=by_name)),
        _configs(*pair),
    )


def _tensor(name: str, shape: Shape, dtypes: tuple[str, str], found: Found | None) -> TensorDifference:
    if found is None:
        return TensorDifference(name, (shape, shape), dtypes, math.prod(shape))
    first, largest_at = (_element(spot, shape) for spot in (found.first, found.largest_at))
    return TensorDifference(
        name, (shape, shape), dtypes, math.prod(shape), found.differing, first, found.largest, largest_at, found.relative
    )


def _element(spot: Spot | None, shape: Shape) -> Element | None:
    return None if spot is None else Element(_index(spot.place, shape), (spot.one, spot.two))


def _index(flat: int, shape: Shape) -> Shape:
    """Coordinates of a flat row-major index.

    >>> _index(7, (2, 4))
    (1, 3)
    """
    found = []
    for extent in reversed(shape):
        flat, at = divmod(flat, extent)
        found.append(at)
    return tuple(reversed(found))


def _side(checkpoint: Checkpoint, dropped: tuple[Dropped, ...]) -> DiffSide:
    source = checkpoint.source
    return DiffSide(
        checkpoint.path,
        checkpoint.format,
        source.dialect.name,
        source.container,
        checkpoint.layout,
        checkpoint.family,
        source.padded_vocab,
        source.scheme.name if source.scheme else None,
        dropped,
    )


def _configs(one: Checkpoint, two: Checkpoint) -> tuple[ConfigDifference, ...]:
    x, y = one.config.fields, two.config.fields
    names = dict.fromkeys((*x, *y))
    return tuple(ConfigDifference(name, (x.get(name), y.get(name))) for name in names if x.get(name) != y.get(name))
