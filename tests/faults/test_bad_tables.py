"""Families that do not fit: bad tables of a user's own, and checkpoints that contradict their table or their config.

Every case goes through ``plan --json``: exit code 3, and a message that names the file, the entry or tensor, and what was
expected and found. Mistakes that are seen when a table is read are in ``tests/unit/test_tables.py`` and ``test_family_rows.py``;
here are those that also need the whole table, or a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

import shardwright as sw
from shardwright.cli import main
from tests.unit.configs import CONFIGS

HEAD = 'name = "mine"\nextends = "qwen3_moe"\nmodel_types = ["mine"]\n'
LAYER = "model.layers.{layer}."
NORM = f"{LAYER}input_layernorm.weight"
Q, K, V = (f"{LAYER}self_attn.{x}_proj.weight" for x in "qkv")
WEIGHTS = "model.safetensors"


def row(name: str, hub: list[str], layout: list[str], split: str = "none") -> str:
    return f"[[row]]\nname = {json.dumps(name)}\nhub = {json.dumps(hub)}\nlayout = {json.dumps(layout)}\nsplit = {json.dumps(split)}\n"


class Bench:
    """A checkpoint to contradict, and the command."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.capsys, self.src, self.table = root, capsys, root / "src", root / "mine.toml"

    def made(self, family: str = "qwen3_moe", **fields: Any) -> Path:
        config = self.root / "config.json"
        config.write_text(json.dumps(CONFIGS[family] | fields))
        return sw.synth(config, self.src)

    def edit(self, change: Callable[[dict[str, Any]], Any]) -> None:
        found = load_file(self.src / WEIGHTS)
        change(found)
        save_file(found, self.src / WEIGHTS, {"format": "pt"})

    def config(self, **fields: Any) -> None:
        path = self.src / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    def plan(self, *options: object) -> tuple[int, dict[str, Any]]:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["plan", str(self.src), "--to", "ranks", *map(str, options), "--json"])
        return int(stop.value.code or 0), json.loads(self.capsys.readouterr().out)

    def refused(self, kind: str, *options: object, **facts: str) -> dict[str, Any]:
        """The error; each of `facts` (message, file, tensor, expected, actual, remedy) matches."""
        code, found = self.plan(*options)
        assert code == 3, found
        error = found["error"]
        print(error["message"])
        assert error["type"] == kind
        for field, pattern in facts.items():
            assert re.search(pattern, str(error.get(field))), (field, error)
        return error

    def bad_table(self, text: str, *options: object, **facts: str) -> None:
        if not self.src.exists():
            self.made()
        self.table.write_text(text)
        assert "mine.toml" in self.refused("TableError", "--family", self.table, *options, **facts)["file"]


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    return Bench(tmp_path, capsys)


