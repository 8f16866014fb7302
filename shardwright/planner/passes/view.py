"""Views: one tensor as a layout of the source's stored tensors, without a plan.

`hub_view` is a hub tensor. Its leaves already lie in source files, so any slice of it can be read directly.
Boundary: pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..tensor.lazy import LazyTensor
from .lower import gather_row
from .sides import SourceSide

__all__ = ["View", "hub_view"]


@dataclass(frozen=True, slots=True)
class View:
    """A lazy tensor over operands, and where those lie: (file number, byte offset) each."""

    name: str
    dtype: str
    tensor: LazyTensor
    operands: tuple[tuple[int, int], ...]


def hub_view(side: SourceSide, name: str) -> View:
    """A hub tensor."""
    tensors, operands = _parts(side, [name])
    return View(name, side.dtype(name), tensors[0], operands)


def _parts(side: SourceSide, names: Sequence[str]) -> tuple[list[LazyTensor], tuple[tuple[int, int], ...]]:
    """Hub tensors over one list of operands."""
    base: dict[tuple[int, int], int] = {}
    operands: list[tuple[int, int]] = []
    tensors = []
    for name in names:
        number, row, slot = side.holders[name]
        bound = side.bounds[number]
        if (number, row) not in base:
            base[number, row] = len(operands)
            operands += zip(bound.files[row].tolist(), bound.offsets[row].tolist(), strict=True)
        tensors.append(gather_row(bound, bound.row.shards, slot, bound.row.shapes[slot], base[number, row]).tensor)
    return tensors, tuple(operands)
