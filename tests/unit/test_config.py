"""The canonical config: from and to config.json for each family, from and to Megatron's args, and what is refused."""

from __future__ import annotations

import pytest

from shardwright.errors import ConfigError, UnknownFamilyError, UnsupportedError
from shardwright.planner.config import (
    ModelConfig,
    family_of,
    from_huggingface,
    infer_family,
    to_huggingface,
)
from shardwright.planner.megatron_args import from_megatron, to_megatron
from shardwright.planner.tables import FAMILIES, load_family

BASE = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 12,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 131,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LINEAR = {"rope_type": "linear", "factor": 4.0}

QWEN_EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32, "decoder_sparse_step": 1, "norm_topk_prob": False}

CONFIGS = {
    "llama": BASE | {"model_type": "llama"},
    "llama-biased": BASE | {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama-3": BASE | {"model_type": "llama", "rope_scaling": LLAMA3, "head_dim": 8},
    "mistral": BASE | {"model_type": "mistral", "sliding_window": 64, "head_dim": 6},
    "mistral-open": BASE | {"model_type": "mistral", "sliding_window": None},
    "qwen2": BASE | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": BASE | {"model_type": "qwen3", "head_dim": 4},
    "mixtral": BASE | {"model_type": "mixtral", "num_local_experts": 16, "num_experts_per_tok": 3, "head_dim": 6, "sliding_window": None},
    "qwen2_moe": BASE | QWEN_EXPERTS | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 64, "mlp_only_layers": [0, 3]},
    "qwen3_moe": BASE | QWEN_EXPERTS | {"model_type": "qwen3_moe", "head_dim": 4, "norm_topk_prob": True},
}


def arguments_of(config: ModelConfig) -> tuple[dict, list[str]]:
    return to_megatron(config, FAMILIES.get(config.family))


def canonical(raw: dict) -> ModelConfig:
    return from_huggingface(raw, family_of(raw))


def older(raw: dict) -> dict:
    return raw


def newer(raw: dict) -> dict:
    """The same config as transformers 5 spells RoPE."""
    made = {k: v for k, v in raw.items() if k not in ("rope_theta", "rope_scaling")}
    return made | {"rope_parameters": {"rope_theta": raw["rope_theta"], **(raw.get("rope_scaling") or {"rope_type": "default"})}}


def both(raw: dict) -> dict:
    return newer(raw) | {"rope_theta": raw["rope_theta"], "rope_scaling": raw.get("rope_scaling")}


@pytest.mark.parametrize("spelling", [older, newer, both])
@pytest.mark.parametrize("name", CONFIGS)
def test_config_json_both_ways(name, spelling):
    raw = spelling(CONFIGS[name])
    family = family_of(raw)
    config = from_huggingface(raw, family)
    assert config.family == family.name == name.split("-")[0]
    assert config["rope_theta"] == 500000.0 and config["rope_scaling"] == CONFIGS[name].get("rope_scaling")
    assert config["num_key_value_heads"] == 8 and config["vocab_size"] == 131
    written = to_huggingface(config, family, "bfloat16", None)
    assert from_huggingface(written, family) == config
    assert written["model_type"] == raw["model_type"] and written["architectures"] == [family.architecture]
    assert written["rope_theta"] == 500000.0 == written["rope_parameters"]["rope_theta"]
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", CONFIGS)
def test_the_original_is_kept_but_for_what_changed(name):
    raw = CONFIGS[name] | {"bos_token_id": 1, "quantization_config": {"quant_method": "x"}}
    family = family_of(raw)
    config = from_huggingface(raw, family)
    plain = {k: v for k, v in raw.items() if k != "quantization_config"}
    assert to_huggingface(config, family, "bfloat16", raw) == plain
    assert to_huggingface(config, family, "float32", raw) == plain | {"torch_dtype": "float32"}
    grown = ModelConfig(config.family, {**config.fields, "vocab_size": 256})
    assert to_huggingface(grown, family, "bfloat16", raw) == plain | {"vocab_size": 256}
    renamed = {k: v for k, v in plain.items() if k != "torch_dtype"} | {"dtype": "bfloat16"}
    assert to_huggingface(config, family, "float16", renamed) == renamed | {"dtype": "float16"}
    another = to_huggingface(config, family, "bfloat16", {"model_type": "gpt2", "n_embd": 3})
    assert another["model_type"] == raw["model_type"] and "n_embd" not in another


