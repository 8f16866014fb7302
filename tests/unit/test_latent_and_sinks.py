"""DeepSeek-V2, DeepSeek-V3 and GPT-OSS against a plain numpy reference, and what each of them alone has.

The reference is written from the models' and Megatron-core's code, with functions of `reference`: names, which axis is cut,
and how GPT-OSS's files hold experts (``[E, in, out]``, columns gate, up, gate, up; a bias likewise).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import shardwright as sw
from shardwright.errors import ConfigError, UnsupportedError
from tests.unit import experts_reference as moe
from tests.unit import reference as ref
from tests.unit.experts_reference import ExpertCut, Ranks
from tests.unit.reference import Arrays, Model, share

_LAYER = "model.layers.{}."


@dataclass(frozen=True)
class Latent(Model):
    """A DeepSeek model: the first layer dense, experts in the others."""

    family: str = "deepseek_v3"
    layers: int = 4
    heads: int = 4
    hidden: int = 32
    ffn: int = 32
    vocab: int = 131
    rank_q: int | None = 32
    rank_kv: int = 24
    nope: int = 8
    rope: int = 4
    value: int = 8
    experts: int = 12
    expert_ffn: int = 32
    shared: int = 2

    def shapes(self) -> dict[str, tuple[int, ...]]:
        H, A = self.hidden, self.heads
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, H)}
        for layer in range(self.layers):
            at = _LAYER.format(layer)
            if self.rank_q is None:
                found[f"{at}self_attn.q_proj.weight"] = (A * (self.nope + self.rope), H)
            else:
                found[f"{at}self_attn.q_a_proj.weight"] = (self.rank_q, H)
                found[f"{at}self_attn.q_a_layernorm.weight"] = (self.rank_q,)
                found[f"{at}self_attn.q_b_proj.weight"] = (A * (self.nope + self.rope), self.rank_q)
            found[f"{at}self_attn.kv_a_proj_with_mqa.weight"] = (self.rank_kv + self.rope, H)
            found[f"{at}self_attn.kv_a_layernorm.weight"] = (self.rank_kv,)
            found[f"{at}self_attn.kv_b_proj.weight"] = (A * (self.nope + self.value), self.rank_kv)
            found[f"{at}self_attn.o_proj.weight"] = (H, A * self.value)
            mlps = {"mlp.": self.ffn}
            if layer:
                mlps = {f"mlp.experts.{e}.": self.expert_ffn for e in range(self.experts)} | {
                    "mlp.shared_experts.": self.shared * self.expert_ffn
                }
                found[f"{at}mlp.gate.weight"] = (self.experts, H)
                if self.family == "deepseek_v3":
                    found[f"{at}mlp.gate.e_score_correction_bias"] = (self.experts,)
            for mlp, rows in mlps.items():
                found[f"{at}{mlp}gate_proj.weight"] = found[f"{at}{mlp}up_proj.weight"] = (rows, H)
                found[f"{at}{mlp}down_proj.weight"] = (H, rows)
            found[f"{at}input_layernorm.weight"] = found[f"{at}post_attention_layernorm.weight"] = (H,)
        return found | {"model.norm.weight": (H,), "lm_head.weight": (self.vocab, H)}

    def config(self) -> dict[str, Any]:
        made = {
            "architectures": ["DeepseekV3ForCausalLM" if self.family == "deepseek_v3" else "DeepseekV2ForCausalLM"],
            "model_type": self.family, "hidden_size": self.hidden, "intermediate_size": self.ffn, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.heads, "vocab_size": self.vocab, "q_lora_rank": self.rank_q,
            "kv_lora_rank": self.rank_kv, "qk_nope_head_dim": self.nope, "qk_rope_head_dim": self.rope, "v_head_dim": self.value,
            "n_routed_experts": self.experts, "n_shared_experts": self.shared, "moe_intermediate_size": self.expert_ffn,
            "num_experts_per_tok": 4, "first_k_dense_replace": 1, "max_position_embeddings": 256, "torch_dtype": self.dtype,
            "hidden_act": "silu", "rms_norm_eps": 1e-6,
        }  # fmt: skip
        return made | ({"n_group": 4, "topk_group": 2} if self.family == "deepseek_v3" else {"topk_method": "greedy"})


@dataclass(frozen=True)
class Sinks(Model):
    """GPT-OSS."""

    family: str = "gpt_oss"
    layers: int = 4
    heads: int = 8
    kv: int = 4
    head_dim: int = 4
    hidden: int = 32
    ffn: int = 32
    experts: int = 12

    def shapes(self) -> dict[str, tuple[int, ...]]:
        H, E, F = self.hidden, self.experts, self.ffn
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, H)}
        for layer in range(self.layers):
            at = _LAYER.format(layer)
            for name, heads in (("q", self.heads), ("k", self.kv), ("v", self.kv)):
                found[f"{at}self_attn.{name}_proj.weight"] = (heads * self.head_dim, H)
                found[f"{at}self_attn.{name}_proj.bias"] = (heads * self.head_dim,)
            found[f"{at}self_attn.o_proj.weight"] = (H, self.heads * self.head_dim)
            found[f"{at}self_attn.o_proj.bias"] = (H,)
            found[f"{at}self_attn.sinks"] = (self.heads,)
            found[f"{at}mlp.router.weight"], found[f"{at}mlp.router.bias"] = (E, H), (E,)
            found[f"{at}mlp.experts.gate_up_proj"], found[f"{at}mlp.experts.gate_up_proj_bias"] = (E, H, 2 * F), (E, 2 * F)
            found[f"{at}mlp.experts.down_proj"], found[f"{at}mlp.experts.down_proj_bias"] = (E, F, H), (E, H)
            found[f"{at}input_layernorm.weight"] = found[f"{at}post_attention_layernorm.weight"] = (H,)
        return found | {"model.norm.weight": (H,), "lm_head.weight": (self.vocab, H)}

    def config(self) -> dict[str, Any]:
        kinds = ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(self.layers)]
        yarn = {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        }
        return {
            "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": self.hidden, "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "num_key_value_heads": self.kv, "head_dim": self.head_dim,
            "vocab_size": self.vocab, "num_local_experts": self.experts, "num_experts_per_tok": 4, "sliding_window": 128,
            "layer_types": kinds, "max_position_embeddings": 256, "rope_theta": 150000, "rope_scaling": yarn, "torch_dtype": self.dtype,
            "rms_norm_eps": 1e-5, "swiglu_limit": 7.0, "tie_word_embeddings": False, "attention_bias": True,
        }  # fmt: skip


MODELS: dict[str, Model] = {
    "deepseek_v3": Latent(),
    "deepseek_v2": Latent(family="deepseek_v2", rank_q=None),
    "gpt_oss": Sinks(),
}


def megatron(weights: Arrays, model: Any, cut: ExpertCut, spec: str) -> Ranks:
    """What each rank holds under Megatron-core's names."""
    ranks: Ranks = {(t, p, v, e): {} for t in range(cut.tp) for p in range(cut.pp) for v in range(cut.vpp) for e in range(cut.ep)}
    for (t, p, v, e), held in ranks.items():
        if (p, v) == (0, 0):
            held["embedding.word_embeddings.weight"] = share(ref.padded(weights["model.embed_tokens.weight"], cut.tp), 0, cut.tp, t)
        if (p, v) == (cut.pp - 1, cut.vpp - 1):
            held["decoder.final_layernorm.weight"] = weights["model.norm.weight"]
            held["output_layer.weight"] = share(ref.padded(weights["lm_head.weight"], cut.tp), 0, cut.tp, t)
        for layer, home in enumerate(cut.home(model.layers)):
            if home[:2] == (p, v):
                at = _LAYER.format(layer)
                own = {name.removeprefix(at): array for name, array in weights.items() if name.startswith(at)}
                put = (_latent if isinstance(model, Latent) else _sinks)(own, model, cut, t, spec, layer)
                mine = np.split(np.arange(model.experts), cut.ep)[e]
                put |= _experts(own, model, cut, t, mine, spec) if layer or isinstance(model, Sinks) else {}
                held |= {f"decoder.layers.{home[2]}.{name}": array for name, array in put.items()}
    return ranks


