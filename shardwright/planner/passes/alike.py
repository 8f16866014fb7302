"""Which tensors of a plan are alike: stored alike and used by the same operands. A proof needs one of each.

1. `Columns` holds the tensors' files, offsets and kinds (shape, dtype, contiguity) as arrays.
2. `alike` sorts tensors and uses by place. Tensors at one place are one storage; a use without a tensor and a tensor
   without a use are found here.
3. `_sequences` numbers the sequences of kinds and of users at each place: equal sequences, equal numbers. One place per
   distinct pair of numbers is reported.

A model of a million tensors has a few dozen that differ. Boundary: pure; columns in, examples out.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from math import prod
from operator import attrgetter
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from ..plan import Ints, TensorEntry
from ..tensor.dtypes import dtype as dtype_of

__all__ = ["Alike", "Columns", "alike"]

U = TypeVar("U")
_LARGEST = 2**63 - 1


class Columns:
    """Stored tensors that hold at least one element, as columns."""

    def __init__(self, tensors: Sequence[TensorEntry]) -> None:
        known: dict[tuple[tuple[int, ...], str, bool], int] = {}
        # Each kind is numbered by its first tensor; then the numbers are made dense.
        firsts = _ints(list(map(known.setdefault, map(attrgetter("shape", "dtype", "contiguous"), tensors), count())))
        kind = np.searchsorted(_ints(list(known.values())), firsts)
        sizes = _ints([dtype_of(dtype).nbytes(prod(shape)) for shape, dtype, _ in known])
        self.kept = np.flatnonzero(sizes[kind])
        self.kind = kind[self.kept]
        self.nbytes = sizes[self.kind]
        self.file = _ints(list(map(attrgetter("file"), tensors)))[self.kept]
        self.offset = _ints(list(map(attrgetter("offset"), tensors)))[self.kept]
        self._tensors = tensors

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> TensorEntry:
        return self._tensors[int(self.kept[index])]


class Alike(NamedTuple, Generic[U]):
    """`groups`: the tensors at one place, and who uses it, once per distinct pair. `stray`: a use at a (file, offset) where
    no tensor begins; `idle`: a tensor that nobody uses."""

    groups: list[tuple[list[TensorEntry], list[U]]]
    stray: tuple[U, int, int] | None
    idle: TensorEntry | None


def alike(tensors: Columns, uses: Sequence[tuple[U, Ints, Ints]]) -> Alike[U]:
    """One of each.

    Parameters
    ----------
    uses
        ``(user, file numbers, offsets)``: the places that a user uses, as columns.
    """
    file = np.concatenate([tensors.file, *(f for _, f, _ in uses)])
    offset = np.concatenate([tensors.offset, *(o for _, _, o in uses)])
    users = np.repeat(np.arange(len(uses)), [len(f) for _, f, _ in uses])
    key = _keys(file, offset)
    places, first, held = np.unique(key[: len(tensors)], return_index=True, return_inverse=True)
    used = np.searchsorted(places, key[len(tensors) :])
    lost = np.flatnonzero(places[np.minimum(used, len(places) - 1)] != key[len(tensors) :]) if len(places) else np.arange(len(used))
    if len(lost):
        at = int(lost[0])
        return Alike([], (uses[users[at]][0], int(file[len(tensors) + at]), int(offset[len(tensors) + at])), None)
    idle = np.flatnonzero(np.bincount(used, minlength=len(places)) == 0)
    if len(idle):
        return Alike([], None, tensors[int(first[idle].min())])
    by_tensor, by_user = np.argsort(held, kind="stable"), np.argsort(used, kind="stable")
    kinds = _sequences(held[by_tensor], tensors.kind[by_tensor], len(places))
    calls = _sequences(used[by_user], users[by_user], len(places))
    _, chosen = np.unique(kinds * (int(calls.max(initial=0)) + 1) + calls, return_index=True)
    ends = np.searchsorted(held[by_tensor], [chosen, chosen + 1]), np.searchsorted(used[by_user], [chosen, chosen + 1])
    groups = []
    for (a, b), (c, d) in zip(ends[0].T.tolist(), ends[1].T.tolist(), strict=True):
        groups.append(([tensors[int(i)] for i in by_tensor[a:b]], [uses[users[i]][0] for i in by_user[c:d]]))
    return Alike(groups, None, None)


def _ints(values: Sequence[int]) -> Ints:
    return np.array(values, dtype=np.int64)


def _keys(file: Ints, offset: Ints) -> Ints:
    """One number per place."""
    offset = offset - offset.min(initial=0)
    stride = int(offset.max(initial=0)) + 1
    if stride > _LARGEST // (int(file.max(initial=0)) + 1):
        offset = np.unique(offset, return_inverse=True)[1]
        stride = len(offset) + 1
    return file * stride + offset


def _sequences(place: Ints, value: Ints, places: int) -> Ints:
    """A number for each place: equal for places whose values, in order, are equal. `place` is ascending and leaves none out."""
    starts = np.searchsorted(place, np.arange(places))
    lengths = np.diff(starts, append=len(place))
    base = int(value.max(initial=0)) + 1
    found = lengths.astype(np.int64)
    rest = np.arange(places)
    for depth in range(int(lengths.max(initial=0))):
        rest = rest[lengths[rest] > depth]
        # Numbers stay below twice the number of places, so that the next product cannot grow out of 64 bits.
        numbered = np.unique(found[rest] * base + value[starts[rest] + depth], return_inverse=True)[1]
        found[rest] = numbered + places
    return np.unique(found, return_inverse=True)[1]
