"""From tables to rows: which stored tensors there are, on which stage, under which name, made of what."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardwright.errors import ConfigError, LayoutError, TableError, UnsupportedError
from shardwright.planner.config import ModelConfig, from_huggingface
from shardwright.planner.layout import Layout
from shardwright.planner.passes.rows import Expansion, expand, hub_tensors
from shardwright.planner.tables import DIALECTS, FAMILIES, Dialect, Family, load_dialect, load_family
from shardwright.planner.tensor.pieces import FILL, count
from tests.unit.reference import Cut, Model, huggingface_ranks, megatron

MODEL = Model(layers=6, heads=8, kv=4, hidden=32, ffn=48, vocab=131)


def config(model: Model) -> ModelConfig:
    return from_huggingface(model.config(), FAMILIES.get(model.family))


def expanded(model: Model, dialect: str, layout: Layout, spec: str = "", padded: int | None = None, reading: bool = False) -> Expansion:
    return expand(FAMILIES.get(model.family), config(model), DIALECTS.get(dialect), spec, layout, padded, reading=reading)


def held(found: Expansion, tp: int) -> dict[tuple[int, int], dict[str, tuple[int, ...]]]:
    """By (stage, chunk): names and the shapes that tp rank 0 holds."""
    stages: dict[tuple[int, int], dict[str, tuple[int, ...]]] = {}
    for instance in found.instances:
        stages.setdefault((instance.pp, instance.chunk), {})[instance.name] = found.classes[instance.row].shards[0].shape
    return stages


@pytest.mark.parametrize(
    "model",
    [
        MODEL,
        Model(layers=2, tied=True),
        Model(family="qwen2", layers=2, qkv_bias=True),
        Model(family="qwen3", layers=3, qk_norm=True, head_dim=8),
        Model(layers=1, qkv_bias=True, out_bias=True, mlp_bias=True),
    ],
)
def test_hub_tensors_are_the_models(model):
    assert hub_tensors(FAMILIES.get(model.family), config(model)) == model.shapes()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cut", [Cut(), Cut(2, 3), Cut(4, 3, 2), Cut(4, 2, stages=(1, 5)), Cut(2, 2, 2, stages=(2, 0, 3, 1))])
def test_names_stages_and_shapes_are_the_references(cut, tied):
    model = Model(layers=6, heads=8, kv=4, hidden=32, ffn=48, vocab=131, tied=tied)
    layout = Layout(cut.tp, cut.pp, cut.vpp, stages=cut.stages)
    for spec in ("te", "local"):
        found = held(expanded(model, "megatron", layout, spec, 128 * cut.tp * (1 if cut.tp > 1 else 2)), cut.tp)
        expected = megatron(model.weights(), model, cut, spec)
        for (pp, chunk), names in found.items():
            assert names == {name: array.shape for name, array in expected[0, pp, chunk].items()}
        assert set(found) == {(p, v) for t, p, v in expected if expected[t, p, v]}
    grown = held(expanded(model, "huggingface", layout, padded=132), cut.tp)
    for (pp, chunk), names in grown.items():
        assert chunk == 0, "global numbers need no chunks"
        assert names == {name: array.shape for name, array in huggingface_ranks(model.weights(), model, cut, 132)[0, pp].items()}


@pytest.mark.parametrize("dialect", ["huggingface", "megatron", "megatron-nested"])
def test_every_row_is_a_bijection_up_to_fill(dialect):
    for model in (MODEL, Model(layers=2, kv=1, tied=True), Model(layers=1, qkv_bias=True, out_bias=True, mlp_bias=True)):
        words = DIALECTS.get(dialect)
        for tp in (1, 2, 4):
            spec = words.specs[0] if words.specs else ""
            found = expanded(model, dialect, Layout(tp), spec, 256 * tp)
            for row in found.classes:
                for slot, shape in enumerate(row.shapes):
                    size = 1
                    for extent in shape:
                        size *= extent
                    for whole in ([row.whole], row.shards):
                        assert sum(count(p) for t in whole for p in t.pieces if p.slot == slot) == size
                assert sum(p.slot == FILL for p in row.whole.pieces) == (
                    1 if "vocab" in str(row.split) or row.whole.size > _size(row) else 0
                )


def _size(row) -> int:
    total = 0
    for shape in row.shapes:
        size = 1
        for extent in shape:
            size *= extent
        total += size
    return total


def test_layers_of_one_shape_share_a_class():
    found = expanded(MODEL, "megatron", Layout(2, 3), "te", 256)
    assert len(found.classes) == 3 + 6 and len(found.instances) == 3 + 6 * MODEL.layers
    assert {i.hub for i in found.instances if "linear_qkv.weight" in i.name} == {
        tuple(f"model.layers.{n}.self_attn.{x}_proj.weight" for x in "qkv") for n in range(6)
    }


def test_a_tied_copy_is_an_alias():
    tied = Model(layers=2, tied=True)
    assert not [i for i in expanded(tied, "megatron", Layout(2), "te", 256).instances if i.name == "output_layer.weight"]
    two = expanded(tied, "megatron", Layout(2, 2), "te", 256)
    copy = next(i for i in two.instances if i.name == "output_layer.weight")
    assert two.classes[copy.row].alias and copy.hub == ("model.embed_tokens.weight",) and copy.pp == 1
    reading = expanded(tied, "huggingface", Layout(), reading=True)
    assert [i.name for i in reading.instances].count("lm_head.weight") == 1, "a file may hold the copy; then it is compared"


LAYERED = """
name = "layered"
model_types = ["layered"]
architecture = "X"
[config]
hidden_size = { key = "hidden_size" }
num_hidden_layers = { key = "num_hidden_layers" }
num_attention_heads = { key = "num_attention_heads" }
[[tensor]]
name = "model.layers.{layer}.mlp.gate_proj.weight"
shape = ["hidden_size * (layer + 1)"]
[[tensor]]
name = "model.layers.{layer}.mlp.up_proj.weight"
shape = ["hidden_size * (layer + 1)"]
when = "layer % 2 == 0"
huggingface = "h.{layer}.up"
"""


def own(tmp_path: Path, family: str = LAYERED, dialect: str = 'name = "own"\n') -> tuple[Family, Dialect, ModelConfig]:
    (tmp_path / "family.toml").write_text(family)
    (tmp_path / "dialect.toml").write_text(dialect)
    made = ModelConfig("layered", {"hidden_size": 4, "num_hidden_layers": 3, "num_attention_heads": 1})
    return load_family(tmp_path / "family.toml"), load_dialect(tmp_path / "dialect.toml"), made


def test_shapes_and_conditions_may_depend_on_the_layer(tmp_path):
    family, _, made = own(tmp_path)
    assert hub_tensors(family, made) == {
        "model.layers.0.mlp.gate_proj.weight": (4,),
        "model.layers.0.mlp.up_proj.weight": (4,),
        "model.layers.1.mlp.gate_proj.weight": (8,),
        "model.layers.2.mlp.gate_proj.weight": (12,),
        "model.layers.2.mlp.up_proj.weight": (12,),
    }
    found = expand(family, made, DIALECTS.get("huggingface"), "", Layout(), None)
    assert [i.name for i in found.instances] == [
        "model.layers.0.mlp.gate_proj.weight", "h.0.up", "model.layers.1.mlp.gate_proj.weight",
        "model.layers.2.mlp.gate_proj.weight", "h.2.up",
    ]  # fmt: skip
    assert [found.classes[i.row].shapes for i in found.instances] == [((4,),), ((4,),), ((8,),), ((12,),), ((12,),)]


JOINED = """
name = "own"
[[row]]
name = "l.{layer}.fused"
hub = ["model.layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.up_proj.weight"]
layout = ["packed"]
"""


def test_a_row_that_joins_what_is_there_only_in_part_is_refused(tmp_path):
    family, dialect, made = own(tmp_path, dialect=JOINED)
    with pytest.raises(UnsupportedError, match=r"has only in part.*model\.layers\.1\.mlp\.up_proj"):
        expand(family, made, dialect, "", Layout(), None)


ONE = '[[row]]\nname = "g.{layer}"\nhub = ["model.layers.{layer}.mlp.gate_proj.weight"]\n'


def test_a_tensor_without_a_row_is_refused(tmp_path):
    family, dialect, made = own(tmp_path, dialect='name = "own"\n' + ONE)
    with pytest.raises(UnsupportedError, match=r"'own' has no row for this tensor of family 'layered'.*up_proj"):
        expand(family, made, dialect, "", Layout(), None)


def test_a_tensor_in_two_rows_is_refused(tmp_path):
    family, dialect, made = own(tmp_path, dialect='name = "own"\n' + ONE + ONE.replace("g.", "again."))
    with pytest.raises(TableError, match=r"two rows hold the same hub tensor.*layers\.0\.mlp\.gate_proj"):
        expand(family, made, dialect, "", Layout(), None)


@pytest.mark.parametrize("shape", ["hidden_size - 8", "hidden_size == 4", "'4'", "1.5"])
def test_impossible_shapes_are_refused(shape, tmp_path):
    family, _, made = own(tmp_path, LAYERED.replace("hidden_size * (layer + 1)", shape))
    with pytest.raises(ConfigError, match="impossible shape"):
        hub_tensors(family, made)


def test_layouts_that_do_not_fit_are_refused():
    with pytest.raises(LayoutError, match="does not divide the attention heads"):
        expanded(MODEL, "megatron", Layout(3), "te", 384)
    with pytest.raises(LayoutError, match="6 layers do not divide"):
        expanded(MODEL, "megatron", Layout(1, 4), "te", 128)
    with pytest.raises(LayoutError, match="padded vocabulary is smaller"):
        expanded(MODEL, "megatron", Layout(), "te", 130)
    with pytest.raises(LayoutError, match=r"does not divide the vocabulary.*--pad-vocab-to 2"):
        expanded(MODEL, "huggingface", Layout(2))
    with pytest.raises(LayoutError, match=r"does not divide the vocabulary of the source.*Give the config.json") as refused:
        expanded(MODEL, "huggingface", Layout(2), reading=True)
    assert "--pad-vocab-to" not in str(refused.value)
