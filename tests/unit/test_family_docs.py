"""`docs/families.md` is true: its worked example converts a checkpoint, and what else it shows is read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import shardwright as sw
from shardwright.planner.operations import OPERATIONS
from shardwright.planner.tables import DIALECT_WORDS, FAMILIES, load_family
from tests.unit import reference as ref
from tests.unit.reference import Arrays, Cut, Model

DOCS = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```toml\n(.*?)```", DOCS, re.DOTALL)
MODEL = Model(layers=4, heads=8, kv=2, hidden=32, ffn=48)


def fused(weights: Arrays) -> Arrays:
    """The model as Phi-3's files hold it."""
    found = {name: array for name, array in weights.items() if not re.search(r"\.(q|k|v|gate|up)_proj\.", name)}
    for layer in range(MODEL.layers):
        at = f"model.layers.{layer}."
        found[f"{at}self_attn.qkv_proj.weight"] = np.concatenate([weights[f"{at}self_attn.{x}_proj.weight"] for x in "qkv"])
        found[f"{at}mlp.gate_up_proj.weight"] = np.concatenate([weights[f"{at}mlp.{x}_proj.weight"] for x in ("gate", "up")])
    return found


@pytest.fixture
def phi(tmp_path: Path) -> Path:
    (tmp_path / "my.toml").write_text(EXAMPLES[0])
    ref.write(tmp_path / "phi", MODEL, fused(MODEL.weights()))
    config = MODEL.config() | {"model_type": "my_phi", "architectures": ["Phi3ForCausalLM"]}
    (tmp_path / "phi" / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("cut", [Cut(), Cut(2, 2), Cut(4, 1)], ids=str)
def test_the_worked_example(phi, cut):
    opened = sw.open(phi / "phi", family=phi / "my.toml")
    layout = sw.Layout(tp=cut.tp, pp=cut.pp)
    sw.convert(opened, phi / "out", to="megatron-legacy", layout=layout)
    assert ref.differences(ref.megatron(MODEL.weights(), MODEL, cut), ref.read_megatron(phi / "out", cut)) == []
    sw.convert(sw.open(phi / "out", family=phi / "my.toml"), phi / "back", to="huggingface")
    assert ref.differences({0: fused(MODEL.weights())}, {0: ref.read_huggingface(phi / "back")}) == []
    assert (phi / "back" / "config.json").read_bytes() == (phi / "phi" / "config.json").read_bytes()


def test_fused_rows_of_a_rank_are_its_shares(phi):
    """With two ranks, each holds its queries, then its keys, then its values."""
    opened = sw.open(phi / "phi", family=phi / "my.toml")
    weights = MODEL.weights()
    for tp in range(2):
        held = opened.state_dict(to="ranks", layout=sw.Layout(tp=2), rank=tp, pad_vocab_to=2)
        at = "model.layers.3.self_attn."
        shares = [ref.share(weights[f"{at}{x}_proj.weight"], 0, 2, tp) for x in "qkv"]
        assert (ref.to_bits(held[f"{at}qkv_proj.weight"]) == np.concatenate(shares)).all()


def test_the_other_examples_are_tables(tmp_path):
    """Parts of tables with experts: each is read as the end of one."""
    for number, text in enumerate(EXAMPLES[1:]):
        fields = "".join(f'{name} = {{ key = "{name}" }}\n' for name in ("first_k_dense_replace", "moe_layer_freq"))
        spellings, entries = text.split("\n\n", 1) if text.startswith("spellings") else ("", text)
        head = f'name = "mine"\nextends = "qwen3_moe"\nmodel_types = ["mine"]\n{spellings}\n'
        (tmp_path / f"{number}.toml").write_text(f"{head}[config]\n{fields}{entries}")
        assert load_family(tmp_path / f"{number}.toml").name == "mine"
    assert len(EXAMPLES) == 3


def test_what_it_lists_is_there():
    table = DOCS.partition("| operation | stored tensor |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(OPERATIONS.names())
    assert set(re.findall(r"`(\w+)`", DOCS.partition("A dialect's rows may ask for")[2].partition("of every")[0])) == set(DIALECT_WORDS) - {
        "tie_word_embeddings"
    }
    for name in re.findall(r"^\| `?(model\.\S+?)`?[,|]", DOCS, re.MULTILINE):
        assert any(t.name == name for family in FAMILIES for t in family.tensors), name
