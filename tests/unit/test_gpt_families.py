"""gpt2, gpt_neox, opt, bloom, falcon: what is read, written and cut, against plain numpy (`gpt_reference`); refusals and configs."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import shardwright as sw
from shardwright.errors import ConfigError, LayoutError, ReplicaMismatchError, UnsupportedError
from shardwright.planner.config import family_of, from_huggingface, to_huggingface
from shardwright.planner.megatron_args import from_megatron, to_megatron
from shardwright.planner.tables import FAMILIES
from tests.unit import reference as ref
from tests.unit.gpt_reference import Gpt
from tests.unit.reference import Cut

BOTH = ("input_layernorm", "post_attention_layernorm")
MODELS = {
    "gpt2": Gpt("gpt2"),
    "gpt2-untied": Gpt("gpt2", ffn=48, tied=False),
    "gpt_neox": Gpt("gpt_neox", tied=False, config={"use_parallel_residual": False, "rotary_pct": 0.5}),
    "gpt_neox-parallel": Gpt("gpt_neox", tied=False, config={"rotary_pct": 0.25, "rotary_emb_base": 20000}),
    "opt": Gpt("opt", config={"activation_function": "gelu"}),
    "opt-unbiased": Gpt("opt", bias=False, config={"enable_bias": False, "activation_function": "gelu"}),
    "opt-350m": Gpt("opt", embed=16, final_norm=False, config={"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "opt-plain-norms": Gpt("opt", norms=(), final_norm=False, config={"layer_norm_elementwise_affine": False}),
    "bloom": Gpt("bloom", ffn=128),
    "falcon-7b": Gpt("falcon", kv=1, bias=False, norms=BOTH[:1], config={"multi_query": True, "num_kv_heads": 8}),
    "falcon-40b": Gpt("falcon", kv=2, bias=False, config={"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": Gpt(
        "falcon", kv=2, bias=False, tied=False, norms=BOTH[:1],
        config={"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-rw": Gpt("falcon", config={"multi_query": False, "parallel_attn": False, "bias": True, "alibi": True}),
    "falcon-serial": Gpt("falcon", bias=False, config={"multi_query": False, "parallel_attn": False}),
}  # fmt: skip
IN_MEGATRON = ("gpt2", "gpt2-untied", "gpt_neox", "opt", "opt-unbiased", "falcon-serial")


def made(name: str, tmp_path: Path) -> tuple[Gpt, ref.Arrays, Path]:
    model = MODELS[name]
    hub = model.hub()
    return model, hub, model.write(tmp_path / "source", model.stored(hub))


@pytest.mark.parametrize("name", MODELS)
def test_the_hub_is_the_model_unfused(name, tmp_path):
    _, hub, source = made(name, tmp_path)
    opened = sw.open(source)
    assert set(hub) <= set(opened.keys())
    for tensor, expected in hub.items():
        assert (ref.to_bits(opened[tensor].torch()) == expected).all(), tensor


@pytest.mark.parametrize("cut", [Cut(), Cut(2, 2), Cut(4, 1), Cut(1, 2, 2), Cut(2, 3, 1, (1, 2, 1))], ids=str)
@pytest.mark.parametrize("name", IN_MEGATRON)
def test_megatron(name, cut, tmp_path):
    model, hub, source = made(name, tmp_path)
    layout = sw.Layout(tp=cut.tp, pp=cut.pp, vpp=cut.vpp, stages=cut.stages)
    spec = "local" if cut.tp == 4 else "te"
    sw.convert(source, tmp_path / "there", to="megatron-legacy", layout=layout, spec=spec)
    assert ref.differences(model.megatron(hub, cut, spec), ref.read_megatron(tmp_path / "there", cut)) == []
    sw.convert(tmp_path / "there", tmp_path / "back", to="huggingface")
    assert ref.differences({0: model.stored(hub)}, {0: ref.read_huggingface(tmp_path / "back")}) == []
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 1), (4, 2), (8, 4)])
@pytest.mark.parametrize("name", MODELS)
def test_rank_files_and_back(name, tp, pp, tmp_path):
    model, hub, source = made(name, tmp_path)
    sw.convert(source, tmp_path / "ranks", to="ranks", layout=sw.Layout(tp=tp, pp=pp), pad_vocab_to=8)
    sw.convert(tmp_path / "ranks", tmp_path / "back", to="huggingface")
    assert ref.differences({0: model.stored(hub)}, {0: ref.read_huggingface(tmp_path / "back")}) == []


@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_of_a_conv1d_hold_whole_heads(tp, tmp_path):
    """Columns of c_attn: the rank's query heads, its key heads, its value heads; rows of c_proj: its heads."""
    _, hub, source = made("gpt2", tmp_path)
    for rank in range(tp):
        held = sw.open(source).state_dict(to="ranks", layout=sw.Layout(tp=tp), rank=rank, pad_vocab_to=8)
        at, own = "model.layers.2.", "transformer.h.2."
        for kind in ("weight", "bias"):
            shares = np.concatenate([ref.share(hub[f"{at}self_attn.{x}_proj.{kind}"], 0, tp, rank) for x in "qkv"])
            assert (ref.to_bits(held[f"{own}attn.c_attn.{kind}"]) == shares.T).all()
        assert (ref.to_bits(held[f"{own}attn.c_proj.weight"]) == ref.share(hub[f"{at}self_attn.o_proj.weight"], 1, tp, rank).T).all()
        assert (ref.to_bits(held[f"{own}mlp.c_fc.weight"]) == ref.share(hub[f"{at}mlp.up_proj.weight"], 0, tp, rank).T).all()
        assert (ref.to_bits(held[f"{own}mlp.c_proj.weight"]) == ref.share(hub[f"{at}mlp.down_proj.weight"], 1, tp, rank).T).all()


