"""The fused query, key, value of Megatron's old checkpoint versions.

Rule: with np of the n heads on a rank and head size hn, a rank's rows are ``[3, np, hn]`` in checkpoint version 0 and
``[np, hn, 3]`` in version 1.0; biases the same with the last axis dropped. From version 2.0 on they are ``[np, 3, hn]``, which
is `grouped_qkv`. (Source: DeepSpeed ``runtime/state_dict_factory.py``, ``merge_query_key_value``; Megatron-LM
``training/checkpointing.py``, ``fix_query_key_value_ordering``.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import UnsupportedError, UsageError, short
from ..tensor.lazy import LazyTensor
from ._parts import groups_of, parts_of
from .interleave import interleave
from .packed import packed


def qkv_order(parts: Sequence[LazyTensor], fields: Mapping[str, Any], version: int) -> LazyTensor:
    """``[q, k, v]``, each ``[heads·D, …]``, as one ``[3·heads·D, …]`` whose T equal row blocks are the ranks' tensors.

    Raises
    ------
    UnsupportedError
        There are fewer key/value heads than heads: these orders are of equal thirds.
    """
    parts_of(parts, 3, 1, "qkv_order")
    if version not in (0, 1):
        raise UsageError("operation 'qkv_order' knows checkpoint versions 0 and 1", actual=short(version))
    if groups_of(fields, "num_key_value_heads") != groups_of(fields, "num_attention_heads"):
        raise UnsupportedError(
            f"checkpoint version {version} has no grouped-query attention: q, k and v are equal thirds",
            expected=f"{fields['num_attention_heads']} key/value heads",
            actual=fields["num_key_value_heads"],
            remedy="Take a spec of checkpoint version 2.0 and above: one without -v0 or -v1",
        )
    return packed(parts, fields) if version == 0 else interleave(parts, fields)
