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
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, UnknownFamilyError, UnsupportedError
from .tables import FAMILIES, ConfigRule, Family

__all__ = ["ModelConfig", "carried_method", "check_types", "family_of", "from_huggingface", "infer_family", "layer_scope", "to_huggingface"]


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
    raise UnknownFamilyError(f"no family has the model_type {kind!r}", file=file, remedy=f"{hint}Known: {', '.join(types)}. {advice}")


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
    check_types(fields, file)
    return ModelConfig(family.name, fields)


def _field(rule: ConfigRule, raw: Mapping[str, Any], fields: Mapping[str, Any], file: str) -> Any:
    keys = [key for key in (rule.key, *rule.other_keys) if key is not None]
    found = {key: value for key in keys if (value := _at(raw, key)) is not None}
    if found:
        key, value = next(iter(found.items()))
        if other := next((k for k, v in found.items() if v != value), None):
            raise ConfigError(f"{key} and {other} disagree", file=file, expected=value, actual=found[other])
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
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step", "shared_expert_intermediate_size",
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_layer_freq",
)  # fmt: skip
_SWITCHES = (
    "tie_word_embeddings",
    "qkv_bias",
    "attention_out_bias",
    "mlp_bias",
    "qk_norm",
    "norm_topk_prob",
    "shared_expert_gate",
    "rope_interleave",
)
_NUMBERS = (
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "router_aux_loss_coef",
    "routed_scaling_factor",
    "swiglu_limit",
    "swiglu_alpha",
)


def _check_count(name: str, fields: Mapping[str, Any], file: str) -> None:
    value = fields[name]
    if name in _COUNTS and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ConfigError(f"{name} must be a positive integer", file=file, actual=repr(value))


def check_types(fields: Mapping[str, Any], file: str) -> None:
    """Refuse fields of the wrong type, or that contradict each other.

    Raises
    ------
    ConfigError
        Names the field and its value.
    """
    for name in fields:
        _check_count(name, fields, file)
    for name in _SWITCHES:
        if not isinstance(fields.get(name, False), bool):
            raise ConfigError(f"{name} must be true or false", file=file, actual=repr(fields[name]))
    for name in _NUMBERS:
        if not isinstance(value := fields.get(name, 1), int | float) or isinstance(value, bool):
            raise ConfigError(f"{name} must be a number", file=file, actual=repr(value))
    scaling, window = fields.get("rope_scaling"), fields.get("sliding_window")
    if scaling is not None and not isinstance(scaling.get("factor", 1.0), int | float):
        raise ConfigError("the factor of rope_scaling must be a number", file=file, actual=repr(scaling["factor"]))
    if window is not None and (not isinstance(window, int) or isinstance(window, bool)):
        raise ConfigError("sliding_window must be an integer", file=file, actual=repr(window))
    dense = fields.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in dense):
        raise ConfigError("mlp_only_layers must be a list of layer numbers", file=file, actual=repr(dense))
    heads, groups = fields.get("num_attention_heads"), fields.get("num_key_value_heads")
    if heads and groups and heads % groups:
        raise ConfigError("key/value heads do not divide the attention heads", file=file, expected=f"a divisor of {heads}", actual=groups)
    chosen, experts = fields.get("num_experts_per_tok", 0), fields.get("num_experts", 0)
    if chosen > experts:
        raise ConfigError("a token is sent to more experts than there are", file=file, expected=f"at most {experts}", actual=chosen)


def _plain_rope(raw: Mapping[str, Any], file: str) -> dict[str, Any]:
    """RoPE under its older spelling, whichever the file has."""
    plain = dict(raw)
    parameters = raw.get("rope_parameters")
    if isinstance(parameters, Mapping):
        scaling = {k: v for k, v in parameters.items() if k != "rope_theta"}
        found = {"rope_theta": parameters.get("rope_theta", raw.get("rope_theta")), "rope_scaling": _scaling(scaling)}
        for key, value in found.items():
            other = _scaling(raw.get(key)) if key == "rope_scaling" else raw.get(key)
            if raw.get(key) is not None and other != value:
                raise ConfigError(f"rope_parameters and {key} disagree", file=file, expected=value, actual=raw[key])
        plain.update(found)
    elif raw.get("rope_scaling") is not None:
        plain["rope_scaling"] = _scaling(raw["rope_scaling"])
    return plain


def _scaling(scaling: Any) -> dict[str, Any] | None:
    """``{"rope_type": …, …}``; None for plain RoPE."""
    if not isinstance(scaling, Mapping):
        return None
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    return {"rope_type": kind, **{k: v for k, v in scaling.items() if k not in ("rope_type", "type", "rope_theta")}}


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
        elif rule.key not in ("rope_theta", "rope_scaling"):
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


def _both_ropes(config: ModelConfig) -> dict[str, Any]:
    theta, scaling = config["rope_theta"], config.fields.get("rope_scaling")
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": theta, **(scaling or {"rope_type": "default"})},
    }


def infer_family(fields: Mapping[str, Any], file: str, special: Collection[str] = ()) -> Family:
    """The one family whose ``infer`` condition holds, among those that have all fields of `special`.

    Raises
    ------
    ConfigError
        None or several do.
    """
    known = set(fields) | {"true", "false", "none"}
    able = [family for family in FAMILIES if set(special) <= {rule.name for rule in family.config}]
    found = [family for family in able if family.infer.names <= known and family.infer(fields)]
    if len(found) != 1:
        raise ConfigError(
            "the family cannot be told from the args", file=file, actual=[f.name for f in found], remedy="Name it with --family"
        )
    return found[0]
