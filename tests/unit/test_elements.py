"""Two runs of elements: counts, first, largest, against numpy and Python's own numbers; NaN, infinity, signs, every dtype."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from shardwright.executors.elements import BLOCK, Found, Spot, Work, compare, numpy_dtype
from shardwright.planner.tensor.dtypes import BY_NAME

NAN, INF = float("nan"), float("inf")


def check(one, two, tolerance=None, kind="float32"):
    return compare(np.array(one, numpy_dtype(kind)), np.array(two, numpy_dtype(kind)), tolerance, Work())


def test_equal_bits_are_no_difference():
    values = [0.0, -0.0, NAN, INF, -INF, 1.5]
    assert not check(values, values)
    assert not check(values, values, 0.0)


def test_without_a_tolerance_bits_count():
    found = check([1.0, 0.0, 2.0], [1.0, -0.0, 2.0])
    assert (found.differing, found.first, found.largest, found.largest_at) == (1, Spot(1, 0.0, -0.0), 0, None)
    assert math.copysign(1, found.first.two) == -1
    one = np.array([0x7FC00000, 0x7FC00000], np.uint32).view(np.float32)
    two = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    found = compare(one, two, None, Work())
    assert (found.differing, found.first.place, found.largest) == (1, 1, 0)
    assert not compare(one, two, 0.0, Work())


@pytest.mark.parametrize("tolerance", [None, 0.0, 1e30])
@pytest.mark.parametrize(
    ("one", "two", "largest"), [(NAN, 1.0, INF), (1.0, NAN, INF), (NAN, INF, INF), (INF, 1.0, INF), (INF, -INF, INF), (-INF, INF, INF)]
)
def test_what_is_infinitely_far_apart(one, two, largest, tolerance):
    found = check([0.0, one, 3.0], [0.0, two, 3.0], tolerance)
    assert (found.differing, found.first.place, found.largest, found.largest_at.place, found.relative) == (1, 1, largest, 1, INF)


def test_a_tolerance_includes_its_end_and_the_largest_is_told_anyway():
    found = check([1.0, 2.0, 3.0], [1.5, 2.25, 3.0], 0.5)
    assert (found.differing, found.first, found.largest, found.largest_at) == (0, None, 0.5, Spot(0, 1.0, 1.5))
    assert found.relative == 0.5 / 1.5
    assert check([1.0, 2.0], [1.5, 2.25], 0.49).differing == 1


def test_unequal_dtypes_are_compared_by_value():
    one = np.array([1.0, -0.0, NAN, 3.0], numpy_dtype("bfloat16"))
    assert not compare(one, one.astype(np.float32), None, Work())
    other = one.astype(np.float32)
    other[3] = np.nextafter(np.float32(3), np.float32(4))
    found = compare(one, other, None, Work())
    assert (found.differing, found.first) == (1, Spot(3, 3.0, float(other[3])))


@pytest.mark.parametrize(
    ("one", "two", "a", "b"),
    [
        ("int64", "int64", 2**62 + 1, 2**62),
        ("int64", "int64", -(2**63), 2**63 - 1),
        ("uint64", "uint64", 2**64 - 1, 2**64 - 2),
        ("int64", "uint64", -(2**63), 2**64 - 1),
        ("uint64", "int32", 2**63 + 1, -5),
    ],
)
def test_wide_integers_are_exact(one, two, a, b):
    x, y = np.zeros(20_000, one), np.zeros(20_000, two)
    x[17_001], y[17_001] = a, b
    distance = abs(a - b)
    for tolerance in (None, 0.0) if one == two else (0.0,):
        spot = Spot(17_001, a, b)
        assert compare(x, y, tolerance, Work()) == Found(1, spot, distance, spot, distance / max(abs(a), abs(b)))
    within = compare(x, y, float(distance) * (1 + 1e-9), Work())
    assert (within.differing, within.largest) == (0, distance)


@pytest.mark.parametrize("name", [d.name for d in BY_NAME.values() if d.bits >= 8])
def test_every_dtype(name):
    kind = numpy_dtype(name)
    values = np.array([1, 0, 1, 1], np.uint8).astype(kind)
    other = np.array([1, 0, 0, 1], np.uint8).astype(kind)
    apart = abs(complex(values[2]) - complex(other[2]))  # a dtype without zero has its own idea of it
    for tolerance in (None, 0.0):
        found = compare(values, other, tolerance, Work())
        assert (found.differing, found.first.place, found.largest_at.place) == (1, 2, 2)
        assert found.largest == (INF if math.isnan(apart) else apart)


@st.composite
def pairs(draw):
    kinds = [
        draw(st.sampled_from(["float32", "float16", "bfloat16", "float64", "int8", "int32", "bool", "float8_e4m3fn"])) for _ in range(2)
    ]
    size = draw(st.integers(1, 60))
    values = draw(npst.arrays(np.float32, size, elements=st.sampled_from([0.0, -0.0, 1.0, 1.5, -3.0, 100.0, NAN, INF, 3e38, 1e-40])))
    other = values.copy()
    for at in draw(st.lists(st.integers(0, size - 1), max_size=4)):
        other[at] = draw(st.sampled_from([0.0, 1.0, 2.0, -100.0, NAN, -INF]))
    arrays = []
    for kind, array in zip(kinds, (values, other), strict=True):
        with np.errstate(all="ignore"):
            arrays.append(array.astype(numpy_dtype(kind)))
    return *arrays, draw(st.sampled_from([None, 0.0, 0.5, 99.0, 1e300]))


def distance(a, b):
    """By Python's floats, one element at a time."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    return INF if math.isnan(a) or math.isnan(b) else abs(a - b)


@settings(max_examples=400, deadline=None)
@given(pairs(), st.integers(1, 60))
def test_equals_a_loop_in_one_piece_and_in_two(pair, cut):
    one, two, tolerance = pair
    apart = [distance(float(a), float(b)) for a, b in zip(one, two, strict=True)]
    if tolerance is None and one.dtype == two.dtype:
        differs = [i for i in range(len(one)) if one[i : i + 1].tobytes() != two[i : i + 1].tobytes()]
    else:
        differs = [i for i, d in enumerate(apart) if d > (tolerance or 0.0)]
    found = compare(one, two, tolerance, Work())
    parts = [(at, compare(one[at:end], two[at:end], tolerance, Work())) for at, end in ((0, cut), (cut, 60)) if at < len(one)]
    joined = Found()
    for at, part in reversed(parts):
        joined = joined.joined(part.moved(at.__add__))
    assert str(joined) == str(found)  # by text, for NaN is not equal to itself
    assert found.differing == len(differs)
    assert (found.first and found.first.place) == (differs[0] if differs else None)
    assert found.largest == max(apart)
    assert (found.largest_at and found.largest_at.place) == (apart.index(max(apart)) if max(apart) else None)


def test_a_full_block():
    one = np.zeros(BLOCK, np.float32)
    two = one.copy()
    two[-1] = 2
    assert compare(one, two, None, Work()).first == Spot(BLOCK - 1, 0.0, 2.0)
