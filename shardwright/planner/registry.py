"""One registry per kind of part: formats, dialects, families, containers, schemes, operations.

A part is registered under its name, once; built-in parts are registered by the package that holds them, others by
whoever brings them (`shardwright.register`). A look-up that fails lists the nearest names.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Generic, TypeVar

from ..errors import Refusal, UsageError

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """Parts of one kind by name, in the order they were registered.

    Parameters
    ----------
    kind
        What a part is called in messages.
    missing
        Error raised for an unknown name.
    """

    def __init__(self, kind: str, missing: type[Refusal] | type[UsageError] = UsageError) -> None:
        self.kind = kind
        self._missing = missing
        self._parts: dict[str, T] = {}

    def add(self, name: str, part: T) -> T:
        """Register `part`; a name can be taken once.

        Raises
        ------
        UsageError
            The name is taken by another part.
        """
        if self._parts.get(name, part) is not part:
            raise UsageError(f"a {self.kind} named {name!r} is registered already")
        self._parts[name] = part
        return part

    def get(self, name: str) -> T:
        """The part of that name, or an error that lists the nearest names."""
        try:
            return self._parts[name]
        except KeyError:
            near = difflib.get_close_matches(name, self._parts, n=3, cutoff=0.4)
            hint = f"Nearest: {', '.join(near)}. " if near else ""
            raise self._missing(f"no {self.kind} is named {name!r}", remedy=f"{hint}Known: {', '.join(self._parts)}") from None

    def remove(self, name: str) -> None:
        """Forget a part (for tests and interactive work)."""
        self._parts.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[T]:
        return iter(self._parts.values())

    def names(self) -> list[str]:
        """All names."""
        return list(self._parts)