def _latent(w: Arrays, model: Latent, cut: ExpertCut, t: int, spec: str, layer: int) -> Arrays:
    def down(name: str) -> np.ndarray:
        """Transformer Engine's ranks hold all of it, the local spec's a share each."""
        return share(w[name], 0, cut.tp, t) if spec == "local" else w[name]

    at, rows = "self_attention.", lambda name: share(w[name], 0, cut.tp, t)
    held = {
        "input_layernorm.weight": w["input_layernorm.weight"],
        f"{at}linear_kv_down_proj.weight": down("self_attn.kv_a_proj_with_mqa.weight"),
        f"{at}linear_kv_up_proj.weight": rows("self_attn.kv_b_proj.weight"),
        f"{at}{'kv_layernorm.weight' if spec == 'local' else 'linear_kv_up_proj.layer_norm_weight'}": w["self_attn.kv_a_layernorm.weight"],
        f"{at}linear_proj.weight": share(w["self_attn.o_proj.weight"], 1, cut.tp, t),
    }
    if model.rank_q is None:
        held[f"{at}linear_q_proj.weight"] = rows("self_attn.q_proj.weight")
    else:
        held[f"{at}linear_q_down_proj.weight"] = down("self_attn.q_a_proj.weight")
        held[f"{at}linear_q_up_proj.weight"] = rows("self_attn.q_b_proj.weight")
        norm = "q_layernorm.weight" if spec == "local" else "linear_q_up_proj.layer_norm_weight"
        held[at + norm] = w["self_attn.q_a_layernorm.weight"]
    if layer == 0:
        norm = "pre_mlp_layernorm.weight" if spec == "local" else "mlp.linear_fc1.layer_norm_weight"
        return held | {norm: w["post_attention_layernorm.weight"]} | _mlp(w, "mlp.", "mlp.", cut.tp, t)
    return held | _mlp(w, "mlp.shared_experts.", "mlp.shared_experts.", cut.tp, t)


