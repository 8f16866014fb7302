"""Copies that drifted apart: their mean against plain numpy, through the runner, the plan's JSON, views and comparisons."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from shardwright.errors import PlanError, ReplicaMismatchError, TableError
from shardwright.executors.averaging import Mean
from shardwright.executors.checksums import crc32
from shardwright.executors.journal import parse, tile_line
from shardwright.executors.local import run
from shardwright.executors.sources import SourceFiles
from shardwright.executors.targets import TargetFiles
from shardwright.executors.tile import Receipt
from shardwright.planner.codec import from_json, to_json
from shardwright.planner.passes.memory import mean_bytes
from shardwright.planner.plan import Plan
from shardwright.planner.tables import load_dialect
from shardwright.planner.tensor.lazy import leaf
from tests.unit.hand_made import Maker, copy_program, fit_of

KINDS = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32, "float64": np.float64}
SIZES = (1, 7, 65536, 65537)


def reference(copies: list[np.ndarray]) -> np.ndarray:
    """Float32 (or float64) mean, rounded once; what is equal everywhere stays."""
    wide = np.float64 if copies[0].dtype == np.float64 else np.float32
    total = copies[0].astype(wide)
    for copy in copies[1:]:
        total = total + copy.astype(wide)
    mean = (total / wide(len(copies))).astype(copies[0].dtype)
    bits = f"u{copies[0].itemsize}"
    same = np.all([copy.view(bits) == copies[0].view(bits) for copy in copies], axis=0)
    return np.where(same, copies[0], mean)


def drifted(kind: str, count: int, size: int, share: float) -> list[np.ndarray]:
    """Copies that differ in a share of their elements."""
    rng = np.random.default_rng(size + count)
    first = rng.standard_normal(size).astype(KINDS[kind])
    found = [first]
    for _ in range(count - 1):
        copy = first.copy()
        at = rng.random(size) < share
        copy[at] = (first[at].astype(np.float64) * (1 + 0.02 * rng.standard_normal(at.sum()))).astype(KINDS[kind])
        found.append(copy)
    return found


def mean_of(kind: str, copies: list[np.ndarray]) -> tuple[np.ndarray, int]:
    strip = copies[0].copy()
    mean = Mean(kind, memoryview(strip.view(np.uint8)), memoryview(bytearray(mean_bytes(kind, len(strip)))))
    for copy in copies[1:]:
        mean.add(memoryview(copy.view(np.uint8)))
    return strip, mean.finish()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("count", "share"), [(2, 1.0), (3, 0.1), (8, 0.5), (4, 0.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mean(kind, count, share, size):
    copies = drifted(kind, count, size, share)
    found, differing = mean_of(kind, copies)
    assert found.tobytes() == reference(copies).tobytes()
    assert differing == np.count_nonzero(np.any([copy != copies[0] for copy in copies], axis=0))


def test_the_sum_in_the_stored_dtype_would_differ():
    """Rounding at every step, as transformers' converter of BLOOM does, is not the mean rounded once."""
    copies = drifted("bfloat16", 4, 10_000, 1.0)
    found, _ = mean_of("bfloat16", copies)
    stepwise = copies[0].copy()
    for copy in copies[1:]:
        stepwise = stepwise + copy
    assert np.count_nonzero(found != stepwise / np.array(4, ml_dtypes.bfloat16)) > 1000


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_equal_stays_to_the_bit(kind):
    """A third of three times x is not x, the sum of large numbers overflows, and a NaN has a payload."""
    dtype, bits = np.dtype(KINDS[kind]), f"u{np.dtype(KINDS[kind]).itemsize}"
    odd = np.array([ml_dtypes.finfo(dtype).max, np.inf, -0.0, 0.1, np.nan], dtype)
    odd.view(bits)[4] |= 1
    first, second = np.append(odd, dtype.type(1)), np.append(odd, dtype.type(2))
    found, differing = mean_of(kind, [first, first, second])
    assert found[:5].tobytes() == odd.tobytes() and differing == 1
    assert found[5] == np.asarray(4 / 3).astype(np.float64 if kind == "float64" else np.float32).astype(dtype)


def test_the_order_of_equal_copies_before_the_first_that_differs():
    """The sum is the one that adding every copy gives: float32 addition is not associative."""
    rng = np.random.default_rng(1)
    first, last = (rng.standard_normal(4096).astype(np.float32) for _ in range(2))
    copies = [first] * 6 + [last]
    assert mean_of("float32", copies)[0].tobytes() == reference(copies).tobytes()


def averaging_plan(root: Path, copies: list[np.ndarray], kind: str, *, average: bool = True, step: int | None = None) -> Plan:
    """One tensor held by several files, each read; the first or the mean is written."""
    maker = Maker(root)
    files = [maker.source(f"rank{k}.bin", b"head" + copy.tobytes()) for k, copy in enumerate(copies)]
    out = maker.target("out.bin", copies[0].nbytes)
    shape = copies[0].shape
    replicas = tuple(leaf(k, shape).pieces for k in range(1, len(copies)))
    program = copy_program("w", kind, shape, leaf(0, shape).pieces, leaf(0, shape).pieces, replicas=replicas, average=average)
    number = maker.program(program, [([(f, 4) for f in files], [(out, 0)])])
    maker.tiles(number, 0, step=step)
    maker.entry("w", kind, shape, out, 0)
    return maker.plan()


