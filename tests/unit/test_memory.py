"""The memory model: strips cover, fits fit, refusals name the smallest bound that works."""

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.errors import MemoryBoundError, UnsupportedError
from shardwright.planner.passes.memory import (
    BASE_BYTES,
    MIB,
    STRIP_BYTES,
    TORCH_BASE_BYTES,
    fit,
    itemsize,
    min_memory,
    slab,
    strips,
)
from shardwright.planner.plan import Output, ValueOp
from shardwright.planner.tensor.lazy import leaf
from tests.unit.hand_made import copy_program


def program(shape, **more):
    pieces = leaf(0, shape).pieces
    return copy_program("w", "bfloat16", shape, pieces, pieces, **more)


@st.composite
def boxes(draw):
    shape = tuple(draw(st.lists(st.integers(1, 12), min_size=0, max_size=4)))
    block = tuple(draw(st.sampled_from([0, 1, 2, 3, 5])) for _ in shape)
    axes = draw(st.permutations(range(len(shape))))
    cut = tuple(axes[: draw(st.integers(0, min(2, len(shape))))])
    op = draw(st.sampled_from([None, ValueOp("x", "m:f", block, 0)]))
    lo, hi = [0] * len(shape), list(shape)
    for axis in cut:
        unit = block[axis] if op else 1
        lo[axis] = draw(st.integers(0, shape[axis] - 1)) // (unit or shape[axis]) * (unit or shape[axis])
        hi[axis] = shape[axis] if unit == 0 else min(shape[axis], lo[axis] + unit * draw(st.integers(1, 6)))
    return program(shape, op=op, cut=cut), tuple(lo), tuple(hi), draw(st.integers(2, 600))


@given(boxes())
def test_strips_cover_a_box_once_on_blocks_and_within_their_slab(given):
    w, lo, hi, nbytes = given
    seen = set()
    limit = slab(w, nbytes).pivot
    for a, b in strips(w, lo, hi, nbytes):
        assert all(x <= p < q <= y for x, p, q, y in zip(lo, a, b, hi, strict=True))
        assert prod(q - p for p, q in zip(a, b, strict=True)) * 2 <= limit
        for axis, block in enumerate(w.op.block if w.op else ()):
            unit = block or w.shape[axis]
            assert a[axis] % unit == 0 and (b[axis] % unit == 0 or b[axis] == hi[axis])
        assert (a, b) not in seen
        seen.add((a, b))
    assert sum(prod(q - p for p, q in zip(*s, strict=True)) for s in seen) == prod(q - p for p, q in zip(lo, hi, strict=True))
    if w.op is None:
        assert all(prod(q - p for p, q in zip(*s, strict=True)) * 2 <= nbytes for s in seen)


def test_strips_cut_the_cut_axis_first():
    wide = program((4096, 4096), cut=(1,))
    assert next(iter(strips(wide, (0, 0), (4096, 4096), STRIP_BYTES))) == ((0, 0), (4096, 512))
    assert next(iter(strips(program((4096, 4096), cut=()), (0, 0), (4096, 4096), STRIP_BYTES))) == ((0, 0), (512, 4096))
    one_long_row = program((2, 8 * MIB))
    assert [b for _, b in strips(one_long_row, (0, 0), (1, 8 * MIB), STRIP_BYTES)][:2] == [(1, 2 * MIB), (1, 4 * MIB)]


def test_a_whole_program_is_one_strip_and_counts_with_its_largest_item():
    transpose = program((4096, 4096), whole=True)
    assert list(strips(transpose, (0, 0), (1024, 4096), STRIP_BYTES)) == [((0, 0), (1024, 4096))]
    assert slab(transpose, STRIP_BYTES, 1024 * 4096).pivot == 8 * MIB
    assert slab(transpose, STRIP_BYTES).pivot == 32 * MIB


def test_fit_halves_strips_then_takes_workers_away():
    programs = [program((4096, 4096))]
    roomy = fit(programs, 1 << 30, 8, 0)
    assert (roomy.workers, roomy.strip_bytes, roomy.slab_bytes) == (8, STRIP_BYTES, 2 * STRIP_BYTES)
    assert roomy.peak_bytes == BASE_BYTES + 8 * 2 * STRIP_BYTES
    tight = fit(programs, BASE_BYTES + 8 * 2 * MIB, 8, 0)
    assert (tight.workers, tight.strip_bytes) == (8, MIB)
    least = min_memory(programs, 1000)
    assert fit(programs, least, 8, 1000).workers == 1
    with pytest.raises(MemoryBoundError, match="--memory 61MiB") as caught:
        fit(programs, least - 1, 8, 1000)
    assert caught.value.expected == least


def test_replicas_and_ops_have_their_buffers():
    pieces = leaf(0, (256, 1024)).pieces
    assert slab(program((256, 1024), replicas=(pieces,)), MIB)[:3] == (512 << 10, MIB, 512 << 10)
    op = ValueOp("int8", "m:f", (1, 0), 2)
    outputs = (Output("int8", (256, 1024), (1, 1), pieces), Output("bfloat16", (256, 1), (1, 1024), leaf(1, (256, 1)).pieces))
    quantise = program((256, 1024), op=op, outputs=outputs)
    assert slab(quantise, MIB) == (512 << 10, MIB, 0, (256 << 10, 4096), 512 << 10, 0)
    mean = program((256, 1024), replicas=(pieces,), average=True)
    assert slab(mean, MIB) == (512 << 10, MIB, 512 << 10, (), 0, 256 * 1024 * 5)
    assert fit([quantise], 1 << 30, 1, 0).base_bytes == TORCH_BASE_BYTES


def test_an_uneven_last_block_has_room_for_its_scales():
    op = ValueOp("fp8", "m:f", (128, 128), 0)
    outputs = (Output("float32", (2, 2), (128, 128), leaf(0, (2, 2)).pieces),)
    assert slab(program((130, 130), op=op, outputs=outputs), MIB).outputs == (4096,)
    from shardwright.planner.passes.memory import _output_elements

    assert _output_elements(program((130, 130), op=op, outputs=outputs), outputs[0], 130 * 130) == 4


def test_packed_dtypes_have_no_itemsize():
    with pytest.raises(UnsupportedError, match="packed"):
        itemsize("float4_e2m1fn")
