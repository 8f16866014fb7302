"""Megatron's ``args`` and the canonical config, each from the other.

* canonical → args: `to_megatron`. What Megatron-core cannot build is refused; what its args cannot say is a warning.
* args → canonical: `from_megatron`, for a family that the user names or that the arguments tell. Nothing is defaulted in
  silence: an argument is there, or Megatron-LM's own default for its absence is taken, or the checkpoint is refused.

Experts: ``moe_layer_freq`` (1 and 0 per layer, or every n-th) says what a family's word ``moe`` says; softmax before the
choice of experts (``moe_router_pre_softmax``) is Hugging Face's ``norm_topk_prob = false``, since choosing first and then
taking the softmax of the chosen is the same as normalising afterwards
(source: Megatron-core ``transformer/moe/moe_utils.topk_routing_with_score_function``). Latent attention and GPT-OSS's parts have
modules of their own.
Boundary: dictionaries in, dictionaries out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError, UnsupportedError
from .config import ModelConfig, check_types, infer_family, layer_scope
from .megatron_flags import with_newer_names
from .megatron_latent import latent_fields, latent_to_megatron
from .megatron_sinks import sinks_fields, sinks_to_megatron
from .tables import DIALECT_WORDS, Family

__all__ = ["from_megatron", "to_megatron"]

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
    if config["hidden_act"] not in ("silu", "swish"):
        raise UnsupportedError(
            "Megatron arguments are written for SwiGLU models only", expected="hidden_act silu", actual=config["hidden_act"]
        )
    if config["attention_out_bias"] != config["mlp_bias"] or (config["mlp_bias"] and not config["qkv_bias"]):
        raise UnsupportedError(
            "Megatron's add_bias_linear gives a bias to attention output and MLP together, and to QKV with them",
            actual={k: config[k] for k in ("qkv_bias", "attention_out_bias", "mlp_bias")},
        )
    rope, warnings = _megatron_rope(config)
    special: dict[str, Any] = {}
    if config.fields.get("mla"):
        special, warnings = latent_to_megatron(config)
    elif config.fields.get("sinks"):
        special, told = sinks_to_megatron(config)
        warnings = told or warnings
    experts, unsaid = _megatron_experts(config, family)
    window = config.fields.get("sliding_window")
    arguments = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "kv_channels": config["v_head_dim" if "mla" in config.fields else "head_dim"],
        "vocab_size": config["vocab_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "seq_length": config["max_position_embeddings"],
        "normalization": "RMSNorm",
        "norm_epsilon": config["rms_norm_eps"],
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        **rope,
        "swiglu": True,
        "squared_relu": False,
        "add_bias_linear": config["mlp_bias"],
        "add_qkv_bias": config["qkv_bias"] and not config["mlp_bias"],
        "qk_layernorm": config["qk_norm"],
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        "apply_layernorm_1p": False,
        "window_size": None if window is None else (window - 1, 0),
        **experts,
        **special,
    }
    return arguments, warnings + unsaid


def _megatron_experts(config: ModelConfig, family: Family) -> tuple[dict[str, Any], list[str]]:
    pattern = [int(layer_scope(family, {**DIALECT_WORDS, **config.fields}, n)["moe"]) for n in range(config["num_hidden_layers"])]
    if not config.fields.get("num_experts") or not any(pattern):
        return {"num_experts": None}, []
    shared = config.fields.get("shared_expert_intermediate_size", 0)
    routing, warnings = _megatron_routing(config)
    arguments = {
        "num_experts": config["num_experts"],
        "moe_layer_freq": 1 if all(pattern) else pattern,
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_router_topk": config["num_experts_per_tok"],
        **routing,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": config["router_aux_loss_coef"],
        "moe_shared_expert_intermediate_size": shared or None,
        "moe_shared_expert_gate": bool(shared) and config["shared_expert_gate"],
    }
    return arguments, warnings


def _megatron_routing(config: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    """How experts are chosen and weighed; a warning where Megatron-core chooses groups of experts by other sums."""
    sigmoid = config.fields.get("scoring_func", "softmax") == "sigmoid"
    chosen, normalised, scale = config["num_experts_per_tok"], config["norm_topk_prob"], config.fields.get("routed_scaling_factor", 1.0)
    if (sigmoid and not normalised and chosen > 1) or (not sigmoid and normalised and scale != 1):
        raise UnsupportedError(
            "Megatron-core normalises sigmoid scores, and never scales softmax scores that are normalised",
            actual={"scoring_func": config["scoring_func"], "norm_topk_prob": normalised, "routed_scaling_factor": scale},
        )
    method = config.fields.get("topk_method", "greedy")
    found: dict[str, Any] = {
        "moe_router_score_function": "sigmoid" if sigmoid else "softmax",
        "moe_router_pre_softmax": not sigmoid and not normalised,
    }
    if "scoring_func" not in config.fields:
        return found, []
    groups, kept = (None, None) if method == "greedy" else (config["n_group"], config["topk_group"])
    found |= {
        "moe_router_topk_scaling_factor": None if scale == 1 else scale,
        "moe_router_enable_expert_bias": method == "noaux_tc",
        "moe_router_num_groups": groups,
        "moe_router_group_topk": kept,
        "moe_router_dtype": "fp32",
    }
    best = 2 if method == "noaux_tc" else 1
    if kept and chosen // kept != best and groups != kept:
        sums = f"by the sum of each group's best {chosen // kept}, transformers by its best {best}"
        return found, [f"Megatron-core ranks groups of experts {sums}: some tokens go to other experts"]
    return found, []


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
    return rope, [f"Megatron's args cannot express this RoPE scaling; set it when you launch: {scaling}"]


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
        A model that no family here describes (LayerNorm, learned positions, partial rotary …).
    """
    arguments = with_newer_names(arguments)

    def need(name: str) -> Any:
        if arguments.get(name) is None:
            raise ConfigError(f"the checkpoint's args lack {name!r}", file=file, remedy="Give --family and --config config.json")
        return arguments[name]

    sinks = arguments.get("softmax_type", "vanilla") == "learnable"
    expected = (("normalization", "RMSNorm"), *(() if sinks else (("position_embedding_type", "rope"), ("swiglu", True))))
    for name, wanted in expected:
        if need(name) != wanted:
            raise UnsupportedError(f"no family here has args.{name} = {arguments[name]!r}", file=file, expected=wanted)
    for name, usual in _USUAL.items():
        if arguments.get(name, usual) != usual:
            raise UnsupportedError(f"no family here has args.{name} = {arguments[name]!r}", file=file, expected=usual)
    heads = need("num_attention_heads")
    vocab = vocab_size if vocab_size is not None else arguments.get("vocab_size")
    if vocab is None:
        raise ConfigError(
            "the true vocabulary size is not in the checkpoint's args",
            file=file,
            actual=f"padded_vocab_size {arguments.get('padded_vocab_size')}",
            remedy="Give --vocab-size N",
        )
    linear_bias = bool(arguments.get("add_bias_linear", True))
    fields = {
        "hidden_size": need("hidden_size"),
        "intermediate_size": need("ffn_hidden_size"),
        "num_hidden_layers": need("num_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": need("num_query_groups") if arguments.get("group_query_attention") else heads,
        "head_dim": arguments.get("kv_channels") or need("hidden_size") // heads,
        "vocab_size": vocab,
        "max_position_embeddings": need("max_position_embeddings"),
        "rms_norm_eps": need("norm_epsilon"),
        "hidden_act": "silu",
        "tie_word_embeddings": not arguments.get("untie_embeddings_and_output_weights", False),
        "rope_theta": float(base) if isinstance(base := need("rotary_base"), int) else base,
        "rope_scaling": _rope_from_megatron(arguments),
        "qkv_bias": linear_bias or bool(arguments.get("add_qkv_bias")),
        "attention_out_bias": linear_bias,
        "mlp_bias": linear_bias,
        "qk_norm": bool(arguments.get("qk_layernorm")),
        "mla": False,
        "sinks": False,
        "sliding_window": _window(arguments.get("window_size"), file),
        **_experts_from_megatron(arguments, need("num_layers"), file),
        **(latent_fields(arguments, need) if arguments.get("multi_latent_attention") else {}),
        **(sinks_fields(arguments, need, file) if sinks else {}),
    }
    special = {name for name, absent in _OPTIONAL.items() if fields[name] != absent}
    check_types({name: value for name, value in fields.items() if name in special or name not in _OPTIONAL}, file)
    found = family or infer_family(fields, file, special)
    declared = {rule.name for rule in found.config}
    if foreign := next(iter(sorted(special - declared)), None):
        raise UnsupportedError(f"family {found.name!r} has no {foreign}", file=file, actual=fields[foreign], remedy="Name another --family")
    return ModelConfig(found.name, _declared(found, fields, file))


_OPTIONAL: Mapping[str, Any] = {
    "num_experts": 0, "shared_expert_intermediate_size": 0, "mla": False, "sinks": False, "scoring_func": "softmax",
    "topk_method": "greedy", "n_group": None, "topk_group": None, "routed_scaling_factor": 1.0,
}  # fmt: skip
"""What a model has not, and its field's value then; a family that does not declare the field has no such part."""
_USUAL = {
    "rotary_percent": 1.0, "rotary_interleaved": False, "apply_layernorm_1p": False,
}  # fmt: skip
"""What every family here has; another value is a model that no table describes."""


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


def _experts_from_megatron(arguments: Mapping[str, Any], layers: int, file: str) -> dict[str, Any]:
    experts = arguments.get("num_experts")
    routing = _routing_from_megatron(arguments)
    if experts is None:
        return {"num_experts": 0, "shared_expert_intermediate_size": 0, "shared_expert_gate": False, "dense_layers": False, **routing}
    pattern = _pattern(arguments.get("moe_layer_freq", 1), layers, file)
    shared = arguments.get("moe_shared_expert_intermediate_size") or 0
    dense = [layer for layer, moe in enumerate(pattern) if not moe]
    each = arguments.get("moe_ffn_hidden_size") or arguments["ffn_hidden_size"]
    # Families that count the dense layers at the beginning, and shared experts in multiples of one.
    first = {"first_k_dense_replace": len(dense), "moe_layer_freq": 1} if dense == list(range(len(dense))) else {}
    several = {"n_shared_experts": shared // each} if shared % each == 0 else {}
    return {
        **routing,
        **first,
        **several,
        "num_experts": experts,
        "num_experts_per_tok": arguments.get("moe_router_topk", 2),
        "moe_intermediate_size": each,
        "norm_topk_prob": routing["scoring_func"] == "sigmoid" or not arguments.get("moe_router_pre_softmax", False),
        "router_aux_loss_coef": arguments.get("moe_aux_loss_coeff", 0.0),
        "shared_expert_intermediate_size": shared,
        "shared_expert_gate": bool(shared) and bool(arguments.get("moe_shared_expert_gate", False)),
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        "dense_layers": bool(dense),
    }


def _routing_from_megatron(arguments: Mapping[str, Any]) -> dict[str, Any]:
    groups, scale = arguments.get("moe_router_num_groups"), arguments.get("moe_router_topk_scaling_factor")
    unbiased = "greedy" if groups is None else "group_limited_greedy"
    return {
        "scoring_func": arguments.get("moe_router_score_function", "softmax"),
        "topk_method": "noaux_tc" if arguments.get("moe_router_enable_expert_bias") else unbiased,
        "n_group": groups,
        "topk_group": arguments.get("moe_router_group_topk"),
        "routed_scaling_factor": 1.0 if scale is None else scale,
    }


def _pattern(freq: Any, layers: int, file: str) -> Sequence[int]:
    """1 for each layer with experts; a number n means every n-th layer, from the first."""
    if isinstance(freq, int) and not isinstance(freq, bool) and freq > 0:
        return [int(layer % freq == 0) for layer in range(layers)]
    if isinstance(freq, list | tuple) and len(freq) == layers and all(n in (0, 1) for n in freq):
        return freq
    raise ConfigError(
        "args.moe_layer_freq is no pattern of the layers", file=file, expected=f"a number, or {layers} of 0 and 1", actual=freq
    )


def _window(size: Any, file: str) -> int | None:
    """Megatron counts the keys before a query, Hugging Face the query too; -1 is no window."""
    if not size or size == -1:
        return None
    if not isinstance(size, tuple | list) or not isinstance(size[0], int):
        raise ConfigError("args.window_size must be a pair of integers", file=file, actual=repr(size))
    return None if size[0] < 0 else size[0] + 1


def _rope_from_megatron(arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    if arguments.get("use_rope_scaling"):
        return {"rope_type": "llama3", "factor": float(arguments.get("rope_scaling_factor", 8.0)), **_LLAMA3_ROPE}
    factor = arguments.get("rotary_seq_len_interpolation_factor")
    return None if factor is None else {"rope_type": "linear", "factor": float(factor)}
