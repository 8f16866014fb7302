"""What padding holds: zeros, copies of the last real row, or values of its own.

Padding is read and classified, never copied. Whole rows are classified where the padding consists of them, single
elements otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Padding", "all_zero", "classify"]


@dataclass(slots=True)
class Padding:
    """Rows of padding by what they hold; `nbytes` is all of them."""

    zeros: int = 0
    copies: int = 0
    other: int = 0
    nbytes: int = 0

    def __str__(self) -> str:
        """For a note to the user.

        >>> str(Padding(zeros=60, copies=4))
        '60 rows of zeros, 4 copies of the last real row'
        """
        words = [(self.zeros, "rows of zeros"), (self.copies, "copies of the last real row"), (self.other, "rows of other values")]
        return ", ".join(f"{n} {word}" for n, word in words if n) or "none"


def classify(
    found: Padding,
    read: Callable[[int, Sequence[memoryview]], None],
    offset: int,
    nbytes: int,
    row: int,
    real: bytes | None,
    staging: memoryview,
) -> None:
    """Read a contiguous range of padding and count its rows.

    Parameters
    ----------
    row
        Bytes of a row; a range that is not made of whole rows counts as one row.
    real
        The last real row, if it is known.
    """
    found.nbytes += nbytes
    if nbytes % row or row > len(staging):
        _add(found, 1, int(all_zero(read, offset, nbytes, staging)), 0)
        return
    block = len(staging) // row * row
    for at in range(0, nbytes, block):
        part = staging[: min(block, nbytes - at)]
        read(offset + at, (part,))
        rows = np.frombuffer(part, np.uint8).reshape(-1, row)
        zero = ~rows.any(axis=1)
        same = np.array([bytes(r) == real for r in rows]) & ~zero if real is not None else np.zeros_like(zero)
        _add(found, len(rows), int(zero.sum()), int(same.sum()))


def _add(found: Padding, rows: int, zeros: int, copies: int) -> None:
    found.zeros += zeros
    found.copies += copies
    found.other += rows - zeros - copies


def all_zero(read: Callable[[int, Sequence[memoryview]], None], offset: int, nbytes: int, staging: memoryview) -> bool:
    """Whether a contiguous range holds nothing but zero bytes; all of it is read."""
    clean = True
    for at in range(0, nbytes, len(staging)):
        part = staging[: min(len(staging), nbytes - at)]
        read(offset + at, (part,))
        clean = clean and not np.frombuffer(part, np.uint8).any()
    return clean
