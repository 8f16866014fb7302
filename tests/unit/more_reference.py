"""Gemma, Phi-3, OLMoE, Nemotron and GLM-4.5 in plain numpy: what `reference` and `experts_reference` are for llama and its like.

The rules, each from the model's own code:

* Gemma: llama's tensors, tied. Its norms are stored as w for 1 + w in both worlds, so they are copied;
* Gemma 2 and 3: ``pre_feedforward_layernorm`` is what llama calls ``post_attention_layernorm``; the norms after attention and MLP
  lie in Megatron-Bridge's row-parallel layers, as ``linear_proj.post_layernorm`` and ``linear_fc2.post_layernorm``;
* Phi-3: ``qkv_proj`` is all query rows, then all key rows, then all value rows; ``gate_up_proj`` gate, then up;
* OLMoE: the norms over queries and keys are as wide as those, and every rank has them whole;
* Nemotron: fc1 is a share of ``up_proj`` alone; every norm has a bias;
* GLM-4.5: the first layers are dense; shared experts are cut as a dense MLP; ``e_score_correction_bias`` is the router's
  ``expert_bias``, and everybody has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tests.unit import experts_reference as moe
from tests.unit import reference as ref
from tests.unit.experts_reference import ExpertCut, Experts
from tests.unit.reference import Arrays, Model, share

Shapes = dict[str, tuple[int, ...]]
_SMALL: dict[str, Any] = {"layers": 4, "heads": 8, "kv": 4, "hidden": 32, "head_dim": 4, "ffn": 32}


def _config(model: Model, family: str, architecture: str, **more: Any) -> dict[str, Any]:
    """A config.json: llama's keys, and what is different."""
    made = ref.Model.config(replace(model, family="llama")) | {"model_type": family, "architectures": [architecture], **more}
    return {key: value for key, value in made.items() if value is not ...}


def _norms(model: Model, kinds: Mapping[str, int]) -> Shapes:
    return {f"model.layers.{i}.{name}": (rows,) for i in range(model.layers) for name, rows in kinds.items()}


@dataclass(frozen=True)
class Dense(Model):
    """One of these families; `plain` and `held` say what it is to Megatron."""

    def plain(self, weights: Arrays) -> Arrays:
        """The tensors that llama has too, under llama's names."""
        return weights

    def held(self, w: Arrays, spec: str, tp: int, t: int) -> Arrays:
        """What a rank holds of a layer beyond llama's tensors; `w` are the layer's own."""
        return {}


class Gemma(Dense):
    """Gemma."""

    def config(self) -> dict[str, Any]:
        return _config(self, "gemma", "GemmaForCausalLM", hidden_act="gelu_pytorch_tanh", mlp_bias=...)


class Gemma2(Dense):
    """Gemma 2."""

    def shapes(self) -> Shapes:
        return Model.shapes(self) | _norms(
            self, dict.fromkeys(("pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"), self.hidden)
        )

    def config(self) -> dict[str, Any]:
        more = {"query_pre_attn_scalar": 24, "sliding_window": 16, "final_logit_softcapping": None, "attn_logit_softcapping": 40.0}
        activation = {"hidden_act": ..., "hidden_activation": "gelu_pytorch_tanh", "mlp_bias": ...}
        return _config(self, "gemma2", "Gemma2ForCausalLM", **activation, **more)

    def plain(self, weights: Arrays) -> Arrays:
        kept = {n: a for n, a in weights.items() if "post_attention" not in n and "post_feedforward" not in n}
        return {n.replace("pre_feedforward_layernorm", "post_attention_layernorm"): a for n, a in kept.items()}

    def held(self, w: Arrays, spec: str, tp: int, t: int) -> Arrays:
        return {
            "self_attention.linear_proj.post_layernorm.weight": w["post_attention_layernorm.weight"],
            "mlp.linear_fc2.post_layernorm.weight": w["post_feedforward_layernorm.weight"],
        }


class Gemma3(Gemma2):
    """Gemma 3, the text model."""

    def config(self) -> dict[str, Any]:
        more = {
            "model_type": "gemma3_text",
            "architectures": ["Gemma3ForCausalLM"],
            "sliding_window_pattern": 3,
            "rope_local_base_freq": 5000.0,
        }
        return Gemma2.config(self) | more


class Phi3(Dense):
    """Phi-3."""

    def shapes(self) -> Shapes:
        found = {n: s for n, s in Model.shapes(self).items() if not any(f".{x}_proj." in n for x in ("q", "k", "v", "gate", "up"))}
        for i in range(self.layers):
            found[f"model.layers.{i}.self_attn.qkv_proj.weight"] = ((self.heads + 2 * self.kv) * self.head_dim, self.hidden)
            found[f"model.layers.{i}.mlp.gate_up_proj.weight"] = (2 * self.ffn, self.hidden)
        return found

    def config(self) -> dict[str, Any]:
        more = {"original_max_position_embeddings": 256, "sliding_window": 64, "partial_rotary_factor": 0.5}
        return _config(self, "phi3", "Phi3ForCausalLM", attention_bias=..., mlp_bias=..., **more)

    def plain(self, weights: Arrays) -> Arrays:
        found = {n: a for n, a in weights.items() if "qkv_proj" not in n and "gate_up_proj" not in n}
        for i in range(self.layers):
            at, queries = f"model.layers.{i}.", self.heads * self.head_dim
            fused, pair = weights[f"{at}self_attn.qkv_proj.weight"], weights[f"{at}mlp.gate_up_proj.weight"]
            for name, rows in zip("qkv", np.split(fused, [queries, queries + self.kv * self.head_dim]), strict=True):
                found[f"{at}self_attn.{name}_proj.weight"] = rows
            found[f"{at}mlp.gate_proj.weight"], found[f"{at}mlp.up_proj.weight"] = pair[: self.ffn], pair[self.ffn :]
        return found


