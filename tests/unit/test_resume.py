"""Resuming in process: what may be resumed, what is refused and why, and what the second run does not do again."""

import json
import os
import shutil
from pathlib import Path

import pytest

import shardwright as sw
from shardwright.errors import CheckpointError, PlanError, RunError, TargetError
from shardwright.executors import ledger, publish, system
from shardwright.planner.passes import build as build_module
from shardwright.planner.request import Request
from tests.unit.tiny import tiny_llama

TILE = 4000


@pytest.fixture
def source(tmp_path):
    return tiny_llama(tmp_path / "src", vocab=128)


def job_of(source, out, to="ranks", tile_bytes=TILE, **options):
    layout = options.pop("layout", sw.Layout(tp=2))
    plan = build_module.build(sw.open(source).source, Request(to, layout, **options), tile_bytes=tile_bytes)
    return sw.Conversion(plan, out, workers=2)


def stopped(source, out, monkeypatch, writes=150, **options):
    """A run that fails after so many writes, with small batches; its plan's tiles."""
    monkeypatch.setattr(ledger, "BATCH_BYTES", 20_000)
    left, real = [writes], system.pwrite

    def pwrite(fd, data, offset):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(5, "Input/output error")
        return real(fd, data, offset)

    job = job_of(source, out, **options)
    with monkeypatch.context() as patch:
        patch.setattr(system, "pwrite", pwrite)
        with pytest.raises(RunError, match="Input/output error") as caught:
            job.execute()
    done, tiles = caught.value.tiles
    assert caught.value.partial == f"{out}.partial" and 0 < done < tiles == len(job.plan.tiles)
    return job


def content(folder: Path):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("to", "options"),
    [
        ("ranks", {}),
        ("ranks", {"container": "zarr"}),
        ("ranks", {"quantize": "int8"}),
        ("ranks", {"sha256": True}),
        ("megatron-legacy", {"layout": sw.Layout(tp=2, pp=2), "pad_vocab_to": 48}),
        ("huggingface", {"layout": sw.Layout()}),
    ],
)
def test_a_resumed_run_equals_an_undisturbed_one(source, tmp_path, monkeypatch, to, options):
    job_of(source, tmp_path / "whole", to, **options).execute()
    stopped(source, tmp_path / "out", monkeypatch, to=to, **options)
    outcome = job_of(source, tmp_path / "out", to, **options).execute()
    assert outcome.tiles_resumed > 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "src", "whole"]


def test_what_is_done_is_not_done_again(source, tmp_path, monkeypatch):
    job = stopped(source, tmp_path / "out", monkeypatch)
    read, real = [0], system.preadv

    def preadv(fd, buffers, offset):
        got = real(fd, buffers, offset)
        read[0] += got
        return got

    monkeypatch.setattr(system, "preadv", preadv)
    outcome = job_of(source, tmp_path / "out").execute()
    assert outcome.bytes_read == read[0] < job.cost.bytes_read
    assert outcome.bytes_written < job.cost.bytes_written


def test_less_memory_fewer_workers_another_tile_size_and_another_place(source, tmp_path, monkeypatch):
    """The saved plan governs: what only concerns how a plan is made makes no difference."""
    job_of(source, tmp_path / "whole").execute()
    job = stopped(source, tmp_path / "out", monkeypatch)
    moved = shutil.move(source, tmp_path / "elsewhere")
    again = job_of(moved, tmp_path / "out", tile_bytes=3 * TILE)
    assert again.hash != job.hash
    again.workers, again.memory = 1, job.cost.min_memory_bytes
    assert again.execute().tiles_resumed > 0
    for name, data in content(tmp_path / "whole").items():
        if name != "shardwright.json":
            assert (tmp_path / "out" / name).read_bytes() == data


def test_a_recipe_of_an_older_version_is_resumed(source, tmp_path, monkeypatch):
    """An option that did not exist when the plan was saved had its default."""
    stopped(source, tmp_path / "out", monkeypatch)
    from shardwright.planner import codec
    from shardwright.planner.fingerprint import plan_hash

    partial = tmp_path / "out.partial"
    saved = codec.load(partial / "plan.json").plan
    before = plan_hash(saved)
    del saved.recipe["sha256"]
    codec.save(saved, partial / "plan.json")
    journal = (partial / "journal").read_bytes()
    from shardwright.executors.journal import _line

    first = journal.index(b"\n") + 1
    assert before.encode() in journal[:first]
    (partial / "journal").write_bytes(_line(["shardwright journal", 1, plan_hash(saved)]) + journal[first:])
    assert job_of(source, tmp_path / "out").execute().tiles_resumed > 0


@pytest.mark.parametrize(
    "options", [{"layout": sw.Layout(tp=4)}, {"dtype": "bfloat16"}, {"container": "zarr"}, {"sha256": True}, {"drop": ("x*",)}]
)
def test_another_conversion_is_refused_and_nothing_is_lost(source, tmp_path, monkeypatch, options):
    stopped(source, tmp_path / "out", monkeypatch)
    before = content(tmp_path / "out.partial")
    with pytest.raises(TargetError, match=r"other options.*--fresh") as caught:
        job_of(source, tmp_path / "out", **options).execute()
    assert caught.value.exit_code == 3
    assert content(tmp_path / "out.partial") == before
    assert job_of(source, tmp_path / "out", **options).execute(fresh=True).tiles_resumed == 0


