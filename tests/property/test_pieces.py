"""The copy algebra against numpy: every chain of operations, every element written exactly once.

A `LazyTensor` is evaluated piece by piece over flat operands whose elements are all distinct and never zero, so a
misplaced element cannot hide. The state machine grows chains and checks each result as it appears; the plain properties
below it state what the single routines promise.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise, product
from math import prod

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, multiple, rule

from shardwright.errors import UsageError
from shardwright.planner.tensor.lazy import LazyTensor, concat, fill, invert, leaf, stack
from shardwright.planner.tensor.pieces import FILL, Box, Piece, align, coalesce, count, flatten, normalise, row_strides, select, thin

LARGEST = 300
"""Elements of the largest tensor in a chain."""


def moves(piece: Piece) -> tuple[np.ndarray, np.ndarray]:
    """Destination and source offset of every element of a piece."""
    dst, src = np.array([piece.dst_off]), np.array([piece.src_off])
    for extent, to, frm in piece.dims:
        steps = np.arange(extent)
        dst = (dst[:, None] + steps * to).ravel()
        src = (src[:, None] + steps * frm).ravel()
    return dst, src


def written(piece: Piece) -> Counter:
    """Every (slot, destination, source) of a piece."""
    return Counter((piece.slot, int(d), int(s)) for d, s in zip(*moves(piece), strict=True))


def coordinates(box: Box) -> list[tuple[tuple[int, ...], int]]:
    """Coordinate and source offset of every element of a box."""
    found = []
    for index in product(*(range(extent) for _, extent, _, _ in box.dims)):
        at, src = list(box.start), box.src_off
        for i, (axis, _, step, stride) in zip(index, box.dims, strict=True):
            at[axis] += i * step
            src += i * stride
        found.append((tuple(at), src))
    return found


def evaluate(tensor: LazyTensor, operands: list[np.ndarray]) -> np.ndarray:
    """The tensor's elements; fails where an element is written twice or never."""
    values = np.full(tensor.size, -1)
    times = np.zeros(tensor.size, int)
    for piece in tensor.pieces:
        dst, src = moves(piece)
        values[dst] = 0 if piece.slot == FILL else operands[piece.slot][src]
        np.add.at(times, dst, 1)
    assert (times == 1).all(), "an element is written twice or never"
    return values.reshape(tensor.shape)


