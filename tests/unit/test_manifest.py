"""DeepSpeed's JSON manifests: every spelling, moved folders, wrong ones refused with key, expected and actual."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import shardwright as sw
from shardwright.errors import CheckpointError, UnsupportedError
from shardwright.planner.identity import FILE_NAME
from tests.unit import deepspeed_reference as ds
from tests.unit import reference as ref
from tests.unit.gpt_reference import Gpt
from tests.unit.tiny import tiny_llama

GPT = Gpt("gpt2", layers=1)
SHARDS = ("mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt")


@pytest.fixture(scope="module", autouse=True)
def no_sync() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


def shards(folder: Path, version: int = 0, names: tuple[str, ...] = SHARDS) -> Path:
    """Megatron-LM's folders with flat modules, as the loader's documentation has them, and a config."""
    for path, held in zip(names, ds.mp_ranks(GPT.hub(), GPT.kv, GPT.head_dim, len(names), "gpt2", version), strict=True):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": ds.tensors(held)}, folder / path)
    (folder / "config.json").write_text(json.dumps(GPT.raw()))
    return folder


def manifest(file: Path, **fields: Any) -> Path:
    value = {"type": "Megatron", "checkpoints": list(SHARDS), "version": 0, **fields}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))
    return file


def reads(source: Path, **hints: Any) -> tuple[str, ...]:
    """The checkpoint is the model; what was noted on opening."""
    opened = sw.open(source, **hints)
    for name, expected in GPT.hub().items():
        assert (ref.to_bits(opened[name].torch()) == expected).all(), name
    return opened.source.warnings


@pytest.mark.parametrize("given", ["file", "folder"])
@pytest.mark.parametrize(
    ("version", "fields"),
    [
        (0, {}),
        (0, {"version": 0.0, "parallelization": "tp", "mp_size": 2}),
        (1, {"version": 1.0, "tp_size": 2, "mp_size": 2}),
        (2, {"version": 2.0, "base_dir": None}),
        (2, {"version": 3, "dtype": "float16", "base_dir": ""}),
    ],
    ids=str,
)
def test_megatron(version, fields, given, tmp_path):
    root = shards(tmp_path / "m", version)
    path = manifest(root / "checkpoints.json", **fields)
    assert reads(path if given == "file" else root) == ()
    assert sw.open(root).source.spec == "gpt2" + {0: "-v0", 1: "-v1", 2: ""}[version]
    assert sw.open(root).format == "deepspeed-mp"


def test_without_it_the_folder_is_megatrons(tmp_path):
    """What a manifest says of Megatron's own files counts; without one they are Megatron-LM's."""
    from shardwright.planner.formats import FORMATS
    from shardwright.planner.store import LocalStore

    root = shards(tmp_path / "m")
    assert [f.name for f in FORMATS if f.detect(LocalStore(root))] == ["megatron-legacy"]
    manifest(root / "x.json")
    assert [f.name for f in FORMATS if f.detect(LocalStore(root))] == ["deepspeed-mp"]


def test_the_files_version_where_the_manifest_has_none(tmp_path):
    root = shards(tmp_path / "m", 0)
    manifest(root / "m.json", version=None)
    assert any("version 0" in note for note in reads(root))


def test_the_files_may_lie_anywhere(tmp_path, monkeypatch):
    root = shards(tmp_path / "far" / "m")
    absolute = [str(root / name) for name in SHARDS]
    assert reads(manifest(tmp_path / "a" / "m.json", checkpoints=absolute)) == ()
    assert reads(manifest(tmp_path / "b" / "m.json", base_dir=str(root))) == ()
    assert reads(manifest(tmp_path / "c" / "m.json", base_dir="../far/m")) == ()
    assert reads(manifest(tmp_path / "far" / "m.json", checkpoints=[f"m/{name}" for name in SHARDS])) == ()
    # As DeepSpeed opens them: from the working directory.
    monkeypatch.chdir(tmp_path)
    assert reads(manifest(tmp_path / "d" / "m.json", checkpoints=[f"far/m/{name}" for name in SHARDS])) == ()


@pytest.mark.parametrize("given", ["file", "folder"])
def test_a_moved_folder(given, tmp_path):
    root = shards(tmp_path / "there")
    by_base = manifest(root / "m.json", base_dir=str(tmp_path / "here"))
    (note,) = reads(by_base if given == "file" else root)
    assert "here" in note and "found beside it" in note
    by_name = manifest(root / "m.json", checkpoints=[f"/old/place/there/{name}" for name in SHARDS])
    (note,) = reads(by_name if given == "file" else root)
    assert "/old/place/there/mp_rank_00" in note


def test_shards_listed_as_text(tmp_path):
    """Sorted as text, rank 10 comes before rank 2: the names' numbers count, and that is told."""
    model = Gpt("gpt2", layers=1, heads=12, kv=12, ffn=48)
    hub = model.hub()
    names = [f"mp_rank_{rank}_model_states.pt".replace("rank_", "rank_0", rank < 10) for rank in range(12)]
    for name, held in zip(names, ds.mp_ranks(hub, 12, 4, 12, "gpt2", 2), strict=True):
        torch.save({"module": ds.tensors(held)}, tmp_path / name.replace("rank_0", "rank_", 1))
    listed = sorted(name.replace("rank_0", "rank_", 1) for name in names)
    assert listed[1] == "mp_rank_10_model_states.pt"
    (tmp_path / "config.json").write_text(json.dumps(model.raw()))
    opened = sw.open(manifest(tmp_path / "m.json", checkpoints=listed, version=2.0))
    assert any("lists ranks in the order" in note for note in opened.source.warnings)
    for name, expected in hub.items():
        assert (ref.to_bits(opened[name].torch()) == expected).all(), name


