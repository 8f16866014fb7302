"""Layouts: rank numbers, places of layers, partitions, and every refusal."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.errors import LayoutError, UsageError
from shardwright.planner.layout import SPLITS, Layout, Place, Split

sizes = st.integers(1, 6)


@settings(derandomize=True)
@given(sizes, sizes, sizes)
def test_rank_numbers_and_coordinates_are_inverse(tp, pp, ep):
    layout = Layout(tp=tp, pp=pp, ep=ep)
    assert layout.ranks == tp * pp * ep
    seen = []
    for rank in range(layout.ranks):
        at = layout.coordinates(rank)
        assert layout.rank(**at) == rank
        seen.append((at["pp"], at["ep"], at["tp"]))
    assert seen == sorted(set(seen)), "tp is fastest, then ep, then pp"


def test_twenty_four_ranks():
    layout = Layout(tp=8, pp=3)
    assert layout.rank(tp=3, pp=1) == 11 and layout.coordinates(11) == {"tp": 3, "ep": 0, "pp": 1}
    assert layout.coordinates(23) == {"tp": 7, "ep": 0, "pp": 2}
    assert Layout(tp=2, ep=3, pp=4).rank(tp=1, ep=2, pp=3) == 23
    for wrong in (-1, 24):
        with pytest.raises(UsageError, match="no such rank"):
            layout.coordinates(wrong)


@settings(derandomize=True)
@given(sizes, sizes, st.integers(1, 4))
def test_virtual_chunks_lie_where_megatron_puts_them(pp, vpp, per):
    """Chunk v of stage p begins at ``v · (L / V) + p · (L / (P · V))``."""
    if pp == 1:
        vpp = 1
    layers = pp * vpp * per
    places = Layout(pp=pp, vpp=vpp).places(layers)
    assert len(places) == layers
    for layer, (p, v, local) in enumerate(places):
        assert layer == v * (layers // vpp) + p * per + local and local < per


@settings(derandomize=True)
@given(st.integers(1, 4), st.integers(1, 3), st.data())
def test_uneven_stages(pp, vpp, data):
    if pp == 1:
        vpp = 1
    stages = tuple(data.draw(st.lists(st.integers(0, 5), min_size=pp * vpp, max_size=pp * vpp)))
    places = Layout(pp=pp, vpp=vpp, stages=stages).places(sum(stages))
    assert len(places) == len(set(places)) == sum(stages)
    assert [v * pp + p for p, v, _ in places] == sorted(v * pp + p for p, v, _ in places)
    for chunk, count in enumerate(stages):
        assert [local for p, v, local in places if v * pp + p == chunk] == list(range(count))


def test_uneven_by_hand():
    assert Layout(pp=2, stages=(1, 2)).places(3) == [Place(0, 0, 0), Place(1, 0, 0), Place(1, 0, 1)]
    assert Layout(pp=2, vpp=2, stages=(1, 0, 2, 1)).places(4) == [Place(0, 0, 0), Place(0, 1, 0), Place(0, 1, 1), Place(1, 1, 0)]


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"tp": 0}, UsageError, "tp must be a positive integer"),
        ({"pp": -1}, UsageError, "pp must be a positive integer"),
        ({"tp": True}, UsageError, "tp must be a positive integer"),
        ({"ep": 1.0}, UsageError, "ep must be a positive integer"),
        ({"vpp": "2"}, UsageError, "vpp must be a positive integer"),
        ({"vpp": 2}, LayoutError, "virtual pipeline needs pp > 1"),
        ({"pp": 2, "stages": (3,)}, LayoutError, "layers per stage do not match the pipeline"),
        ({"pp": 2, "vpp": 2, "stages": (3, 4)}, LayoutError, r"4 numbers .*actual 2 numbers"),
    ],
)
def test_impossible_layouts_are_refused(wrong, error, message):
    with pytest.raises(error, match=message):
        Layout(**wrong)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(pp=5), r"12 layers do not divide into pp 5 × vpp 1.*--pp-layers"),
        (Layout(pp=4, vpp=2), r"12 layers do not divide into pp 4 × vpp 2"),
        (Layout(pp=2, stages=(6, 7)), r"do not add up; expected 12 layers, actual 13"),
    ],
)
def test_layers_that_do_not_divide_are_refused(layout, message):
    with pytest.raises(LayoutError, match=message):
        layout.places(12)


@pytest.mark.parametrize("layout", [Layout(), Layout(8, 3, 2, 4, 2), Layout(pp=3, stages=(1, 2, 3))])
def test_json_both_ways(layout):
    assert Layout.from_json(layout.to_json()) == layout
    assert Layout.from_json({"tp": 4}) == Layout(tp=4)


@pytest.mark.parametrize("wrong", [{"dp": 2}, {"tp": 2, "TP": 2}])
def test_unknown_axes_are_refused(wrong):
    with pytest.raises(UsageError, match="has no axis"):
        Layout.from_json(wrong)


FIELDS = {"num_attention_heads": 24, "num_key_value_heads": 8}


@pytest.mark.parametrize(
    ("kind", "shape", "tp", "kv", "expected"),
    [
        ("none", (7,), 3, "cut", Split(None, 1, 3)),
        ("rows", (12, 5), 3, "cut", Split(0, 3, 1)),
        ("columns", (5, 12), 4, "cut", Split(1, 4, 1)),
        ("vocab", (256, 4), 2, "cut", Split(0, 2, 1)),
        ("heads", (96, 4), 8, "cut", Split(0, 8, 1)),
        ("head_columns", (4, 96), 8, "cut", Split(1, 8, 1)),
        ("kv_heads", (32, 4), 4, "replicate", Split(0, 4, 1)),
        ("kv_heads", (32, 4), 24, "replicate", Split(0, 8, 3)),
        ("kv_heads", (64, 4), 16, "cut", Split(0, 16, 1)),
        ("qkv", (160, 4), 8, "cut", Split(0, 8, 1)),
    ],
)
def test_partitions(kind, shape, tp, kv, expected):
    assert SPLITS[kind](shape, tp, FIELDS, kv) == expected


@pytest.mark.parametrize(
    ("kind", "shape", "tp", "kv"),
    [
        ("rows", (12, 5), 5, "cut"),
        ("columns", (12, 5), 3, "cut"),
        ("vocab", (131, 4), 2, "cut"),
        ("heads", (96, 4), 16, "cut"),
        ("heads", (100, 4), 8, "cut"),
        ("head_columns", (4, 96), 16, "cut"),
        ("head_columns", (4, 100), 8, "cut"),
        ("kv_heads", (32, 4), 3, "replicate"),
        ("kv_heads", (32, 4), 3, "cut"),
        ("kv_heads", (33, 4), 4, "cut"),
        ("qkv", (160, 4), 3, "cut"),
        ("qkv", (160, 4), 16, "cut"),
        ("qkv", (161, 4), 8, "cut"),
    ],
)
def test_partitions_that_do_not_divide_say_the_numbers(kind, shape, tp, kv):
    with pytest.raises(LayoutError) as refused:
        SPLITS[kind](shape, tp, FIELDS, kv)
    assert f"tp {tp}" in str(refused.value)
    assert refused.value.expected is not None and refused.value.actual is not None
