"""Mutations: whatever is broken in a plan, an operation or a published target, something must notice.

* A plan that is no bijection any more (a piece removed, doubled or shifted; an offset, a tile, a header byte) is refused
  by `check`.
* A plan that is another bijection (two heads swapped, gate and up swapped) passes `check`; then the reference and
  `verify` must fail.
* A byte of a published target flips: `verify` names tensor and element.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

import shardwright as sw
from shardwright.errors import PlanError, ReplicaMismatchError
from shardwright.planner.passes.build import build
from shardwright.planner.passes.check import check
from shardwright.planner.plan import Bindings, Plan, Program, Tiles
from shardwright.planner.request import Request
from shardwright.planner.tensor.lazy import LazyTensor, concat
from shardwright.planner.tensor.pieces import Piece, count
from tests.unit import reference as ref
from tests.unit.reference import Cut, Model

TIED = Model(layers=2, heads=4, kv=2, hidden=16, ffn=16, vocab=21, tied=True)
FREE = Model(layers=2, heads=4, kv=2, hidden=16, ffn=16, vocab=21, qkv_bias=True, out_bias=True, mlp_bias=True)
Mutant = tuple[str, Plan]


@pytest.fixture(scope="module", autouse=True)
def no_sync() -> Iterator[None]:
    """These tests look at bytes, not at what survives a power cut: waiting for the disk is most of their time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


def megatron(cut: Cut, **more: object) -> Request:
    return Request("megatron-legacy", sw.Layout(tp=cut.tp, pp=cut.pp), **more)


@pytest.fixture(scope="module")
def plans(tmp_path_factory) -> dict[str, Plan]:
    """Plans with every kind of part: fused pivots, replicas, padding read and written, casts, several tiles per pivot."""
    root = tmp_path_factory.mktemp("mutations")
    tied, free = (ref.write(root / str(m.tied), m, m.weights()) for m in (TIED, FREE))
    sw.convert(tied, root / "tied-2x2", to="megatron-legacy", layout=sw.Layout(tp=2, pp=2))
    sw.convert(tied, root / "serving", to="ranks", layout=sw.Layout(tp=4, pp=2), pad_vocab_to=4)
    return {
        "merge": build(sw.open(free).source, megatron(Cut(2, 2)), tile_bytes=300),
        "tied": build(sw.open(tied).source, megatron(Cut(4, 2))),
        "back": build(sw.open(root / "tied-2x2").source, Request("huggingface"), tile_bytes=500),
        "one-hop": build(sw.open(root / "tied-2x2").source, megatron(Cut(4, 1), spec="local")),
        "replicas": build(sw.open(root / "serving").source, Request("ranks", sw.Layout(tp=2), dialect="megatron")),
        "cast": build(sw.open(free).source, Request("ranks", sw.Layout(tp=2), pad_vocab_to=2, dtype="bfloat16")),
        "int8": build(sw.open(tied).source, Request("huggingface", quantize="int8")),
    }


NAMES = ["merge", "tied", "back", "one-hop", "replicas", "cast", "int8"]


def with_program(plan: Plan, number: int, **changes: object) -> Plan:
    programs = list(plan.programs)
    programs[number] = replace(programs[number], **changes)
    return replace(plan, programs=tuple(programs))


def broken(pieces: tuple[Piece, ...]) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    """Each piece removed, doubled, shifted on either side, too long, or of another operand."""
    for i, piece in enumerate(pieces):
        before, after = pieces[:i], pieces[i + 1 :]
        yield f"piece {i} removed", (*before, *after)
        yield f"piece {i} doubled", (*before, piece, piece, *after)
        for by in (-1, 1):
            yield f"piece {i} shifted by {by} where it goes", (*before, piece._replace(dst_off=piece.dst_off + by), *after)
            yield f"piece {i} shifted by {by} where it comes from", (*before, piece._replace(src_off=piece.src_off + by), *after)
        for k, (extent, dst, src) in enumerate(piece.dims):
            for changed in ((extent + 1, dst, src), (extent - 1, dst, src), (extent, dst, src + 1), (extent, dst + 1, src)):
                dims = (*piece.dims[:k], changed, *piece.dims[k + 1 :])
                side = "goes" if changed[1] != dst else "comes from"
                yield (
                    f"dim {k} of piece {i} is {changed}, not {piece.dims[k]}, where it {side}",
                    (*before, piece._replace(dims=dims), *after),
                )