def test_defaults_are_transformers_own():
    raw = {k: BASE[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")}
    config = canonical(raw | {"model_type": "llama"})
    assert config["num_key_value_heads"] == 24 and config["head_dim"] == 4 and config["rope_theta"] == 10000.0
    assert config["rms_norm_eps"] == 1e-6 and config["tie_word_embeddings"] is False and config["qkv_bias"] is False
    assert canonical(raw | {"model_type": "qwen3", "num_key_value_heads": 8})["head_dim"] == 128
    assert canonical(raw | {"model_type": "llama", "head_dim": None, "num_key_value_heads": None}) == config
    assert canonical(raw | {"model_type": "qwen2", "num_key_value_heads": 8})["qkv_bias"] is True


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3"])
def test_a_key_without_a_default_is_needed(name):
    raw = {k: v for k, v in CONFIGS[name].items() if k != "num_key_value_heads"}
    with pytest.raises(ConfigError, match=r"lacks 'num_key_value_heads': file config\.json"):
        canonical(raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"hidden_size": "96"}, "hidden_size must be a positive integer.*'96'"),
        ({"vocab_size": 131.0}, "vocab_size must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer"),
        ({"num_attention_heads": True}, "num_attention_heads must be a positive integer"),
        ({"head_dim": -4}, "head_dim must be a positive integer"),
        ({"num_key_value_heads": 7}, "key/value heads do not divide the attention heads.*a divisor of 24.*7"),
        ({"num_attention_heads": 200, "num_key_value_heads": 200}, "head_dim must be a positive integer"),
        ({"num_attention_heads": "24"}, "cannot be computed|must be a positive integer"),
        ({"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}, "rope_parameters and rope_theta disagree.*10000.*500000"),
        ({"rope_parameters": {"rope_theta": 500000.0, **LLAMA3}, "rope_scaling": LINEAR}, "rope_parameters and rope_scaling disagree"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rope_scaling": LINEAR}, "rope_scaling disagree"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, "factor of rope_scaling must be a number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"attention_bias": 3}, "attention_bias|qkv_bias"),
        ({"rope_theta": "large"}, "rope_theta"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings"),
    ],
)
def test_contradictions_and_nonsense_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        canonical(CONFIGS["llama"] | change)


def test_two_spellings_of_one_scaling_agree():
    raw = CONFIGS["llama"] | {"rope_scaling": {"type": "linear", "factor": 4.0}}
    assert canonical(raw)["rope_scaling"] == LINEAR
    assert canonical(raw | {"rope_parameters": {"rope_theta": 500000.0, **LINEAR}})["rope_scaling"] == LINEAR
    assert canonical(CONFIGS["llama"] | {"rope_scaling": {"rope_type": "default"}})["rope_scaling"] is None


def test_unknown_families_are_told_the_nearest():
    with pytest.raises(UnknownFamilyError, match=r"'lama'.*Nearest: llama"):
        family_of({"model_type": "lama"})
    for nothing in ({}, {"model_type": None}, {"model_type": ["llama"]}):
        with pytest.raises(ConfigError, match=r"no model_type.*--family"):
            family_of(nothing)
    with pytest.raises(ConfigError, match=r"no field 'experts'.*Known: hidden_size"):
        canonical(CONFIGS["llama"])["experts"]


def test_one_key_for_two_settings(tmp_path):
    """llama's ``attention_bias`` says both biases: a model that has one of them cannot be written as llama."""
    qwen = canonical(CONFIGS["qwen2"])
    as_llama = ModelConfig("llama", qwen.fields)
    with pytest.raises(UnsupportedError, match="one key 'attention_bias' for two settings that differ"):
        to_huggingface(as_llama, FAMILIES.get("llama"), "bfloat16", None)
    biased = ModelConfig("mistral", {**canonical(CONFIGS["mistral"]).fields, "mlp_bias": True})
    with pytest.raises(UnsupportedError, match=r"family 'mistral' fixes mlp_bias.*expected False.*--family"):
        to_huggingface(biased, FAMILIES.get("mistral"), "bfloat16", None)
    own = tmp_path / "own.toml"
    own.write_text('name = "own"\nextends = "qwen2"\nmodel_types = ["own"]\n')
    family = load_family(own)
    assert to_huggingface(ModelConfig("own", qwen.fields), family, "float32", None)["model_type"] == "own"


@pytest.mark.parametrize("name", CONFIGS)
def test_megatron_args_both_ways(name):
    config = canonical(CONFIGS[name])
    arguments, warnings = arguments_of(config)
    assert warnings == []
    assert arguments["num_query_groups"] == 8 and arguments["group_query_attention"] is True
    assert arguments["untie_embeddings_and_output_weights"] is not config["tie_word_embeddings"]
    back = from_megatron(arguments, FAMILIES.get(config.family), None, "model_optim_rng.pt")
    assert back == config
    assert all(type(back[k]) is type(config[k]) for k in config.fields)


@pytest.mark.parametrize("name", ["llama", "llama-3", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_the_family_is_told_from_the_args(name):
    config = canonical(CONFIGS[name])
    assert from_megatron(arguments_of(config)[0], None, None, "f") == config


def test_args_that_fit_no_family():
    config = canonical(CONFIGS["llama-biased"])
    with pytest.raises(ConfigError, match=r"cannot be told from the args.*--family"):
        from_megatron(arguments_of(config)[0], None, None, "f")
    with pytest.raises(ConfigError, match="cannot be told"):
        infer_family({"qkv_bias": True, "attention_out_bias": True, "qk_norm": False}, "f")


def test_args_by_hand():
    arguments, _ = arguments_of(canonical(CONFIGS["llama-3"]))
    assert arguments["use_rope_scaling"] is True and arguments["rope_scaling_factor"] == 8.0 and arguments["kv_channels"] == 8
    arguments, _ = arguments_of(canonical(CONFIGS["mistral"]))
    assert arguments["window_size"] == (63, 0) and arguments["add_bias_linear"] is False and arguments["add_qkv_bias"] is False
    arguments, _ = arguments_of(canonical(CONFIGS["qwen2"]))
    assert arguments["add_qkv_bias"] is True and arguments["add_bias_linear"] is False
    arguments, _ = arguments_of(canonical(CONFIGS["llama-biased"]))
    assert arguments["add_bias_linear"] is True
    arguments, _ = arguments_of(canonical(CONFIGS["llama"] | {"rope_scaling": LINEAR}))
    assert arguments["rotary_seq_len_interpolation_factor"] == 4
    mha, _ = arguments_of(canonical(CONFIGS["llama"] | {"num_key_value_heads": 24}))
    assert mha["group_query_attention"] is False
    assert from_megatron(mha | {"num_query_groups": None}, None, None, "f")["num_key_value_heads"] == 24
    assert from_megatron(mha | {"num_query_groups": 1}, None, None, "f")["num_key_value_heads"] == 24, "Megatron's default without GQA is 1"


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"attention_bias": True, "mlp_bias": False},
        {"attention_bias": False, "mlp_bias": True},
    ],
)
def test_what_megatron_cannot_build_is_refused(change):
    with pytest.raises(UnsupportedError, match=r"SwiGLU|add_bias_linear"):
        arguments_of(canonical(CONFIGS["llama"] | change))