def test_heads_are_not_cut_in_two(tmp_path):
    """16 divides all of GPT-2's columns here, and not its 8 heads."""
    _, _, source = made("gpt2", tmp_path)
    with pytest.raises(LayoutError, match="tp 16 does not divide the attention heads"):
        sw.plan(source, to="ranks", layout=sw.Layout(tp=16), pad_vocab_to=16)


@pytest.mark.parametrize(
    ("name", "prefix"), [("gpt2", "transformer."), ("bloom", "transformer."), ("opt", "model."), ("opt-350m", "model.")]
)
def test_files_of_the_model_without_its_head(name, prefix, tmp_path):
    """They lack the prefix: told from the names, written on request."""
    model, hub, source = made(name, tmp_path)
    bare = {stored.removeprefix(prefix): array for stored, array in model.stored(hub).items()}
    opened = sw.open(model.write(tmp_path / "bare", bare))
    assert opened.source.spec == "base-model" and sw.open(source).source.spec == "causal-lm"
    sw.convert(opened, tmp_path / "full", to="huggingface", spec="causal-lm")
    assert ref.differences({0: model.stored(hub)}, {0: ref.read_huggingface(tmp_path / "full")}) == []
    sw.convert(source, tmp_path / "again", to="huggingface", spec="base-model")
    assert ref.differences({0: bare}, {0: ref.read_huggingface(tmp_path / "again")}) == []


def test_the_head_of_gpt_neox_under_its_name_in_memory(tmp_path):
    """transformers 5 calls it lm_head in memory and embed_out on disk."""
    model, hub, source = made("gpt_neox", tmp_path)
    dumped = {name.replace("embed_out", "lm_head"): array for name, array in model.stored(hub).items()}
    opened = sw.open(model.write(tmp_path / "dump", dumped))
    assert opened.source.spec == "lm-head" and sw.open(source).source.spec == "embed-out"
    sw.convert(opened, tmp_path / "disk", to="huggingface", spec="embed-out")
    assert ref.differences({0: model.stored(hub)}, {0: ref.read_huggingface(tmp_path / "disk")}) == []