def program_mutants(plan: Plan) -> Iterator[Mutant]:
    for number, program in enumerate(plan.programs):
        what = f"program {number} ({program.label})"
        for how, pieces in broken(program.gather):
            yield f"{what} gather: {how}", with_program(plan, number, gather=pieces)
        for r, replica in enumerate(program.replicas):
            rest = (program.replicas[:r], program.replicas[r + 1 :])
            yield f"{what}: replica {r} removed", with_program(plan, number, replicas=(*rest[0], *rest[1]))
            for how, pieces in broken(replica):
                if "where it goes" in how and sum(map(count, replica)) < program.nbytes // 4:
                    continue  # a copy of a part, compared with another part: the data will say so, see below
                yield f"{what} replica {r}: {how}", with_program(plan, number, replicas=(*rest[0], pieces, *rest[1]))
        for i, region in enumerate(program.padding):
            rest = (program.padding[:i], program.padding[i + 1 :])
            yield f"{what}: padding {i} removed", with_program(plan, number, padding=(*rest[0], *rest[1]))
            yield f"{what}: padding {i} doubled", with_program(plan, number, padding=(*program.padding, region))
            moved = region._replace(src_off=region.src_off - 1)
            yield f"{what}: padding {i} shifted", with_program(plan, number, padding=(*rest[0], moved, *rest[1]))
        for k, output in enumerate(program.outputs):
            rest = (program.outputs[:k], program.outputs[k + 1 :])
            for how, pieces in broken(output.scatter):
                yield (
                    f"{what} output {k} scatter: {how}",
                    with_program(plan, number, outputs=(*rest[0], replace(output, scatter=pieces), *rest[1])),
                )
            for i, region in enumerate(output.zeros):
                others = output.zeros[:i] + output.zeros[i + 1 :]
                for how, zeros in (
                    ("removed", others),
                    ("doubled", (*output.zeros, region)),
                    ("shifted", (*others, region._replace(src_off=region.src_off - 1))),
                ):
                    yield (
                        f"{what}: zeros {i} of output {k} {how}",
                        with_program(plan, number, outputs=(*rest[0], replace(output, zeros=zeros), *rest[1])),
                    )
            yield (
                f"{what}: output {k} of another dtype",
                with_program(plan, number, outputs=(*rest[0], replace(output, dtype="float64"), *rest[1])),
            )


def binding_mutants(plan: Plan) -> Iterator[Mutant]:
    for number, bound in enumerate(plan.bindings):
        for field in fields(Bindings)[1:]:
            table = getattr(bound, field.name)
            for row in {0, len(table) - 1}:
                for column in range(table.shape[1]):
                    for by in (-4, 4) if field.name.endswith("offset") else (1,):
                        changed = table.copy()
                        changed[row, column] += by
                        bindings = list(plan.bindings)
                        bindings[number] = replace(bound, **{field.name: changed})
                        yield f"program {number}: {field.name}[{row}, {column}] {by:+}", replace(plan, bindings=tuple(bindings))
            if len(table) > 1:
                changed = table.copy()
                changed[0] = changed[1]
                if not (changed == table).all():
                    bindings = list(plan.bindings)
                    bindings[number] = replace(bound, **{field.name: changed})
                    yield f"program {number}: {field.name} of row 1 in row 0", replace(plan, bindings=tuple(bindings))


