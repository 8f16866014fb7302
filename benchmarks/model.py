"""Made-up Llamas of about any size, and a DeepSeek-V3 to plan.

1. `shape_of` gives the config.json of a model of about that many bytes: Llama-3-8B's own shapes with as many layers as
   fit; with a smaller vocabulary where fewer than three layers would fit, and a narrow model where that does not help.
2. `make` writes it with random bytes, in several files, as a Hugging Face checkpoint of that size would be.
3. `sparse` writes headers and holes only, for planning.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

from shardwright import synth
from shardwright.planner.config import family_of, from_huggingface
from shardwright.planner.passes.rows import hub_tensors

__all__ = ["A_MILLION_TENSORS", "DEEPSEEK_V3", "LLAMA_70B", "MANY_TENSORS", "make", "shape_of", "sparse"]

Config = dict[str, Any]

_COMMON: Config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_LLAMA_8B: Config = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
_NARROW: Config = {
    "hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 1024,
}  # fmt: skip

LLAMA_70B: Config = {
    **_COMMON, "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
MANY_TENSORS: Config = {
    **_COMMON, "num_hidden_layers": 11_111, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 8,
    "num_key_value_heads": 8, "vocab_size": 64,
}  # fmt: skip
"""100,002 tensors."""
A_MILLION_TENSORS: Config = {**MANY_TENSORS, "num_hidden_layers": 111_111}
"""1,000,002 tensors."""
DEEPSEEK_V3: Config = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_act": "silu", "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "vocab_size": 129280, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "first_k_dense_replace": 3, "moe_layer_freq": 1, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "max_position_embeddings": 163840, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "tie_word_embeddings": False, "attention_bias": False, "torch_dtype": "bfloat16",
}  # fmt: skip
"""671 billion parameters, as released, in bfloat16 and without the layer that predicts further tokens."""


def shape_of(nbytes: int) -> Config:
    """The config of a bfloat16 Llama of about `nbytes`; at least one layer."""
    for shape in (_LLAMA_8B, {**_LLAMA_8B, "vocab_size": 32000}, _NARROW):
        layers = round((nbytes - _tables(shape)) / _layer(shape))
        if layers >= 3:
            break
    return {**_COMMON, **shape, "num_hidden_layers": max(1, layers)}


def _tables(shape: Config) -> int:
    """Bytes of both embeddings."""
    return int(2 * 2 * shape["vocab_size"] * shape["hidden_size"])


def _layer(shape: Config) -> int:
    """Bytes of one layer's matrices."""
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    attention = 2 * hidden * hidden + 2 * hidden * hidden * shape["num_key_value_heads"] // heads
    return int(2 * (attention + 3 * hidden * shape["intermediate_size"]))


def make(folder: Path, nbytes: int) -> Path:
    """A random checkpoint of about `nbytes`, in about six files."""
    return _synth(folder, shape_of(nbytes), sparse=False, max_shard_size=max(1_000_000, nbytes // 5))


def sparse(folder: Path, config: Config, files: int) -> Path:
    """Headers and holes of a model, in at least that many files."""
    family = family_of(config)
    nbytes = 2 * sum(map(prod, hub_tensors(family, from_huggingface(config, family)).values()))
    return _synth(folder, config, sparse=True, max_shard_size=nbytes // files)


def _synth(folder: Path, config: Config, *, sparse: bool, max_shard_size: int) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    given = folder.with_name(folder.name + ".json")
    given.write_text(json.dumps(config, indent=2))
    return synth(given, folder, sparse=sparse, max_shard_size=max_shard_size)