def _mlp(w: Arrays, source: str, target: str, tp: int, t: int) -> Arrays:
    gate, up, down = (w[f"{source}{name}_proj.weight"] for name in ("gate", "up", "down"))
    fc1 = np.concatenate([share(gate, 0, tp, t), share(up, 0, tp, t)])
    return {f"{target}linear_fc1.weight": fc1, f"{target}linear_fc2.weight": share(down, 1, tp, t)}


def _sinks(w: Arrays, model: Sinks, cut: ExpertCut, t: int, spec: str, layer: int) -> Arrays:
    norm = "input_layernorm.weight" if spec == "local" else "self_attention.linear_qkv.layer_norm_weight"
    held = {norm: w["input_layernorm.weight"], "self_attention.core_attention.softmax_offset": share(w["self_attn.sinks"], 0, cut.tp, t)}
    for kind in ("weight", "bias"):
        fused = ref.merged_qkv(*(w[f"self_attn.{x}_proj.{kind}"] for x in "qkv"), model.kv, model.head_dim)
        held[f"self_attention.linear_qkv.{kind}"] = share(fused, 0, cut.tp, t)
    held["self_attention.linear_proj.weight"] = share(w["self_attn.o_proj.weight"], 1, cut.tp, t)
    held["self_attention.linear_proj.bias"] = w["self_attn.o_proj.bias"]
    return held


