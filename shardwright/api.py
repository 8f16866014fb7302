"""The hall: where the planner and the executors meet.

Its rooms are `checkpoint`, `conversion`, `verification` and `difference`.

`register` adds parts from outside the package.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, PathLike, Tensor, find_family, open
from .conversion import Conversion, convert, load_plan, plan
from .difference import DiffReport, diff
from .errors import UsageError
from .planner.containers import CONTAINERS
from .planner.formats import FORMATS
from .planner.operations import OPERATIONS
from .planner.schemes import SCHEMES
from .planner.tables import DIALECTS, FAMILIES, load_dialect, load_family
from .planner.tensor.lazy import LazyTensor
from .sizes import parse_size
from .verification import Verification, verify

__all__ = [
    "Checkpoint",
    "Conversion",
    "DiffReport",
    "Tensor",
    "Verification",
    "convert",
    "diff",
    "find_family",
    "load_plan",
    "open",
    "parse_size",
    "plan",
    "register",
    "verify",
]


def register(
    *, family: PathLike | None = None, dialect: PathLike | None = None, operation: Callable[..., LazyTensor] | None = None, **parts: Any
) -> None:
    """Add parts from outside the package, each under its own name.

    Parameters
    ----------
    family, dialect
        Path of a table.
    operation
        A layout operation; its ``__name__`` is what tables call it.
    parts
        ``format=``, ``container=``, ``scheme=``: an object with the protocol's members.
    """
    if family is not None:
        table = load_family(Path(family))
        FAMILIES.add(table.name, table)
    if dialect is not None:
        words = load_dialect(Path(dialect))
        DIALECTS.add(words.name, words)
    if operation is not None:
        OPERATIONS.add(operation.__name__, operation)
    registries: dict[str, Any] = {"format": FORMATS, "container": CONTAINERS, "scheme": SCHEMES}
    for kind, part in parts.items():
        if kind not in registries:
            raise UsageError(f"there is no kind of part {kind!r}", remedy=f"Known: family, dialect, operation, {', '.join(registries)}")
        registries[kind].add(part.name, part)
