"""What a family's own rows can say: each operation against plain numpy, and the grammar around them."""

from __future__ import annotations

import json

import numpy as np
import pytest

import shardwright as sw
from shardwright.errors import ConfigError, LayoutError, TableError, UnsupportedError, UsageError
from shardwright.planner.config import from_huggingface
from shardwright.planner.layout import Layout
from shardwright.planner.operations import OPERATIONS
from shardwright.planner.passes.rows import expand
from shardwright.planner.tables import DIALECTS, load_family
from shardwright.planner.tensor.lazy import LazyTensor, leaf
from tests.unit import reference as ref
from tests.unit.experts_reference import Experts
from tests.unit.reference import Model


def made(tensor: LazyTensor, parts: list[np.ndarray]) -> np.ndarray:
    """The tensor's elements, piece by piece."""
    found = np.full(tensor.size, -1, dtype=np.int64)
    for piece in tensor.pieces:
        grid = np.indices([n for n, _, _ in piece.dims]).reshape(len(piece.dims), -1)
        to = piece.dst_off + sum(grid[i] * d for i, (_, d, _) in enumerate(piece.dims)) if piece.dims else np.array([piece.dst_off])
        of = piece.src_off + sum(grid[i] * s for i, (_, _, s) in enumerate(piece.dims)) if piece.dims else np.array([piece.src_off])
        found[to] = parts[piece.slot].ravel()[of]
    return found.reshape(tensor.shape)