def carry_out(plan: Plan, out: Path, strip_bytes: int) -> Receipt:
    total = Receipt()
    sources, targets = SourceFiles(plan.source_root, plan.source_files), TargetFiles(out, plan.target_files)
    try:
        targets.create()
        run(
            plan, sources, targets, fit_of(plan, strip_bytes, 2), tiles=range(len(plan.tiles)),
            finished=lambda tile, receipt: total.add(receipt),
        )  # fmt: skip
    finally:
        sources.close()
        targets.close()
    return total


@pytest.mark.parametrize("strip_bytes", [64, 4096, 1 << 20])
@pytest.mark.parametrize("step", [None, 100])
def test_strips_and_tiles_do_not_change_it(step, strip_bytes, tmp_path):
    copies = [copy.reshape(700, 3) for copy in drifted("bfloat16", 5, 2100, 0.3)]
    plan = averaging_plan(tmp_path, copies, "bfloat16", step=step)
    receipt = carry_out(plan, tmp_path / "out", strip_bytes)
    expected = reference([copy.reshape(-1) for copy in copies])
    assert (tmp_path / "out" / "out.bin").read_bytes() == expected.tobytes()
    assert receipt.averaged == {"w.0": np.count_nonzero(np.any([c != copies[0] for c in copies], axis=0))}
    assert receipt.bytes_read == sum(copy.nbytes for copy in copies)


def test_equal_copies_are_not_reported(tmp_path):
    copies = drifted("float32", 3, 100, 0.0)
    assert carry_out(averaging_plan(tmp_path, copies, "float32"), tmp_path / "out", 4096).averaged == {}
    assert (tmp_path / "out" / "out.bin").read_bytes() == copies[0].tobytes()


def test_without_it_they_must_be_equal(tmp_path):
    with pytest.raises(ReplicaMismatchError):
        carry_out(averaging_plan(tmp_path, drifted("float32", 2, 100, 0.5), "float32", average=False), tmp_path / "out", 4096)


def test_the_journal_keeps_the_count():
    receipt = Receipt(10, 20, averaged={"model.norm.weight": 3})
    first = b'["shardwright journal",1,"h"]'
    lines = b"%08x %s\n" % (crc32(first), first) + tile_line(0, receipt) + tile_line(1, Receipt(1, 2))
    recorded = parse(lines, 2, ())
    assert recorded.tiles[0].averaged == {"model.norm.weight": 3} and recorded.tiles[1].averaged == {}


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ('copies = "median"', "kind of copies"),
        ('copies = "average"\nlayout = ["transpose"]', "one hub tensor as it is"),
        ("copies = true", "kind of copies"),
    ],
)
def test_a_table_that_averages_what_has_no_mean(row, match, tmp_path):
    path = tmp_path / "d.toml"
    path.write_text(f'name = "d"\n[[row]]\nname = "a.{{layer}}"\nhub = ["model.layers.{{layer}}.x"]\n{row}\n')
    with pytest.raises(TableError, match=match):
        load_dialect(path)


def test_names_by_patterns_of_specs(tmp_path):
    path = tmp_path / "d.toml"
    text = 'name = "d"\nspecs = ["a-1", "a-2", "b"]\n[[row]]\nname = {{ {} }}\nhub = ["model.norm.weight"]\nstage = "last"\n'
    path.write_text(text.format('"a-*" = "x", b = "y"'))
    (row,) = load_dialect(path).rows or ()
    assert row.names == {"a-1": "x", "a-2": "x", "b": "y"} and not row.average
    for names, match in (('"a*" = "x", a-2 = "y"', "names a spec twice"), ('"c*" = "x"', "needs a name, or one per spec")):
        path.write_text(text.format(names))
        with pytest.raises(TableError, match=match):
            load_dialect(path)


def test_json_of_a_plan(tmp_path):
    import shardwright as sw
    from tests.unit.tiny import tiny_llama

    source = tiny_llama(tmp_path / "s", layers=1)
    sw.convert(source, tmp_path / "layers", to="megatron-deepspeed", layout=sw.Layout(tp=2))
    plan = sw.plan(tmp_path / "layers", tmp_path / "back", to="huggingface").plan
    averaged = [program.label for program in plan.programs if program.average]
    assert averaged and all("norm" in label for label in averaged)
    value = to_json(plan, target_root=None)
    assert from_json(value).programs == plan.programs
    at = next(i for i, p in enumerate(value["programs"]) if p.get("average"))
    value["programs"][at]["average"] = 1
    with pytest.raises(PlanError, match=r"average.*neither true nor false"):
        from_json(value)