@pytest.mark.parametrize("kind", ["BLOOM", "bloom", "ds_model", "DS_Model"])
def test_weight_files_of_a_model(kind, tmp_path):
    """What serves BLOOM lists the Hub's own shards."""
    root = tiny_llama(tmp_path / "model", layers=2)
    weights = sorted(path.name for path in root.glob("*.safetensors"))
    path = manifest(tmp_path / "elsewhere" / "m.json", type=kind, checkpoints=[str(root / name) for name in weights], version=1.0)
    opened = sw.open(path)
    assert opened.format == "huggingface" and sw.diff(opened, root).ok
    # Beside the weights and without their index, it stands for it.
    (root / "model.safetensors.index.json").unlink()
    shutil.copy(manifest(tmp_path / "n.json", type=kind, checkpoints=weights, version=1.0), root / "checkpoints.json")
    again = sw.open(root)
    assert again.format == "huggingface" and sw.diff(again, opened).ok


def test_what_is_written(tmp_path):
    source = GPT.write(tmp_path / "source", GPT.stored(GPT.hub()))
    sw.convert(source, tmp_path / "out", to="deepspeed-mp", layout=sw.Layout(tp=2), spec="gpt2-v1")
    found = json.loads((tmp_path / "out" / "checkpoints.json").read_text())
    files = [f"global_step0/mp_rank_0{rank}_model_states.pt" for rank in (0, 1)]
    assert found == {"type": "Megatron", "checkpoints": files, "version": 1.0, "parallelization": "tp", "tp_size": 2, "mp_size": 2}
    shutil.move(tmp_path / "out", tmp_path / "moved")
    (tmp_path / "moved" / FILE_NAME).unlink()
    assert reads(tmp_path / "moved" / "checkpoints.json", config=tmp_path / "source" / "config.json") == ()