class Nemotron(Dense):
    """Nemotron."""

    def shapes(self) -> Shapes:
        found = {name: shape for name, shape in Model.shapes(self).items() if "gate_proj" not in name}
        found |= _norms(self, dict.fromkeys(("input_layernorm.bias", "post_attention_layernorm.bias"), self.hidden))
        return found | {"model.norm.bias": (self.hidden,)}

    def config(self) -> dict[str, Any]:
        more = {"hidden_act": "relu2", "partial_rotary_factor": 0.5, "norm_eps": 1e-5, "rms_norm_eps": ...}
        return _config(self, "nemotron", "NemotronForCausalLM", **more)

    def held(self, w: Arrays, spec: str, tp: int, t: int) -> Arrays:
        before = {"te": "self_attention.linear_qkv.layer_norm_", "local": "input_layernorm."}[spec]
        between = {"te": "mlp.linear_fc1.layer_norm_", "local": "pre_mlp_layernorm."}[spec]
        return {
            f"{before}bias": w["input_layernorm.bias"],
            f"{between}weight": w["post_attention_layernorm.weight"],
            f"{between}bias": w["post_attention_layernorm.bias"],
            "mlp.linear_fc1.weight": share(w["mlp.up_proj.weight"], 0, tp, t),
            "mlp.linear_fc2.weight": share(w["mlp.down_proj.weight"], 1, tp, t),
        }


class Olmoe(Experts, Dense):
    """OLMoE."""

    def shapes(self) -> Shapes:
        wide = {"self_attn.q_norm.weight": self.heads * self.head_dim, "self_attn.k_norm.weight": self.kv * self.head_dim}
        return Experts.shapes(self) | _norms(self, wide)

    def config(self) -> dict[str, Any]:
        more = {"num_experts": self.experts, "num_experts_per_tok": 3, "intermediate_size": self.expert_ffn, "norm_topk_prob": False}
        return _config(self, "olmoe", "OlmoeForCausalLM", mlp_bias=..., **more)


class Glm4Moe(Experts, Dense):
    """GLM-4.5 with experts: dense layers first, two shared experts."""

    def shapes(self) -> Shapes:
        found = Experts.shapes(self)
        for i in self.sparse():
            at = f"model.layers.{i}.mlp."
            found[f"{at}gate.e_score_correction_bias"] = (self.experts,)
            found[f"{at}shared_experts.gate_proj.weight"] = found[f"{at}shared_experts.up_proj.weight"] = (2 * self.expert_ffn, self.hidden)
            found[f"{at}shared_experts.down_proj.weight"] = (self.hidden, 2 * self.expert_ffn)
        return found

    def config(self) -> dict[str, Any]:
        sizes = {
            "n_routed_experts": self.experts,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": self.expert_ffn,
            "n_shared_experts": 2,
        }
        rules = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "first_k_dense_replace": len(self.dense), "use_qk_norm": True}
        others = {"partial_rotary_factor": 0.5, "num_nextn_predict_layers": 0, "mlp_bias": ...}
        return _config(self, "glm4_moe", "Glm4MoeForCausalLM", attention_bias=self.qkv_bias, **sizes, **rules, **others)

    def held(self, w: Arrays, spec: str, tp: int, t: int) -> Arrays:
        if "mlp.gate.weight" not in w:
            return {}
        gate, up, down = (w[f"mlp.shared_experts.{x}_proj.weight"] for x in ("gate", "up", "down"))
        return {
            "mlp.router.expert_bias": w["mlp.gate.e_score_correction_bias"],
            "mlp.shared_experts.linear_fc1.weight": np.concatenate([share(gate, 0, tp, t), share(up, 0, tp, t)]),
            "mlp.shared_experts.linear_fc2.weight": share(down, 1, tp, t),
        }


_SPARSE = _SMALL | {"experts": 12, "expert_ffn": 32}
MODELS: dict[str, Model] = {
    "gemma": Gemma(**_SMALL | {"head_dim": 8}, tied=True),
    "gemma2": Gemma2(**_SMALL | {"head_dim": 8}, tied=True),
    "gemma3": Gemma3(**_SMALL, tied=True, qk_norm=True),
    "phi3": Phi3(**_SMALL),
    "nemotron": Nemotron(**_SMALL),
    "olmoe": Olmoe(**_SPARSE | {"kv": 8}, family="olmoe", qk_norm=True),
    "glm4_moe": Glm4Moe(**_SPARSE, family="glm4_moe", qkv_bias=True, qk_norm=True, dense=(0,)),
}


def megatron(weights: Arrays, model: Any, cut: ExpertCut, spec: str) -> moe.Ranks:
    """What each rank holds under Megatron's names."""
    plain, alike = model.plain(weights), "local" if spec == "local" else "te"
    if isinstance(model, Experts):
        ranks = moe.megatron(plain, model, cut, spec)
    else:
        ranks = {(t, p, v, 0): held for (t, p, v), held in ref.megatron(plain, model, cut, alike).items()}
    for (t, p, v, _), held in ranks.items():
        for layer, home in enumerate(cut.home(model.layers)):
            if home[:2] == (p, v):
                at = f"model.layers.{layer}."
                own = {name.removeprefix(at): array for name, array in weights.items() if name.startswith(at)}
                held |= {f"decoder.layers.{home[2]}.{name}": array for name, array in model.held(own, alike, cut.tp, t).items()}
        if "decoder.final_layernorm.weight" in held and "model.norm.bias" in weights:
            held["decoder.final_layernorm.bias"] = weights["model.norm.bias"]
    return ranks
