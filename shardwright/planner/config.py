"""The canonical model config, and how Hugging Face's config.json spells it; `megatron_args` has Megatron's spelling.

A `ModelConfig` is a family's name and the fields that its table declares, under Hugging Face's names where it has one.
Nothing is defaulted in silence: a field comes from the file, or from the default that the family's table gives for an
absent key (what transformers itself assumes), or the config is refused.

* ``config.json`` → canonical: `from_huggingface`; back: `to_huggingface`, which edits the original where it travelled
  along and otherwise writes one from the fields. RoPE is read in both spellings (``rope_theta`` + ``rope_scaling``;
  ``rope_parameters``) and written in both.

Boundary: dictionaries in, dictionaries out.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, UnknownFamilyError, UnsupportedError, short
from .layout import MOST_LAYERS
from .tables import FAMILIES, ConfigRule, Family

__all__ = [
    "ModelConfig",
    "carried_method",
    "family_of",
    "from_huggingface",
    "infer_family",
    "is_number",
    "layer_scope",
    "misfit",
    "to_huggingface",
    "valid",
]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A family's name and its canonical fields.

    >>> ModelConfig("llama", {"hidden_size": 64})["hidden_size"]
    64
    """

    family: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        try:
            return self.fields[name]
        except KeyError:
            raise ConfigError(
                f"the config of family {self.family!r} has no field {name!r}", remedy=f"Known: {', '.join(self.fields)}"
            ) from None


def family_of(raw: Mapping[str, Any], file: str = "config.json") -> Family:
    """The family that names this config's ``model_type``.

    Raises
    ------
    UnknownFamilyError
        None does; lists the nearest and says how to bring a table.
    """
    kind = raw.get("model_type")
    for family in FAMILIES:
        if kind in family.model_types:
            return family
    if not isinstance(kind, str):
        raise ConfigError("the config has no model_type", file=file, remedy="Name the family with --family")
    types = {name: family.name for family in FAMILIES for name in family.model_types}
    near = difflib.get_close_matches(kind, types, n=3, cutoff=0.4)
    hint = f"Nearest: {', '.join(near)}. " if near else ""
    advice = "Name the family whose tensors these are with --family NAME, or bring a table with --family FILE.toml (docs/families.md)"
    raise UnknownFamilyError(f"no family has the model_type {short(kind)}", file=file, remedy=f"{hint}Known: {', '.join(types)}. {advice}")


def from_huggingface(raw: Mapping[str, Any], family: Family, file: str = "config.json") -> ModelConfig:
    """The canonical config of a config.json.

    Raises
    ------
    ConfigError
        A key is missing without a default, has the wrong type, or RoPE's two spellings disagree.
    """
    plain = _plain_rope(raw, file)
    fields: dict[str, Any] = {}
    for rule in family.config:
        fields[rule.name] = _field(rule, plain, fields, file)
        _check_count(rule.name, fields, file)
    return ModelConfig(family.name, valid(fields, file))


def _field(rule: ConfigRule, raw: Mapping[str, Any], fields: Mapping[str, Any], file: str) -> Any:
    keys = [key for key in (rule.key, *rule.other_keys) if key is not None]
    found = {key: value for key in keys if (value := _at(raw, key)) is not None}
    if found:
        key, value = next(iter(found.items()))
        if other := next((k for k, v in found.items() if v != value), None):
            raise ConfigError(f"{key} and {other} disagree", file=file, expected=short(value), actual=short(found[other]))
        return value
    if rule.null is not None and any(key in raw for key in keys):
        return rule.null(fields)
    if rule.default is None:
        raise ConfigError(f"the config lacks {rule.key!r}", file=file, remedy="Complete it, or give another with --config")
    return rule.default(fields)


def _at(raw: Mapping[str, Any], key: str) -> Any:
    """The value under a key, dots leading into tables; None where there is none."""
    head, _, rest = key.partition(".")
    value = raw.get(head)
    return value if not rest else _at(value, rest) if isinstance(value, Mapping) else None


