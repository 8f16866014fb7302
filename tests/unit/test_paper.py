"""A config.json alone: planned from to the byte, looked at, and refused where values would be needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import shardwright as sw
from shardwright import Layout, errors
from shardwright.cli import main
from tests.unit.configs import CONFIGS, experts, holds

MEMORY_OF_THIS_PROCESS = {"base_bytes", "peak_bytes", "min_memory_bytes"}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS["qwen3_moe"]))
    return path


def targets(family: str) -> list[tuple[str, Layout, dict[str, Any]]]:
    ep = 2 if experts(family) else 1
    found = [("huggingface", Layout(), {}), ("ranks", Layout(tp=2, pp=2, ep=ep), {"pad_vocab_to": 2, "dtype": "bfloat16"})]
    if holds(family, "megatron"):
        tp = 2 if holds(family, "megatron", None, Layout(tp=2)) else 1
        found.append(("megatron-legacy", Layout(tp=tp, pp=2, vpp=2, ep=ep), {}))
    return found


@pytest.mark.parametrize("family", CONFIGS)
def test_a_plan_costs_what_the_checkpoints_costs(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[family]))
    made = sw.synth(tmp_path / "config.json", tmp_path / "made", sparse=True)
    for to, layout, options in targets(family):
        real, paper = (sw.plan(sw.open(path), to=to, layout=layout, **options) for path in (made, made / "config.json"))
        figures, expected = paper.summary(), real.summary()
        assert (figures.pop("source_format"), expected.pop("source_format")) == ("config", "huggingface")
        assert [w for w in figures.pop("warnings") if "config alone" not in w] == expected.pop("warnings")
        assert {k: v for k, v in figures.items() if k not in MEMORY_OF_THIS_PROCESS} == {
            k: v for k, v in expected.items() if k not in MEMORY_OF_THIS_PROCESS
        }
        assert paper.plan.target_tensors == real.plan.target_tensors
        assert [(f.path, f.nbytes) for f in paper.plan.target_files] == [(f.path, f.nbytes) for f in real.plan.target_files]
        paper.check()


def test_shards_are_the_hubs(tmp_path: Path) -> None:
    """Several files of at most 5 GB, and the index that names them."""
    big = CONFIGS["llama"] | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "head_dim": 128,
        "dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(big | {"num_hidden_layers": 8, "vocab_size": 128256}))
    made = sw.synth(tmp_path / "config.json", tmp_path / "made", sparse=True)
    paper = sw.open(made / "config.json").source
    assert {path: paper.store.stat(path).nbytes for path in paper.store.list()} == {p.name: p.stat().st_size for p in made.iterdir()}
    assert len([path for path in paper.files if path.endswith(".safetensors")]) == 4
    assert paper.files == sw.open(made).source.files, "headers and index have the same digests"


def test_inspect(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["inspect", str(config), "--json", "--tensors"])
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["family"], found["dtypes"]) == ("config", "qwen3_moe", {"float32": found["bytes"]})
    assert found["bytes"] == sw.open(config).nbytes > 0
    assert found["path"] == str(config)
    assert {"name": "lm_head.weight", "rank": 0, "chunk": 0, "dtype": "float32", "shape": [131, 64], "file": "model.safetensors"} in found[
        "stored"
    ]
    with pytest.raises(SystemExit, match="0"):
        main(["inspect", str(config)])


def test_plan_on_the_command_line(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["plan", str(config), "--to", "megatron-legacy", "--tp", "2", "--ep", "3", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["source_format"] == "config"
    assert found["bytes_written"] == sw.plan(config, to="megatron-legacy", layout=Layout(tp=2, ep=3)).cost.bytes_written
    assert "experts" in sw.plan(config, to="megatron-legacy").explain("decoder.layers.1.mlp.experts.linear_fc1.weight11")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json"]


def test_any_name_that_ends_in_json(config: Path, tmp_path: Path) -> None:
    other = config.rename(tmp_path / "qwen3-235b.json")
    assert sw.open(other).family == "qwen3_moe"


@pytest.mark.parametrize("command", ["convert", "verify", "saved"])
def test_values_are_refused(command: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, saved = tmp_path / "out", tmp_path / "plan.json"
    words = {
        "convert": ["convert", config, out, "--to", "ranks"],
        "verify": ["verify", sw.synth(config, tmp_path / "made"), config],
        "saved": ["convert", "--plan", saved],
    }[command]
    if command == "saved":
        sw.plan(config, out, to="ranks").save(saved)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="3"):
        main([*map(str, words), "--json"])
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "UnsupportedError"
    assert "shapes and no values" in error["message"] and str(config) in error["message"] and "Download the checkpoint" in error["message"]
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(errors.UnsupportedError, match="no values"):
        sw.open(config)["lm_head.weight"][:2].numpy()
    with pytest.raises(errors.UnsupportedError, match="no values"):
        sw.verify(config)


@pytest.mark.parametrize(("named", "dtype"), [({}, "bfloat16"), ({"torch_dtype": "float16"}, "float16"), ({"dtype": "bf16"}, "bfloat16")])
def test_dtype_is_the_configs(named: dict[str, str], dtype: str, tmp_path: Path) -> None:
    raw = {k: v for k, v in CONFIGS["llama"].items() if k != "dtype"} | named
    (tmp_path / "config.json").write_text(json.dumps(raw))
    opened = sw.open(tmp_path / "config.json")
    assert {t.dtype for t in opened.source.units[0, 0].values()} == {dtype}
    assert any("bfloat16 was taken" in text for text in opened.source.warnings) == (not named), "nothing is taken in silence"


@pytest.mark.parametrize(
    ("edit", "kind", "says"),
    [
        ({"model_type": "qwen3_mo"}, errors.UnknownFamilyError, "no family has the model_type 'qwen3_mo'.*Nearest: qwen3_moe.*--family"),
        ({"model_type": None}, errors.ConfigError, "no model_type.*--family"),
        ({"hidden_size": None}, errors.ConfigError, "lacks 'hidden_size'"),
        ({"dtype": "float15"}, errors.ConfigError, "dtype is none that weights have: file config.json; actual 'float15'"),
        ({"dtype": "int8"}, errors.ConfigError, "dtype is none that weights have"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            errors.UnsupportedError,
            "quantised, tensor by tensor.*actual fp8.*without quantiz",
        ),
    ],
    ids=lambda text: str(text)[:30],
)
def test_bad_configs(edit: dict[str, Any], kind: type[Exception], says: str, config: Path) -> None:
    config.write_text(json.dumps({k: v for k, v in {**CONFIGS["qwen3_moe"], **edit}.items() if v is not None}))
    with pytest.raises(kind, match=says):
        sw.open(config)


def test_quantised_weights_that_the_table_lists(tmp_path: Path) -> None:
    """GPT-OSS as released: blocks and scales are known from the config, and cost what the checkpoint's do."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["gpt_oss"] | {"quantization_config": {"quant_method": "mxfp4"}}))
    opened = sw.open(tmp_path / "config.json")
    blocks = opened.stored["model.layers.0.mlp.experts.down_proj_blocks"]
    assert (blocks.dtype, blocks.shape) == ("uint8", (12, 64, 2, 16))
    assert opened.stored["lm_head.weight"].dtype == "float32"
    made = sw.synth(tmp_path / "config.json", tmp_path / "made", sparse=True)
    real, paper = (sw.plan(path, to="ranks", layout=Layout(tp=2, ep=3), pad_vocab_to=2) for path in (made, made / "config.json"))
    assert (paper.cost.bytes_read, paper.cost.bytes_written) == (real.cost.bytes_read, real.cost.bytes_written)
    assert paper.plan.target_tensors == real.plan.target_tensors
    with pytest.raises(errors.UnsupportedError, match="no MXFP4 weights"):
        sw.plan(opened, to="megatron-legacy")


def test_hints_that_contradict_it(config: Path) -> None:
    with pytest.raises(errors.UsageError, match="a config alone says"):
        sw.open(config, vocab_size=7)
    with pytest.raises(errors.UsageError, match="a config alone says"):
        sw.open(config, config=config)
    assert sw.open(config, family="qwen3_moe").family == "qwen3_moe"


def test_a_folder_with_nothing_but_a_config_is_told_how(config: Path) -> None:
    with pytest.raises(errors.CheckpointError, match=r"give the path of config\.json"):
        sw.open(config.parent)
