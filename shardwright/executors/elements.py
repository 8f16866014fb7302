"""Two runs of elements against each other: how many differ, where first, how far apart at most.

1. Equal dtypes without a tolerance: an element differs if any of its bits does, so ``-0.0`` and ``0.0`` differ and so do
   two NaNs of other payloads.
2. Otherwise values are compared: two NaNs are equal, a NaN and a number are infinitely far apart, equal infinities are
   equal; an element differs if the distance is above the tolerance (0 where none is given).
3. Distances are ``|a - b|`` in float64 (complex128 for complex), which holds every dtype of up to 32 bits exactly; integers
   of 64 bits against integers are subtracted exactly.

Boundary: arrays in memory; every temporary is a small multiple of a block of `BLOCK` elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["BLOCK", "WORK_BYTES", "Found", "Spot", "Work", "compare", "numpy_dtype"]

BLOCK = 64 << 10
"""Elements compared at once. Measured: with fewer, two lanes wait for each other's Python more than they compute."""
WORK_BYTES = 96 * BLOCK
"""More than `Work` and the temporaries of one block take."""
_BOXED = 8 << 10
"""64-bit integers compared at once: as Python's own they take ten times their size."""

Array = npt.NDArray[Any]
Value = float | int | complex


class Spot(NamedTuple):
    """An element: flat place, and its value on both sides."""

    place: int
    one: Value
    two: Value


@dataclass(frozen=True, slots=True)
class Found:
    """What differs in a stretch of elements.

    Attributes
    ----------
    differing
        How many elements differ.
    first
        The first of them.
    largest, largest_at
        The largest distance of any two elements, within the tolerance or not, and the first element that has it; 0 and
        None where all values are equal.
    relative
        The largest distance relative to the larger of the two magnitudes.
    """

    differing: int = 0
    first: Spot | None = None
    largest: float | int = 0
    largest_at: Spot | None = None
    relative: float = 0.0

    def __bool__(self) -> bool:
        return self.differing > 0 or self.largest > 0

    def moved(self, place: Callable[[int], int]) -> Found:
        """The same with other flat places."""
        first, largest = (spot and spot._replace(place=place(spot.place)) for spot in (self.first, self.largest_at))
        return replace(self, first=first, largest_at=largest)

    def joined(self, other: Found) -> Found:
        """Both stretches together, in whichever order they were found."""
        spots = [spot for spot in (self.first, other.first) if spot]
        far = [(found.largest, -found.largest_at.place, found.largest_at) for found in (self, other) if found.largest_at]
        distance, _, at = max(far, key=lambda f: f[:2], default=(0, 0, None))
        return Found(
            self.differing + other.differing,
            min(spots, default=None, key=lambda spot: spot.place),
            distance,
            at,
            max(self.relative, other.relative),
        )


def numpy_dtype(name: str) -> np.dtype[Any]:
    """numpy's (or ml_dtypes') dtype of that name.

    >>> numpy_dtype("float16").itemsize, numpy_dtype("bfloat16").itemsize
    (2, 2)
    """
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name, None) or name)


class Work:
    """Room for the float64 temporaries of one block, allocated once by each lane: `x` and `y` for values, `apart` for distances."""

    def __init__(self) -> None:
        self.x, self.y, self.apart = (np.empty(BLOCK) for _ in range(3))


def compare(one: Array, two: Array, tolerance: float | None, work: Work) -> Found:
    """Compare two flat arrays of one length, at most `BLOCK`, and not empty.

    Parameters
    ----------
    tolerance
        Largest absolute difference that counts as none; None compares equal dtypes bit by bit.
    work
        Overwritten. `one` may be values in ``work.x``, `two` in ``work.y``.

    >>> found = compare(np.array([1.0, 2.0, 5.0]), np.array([1.0, 2.5, 3.0]), 0.5, Work())
    >>> found.differing, found.first, found.largest
    (1, Spot(place=2, one=5.0, two=3.0), 2.0)
    """
    if _wide(one, two) and len(one) > _BOXED:
        found = Found()
        for begin in range(0, len(one), _BOXED):
            end = begin + _BOXED
            found = found.joined(compare(one[begin:end], two[begin:end], tolerance, work).moved(begin.__add__))
        return found
    apart, x, y = _distances(one, two, work)
    at = int(np.argmax(apart))
    number, first = 0, None
    if (bitwise := tolerance is None and one.dtype == two.dtype) or apart[at] > (tolerance or 0.0):
        differs = _bits(one) != _bits(two) if bitwise else apart > (tolerance or 0.0)
        number = int(np.count_nonzero(differs))
        first = _spot(one, two, int(np.argmax(differs))) if number else None
    if not apart[at] > 0:
        return Found(number, first)
    largest, spot = _value(apart[at]), _spot(one, two, at)
    # The last step, for it overwrites the values.
    return Found(number, first, largest, spot, _relative(apart, x, y) if largest < np.inf else float("inf"))


def _bits(array: Array) -> Array:
    return array.view(f"u{array.dtype.itemsize}")


def _wide(one: Array, two: Array) -> bool:
    """Whether float64 is too narrow for two runs of integers."""
    return one.dtype.kind in "iu" and two.dtype.kind in "iu" and max(one.dtype.itemsize, two.dtype.itemsize) > 4


def _distances(one: Array, two: Array, work: Work) -> tuple[Array, Array, Array]:
    """Distances, and the values they lie between."""
    if _wide(one, two):
        a, b = one.astype(object), two.astype(object)
        return np.abs(a - b), a, b
    x: Array
    y: Array
    apart: Array
    with np.errstate(invalid="ignore", over="ignore"):
        if "c" in (one.dtype.kind, two.dtype.kind):
            x, y = one.astype(np.complex128), two.astype(np.complex128)
            apart = np.abs(x - y)
        else:
            x, y, apart = (array[: len(one)] for array in (work.x, work.y, work.apart))
            np.copyto(x, one, casting="unsafe")
            np.copyto(y, two, casting="unsafe")
            np.abs(np.subtract(x, y, out=apart), out=apart)
    if np.isnan(apart[np.argmax(apart)]):  # numpy finds the first NaN before any number
        apart[np.isnan(apart)] = np.inf
        apart[(x == y) | (np.isnan(x) & np.isnan(y))] = 0.0
    return apart, x, y


def _relative(apart: Array, x: Array, y: Array) -> float:
    """Largest distance relative to the larger magnitude, where all distances are finite; takes the values' place."""
    if x.dtype.kind == "c":
        x, y = np.abs(x), np.abs(y)
    else:
        np.abs(x, out=x)
        np.abs(y, out=y)
    np.maximum(x, y, out=x)
    x[apart == 0] = 1  # also where both are zero, infinite or NaN
    return float(np.max(np.divide(apart, x, out=x)))


def _spot(one: Array, two: Array, index: int) -> Spot:
    return Spot(index, _value(one[index]), _value(two[index]))


def _value(scalar: Any) -> Any:
    """A numpy scalar as Python's own number."""
    if isinstance(scalar, int):
        return scalar
    kind = np.dtype(scalar.dtype).kind
    if kind in "iub":
        return int(scalar)
    return complex(scalar) if kind == "c" else float(scalar)
