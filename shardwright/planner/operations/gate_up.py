"""Megatron's fused gate and up projection: interleaved by tensor-parallel rank.

Rule: rank t holds ``cat0(gate.chunk(T)[t], up.chunk(T)[t])``, so the whole tensor, cut into T row blocks, depends on T
(source: Megatron-core ``mlp.MLP`` with ``gated_linear_unit``: each rank chunks its own output in two).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import LayoutError
from ..tensor.lazy import LazyTensor, concat
from ._parts import parts_of


def gate_up(parts: Sequence[LazyTensor], fields: Mapping[str, Any]) -> LazyTensor:
    """``[gate, up]``, each ``[F, …]``, as one ``[2·F, …]`` whose T equal row blocks are the ranks' tensors."""
    tp = fields["tp"]
    parts_of(parts, 2, 1, "gate_up")
    rows, rest = parts[0].shape[0], parts[0].shape[1:]
    if rows % tp:
        raise LayoutError(f"tp {tp} does not divide the feed-forward rows", expected=f"a multiple of {tp}", actual=rows)
    fused = concat([p.reshape(tp, rows // tp, *rest) for p in parts], axis=1)
    return fused.reshape(2 * rows, *rest)