def _experts(w: Arrays, model: Any, cut: ExpertCut, t: int, mine: np.ndarray, spec: str) -> Arrays:
    held = {"pre_mlp_layernorm.weight": w["post_attention_layernorm.weight"]}
    router = {"gate.weight": "weight", "gate.e_score_correction_bias": "expert_bias", "router.weight": "weight", "router.bias": "bias"}
    held |= {f"mlp.router.{after}": w[f"mlp.{before}"] for before, after in router.items() if f"mlp.{before}" in w}
    parts = cut.etp or cut.tp
    for inside, expert in enumerate(mine):
        if isinstance(model, Latent):
            put = _mlp(w, f"mlp.experts.{expert}.", "", parts, t % parts)
        else:
            both, bias = w["mlp.experts.gate_up_proj"][expert].T, w["mlp.experts.gate_up_proj_bias"][expert]
            put = {
                "linear_fc1.weight": np.concatenate([both[0::2], both[1::2]]),
                "linear_fc1.bias": np.concatenate([bias[0::2], bias[1::2]]),
                "linear_fc2.weight": w["mlp.experts.down_proj"][expert].T,
                "linear_fc2.bias": w["mlp.experts.down_proj_bias"][expert],
            }
        for name, array in put.items():
            held[f"mlp.experts.{name}{inside}" if spec == "te" else f"mlp.experts.local_experts.{inside}.{name}"] = array
    return held


def layout(cut: ExpertCut) -> sw.Layout:
    return sw.Layout(tp=cut.tp, pp=cut.pp, vpp=cut.vpp, ep=cut.ep, etp=cut.etp, stages=cut.stages)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("latent")
    return {name: ref.write(root / name, model, model.weights()) for name, model in MODELS.items()}


LEGACY = (
    ("deepseek_v3", ExpertCut(2, 1, 1, None, 2), "te"),
    ("deepseek_v3", ExpertCut(2, 2, 2, None, 3), "local"),
    ("deepseek_v3", ExpertCut(4, 1, 1, None, 12), "te-sequential"),
    ("deepseek_v2", ExpertCut(2, 3, 1, (2, 1, 1), 2), "te"),
    ("deepseek_v2", ExpertCut(4, 2, 2, (1, 0, 2, 1)), "local"),
    ("gpt_oss", ExpertCut(1, 2, 1, None, 3), "te"),
    ("gpt_oss", ExpertCut(1, 2, 2, None, 2), "te-sequential"),
    ("gpt_oss", ExpertCut(), "local"),
)


@pytest.mark.parametrize(("name", "cut", "spec"), LEGACY, ids=str)
def test_megatron_and_home(name, cut, spec, sources, tmp_path):
    model = MODELS[name]
    sw.convert(sources[name], tmp_path / "out", to="megatron-legacy", layout=layout(cut), spec=spec)
    assert ref.differences(megatron(model.weights(), model, cut, spec), moe.read_megatron(tmp_path / "out", cut)) == []
    assert sw.open(tmp_path / "out").source.spec == spec
    assert sw.verify(tmp_path / "out", sources[name]).ok
    sw.convert(tmp_path / "out", tmp_path / "home", to="huggingface")
    assert ref.differences({0: model.weights()}, {0: ref.read_huggingface(tmp_path / "home")}) == []
    assert json.loads((tmp_path / "home" / "config.json").read_text()) == model.config()


@pytest.mark.parametrize(("name", "spec"), [("gpt_oss", "te"), ("deepseek_v3", "local")])
def test_ranks_with_experts_of_their_own_tensor_size(name, spec, sources, tmp_path):
    cut, model = ExpertCut(4, 2, 1, None, 2, 1), MODELS[name]
    sw.convert(sources[name], tmp_path / "out", to="ranks", dialect="megatron", layout=layout(cut), spec=spec)
    assert ref.differences(megatron(model.weights(), model, cut, spec), moe.read_ranks(tmp_path / "out", cut, chunked=True)) == []


