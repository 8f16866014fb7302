"""Views: one tensor as a layout of the source's stored tensors, without a plan.

`hub_view` is a hub tensor; `rank_views` are the tensors that one rank of a target would hold. Both evaluate the rows'
operations on lazy tensors whose leaves already lie in source files, so any slice of the result can be read directly.
Boundary: pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ...errors import UnsupportedError
from ..layout import Layout
from ..tensor.lazy import LazyTensor
from .lower import averaged, gather_row
from .rows import Expansion, apply_split
from .sides import SourceSide

__all__ = ["View", "hub_view", "rank_views"]


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
    tensors, operands, copies = _parts(side, [name])
    return View(name, side.dtype(name), tensors[0], operands, tuple([copy[0] for copy in copies]))


def rank_views(side: SourceSide, expansion: Expansion, layout: Layout, rank: int, prefixed: bool) -> Iterator[View]:
    """What `rank` of the expansion's layout holds, under the dialect's names.

    With `prefixed`, names of virtual chunks begin with ``model{chunk}.``.
    """
    at = layout.coordinates(rank)
    for instance in expansion.instances:
        if instance.pp != at["pp"] or instance.ep not in (None, at["ep"]):
            continue
        row = expansion.classes[instance.row]
        dtypes = {side.dtype(name) for name in instance.hub}
        if len(dtypes) > 1:
            raise UnsupportedError("tensors that the target joins have different dtypes", tensor=instance.name, actual=sorted(dtypes))
        tensors, operands, copies = _parts(side, instance.hub)
        first, *others = [apply_split(row.build(parts), row.split)[row.split.shard_of(at["tp"])] for parts in (tensors, *copies)]
        name = f"model{instance.chunk}.{instance.name}" if prefixed else instance.name
        yield View(name, dtypes.pop(), first, operands, tuple(others))


def _parts(side: SourceSide, names: Sequence[str]) -> tuple[list[LazyTensor], tuple[tuple[int, int], ...], list[list[LazyTensor]]]:
    """Hub tensors over one list of operands, and their further copies where those are averaged."""
    base: dict[tuple[int, int], int] = {}
    operands: list[tuple[int, int]] = []
    tensors: list[LazyTensor] = []
    copies: list[list[LazyTensor]] = []
    for name in names:
        number, row, slot = side.holders[name]
        bound = side.bounds[number]
        if (number, row) not in base:
            base[number, row] = len(operands)
            operands += zip(bound.files[row].tolist(), bound.offsets[row].tolist(), strict=True)
        found = gather_row(bound, bound.row.shards, slot, bound.row.shapes[slot], base[number, row])
        tensors.append(found.tensor)
        if averaged(bound):
            if len(names) > 1:
                raise UnsupportedError("the target joins a tensor whose copies are averaged with others", tensor=name)
            copies = [[LazyTensor(found.tensor.shape, pieces)] for pieces in found.replicas]
    return tensors, tuple(operands), copies
