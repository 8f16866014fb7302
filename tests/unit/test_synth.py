"""Made-up checkpoints: right shapes, random values that clients can run, holes where only headers matter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import shardwright as sw
from shardwright import errors
from tests.unit.tiny import tiny_llama


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "base") / "config.json"


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2"])
def test_values_are_finite_random_and_small(config: Path, tmp_path: Path, dtype: str) -> None:
    tensors = load(sw.synth(config, tmp_path / "made", dtype=dtype))
    for tensor in tensors.values():
        assert str(tensor.dtype) == f"torch.{dtype}"
        values = tensor.to(torch.float64)
        assert values.isfinite().all()
        assert values.abs().max() <= 2
    assert len(tensors["lm_head.weight"].to(torch.float64).unique()) > 50


def test_same_seed_same_bytes(config: Path, tmp_path: Path) -> None:
    made = [sw.synth(config, tmp_path / str(i), seed=seed, max_shard_size=100_000) for i, seed in enumerate([1, 1, 2])]
    bytes_of = [{p.name: p.read_bytes() for p in sorted(folder.iterdir())} for folder in made]
    assert bytes_of[0] == bytes_of[1]
    assert bytes_of[0].keys() == bytes_of[2].keys()
    assert bytes_of[0] != bytes_of[2]


def test_no_two_tensors_are_equal(config: Path, tmp_path: Path) -> None:
    tensors = load(sw.synth(config, tmp_path / "made", max_shard_size=50_000))
    norms = [t.numpy().tobytes() for name, t in tensors.items() if "norm" in name]
    assert len(set(norms)) == len(norms) == 9


def test_config_says_the_dtype(config: Path, tmp_path: Path) -> None:
    made = sw.synth(config.parent, tmp_path / "made", dtype="bf16")
    assert json.loads((made / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert sw.open(made)["model.norm.weight"].dtype == "bfloat16"


def test_sparse_has_headers_and_holes(config: Path, tmp_path: Path) -> None:
    raw = json.loads(config.read_text()) | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 8, "vocab_size": 128256}
    raw |= {"num_attention_heads": 64, "num_key_value_heads": 8, "torch_dtype": "bfloat16"}
    config.write_text(json.dumps(raw))
    made = sw.synth(config, tmp_path / "made", sparse=True)
    assert sw.open(made).nbytes > 15 * 10**9
    assert sum(p.stat().st_blocks for p in made.iterdir()) * 512 < 10**6
    sw.plan(made, to="megatron-legacy", layout=sw.Layout(tp=8, pp=4)).check()


def test_tied_head_is_not_stored(config: Path, tmp_path: Path) -> None:
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    assert "lm_head.weight" not in load(sw.synth(config, tmp_path / "made"))


@pytest.mark.parametrize("call", [{"dtype": "float15"}, {"dtype": "int8"}])
def test_usage(config: Path, tmp_path: Path, call: dict[str, Any]) -> None:
    with pytest.raises(errors.UsageError):
        sw.synth(config, tmp_path / "made", **call)
    assert not (tmp_path / "made").exists()


def test_refusals_leave_nothing(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(errors.TargetExistsError):
        sw.synth(config, tmp_path / "file")
    with pytest.raises(errors.CheckpointError):
        sw.synth(tmp_path / "nothing.json", tmp_path / "made")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "file"]


def test_empty_folder_is_free(config: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    assert sw.open(sw.synth(config, tmp_path / "made")).family == "llama"


def test_nothing_is_left_when_writing_fails(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shardwright.synthetic._fill", fail)
    with pytest.raises(KeyboardInterrupt):
        sw.synth(config, tmp_path / "made")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
