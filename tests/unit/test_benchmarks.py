"""The benchmarks run: every case once at a few megabytes. No figure is judged, for a test that times things fails at random."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

import shardwright as sw
from benchmarks import conversions, planning
from benchmarks.measure import measure
from benchmarks.model import DEEPSEEK_V3, MANY_TENSORS, make, shape_of
from benchmarks.report import conversions_json, machine, show_conversions, show_planning
from shardwright.planner.layout import Layout

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks read /proc")


def test_sizes_come_out_as_asked(tmp_path: Path) -> None:
    found = make(tmp_path / "model", 3_000_000)
    nbytes = sum(path.stat().st_size for path in found.glob("*.safetensors"))
    assert 2_000_000 < nbytes < 4_500_000
    assert len(list(found.glob("*.safetensors"))) > 1
    assert shape_of(6_000_000_000)["hidden_size"] == 4096


def test_measure_counts_bytes_exactly(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(1 << 20))
    sample = measure(["cp", str(tmp_path / "source"), str(tmp_path / "target")], target=tmp_path / "target")
    assert sample.bytes_written == 1 << 20
    assert sample.bytes_read >= 1 << 20
    assert sample.wall_s > 0
    with pytest.raises(RuntimeError, match="exited with 1"):
        measure(["false"])


def test_conversions_run(tmp_path: Path) -> None:
    wanted = ("split: shardwright 128MiB", "merge: shardwright 128MiB")
    results = conversions.run(tmp_path, 3_000_000, 1, wanted)
    assert [r.case.name for r in results] == ["split: cp -r", wanted[0], "merge: cp -r", wanted[1]]
    for result in results:
        assert len(result.kept) == 1
        if result.case.planned:
            assert 1 <= result.io()["write"] < 1.1
            assert result.plan["read_amplification"] == 1.0
    json.dumps([conversions_json(results), machine(tmp_path)])
    shown = io.StringIO()
    show_conversions(Console(file=shown, width=250), results)
    assert wanted[0] in shown.getvalue()


def test_the_plain_script_gives_the_same_files(tmp_path: Path) -> None:
    source = make(tmp_path / "source", 3_000_000)
    cases = {case.name: case for case in conversions.CASES}
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for name, out in (("split: shardwright 128MiB", ours), ("split: get_slice + save_file", theirs)):
        measure([{"SOURCE": str(source), "OUT": str(out)}.get(word, word) for word in cases[name].words])
    pairs = list(zip(sorted(ours.glob("*.safetensors")), sorted(theirs.glob("*.safetensors")), strict=True))
    assert len(pairs) == 8
    for a, b in pairs:
        assert a.read_bytes() == b.read_bytes()


def test_planning_runs(tmp_path: Path) -> None:
    few = {**MANY_TENSORS, "num_hidden_layers": 3}
    case = planning.PlanCase("few tensors", few, 2, 1.0, "ranks", Layout(tp=8), {})
    (found,) = planning.run(tmp_path, 1, (case,))
    assert found["target_tensors"] == 8 * 30
    assert set(planning.STEPS.values()) == set(found["steps"])
    shown = io.StringIO()
    show_planning(Console(file=shown, width=250), {"planning": [found], "start_up": {"nothing": 0.0}})
    assert "few tensors" in shown.getvalue()


def test_deepseek_v3_has_its_size_to_the_byte(tmp_path: Path) -> None:
    """671 billion parameters: counted here from the released model's shapes, and by the plan, which lists every byte."""
    hidden, heads = 7168, 128
    attention = 1536 * hidden + 1536 + heads * 192 * 1536 + (512 + 64) * hidden + 512 + heads * 256 * 512 + hidden * heads * 128
    dense, sparse_ = 3 * 18432 * hidden, (256 + 1) * 3 * 2048 * hidden + 256 * hidden
    count = 2 * 129280 * hidden + hidden + 61 * (attention + 2 * hidden) + 3 * dense + 58 * sparse_
    assert count + 58 * 256 == 671_026_419_200
    case = planning.CASES[-1]
    config = tmp_path / "config.json"
    config.write_text(json.dumps(DEEPSEEK_V3))
    plan = sw.plan(config, to=case.to, layout=case.layout).plan
    assert sum(t.nbytes for t in plan.source_tensors) == 2 * count + 4 * 58 * 256
    ranks = {}
    for tensor in plan.target_tensors:
        ranks[tensor.rank] = ranks.get(tensor.rank, 0) + tensor.nbytes
    # A rank of the second stage: 15 layers, 8 experts of each, a share of an eighth of all but norms, routers, down projections.
    copied = (1536 + 512 + 64) * hidden + 1536 + 512 + 2 * hidden + 256 * hidden
    shared = (heads * 192 * 1536 + heads * 256 * 512 + hidden * heads * 128) // 8 + (8 + 1) * 3 * 2048 * hidden // 8
    assert len(ranks) == 1024 and ranks[8 * 32] == 15 * (2 * (copied + shared) + 4 * 256)
    assert len(plan.programs) < 50
