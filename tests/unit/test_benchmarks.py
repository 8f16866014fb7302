"""The benchmarks run: every case once at a few megabytes. No figure is judged, for a test that times things fails at random."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import conversions, planning
from benchmarks.measure import measure
from benchmarks.model import MANY_TENSORS, make, shape_of
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