@pytest.mark.parametrize(
    ("name", "buffers"),
    [
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.3.attn.masked_bias"]),
        ("gpt_neox", ["gpt_neox.layers.0.attention." + x for x in ("bias", "masked_bias", "rotary_emb.inv_freq")]),
    ],
)
def test_old_buffers_are_listed_as_dropped(name, buffers, tmp_path):
    model, hub, _ = made(name, tmp_path)
    source = model.write(tmp_path / "old", model.stored(hub) | {b: np.zeros(3, np.uint32) for b in buffers})
    plan = sw.plan(source, tmp_path / "new", to="huggingface").plan
    assert sorted(d.name for d in plan.dropped) == sorted(buffers)


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_a_tied_head_that_differs_is_refused(name, tmp_path):
    model, hub, _ = made(name, tmp_path)
    stored = model.stored(hub)
    table = hub["model.embed_tokens.weight"]
    equal = model.write(tmp_path / "equal", stored | {"lm_head.weight": table})
    sw.convert(equal, tmp_path / "out", to="huggingface")
    other = model.write(tmp_path / "other", stored | {"lm_head.weight": table + np.uint32(1)})
    with pytest.raises(ReplicaMismatchError, match="which the config ties"):
        sw.convert(other, tmp_path / "no", to="huggingface")


REFUSED = {
    "gpt_neox-parallel": "parallel_residual: Megatron-core has no parallel residual",
    "opt-350m": "not do_layer_norm_before: ",
    "opt-plain-norms": "norm_affine: Megatron-core's norms are there",
    "bloom": "family 'bloom': Megatron-core has neither ALiBi",
    "falcon-7b": "no parallel attention",
    "falcon-40b": "no parallel attention",
    "falcon-rw": "where alibi: Megatron-core has no ALiBi",
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_megatron_does_not_have(name, tmp_path):
    _, _, source = made(name, tmp_path)
    for to, options in (("megatron-legacy", {}), ("ranks", {"dialect": "megatron"})):
        with pytest.raises(UnsupportedError, match=REFUSED[name]):
            sw.plan(source, to=to, layout=sw.Layout(tp=2), **options)


@pytest.mark.parametrize("change", [{"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}])
def test_gpt2_that_scales_otherwise(change, tmp_path):
    model = Gpt("gpt2", config=change)
    source = model.write(tmp_path / "source", model.stored(model.hub()))
    with pytest.raises(UnsupportedError, match="scales attention by the head's size"):
        sw.plan(source, to="megatron-legacy")


def test_projected_embeddings_alone_are_refused(tmp_path):
    model = Gpt("opt", embed=16, config={"word_embed_proj_dim": 16})
    source = model.write(tmp_path / "source", model.stored(model.hub()))
    with pytest.raises(UnsupportedError, match="word_embed_proj_dim != hidden_size: Megatron-core does not project"):
        sw.plan(source, to="megatron-legacy")


# Configs


@pytest.mark.parametrize("name", MODELS)
def test_config_json_both_ways(name):
    raw = MODELS[name].raw()
    family = family_of(raw)
    config = from_huggingface(raw, family)
    assert (config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]) == (32, 4, 8)
    assert config["num_key_value_heads"] == MODELS[name].kv and config["intermediate_size"] == MODELS[name].ffn
    written = to_huggingface(config, family, "float32", None)
    assert from_huggingface(written, family) == config
    for key, value in raw.items():
        assert written[key] == value, key


def test_rotary_spellings_of_gpt_neox():
    raw = MODELS["gpt_neox-parallel"].raw()
    family = family_of(raw)
    new = {k: v for k, v in raw.items() if k not in ("rotary_pct", "rotary_emb_base")}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 20000, "partial_rotary_factor": 0.25}
    assert from_huggingface(new, family) == from_huggingface(raw, family)
    assert to_huggingface(from_huggingface(raw, family), family, "float32", None)["rope_parameters"] == new["rope_parameters"]
    with pytest.raises(ConfigError, match=r"rotary_pct and partial_rotary_factor disagree.*expected 0.5.*actual 0.25"):
        from_huggingface(new | {"rotary_pct": 0.5}, family)


def test_what_transformers_assumes():
    small = {"vocab_size": 131, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8}
    falcon = from_huggingface(small | {"model_type": "falcon"}, FAMILIES.get("falcon"))
    assert falcon["num_key_value_heads"] == 1 and falcon["parallel_residual"] and falcon["intermediate_size"] == 128
    assert falcon["num_ln_in_parallel_attn"] == 1 and falcon["tie_word_embeddings"] and not falcon["mlp_bias"]
    new = from_huggingface(small | {"new_decoder_architecture": True}, FAMILIES.get("falcon"))
    assert new["num_key_value_heads"] == 8 and new["num_ln_in_parallel_attn"] == 2
    bloom = from_huggingface({"vocab_size": 131, "n_embed": 32, "num_attention_heads": 8, "n_layer": 2}, FAMILIES.get("bloom"))
    assert bloom["hidden_size"] == 32 and bloom["intermediate_size"] == 128 and bloom["tie_word_embeddings"]
    gpt2 = from_huggingface({"vocab_size": 131, "n_embd": 32, "n_head": 8, "n_layer": 2, "n_inner": None}, FAMILIES.get("gpt2"))
    assert gpt2["intermediate_size"] == 128 and gpt2["hidden_act"] == "gelu_new" and gpt2["max_position_embeddings"] == 1024
    opt = from_huggingface(small | {"ffn_dim": 64}, FAMILIES.get("opt"))
    assert opt["hidden_act"] == "relu" and opt["word_embed_proj_dim"] == 32 and opt["qkv_bias"]


@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "gpt_neox"])
def test_megatron_args_both_ways(name):
    raw = MODELS[name].raw()
    config = from_huggingface(raw, family_of(raw))
    arguments, warnings = to_megatron(config, family_of(raw))
    assert warnings == []
    assert (arguments["normalization"], arguments["swiglu"], arguments["add_bias_linear"]) == ("LayerNorm", False, True)
    assert arguments["bias_gelu_fusion"] is (config["hidden_act"] == "gelu_new")
    assert from_megatron(arguments, None, None, "f") == config, "the family is told from them"
    assert from_megatron(arguments, family_of(raw), None, "f") == config


