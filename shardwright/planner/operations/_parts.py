"""What operations ask of their parts before they count on it: a table may name any hub tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import UsageError, short
from ..tensor.lazy import LazyTensor

__all__ = ["groups_of", "parts_of"]


def parts_of(parts: Sequence[LazyTensor], count: int, axes: int, name: str) -> Sequence[LazyTensor]:
    """The parts, if there are `count` of them and each has at least that many axes.

    Raises
    ------
    UsageError
        Otherwise.
    """
    if len(parts) != count or any(len(part.shape) < axes for part in parts):
        raise UsageError(
            f"operation {name!r} does not fit the tensors that a row gives it",
            expected=f"{count} of at least {axes} axes",
            actual=", ".join(str(part.shape) for part in parts),
        )
    return parts


def groups_of(fields: Mapping[str, Any], name: str) -> int:
    """A count of heads out of the config's fields.

    Raises
    ------
    UsageError
        The family has no such field, or it is no count.
    """
    groups = fields.get(name)
    if not isinstance(groups, int) or groups < 1:
        raise UsageError(f"an operation needs the config field {name!r}", actual=short(groups))
    return groups