_COUNTS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step",
    "n_group", "topk_group", "sliding_window_pattern", "num_kv_heads", "word_embed_proj_dim",
    "num_ln_in_parallel_attn", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_layer_freq",
)  # fmt: skip
_SWITCHES = (
    "tie_word_embeddings", "qkv_bias", "attention_out_bias", "mlp_bias", "qk_norm", "norm_topk_prob", "shared_expert_gate",
    "gated_mlp", "parallel_residual", "new_decoder_architecture", "multi_query", "alibi", "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx", "do_layer_norm_before", "remove_final_layer_norm", "norm_affine",
    "apply_residual_connection_post_layernorm", "rope_interleave",
)  # fmt: skip
_NUMBERS = (
    "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_local_base_freq", "partial_rotary_factor", "query_pre_attn_scalar",
    "router_aux_loss_coef", "routed_scaling_factor", "swiglu_limit", "swiglu_alpha",
)  # fmt: skip
_NAMES = ("hidden_act", "activation", "normalization", "position_embedding_type", "scoring_func", "topk_method")
_WHOLE = {
    "first_k_dense_replace": "layers", "num_nextn_predict_layers": "layers", "position_offset": "rows", "n_shared_experts": "experts",
    "shared_expert_intermediate_size": "rows",
}  # fmt: skip
_LAYER_TYPES = ("sliding_attention", "full_attention")
_LARGEST_COUNT = 1 << 32
"""Extents are products of at most a few of these; layers are listed, so there may be fewer of them, as of experts."""
_MOST_EXPERTS = 1 << 18
"""Of all layers together."""
_MOST = {"num_hidden_layers": MOST_LAYERS, "num_experts": _MOST_EXPERTS}
_LARGEST_NUMBER = 1e300
_MOST_LOOKS = 1 << 24


def valid(fields: Mapping[str, Any], file: str) -> Mapping[str, Any]:
    """The fields, each of a type and size that a model can have.

    Raises
    ------
    ConfigError
        Names the field.
    """
    for name in fields:
        _check_count(name, fields, file)
    for name in _SWITCHES:
        if not isinstance(fields.get(name, False), bool):
            raise ConfigError(f"{name} must be true or false", file=file, actual=short(fields[name]))
    for name in _NUMBERS:
        if not is_number(value := fields.get(name, 1)):
            raise ConfigError(f"{name} must be a number", file=file, actual=short(value))
    for name in _NAMES:
        if not isinstance(fields.get(name, ""), str):
            raise ConfigError(f"{name} must be a name", file=file, actual=short(fields[name]))
    _check_scaling(fields.get("rope_scaling"), file)
    window = fields.get("sliding_window")
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or not abs(window) <= _LARGEST_COUNT):
        raise ConfigError("sliding_window must be an integer", file=file, actual=short(window))
    for name, what in _WHOLE.items():
        value = fields.get(name, 0)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LARGEST_COUNT:
            raise ConfigError(f"{name} must be a number of {what}", file=file, actual=short(value))
    _check_layers(fields, file)
    heads, groups = fields.get("num_attention_heads"), fields.get("num_key_value_heads")
    if heads and groups and heads % groups:
        raise ConfigError("key/value heads do not divide the attention heads", file=file, expected=f"a divisor of {heads}", actual=groups)
    _check_experts(fields, file)
    return fields