def test_positions_of_opt_in_megatron():
    """A row of the table for every position, and two behind them for padding."""
    raw = MODELS["opt"].raw()
    arguments, warnings = to_megatron(from_huggingface(raw, family_of(raw)), family_of(raw))
    assert (arguments["max_position_embeddings"], arguments["seq_length"], warnings) == (66, 64, [])


@pytest.mark.parametrize(("name", "act"), [("opt", "relu"), ("opt-unbiased", "gelu_new"), ("gpt2", "silu")])
def test_an_activation_that_args_cannot_say_is_a_warning(name, act):
    """GELU's tanh form too, where there is no bias to fuse it with."""
    raw = MODELS[name].raw() | {"activation_function": act}
    arguments, warnings = to_megatron(from_huggingface(raw, family_of(raw)), family_of(raw))
    assert len(warnings) == 1 and f"cannot express the activation {act!r}" in warnings[0]
    assert arguments["bias_gelu_fusion"] is False and arguments["swiglu"] is False


def test_args_are_no_evidence_of_a_relu():
    raw = MODELS["opt"].raw() | {"activation_function": "relu"}
    arguments, _ = to_megatron(from_huggingface(raw, family_of(raw)), family_of(raw))
    with pytest.raises(ConfigError, match=r"do not say which activation.*expected relu.*--config"):
        from_megatron(arguments, FAMILIES.get("opt"), None, "f")


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gpt2", {"position_embedding_type": "rope"}, "family 'gpt2' has no args.position_embedding_type = 'rope'"),
        ("gpt2", {"normalization": "RMSNorm"}, "args.normalization = 'RMSNorm'.*expected LayerNorm"),
        ("gpt2", {"swiglu": True}, "args.swiglu = True"),
        ("gpt_neox", {}, "args.position_embedding_type = 'learned_absolute'"),
        ("llama", {}, "args.normalization = 'LayerNorm'"),
    ],
)
def test_args_of_another_family(family, change, message):
    raw = MODELS["gpt2"].raw()
    arguments, _ = to_megatron(from_huggingface(raw, family_of(raw)), family_of(raw))
    with pytest.raises(UnsupportedError, match=message):
        from_megatron(arguments | {"rotary_base": 10000} | change, FAMILIES.get(family), None, "f")


