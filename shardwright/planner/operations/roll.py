"""Rows turned round: the last ``count`` rows of a table come first.

Rule: ``stored[i] = hub[(i - count) mod rows]``; OPT's positions, which are stored from row 2 on, behind two rows for padding
(source: transformers ``opt.modeling_opt.OPTLearnedPositionalEmbedding``: ``forward(position_ids + self.offset)``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import UsageError, short
from ..tensor.lazy import LazyTensor, concat
from ._parts import parts_of


def roll(parts: Sequence[LazyTensor], fields: Mapping[str, Any], count: int) -> LazyTensor:
    """``[rows, …]`` with its last `count` rows first."""
    (table,) = parts_of(parts, 1, 1, "roll")
    if type(count) is not int or not 0 <= count <= table.shape[0]:
        raise UsageError("operation 'roll' turns a number of the table's rows", expected=f"0 … {table.shape[0]}", actual=short(count))
    head, tail = table.split(0, [table.shape[0] - count, count])
    return concat([tail, head], axis=0)
