"""Gemma, Phi-3, OLMoE, Nemotron and GLM-4.5: every rank against plain numpy, home again, and their configs both ways."""

from __future__ import annotations

import json

import pytest
import torch

import shardwright as sw
from shardwright.errors import ConfigError, TableError, UnsupportedError
from shardwright.planner.config import family_of, from_huggingface, to_huggingface
from shardwright.planner.megatron_args import from_megatron, to_megatron
from shardwright.planner.tables import FAMILIES, load_family
from tests.unit import experts_reference as moe
from tests.unit import reference as ref
from tests.unit.experts_reference import ExpertCut, Experts
from tests.unit.more_reference import MODELS, megatron

SPECS = {"gemma2": ("te", "te-sequential"), "gemma3": ("te", "te-sequential")}
CUTS = (ExpertCut(), ExpertCut(2, 2, 2), ExpertCut(4, 2, 1, (1, 3)))
EXPERT_CUTS = (ExpertCut(1, 1, 1, None, 12), ExpertCut(2, 2, 2, None, 3), ExpertCut(4, 2, 1, (3, 1), 2))


def _ways() -> list[tuple[str, ExpertCut, str]]:
    found = []
    for n, (name, model) in enumerate(MODELS.items()):
        specs = SPECS.get(name, ("te", "te-sequential", "local"))
        cuts = EXPERT_CUTS if isinstance(model, Experts) else CUTS
        found += [(name, cut, specs[(n + k) % len(specs)]) for k, cut in enumerate(cuts)]
    return found


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("more")
    return {name: ref.write(root / name, model, model.weights()) for name, model in MODELS.items()}


@pytest.mark.parametrize(("name", "cut", "spec"), _ways(), ids=str)
def test_megatron(name, cut, spec, sources, tmp_path):
    model, layout = MODELS[name], sw.Layout(tp=cut.tp, pp=cut.pp, vpp=cut.vpp, ep=cut.ep, stages=cut.stages)
    sw.convert(sources[name], tmp_path / "out", to="megatron-legacy", layout=layout, spec=spec)
    assert ref.differences(megatron(model.weights(), model, cut, spec), moe.read_megatron(tmp_path / "out", cut)) == []
    sw.convert(tmp_path / "out", tmp_path / "home", to="huggingface")
    assert ref.differences({0: model.weights()}, {0: ref.read_huggingface(tmp_path / "home")}) == []
    assert json.loads((tmp_path / "home" / "config.json").read_text()) == model.config()


@pytest.mark.parametrize("name", MODELS)
def test_rank_files_and_home(name, sources, tmp_path):
    layout = sw.Layout(tp=4, pp=2, ep=3 if isinstance(MODELS[name], Experts) else 1)
    sw.convert(sources[name], tmp_path / "out", to="ranks", layout=layout, pad_vocab_to=4)
    sw.convert(tmp_path / "out", tmp_path / "home", to="huggingface")
    assert ref.differences({0: MODELS[name].weights()}, {0: ref.read_huggingface(tmp_path / "home")}) == []


def config_of(raw):
    return from_huggingface(raw, family_of(raw))


def newer(raw):
    """RoPE as transformers 5 spells it."""
    old = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq")
    flat = {"rope_theta": raw["rope_theta"], **(raw.get("rope_scaling") or {"rope_type": "default"})}
    if "partial_rotary_factor" in raw:
        flat["partial_rotary_factor"] = raw["partial_rotary_factor"]
    if "rope_local_base_freq" in raw:
        flat = {"full_attention": flat, "sliding_attention": {"rope_type": "default", "rope_theta": raw["rope_local_base_freq"]}}
    return {key: value for key, value in raw.items() if key not in old} | {"rope_parameters": flat}


@pytest.mark.parametrize("spelling", [dict, newer])
@pytest.mark.parametrize("name", MODELS)
def test_config_json_both_ways(name, spelling):
    raw, family = MODELS[name].config(), FAMILIES.get(name)
    config = config_of(spelling(raw))
    assert config == config_of(raw) and config.family == name
    written = to_huggingface(config, family, "float32", None)
    assert config_of(written) == config
    assert written["architectures"] == raw["architectures"] and written["model_type"] == raw["model_type"]
    assert written["rope_parameters"] == newer(written)["rope_parameters"] == newer(raw)["rope_parameters"]
    assert all(written[key] == raw[key] for key in ("rope_theta", "partial_rotary_factor", "rope_local_base_freq") if key in raw)