@pytest.mark.parametrize(
    "scaling", [{"rope_type": "yarn", "factor": 4.0}, {"rope_type": "linear", "factor": 2.5}, {**LLAMA3, "high_freq_factor": 2.0}]
)
def test_a_scaling_that_args_cannot_say_is_a_warning(scaling):
    arguments, warnings = arguments_of(canonical(CONFIGS["llama"] | {"rope_scaling": scaling}))
    assert len(warnings) == 1 and "cannot express" in warnings[0] and str(scaling["factor"]) in warnings[0]
    assert arguments["use_rope_scaling"] is False


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"normalization": "LayerNorm"}, UnsupportedError, "args.normalization = 'LayerNorm'.*expected RMSNorm"),
        ({"position_embedding_type": "learned_absolute"}, UnsupportedError, "position_embedding_type"),
        ({"swiglu": False}, UnsupportedError, "args.swiglu = False"),
        ({"rotary_percent": 0.5}, UnsupportedError, "args.rotary_percent = 0.5"),
        ({"rotary_interleaved": True}, UnsupportedError, "rotary_interleaved"),
        ({"num_experts": 8}, UnsupportedError, "num_experts"),
        ({"num_layers": None}, ConfigError, "args lack 'num_layers'.*--config"),
        ({"norm_epsilon": None}, ConfigError, "args lack 'norm_epsilon'"),
        ({"vocab_size": None}, ConfigError, "true vocabulary size is not in the checkpoint's args.*--vocab-size"),
        ({"num_query_groups": 7}, ConfigError, "do not divide"),
        ({"num_attention_heads": "24"}, ConfigError, "num_attention_heads"),
        ({"hidden_size": 96.5}, ConfigError, "hidden_size"),
        ({"rotary_base": "x"}, ConfigError, "rotary_base must be a number"),
        ({"window_size": 3}, ConfigError, "window_size"),
        ({"kv_channels": "8"}, ConfigError, "head_dim|kv_channels"),
    ],
)
def test_args_that_no_family_describes_are_refused(change, error, message):
    arguments, _ = arguments_of(canonical(CONFIGS["llama"]))
    with pytest.raises(error, match=message):
        from_megatron(arguments | change, FAMILIES.get("llama"), None, "release/mp_rank_00/model_optim_rng.pt")


@pytest.mark.parametrize(("size", "window"), [(None, None), ((63, 0), 64), ([63, 0], 64), ((-1, -1), None), ((-1, 0), None)])
def test_windows_of_attention(size, window):
    arguments, _ = arguments_of(canonical(CONFIGS["mistral"]))
    assert from_megatron(arguments | {"window_size": size}, FAMILIES.get("mistral"), None, "f")["sliding_window"] == window


def test_the_users_vocabulary_size_counts():
    arguments, _ = arguments_of(canonical(CONFIGS["llama"]))
    assert from_megatron(arguments | {"vocab_size": None}, None, 131, "f")["vocab_size"] == 131
    assert from_megatron(arguments, None, 100, "f")["vocab_size"] == 100
