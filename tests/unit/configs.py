"""One tiny config.json for every built-in family: what the tests that go over all families are run on.

A new family adds its own; those of families that are not there are left out. Sizes: 131 words (padding matters), 4 layers (2
stages of 2 chunks), 12 experts (numbers of two digits), and square matrices wherever the family allows it: a transpose that is
forgotten changes no shape of theirs. The values of every field that decides which tensors there are should be those that
make most of them exist.
"""

from __future__ import annotations

from typing import Any

from shardwright import Layout
from shardwright.errors import UnsupportedError
from shardwright.planner.config import from_huggingface
from shardwright.planner.passes.rows import expand
from shardwright.planner.tables import DIALECTS, FAMILIES, specs_of

__all__ = ["CONFIGS", "experts", "holds"]

_DENSE: dict[str, Any] = {
    "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8, "vocab_size": 131, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "dtype": "float32", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_EXPERTS: dict[str, Any] = _DENSE | {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "norm_topk_prob": True}

_GEMMA = _DENSE | {"tie_word_embeddings": True, "pad_token_id": 0}
_WINDOWS = {"query_pre_attn_scalar": 24, "sliding_window": 8, "hidden_activation": "gelu_pytorch_tanh"}
_ROUTED = _DENSE | {
    "n_routed_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5, "norm_topk_prob": True,
}  # fmt: skip
_LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8,
    "num_key_value_heads": 8,
}  # fmt: skip
_GPT: dict[str, Any] = {"vocab_size": 131, "tie_word_embeddings": True, "dtype": "float32", "bos_token_id": 1, "eos_token_id": 2}

_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _DENSE | {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True},
    "mistral": _DENSE | {"architectures": ["MistralForCausalLM"], "sliding_window": 64},
    "mixtral": _DENSE
    | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 12, "num_experts_per_tok": 3, "sliding_window": None},
    "qwen2": _DENSE | {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen2_moe": _EXPERTS
    | {"architectures": ["Qwen2MoeForCausalLM"], "shared_expert_intermediate_size": 64, "mlp_only_layers": [1], "decoder_sparse_step": 1},
    "qwen3": _DENSE | {"architectures": ["Qwen3ForCausalLM"]},
    "qwen3_moe": _EXPERTS | {"architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": [0, 2], "decoder_sparse_step": 1},
    "gemma": _GEMMA | {"architectures": ["GemmaForCausalLM"], "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": _GEMMA | _WINDOWS | {"architectures": ["Gemma2ForCausalLM"], "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma3": _GEMMA
    | _WINDOWS
    | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"] * 2}
    | {"sliding_window_pattern": 2, "rope_local_base_freq": 10000.0, "rope_theta": 1000000.0, "rope_scaling": None},
    "phi3": _DENSE | {"architectures": ["Phi3ForCausalLM"], "pad_token_id": 0, "original_max_position_embeddings": 128},
    "olmoe": _DENSE
    | {
        "architectures": ["OlmoeForCausalLM"],
        "num_experts": 12,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "num_key_value_heads": 8,
    },
    "nemotron": _DENSE | {"architectures": ["NemotronForCausalLM"], "hidden_act": "relu2", "norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    "glm4_moe": _ROUTED
    | {"architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "use_qk_norm": True, "partial_rotary_factor": 0.5, "n_group": 1}
    | {"topk_group": 1, "num_nextn_predict_layers": 0},
    "gpt2": _GPT | {"architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_layer": 4, "n_head": 8, "n_inner": 64, "n_positions": 128},
    "gpt_neox": _GPT
    | {
        "architectures": ["GPTNeoXForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "intermediate_size": 64,
    }
    | {"max_position_embeddings": 128, "use_parallel_residual": False, "tie_word_embeddings": False, "rotary_pct": 0.25},
    "opt": _GPT
    | {"architectures": ["OPTForCausalLM"], "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "ffn_dim": 64}
    | {"max_position_embeddings": 128, "word_embed_proj_dim": 64, "do_layer_norm_before": True, "activation_function": "relu"},
    "bloom": _GPT | {"architectures": ["BloomForCausalLM"], "hidden_size": 64, "n_layer": 4, "n_head": 8},
    "falcon": _GPT
    | {"architectures": ["FalconForCausalLM"], "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "num_kv_heads": 4}
    | {"new_decoder_architecture": True, "bias": False, "alibi": False, "parallel_attn": True, "ffn_hidden_size": 64},
    "deepseek_v2": _ROUTED | _LATENT | {"architectures": ["DeepseekV2ForCausalLM"], "routed_scaling_factor": 1.0, "norm_topk_prob": False},
    "deepseek_v3": _ROUTED | _LATENT | {"architectures": ["DeepseekV3ForCausalLM"], "n_group": 4, "topk_group": 2},
    "gpt_oss": _DENSE
    | {"architectures": ["GptOssForCausalLM"], "num_local_experts": 12, "num_experts_per_tok": 3, "sliding_window": 16}
    | {"layer_types": ["sliding_attention", "full_attention"] * 2, "attention_bias": True},
}
for _family, _config in _CONFIGS.items():
    _config.setdefault("model_type", _family)
_ONE, _EVEN = Layout(), 256
CONFIGS = {name: config for name, config in _CONFIGS.items() if name in FAMILIES}


def experts(family: str) -> int:
    """How many experts the family's tiny model has."""
    return next((CONFIGS[family][key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in CONFIGS[family]), 0)


def holds(family: str, dialect: str, spec: str | None = None, layout: Layout = _ONE) -> bool:
    """Whether the dialect (in that variant of its names, or its usual one) has a place for all of the family's tiny model."""
    table, words = FAMILIES.get(family), DIALECTS.get(dialect)
    try:
        expand(table, from_huggingface(CONFIGS[family], table), words, spec or specs_of(words, table)[0], layout, _EVEN)
    except UnsupportedError:
        return False
    return True