@pytest.mark.parametrize("name", ["phi3", "nemotron", "glm4_moe", "olmoe"])
def test_megatron_args_both_ways(name):
    config = config_of(MODELS[name].config())
    arguments, warnings = to_megatron(config, FAMILIES.get(name))
    assert len(warnings) == (name == "olmoe")
    back = from_megatron(arguments, FAMILIES.get(name), None, "f")
    assert back == config and all(type(back[field]) is type(config[field]) for field in config.fields)
    if name in ("nemotron", "glm4_moe"):
        assert from_megatron(arguments, None, None, "f") == config
    foreign = "args.normalization" if name == "nemotron" else "args.rotary_percent"
    if name in ("nemotron", "glm4_moe"):
        with pytest.raises(UnsupportedError, match=rf"'llama' has no {foreign}"):
            from_megatron(arguments, FAMILIES.get("llama"), None, "f")


def test_args_by_hand():
    def arguments(name, **change):
        return to_megatron(config_of(MODELS[name].config() | change), FAMILIES.get(name))[0]

    made = arguments("nemotron")
    assert (made["normalization"], made["apply_layernorm_1p"], made["squared_relu"], made["swiglu"]) == ("LayerNorm", True, True, False)
    assert made["rotary_percent"] == 0.5 and made["norm_epsilon"] == 1e-5
    made = arguments("glm4_moe")
    assert made["moe_layer_freq"] == [0, 1, 1, 1] and made["moe_shared_expert_intermediate_size"] == 64
    assert made["moe_router_enable_expert_bias"] is True and made["moe_router_score_function"] == "sigmoid"
    assert (made["moe_router_num_groups"], made["moe_router_group_topk"], made["moe_router_topk_scaling_factor"]) == (4, 2, 2.5)
    assert made["add_qkv_bias"] is True and made["add_bias_linear"] is False
    one = arguments("glm4_moe", n_group=1, topk_group=1, first_k_dense_replace=0)
    assert one["moe_router_num_groups"] is None and one["moe_layer_freq"] == 1
    made = arguments("gemma")
    assert made["apply_layernorm_1p"] is True and made["swiglu"] is False and made["kv_channels"] == 8
    assert arguments("gemma2")["window_attn_skip_freq"] == [1, 0, 1, 0] and arguments("gemma2")["window_size"] == (15, 0)
    assert arguments("gemma3")["window_attn_skip_freq"] == [1, 1, 0, 1]
    types = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    assert arguments("gemma3", layer_types=types)["window_attn_skip_freq"] == [0, 0, 1, 0]


@pytest.mark.parametrize(
    ("name", "count"),
    [("gemma", 2), ("gemma2", 5), ("gemma3", 6), ("phi3", 0), ("nemotron", 0), ("olmoe", 1), ("glm4_moe", 0)],
)
def test_what_args_cannot_say_is_a_warning_each(name, count):
    _, warnings = to_megatron(config_of(MODELS[name].config()), FAMILIES.get(name))
    assert len(warnings) == len(set(warnings)) == count
    assert all("Megatron's args cannot express" in line for line in warnings)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "no clipped queries.*clip_qkv 8.0"),
        ("olmoe", {"num_key_value_heads": 4}, "OLMoESelfAttention.*expected 8 key/value heads, actual 4"),
        ("gemma", {"use_bidirectional_attention": True}, "tokens see those after them"),
        ("gemma", {"hidden_act": "relu"}, "SwiGLU.*relu, gated"),
        ("glm4_moe", {"norm_topk_prob": False}, "normalises sigmoid scores"),
    ],
)
def test_what_megatron_cannot_build_is_refused(name, change, message):
    with pytest.raises(UnsupportedError, match=message):
        to_megatron(config_of(MODELS[name].config() | change), FAMILIES.get(name))