def numbered(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    """Arrays of distinct numbers."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    ends = np.cumsum([0, *sizes])
    return [np.arange(a, b).reshape(shape) for a, b, shape in zip(ends[:-1], ends[1:], shapes, strict=True)]


def applied(name: str, parts: list[np.ndarray], **fields: int) -> np.ndarray:
    return made(OPERATIONS.get(name)([leaf(i, part.shape) for i, part in enumerate(parts)], fields), parts)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("rest", [(), (3,), (3, 2)])
def test_packed(tp, rest):
    parts = numbered((16, *rest), (4, *rest), (8, *rest))
    expected = np.concatenate([np.split(part, tp)[t] for t in range(tp) for part in parts])
    assert (applied("packed", parts, tp=tp) == expected).all()
    if tp == 1:
        assert (applied("packed", parts, tp=1) == np.concatenate(parts)).all()


def test_packed_refuses_parts_that_do_not_divide():
    with pytest.raises(LayoutError, match=r"tp 4 does not divide a fused part's rows.*actual 6"):
        applied("packed", numbered((8, 2), (6, 2)), tp=4)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rest", [(), (3,)])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_grouped_qkv(gated, rest, groups):
    heads, width = 6, 2
    parts = numbered(*[(n * width, *rest) for n in ((heads,) * (1 + gated) + (groups, groups))])
    *queries, keys, values = [part.reshape(-1, width, *rest) for part in parts]
    each, expected = heads // groups, []
    for group in range(groups):
        for query in queries:  # and gates
            expected += [query[head] for head in range(group * each, (group + 1) * each)]
        expected += [keys[group], values[group]]
    assert (applied("grouped_qkv", parts, num_key_value_heads=groups) == np.concatenate(expected)).all()


@pytest.mark.parametrize("rest", [(), (3,)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_interleave(rest, count):
    parts = numbered(*[(5, *rest)] * count)
    found = applied("interleave", parts, tp=1)
    for n, part in enumerate(parts):
        assert (found[n::count] == part).all()


@pytest.mark.parametrize("shape", [(4, 3), (4,), (1, 2)])
def test_stack_experts(shape):
    parts = numbered(*[shape] * 12)
    assert (applied("stack_experts", parts, tp=1) == np.stack(parts)).all()
    assert applied("stack_experts", parts[:1], tp=1).shape == (1, *shape)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("shape", [(6, 3), (5, 2, 2)])
def test_roll(count, shape):
    (table,) = numbered(shape)
    assert (made(OPERATIONS.get("roll")([leaf(0, shape)], {}, count), [table]) == np.roll(table, count, axis=0)).all()


@pytest.mark.parametrize("count", [-1, 7, "2", True, None])
def test_roll_of_no_number_of_rows_is_refused(count):
    with pytest.raises(UsageError, match=r"operation 'roll'.*expected 0 … 6"):
        OPERATIONS.get("roll")([leaf(0, (6, 3))], {}, count)


def test_roll_of_a_scalar_or_of_several_is_refused():
    for parts in ([leaf(0, ())], [leaf(0, (6, 3)), leaf(1, (6, 3))]):
        with pytest.raises(UsageError, match="'roll' does not fit"):
            OPERATIONS.get("roll")(parts, {}, 1)


TABLE = """
name = "mine"
extends = ["llama"]
model_types = ["mine"]
architecture = "MineForCausalLM"
"""
ROWS = {
    "conv1d": (
        """
[[row]]
name = "h.{layer}.c_attn.weight"
hub = [
    "model.layers.{layer}.self_attn.q_proj.weight",
    "model.layers.{layer}.self_attn.k_proj.weight",
    "model.layers.{layer}.self_attn.v_proj.weight",
]
layout = ["packed", "transpose"]
split = "columns"
[[row]]
name = "h.{layer}.c_proj.weight"
hub = ["model.layers.{layer}.self_attn.o_proj.weight"]
layout = ["transpose"]
split = "rows"
""",
        {"c_attn": lambda w: np.concatenate([w["q"], w["k"], w["v"]]).T, "c_proj": lambda w: w["o"].T},
    ),
    "per head": (
        """
[[row]]
name = "h.{layer}.query_key_value.weight"
hub = [
    "model.layers.{layer}.self_attn.q_proj.weight",
    "model.layers.{layer}.self_attn.k_proj.weight",
    "model.layers.{layer}.self_attn.v_proj.weight",
]
layout = ["grouped_qkv"]
split = "qkv"
""",
        {"query_key_value": lambda w: np.stack([w[x].reshape(8, 4, -1) for x in "qkv"], axis=1).reshape(8 * 3 * 4, -1)},
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_family_states_its_own_fused_rows(name, tmp_path):
    rows, expected = ROWS[name]
    model = Model(layers=2, heads=8, kv=8, hidden=24, ffn=24)
    weights = model.weights()
    (tmp_path / "mine.toml").write_text(TABLE + rows)
    ref.write(tmp_path / "plain", model, weights)
    opened = sw.open(tmp_path / "plain")
    sw.convert(opened, tmp_path / "megatron", to="megatron-legacy", layout=sw.Layout(tp=2))
    (tmp_path / "megatron" / "shardwright.json").unlink()
    config = json.dumps(model.config() | {"model_type": "mine"})
    (tmp_path / "megatron" / "hf" / "config.json").write_text(config)
    sw.convert(sw.open(tmp_path / "megatron", family=tmp_path / "mine.toml"), tmp_path / "mine", to="huggingface")
    found = ref.read_huggingface(tmp_path / "mine")
    for layer in range(2):
        w = {x: weights[f"model.layers.{layer}.self_attn.{x}_proj.weight"] for x in "qkvo"}
        for stored, make in expected.items():
            assert (found[f"h.{layer}.{stored}.weight"] == make(w)).all()
    sw.convert(sw.open(tmp_path / "mine", family=tmp_path / "mine.toml"), tmp_path / "back", to="megatron-legacy", layout=sw.Layout(tp=2))
    cut = ref.Cut(2)
    assert ref.differences(ref.megatron(weights, model, cut), ref.read_megatron(tmp_path / "back", cut)) == []


INTERLEAVED = """
name = "mine"
extends = "qwen3_moe"
model_types = ["mine"]
spellings = ["mine", "per-expert"]
[[row]]
name = { mine = "model.layers.{layer}.mlp.experts.gate_up_proj" }
hub = ["model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight", "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"]
layout = ["interleave", "transpose", "stack_experts"]
split = "columns"
[[row]]
name = { mine = "model.layers.{layer}.mlp.experts.down_proj" }
hub = ["model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"]
layout = ["transpose", "stack_experts"]
split = "rows"
"""


def test_interleaved_and_transposed_stacks(tmp_path):
    """As GPT-OSS holds its experts; square matrices, where a shape would not tell."""
    model = Experts(family="qwen3_moe", qk_norm=True, layers=2, expert_ffn=32, hidden=32)
    weights = model.weights()
    (tmp_path / "mine.toml").write_text(INTERLEAVED)
    ref.write(tmp_path / "plain", model, weights)
    opened = sw.open(tmp_path / "plain", family=tmp_path / "mine.toml")
    assert opened.source.spec == "per-expert", "told from the names"
    sw.convert(opened, tmp_path / "mine", to="huggingface")
    found = ref.read_huggingface(tmp_path / "mine")
    for layer in range(2):
        at = f"model.layers.{layer}.mlp.experts."
        for e in range(model.experts):
            gate, up, down = (weights[name] for name in model.names(layer, e))
            assert (found[f"{at}gate_up_proj"][e, :, ::2] == gate.T).all() and (found[f"{at}gate_up_proj"][e, :, 1::2] == up.T).all()
            assert (found[f"{at}down_proj"][e] == down.T).all()
    sw.convert(sw.open(tmp_path / "mine", family=tmp_path / "mine.toml"), tmp_path / "back", to="huggingface", spec="per-expert")
    assert ref.differences({0: weights}, {0: ref.read_huggingface(tmp_path / "back")}) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ('[[row]]\nname = "x.{layer}"\nhub = ["model.layers.{layer}.no"]\n', "made of a tensor that the family does not have.*no"),
        ('[[tensor]]\nname = "x.{layer}.{expert}"\nshape = []\n', "need the config field num_experts"),
        ('[[tensor]]\nname = "x.{layer}.{expert}"\nhuggingface = "x.{layer}"\nshape = []\n', "needs {expert} in each of its names"),
        ('[[row]]\nname = { odd = "x.{layer}" }\nhub = ["model.layers.{layer}.input_layernorm.weight"]\n', "a name, or one per spec"),
        ('[layer]\nmoe = "nothing > 3"\n', "the field 'nothing' is not in"),
        ("[layer]\nmoe = 'layer ('\n", "not an expression"),
        ("refuse = 3\n", r"\[refuse\] must be a table"),
        ("[refuse]\nmegatron = 3\n", r'a refusal is "why", or .*\[refuse\] megatron; actual 3'),
        ("[refuse]\nmegatron = { when = 'qk_norm' }\n", r"a refusal needs 'reason': a string.*\[refuse\] megatron"),
        ("[refuse]\nmegatron = { why = 'x' }\n", "a refusal has no entry 'why'.*Known: reason, when"),
        ("[refuse]\nmegatron = { when = 'odd', reason = 'x' }\n", r"the field 'odd' is not in \[config\].*\[refuse\] megatron"),
        ("base_prefix = 3\n", "the family needs 'base_prefix': a string"),
        ("[config]\nhidden_size = { key = [] }\n", "a config field is"),
        ('[config]\nhidden_size = { key = ["a", 3] }\n', "a config field is"),
    ],
)
def test_mistakes(more, message, tmp_path):
    head = TABLE + more if more.startswith("[") else more + TABLE
    (tmp_path / "mine.toml").write_text(head)
    with pytest.raises(TableError, match=message):
        load_family(tmp_path / "mine.toml")


MIXED = """name = "x.{layer}"
layout = ["packed"]
hub = ["model.layers.{layer}.mlp.gate.weight", "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"]
"""
STACKS = "hub = ['model.layers.{layer}.mlp.experts.{expert}.down_proj.weight']\n"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('name = "x.{layer}"\n' + STACKS, "counts {expert} in its name or ends in stack_experts"),
        ('name = "x.{layer}.{expert}"\nlayout = ["stack_experts"]\n' + STACKS, "counts {expert} in its name or ends in stack_experts"),
        ('name = "x.{layer}"\nlayout = ["stack_experts", "transpose"]\n' + STACKS, "last operation"),
        ('name = "x.{layer}"\nlayout = ["stack_experts", "stack_experts"]\n' + STACKS, "last operation"),
        ('name = "x.{layer}"\nlayout = ["stack_experts"]\nhub = ["model.layers.{layer}.mlp.gate.weight"]\n', "last operation"),
        (
            MIXED,
            "joins what every expert has",
        ),
    ],
)
def test_mistakes_with_experts(row, message, tmp_path):
    (tmp_path / "mine.toml").write_text('name = "mine"\nextends = "mixtral"\nmodel_types = ["mine"]\n[[row]]\n' + row)
    with pytest.raises(TableError, match=message):
        load_family(tmp_path / "mine.toml")


def test_a_dialect_that_a_family_refuses(tmp_path):
    (tmp_path / "mine.toml").write_text(TABLE + '[refuse]\nmegatron = "Megatron-core has no such attention"\n')
    family = load_family(tmp_path / "mine.toml")
    config = from_huggingface(Model(layers=1).config(), family)
    with pytest.raises(UnsupportedError, match="dialect 'megatron' cannot hold family 'mine': Megatron-core has no such attention"):
        expand(family, config, DIALECTS.get("megatron"), "te", Layout(), None)
    assert expand(family, config, DIALECTS.get("huggingface"), "", Layout(), None).instances


def test_the_first_key_that_is_there(tmp_path):
    (tmp_path / "mine.toml").write_text(TABLE + '[config]\nhidden_size = { key = ["width", "hidden_size"] }\n')
    family = load_family(tmp_path / "mine.toml")
    raw = Model(layers=1).config()
    assert from_huggingface(raw, family)["hidden_size"] == 96
    assert from_huggingface(raw | {"width": 96}, family)["hidden_size"] == 96
    with pytest.raises(ConfigError, match=r"width and hidden_size disagree.*expected 8.*actual 96"):
        from_huggingface(raw | {"width": 8}, family)


def test_an_mlp_without_a_gate(tmp_path):
    """Megatron's fc1 is then the up projection alone."""
    gateless = "".join(
        f'[[tensor]]\nname = "model.layers.{{layer}}.mlp.gate_proj.{kind}"\nshape = ["1"]\nwhen = "false"\n' for kind in ("weight", "bias")
    )
    (tmp_path / "mine.toml").write_text(TABLE + '[config]\ngated_mlp = { value = "false" }\n' + gateless)
    family = load_family(tmp_path / "mine.toml")
    config = from_huggingface(Model(layers=1).config(), family)
    found = expand(family, config, DIALECTS.get("megatron"), "te", Layout(tp=2), 256)
    (fc1,) = [i for i in found.instances if "linear_fc1.weight" in i.name]
    assert fc1.hub == ("model.layers.0.mlp.up_proj.weight",) and found.classes[fc1.row].shards[0].shape == (48, 96)
