"""Whether boxes share an element: exact, and in work that is counted.

1. Boxes are separated along an axis wherever their hulls leave a gap, group by group, until no axis separates a group.
   Whatever is cut into ranges, rows and columns falls apart this way.
2. Boxes that stay together interleave. Each two of them are compared: they share an element if and only if their index
   sets meet on every axis.
3. An index set is a sum of progressions. Of two sets, the one with the widest steps is taken apart, only where its parts
   can meet the other's hull; two single progressions meet where a congruence says so.

A saved plan may have been made so that this takes long, so each step is taken from an `Allowance` in proportion to the
plan. Boundary: pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import gcd
from typing import NamedTuple

from ...errors import PlanError
from ..tensor.pieces import Box

__all__ = ["Allowance", "clash"]

Steps = tuple[tuple[int, int], ...]
"""``(extent, step)`` of each progression of an index set, widest first."""


@dataclass(slots=True)
class Allowance:
    """Steps that are left for a proof."""

    left: int

    def spend(self, steps: int) -> None:
        """Take steps.

        Raises
        ------
        PlanError
            There are no more.
        """
        self.left -= steps
        if self.left < 0:
            raise PlanError("the plan is too ragged for its size to be proven", remedy="Plan again")


class _Hulled(NamedTuple):
    """A box with its first and last coordinate and its progressions on each axis."""

    box: Box
    first: tuple[int, ...]
    last: tuple[int, ...]
    steps: tuple[Steps, ...] = ()


def clash(boxes: Sequence[Box], allowance: Allowance) -> tuple[Box, Box] | None:
    """Two of the boxes that share an element, or None.

    >>> rows = [Box(0, (0, 0), 0, ((0, 4, 2, 1), (1, 8, 1, 1))), Box(0, (1, 0), 0, ((0, 4, 2, 1), (1, 8, 1, 1)))]
    >>> clash(rows, Allowance(100)) is None, clash([rows[0], rows[0]], Allowance(100)) is None
    (True, False)
    """
    pending = [[_hulled(box) for box in boxes]] if len(boxes) > 1 else []
    while pending:
        group = pending.pop()
        parts = _separated(group, allowance)
        if len(parts) > 1:
            pending += [part for part in parts if len(part) > 1]
            continue
        stepped = [hulled._replace(steps=tuple(_steps(hulled.box, axis) for axis in range(len(hulled.first)))) for hulled in group]
        for one, two in combinations(stepped, 2):
            allowance.spend(1)
            if all(_meet(one, two, axis, allowance) for axis in range(len(one.first))):
                return one.box, two.box
    return None


def _hulled(box: Box) -> _Hulled:
    last = list(box.start)
    for axis, extent, step, _ in box.dims:
        last[axis] += (extent - 1) * step
    return _Hulled(box, box.start, tuple(last))


def _separated(group: list[_Hulled], allowance: Allowance) -> list[list[_Hulled]]:
    """The group in parts that are apart on some axis, or whole."""
    for axis in range(len(group[0].first)):
        allowance.spend(len(group))
        ordered = sorted(group, key=lambda hulled: hulled.first[axis])
        parts, end = [[ordered[0]]], ordered[0].last[axis]
        for hulled in ordered[1:]:
            if hulled.first[axis] > end:
                parts.append([])
            parts[-1].append(hulled)
            end = max(end, hulled.last[axis])
        if len(parts) > 1:
            return parts
    return [group]


def _meet(one: _Hulled, two: _Hulled, axis: int, allowance: Allowance) -> bool:
    """Whether the boxes share a coordinate of `axis`."""
    if one.last[axis] < two.first[axis] or two.last[axis] < one.first[axis]:
        return False
    return _share(one.first[axis], one.steps[axis], two.first[axis], two.steps[axis], allowance)


def _steps(box: Box, axis: int) -> Steps:
    return tuple(sorted(((n, m) for k, n, m, _ in box.dims if k == axis and n > 1 and m), key=lambda d: -d[1]))


def _share(a: int, one: Steps, b: int, two: Steps, allowance: Allowance) -> bool:
    """Whether the index sets that begin at `a` and `b` have a member in common."""
    allowance.spend(1)
    if len(one) < 2 and len(two) < 2:
        return _progressions_meet(a, *(one[0] if one else (1, 1)), b, *(two[0] if two else (1, 1)))
    if not one or (two and two[0][1] > one[0][1]):
        a, one, b, two = b, two, a, one
    (extent, step), inner = one[0], one[1:]
    span, end = _span(inner), b + _span(two)
    touched = range(max(0, -((a + span - b) // step)), min(extent, (end - a) // step + 1))
    return any(_share(a + i * step, inner, b, two, allowance) for i in touched)


def _span(steps: Steps) -> int:
    return sum((n - 1) * m for n, m in steps)


def _progressions_meet(a: int, n: int, step: int, b: int, m: int, other: int) -> bool:
    """Whether ``a + i·step`` (``i < n``) and ``b + j·other`` (``j < m``) have a value in common.

    >>> _progressions_meet(0, 5, 4, 2, 5, 6), _progressions_meet(0, 2, 4, 2, 5, 6), _progressions_meet(0, 9, 4, 3, 9, 6)
    (True, False, False)
    """
    common = gcd(step, other)
    if (b - a) % common:
        return False
    period = step // common * other
    first = a + step * ((b - a) // common * pow(step // common, -1, other // common) % (other // common))
    low = max(a, b)
    first += -((first - low) // period) * period
    return first <= min(a + (n - 1) * step, b + (m - 1) * other)