def test_hugging_face_ranks_of_gpt_oss(sources, tmp_path):
    """Under its own names: columns of the fused experts are cut as they lie, pairs of gate and up together."""
    sw.convert(sources["gpt_oss"], tmp_path / "out", to="ranks", layout=sw.Layout(tp=2, ep=3), pad_vocab_to=2)
    weights, found = MODELS["gpt_oss"].weights(), moe.read_ranks(tmp_path / "out", ExpertCut(2, 1, 1, None, 3))
    for (t, _, _, e), held in found.items():
        at, mine = "model.layers.1.mlp.experts.", slice(4 * e, 4 * e + 4)
        assert np.array_equal(held[f"{at}gate_up_proj"], share(weights[f"{at}gate_up_proj"][mine], 2, 2, t))
        assert np.array_equal(held[f"{at}gate_up_proj_bias"], share(weights[f"{at}gate_up_proj_bias"][mine], 1, 2, t))
        assert np.array_equal(held[f"{at}down_proj"], share(weights[f"{at}down_proj"][mine], 1, 2, t))
        assert np.array_equal(held[f"{at}down_proj_bias"], weights[f"{at}down_proj_bias"][mine])
        assert np.array_equal(held["model.layers.1.self_attn.sinks"], share(weights["model.layers.1.self_attn.sinks"], 0, 2, t))
    sw.convert(tmp_path / "out", tmp_path / "home", to="huggingface")
    assert ref.differences({0: weights}, {0: ref.read_huggingface(tmp_path / "home")}) == []


@pytest.mark.parametrize("name", MODELS)
def test_megatron_that_says_only_its_args(name, sources, tmp_path):
    sw.convert(sources[name], tmp_path / "out", to="megatron-legacy", layout=sw.Layout(ep=3))
    (tmp_path / "out" / "shardwright.json").unlink()
    (tmp_path / "out" / "hf" / "config.json").unlink()
    opened, before = sw.open(tmp_path / "out"), dict(sw.open(sources[name]).config.fields)
    assert opened.family == name
    assert dict(opened.config.fields) == before


def test_the_experts_bias_stays_float32(sources, tmp_path):
    sw.convert(sources["deepseek_v3"], tmp_path / "out", to="megatron-legacy", dtype="bfloat16")
    held = torch.load(tmp_path / "out" / "release" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)["model"]
    kept = {name for name, tensor in held.items() if tensor.dtype != torch.bfloat16}
    assert kept == {f"decoder.layers.{layer}.mlp.router.expert_bias" for layer in (1, 2, 3)}
    sw.synth(sources["deepseek_v3"], tmp_path / "made", dtype="bfloat16")
    opened = sw.open(tmp_path / "made")
    assert opened.stored["model.layers.2.mlp.gate.e_score_correction_bias"].dtype == "float32"
    assert opened.stored["model.layers.2.mlp.gate.weight"].dtype == "bfloat16"


def test_the_layer_that_predicts_further_tokens_is_listed(sources, tmp_path):
    model = Latent()
    weights = model.weights() | {f"model.layers.4.{name}": np.zeros(32, np.uint32) for name in ("enorm.weight", "shared_head.head.weight")}
    source = ref.write(tmp_path / "source", model, weights)
    plan = sw.plan(source, to="megatron-legacy").plan
    assert {(d.name, "predicts a further token" in d.reason) for d in plan.dropped} == {
        (name, True) for name in weights.keys() - model.weights().keys()
    }
    beyond = ref.write(tmp_path / "beyond", model, model.weights() | {"model.layers.5.enorm.weight": np.zeros(32, np.uint32)})
    with pytest.raises(sw.errors.UnknownTensorError, match=r"model.layers.5.enorm"):
        sw.plan(beyond, to="ranks")


