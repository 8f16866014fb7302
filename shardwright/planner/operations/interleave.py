"""Projections fused row by row: row 0 of each, then row 1 of each, and so on.

Rule: ``stack(parts, axis=1).reshape(n · F, …)``; gate and up of GPT-OSS's experts (source: transformers
``gpt_oss.modeling_gpt_oss.GptOssExperts``: ``gate, up = x[..., ::2], x[..., 1::2]``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..tensor.lazy import LazyTensor, stack
from ._parts import parts_of


def interleave(parts: Sequence[LazyTensor], fields: Mapping[str, Any]) -> LazyTensor:
    """n parts, each ``[F, …]``, as one ``[n·F, …]``."""
    parts_of(parts, len(parts), 1, "interleave")
    rows, rest = parts[0].shape[0], parts[0].shape[1:]
    return stack(parts, axis=1).reshape(len(parts) * rows, *rest)