def is_number(value: Any) -> bool:
    """Whether it is a number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST_NUMBER


def _check_experts(fields: Mapping[str, Any], file: str) -> None:
    layers, experts, chosen = (fields.get(name, 0) for name in ("num_hidden_layers", "num_experts", "num_experts_per_tok"))
    if chosen > experts:
        raise ConfigError("a token is sent to more experts than there are", file=file, expected=f"at most {experts}", actual=chosen)
    if layers * experts > _MOST_EXPERTS:
        raise ConfigError(
            "more experts than any model has", file=file, expected=f"at most {_MOST_EXPERTS:,} in all layers", actual=layers * experts
        )
    # An expression of a table may look through a list once per layer.
    if long := next((name for name, value in fields.items() if isinstance(value, list) and len(value) * layers > _MOST_LOOKS), None):
        raise ConfigError(
            f"{long} is longer than any model's", file=file, expected=f"at most {_MOST_LOOKS // layers:,}", actual=len(fields[long])
        )


def _check_count(name: str, fields: Mapping[str, Any], file: str) -> None:
    if name not in _COUNTS:
        return
    value, most = fields[name], _MOST.get(name, _LARGEST_COUNT)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be a positive integer", file=file, actual=short(value))
    if value > most:
        raise ConfigError(f"{name} is larger than any model's", file=file, expected=f"at most {most:,}", actual=short(value))


def _check_scaling(scaling: Any, file: str) -> None:
    if scaling is None:
        return
    if not isinstance(scaling, Mapping) or not isinstance(scaling.get("rope_type"), str):
        raise ConfigError("rope_scaling must be an object with a rope_type", file=file, actual=short(scaling))
    factor = scaling.get("factor", 1.0)
    if not is_number(factor):
        raise ConfigError("the factor of rope_scaling must be a number", file=file, actual=short(factor))


def _check_layers(fields: Mapping[str, Any], file: str) -> None:
    """What the config says of single layers."""
    types, layers = fields.get("layer_types"), fields.get("num_hidden_layers")
    if types is not None and (not isinstance(types, list) or len(types) != layers or not all(kind in _LAYER_TYPES for kind in types)):
        raise ConfigError(
            "layer_types must name each layer's attention", file=file, expected=f"{layers} of {_LAYER_TYPES}", actual=short(types)
        )
    dense = fields.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in dense):
        raise ConfigError("mlp_only_layers must be a list of layer numbers", file=file, actual=short(dense))


def _plain_rope(raw: Mapping[str, Any], file: str) -> dict[str, Any]:
    """RoPE under its older spelling, whichever the file has: ``rope_theta``, ``rope_scaling``, ``partial_rotary_factor``, and
    ``rope_local_base_freq`` where layers with a window have a base of their own."""
    plain = dict(raw)
    parameters = raw.get("rope_parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise ConfigError("rope_parameters must be an object", file=file, actual=short(parameters))
    if isinstance(parameters, Mapping):
        found: dict[str, Any] = {}
        if "sliding_attention" in parameters:
            local, parameters = parameters["sliding_attention"], parameters.get("full_attention") or {}
            if not isinstance(local, Mapping) or not isinstance(parameters, Mapping):
                raise ConfigError("rope_parameters of a kind of layer must be an object", file=file, actual=short(raw["rope_parameters"]))
            found["rope_local_base_freq"] = local.get("rope_theta", raw.get("rope_local_base_freq"))
            if _scaling(local) is not None:
                raise ConfigError("RoPE is scaled in layers with a window, which no family here has", file=file, actual=short(local))
        if "partial_rotary_factor" in parameters:
            found["partial_rotary_factor"] = parameters["partial_rotary_factor"]
        found |= {"rope_theta": parameters.get("rope_theta", raw.get("rope_theta")), "rope_scaling": _scaling(parameters)}
        for key, value in found.items():
            other = _scaling(raw.get(key)) if key == "rope_scaling" else raw.get(key)
            if raw.get(key) is not None and other != value:
                raise ConfigError(f"rope_parameters and {key} disagree", file=file, expected=short(value), actual=short(raw[key]))
        plain.update(found)
    elif raw.get("rope_scaling") is not None:
        plain["rope_scaling"] = _scaling(raw["rope_scaling"])
    return plain


def _scaling(scaling: Any) -> Any:
    """``{"rope_type": …, …}``; None for plain RoPE. What is no object stays as it is: `valid` refuses it."""
    if not isinstance(scaling, Mapping):
        return scaling
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    elsewhere = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    return {"rope_type": kind, **{k: v for k, v in scaling.items() if k not in elsewhere}}


def layer_scope(family: Family, fields: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """`fields` with ``layer`` and the family's words for it."""
    found = {**fields, "layer": layer}
    return {**found, **{name: word(found) for name, word in family.layer_words}}