INFERENCE = {"tp": ["tp_00_00.pt"], "non_tp": ["non-tp.pt"]}
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no type": ({"type": ...}, CheckpointError, "has no 'type'"),
    "no version": ({"version": ...}, CheckpointError, "has no 'version'"),
    "type of nobody": ({"type": "DeepSpeed"}, UnsupportedError, "type that DeepSpeed does not know.*expected Megatron.*'DeepSpeed'"),
    "lower case": ({"type": "megatron"}, UnsupportedError, "in this spelling"),
    "a type that is no text": ({"type": 3}, UnsupportedError, "actual 3"),
    "version of nobody": ({"version": 2.5}, UnsupportedError, "'version' is none that.*expected one of 0, 1.0, 2.0, 3.0.*2.5"),
    "version as text": ({"version": "2.0"}, UnsupportedError, "'2.0'"),
    "parallelization": ({"parallelization": "dp"}, CheckpointError, "'parallelization' is none.*'pp' or 'tp'.*'dp'"),
    "no list": ({"checkpoints": "mp_rank_00.pt"}, CheckpointError, "neither a list nor tp and non_tp"),
    "empty": ({"checkpoints": []}, CheckpointError, "no list of file names"),
    "twice": ({"checkpoints": [SHARDS[0]] * 2}, CheckpointError, "names one file twice.*mp_rank_00"),
    "gone": ({"checkpoints": [SHARDS[0], "x.pt"]}, CheckpointError, "a file that is not there.*x.pt.*1 of 2 files missing"),
    "count": ({"mp_size": 4}, CheckpointError, "a file for each of its ranks.*expected 4 files.*actual 2 files"),
    "two sizes": ({"mp_size": 2, "tp_size": 4}, CheckpointError, "'tp_size' and 'mp_size' differ"),
    "no size": ({"mp_size": "2"}, CheckpointError, "'mp_size' is no number of ranks"),
    "base_dir": ({"base_dir": 7}, CheckpointError, "'base_dir' is no folder"),
    "other keys": ({"checkpoints": {"tp": ["a"]}}, CheckpointError, "'checkpoints' has other keys"),
    "inference": ({"type": "ds_model", "checkpoints": INFERENCE, "parallelization": "tp"}, UnsupportedError, "DeepSpeed-Inference saved"),
    "older inference": ({"type": "bloom", "checkpoints": {"tp": ["tp_00_00.pt"], "non-tp": ["non-tp.pt"]}}, UnsupportedError, "saved"),
    "presharded": ({"type": "ds_model", "parallelization": "tp"}, UnsupportedError, "DeepSpeed-Inference saved"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_one_is_refused(case, tmp_path):
    fields, error, match = BAD[case]
    root = shards(tmp_path / "m")
    for name in ("tp_00_00.pt", "non-tp.pt"):
        torch.save({}, root / name)
    path = manifest(root / "m.json", **fields)
    with pytest.raises(error, match=match) as refused:
        sw.open(path)
    assert refused.value.remedy


def test_a_folder_of_inference_shards_says_what_it_is(tmp_path):
    for name in ("tp_00_00.pt", "non-tp.pt"):
        torch.save({}, tmp_path / name)
    manifest(tmp_path / "ds_inference_config.json", type="ds_model", checkpoints=INFERENCE, parallelization="tp", version=1.0)
    with pytest.raises(UnsupportedError, match="fused and transposed"):
        sw.open(tmp_path)


def test_several_in_one_folder(tmp_path):
    root = shards(tmp_path / "m")
    manifest(root / "a.json")
    manifest(root / "b.json")
    with pytest.raises(CheckpointError, match="several manifests"):
        sw.open(root)
    assert reads(root / "b.json") == ()
    manifest(root / "ds_inference_config.json")
    assert reads(root) == ()


def test_other_json_is_no_manifest(tmp_path):
    root = tiny_llama(tmp_path / "model", layers=1, shards=1)
    (root / "notes.json").write_text('{"checkpoints": [1, 2]}')
    (root / "broken.json").write_text('{"checkpoints": ')
    assert sw.open(root).format == "huggingface"
    assert sw.open(root / "config.json").format == "config"


def test_the_command_line(tmp_path):
    """A manifest is SRC like any other, and --verify opens it again; a folder above far files is not walked."""
    from click.testing import CliRunner

    from shardwright.cli import main

    for name, held in zip(("near", "far"), ds.mp_ranks(GPT.hub(), GPT.kv, GPT.head_dim, 2, "gpt2", 0), strict=True):
        (tmp_path / "data" / name).mkdir(parents=True)
        torch.save({"module": ds.tensors(held)}, tmp_path / "data" / name / "model.pt")
    files = [str(tmp_path / "data" / name / "model.pt") for name in ("near", "far")]
    (tmp_path / "data" / "config.json").write_text(json.dumps(GPT.raw()))
    src = manifest(tmp_path / "else" / "m.json", checkpoints=files)
    (tmp_path / "data" / "model.safetensors").write_bytes(b"not a checkpoint")
    words = [
        "convert",
        str(src),
        str(tmp_path / "out"),
        "--to",
        "deepspeed-mp",
        "--tp",
        "4",
        "--megatron-spec",
        "gpt2-v1",
        "--verify",
        "--json",
    ]
    ran = CliRunner().invoke(main, words)
    assert ran.exit_code == 0, ran.output
    expected = ds.mp_ranks(GPT.hub(), GPT.kv, GPT.head_dim, 4, "gpt2", 1)
    found = ds.read(tmp_path / "out" / "global_step0")
    assert ref.differences(dict(enumerate(expected)), dict(enumerate(found.values()))) == []
    refused = CliRunner().invoke(main, [*words[:3], "--to", "deepspeed-mp", "--megatron-spec", "gpt3", "--json"])
    assert refused.exit_code == 2


def test_files_without_a_common_folder(tmp_path):
    path = manifest(tmp_path / "m.json", checkpoints=[str(tmp_path / "m.json"), "/proc/self/status"])
    with pytest.raises(UnsupportedError, match="share nothing but the root"):
        sw.open(path)
