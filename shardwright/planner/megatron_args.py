"""Megatron's ``args`` and the canonical config, each from the other.

* canonical → args: `to_megatron`. What Megatron-core cannot build is refused; what its args cannot say is a warning.
* args → canonical: `from_megatron`, for a family that the user names or that the arguments tell. Nothing is defaulted in
  silence: an argument is there, or Megatron-LM's own default for its absence is taken, or the checkpoint is refused.

Activations: SwiGLU and squared ReLU have arguments; another gate has none, and ``activation_func``, ``gated_linear_unit`` and
``softmax_scale`` have no flags (source: Megatron-LM ``training/arguments.py``, the fields that its flags leave out). Such a model's
args say no gate: Megatron refuses the tensors, and does not compute something else. Without either, the MLP is GELU, and its fusion
with the bias (``bias_gelu_fusion``) computes the tanh approximation (source: ``core_transformer_config_from_args``, Megatron-core
``fusions/fused_bias_gelu.py``).

Experts, latent attention and GPT-OSS's parts have modules of their own (`megatron_experts`, `megatron_latent`, `megatron_sinks`).
Boundary: dictionaries in, dictionaries out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, UnsupportedError, short
from .config import ModelConfig, infer_family, is_number, misfit, valid
from .megatron_experts import experts_fields, experts_to_megatron
from .megatron_flags import with_newer_names
from .megatron_latent import latent_fields, latent_to_megatron
from .megatron_sinks import sinks_fields, sinks_to_megatron
from .tables import FAMILIES, Family

__all__ = ["from_megatron", "norm_shift", "to_megatron"]

_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Megatron-core's ``use_rope_scaling`` hard-codes (models/common/embeddings/rotary_pos_embedding.py)."""


def to_megatron(config: ModelConfig, family: Family) -> tuple[dict[str, Any], list[str]]:
    """Megatron's model arguments, and warnings about what they cannot say.

    Raises
    ------
    UnsupportedError
        Megatron-core cannot build this model.
    """
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    built = {name: config.fields.get(name, usual) for name, (_, usual) in _USUAL.items()}
    for name, what in _NEVER.items():
        if config.fields.get(name):
            raise UnsupportedError(f"Megatron-core has no {what}", actual=f"{name} {short(config[name])}")
    if config["attention_out_bias"] != config["mlp_bias"] or (config["mlp_bias"] and not config["qkv_bias"]):
        raise UnsupportedError(
            "Megatron's add_bias_linear gives a bias to attention output and MLP together, and to QKV with them",
            actual={k: config[k] for k in ("qkv_bias", "attention_out_bias", "mlp_bias")},
        )
    activation, warnings = _megatron_activation(config)
    rope, more = _megatron_rope(config) if built["position_embedding_type"] == "rope" else ({}, [])
    special: dict[str, Any] = {}
    if built["mla"]:
        special, more = latent_to_megatron(config)
    elif built["sinks"]:
        special, told = sinks_to_megatron(config)
        more = told or more
    experts, unsaid = experts_to_megatron(config, family)
    warnings += more + unsaid + [f"Megatron's args cannot express {text}" for name, text in _UNSAID.items() if config.fields.get(name)]
    width = config["v_head_dim" if built["mla"] else "head_dim"]
    if (scalar := config.fields.get("query_pre_attn_scalar", width)) != width:
        warnings.append(f"Megatron's args cannot express scores divided by the root of {scalar}; set softmax_scale when you launch")
    if config.fields.get("qk_norm_over_heads") and groups != heads:
        raise UnsupportedError(
            "Megatron-Bridge's OLMoESelfAttention norms keys over as many heads as queries",
            expected=f"{heads} key/value heads",
            actual=groups,
        )
    arguments = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "kv_channels": width,
        "vocab_size": config["vocab_size"],
        "max_position_embeddings": config["max_position_embeddings"] + config.fields.get("position_offset", 0),
        "seq_length": config["max_position_embeddings"],
        "normalization": built["normalization"],
        "norm_epsilon": config["rms_norm_eps"],
        "position_embedding_type": built["position_embedding_type"],
        "rotary_percent": built["partial_rotary_factor"],
        "rotary_interleaved": False,
        **rope,
        **activation,
        "add_bias_linear": config["mlp_bias"],
        "add_qkv_bias": config["qkv_bias"] and not config["mlp_bias"],
        "qk_layernorm": config["qk_norm"],
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        "apply_layernorm_1p": config.fields.get("norm_zero_centered", False),
        **_megatron_window(config),
        **experts,
        **special,
    }
    return arguments, warnings


_TANH_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")
"""Spellings of one function (source: transformers ``activations.py``)."""


