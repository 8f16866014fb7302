"""Experts in one tensor: a new first axis that counts them.

Rule: ``stack([part(e) for e in experts])``; a rank's stack holds its own experts, in order (source: transformers
``core_model_loading.MergeModulelist``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..tensor.lazy import LazyTensor, stack


def stack_experts(parts: Sequence[LazyTensor], fields: Mapping[str, Any]) -> LazyTensor:
    """One ``[…]`` per expert as ``[experts, …]``. Always a row's last operation: those before it make each expert's part."""
    return stack(parts, axis=0)
