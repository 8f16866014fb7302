"""Megatron's fused query, key, value, with or without an output gate: interleaved by key/value group.

Rule: for each of the G groups its R = heads / G query heads, then its R gates where there are any, then its key head, then its
value head: ``cat1(q.view(G, R·D, …), gate.view(G, R·D, …), k.view(G, D, …), v.view(G, D, …)).view(G·(R + R + 2)·D, …)``; biases the
same with the last axis dropped (source: Megatron-core ``attention.SelfAttention.get_query_key_value_tensors``,
``attention_output_gate``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..tensor.lazy import LazyTensor, concat
from ._parts import groups_of, parts_of


def grouped_qkv(parts: Sequence[LazyTensor], fields: Mapping[str, Any]) -> LazyTensor:
    """``[q, k, v]`` or ``[q, gate, k, v]``, each ``[heads·D, …]``, as one tensor of all their rows."""
    parts_of(parts, 4 if len(parts) == 4 else 3, 1, "grouped_qkv")
    groups = groups_of(fields, "num_key_value_heads")
    rest = parts[0].shape[1:]
    fused = concat([p.reshape(groups, p.shape[0] // groups, *rest) for p in parts], axis=1)
    return fused.reshape(fused.shape[0] * fused.shape[1], *rest)
