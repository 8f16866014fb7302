"""The general copy equals numpy for any strides, in blocks of any size, and never leaves a buffer."""

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.executors import move
from shardwright.executors.move import copy, dense, offsets


@st.composite
def strided(draw):
    """A shape with strides on both sides: two axis orders, some axes flipped, some repeated in the source."""
    shape = draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    repeated = [draw(st.integers(0, 9)) == 0 for _ in shape]
    return shape, draw(st.permutations(range(len(shape)))), [draw(st.booleans()) for _ in shape], repeated


@settings(max_examples=200, deadline=None)
@given(strided(), st.sampled_from([1, 2, 4, 8]), st.sampled_from([(512, 8), (3, 1), (5, 2)]))
def test_copies_equal_numpy(case, size, blocks):
    shape, order, flipped, repeated = case
    word = move._WORDS[size]
    data = np.random.default_rng(0).integers(0, 255, [shape[k] for k in order], np.uint8).astype(word)
    source = data.transpose(np.argsort(order))
    for axis, (flip, repeat) in enumerate(zip(flipped, repeated, strict=True)):
        if repeat:
            source = np.broadcast_to(source.take([0], axis), shape)
        elif flip:
            source = np.flip(source, axis)
    base = source if source.base is None else source.base
    while isinstance(base.base, np.ndarray):
        base = base.base
    start = source.ctypes.data - base.ctypes.data
    target = np.zeros(shape, word)
    dims = list(zip(shape, source.strides, target.strides, strict=True))
    memory = memoryview(base.reshape(-1).view(np.uint8))
    with mock.patch.multiple(move, _ALONG_SOURCE=blocks[0], _ALONG_TARGET=blocks[1]):
        copy(dims, size, target.reshape(-1).view(np.uint8).data, 0, memory, start)
    assert np.array_equal(target, source)


def test_large_transposes_are_cut_into_blocks():
    data = np.arange(1030 * 50, dtype=np.uint16).reshape(1030, 50)
    found = np.empty((50, 1030), np.uint16)
    copy([(1030, 100, 2), (50, 2, 2060)], 2, found.reshape(-1).view(np.uint8).data, 0, data.reshape(-1).view(np.uint8).data, 0)
    assert np.array_equal(found, data.T)


@pytest.mark.parametrize("offset", [-2, 2])
def test_a_view_that_leaves_its_buffer_is_refused(offset):
    with pytest.raises((ValueError, TypeError)):
        copy([(4, 2, 2)], 2, memoryview(bytearray(8)), 0, memoryview(bytes(8)), offset)


def test_offsets_and_dense_ranges():
    assert list(offsets(((2, 100, 8), (2, 10, -4)), 5, 50)) == [(5, 50), (15, 46), (105, 58), (115, 54)]
    assert dense(((2, 12, 1), (3, 4, 1), (2, 2, 1)), 2) == (0, 24)
    assert dense(((3, 0, 2),), 2) == (1, 2)
