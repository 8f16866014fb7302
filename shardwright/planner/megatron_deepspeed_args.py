"""Megatron-DeepSpeed's ``args`` and the canonical config, each from the other.

Megatron-DeepSpeed's words differ from Megatron-core's: norms and their epsilon, rotary positions, key/value heads. Reading turns
them into Megatron-core's and goes on with `megatron_args`; writing gives what its ``check_checkpoint_args`` compares, and what is
needed to read the config back. (Source: Megatron-DeepSpeed ``megatron/arguments.py``, ``megatron/checkpointing.py``.)
Boundary: dictionaries in, dictionaries out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import ModelConfig

__all__ = ["to_megatron_deepspeed", "words_of"]

_NORMS = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}


def words_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in Megatron-core's words, for `megatron_args.from_megatron`.

    An argument that Megatron-core has too stays as it is; what is not there is not made up.
    """
    words = dict(arguments)
    heads, groups = arguments.get("num_attention_heads"), arguments.get("num_key_value_heads")
    if groups is not None:
        words |= {"group_query_attention": groups != heads, "num_query_groups": groups}
    if "layernorm_epsilon" in arguments:
        words["norm_epsilon"] = arguments["layernorm_epsilon"]
    # The first releases had layer norms only, and no argument for it.
    norm = arguments.get("normalization", "layernorm")
    words["normalization"] = _NORMS.get(norm, norm) if isinstance(norm, str) else norm
    if arguments.get("use_rotary_position_embeddings"):
        words |= {"position_embedding_type": "rope", "rotary_base": arguments.get("rope_theta", 10000)}
    elif "position_embedding_type" not in arguments and arguments.get("add_position_embedding", True):
        words["position_embedding_type"] = "learned_absolute"
    words.setdefault("swiglu", False)
    return words


def to_megatron_deepspeed(config: ModelConfig, tp: int, pp: int, padded_vocab: int) -> dict[str, Any]:
    """What Megatron-DeepSpeed reads back from a checkpoint's ``args``.

    Parameters
    ----------
    padded_vocab
        Rows of the stored embedding.
    """
    fields = config.fields
    rope = fields.get("position_embedding_type", "rope") == "rope"
    arguments = {
        "num_layers": fields["num_hidden_layers"],
        "hidden_size": fields["hidden_size"],
        "ffn_hidden_size": fields["intermediate_size"],
        "num_attention_heads": fields["num_attention_heads"],
        "num_key_value_heads": fields["num_key_value_heads"],
        "kv_channels": fields.get("head_dim"),
        "vocab_size": fields["vocab_size"],
        "padded_vocab_size": padded_vocab,
        "make_vocab_size_divisible_by": padded_vocab // tp,
        "layernorm_epsilon": fields["rms_norm_eps"],
        "normalization": {name: word for word, name in _NORMS.items()}[fields.get("normalization", "RMSNorm")],
        "apply_layernorm_1p": fields.get("norm_zero_centered", False),
        "swiglu": fields.get("gated_mlp", True),
        "squared_relu": fields["hidden_act"] == "relu2",
        "use_rotary_position_embeddings": rope,
        "add_position_embedding": fields.get("position_embedding_type", "rope") == "learned_absolute",
        "add_bias_linear": fields["mlp_bias"],
        "untie_embeddings_and_output_weights": not fields["tie_word_embeddings"],
        "tensor_model_parallel_size": tp,
        "model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    if rope:
        arguments |= {"rope_theta": fields["rope_theta"], "rotary_percent": fields.get("partial_rotary_factor", 1.0)}
    if "max_position_embeddings" in fields:
        arguments |= {"max_position_embeddings": fields["max_position_embeddings"], "seq_length": fields["max_position_embeddings"]}
    return arguments