def test_groups_of_experts_that_megatron_ranks_otherwise_are_a_warning():
    config = config_of(MODELS["glm4_moe"].config() | {"num_experts_per_tok": 6})
    assert any(
        "best 3, transformers by its best 2: some tokens go to other experts" in text
        for text in to_megatron(config, FAMILIES.get("glm4_moe"))[1]
    )


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gemma3", {"layer_types": ["full_attention"]}, "layer_types must name each layer's attention.*expected 4 of"),
        ("gemma3", {"layer_types": ["window"] * 4}, "layer_types"),
        ("gemma3", {"layer_types": [["window"]] * 4}, "layer_types"),
        ("gemma3", {"layer_types": 4}, "layer_types"),
        ("gemma3", {"rope_parameters": {"sliding_attention": 1}}, "must be an object"),
        ("gemma3", {"rope_parameters": {"sliding_attention": {}, "full_attention": [1]}}, "must be an object"),
        ("gemma3", {"rope_local_base_freq": 10**400}, "rope_local_base_freq must be a number"),
        ("gemma3", {"hidden_activation": ["gelu"]}, "hidden_act must be a name"),
        ("glm4_moe", {"num_nextn_predict_layers": "one"}, "num_nextn_predict_layers must be a number of layers"),
        ("gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern must be a positive integer"),
        ("glm4_moe", {"first_k_dense_replace": -1}, "first_k_dense_replace must be a number of layers"),
        ("glm4_moe", {"routed_scaling_factor": "2"}, "routed_scaling_factor must be a number"),
        ("glm4_moe", {"n_group": True}, "n_group must be a positive integer"),
        ("nemotron", {"partial_rotary_factor": "half"}, "partial_rotary_factor must be a number"),
        (
            "nemotron",
            {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.25}},
            "rope_parameters and partial_rotary_factor disagree.*0.25.*0.5",
        ),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}}},
            "scaled in layers with a window",
        ),
    ],
)
def test_contradictions_and_nonsense_are_refused(name, change, message):
    with pytest.raises(ConfigError, match=message):
        config_of(MODELS[name].config() | change)


def test_null_is_not_always_the_default():
    """Gemma 2 without the key has soft-caps and a window; with null it has none."""
    raw = MODELS["gemma2"].config()
    assert config_of(raw)["final_logit_softcapping"] is None
    without = {key: value for key, value in raw.items() if key not in ("final_logit_softcapping", "sliding_window")}
    assert config_of(without)["final_logit_softcapping"] == 30.0 and config_of(without)["sliding_window"] == 4096
    assert config_of(raw | {"sliding_window": None})["sliding_window"] is None
    assert config_of(raw | {"num_key_value_heads": None})["num_key_value_heads"] == 4


def test_gemmas_old_word_for_its_activation():
    raw = MODELS["gemma"].config()
    assert to_megatron(config_of(raw | {"hidden_act": "gelu"}), FAMILIES.get("gemma")) == to_megatron(config_of(raw), FAMILIES.get("gemma"))
    with pytest.raises(UnsupportedError, match="gelu, gated"):
        to_megatron(config_of(ref.Model().config() | {"hidden_act": "gelu"}), FAMILIES.get("llama"))


def test_dense_layers_that_are_not_the_first():
    arguments, _ = to_megatron(config_of(MODELS["glm4_moe"].config()), FAMILIES.get("glm4_moe"))
    with pytest.raises(ConfigError, match=r"do not say 'first_k_dense_replace'.*--config"):
        from_megatron(arguments | {"moe_layer_freq": [1, 0, 1, 1]}, FAMILIES.get("glm4_moe"), None, "f")
    with pytest.raises(ConfigError, match=r"do not say 'n_shared_experts'"):
        from_megatron(arguments | {"moe_shared_expert_intermediate_size": 65}, FAMILIES.get("glm4_moe"), None, "f")


@pytest.mark.parametrize(
    "change",
    [
        *({"moe_shared_expert_intermediate_size": value} for value in ("64", [], -1, 10**5000)),
        *({"moe_ffn_hidden_size": value} for value in ("64", [], 0, {})),
        *({"moe_router_num_groups": value} for value in ([], 0, "1")),
        *({"moe_router_topk_scaling_factor": value} for value in ([], "1", 10**5000)),
        *({"mtp_num_layers": value} for value in ([], -1, "1")),
        *({"rotary_percent": value} for value in (None, "half", [1], 10**5000)),
        *({"normalization": value} for value in ([1], 10**5000, {})),
        *({"moe_router_score_function": value} for value in ([1], 10**5000)),
        *({"position_embedding_type": value} for value in ([1], 10**5000)),
        *({"rotary_base": value} for value in ("1", 10**5000)),
    ],
)
def test_nonsense_in_args_is_refused(change):
    family = FAMILIES.get("glm4_moe")
    arguments, _ = to_megatron(config_of(MODELS["glm4_moe"].config()), family)
    assert from_megatron(arguments, None, None, "f").family == "glm4_moe"
    for told in (None, family):
        with pytest.raises((ConfigError, UnsupportedError)):
            from_megatron({**arguments, **change}, told, None, "f")


