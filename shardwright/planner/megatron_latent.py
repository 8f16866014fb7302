"""Multi-head latent attention in Megatron's ``args``, and back.

Argument names are those of Megatron-core's ``MLATransformerConfig`` (transformer/transformer_config.py), which Megatron-LM
fills from ``args`` of the same names. YaRN: ``mscale`` and ``mscale_all_dim`` mean what transformers means by them where both
are there; where it has neither, 1 and 0 say the same (transformers ``modeling_rope_utils._compute_yarn_parameters`` and
``yarn_apply_mscale``; Megatron-core ``yarn_rotary_pos_embedding._yarn_get_concentration_factor`` and
``multi_latent_attention``). Boundary: dictionaries in, dictionaries out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .config import ModelConfig

__all__ = ["latent_fields", "latent_to_megatron"]

_SIZES = {
    "q_lora_rank": "q_lora_rank", "kv_lora_rank": "kv_lora_rank", "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim", "v_head_dim": "v_head_dim",
}  # fmt: skip
_PLAIN: Mapping[str, Any] = {
    "rotary_scaling_factor": 1.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
    "mscale_all_dim": 0.0,
}  # fmt: skip
"""What no scaling is, and what Megatron assumes where ``args`` do not say (Megatron-LM training/arguments.py; Megatron-core)."""
_LATENT_EPS = 1e-6


def latent_to_megatron(config: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    """The arguments of latent attention, RoPE's among them, and warnings about what they cannot say."""
    scaling = config["rope_scaling"]
    warnings = []
    rope: Mapping[str, Any] | None = _PLAIN if scaling is None else _yarn(scaling)
    if rope is None:
        warnings.append(f"Megatron's latent attention cannot express this RoPE scaling; set it when you launch: {scaling}")
    if config["rms_norm_eps"] != _LATENT_EPS:
        warnings.append(
            f"transformers normalises latent queries, keys and values with an epsilon of {_LATENT_EPS}, Megatron with norm_epsilon, "
            f"{config['rms_norm_eps']}"
        )
    arguments = {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        **{name: config[field] for field, name in _SIZES.items()},
        "rope_type": "rope" if scaling is None or rope is None else "yarn",
        **(rope or _PLAIN),
    }
    return arguments, warnings


def _yarn(scaling: Mapping[str, Any]) -> dict[str, Any] | None:
    """Megatron's arguments for transformers' YaRN; None where they cannot say it."""
    known = {"rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
    plain = scaling["rope_type"] == "yarn" and set(scaling) <= known and scaling.get("truncate", True)
    both = bool(scaling.get("mscale")) and bool(scaling.get("mscale_all_dim"))
    if not plain or scaling.get("factor") is None or (scaling.get("mscale_all_dim") and not both):
        return None
    return {
        "rotary_scaling_factor": float(scaling["factor"]),
        "original_max_position_embeddings": scaling["original_max_position_embeddings"],
        "beta_fast": float(scaling.get("beta_fast") or 32),
        "beta_slow": float(scaling.get("beta_slow") or 1),
        "mscale": float(scaling["mscale"]) if both else 1.0,
        "mscale_all_dim": float(scaling["mscale_all_dim"]) if both else 0.0,
    }


def latent_fields(arguments: Mapping[str, Any], need: Callable[[str], Any]) -> dict[str, Any]:
    """The canonical fields of latent attention; `need` gives an argument that must be there."""
    sizes = {field: need(name) for field, name in _SIZES.items() if field != "q_lora_rank"}
    fields = {"mla": True, "rope_interleave": True, "qk_norm": False, "q_lora_rank": arguments.get("q_lora_rank"), **sizes}
    rope = {name: default if arguments.get(name) is None else arguments[name] for name, default in _PLAIN.items()}
    if (arguments.get("rope_type") or "yarn") == "rope" or rope["rotary_scaling_factor"] == 1:
        return {**fields, "rope_scaling": None}
    scaling = {
        "rope_type": "yarn",
        "factor": rope["rotary_scaling_factor"],
        **{name: rope[name] for name in ("original_max_position_embeddings", "beta_fast", "beta_slow")},
    }
    if rope["mscale_all_dim"] or rope["mscale"] != 1:
        scaling |= {name: rope[name] for name in ("mscale", "mscale_all_dim")}
    return {**fields, "rope_scaling": scaling}
