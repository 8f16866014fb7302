"""What the next run finds in OUT.partial, and what it makes of it.

What can be resumed is resumed, by a run that may differ in everything but the conversion itself; what cannot is refused
with a word on what to do; nothing that is not ours is touched.
"""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import shardwright as sw
from shardwright.errors import PlanError, RunError, ShardwrightError, TargetError, TargetExistsError
from shardwright.executors import journal as journal_module
from shardwright.executors import system
from shardwright.executors.execute import execute
from shardwright.planner.passes.build import build
from shardwright.planner.plan import Plan
from shardwright.planner.request import Request
from tests.faults.boundaries import cannot
from tests.faults.harm import Fault, convert, interrupted, partial_of, raising, refused, resumes
from tests.faults.scenes import MEMORY, TILE_BYTES, Scene, digests, journal_of, vouched


class TestLeftovers:
    """What the next run finds in OUT.partial."""

    def test_another_recipe_is_refused(self, scene: Scene, out: Path) -> None:
        interrupted(scene, out)
        other = build(sw.open(scene.plan.source_root).source, Request("huggingface", dtype="bfloat16"), tile_bytes=TILE_BYTES)
        error = refused(TargetError, 3, replace(scene, plan=other), out, "other options.*--fresh")
        assert "dtype" in str(error.expected)
        resumes(scene, out)

    def test_fresh_starts_over(self, scene: Scene, out: Path) -> None:
        interrupted(scene, out)
        assert convert(scene, out, fresh=True).tiles_resumed == 0
        scene.done(out)

    def test_fresh_makes_way_for_another_recipe(self, scene: Scene, out: Path) -> None:
        interrupted(scene, out)
        other = build(sw.open(scene.plan.source_root).source, Request("huggingface", dtype="bfloat16"), tile_bytes=TILE_BYTES)
        convert(replace(scene, plan=other), out, fresh=True)
        assert len(sw.open(out)) and not partial_of(out).exists()

    @pytest.mark.parametrize("how", ["missing", "empty", "half", "garbled", "not ours"])
    def test_the_saved_plan_is_gone_or_garbled(self, scene: Scene, out: Path, how: str) -> None:
        interrupted(scene, out)
        path = partial_of(out) / "plan.json"
        text = path.read_bytes()
        path.unlink()
        made = {"empty": b"", "half": text[: len(text) // 2], "garbled": text.replace(b"7", b"8"), "not ours": b"{}"}
        if how in made:
            path.write_bytes(made[how])
        refused(PlanError, 3, scene, out, "--fresh")
        path.unlink(missing_ok=True)
        path.write_bytes(text)
        resumes(scene, out)

    @pytest.mark.parametrize("seed", range(12))
    def test_a_garbled_journal_is_believed_up_to_there(self, scene: Scene, out: Path, seed: int) -> None:
        interrupted(scene, out)
        path, chance = partial_of(out) / "journal", random.Random(seed)
        data = bytearray(path.read_bytes())
        at = chance.randrange(data.index(b"\n") + 1, len(data))
        if seed % 3 == 0:
            del data[at:]
        elif seed % 3 == 1:
            data[at] ^= 1 << chance.randrange(8)
        else:
            data[at:] = chance.randbytes(len(data) - at)
        path.write_bytes(data)
        resumes(scene, out)

    def test_a_journal_without_its_first_line_starts_over(self, scene: Scene, out: Path) -> None:
        interrupted(scene, out)
        path = partial_of(out) / "journal"
        path.write_bytes(b"garbage" + path.read_bytes())
        assert convert(scene, out).tiles_resumed == 0
        scene.done(out)

    def test_the_journal_of_another_plan_is_refused(self, scene: Scene, out: Path) -> None:
        interrupted(scene, out)
        path = partial_of(out) / "journal"
        data = path.read_bytes()
        _, _, rest = data.partition(b"\n")
        path.write_bytes(_line(["shardwright journal", 1, "0" * 64]) + rest)
        refused(PlanError, 3, scene, out, "belongs to another plan.*--fresh")

    @pytest.mark.parametrize(
        "line",
        [
            ["tile", 10**6, 0, 0, [], {}], ["tile", -1, 0, 0, [], {}], ["tile", 0, 0, 0, [99, 0, 1, 1], {}],
            ["tile", 40, 0, 0, [0, 1 << 60, 8, 1], {}], ["publish", -1], ["publish"], ["else"], "text", {"a": 1}, 7,
            ["tile", 40, 0, 0, [0, 0, 8], {}], ["tile", 40, 1.5, 0, [], {}], ["tile", 40, 0, 0, [], {"a": [1]}],
            ["tile", True, 0, 0, [], {}],
        ],
    )  # fmt: skip
    def test_a_line_that_the_plan_cannot_mean_is_refused(self, scene: Scene, out: Path, line: Any) -> None:
        interrupted(scene, out)
        path = partial_of(out) / "journal"
        data = path.read_bytes()
        path.write_bytes(data + _line(line))
        refused(PlanError, 3, scene, out, "journal.*--fresh")
        path.write_bytes(data)
        resumes(scene, out)

    def test_a_line_twice_is_refused(self, scene: Scene, out: Path) -> None:
        interrupted(scene, out)
        path = partial_of(out) / "journal"
        path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(keepends=True)[1])
        refused(PlanError, 3, scene, out, "twice.*--fresh")

    def test_an_oversized_journal_is_cut(self, scene: Scene, out: Path) -> None:
        """Zeros behind the last line, as some file systems leave them; their number must not size an allocation."""
        interrupted(scene, out)
        kept = len(vouched(journal_of(out)))
        os.truncate(partial_of(out) / "journal", 1 << 40)
        assert convert(scene, out).tiles_resumed == kept
        scene.done(out)

    def test_a_lying_checksum_does_not_reach_the_target(self, scene: Scene, out: Path) -> None:
        """Tile lines whose ranges do not add up to the files are found before publishing."""
        interrupted(scene, out)
        path = partial_of(out) / "journal"
        lines = path.read_bytes().splitlines(keepends=True)
        tile = json.loads(lines[1].partition(b" ")[2])
        tile[4] = tile[4][:-4]
        lines[1] = _line(tile)
        path.write_bytes(b"".join(lines))
        with pytest.raises(ShardwrightError) as caught:
            convert(scene, out)
        assert caught.value.exit_code in (3, 4)
        assert not out.exists()

    def test_a_data_file_is_missing_or_cut(self, scene: Scene, out: Path) -> None:
        interrupted(scene, out)
        path = partial_of(out) / "data" / scene.plan.target_files[0].path
        os.truncate(path, path.stat().st_size - 1)
        refused(PlanError, 3, scene, out, "--fresh")
        path.unlink()
        refused(PlanError, 3, scene, out, "missing.*--fresh")
        convert(scene, out, fresh=True)
        scene.done(out)

    def test_another_process_holds_the_lock(self, scene: Scene, out: Path) -> None:
        interrupted(scene, out)
        code = "import fcntl,sys; f=open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
        lock = partial_of(out) / "lock"
        with subprocess.Popen([sys.executable, "-c", code, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None and holder.stdin is not None
            assert holder.stdout.readline() == b"held\n"
            for fresh in (False, True):
                refused(TargetExistsError, 3, scene, out, "another run", fresh=fresh)
            holder.stdin.close()
        resumes(scene, out)

    def test_strangers_in_out_partial_are_not_removed(self, scene: Scene, out: Path) -> None:
        partial_of(out).mkdir()
        (partial_of(out) / "thesis.txt").write_text("precious")
        refused(TargetError, 3, scene, out, "thesis.txt|not.*shardwright|holds something")
        assert (partial_of(out) / "thesis.txt").read_text() == "precious"


def _line(value: Any) -> bytes:
    made = journal_module._line(value)
    assert made.endswith(b"\n")
    return made


class TestResuming:
    """A resumed run may differ in everything but the conversion itself."""

    def test_less_of_everything(self, scene: Scene, out: Path) -> None:
        interrupted(scene, out, workers=4)
        assert resumes(scene, out, workers=1, memory=96 << 20) > 0

    @pytest.mark.parametrize("tile_bytes", [4096, 1 << 20])
    def test_another_tile_size(self, scene: Scene, out: Path, tile_bytes: int) -> None:
        """The saved plan governs."""
        interrupted(scene, out)
        other = build(sw.open(scene.plan.source_root).source, Request("huggingface"), tile_bytes=tile_bytes)
        assert len(other.tiles) != len(scene.plan.tiles)
        kept = len(vouched(journal_of(out)))
        assert execute(other, out, memory=MEMORY).tiles_resumed == kept
        scene.done(out)

    def test_a_source_that_was_moved(self, scene: Scene, out: Path, tmp_path: Path) -> None:
        interrupted(scene, out)
        os.rename(scene.plan.source_root, tmp_path / "elsewhere")
        moved: Plan = build(sw.open(tmp_path / "elsewhere").source, Request("huggingface"), tile_bytes=TILE_BYTES)
        assert resumes(replace(scene, plan=moved), out) > 0

    def test_three_times(self, scene: Scene, out: Path) -> None:
        for writes in (50, 10, 10):
            with pytest.MonkeyPatch.context() as patch:
                Fault(patch, "pwrite", "/data/", writes, raising(errno.EIO))
                refused(RunError, 5, scene, out, "Input/output error")
        resumes(scene, out)

    def test_a_failure_of_the_last_steps(self, scene: Scene, out: Path) -> None:
        """All tiles are journaled; what failed is publishing."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(system, "rename", stuck(partial_of(out) / "data"))
            refused(RunError, 5, scene, out, "publishing failed: Input/output error")
        scene.look(out)
        assert resumes(scene, out) == len(scene.plan.tiles)

    @pytest.mark.parametrize("exchange", [True, False])
    def test_replacing_a_target(self, scene: Scene, out: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if not exchange:
            monkeypatch.setattr(system, "exchange", cannot)
        out.mkdir()
        (out / "precious").write_text("x")
        old = digests(out)
        refused(TargetExistsError, 3, scene, out, "holds something.*--overwrite")
        interrupted(scene, out, overwrite=True)
        scene.look(out, old, always=True)
        refused(TargetExistsError, 3, scene, out, "holds something.*--overwrite")
        assert resumes(scene, out, overwrite=True) > 0

    def test_the_second_rename_fails_and_the_old_target_returns(self, scene: Scene, out: Path) -> None:
        out.mkdir()
        (out / "precious").write_text("x")
        old = digests(out)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(system, "exchange", cannot)
            patch.setattr(system, "rename", stuck(partial_of(out) / "data"))
            refused(RunError, 5, scene, out, "publishing failed: Input/output error", overwrite=True)
        assert digests(out) == old
        assert resumes(scene, out, overwrite=True) == len(scene.plan.tiles)


def stuck(path: Path) -> Callable[[Any, Any], None]:
    """`system.rename` that cannot rename one path."""
    real = system.rename

    def rename(old: Any, new: Any) -> None:
        if Path(old) == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(old, new)

    return rename
