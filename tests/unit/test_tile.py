"""Tiles: random layouts through any strip size equal numpy; the fast path equals the general one; what data contradicts is said."""

from math import prod
from pathlib import Path
from threading import Lock
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.errors import PlanError, ReplicaMismatchError, RunError
from shardwright.executors import sources as sources_module
from shardwright.executors import targets as targets_module
from shardwright.executors import transfer
from shardwright.executors.execute import compare, execute, read_box
from shardwright.executors.layouts import moves
from shardwright.executors.local import run
from shardwright.executors.sources import SourceFiles
from shardwright.executors.targets import TargetFiles
from shardwright.executors.tile import Receipt
from shardwright.executors.transfer import gather, read_steps, shared
from shardwright.planner.plan import Output, SourceFile, ValueOp
from shardwright.planner.tensor.lazy import concat, fill, leaf
from shardwright.planner.tensor.pieces import Piece
from tests.unit.hand_made import Maker, copy_program, fit_of

ROOMY = 1 << 30
COUNTER = iter(range(1 << 30))


def factorisations(size):
    """Shapes of that many elements."""
    found = [(size,)]
    for a in range(2, size):
        if size % a == 0:
            found.append((a, size // a))
            found += [(a, b, size // a // b) for b in range(2, size // a) if size // a % b == 0]
    return found


@st.composite
def chains(draw, size, *, bijective):
    """The same chain of layout operations on leaves and on numpy arrays: (lazy, evaluate(arrays), leaf shapes)."""
    count = draw(st.integers(1, 3))
    cuts = sorted(draw(st.lists(st.integers(1, size - 1), min_size=count - 1, max_size=count - 1, unique=True))) if size > 3 else []
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
    lazy = concat([leaf(i, (n,)) for i, n in enumerate(sizes)], 0)
    program = []
    for _ in range(draw(st.integers(0, 5))):
        kinds = ["reshape", "permute", "flip", "rotate"] + ([] if bijective else ["zeros", "repeat"])
        kind, axis = draw(st.sampled_from(kinds)), draw(st.integers(0, len(lazy.shape) - 1))
        extent = lazy.shape[axis]
        at = draw(st.integers(0, extent - 1))
        if kind == "reshape":
            shape = draw(st.sampled_from(factorisations(size)))
            lazy = lazy.reshape(*shape)
            program.append(lambda a, shape=shape: a.reshape(shape))
        elif kind == "permute":
            axes = draw(st.permutations(range(len(lazy.shape))))
            lazy = lazy.permute(*axes)
            program.append(lambda a, axes=axes: a.transpose(axes))
        elif kind == "flip":
            lazy = lazy.slice(axis, extent - 1, -1, -1)
            program.append(lambda a, axis=axis: np.flip(a, axis))
        elif kind == "rotate":
            head, tail = lazy.split(axis, [at, extent - at])
            lazy = concat([tail, head], axis)
            program.append(lambda a, axis=axis, at=at: np.roll(a, -at, axis))
        elif kind == "zeros":
            head, tail = lazy.split(axis, [at, extent - at])
            lazy = concat([fill(head.shape), tail], axis)
            program.append(
                lambda a, axis=axis, at=at: np.where(
                    np.expand_dims(np.arange(a.shape[axis]) < at, tuple(k for k in range(a.ndim) if k != axis)), a.dtype.type(0), a
                )
            )
        else:
            lazy = lazy.slice(axis, at, at + 1).expand(axis, extent)
            program.append(lambda a, axis=axis, at=at: np.repeat(a.take([at], axis), a.shape[axis], axis))

    def evaluate(arrays):
        whole = np.concatenate(arrays)
        for step in program:
            whole = step(whole)
        return whole

    return lazy, evaluate, sizes


@st.composite
def conversions(draw):
    size = draw(st.sampled_from([1, 2, 6, 12, 24, 36, 60, 96, 120]))
    source = draw(chains(size, bijective=False))
    target = draw(chains(size, bijective=True))
    shape = target[0].shape
    axes = draw(st.permutations(range(len(shape))))
    return {
        "source": source,
        "target": target,
        "kind": draw(st.sampled_from([("uint8", np.uint8), ("bfloat16", np.uint16), ("float32", np.uint32), ("int64", np.uint64)])),
        "cut": tuple(axes[: draw(st.integers(0, 1))]),
        "whole": draw(st.booleans()),
        "step": draw(st.sampled_from([None, 1, 2, 5])),
        "strip": draw(st.sampled_from([8, 16, 64, 200, 4096])),
        "workers": draw(st.integers(1, 3)),
        "knobs": {
            "GAP": draw(st.sampled_from([0, 6, 8192])),
            "DIRECT_MIN": draw(st.sampled_from([0, 4, 16384])),
            "VECTOR_MIN": draw(st.sampled_from([0, 4, 16384])),
            "VECTOR_MAX": draw(st.sampled_from([1, 2, 1024])),
            "VECTOR": draw(st.booleans()),
        },
    }


def make(root: Path, case):
    """The plan of a case, its source arrays and what its targets must hold."""
    lazy, evaluate, sizes = case["source"]
    scatter, evaluate_target, target_sizes = case["target"]
    name, kind = case["kind"]
    size = np.dtype(kind).itemsize
    random = np.random.default_rng(0)
    arrays = [random.integers(1, np.iinfo(kind).max, n, kind) for n in sizes]
    maker = Maker(root)
    files = [maker.source(f"in{i}", b"#" * (3 + i) + a.tobytes()) for i, a in enumerate(arrays)]
    out = [maker.target(f"out/{i}", 2 + n * size, static=((0, b"hi"),)) for i, n in enumerate(target_sizes)]
    shape = scatter.shape
    program = copy_program("w", name, shape, lazy.reshape(*shape).pieces, scatter.pieces, cut=case["cut"], whole=case["whole"])
    number = maker.program(program, [([(f, 3 + i) for i, f in enumerate(files)], [(f, 2) for f in out])])
    maker.tiles(number, 0, step=case["step"])
    for i, n in enumerate(target_sizes):
        maker.entry(f"t{i}", name, (n,), out[i], 2)
    pivot = evaluate(arrays).reshape(shape)
    # Where each element of the targets sits in the pivot: the same chain applied to their own numbers.
    places = evaluate_target(np.split(np.arange(sum(target_sizes)), np.cumsum(target_sizes)[:-1]))
    wanted = np.empty(pivot.size, kind)
    wanted[places.ravel()] = pivot.ravel()
    return maker.plan(), arrays, np.split(wanted, np.cumsum(target_sizes)[:-1])


def convert(plan, root, case):
    sources, targets = SourceFiles(root, plan.source_files, limit=2), TargetFiles(root / "data", plan.target_files, limit=1)
    try:
        targets.create()
        total, lock = Receipt(), Lock()

        def finished(tile, receipt):
            with lock:
                total.add(receipt)

        run(plan, sources, targets, fit_of(plan, case["strip"], case["workers"]), tiles=range(len(plan.tiles)), finished=finished)
        return total
    finally:
        sources.close()
        targets.close()


@settings(max_examples=400, deadline=None)
@given(conversions())
def test_any_layout_through_any_strip_equals_numpy(tmp_path_factory, case):
    root = tmp_path_factory.getbasetemp() / f"tile{next(COUNTER)}"
    root.mkdir()
    plan, _, wanted = make(root, case)
    with mock.patch.multiple(transfer, **case["knobs"]):
        receipt = convert(plan, root, case)
    for file, array in zip(plan.target_files, wanted, strict=True):
        assert (root / "data" / file.path).read_bytes() == b"hi" + array.tobytes()
    assert receipt.bytes_written == sum(a.nbytes for a in wanted)


@settings(max_examples=150, deadline=None)
@given(conversions())
def test_scattered_reads_equal_the_general_way(tmp_path_factory, case):
    root = tmp_path_factory.getbasetemp() / f"vector{next(COUNTER)}"
    root.mkdir()
    plan, _, _ = make(root, case)
    program = plan.programs[0]
    places = [
        (plan.source_files[int(f)].path, int(o))
        for f, o in zip(plan.bindings[0].source_file[0], plan.bindings[0].source_offset[0], strict=True)
    ]
    results = []
    for vector in (True, False):
        with mock.patch.multiple(transfer, **case["knobs"] | {"VECTOR": vector, "VECTOR_MIN": 1}):
            results.append(read_box(program.gather, program.shape, program.dtype, operands=places, root=root).tobytes())
    assert results[0] == results[1]


def test_the_vectored_path_is_taken(tmp_path):
    data = np.arange(4 * 8192, dtype=np.uint16)
    (tmp_path / "a").write_bytes(data.tobytes())
    merged = concat([leaf(0, (2, 8192)), leaf(1, (2, 8192))], 1)
    with mock.patch.object(transfer, "_read_scattered", wraps=transfer._read_scattered) as spy:
        found = read_box(merged.pieces, merged.shape, "bfloat16", operands=[("a", 0), ("a", 2 * 8192 * 2)], root=tmp_path)
    assert spy.call_count == 2
    halves = data.reshape(2, 2, 8192)
    assert np.array_equal(found.view(np.uint16).reshape(2, 16384), np.concatenate(halves, axis=1))


def test_read_box_reads_only_the_box(tmp_path):
    data = np.arange(64, dtype=np.float32).reshape(8, 8)
    (tmp_path / "a").write_bytes(b"x" * 7 + data.tobytes())
    found = read_box(leaf(0, (8, 8)).T.pieces, (8, 8), "float32", operands=[("a", 7)], root=tmp_path, lo=(2, 1), hi=(5, 3))
    assert np.array_equal(found.view(np.float32).reshape(3, 2), data.T[2:5, 1:3])


def test_interleaved_parts_that_lie_in_memory_as_in_the_file_are_one_read():
    """Three parts per group, as in a fused QKV tensor: gaps between the runs of one part are the runs of the others."""
    whole = leaf(0, (4, 3, 8))
    kept = [Piece(0, 8 * k, 8 * k, ((4, 24, 24), (8, 1, 1))) for k in range(3)]
    (one,) = moves(kept, (4, 3, 8), (0, 0, 0), (4, 3, 8), 2)
    assert (one.file, one.mem, one.nbytes) == (0, 0, 4 * 3 * 8 * 2)
    # Two of the three: one run of two rows per group, and no farther.
    (two,) = moves(kept[:2], (4, 3, 8), (0, 0, 0), (4, 3, 8), 2)
    assert two.dims == ((4, 48, 48), (16, 2, 2))
    # In another order in memory they stay apart.
    turned = concat([whole.slice(1, k, k + 1) for k in (2, 0, 1)], 1)
    assert len(moves(turned.pieces, (4, 3, 8), (0, 0, 0), (4, 3, 8), 2)) == 2


@pytest.mark.parametrize("staging", [1 << 10, 4 << 10, 64 << 10])
def test_parts_of_one_range_are_read_together(staging):
    """Whatever their order in memory, and where the staging buffer holds a part of the rows only."""
    data = np.arange(40 * 3 * 8, dtype=np.uint16).reshape(40, 3, 8)
    turned = concat([leaf(0, data.shape).slice(1, k, k + 1) for k in (2, 0, 1)], 1)
    steps = [step for move in moves(turned.pieces, data.shape, (0, 0, 0), data.shape, 2) for step in read_steps(move, staging * 7 // 8)]
    result, calls = bytearray(data.nbytes), []

    def read(offset, buffers):
        (buffer,) = buffers
        calls.append((offset, len(buffer)))
        buffer[:] = data.tobytes()[offset : offset + len(buffer)]

    for step in shared(steps, staging):
        gather(step, read, 0, memoryview(result), memoryview(bytearray(staging)), memoryview(bytes(16)))
    assert np.array_equal(np.frombuffer(result, np.uint16).reshape(data.shape), data[:, [2, 0, 1]])
    alone = sum(step.nbytes * prod(dim[0] for dim in step.outer) for step in steps)
    assert sum(nbytes for _, nbytes in calls) <= data.nbytes * 1.1 and alone > data.nbytes * 1.6


@pytest.mark.parametrize("vector", [True, False])
def test_short_reads_and_writes_are_completed(tmp_path, monkeypatch, vector):
    real_read, real_write = sources_module.os.preadv, targets_module.os.pwrite
    monkeypatch.setattr(sources_module.os, "preadv", lambda fd, views, at: real_read(fd, [v[: max(1, len(v) // 3)] for v in views][:1], at))
    monkeypatch.setattr(targets_module.os, "pwrite", lambda fd, view, at: real_write(fd, view[: max(1, len(view) // 2)], at))
    monkeypatch.setattr(transfer, "VECTOR_MIN", 1)
    monkeypatch.setattr(transfer, "VECTOR", vector)
    shape = (6, 8)
    data = np.arange(48, dtype=np.uint16).reshape(shape)
    maker = Maker(tmp_path)
    files = [maker.source(f"in{i}", data[:, 4 * i : 4 * i + 4].tobytes()) for i in range(2)]
    out = maker.target("out", 96)
    gather = concat([leaf(i, (6, 4)) for i in range(2)], 1).pieces
    number = maker.program(copy_program("w", "bfloat16", shape, gather, leaf(0, shape).pieces), [([(f, 0) for f in files], [(out, 0)])])
    maker.tiles(number, 0)
    convert(maker.plan(), tmp_path, {"strip": 4096, "workers": 1})
    assert (tmp_path / "data" / "out").read_bytes() == data.tobytes()


def copy_plan(root, shape=(8, 4), **more):
    """One bfloat16 tensor from `a` (and a replica from `b`) to `out`."""
    data = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    maker = Maker(root)
    sources = [(maker.source(name, data.tobytes() + b"tail" * 100), 0) for name in ("a", "b")]
    out = maker.target("out", data.nbytes)
    pieces = leaf(0, shape).pieces
    number = maker.program(copy_program("w", "bfloat16", shape, pieces, pieces, **more), [(sources, [(out, 0)])])
    maker.tiles(number, 0, step=3)
    maker.entry("w", "bfloat16", shape, out, 0)
    return maker, data


@pytest.mark.parametrize("rows", [slice(0, 8), slice(5, 7)])
def test_replicas_that_differ_are_named(tmp_path, rows):
    shape = (8, 4)
    replica = tuple(
        p._replace(dst_off=p.dst_off + rows.start * 4, src_off=rows.start * 4) for p in leaf(1, (rows.stop - rows.start, 4)).pieces
    )
    maker, data = copy_plan(tmp_path, shape, replicas=(replica,))
    execute(maker.plan(), tmp_path.parent / f"{tmp_path.name}-good", memory=ROOMY)
    raw = bytearray(data.tobytes() + b"tail" * 100)
    raw[(6 * 4 + 2) * 2 + 1] ^= 1
    (tmp_path / "b").write_bytes(raw)
    maker.sources[1] = SourceFile("b", len(raw), (tmp_path / "b").stat().st_mtime_ns, "")
    out = tmp_path.parent / f"{tmp_path.name}-out"
    with pytest.raises(ReplicaMismatchError, match=r"first at element \(6, 2\): tensor 'w.0', file a and b") as caught:
        execute(maker.plan(), out, memory=ROOMY)
    assert caught.value.exit_code == 4
    assert not out.exists() and not out.with_name(out.name + ".partial").exists()


def test_a_source_that_shrinks_or_changes_is_refused(tmp_path):
    maker, _ = copy_plan(tmp_path)
    plan = maker.plan()
    (tmp_path / "a").write_bytes(b"short")
    with pytest.raises(PlanError, match="changed since it was planned: file a"):
        execute(plan, tmp_path.parent / f"{tmp_path.name}-x", memory=ROOMY)
    with pytest.raises(RunError, match="shrank") as caught:
        read_box(leaf(0, (8, 4)).pieces, (8, 4), "bfloat16", operands=[("a", 0)], root=tmp_path)
    assert caught.value.file == "a"


def test_padding_is_classified_and_zeros_are_written(tmp_path):
    shape, row = (5, 4), 4 * 2
    real = np.arange(1, 21, dtype=np.uint16).reshape(shape)
    padding = np.array([[0] * 4, real[-1], [9] * 4, [0] * 4], np.uint16)
    maker = Maker(tmp_path)
    source = maker.source("a", real.tobytes() + padding.tobytes())
    out = maker.target("out", 8 * row)
    extra = Piece(0, 0, 20, ((16, 0, 1),))
    zeros = Piece(0, 0, 20, ((12, 0, 1),))
    pieces = leaf(0, shape).pieces
    program = copy_program(
        "w", "bfloat16", shape, pieces, pieces, padding=(extra,), outputs=(Output("bfloat16", shape, (1, 1), pieces, (zeros,)),)
    )
    maker.tiles(maker.program(program, [([(source, 0)], [(out, 0)])]), 0, step=2)
    plan, target = maker.plan(), tmp_path.parent / f"{tmp_path.name}-out"
    outcome = execute(plan, target, memory=ROOMY, workers=2)
    found = outcome.padding["w.0"]
    assert (found.zeros, found.copies, found.other, found.nbytes) == (2, 1, 1, 32)
    assert (target / "out").read_bytes() == real.tobytes() + bytes(3 * row)
    assert (outcome.bytes_read, outcome.bytes_written) == (9 * row, 8 * row)
    (target / "out").write_bytes(real.tobytes() + bytes(3 * row - 1) + b"\1")
    assert [(d.what, d.offset) for d in compare(plan, target, memory=ROOMY)] == [("header", 8 * row - 1)]


def test_ops_run_on_strips(tmp_path):
    torch = pytest.importorskip("torch")
    shape = (64, 32)
    weight = torch.randn(shape, dtype=torch.bfloat16)
    maker = Maker(tmp_path)
    source = maker.source("a", weight.view(torch.int16).numpy().tobytes())
    out = maker.target("out", 64 * 32 + 64 * 2 + 64 * 32 * 4)
    op = ValueOp("int8", "shardwright.executors.kernels:quantise_int8_channel", (1, 0), 2)
    outputs = (Output("int8", shape, (1, 1), leaf(0, shape).pieces), Output("bfloat16", (64, 1), (1, 32), leaf(1, (64, 1)).pieces))
    quantise = copy_program("q", "bfloat16", shape, leaf(0, shape).pieces, (), op=op, outputs=outputs)
    cast = ValueOp("cast", "shardwright.executors.kernels:cast", (1, 1), 0)
    widen = copy_program(
        "c",
        "bfloat16",
        shape,
        leaf(0, shape).T.reshape(64, 32).pieces,
        (),
        op=cast,
        outputs=(Output("float32", shape, (1, 1), leaf(0, shape).pieces),),
    )
    maker.tiles(maker.program(quantise, [([(source, 0)], [(out, 0), (out, 64 * 32)])]), 0, step=20)
    maker.tiles(maker.program(widen, [([(source, 0)], [(out, 64 * 34)])]), 0, step=20)
    convert(maker.plan(), tmp_path, {"strip": 1000, "workers": 2})
    raw = (tmp_path / "data" / "out").read_bytes()
    scale = weight.abs().amax(1, keepdim=True) / 127.5
    payload = torch.round(torch.clamp(weight / scale, -128, 127)).to(torch.int8)
    assert raw[: 64 * 32] == payload.numpy().tobytes()
    assert raw[64 * 32 : 64 * 34] == scale.view(torch.int16).numpy().tobytes()
    assert raw[64 * 34 :] == weight.T.reshape(shape).float().numpy().tobytes()


def test_a_pipe_in_the_place_of_a_source_is_refused_without_waiting(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    sources = SourceFiles(tmp_path, [sources_module.unchecked("pipe")])
    with pytest.raises(RunError, match="not an ordinary file: file pipe"), sources.reading(0):
        pass
