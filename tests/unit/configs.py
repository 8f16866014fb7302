"""One tiny config.json for every built-in family: what the tests that go over all families are run on.

A new family adds its own. Sizes: 131 words (padding matters), 4 layers (2 stages of 2 chunks), 12 experts (numbers of two
digits), and square matrices wherever the family allows it: a transpose that is forgotten changes no shape of theirs. The
values of every field that decides which tensors there are should be those that make most of them exist.
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

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _DENSE | {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True},
    "mistral": _DENSE | {"architectures": ["MistralForCausalLM"], "sliding_window": 64},
    "mixtral": _DENSE
    | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 12, "num_experts_per_tok": 3, "sliding_window": None},
    "qwen2": _DENSE | {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen2_moe": _EXPERTS
    | {"architectures": ["Qwen2MoeForCausalLM"], "shared_expert_intermediate_size": 64, "mlp_only_layers": [1], "decoder_sparse_step": 1},
    "qwen3": _DENSE | {"architectures": ["Qwen3ForCausalLM"]},
    "qwen3_moe": _EXPERTS | {"architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": [0, 2], "decoder_sparse_step": 1},
}
for _family, _config in CONFIGS.items():
    _config.setdefault("model_type", _family)


def experts(family: str) -> int:
    """How many experts the family's tiny model has."""
    return next((CONFIGS[family][key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in CONFIGS[family]), 0)


def holds(family: str, dialect: str) -> bool:
    """Whether the dialect can hold the family's tiny model, or the family's table refuses it."""
    table, words = FAMILIES.get(family), DIALECTS.get(dialect)
    try:
        expand(table, from_huggingface(CONFIGS[family], table), words, specs_of(words, table)[0], Layout(), None)
    except UnsupportedError as error:
        if "cannot hold" not in str(error):
            raise
        return False
    return True
