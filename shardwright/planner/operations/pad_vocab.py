"""Vocabulary rows padded with zeros to ``padded_vocab_size``, so that tensor parallelism divides them.

Rule: ``ceil(V / (m·T))·m·T`` rows, m = 128 by default (source: Megatron-LM ``training/vocab_utils.py``); the format
computes the number, this operation only pads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import LayoutError
from ..tensor.lazy import LazyTensor
from ._parts import parts_of


def pad_vocab(parts: Sequence[LazyTensor], fields: Mapping[str, Any]) -> LazyTensor:
    """``[V, …]`` as ``[padded_vocab_size, …]``, the new rows zero."""
    (table,) = parts_of(parts, 1, 1, "pad_vocab")
    padded = fields["padded_vocab_size"]
    if padded < table.shape[0]:
        raise LayoutError("the padded vocabulary is smaller than the true one", expected=f"at least {table.shape[0]} rows", actual=padded)
    return table.pad(0, 0, padded - table.shape[0]) if padded > table.shape[0] else table
