"""Experts and their router in Megatron's ``args``, and back.

``moe_layer_freq`` (1 and 0 per layer, or every n-th) says what a family's word ``moe`` says. Softmax before the choice of experts
(``moe_router_pre_softmax``) is Hugging Face's ``norm_topk_prob = false``, since choosing first and then taking the softmax of the
chosen is the same as normalising afterwards. With sigmoid scores Megatron always normalises. It ranks groups of experts by the sum
of their best ``topk // group_topk``, Hugging Face by that of their best two, or by their best one (DeepSeek-V2).
Source: Megatron-core ``transformer/moe/moe_utils.topk_routing_with_score_function``, ``group_limited_topk``.
Boundary: dictionaries in, dictionaries out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError, UnsupportedError, short
from .config import ModelConfig, layer_scope, valid
from .tables import DIALECT_WORDS, Family

__all__ = ["experts_fields", "experts_to_megatron"]


def experts_to_megatron(config: ModelConfig, family: Family) -> tuple[dict[str, Any], list[str]]:
    """The arguments of experts, shared experts and router, and warnings about what they cannot say.

    Raises
    ------
    UnsupportedError
        Megatron-core weighs experts otherwise.
    """
    pattern = [int(bool(layer_scope(family, {**DIALECT_WORDS, **config.fields}, n)["moe"])) for n in range(config["num_hidden_layers"])]
    if not config.fields.get("num_experts") or not any(pattern):
        return {"num_experts": None}, []
    shared = config.fields.get("shared_expert_intermediate_size", 0)
    routing, warnings = _routing(config)
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


def _routing(config: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    """How experts are chosen and weighed; a warning where Megatron-core chooses groups of experts by other sums."""
    sigmoid = config.fields.get("scoring_func", "softmax") == "sigmoid"
    chosen, normalised, scale = config["num_experts_per_tok"], config["norm_topk_prob"], config.fields.get("routed_scaling_factor", 1.0)
    if (sigmoid and not normalised and chosen > 1) or (not sigmoid and normalised and scale != 1):
        raise UnsupportedError(
            "Megatron-core normalises sigmoid scores, and never scales softmax scores that are normalised",
            actual={"scoring_func": config["scoring_func"], "norm_topk_prob": normalised, "routed_scaling_factor": scale},
        )
    found: dict[str, Any] = {
        "moe_router_score_function": "sigmoid" if sigmoid else "softmax",
        "moe_router_pre_softmax": not sigmoid and not normalised,
    }
    if "scoring_func" not in config.fields:
        return found, []
    method, groups, kept = config["topk_method"], config["n_group"], config["topk_group"]
    grouped = method == "group_limited_greedy" or (method == "noaux_tc" and groups > 1)
    found |= {
        "moe_router_topk_scaling_factor": None if scale == 1 else scale,
        "moe_router_enable_expert_bias": method == "noaux_tc",
        "moe_router_num_groups": groups if grouped else None,
        "moe_router_group_topk": kept if grouped else None,
        "moe_router_dtype": "fp32",
    }
    best = 2 if method == "noaux_tc" else 1
    if grouped and chosen // kept != best and groups != kept:
        sums = f"by the sum of each group's best {chosen // kept}, transformers by its best {best}"
        return found, [f"Megatron-core ranks groups of experts {sums}: some tokens go to other experts"]
    return found, []


def experts_fields(arguments: Mapping[str, Any], layers: int, file: str) -> dict[str, Any]:
    """The canonical fields of experts and router.

    Raises
    ------
    ConfigError
        An argument is of no use; names it.
    """
    experts = arguments.get("num_experts")
    routing = _routing_fields(arguments)
    if experts is None:
        return {"num_experts": 0, "shared_expert_intermediate_size": 0, "shared_expert_gate": False, "dense_layers": False, **routing}
    valid({"num_hidden_layers": layers}, file)
    pattern = _pattern(arguments.get("moe_layer_freq", 1), layers, file)
    shared = _given(arguments, "moe_shared_expert_intermediate_size", 0)
    each = _given(arguments, "moe_ffn_hidden_size", arguments["ffn_hidden_size"])
    valid({"moe_intermediate_size": each, "shared_expert_intermediate_size": shared}, file)
    dense = [layer for layer, moe in enumerate(pattern) if not moe]
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
        "norm_topk_prob": not arguments.get("moe_router_pre_softmax", False),
        "num_nextn_predict_layers": _given(arguments, "mtp_num_layers", 0),
        "router_aux_loss_coef": arguments.get("moe_aux_loss_coeff", 0.0),
        "shared_expert_intermediate_size": shared,
        "shared_expert_gate": bool(shared) and bool(arguments.get("moe_shared_expert_gate", False)),
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        "dense_layers": bool(dense),
    }


def _routing_fields(arguments: Mapping[str, Any]) -> dict[str, Any]:
    unbiased = "greedy" if arguments.get("moe_router_num_groups") is None else "group_limited_greedy"
    return {
        "scoring_func": arguments.get("moe_router_score_function", "softmax"),
        "topk_method": "noaux_tc" if arguments.get("moe_router_enable_expert_bias") else unbiased,
        "n_group": _given(arguments, "moe_router_num_groups", 1),
        "topk_group": _given(arguments, "moe_router_group_topk", 1),
        "routed_scaling_factor": _given(arguments, "moe_router_topk_scaling_factor", 1.0),
    }


def _given(arguments: Mapping[str, Any], name: str, usual: Any) -> Any:
    """An argument, or what Megatron takes for None."""
    value = arguments.get(name)
    return usual if value is None else value


def _pattern(freq: Any, layers: int, file: str) -> Sequence[int]:
    """1 for each layer with experts; a number n means every n-th layer, from the first."""
    if isinstance(freq, int) and not isinstance(freq, bool) and freq > 0:
        return [int(layer % freq == 0) for layer in range(layers)]
    if isinstance(freq, list | tuple) and len(freq) == layers and all(n in (0, 1) for n in freq):
        return freq
    raise ConfigError(
        "args.moe_layer_freq is no pattern of the layers", file=file, expected=f"a number, or {layers} of 0 and 1", actual=short(freq)
    )