def test_megatron_that_says_only_its_args(tmp_path):
    """Nothing of ours beside the rank files: gpt2 is told from the args, and every bit comes home."""
    model, hub, source = made("gpt2", tmp_path)
    sw.convert(source, tmp_path / "there", to="megatron-legacy", layout=sw.Layout(tp=2, pp=2))
    (tmp_path / "there" / "shardwright.json").unlink()
    shutil.rmtree(tmp_path / "there" / "hf")
    sw.convert(tmp_path / "there", tmp_path / "back", to="huggingface")
    assert ref.differences({0: model.stored(hub)}, {0: ref.read_huggingface(tmp_path / "back")}) == []
    found = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: found[key] for key in model.raw()} == model.raw()


_NESTED = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("self_attention.linear_qkv", "self_attention.query_key_value"),
    ("self_attention.linear_proj", "self_attention.dense"),
    ("mlp.linear_fc1.layer_norm_", "post_attention_layernorm."),
    ("mlp.linear_fc1", "mlp.dense_h_to_4h"),
    ("mlp.linear_fc2", "mlp.dense_4h_to_h"),
)


def _nested(held: ref.Arrays) -> dict:
    """The same tensors as Megatron-LM held them before Megatron-core."""
    tensors = {name: ref.to_torch(array, "float32") for name, array in held.items()}
    embedding = {x: {"weight": tensors.pop(f"embedding.{x}.weight")} for x in ("word_embeddings", "position_embeddings")}
    encoder = {}
    for name, tensor in tensors.items():
        for new, old in _NESTED:
            if new in name:
                name = name.replace(new, old)
                break
        encoder[name.removeprefix("decoder.")] = tensor
    return {"language_model": {"embedding": embedding, "encoder": encoder}}


def test_the_nested_names_of_older_megatron(tmp_path):
    model = MODELS["gpt2"]
    hub = model.hub()
    raw = model.raw()
    arguments, _ = to_megatron(from_huggingface(raw, family_of(raw)), family_of(raw))
    for (tp, _, _), held in model.megatron(hub, Cut(2)).items():
        folder = tmp_path / "old" / "iter_0000007" / f"mp_rank_{tp:02d}"
        folder.mkdir(parents=True)
        args = argparse.Namespace(**arguments, tensor_model_parallel_size=2, pipeline_model_parallel_size=1)
        torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 7, "model": _nested(held)}, folder / "model_optim_rng.pt")
    opened = sw.open(tmp_path / "old")
    assert (opened.family, opened.source.dialect.name) == ("gpt2", "megatron-nested")
    sw.convert(opened, tmp_path / "new", to="huggingface")
    assert ref.differences({0: model.stored(hub)}, {0: ref.read_huggingface(tmp_path / "new")}) == []


@pytest.mark.parametrize("version", [0, 1.0, None])
def test_nested_files_of_versions_below_two(version, tmp_path):
    """Megatron-LM's own nested files, QKV rows in the order of their checkpoint version; without one, of version 0."""
    from tests.unit import deepspeed_reference as ds

    model = MODELS["gpt2"]
    hub = model.hub()
    ranks = ds.mp_ranks(hub, model.kv, model.head_dim, 2, "transformer", int(version or 0))
    for tp, held in enumerate(ranks):
        folder = tmp_path / "old" / "iter_0000007" / f"mp_rank_{tp:02d}"
        folder.mkdir(parents=True)
        state = {"iteration": 7, "model": ds.nested(ds.tensors(held))}
        torch.save(state if version is None else state | {"checkpoint_version": version}, folder / "model_optim_rng.pt")
    (tmp_path / "config.json").write_text(json.dumps(model.raw()))
    opened = sw.open(tmp_path / "old", config=tmp_path / "config.json")
    assert (opened.format, opened.source.spec) == ("megatron-legacy", f"transformer-v{int(version or 0)}")
    sw.convert(opened, tmp_path / "new", to="huggingface")
    assert ref.differences({0: model.stored(hub)}, {0: ref.read_huggingface(tmp_path / "new")}) == []
