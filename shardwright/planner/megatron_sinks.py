"""GPT-OSS's attention and experts in Megatron's ``args``, and back.

A learned sink per head (``softmax_type learnable``), a sliding window in some layers (``window_attn_skip_freq``: n, every n-th
layer sees everything; a list, 1 for each layer that slides), experts with a clamped, shifted quick GELU. Source: Megatron-core
transformer/transformer_config.py, transformer/utils.py (``is_layer_window_attention``), fusions/fused_bias_geglu.py
(``quick_gelu``: its gain is 1.702), models/gpt/gpt_model.py (YaRN outside latent attention is read from the config's ``yarn_*``,
for which Megatron-LM has no arguments); Megatron-Bridge models/gpt_oss/gpt_oss_bridge.py.
Boundary: dictionaries in, dictionaries out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ConfigError, UnsupportedError, short
from .config import ModelConfig

__all__ = ["sinks_fields", "sinks_to_megatron"]

_GAIN = 1.702
_YARN = {
    "factor": "yarn_rotary_scaling_factor", "original_max_position_embeddings": "yarn_original_max_position_embeddings",
    "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "truncate": "yarn_correction_range_round_to_int",
}  # fmt: skip
_UNSAID = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
"""What transformers assumes (modeling_rope_utils._compute_yarn_parameters)."""


def sinks_to_megatron(config: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    """The arguments that set this model apart, and warnings about what Megatron-LM cannot be told.

    Raises
    ------
    UnsupportedError
        The activation's gain is not Megatron-core's.
    """
    if config["swiglu_alpha"] != _GAIN:
        raise UnsupportedError("Megatron-core's quick GELU has a fixed gain", expected=_GAIN, actual=config["swiglu_alpha"])
    arguments = {
        "softmax_type": "learnable",
        "swiglu": False,
        "quick_geglu": True,
        "glu_linear_offset": 1.0,
        "activation_func_clamp_value": config["swiglu_limit"],
        "window_attn_skip_freq": _skip(config["layer_types"], config["num_hidden_layers"]),
    }
    scaling = config["rope_scaling"]
    if scaling is None or scaling["rope_type"] != "yarn" or not set(scaling) <= {"rope_type", *_YARN}:
        return arguments, []
    yarn = {name: scaling.get(field, _UNSAID.get(field)) for field, name in _YARN.items()}
    arguments |= {"position_embedding_type": "yarn", **yarn, "yarn_mscale": None, "yarn_mscale_all_dim": None}
    told = {"position_embedding_type": "yarn", **yarn}
    return arguments, [f"Megatron-LM has no arguments for YaRN here; set Megatron-core's config when you launch: {told}"]


def _skip(kinds: list[str] | None, layers: int) -> int | list[int]:
    """2 for layers that slide and see everything in turn; else 1 for each that slides."""
    found = [1, 0] * (layers // 2 + 1) if kinds is None else [int(kind == "sliding_attention") for kind in kinds]
    return 2 if found[:layers] == ([1, 0] * layers)[:layers] else found


def sinks_fields(arguments: Mapping[str, Any], need: Callable[[str], Any], file: str) -> dict[str, Any]:
    """The canonical fields of `sinks_to_megatron`; `need` gives an argument that must be there.

    Raises
    ------
    UnsupportedError
        Another activation.
    ConfigError
        ``window_attn_skip_freq`` is no pattern of the layers.
    """
    if not arguments.get("quick_geglu") or arguments.get("glu_linear_offset", 0.0) != 1:
        raise UnsupportedError("no family here has sinks with this activation", file=file, expected="quick_geglu, glu_linear_offset 1.0")
    layers, skip = need("num_layers"), need("window_attn_skip_freq")
    slides = [int(n % skip != 0) for n in range(1, layers + 1)] if isinstance(skip, int) and skip > 0 else skip
    if not isinstance(slides, list) or len(slides) != layers:
        raise ConfigError("args.window_attn_skip_freq is no pattern of the layers", file=file, actual=short(skip))
    fields = {
        "sinks": True,
        "gated_mlp": True,
        "hidden_act": "silu",
        "position_embedding_type": "rope",
        "swiglu_alpha": _GAIN,
        "swiglu_limit": need("activation_func_clamp_value"),
        "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
        "quant_method": None,
    }
    if need("position_embedding_type") != "yarn":
        return fields
    return {**fields, "rope_scaling": {"rope_type": "yarn", **{field: need(name) for field, name in _YARN.items()}}}
