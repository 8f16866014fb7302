"""Publishing: refusals before anything is written, and nothing half-written under the final name."""

import fcntl
import os

import pytest

from shardwright.errors import DiskSpaceError, RunError, TargetError, TargetExistsError
from shardwright.executors import publish, system
from shardwright.executors.execute import execute
from shardwright.executors.publish import prepare
from tests.unit.hand_made import split_plan

ROOMY = 1 << 30


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "src").mkdir()
    return split_plan(tmp_path / "src")[0]


def tree(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


def test_a_run_leaves_out_and_nothing_else(tmp_path, plan):
    outcome = execute(plan, tmp_path / "out", memory=ROOMY)
    assert tree(tmp_path) == ["out", "out/rank0.bin", "out/rank1.bin", "src", "src/model.bin"]
    assert outcome.notes == () and outcome.bytes_written == 2 * 16 * 8 * 2 and outcome.seconds > 0


def test_an_empty_folder_is_taken_and_a_full_one_refused(tmp_path, plan):
    out = tmp_path / "out"
    out.mkdir()
    execute(plan, out, memory=ROOMY)
    with pytest.raises(TargetExistsError, match=r"holds something.*--overwrite"):
        execute(plan, out, memory=ROOMY)
    (out / "stray").write_text("x")
    execute(plan, out, memory=ROOMY, overwrite=True)
    assert tree(tmp_path) == ["out", "out/rank0.bin", "out/rank1.bin", "src", "src/model.bin"]


def test_overwriting_fails_before_publishing_and_the_old_target_stays(tmp_path, plan, monkeypatch):
    out = tmp_path / "out"
    execute(plan, out, memory=ROOMY)
    (out / "mine").write_text("x")
    for call in ("rename", "exchange"):
        monkeypatch.setattr(system, call, lambda a, b: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(RunError, match="publishing failed"):
        execute(plan, out, memory=ROOMY, overwrite=True)
    monkeypatch.undo()
    assert (out / "mine").exists()


def test_a_file_in_the_way_is_refused(tmp_path, plan):
    (tmp_path / "out").write_text("x")
    with pytest.raises(TargetExistsError, match="not a folder"):
        execute(plan, tmp_path / "out", memory=ROOMY, overwrite=True)


def test_the_working_directory_and_its_parents_are_refused(tmp_path, plan, monkeypatch):
    (tmp_path / "here" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "inner")
    for out in (".", ".."):
        with pytest.raises(TargetError, match="working directory"):
            execute(plan, out, memory=ROOMY, overwrite=True)


def test_a_mount_point_is_refused(tmp_path, plan, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(publish.os.path, "ismount", lambda path: True)
    with pytest.raises(TargetError, match=r"mount point.*inside it"):
        execute(plan, tmp_path / "out", memory=ROOMY)


def test_source_and_target_inside_each_other_are_refused(tmp_path, plan):
    for out, how in ((tmp_path / "src" / "out", "lies inside"), (tmp_path, "holds"), (tmp_path / "src", "is")):
        with pytest.raises(TargetError, match=f"the target {how} the source"):
            execute(plan, out, memory=ROOMY, overwrite=True)
    assert tree(tmp_path) == ["src", "src/model.bin"]


def test_a_missing_or_unwritable_parent_is_refused(tmp_path, plan, monkeypatch):
    with pytest.raises(TargetError, match="does not exist"):
        execute(plan, tmp_path / "no" / "out", memory=ROOMY)
    monkeypatch.setattr(publish.os, "access", lambda path, mode: False)
    with pytest.raises(TargetError, match="not writable"):
        execute(plan, tmp_path / "out", memory=ROOMY)


def test_too_little_space_is_refused_with_figures(tmp_path, plan, monkeypatch):
    found = os.statvfs(tmp_path)

    class Full:
        f_bavail, f_frsize = 1, found.f_frsize

    monkeypatch.setattr(publish.os, "statvfs", lambda path: Full)
    with pytest.raises(DiskSpaceError, match=rf"actual {found.f_frsize} bytes"):
        execute(plan, tmp_path / "out", memory=ROOMY)
    assert tree(tmp_path) == ["src", "src/model.bin"]


def test_a_second_run_is_refused_while_the_first_lives(tmp_path, plan):
    with prepare(tmp_path / "out", plan) as first:
        with pytest.raises(TargetExistsError, match="another run"):
            execute(plan, tmp_path / "out", memory=ROOMY)
        assert first.data.is_dir()
    execute(plan, tmp_path / "out", memory=ROOMY)


def test_what_a_dead_run_left_is_removed_with_a_note(tmp_path, plan):
    stale = tmp_path / "out.partial"
    (stale / "data" / "deep").mkdir(parents=True)
    (stale / "data" / "deep" / "file").write_text("x")
    (stale / "lock").write_text("")
    outcome = execute(plan, tmp_path / "out", memory=ROOMY)
    assert outcome.notes == ("removed out.partial, which an earlier run left unfinished",)
    assert tree(tmp_path) == ["out", "out/rank0.bin", "out/rank1.bin", "src", "src/model.bin"]


def test_a_run_that_died_between_its_renames_is_undone(tmp_path, plan):
    old = tmp_path / "out.partial" / "old"
    old.mkdir(parents=True)
    (old / "precious").write_text("x")
    with pytest.raises(TargetExistsError, match="holds something"):
        execute(plan, tmp_path / "out", memory=ROOMY)
    assert tree(tmp_path) == ["out", "out/precious", "src", "src/model.bin"]


def test_a_target_path_cannot_leave_the_target(tmp_path, plan):
    from dataclasses import replace

    from shardwright.errors import PlanError

    files = (replace(plan.target_files[0], path="../escape.bin"), *plan.target_files[1:])
    with pytest.raises(PlanError, match="leaves the target's folder"):
        execute(replace(plan, target_files=files), tmp_path / "out", memory=ROOMY)
    assert tree(tmp_path) == ["src", "src/model.bin"]


def test_copies_travel_and_are_compared(tmp_path, plan):
    from dataclasses import replace

    from shardwright.executors.execute import compare

    (tmp_path / "src" / "tokenizer.json").write_text("{}")
    plan = replace(plan, copies=(("tokenizer.json", "hf/tokenizer.json"),))
    execute(plan, tmp_path / "out", memory=ROOMY)
    assert (tmp_path / "out" / "hf" / "tokenizer.json").read_text() == "{}"
    assert compare(plan, tmp_path / "out", memory=ROOMY) == []
    (tmp_path / "out" / "hf" / "tokenizer.json").write_text("[]")
    assert [d.file for d in compare(plan, tmp_path / "out", memory=ROOMY)] == ["hf/tokenizer.json"]


def test_checksums_are_patched_and_compared(tmp_path):
    import zlib
    from dataclasses import replace

    from shardwright.executors.execute import compare
    from shardwright.planner.containers.base import Crc

    (tmp_path / "src").mkdir()
    plan, arrays = split_plan(tmp_path / "src", rows=64, axis=1, step=4)
    nbytes = 64 * 4 * 2
    files = tuple(
        replace(
            f,
            nbytes=f.nbytes + 8,
            static=(*f.static, (f.nbytes, bytes(8))),
            crcs=(Crc(8, nbytes, (f.nbytes,)), Crc(8 + nbytes, nbytes, (f.nbytes + 4,))),
        )
        for f in plan.target_files
    )
    plan = replace(plan, target_files=files)
    out = tmp_path / "out"
    execute(plan, out, memory=ROOMY, workers=3)
    for part in range(2):
        halves = [a[:, 4 * part : 4 * part + 4].tobytes() for a in arrays]
        crcs = b"".join(zlib.crc32(h).to_bytes(4, "little") for h in halves)
        assert (out / f"rank{part}.bin").read_bytes() == b"%08d" % part + b"".join(halves) + crcs
    assert compare(plan, out, memory=ROOMY) == []
    raw = bytearray((out / "rank1.bin").read_bytes())
    raw[-1] ^= 1
    raw[2] ^= 1
    (out / "rank1.bin").write_bytes(raw)
    (out / "rank0.bin").unlink()
    assert [(d.file, d.what, d.offset) for d in compare(plan, out, memory=ROOMY)] == [
        ("rank0.bin", "missing", 0),
        ("rank1.bin", "header", 2),
    ]


def test_the_lock_is_a_flock(tmp_path, plan):
    with prepare(tmp_path / "out", plan):
        fd = os.open(tmp_path / "out.partial" / "lock", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)