def tile_mutants(plan: Plan) -> Iterator[Mutant]:
    tiles = plan.tiles
    columns = ("program", "row", "lo", "hi")

    def rebuilt(order: list[int], **changed: np.ndarray) -> Plan:
        count = len(order)
        parts = {name: (changed.get(name, getattr(tiles, name)))[order] for name in columns}
        one = np.ones(count, np.int64)
        return replace(plan, tiles=Tiles(np.arange(count + 1), **parts, requests=one, bytes_read=one, bytes_written=one))

    every = list(range(len(tiles.program)))
    check(rebuilt(every))
    for i in every[:: len(every) // 25 + 1]:
        yield f"item {i} removed", rebuilt(every[:i] + every[i + 1 :])
        yield f"item {i} doubled", rebuilt([*every, i])
        program = plan.programs[int(tiles.program[i])]
        for column in range(len(program.cut)):
            for name in ("lo", "hi"):
                for by in (-1, 1):
                    moved = getattr(tiles, name).copy()
                    moved[i, column] += by
                    yield f"item {i}: {name} of axis {program.cut[column]} {by:+}", rebuilt(every, **{name: moved})


def file_mutants(plan: Plan) -> Iterator[Mutant]:
    count = len(plan.target_files)
    for number in sorted({0, 1, count // 2, count - 1}):
        file = plan.target_files[number]
        changes = [("longer", {"nbytes": file.nbytes + 1}), ("shorter", {"nbytes": file.nbytes - 1})]
        for i in sorted({0, len(file.static) // 2, len(file.static) - 1} if file.static else ()):
            offset, data = file.static[i]
            rest = (file.static[:i], file.static[i + 1 :])
            changes += [
                (f"static {i} removed", {"static": (*rest[0], *rest[1])}),
                (f"static {i} doubled", {"static": (*file.static, (offset, data))}),
                (f"static {i} shifted", {"static": (*rest[0], (offset + 1, data), *rest[1])}),
                (f"static {i} cut short", {"static": (*rest[0], (offset, data[:-1]), *rest[1])}),
                (f"static {i} too long", {"static": (*rest[0], (offset, data + b" "), *rest[1])}),
            ]
        for how, change in changes:
            files = list(plan.target_files)
            files[number] = replace(file, **change)
            yield f"{file.path}: {how}", replace(plan, target_files=tuple(files))


def entry_mutants(plan: Plan) -> Iterator[Mutant]:
    for side in ("source_tensors", "target_tensors"):
        entries = getattr(plan, side)
        for i in {0, len(entries) // 2, len(entries) - 1}:
            rest = (entries[:i], entries[i + 1 :])
            yield f"{side} {i} removed", replace(plan, **{side: (*rest[0], *rest[1])})
            moved = entries[i]._replace(offset=entries[i].offset + 4)
            yield f"{side} {i} moved", replace(plan, **{side: (*rest[0], moved, *rest[1])})
            larger = entries[i]._replace(shape=(entries[i].shape[0] + 1, *entries[i].shape[1:]))
            yield f"{side} {i} larger", replace(plan, **{side: (*rest[0], larger, *rest[1])})


def survivors(mutants: Iterator[Mutant]) -> tuple[int, list[str]]:
    """How many mutants there were, and those that `check` lets pass."""
    total, alive = 0, []
    for how, plan in mutants:
        total += 1
        try:
            check(plan)
        except PlanError:
            continue
        alive.append(how)
    return total, alive


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mutants", [program_mutants, binding_mutants, tile_mutants, file_mutants, entry_mutants])
def test_check_refuses_whatever_is_no_bijection(mutants: Callable[[Plan], Iterator[Mutant]], name, plans):
    check(plans[name])
    total, alive = survivors(mutants(plans[name]))
    assert total > 5
    assert alive == []


def test_a_copy_compared_with_the_wrong_part_is_found_by_the_data(plans, tmp_path):
    plan, tried = plans["replicas"], 0
    for number, program in enumerate(plan.programs):
        for r, replica in enumerate(program.replicas):
            if sum(map(count, replica)) < program.nbytes // 4:
                moved = (replica[0]._replace(dst_off=replica[0].dst_off - 1), *replica[1:])
                wrong = with_program(plan, number, replicas=(*program.replicas[:r], moved, *program.replicas[r + 1 :]))
                with pytest.raises(ReplicaMismatchError, match="differ"):
                    sw.Conversion(wrong, tmp_path / "out").execute()
                assert not list(tmp_path.iterdir())
                tried += 1
    assert tried


def test_the_plans_have_every_kind_of_part(plans):
    every = [p for plan in plans.values() for p in plan.programs]
    assert any(p.replicas for p in every) and any(p.padding for p in every) and any(p.op for p in every)
    assert any(o.zeros for p in every for o in p.outputs) and any(len(p.outputs) > 1 for p in every)
    assert any("+" in p.label for p in every) and any(len(p.gather) > 2 for p in every)
    assert len(plans["merge"].tiles) > len(plans["merge"].target_tensors)


def exchanged(program: Program, one: slice, two: slice) -> tuple[Piece, ...]:
    """The gather with two equal ranges of rows exchanged."""
    whole = LazyTensor(program.shape, program.gather)
    rows = whole.slice(0, 0, one.start), whole.slice(0, one.start, one.stop), whole.slice(0, one.stop, two.start)
    last = whole.slice(0, two.start, two.stop), whole.slice(0, two.stop, program.shape[0])
    return concat([rows[0], last[0], rows[2], rows[1], last[1]], 0).pieces


def two_heads(program: Program) -> tuple[Piece, ...]:
    head = TIED.head_dim
    return exchanged(program, slice(0, head), slice(head, 2 * head))


def gate_and_up(program: Program) -> tuple[Piece, ...]:
    return tuple(p._replace(slot=1 - p.slot) for p in program.gather)


def two_columns(program: Program) -> tuple[Piece, ...]:
    return LazyTensor(program.shape, program.gather).permute(1, 0).pieces


@pytest.mark.parametrize(
    ("label", "swap", "stored"),
    [
        ("q_proj.weight", two_heads, "linear_qkv.weight"),
        ("gate_proj.weight", gate_and_up, "linear_fc1.weight"),
        ("o_proj.weight", two_columns, "linear_proj.weight"),
    ],
)
def test_another_bijection_passes_check_but_not_the_reference_nor_verify(label, swap, stored, tmp_path):
    source = ref.write(tmp_path / "hf", TIED, TIED.weights())
    cut = Cut(2, 2)
    plan = build(sw.open(source).source, megatron(cut))
    number = next(i for i, p in enumerate(plan.programs) if label in p.label)
    wrong = with_program(plan, number, gather=swap(plan.programs[number]))
    assert wrong != plan
    check(wrong)
    sw.Conversion(wrong, tmp_path / "out").execute()
    expected = ref.megatron(TIED.weights(), TIED, cut)
    found = ref.differences(expected, ref.read_megatron(tmp_path / "out", cut))
    assert found and all(stored in line for line in found)
    verified = sw.verify(tmp_path / "out", source)
    assert not verified.ok and verified.level == "values" and verified.equal < verified.tensors
    assert all(stored in line for line in verified.different)
    sw.Conversion(plan, tmp_path / "right").execute()
    assert ref.differences(expected, ref.read_megatron(tmp_path / "right", cut)) == []


@pytest.mark.parametrize("to", ["megatron-legacy", "ranks", "huggingface"])
def test_a_flipped_byte_is_found_with_its_tensor_and_element(to, tmp_path):
    source = ref.write(tmp_path / "hf", TIED, TIED.weights())
    more = {"huggingface": {}, "ranks": {"pad_vocab_to": 2}, "megatron-legacy": {}}[to]
    job = sw.convert(source, tmp_path / "out", to=to, layout=sw.Layout() if to == "huggingface" else sw.Layout(tp=2, pp=2), **more)
    rng = np.random.default_rng(5)
    for entry in (job.plan.target_tensors[i] for i in rng.choice(len(job.plan.target_tensors), 12, replace=False)):
        path = tmp_path / "out" / job.plan.target_files[entry.file].path
        element = int(rng.integers(np.prod(entry.shape)))
        with flipped(path, entry.offset + element * 4 + int(rng.integers(4))):
            found = sw.verify(tmp_path / "out", source)
            assert not found.ok and found.equal == found.tensors - 1
            name = entry.name.removeprefix("model.") if to == "megatron-legacy" else entry.name
            assert [line for line in found.different if f"{name}@{entry.rank}, element {element} (" in line] == list(found.different)
    assert sw.verify(tmp_path / "out", source).ok


class flipped:  # noqa: N801
    """One byte of a file inverted for the length of a block."""

    def __init__(self, path: Path, offset: int) -> None:
        self.path, self.offset = path, offset

    def __enter__(self) -> None:
        self._flip()

    def __exit__(self, *_: object) -> None:
        self._flip()

    def _flip(self) -> None:
        with open(self.path, "r+b") as file:
            file.seek(self.offset)
            byte = file.read(1)[0]
            file.seek(self.offset)
            file.write(bytes([byte ^ 0x10]))