def test_a_changed_source_is_refused_with_what_changed(source, tmp_path, monkeypatch):
    stopped(source, tmp_path / "out", monkeypatch)
    file = next(source.glob("*.safetensors"))
    times = os.stat(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    with pytest.raises(
        PlanError, match=rf"changed since the unfinished conversion began: file {file.name}; expected modified .* actual modified"
    ):
        job_of(source, tmp_path / "out").execute()
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert job_of(source, tmp_path / "out").execute().tiles_resumed > 0


@pytest.mark.parametrize("damage", ["plan", "hash", "journal", "file", "size"])
def test_damage_is_refused_and_fresh_starts_over(source, tmp_path, monkeypatch, damage):
    job = stopped(source, tmp_path / "out", monkeypatch)
    partial = tmp_path / "out.partial"
    if damage == "plan":
        (partial / "plan.json").write_text("{}")
    elif damage == "hash":
        other = job_of(source, None, layout=sw.Layout(tp=4))
        other.save(partial / "plan.json")
    elif damage == "journal":
        from shardwright.executors.journal import _line

        with open(partial / "journal", "ab") as out:
            out.write(_line(["tile", 10**6, 0, 0, [], {}]))
    elif damage == "file":
        (partial / "data" / job.plan.target_files[0].path).unlink()
    else:
        os.truncate(partial / "data" / job.plan.target_files[0].path, 10)
    with pytest.raises((PlanError, TargetError), match="--fresh") as caught:
        job_of(source, tmp_path / "out").execute()
    assert caught.value.exit_code == 3 and partial.is_dir()
    job_of(source, tmp_path / "out").execute(fresh=True)
    assert sw.verify(tmp_path / "out", source).ok


def test_a_folder_that_is_not_ours_is_left_alone(source, tmp_path):
    mine = tmp_path / "out.partial"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    with pytest.raises(TargetError, match=r"holds something else.*thesis.tex"):
        job_of(source, tmp_path / "out").execute(fresh=True)
    assert content(mine) == {"thesis.tex": b"x"}


def test_an_unfinished_conversion_is_no_checkpoint(source, tmp_path, monkeypatch):
    job = stopped(source, tmp_path / "out", monkeypatch)
    inside = Path("out.partial", "data")
    monkeypatch.chdir(tmp_path)
    for path in (inside.parent, inside, inside / job.plan.target_files[0].path, (tmp_path / inside)):
        with pytest.raises(CheckpointError, match="unfinished conversion"):
            sw.open(path)


def test_a_run_that_ended_while_it_cleaned_up_is_tidied(source, tmp_path, monkeypatch):
    job = job_of(source, tmp_path / "out")
    monkeypatch.setattr(publish, "_delete", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    assert "cannot be removed" in job.execute().notes[-1]
    monkeypatch.undo()
    assert (tmp_path / "out.partial" / "journal").is_file() and job.is_done()
    job.tidy()
    assert not (tmp_path / "out.partial").exists()
    assert sw.verify(tmp_path / "out").level == "bytes"


def test_checksums_and_sha256_are_true(source, tmp_path):
    import hashlib
    import zlib

    job = job_of(source, tmp_path / "out", "megatron-legacy", sha256=True)
    job.execute()
    sums = json.loads((tmp_path / "out" / "shardwright.json").read_text())["checksums"]
    files = {name: data for name, data in content(tmp_path / "out").items() if name != "shardwright.json"}
    assert sums["crc32"] == {name: f"{zlib.crc32(data):08x}" for name, data in files.items()}
    assert sums["sha256"] == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    without = job_of(source, None, "megatron-legacy")
    again = sum(len(data) for data in files.values())
    assert job.cost.bytes_read - without.cost.bytes_read == again


@pytest.mark.parametrize("how", ["flip", "missing"])
def test_verify_without_a_source_sees_every_byte(source, tmp_path, how):
    job = job_of(source, tmp_path / "out")
    job.execute()
    found = sw.verify(tmp_path / "out")
    assert found.ok and found.level == "bytes" and found.equal == found.tensors > 0
    file = tmp_path / "out" / job.plan.target_files[1].path
    if how == "flip":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        found = sw.verify(tmp_path / "out")
        assert not found.ok and found.equal == found.tensors // 2 and file.name in found.different[0]
    else:
        (tmp_path / "src" / "tokenizer.json").write_text("{}")
        job_of(source, tmp_path / "out").execute(overwrite=True)
        (tmp_path / "out" / "hf" / "tokenizer.json").unlink()
        assert sw.verify(tmp_path / "out").missing == ("hf/tokenizer.json",)


def test_the_recorded_recipe_is_replayed(source, tmp_path):
    """What was left out on purpose is no difference."""
    from safetensors.torch import load_file, save_file

    file = min(source.glob("*.safetensors"))
    tensors = load_file(file)
    index = source / "model.safetensors.index.json"
    stored = json.loads(index.read_text())
    stored["weight_map"]["extra.weight"] = file.name
    index.write_text(json.dumps(stored))
    save_file({**tensors, "extra.weight": tensors[next(iter(tensors))].clone()}, file)
    sw.convert(source, tmp_path / "out", to="ranks", layout=sw.Layout(tp=2), drop=("extra*",), dtype="bfloat16")
    found = sw.verify(tmp_path / "out", source)
    assert found.ok and found.level == "values"