TABLES = {
    # what is added to a good table: (text, the entry, what is said)
    "a default that looks ahead": (
        '[config]\nwidth = { key = "width", default = "depth * 2" }\ndepth = { key = "depth", default = "2" }\n',
        r"mine\.toml \[config\] width", r"looks at 'depth', which is no field before it.*actual 'depth \* 2'.*Before it: .*hidden_size",
    ),
    "a field with a taken name": ('[config]\ntp = { value = "2" }\n', r"\[config\] tp", "'tp' means something else"),
    "a word with a field's name": ('[layer]\nhidden_size = "layer"\n', "", "hidden_size"),
    "a pattern that names nothing": ("", "keep_dtype", "names no tensor of the family.*actual '\\*.rooter.weight'"),
    "a dialect that is none": ('[refuse]\nmegatorn = "no such model"\n', r"\[refuse\]", "no dialect 'megatorn'.*Known: .*megatron"),
    "columns of a vector": (
        f'[[tensor]]\nname = "{NORM}"\nshape = ["hidden_size"]\nsplit = "columns"\n',
        r"\[\[tensor\]\] model.layers.{layer}.input_layernorm", "cuts a second axis.*expected two extents.*actual .'hidden_size'.",
    ),
    "a tensor of no family in a row": (row("x.{layer}", [f"{LAYER}mlp.qate.weight"], []), r"\[\[row\]\] \d+", "does not have.*qate"),
    "a transposed vector": (
        row(f"{LAYER}norm_t", [NORM], ["transpose"]), r"\[\[row\]\] model.layers.{layer}.norm_t",
        r"'transpose' does not fit.*tensor '.*input_layernorm.weight'.*expected tensors for transpose.*actual \[\(64,\)\]",
    ),
    "an operation of two on three": (row(f"{LAYER}qkv", [Q, K, V], ["transpose"]), r"\[\[row\]\] model.layers.{layer}.qkv", "does not fit"),
    "parts of unequal width": (
        row(f"{LAYER}odd", [NORM, Q], ["packed"]), r"\[\[row\]\] .*odd", r"actual \[\(64,\), \(64, 64\)\]"
    ),
    "an argument that it does not take": (
        row(f"{LAYER}t", [Q], ["transpose(3)"]), r"\[\[row\]\] \d+$", r"does not take these arguments .*'transpose\(3\)'"
    ),
    "two rows hold one tensor": (
        row(f"{LAYER}one", [Q], ["transpose"]) + row(f"{LAYER}two", [Q, K], ["packed"]), "mine.toml", "two rows hold.*layers.0.*q_proj"
    ),
    "columns of a row of vectors": (
        row(f"{LAYER}n", [NORM], ["packed"], "columns"), r"\[\[row\]\] .*\.n$", "an axis that it does not have.*split 'columns'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLES)
def test_a_bad_table(case: str, bench: Bench) -> None:
    text, file, message = TABLES[case]
    head = HEAD + ('keep_dtype = ["*.rooter.weight"]\n' if case == "a pattern that names nothing" else "")
    bench.bad_table(head + text, file=file, message=message)


@pytest.mark.parametrize(
    ("split", "lacks"),
    [
        ("heads", "num_attention_heads"), ("head_columns", "num_attention_heads"), ("kv_heads", "num_key_value_heads"),
        ("vocab", "vocab_size"), ("qkv", "num_attention_heads"), ("none", "num_hidden_layers"),
    ],
)  # fmt: skip
def test_a_table_without_a_field_that_is_needed(split: str, lacks: str, bench: Bench) -> None:
    layers = "" if split == "none" else 'num_hidden_layers = { key = "n" }\n'
    bench.bad_table(
        'name = "mine"\nmodel_types = ["mine"]\narchitecture = "Mine"\n[config]\nwidth = { key = "w" }\n'
        f'{layers}[[tensor]]\nname = "{Q}"\nshape = ["width", "width"]\nsplit = "{split}"\n',
        message=f"needs the config field {lacks}",
    )


class TestCheckpoints:
    """The table is right, and the checkpoint does not have what it says."""

    def test_a_tensor_without_a_rule(self, bench: Bench) -> None:
        bench.made()
        bench.edit(lambda t: t.update({"model.layers.1.mlp.router.weight": t["model.layers.1.mlp.gate.weight"]}))
        facts = {
            "tensor": r"model\.layers\.1\.mlp\.router\.weight",
            "file": WEIGHTS,
            "expected": "no tensor",
            "actual": r"float32 \(12, 64\)",
        }
        bench.refused("UnknownTensorError", **facts, remedy="--drop PATTERN, or bring a table with --family")
        code, found = bench.plan("--drop", "*.router.weight")
        assert code == 0
        assert found["dropped"] == [{"name": "model.layers.1.mlp.router.weight", "reason": "left out with --drop"}]

    def test_a_rule_without_a_tensor(self, bench: Bench) -> None:
        bench.made()
        bench.edit(lambda t: t.pop("model.layers.3.mlp.gate.weight"))
        facts = {"tensor": r"model\.layers\.3\.mlp\.gate\.weight", "file": WEIGHTS, "expected": r"shape \(12, 64\)", "actual": "not there"}
        bench.refused("MissingTensorError", **facts, remedy="--config")

    def test_the_file_is_that_of_the_neighbours(self, bench: Bench) -> None:
        config = bench.root / "config.json"
        config.write_text(json.dumps(CONFIGS["llama"]))
        sw.synth(config, bench.src, max_shard_size=100_000)
        index = json.loads((bench.src / "model.safetensors.index.json").read_text())
        gone = "model.layers.2.self_attn.q_proj.weight"
        file = index["weight_map"].pop(gone)
        held = load_file(bench.src / file)
        assert len(set(index["weight_map"].values())) > 3
        del held[gone]
        save_file(held, bench.src / file, {"format": "pt"})
        (bench.src / "model.safetensors.index.json").write_text(json.dumps(index))
        near = index["weight_map"]["model.layers.2.self_attn.q_proj.bias"]
        assert bench.refused("MissingTensorError", tensor=gone)["file"] == near

    def test_an_expert_is_missing(self, bench: Bench) -> None:
        bench.made()
        bench.edit(lambda t: [t.pop(name) for name in list(t) if ".1.mlp.experts.5." in name])
        facts = {
            "expected": "experts 0 … 11",
            "actual": "experts 0 … 4, 6 … 11",
            "file": WEIGHTS,
            "tensor": r"layers\.1\.mlp\.experts\.5\.",
        }
        bench.refused("MissingTensorError", **facts, message="are not those that the config counts")

    @pytest.mark.parametrize("shift", [1, 100])
    def test_experts_are_not_numbered_from_0(self, shift: int, bench: Bench) -> None:
        bench.made("mixtral")

        def renumber(tensors: dict[str, Any]) -> None:
            for name in [n for n in tensors if ".0.block_sparse_moe.experts." in n]:
                tensors[re.sub(r"experts\.(\d+)", lambda m: f"experts.{int(m[1]) + shift}_", name)] = tensors.pop(name)
            for name in [n for n in tensors if "_." in n]:
                tensors[name.replace("_.", ".")] = tensors.pop(name)

        bench.edit(renumber)
        actual = f"experts {shift} … {11 + shift}"
        bench.refused("MissingTensorError", tensor=r"layers\.0\.block_sparse_moe\.experts\.0\.", expected="experts 0 … 11", actual=actual)

    def test_fewer_experts_in_the_config(self, bench: Bench) -> None:
        bench.made()
        bench.config(num_experts=11)
        bench.edit(lambda t: [t.update({n: t[n][:11]}) for n in t if n.endswith("mlp.gate.weight")])
        bench.refused(
            "UnknownTensorError",
            expected="experts 0 … 10",
            actual="experts 0 … 11",
            file=WEIGHTS,
            tensor=r"experts\.11\.",
            remedy="--config",
        )

    def test_more_experts_in_the_config(self, bench: Bench) -> None:
        bench.made()
        bench.config(num_experts=13)
        error = bench.refused("ShapeMismatchError", expected=r"13, 64", actual=r"12, 64", file=WEIGHTS)
        assert "gate.weight" in error["tensor"]

    def test_experts_of_megatron_ranks(self, bench: Bench) -> None:
        """Local numbers, grouped names."""
        import torch

        bench.made()
        sw.convert(bench.src, bench.root / "there", to="megatron-legacy", layout=sw.Layout(ep=2))
        bench.src = bench.root / "there"
        path = bench.src / "release" / "mp_rank_00_001" / "model_optim_rng.pt"
        saved = torch.load(path, weights_only=False)
        del saved["model"]["decoder.layers.3.mlp.experts.linear_fc1.weight2"]
        torch.save(saved, path)
        facts = {"expected": "experts 0 … 5", "actual": "experts 0 … 1, 3 … 5", "file": "mp_rank_00_001"}
        bench.refused("MissingTensorError", **facts, tensor=r"layers\.3\..*weight2")

    def test_heads_that_do_not_fit_the_groups(self, bench: Bench) -> None:
        bench.made()
        bench.config(num_key_value_heads=3)
        bench.refused("ConfigError", file=r"config\.json", expected="a divisor of 8", actual="3", message="key/value heads")

    def test_heads_that_do_not_fit_the_tensors(self, bench: Bench) -> None:
        bench.made()
        bench.config(num_attention_heads=16)
        error = bench.refused("ShapeMismatchError", file=WEIGHTS, expected=r"128, 64", actual=r"64, 64")
        assert error["tensor"] == "model.layers.0.self_attn.q_proj.weight"

    def test_heads_that_do_not_fit_the_layout(self, bench: Bench) -> None:
        bench.made()
        bench.refused("LayoutError", "--tp", 16, "--pad-vocab-to", 16, message="tp 16 does not divide the attention heads", actual="8")

    @pytest.mark.parametrize("field", ["hidden_size", "intermediate_size", "moe_intermediate_size", "vocab_size", "head_dim"])
    def test_a_size_that_contradicts_the_headers(self, field: str, bench: Bench) -> None:
        bench.made("qwen3_moe" if field != "vocab_size" else "qwen2_moe")
        bench.config(**{field: 96})
        error = bench.refused("ShapeMismatchError", file=WEIGHTS, expected="96|768|384", actual="64|131|32|8", remedy="--config")
        assert error["tensor"]

    def test_a_switch_that_contradicts_the_headers(self, bench: Bench) -> None:
        bench.made("llama")
        bench.config(attention_bias=False)
        bench.refused("UnknownTensorError", file=WEIGHTS, tensor=r"_proj\.bias", expected="no tensor", actual=r"float32 \(\d+,\)")

    def test_more_layers_in_the_config(self, bench: Bench) -> None:
        bench.made("llama")
        bench.config(num_hidden_layers=5)
        bench.refused("MissingTensorError", tensor=r"model\.layers\.4\.", file=WEIGHTS, expected="shape", actual="not there")

    def test_a_model_type_that_nobody_knows(self, bench: Bench) -> None:
        bench.made()
        bench.config(model_type="qwen3_mo")
        facts = {
            "message": "'qwen3_mo'",
            "file": "config.json",
            "remedy": r"Nearest: qwen3_moe.*--family NAME.*FILE\.toml \(docs/families\.md\)",
        }
        bench.refused("UnknownFamilyError", **facts)
        assert bench.plan("--family", "qwen3_moe")[0] == 0
        bench.table.write_text('name = "mine"\nextends = "qwen3_moe"\nmodel_types = ["qwen3_mo"]\n')
        assert bench.plan("--family", bench.table)[0] == 0, "with a table of one's own"