def factorisations(size: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of that many elements, with axes of extent 1 here and there."""

    @st.composite
    def shapes(draw: st.DrawFn) -> tuple[int, ...]:
        shape, left = [], size
        while left > 1 and len(shape) < 4:
            extent = draw(st.sampled_from([n for n in range(1, left + 1) if left % n == 0]))
            shape.append(extent)
            left //= extent
        if left != 1 or (shape and draw(st.booleans())):
            shape.append(left)
        return tuple(draw(st.permutations(shape))) if draw(st.booleans()) else tuple(shape)

    if size == 0:
        return st.lists(st.integers(0, 3), min_size=1, max_size=3).filter(lambda s: 0 in s).map(tuple)
    return shapes()


small_shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple) | st.lists(st.integers(0, 4), max_size=3).map(tuple)

Pair = tuple[LazyTensor, np.ndarray]


class Chains(RuleBasedStateMachine):
    """Chains of operations over several operands, each result compared with numpy's."""

    tensors = Bundle("tensors")

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[np.ndarray] = []

    def operand(self, size: int) -> int:
        begin = 1 + sum(a.size for a in self.operands)
        self.operands.append(np.arange(begin, begin + size))
        return len(self.operands) - 1

    def checked(self, lazy: LazyTensor, array: np.ndarray) -> Pair:
        """The pair, proven equal, with its pieces in order and in simplest form."""
        assert lazy.shape == array.shape
        np.testing.assert_array_equal(evaluate(lazy, self.operands), array)
        assert [p.dst_off for p in lazy.pieces] == sorted(p.dst_off for p in lazy.pieces)
        assert all(normalise(p) == p for p in lazy.pieces)
        assert all(count(p) > 0 for p in lazy.pieces)
        return lazy, array

    @initialize(target=tensors, shape=small_shapes)
    def first(self, shape: tuple[int, ...]) -> Pair:
        return self.leaf(shape)

    @rule(target=tensors, shape=small_shapes)
    def leaf(self, shape: tuple[int, ...]) -> Pair:
        slot = self.operand(prod(shape))
        return self.checked(leaf(slot, shape), self.operands[slot].reshape(shape))

    @rule(target=tensors, shape=small_shapes, gap=st.integers(1, 3), offset=st.integers(0, 5), data=st.data())
    def view(self, shape: tuple[int, ...], gap: int, offset: int, data: st.DataObject) -> Pair:
        """A strided view of a storage: axes in any order, gaps between elements."""
        order = data.draw(st.permutations(range(len(shape))))
        strides = [0] * len(shape)
        step = gap
        for axis in order:
            strides[axis] = step
            step *= max(shape[axis], 1)
        slot = self.operand(offset + step)
        item = self.operands[slot].itemsize
        array = np.lib.stride_tricks.as_strided(self.operands[slot][offset:], shape, [s * item for s in strides])
        return self.checked(leaf(slot, shape, tuple(strides), offset), array)

    @rule(target=tensors, shape=small_shapes)
    def fill(self, shape: tuple[int, ...]) -> Pair:
        return self.checked(fill(shape), np.zeros(shape, int))

    @rule(target=tensors, pair=tensors, data=st.data())
    def reshape(self, pair: Pair, data: st.DataObject) -> Pair:
        lazy, array = pair
        shape = data.draw(factorisations(array.size))
        return self.checked(lazy.reshape(*shape), array.reshape(shape))

    @rule(target=tensors, pair=tensors)
    def ravel(self, pair: Pair) -> Pair:
        lazy, array = pair
        assume(array.size)
        return self.checked(lazy.reshape(-1), array.reshape(-1))

    @rule(target=tensors, pair=tensors, data=st.data())
    def permute(self, pair: Pair, data: st.DataObject) -> Pair:
        lazy, array = pair
        axes = data.draw(st.permutations(range(array.ndim)))
        return self.checked(lazy.permute(*axes), array.transpose(axes))

    @rule(target=tensors, pair=tensors)
    def transpose(self, pair: Pair) -> Pair:
        return self.checked(pair[0].T, pair[1].T)

    @rule(target=tensors, pair=tensors, data=st.data())
    def slice(self, pair: Pair, data: st.DataObject) -> Pair:
        lazy, array = pair
        assume(array.ndim)
        axis = data.draw(st.integers(0, array.ndim - 1))
        extent = array.shape[axis]
        wanted = data.draw(st.slices(extent)).indices(extent)
        index = range(*wanted)
        return self.checked(lazy.slice(axis, *wanted), np.take(array, list(index), axis) if len(index) else np.take(array, range(0), axis))

    @rule(target=tensors, pair=tensors, data=st.data())
    def flip(self, pair: Pair, data: st.DataObject) -> Pair:
        lazy, array = pair
        assume(array.ndim)
        axis = data.draw(st.integers(0, array.ndim - 1))
        return self.checked(lazy.slice(axis, array.shape[axis] - 1, -1, -1), np.flip(array, axis))

    @rule(target=tensors, one=tensors, two=tensors, data=st.data())
    def concat(self, one: Pair, two: Pair, data: st.DataObject) -> Pair:
        """Joined along an axis where the rest agrees, else flat."""
        assume(one[1].size + two[1].size <= LARGEST)
        rest = [[(j, n) for j, n in enumerate(array.shape) if j != k] for k in range(one[1].ndim) for array in (one[1], two[1])]
        fits = [k for k in range(one[1].ndim) if one[1].ndim == two[1].ndim and rest[2 * k] == rest[2 * k + 1]]
        if not fits:
            one, two = ((lazy.reshape(array.size), array.reshape(-1)) for lazy, array in (one, two))
            fits = [0]
        axis = data.draw(st.sampled_from(fits))
        return self.checked(concat([one[0], two[0]], axis), np.concatenate([one[1], two[1]], axis))

    @rule(target=tensors, pair=tensors, other=tensors, data=st.data())
    def stack(self, pair: Pair, other: Pair, data: st.DataObject) -> Pair:
        assume(pair[1].ndim < 5 and 2 * pair[1].size <= LARGEST)
        other = other if other[1].shape == pair[1].shape else pair
        axis = data.draw(st.integers(0, pair[1].ndim))
        return self.checked(stack([pair[0], other[0]], axis), np.stack([pair[1], other[1]], axis))

    @rule(target=tensors, pair=tensors, data=st.data())
    def split(self, pair: Pair, data: st.DataObject) -> object:
        """Consecutive parts; in another order they join to another tensor."""
        lazy, array = pair
        assume(array.ndim)
        axis = data.draw(st.integers(0, array.ndim - 1))
        cuts = sorted(data.draw(st.lists(st.integers(0, array.shape[axis]), max_size=3)))
        edges = [0, *cuts, array.shape[axis]]
        parts = lazy.split(axis, [b - a for a, b in pairwise(edges)])
        arrays = np.split(array, cuts, axis)
        order = data.draw(st.permutations(range(len(parts))))
        found = [self.checked(p, a) for p, a in zip(parts, arrays, strict=True)]
        found.append(self.checked(concat([parts[i] for i in order], axis), np.concatenate([arrays[i] for i in order], axis)))
        return multiple(*found[-2:])

    @rule(pair=tensors, data=st.data())
    def assemble_by_parts(self, pair: Pair, data: st.DataObject) -> None:
        """The slices of R ranks, evaluated one by one, put together again are the whole."""
        lazy, array = pair
        assume(array.ndim)
        axis = data.draw(st.integers(0, array.ndim - 1))
        ranks = data.draw(st.sampled_from([n for n in range(1, array.shape[axis] + 1) if array.shape[axis] % n == 0] or [1]))
        parts = lazy.chunk(axis, ranks)
        assert len(parts) == ranks
        np.testing.assert_array_equal(np.concatenate([evaluate(p, self.operands) for p in parts], axis), array)
        self.checked(concat(parts, axis), array)

    @rule(target=tensors, pair=tensors, before=st.integers(0, 3), after=st.integers(0, 3), data=st.data())
    def pad(self, pair: Pair, before: int, after: int, data: st.DataObject) -> Pair:
        lazy, array = pair
        assume(array.ndim and array.size <= LARGEST // 2)
        axis = data.draw(st.integers(0, array.ndim - 1))
        width = [(before, after) if k == axis else (0, 0) for k in range(array.ndim)]
        return self.checked(lazy.pad(axis, before, after), np.pad(array, width))

    @rule(target=tensors, pair=tensors, extent=st.integers(0, 3), data=st.data())
    def expand(self, pair: Pair, extent: int, data: st.DataObject) -> Pair:
        lazy, array = pair
        assume(array.ndim < 5 and array.size * extent <= LARGEST)
        axis = data.draw(st.integers(0, array.ndim))
        shape = (*array.shape[:axis], 1, *array.shape[axis:])
        wide = (*array.shape[:axis], extent, *array.shape[axis:])
        return self.checked(lazy.reshape(*shape).expand(axis, extent), np.broadcast_to(array.reshape(shape), wide))

    @rule(pair=tensors)
    def simplest_form_is_final(self, pair: Pair) -> None:
        lazy, array = pair
        again = coalesce(lazy.pieces)
        assert coalesce(again) == again
        np.testing.assert_array_equal(evaluate(LazyTensor(lazy.shape, again), self.operands), array)

    @rule(pair=tensors, data=st.data())
    def pieces_of_any_shape(self, pair: Pair, data: st.DataObject) -> None:
        """Boxes of any shape of that size move what the pieces move, and never carry."""
        lazy, array = pair
        assume(array.size)
        shape = data.draw(factorisations(array.size))
        for piece in lazy.pieces:
            check_align(piece, shape)


def check_align(piece: Piece, shape: tuple[int, ...]) -> list[Box]:
    """`align` cuts a piece into boxes inside the shape; flattened they are the piece."""
    boxes = align(piece, shape)
    back: Counter = Counter()
    for box in boxes:
        for axis, extent in enumerate(shape):
            assert box.start[axis] >= 0 and box.start[axis] + sum((n - 1) * m for k, n, m, _ in box.dims if k == axis) < max(extent, 1)
        assert all(step > 0 and extent > 1 for _, extent, step, _ in box.dims)
        back += written(flatten(box, shape))
        strides = row_strides(shape)
        assert written(flatten(box, shape)) == Counter(
            (box.slot, sum(c * s for c, s in zip(at, strides, strict=True)), src) for at, src in coordinates(box)
        )
    assert back == written(piece)
    return boxes


TestChains = Chains.TestCase
TestChains.settings = settings(max_examples=60, stateful_step_count=25, deadline=None, derandomize=True)


@st.composite
def loose_pieces(draw: st.DrawFn) -> tuple[Piece, int]:
    """Any piece, not in simplest form, and the size of a tensor that holds it."""
    dims = draw(
        st.lists(st.tuples(st.integers(1, 5), st.integers(1, 30), st.integers(-20, 20), st.booleans()), max_size=4).filter(
            lambda ds: prod(d[0] for d in ds) <= 200
        )
    )
    low = sum((n - 1) * d for n, d, _, back in dims if back)
    dst = low + draw(st.integers(0, 10))
    high = dst + sum((n - 1) * d for n, d, _, back in dims if not back)
    piece = Piece(draw(st.integers(0, 3)), dst, draw(st.integers(0, 100)), tuple((n, -d if back else d, s) for n, d, s, back in dims))
    return piece, high + 1 + draw(st.integers(0, 20))


quick = settings(max_examples=200, deadline=None, derandomize=True)


@quick
@given(loose_pieces())
def test_normalise_is_idempotent_and_keeps_the_meaning(given):
    piece, _ = given
    simple = normalise(piece)
    assert normalise(simple) == simple
    assert written(simple) == written(piece)
    strides = [d for _, d, _ in simple.dims]
    assert strides == sorted(strides, reverse=True) and all(d > 0 for d in strides) and all(n > 1 for n, _, _ in simple.dims)


@quick
@given(st.lists(loose_pieces(), max_size=6))
def test_coalesce_is_idempotent_and_keeps_the_meaning(given):
    pieces = [p for p, _ in given]
    once = coalesce(pieces)
    assert coalesce(once) == once
    assert sum(map(written, once), Counter()) == sum(map(written, pieces), Counter())


@quick
@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_coalesce_joins_what_was_cut(sizes, random):
    parts = leaf(0, (sum(sizes), 7)).split(0, sizes)
    at, cut = 0, []
    for part, size in zip(parts, sizes, strict=True):
        cut += [p._replace(dst_off=p.dst_off + at * 7) for p in part.pieces]
        at += size
    random.shuffle(cut)
    assert coalesce(cut) == leaf(0, (sum(sizes), 7)).pieces


@quick
@given(loose_pieces(), st.data())
def test_align_flattens_back_whatever_the_shape(given, data):
    piece, size = given
    shape = data.draw(factorisations(size))
    for box in check_align(piece, shape):
        for axis, extent in enumerate(shape):
            cuts = sorted({0, extent, *data.draw(st.lists(st.integers(0, extent), max_size=2))})
            parts = [part for lo, hi in pairwise(cuts) for part in select(box, axis, lo, hi)]
            for lo, hi in pairwise(cuts):
                assert all(lo <= at[axis] < hi for part in select(box, axis, lo, hi) for at, _ in coordinates(part))
            assert sum((Counter(coordinates(p)) for p in parts), Counter()) == Counter(coordinates(box))
            step = data.draw(st.integers(1, 5))
            thinned = []
            for residue in range(step):
                found = list(thin(box, axis, residue, step))
                assert all((at[axis] - residue) % step == 0 for part in found for at, _ in coordinates(part))
                thinned += found
            assert sum((Counter(coordinates(p)) for p in thinned), Counter()) == Counter(coordinates(box))


def test_an_empty_range_selects_nothing():
    box = Box(0, (2, 0), 0, ((0, 3, 2, 1), (1, 4, 1, 7)))
    assert list(select(box, 0, 0, 2)) == list(select(box, 0, 7, 9)) == list(select(box, 0, 3, 4)) == []


@st.composite
def bijections(draw: st.DrawFn) -> tuple[LazyTensor, list[tuple[int, ...]]]:
    """A layout that holds every element of every operand once, with zeros between them, and the operands' shapes."""
    shapes = draw(st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=4))
    parts = [leaf(slot, shape) for slot, shape in enumerate(shapes)]
    for _ in range(draw(st.integers(0, 3))):
        parts = [_shuffled(draw, part) for part in parts]
    flat = [part.reshape(part.size) for part in draw(st.permutations(parts))]
    whole = concat(flat, 0)
    for _ in range(draw(st.integers(0, 3))):
        whole = _shuffled(draw, whole)
    return whole, shapes


def _shuffled(draw: st.DrawFn, tensor: LazyTensor) -> LazyTensor:
    kind = draw(st.sampled_from(["reshape", "permute", "flip", "deal", "pad"]))
    if kind == "reshape" or not tensor.shape:
        return tensor.reshape(*draw(factorisations(tensor.size)))
    axis = draw(st.integers(0, len(tensor.shape) - 1))
    extent = tensor.shape[axis]
    if kind == "permute":
        return tensor.permute(*draw(st.permutations(range(len(tensor.shape)))))
    if kind == "flip":
        return tensor.slice(axis, extent - 1, -1, -1)
    if kind == "pad":
        return tensor.pad(axis, draw(st.integers(0, 2)), draw(st.integers(0, 2)))
    step = draw(st.integers(1, 3))  # every step-th element first, as cards are dealt
    return concat([tensor.slice(axis, min(first, extent), extent, step) for first in range(step)], axis)


@quick
@given(bijections())
def test_invert_is_an_inverse(given):
    whole, shapes = given
    operands, at = [], 1
    for shape in shapes:
        operands.append(np.arange(at, at + prod(shape)))
        at += prod(shape)
    stored = evaluate(whole, operands)
    back = invert(whole, 0, shapes)
    for operand, shape, inverse in zip(operands, shapes, back, strict=True):
        assert inverse.shape == shape
        np.testing.assert_array_equal(evaluate(inverse, [stored.reshape(-1)]), operand.reshape(shape))
    # And back again: the inverses of the parts, inverted, put every element where the whole has it.
    again = np.zeros(whole.size, int)
    for operand, inverse in zip(operands, back, strict=True):
        for piece in inverse.pieces:
            dst, src = moves(piece)
            again[src] = operand[dst]
    np.testing.assert_array_equal(again.reshape(whole.shape), stored)


def test_what_has_no_inverse_is_refused():
    with pytest.raises(UsageError, match="expanded"):
        invert(leaf(0, (1, 4)).expand(0, 3), 0, [(1, 4)])
    with pytest.raises(UsageError, match="cover"):
        invert(leaf(0, (5,)).slice(0, 0, 4), 0, [(5,)])
    with pytest.raises(UsageError, match="expanded"):
        invert(concat([leaf(0, (5,)), leaf(0, (5,))], 0), 0, [(5,)])
    with pytest.raises(UsageError, match="cover"):
        invert(concat([leaf(0, (5,)), leaf(0, (5,)).slice(0, 1, 3)], 0), 0, [(5,)])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda t: t.reshape(5),
        lambda t: t.permute(0),
        lambda t: t.permute(0, 0),
        lambda t: t.slice(0, 0, 3),
        lambda t: t.slice(1, -1, 2),
        lambda t: t.slice(0, 1, -2, -1),
        lambda t: t.split(0, [1]),
        lambda t: t.chunk(1, 2),
        lambda t: t.expand(0, 2),
        lambda t: concat([t, leaf(1, (2, 4))], 0),
        lambda t: stack([t, leaf(1, (3, 2))], 0),
    ],
)
def test_operations_that_do_not_fit_are_refused(wrong):
    with pytest.raises(UsageError):
        wrong(leaf(0, (2, 3)))


def test_scalars_and_empty_tensors():
    scalar = leaf(0, ())
    assert scalar.pieces == (Piece(0, 0, 0),) and evaluate(scalar, [np.array([7])]) == 7
    assert evaluate(stack([scalar, fill(()), scalar], 0), [np.array([7])]).tolist() == [7, 0, 7]
    assert scalar.permute() == scalar and scalar.reshape(1, 1).shape == (1, 1)
    for empty in (leaf(0, (0, 3)), fill((2, 0)), leaf(0, (3, 4)).slice(0, 2, 2), leaf(0, (2, 0, 3)).permute(2, 0, 1)):
        assert empty.size == 0 and empty.pieces == ()
    assert concat([leaf(0, (0, 3)), leaf(1, (2, 3))], 0).pieces == leaf(1, (2, 3)).pieces
    assert align(Piece(0, 0, 5), (1, 1)) == [Box(0, (0, 0), 5, ())]