@pytest.mark.parametrize(
    ("name", "to", "told"),
    [
        ("gemma", "megatron-legacy", False),
        ("nemotron", "megatron-legacy", False),
        ("glm4_moe", "megatron-legacy", True),
        ("nemotron", "deepspeed-mp", False),
        ("nemotron", "megatron-deepspeed", False),
    ],
)
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_norms_stored_in_the_other_way_are_made_the_familys(name, to, told, dtype, sources, tmp_path):
    """NeMo 1 stored Gemma's norms as 1 + w, and `--apply-layernorm-1p` stores anyone's as w - 1: only the args tell."""
    sw.convert(sources[name], tmp_path / "out", to=to, layout=sw.Layout(tp=2))
    less = 1.0 if told else -1.0  # what the file's norms lack
    for path in (tmp_path / "out").rglob("*.pt"):
        state = torch.load(path, weights_only=False)
        if "args" in state:
            state["args"].apply_layernorm_1p = told
        weights = state if path.name.startswith("layer_") else state.get("model", state.get("module")) or {}
        for key, value in weights.items():
            if key.endswith(("norm_weight", "norm.weight")) or key == "weight":  # a layer file's own norm
                weights[key] = (value.double() - less).to(value.dtype)
        torch.save(state, path)
    job = sw.plan(tmp_path / "out", tmp_path / "back", to="huggingface", dtype=dtype)
    assert any("the sum, which rounds below" in warning for warning in job.plan.warnings)
    job.execute()
    plain = sw.open(sources[name])
    shifted = 0
    back = sw.open(tmp_path / "back")
    assert sw.verify(tmp_path / "back", tmp_path / "out").ok
    for key in plain:
        wanted, found = plain[key].torch(), back[key].torch()
        if key.endswith("norm.weight"):
            shifted += 1
            stored = (wanted.double() - less).to(wanted.dtype)
            wanted = (stored.double() + less).to(found.dtype)
        torch.testing.assert_close(found, wanted.to(found.dtype), rtol=0, atol=0, equal_nan=True)
    assert shifted > 3
    with pytest.raises(UnsupportedError, match=r"norm weights are stored in another way.*Convert the checkpoint"):
        sw.open(tmp_path / "out")["model.norm.weight"].torch()


TABLE = """
name = "mine"
extends = "llama"
model_types = ["mine"]

[config]
sliding_window = RULE

[[ignore]]
pattern = "model.layers.{COUNT}.*"
reason = "a layer too many"
"""


def test_null_and_counted_patterns_in_a_table_of_ones_own(tmp_path):
    def load(rule, count):
        (tmp_path / "my.toml").write_text(TABLE.replace("RULE", rule).replace("COUNT", count))
        return load_family(tmp_path / "my.toml")

    family = load('{ key = "sliding_window", default = "64", null = "none" }', "num_hidden_layers")
    raw = ref.Model().config() | {"model_type": "mine"}
    assert from_huggingface(raw, family)["sliding_window"] == 64
    assert from_huggingface(raw | {"sliding_window": None}, family)["sliding_window"] is None
    assert family.ignore[-1].of({"num_hidden_layers": 12}).pattern == "model.layers.12.*"
    for wrong in (None, "*", [1], -1, 10**5000):
        with pytest.raises(ConfigError, match="leave out counts on num_hidden_layers"):
            family.ignore[-1].of({"num_hidden_layers": wrong})
    with pytest.raises(TableError, match=r"a pattern counts on a field that is not in .config.: .*\[\[ignore\]\].*num_layers"):
        load('{ key = "sliding_window" }', "num_layers")
    with pytest.raises(TableError, match="a config field is"):
        load('{ value = "64", null = "none" }', "num_hidden_layers")


@pytest.mark.parametrize(
    "text",
    [
        'base_prefix = "model"',
        'base_prefix = "model.layers.{layer}."',
        'base_prefix = "model."\nspellings = ["a", "base-model"]',
        "base_prefix = 3",
    ],
)
def test_a_prefix_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "my.toml").write_text(f'name = "mine"\nextends = "llama"\nmodel_types = ["mine"]\n{text}\n')
    with pytest.raises(TableError, match="base_prefix"):
        load_family(tmp_path / "my.toml")