_NEVER = {
    "clip_qkv": "clipped queries, keys and values",
    "use_bidirectional_attention": "language model whose tokens see those after them",
}
"""What Megatron-core cannot do, by the field that asks for it."""
_UNSAID = {
    "scale_embeddings": "that embeddings are multiplied by the square root of hidden_size; Megatron-Bridge's Gemma models do that",
    "post_norms": "norms on what attention and MLP give; Megatron-Bridge's Gemma layers have them (TERowParallelLinearLayerNorm)",
    "attn_logit_softcapping": "soft-capped attention scores; Megatron-Bridge's Gemma 2 layers do that",
    "final_logit_softcapping": "soft-capped logits; Megatron-Bridge's Gemma2OutputLayer does that",
    "rope_local_base_freq": "another RoPE base in layers with a window; Megatron-Bridge's Gemma3RotaryEmbedding has both",
    "qk_norm_over_heads": "one norm over all heads; Megatron-Bridge's OLMoESelfAttention has it, and runs at tensor parallel size 1 only",
}
"""What Megatron's args have no word for: for whoever launches, by field."""


def _megatron_activation(config: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    kind, gated = config.fields.get("activation", config["hidden_act"]), config.fields.get("gated_mlp", True)
    if kind in ("silu", "swish") and gated:
        return {"swiglu": True, "squared_relu": False}, []
    if kind == "relu2" and not gated:
        return {"swiglu": False, "squared_relu": True}, []
    if not gated:
        fused = kind in _TANH_GELU and config["mlp_bias"]
        told = [f"Megatron's args cannot express the activation {short(kind)} here; set activation_func when you launch"]
        return {"swiglu": False, "squared_relu": False, "bias_gelu_fusion": fused}, [] if fused or kind == "gelu" else told
    if kind == "gelu_pytorch_tanh" and gated:
        words = f"a gate with {kind}; set gated_linear_unit and activation_func when you launch"
        return {"swiglu": False, "squared_relu": False}, [f"Megatron's args cannot express {words}"]
    raise UnsupportedError(
        "Megatron arguments are written for gates of SwiGLU and tanh GELU only",
        expected="hidden_act silu",
        actual=f"{kind}, gated",
    )


def _megatron_window(config: ModelConfig) -> dict[str, Any]:
    """The window, and which layers have it where some have not."""
    window, layers = config.fields.get("sliding_window"), range(config["num_hidden_layers"])
    types, every = config.fields.get("layer_types"), config.fields.get("sliding_window_pattern", 0)
    found: dict[str, Any] = {"window_size": None if window is None else (window - 1, 0)}
    if types or every:
        found["window_attn_skip_freq"] = [int(types[n] == "sliding_attention" if types else (n + 1) % every != 0) for n in layers]
    return found


def _megatron_rope(config: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    rope: dict[str, Any] = {
        "rotary_base": config["rope_theta"],
        "use_rope_scaling": False,
        "rope_scaling_factor": 8.0,
        "rotary_seq_len_interpolation_factor": None,
    }
    scaling = config.fields.get("rope_scaling")
    if scaling is None:
        return rope, []
    kind = scaling["rope_type"]
    if kind == "llama3" and all(scaling.get(k, v) == v for k, v in _LLAMA3_ROPE.items()):
        return {**rope, "use_rope_scaling": True, "rope_scaling_factor": float(scaling.get("factor", 8.0))}, []
    if kind == "linear" and float(scaling.get("factor", 1.0)).is_integer():
        return {**rope, "rotary_seq_len_interpolation_factor": int(scaling.get("factor", 1))}, []
    return rope, [f"Megatron's args cannot express this RoPE scaling; set it when you launch: {short(scaling, 400)}"]


def from_megatron(arguments: Mapping[str, Any], family: Family | None, vocab_size: int | None, file: str) -> ModelConfig:
    """The canonical config of a checkpoint's own ``args``.

    Parameters
    ----------
    family
        The family, or None to infer it from the fields.
    vocab_size
        The true vocabulary size if the user gave one; ``args.vocab_size`` otherwise.

    Raises
    ------
    ConfigError
        An argument is missing, or the true vocabulary size is unknown.
    UnsupportedError
        A model that is built otherwise than the family, or than any family here.
    """
    arguments = with_newer_names(arguments)

    def need(name: str) -> Any:
        if arguments.get(name) is None:
            raise ConfigError(f"the checkpoint's args lack {name!r}", file=file, remedy="Give --family and --config config.json")
        return arguments[name]

    if arguments.get("rotary_interleaved", False):
        raise UnsupportedError("no family here has args.rotary_interleaved = True", file=file, expected=False)
    heads = need("num_attention_heads")
    vocab = vocab_size if vocab_size is not None else arguments.get("vocab_size")
    if vocab is None:
        raise ConfigError(
            "the true vocabulary size is not in the checkpoint's args",
            file=file,
            actual=f"padded_vocab_size {short(arguments.get('padded_vocab_size'))}",
            remedy="Give --vocab-size N",
        )
    linear_bias = bool(arguments.get("add_bias_linear", True))
    sinks = arguments.get("softmax_type", "vanilla") == "learnable"
    rope = need("position_embedding_type") == "rope" or sinks
    fields = {
        "hidden_size": need("hidden_size"),
        "intermediate_size": need("ffn_hidden_size"),
        "num_hidden_layers": need("num_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": need("num_query_groups") if arguments.get("group_query_attention") else heads,
        "head_dim": arguments.get("kv_channels") or _quotient(need("hidden_size"), heads, file),
        "vocab_size": vocab,
        "max_position_embeddings": need("max_position_embeddings"),
        "rms_norm_eps": need("norm_epsilon"),
        **_activation(arguments, need("swiglu")),
        "normalization": need("normalization"),
        "norm_zero_centered": bool(arguments.get("apply_layernorm_1p", False)),
        "tie_word_embeddings": not arguments.get("untie_embeddings_and_output_weights", False),
        "position_embedding_type": arguments["position_embedding_type"],
        **(_rope_from_megatron(arguments, need("rotary_base"), file) if rope else {}),
        "partial_rotary_factor": _float(arguments.get("rotary_percent", 1.0), "rotary_percent", file) if rope else 1.0,
        "original_max_position_embeddings": need("max_position_embeddings"),  # args that say no RoPE scaling say no other length
        **_ALWAYS,
        "word_embed_proj_dim": need("hidden_size"),
        "qkv_bias": linear_bias or bool(arguments.get("add_qkv_bias")),
        "attention_out_bias": linear_bias,
        "mlp_bias": linear_bias,
        "qk_norm": bool(arguments.get("qk_layernorm")),
        "sliding_window": _window(arguments.get("window_size"), file),
        "mla": False,
        "sinks": False,
        **dict.fromkeys(_NEVER),
        **experts_fields(arguments, need("num_layers"), file),
        **(latent_fields(arguments, need) if arguments.get("multi_latent_attention") else {}),
        **(sinks_fields(arguments, need, file) if sinks else {}),
    }
    valid({name: value for name, value in fields.items() if value or name not in _OPTIONAL}, file)
    usual = {name: value for name, (_, value) in _USUAL.items()}
    if family is not None:
        del usual["norm_zero_centered"]  # `norm_shift` tells
        fields["norm_zero_centered"] = _fixed(family, "norm_zero_centered", False)
    if family is None and not any(misfit(known, fields, usual) is None for known in FAMILIES):
        unusual = [name for name, value in usual.items() if fields.get(name, value) != value]
        raise UnsupportedError(
            "no family here is built as the args say",
            file=file,
            expected={_USUAL[name][0]: usual[name] for name in unusual},
            actual=short({_USUAL[name][0]: fields[name] for name in unusual}, 400),
            remedy="Give --config config.json",
        )
    found = family or infer_family(fields, file, usual)
    if other := misfit(found, fields, usual):
        name = _USUAL[other[0]][0]
        raise UnsupportedError(
            f"family {found.name!r} has no args.{name} = {short(arguments.get(name))}",
            file=file,
            expected=other[1],
            remedy="Name another --family, or give --config config.json",
        )
    declared = {rule.name for rule in found.config}
    if foreign := next((name for name in _OPTIONAL if fields[name] and name not in declared), None):
        raise UnsupportedError(
            f"family {found.name!r} has no {foreign}", file=file, actual=short(fields[foreign]), remedy="Name another --family"
        )
    fields["hidden_act"] = _spelled(arguments, found, fields, file)
    fields["max_position_embeddings"] -= valid({"position_offset": _fixed(found, "position_offset", 0)}, file)["position_offset"]
    return ModelConfig(found.name, valid(_declared(found, fields, file), file))


_ALWAYS = {
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "parallel_residual": False, "do_layer_norm_before": True,
    "remove_final_layer_norm": False, "norm_affine": True,
}  # fmt: skip
"""What every model of Megatron-core has; tables refuse it the others."""


def _fixed(family: Family, name: str, usual: Any) -> Any:
    """What a family fixes a field at, whatever the other fields are."""
    return next((rule.default({}) for rule in family.config if rule.name == name and rule.key is None and rule.default), usual)


def _spelled(arguments: Mapping[str, Any], family: Family, fields: Mapping[str, Any], file: str) -> str:
    """The activation as the family spells it.

    Raises
    ------
    ConfigError
        The family's usual one is none that args can say, so they are no evidence.
    """
    if fields["hidden_act"] != "gelu":
        return str(fields["hidden_act"])
    rule = next((rule for rule in family.config if rule.name == "hidden_act"), None)
    own = rule.default(fields) if rule is not None and rule.default is not None else None
    tanh = bool(arguments.get("bias_gelu_fusion", True)) and fields["mlp_bias"]
    if own not in (None, "gelu", *_TANH_GELU):
        raise ConfigError(
            "the args do not say which activation the model has", file=file, expected=own, actual="GELU, as args say of any other",
            remedy="Give --config config.json",
        )  # fmt: skip
    return (own if own in _TANH_GELU else "gelu_pytorch_tanh") if tanh else "gelu"


def norm_shift(arguments: Mapping[str, Any], config: ModelConfig) -> int:
    """What to add to stored norm weights to have those of the config's family: Megatron stores w or w - 1, as its args say; so does
    a family. No shape would tell.

    >>> norm_shift({"apply_layernorm_1p": True}, ModelConfig("llama", {}))
    1
    """
    wanted = config.fields.get("norm_zero_centered", False)
    stored = with_newer_names(arguments).get("apply_layernorm_1p")
    return 0 if stored is None else int(bool(stored)) - int(wanted)


_OPTIONAL = ("num_experts", "shared_expert_intermediate_size")
"""Sizes that are 0 where a model has no such part; a family that does not declare them has none."""
_USUAL: Mapping[str, tuple[str, Any]] = {
    "normalization": ("normalization", "RMSNorm"),
    "gated_mlp": ("swiglu", True),
    "position_embedding_type": ("position_embedding_type", "rope"),
    "partial_rotary_factor": ("rotary_percent", 1.0),
    "norm_zero_centered": ("apply_layernorm_1p", False),
    "scoring_func": ("moe_router_score_function", "softmax"),
    "topk_method": ("moe_router_enable_expert_bias", "greedy"),
    "n_group": ("moe_router_num_groups", 1),
    "routed_scaling_factor": ("moe_router_topk_scaling_factor", 1.0),
    "mla": ("multi_latent_attention", False),
    "sinks": ("softmax_type", False),
}
"""What a family has that does not declare the field, with the argument that says it."""


def _activation(arguments: Mapping[str, Any], swiglu: bool) -> dict[str, Any]:
    """The MLP's kind."""
    if swiglu:
        return {"gated_mlp": True, "hidden_act": "silu"}
    return {"gated_mlp": False, "hidden_act": "relu2" if arguments.get("squared_relu") else "gelu"}


def _declared(family: Family, fields: dict[str, Any], file: str) -> dict[str, Any]:
    """The fields that the family's table declares; those that it fixes need not be in the args."""
    found: dict[str, Any] = {}
    for rule in family.config:
        if rule.name in fields:
            found[rule.name] = fields[rule.name]
        elif rule.key is None and rule.default is not None:
            found[rule.name] = rule.default({**fields, **found})
        else:
            raise ConfigError(f"the args do not say {rule.name!r}", file=file, remedy="Give --config config.json")
    return found


def _quotient(size: Any, heads: Any, file: str) -> int:
    for name, value in (("hidden_size", size), ("num_attention_heads", heads)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a positive integer", file=file, actual=short(value))
    return int(size) // int(heads)


def _float(value: Any, name: str, file: str) -> float:
    if not is_number(value):
        raise ConfigError(f"args.{name} must be a number", file=file, actual=short(value))
    return float(value)


def _window(size: Any, file: str) -> int | None:
    """Megatron counts the keys before a query, Hugging Face the query too; -1 is no window."""
    if not size or size == -1:
        return None
    if not isinstance(size, tuple | list) or not isinstance(size[0], int):
        raise ConfigError("args.window_size must be a pair of integers", file=file, actual=short(size))
    return None if size[0] < 0 else size[0] + 1


def _rope_from_megatron(arguments: Mapping[str, Any], base: Any, file: str) -> dict[str, Any]:
    return {"rope_theta": _float(base, "rotary_base", file), "rope_scaling": _scaling_from_megatron(arguments, file)}


def _scaling_from_megatron(arguments: Mapping[str, Any], file: str) -> dict[str, Any] | None:
    if arguments.get("use_rope_scaling"):
        return {
            "rope_type": "llama3",
            "factor": _float(arguments.get("rope_scaling_factor", 8.0), "rope_scaling_factor", file),
            **_LLAMA3_ROPE,
        }
    factor = arguments.get("rotary_seq_len_interpolation_factor")
    return None if factor is None else {"rope_type": "linear", "factor": _float(factor, "rotary_seq_len_interpolation_factor", file)}