def _mxfp4(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    model = Sinks(hidden=64, ffn=64, head_dim=8)
    tensors = {name: ref.to_torch(array, "float32") for name, array in model.weights().items()}
    random = torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        for part, shape in (("blocks", (experts, outputs, inputs // 32, 16)), ("scales", (experts, outputs, inputs // 32))):
            tensors[f"{name}_{part}"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config() | {"quantization_config": {"quant_method": "mxfp4"}}))
    return folder, tensors


def test_mxfp4_goes_from_file_to_file_as_it_is(tmp_path):
    source, tensors = _mxfp4(tmp_path / "source")
    sw.convert(source, tmp_path / "out", to="ranks", layout=sw.Layout(tp=2, ep=3), pad_vocab_to=2)
    for t, e in ((0, 0), (1, 2)):
        held = load_file(tmp_path / "out" / f"rank_{t + 2 * e:05d}_tp{t}_pp0_ep{e}.safetensors")
        for name, axis in (("gate_up_proj_blocks", 1), ("gate_up_proj_scales", 1), ("down_proj_blocks", 2), ("down_proj_scales", 2)):
            whole = tensors[f"model.layers.3.mlp.experts.{name}"][4 * e : 4 * e + 4]
            assert torch.equal(held[f"model.layers.3.mlp.experts.{name}"], whole.chunk(2, axis)[t]), name
    sw.convert(tmp_path / "out", tmp_path / "home", to="huggingface")
    home = load_file(tmp_path / "home" / "model.safetensors")
    assert home.keys() == tensors.keys()
    assert all(torch.equal(home[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in tensors.items())
    assert (tmp_path / "home" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    with pytest.raises(UnsupportedError, match="no MXFP4"):
        sw.plan(source, to="megatron-legacy")


@pytest.mark.parametrize(
    ("name", "change", "options", "message"),
    [
        ("deepseek_v3", {"rope_interleave": False}, {}, "rotates neighbouring pairs.*rope_interleave false"),
        ("deepseek_v3", {"norm_topk_prob": False}, {}, "normalises sigmoid scores"),
        ("deepseek_v2", {"norm_topk_prob": True, "routed_scaling_factor": 2.0}, {}, "never scales softmax scores"),
        ("gpt_oss", {"swiglu_alpha": 1.5}, {}, "fixed gain.*1.702.*1.5"),
        ("gpt_oss", {}, {"layout": sw.Layout(tp=2)}, "expert tensor parallel size of 1"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, {}, "no scheme here reads.*fp8.*plain weights"),
    ],
)  # fmt: skip
def test_what_megatron_cannot_say_is_refused(name, change, options, message, sources):
    with pytest.raises(UnsupportedError, match=message):
        sw.plan(sw.open(sources[name], config=MODELS[name].config() | change), to="megatron-legacy", **options)


def test_what_megatron_says_otherwise_is_a_warning(sources):
    for change, message in (
        ({"rms_norm_eps": 1e-5}, "epsilon"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "cannot express this RoPE"),
        ({"n_group": 12, "topk_group": 4}, "best 1, transformers by its best 2"),
    ):
        found = sw.plan(sw.open(sources["deepseek_v3"], config=MODELS["deepseek_v3"].config() | change), to="megatron-legacy").plan.warnings
        assert any(message in line for line in found) and len(found) == 2, found
    assert len(sw.plan(sources["deepseek_v3"], to="megatron-legacy").plan.warnings) == 1  # the padded vocabulary


def test_an_absent_rank_is_not_a_null_one(sources):
    config = MODELS["deepseek_v2"].config()
    assert sw.open(sources["deepseek_v2"]).config["q_lora_rank"] is None
    del config["q_lora_rank"]
    assert sw.open(sources["deepseek_v2"], config=config).config["q_lora_rank"] == 1536
    with pytest.raises(ConfigError, match="kv_lora_rank must be a positive integer"):
        sw.open(sources["deepseek_v2"], config=config | {"kv_lora_rank": 0})
