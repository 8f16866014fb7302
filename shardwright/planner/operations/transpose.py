"""A matrix stored ``[in, out]`` instead of ``[out, in]``. Declared by the row, never guessed from a shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import UsageError
from ..tensor.lazy import LazyTensor


def transpose(parts: Sequence[LazyTensor], fields: Mapping[str, Any]) -> LazyTensor:
    """``[out, in]`` as ``[in, out]``."""
    (matrix,) = parts
    if len(matrix.shape) != 2:
        raise UsageError("transpose is for matrices", actual=matrix.shape)
    return matrix.T