def to_huggingface(config: ModelConfig, family: Family, dtype: str, base: Mapping[str, Any] | None) -> dict[str, Any]:
    """A config.json for `config`: the original with what changed, or a new one.

    Parameters
    ----------
    dtype
        Main floating dtype of the target.
    base
        The source's own config.json, where it travelled along.
    """
    if base is not None and base.get("model_type") in family.model_types:
        made = {k: v for k, v in base.items() if k != "quantization_config" or carried_method(base, family)}
        key = "torch_dtype" if "torch_dtype" in made and "dtype" not in made else "dtype"
        if made.get(key) != dtype:
            made[key] = dtype
        if made.get("vocab_size") != config["vocab_size"]:
            made["vocab_size"] = config["vocab_size"]
        return made
    made = {"architectures": [family.architecture], "model_type": family.model_types[0]}
    for rule in family.config:
        value = config[rule.name]
        if rule.key is None:
            _expect_fixed(rule, value, config)
        elif made.get(rule.key, value) != value:
            raise UnsupportedError(
                f"config.json of family {family.name!r} has one key {rule.key!r} for two settings that differ",
                expected=made[rule.key],
                actual=value,
            )
        elif "." in rule.key:
            _put(made, rule.key, value)
        elif rule.key not in _ROPE:
            made[rule.key] = value
    if "rope_theta" in config.fields:
        made.update(_both_ropes(config))
    return {**made, "torch_dtype": dtype, "dtype": dtype}


def _put(made: dict[str, Any], key: str, value: Any) -> None:
    """Set the value under a key with dots; None leaves no tables."""
    head, _, rest = key.partition(".")
    if not rest:
        made[head] = value
    elif value is not None:
        _put(made.setdefault(head, {}), rest, value)


def carried_method(raw: Mapping[str, Any] | None, family: Family) -> str | None:
    """The config's quantisation method, if the family's table lists its tensors: they are carried as they are stored."""
    method = _at(raw or {}, "quantization_config.quant_method")
    return method if method in family.carries else None


def _expect_fixed(rule: ConfigRule, value: Any, config: ModelConfig) -> None:
    fixed = rule.default(config.fields) if rule.default else None
    if value != fixed:
        raise UnsupportedError(f"family {config.family!r} fixes {rule.name}", expected=fixed, actual=value, remedy="Name another --family")


_ROPE = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq")


def _both_ropes(config: ModelConfig) -> dict[str, Any]:
    plain = {key: config[key] for key in _ROPE if key in config.fields}
    scaling, local = plain.setdefault("rope_scaling", None), plain.get("rope_local_base_freq")
    parameters = {"rope_theta": plain["rope_theta"], **(scaling or {"rope_type": "default"})}
    if "partial_rotary_factor" in plain:
        parameters["partial_rotary_factor"] = plain["partial_rotary_factor"]
    if local is not None:
        parameters = {"full_attention": parameters, "sliding_attention": {"rope_theta": local, "rope_type": "default"}}
    return {**plain, "rope_parameters": parameters}


_WORDS = ("true", "false", "none")


def misfit(family: Family, fields: Mapping[str, Any], usual: Mapping[str, Any]) -> tuple[str, Any] | None:
    """A field in which a model of these fields is not of this family, and what the family has.

    `usual` names the fields and what a family has that does not declare them. Those that the family reads from its config, or
    that follow from such, fit.
    """
    rules = {rule.name: rule for rule in family.config}
    for name, common in usual.items():
        rule = rules.get(name)
        if rule is not None and (rule.key is not None or rule.default is None or rule.default.names - set(fields) - set(_WORDS)):
            continue
        wanted = common if rule is None or rule.default is None else rule.default(fields)
        if fields.get(name, common) != wanted:
            return name, wanted
    return None


def infer_family(fields: Mapping[str, Any], file: str, usual: Mapping[str, Any] | None = None) -> Family:
    """The one family whose ``infer`` condition holds, and which these fields fit (`misfit`).

    Raises
    ------
    ConfigError
        None or several do.
    """
    told = [family for family in FAMILIES if family.infer.names <= set(fields) | set(_WORDS) and family.infer(fields)]
    found = [family for family in told if misfit(family, fields, usual or {}) is None]
    if len(found) != 1:
        raise ConfigError(
            "the family cannot be told from the args", file=file, actual=[f.name for f in found], remedy="Name it with --family"
        )
    return found[0]
