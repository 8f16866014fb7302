"""A matrix stored ``[in, out]`` instead of ``[out, in]``. Declared by the row, never guessed from a shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..tensor.lazy import LazyTensor
from ._parts import parts_of


def transpose(parts: Sequence[LazyTensor], fields: Mapping[str, Any]) -> LazyTensor:
    """``[out, in]`` as ``[in, out]``."""
    (matrix,) = parts_of(parts, 1, 2, "transpose")
    return matrix.T
