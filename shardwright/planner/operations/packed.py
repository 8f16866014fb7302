"""Projections fused by rows, unequal ones too: each tensor-parallel rank holds its share of the first, the second, and so on.

Rule: rank t holds ``cat0(p.chunk(T)[t] for p in parts)``; with one rank, plainly ``cat0(parts)``: ``[q; k; v]`` with fewer
key/value rows than query rows, or ``[gate; up]`` (source: transformers ``packed_colwise``; vLLM ``QKVParallelLinear``; Megatron-core
``mlp.MLP`` with ``gated_linear_unit``: each rank chunks its own output in two).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import LayoutError
from ..tensor.lazy import LazyTensor, concat
from ._parts import parts_of


def packed(parts: Sequence[LazyTensor], fields: Mapping[str, Any]) -> LazyTensor:
    """Parts ``[F₁, …], [F₂, …], …`` as one ``[F₁ + F₂ + …, …]`` whose T equal row blocks are the ranks' tensors."""
    tp = fields["tp"]
    for part in parts_of(parts, len(parts), 1, "packed"):
        if part.shape[0] % tp:
            raise LayoutError(f"tp {tp} does not divide a fused part's rows", expected=f"a multiple of {tp}", actual=part.shape[0])
    fused = concat([p.reshape(tp, p.shape[0] // tp, *p.shape[1:]) for p in parts], axis=1)
    return fused.reshape(tp * fused.shape[1], *parts[0].shape[1:])
