"""Views: one tensor as a layout of the source's stored tensors, without a plan.

`hub_view` is a hub tensor. Its leaves already lie in source files, so any slice of it can be read directly.
Boundary: pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..tensor.lazy import LazyTensor
from .lower import averaged, gather_row
from .sides import SourceSide

__all__ = ["View", "hub_view"]


@dataclass(frozen=True, slots=True)
class View:
    """A lazy tensor over operands, and where those lie: (file number, byte offset) each. Where copies are averaged, `copies` are
    the others of the tensor, over the same operands, and its value is the mean of all."""

    name: str
    dtype: str
    tensor: LazyTensor
    operands: tuple[tuple[int, int], ...]
    copies: tuple[LazyTensor, ...] = ()

    def mapped(self, change: Callable[[LazyTensor], LazyTensor]) -> View:
        """The view of what `change` makes of the tensor."""
        return replace(self, tensor=change(self.tensor), copies=tuple([change(copy) for copy in self.copies]))


def hub_view(side: SourceSide, name: str) -> View:
    """A hub tensor."""
    number, row, slot = side.holders[name]
    bound = side.bounds[number]
    found = gather_row(bound, bound.row.shards, slot, bound.row.shapes[slot], 0)
    copies = tuple([LazyTensor(found.tensor.shape, pieces) for pieces in found.replicas]) if averaged(bound) else ()
    operands = tuple(zip(bound.files[row].tolist(), bound.offsets[row].tolist(), strict=True))
    return View(name, side.dtype(name), found.tensor, operands, copies)
