"""Copies of weights that are stored rounded: a strip rounded, and compared with what is stored.

1. The strip is rounded to the copy's dtype, half to even, as torch casts, into one half of the compare buffer.
2. What is stored is read into the other half.
3. Equal bytes are equal; otherwise numbers that are not equal, and not both no number, are told.

Boundary: buffers in memory; every temporary is a small multiple of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .compare import first_difference
from .elements import numpy_dtype

__all__ = ["Odd", "Rounded"]

_BLOCK = 64 << 10
"""Elements converted at once."""


class Odd(NamedTuple):
    """The first element of a strip that is not what it should be, and the largest difference in its block."""

    element: int
    expected: float
    actual: float
    largest: float


class Rounded:
    """A strip rounded, and room for the copy that must equal it.

    Parameters
    ----------
    dtype, kind
        Of the strip, and of the copy: at most half as wide (`shardwright.planner.passes.memory.roundable`).
    room
        As large as the strip.
    """

    def __init__(self, dtype: str, kind: str, strip: memoryview, room: memoryview) -> None:
        wide, self._kind = np.frombuffer(strip, numpy_dtype(dtype)), numpy_dtype(kind)
        nbytes = len(wide) * self._kind.itemsize
        self.expected, self.copy = room[:nbytes], room[nbytes : 2 * nbytes]
        narrow = np.frombuffer(self.expected, self._kind)
        with np.errstate(over="ignore", invalid="ignore"):
            for at in range(0, len(wide), _BLOCK):
                narrow[at : at + _BLOCK] = wide[at : at + _BLOCK].astype(self._kind)

    def first_difference(self) -> Odd | None:
        """The first element of the copy that is another number, or None."""
        byte = first_difference(self.expected, self.copy)
        if byte is None:
            return None
        ours, theirs = (np.frombuffer(half, self._kind) for half in (self.expected, self.copy))
        for at in range(byte // self._kind.itemsize, len(ours), _BLOCK):
            a, b = (half[at : at + _BLOCK].astype(np.float64) for half in (ours, theirs))
            differ = (a != b) & ~(np.isnan(a) & np.isnan(b))
            if differ.any():
                first = int(np.argmax(differ))
                with np.errstate(invalid="ignore"):
                    return Odd(at + first, float(a[first]), float(b[first]), float(np.abs(a - b)[differ].max()))
        return None
