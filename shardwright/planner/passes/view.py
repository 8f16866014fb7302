"""Views: one tensor as a layout of the source's stored tensors, without a plan.

`hub_view` is a hub tensor; `rank_views` are the tensors that one rank of a target would hold. Both evaluate the rows'
operations on lazy tensors whose leaves already lie in source files, so any slice of the result can be read directly.
Boundary: pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...errors import UnsupportedError
from ..layout import Layout
from ..tensor.lazy import LazyTensor
from .lower import gather_row
from .rows import Expansion, apply_split
from .sides import SourceSide

__all__ = ["View", "hub_view", "rank_views"]


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
        tensors, operands = _parts(side, instance.hub)
        shard = apply_split(row.build(tensors), row.split)[row.split.shard_of(at["tp"])]
        yield View(f"model{instance.chunk}.{instance.name}" if prefixed else instance.name, dtypes.pop(), shard, operands)


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
