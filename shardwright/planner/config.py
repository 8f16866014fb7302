"""The canonical model config, and its two spellings: Hugging Face's config.json and Megatron's args.

A `ModelConfig` is a family's name and the fields that its table declares, under Hugging Face's names where it has one.
Nothing is defaulted in silence: a field comes from the file, or from the default that the family's table gives for an
absent key (what transformers itself assumes), or the config is refused.

* ``config.json`` → canonical: `from_huggingface`; back: `to_huggingface`, which edits the original where it travelled
  along and otherwise writes one from the fields. RoPE is read in both spellings (``rope_theta`` + ``rope_scaling``;
  ``rope_parameters``) and written in both.
* Megatron ``args`` → canonical: `from_megatron`; back: `to_megatron`. What Megatron cannot express is refused.

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

__all__ = ["ModelConfig", "family_of", "from_huggingface", "from_megatron", "infer_family", "to_huggingface", "to_megatron", "valid"]


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
    advice = "Name the family whose tensors these are with --family NAME, or bring a table with --family FILE.toml"
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
    if rule.key is not None and raw.get(rule.key) is not None:
        return raw[rule.key]
    if rule.default is None:
        raise ConfigError(f"the config lacks {rule.key!r}", file=file, remedy="Complete it, or give another with --config")
    return rule.default(fields)


_COUNTS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
_SWITCHES = ("tie_word_embeddings", "qkv_bias", "attention_out_bias", "mlp_bias", "qk_norm")
_NUMBERS = ("max_position_embeddings", "rms_norm_eps", "rope_theta")
_LARGEST_COUNT = 1 << 32
"""Extents are products of at most a few of these; layers are listed, so there may be fewer of them."""
_LARGEST_NUMBER = 1e300


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
        if not isinstance(value := fields.get(name, 1), int | float) or isinstance(value, bool) or not abs(value) <= _LARGEST_NUMBER:
            raise ConfigError(f"{name} must be a number", file=file, actual=short(value))
    if not isinstance(act := fields.get("hidden_act", ""), str):
        raise ConfigError("hidden_act must be a name", file=file, actual=short(act))
    _check_scaling(fields.get("rope_scaling"), file)
    window = fields.get("sliding_window")
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or not abs(window) <= _LARGEST_COUNT):
        raise ConfigError("sliding_window must be an integer", file=file, actual=short(window))
    heads, groups = fields.get("num_attention_heads"), fields.get("num_key_value_heads")
    if heads and groups and heads % groups:
        raise ConfigError("key/value heads do not divide the attention heads", file=file, expected=f"a divisor of {heads}", actual=groups)
    return fields


def _check_count(name: str, fields: Mapping[str, Any], file: str) -> None:
    if name not in _COUNTS:
        return
    value, most = fields[name], MOST_LAYERS if name == "num_hidden_layers" else _LARGEST_COUNT
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
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not abs(factor) <= _LARGEST_NUMBER:
        raise ConfigError("the factor of rope_scaling must be a number", file=file, actual=short(factor))


def _plain_rope(raw: Mapping[str, Any], file: str) -> dict[str, Any]:
    """RoPE under its older spelling, whichever the file has."""
    plain = dict(raw)
    parameters = raw.get("rope_parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise ConfigError("rope_parameters must be an object", file=file, actual=short(parameters))
    if isinstance(parameters, Mapping):
        scaling = {k: v for k, v in parameters.items() if k != "rope_theta"}
        found = {"rope_theta": parameters.get("rope_theta", raw.get("rope_theta")), "rope_scaling": _scaling(scaling)}
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
    return {"rope_type": kind, **{k: v for k, v in scaling.items() if k not in ("rope_type", "type", "rope_theta")}}


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
        made = {k: v for k, v in base.items() if k != "quantization_config"}
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
        elif rule.key not in ("rope_theta", "rope_scaling"):
            made[rule.key] = value
    if "rope_theta" in config.fields:
        made.update(_both_ropes(config))
    return {**made, "torch_dtype": dtype, "dtype": dtype}


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


_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Megatron-core's ``use_rope_scaling`` hard-codes (models/common/embeddings/rotary_pos_embedding.py)."""


def to_megatron(config: ModelConfig) -> tuple[dict[str, Any], list[str]]:
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
    window = config.fields.get("sliding_window")
    arguments = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "kv_channels": config["head_dim"],
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
        "num_experts": None,
    }
    return arguments, warnings


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

    def need(name: str) -> Any:
        if arguments.get(name) is None:
            raise ConfigError(f"the checkpoint's args lack {name!r}", file=file, remedy="Give --family and --config config.json")
        return arguments[name]

    for name, wanted in (("normalization", "RMSNorm"), ("position_embedding_type", "rope"), ("swiglu", True)):
        if need(name) != wanted:
            raise UnsupportedError(f"no family here has args.{name} = {short(arguments[name])}", file=file, expected=wanted)
    for name, usual in {"rotary_percent": 1.0, "rotary_interleaved": False, "num_experts": None, "apply_layernorm_1p": False}.items():
        if arguments.get(name, usual) != usual:
            raise UnsupportedError(f"no family here has args.{name} = {short(arguments[name])}", file=file, expected=usual)
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
        "hidden_act": "silu",
        "tie_word_embeddings": not arguments.get("untie_embeddings_and_output_weights", False),
        "rope_theta": _float(need("rotary_base"), "rotary_base", file),
        "rope_scaling": _rope_from_megatron(arguments, file),
        "qkv_bias": linear_bias or bool(arguments.get("add_qkv_bias")),
        "attention_out_bias": linear_bias,
        "mlp_bias": linear_bias,
        "qk_norm": bool(arguments.get("qk_layernorm")),
        "sliding_window": _window(arguments.get("window_size"), file),
    }
    valid(fields, file)
    found = family or infer_family(fields, file)
    return ModelConfig(found.name, {rule.name: fields[rule.name] for rule in found.config})


def _quotient(size: Any, heads: Any, file: str) -> int:
    for name, value in (("hidden_size", size), ("num_attention_heads", heads)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a positive integer", file=file, actual=short(value))
    return int(size) // int(heads)


def _float(value: Any, name: str, file: str) -> float:
    if not isinstance(value, int | float) or not abs(value) <= _LARGEST_NUMBER:
        raise ConfigError(f"args.{name} must be a number", file=file, actual=short(value))
    return float(value)


def _window(size: Any, file: str) -> int | None:
    """Megatron counts the keys before a query, Hugging Face the query too; -1 is no window."""
    if not size or size == -1:
        return None
    if not isinstance(size, tuple | list) or not isinstance(size[0], int):
        raise ConfigError("args.window_size must be a pair of integers", file=file, actual=short(size))
    return None if size[0] < 0 else size[0] + 1


def _rope_from_megatron(arguments: Mapping[str, Any], file: str) -> dict[str, Any] | None:
    if arguments.get("use_rope_scaling"):
        return {
            "rope_type": "llama3",
            "factor": _float(arguments.get("rope_scaling_factor", 8.0), "rope_scaling_factor", file),
            **_LLAMA3_ROPE,
        }
    factor = arguments.get("rotary_seq_len_interpolation_factor")
    return None if factor is None else {"rope_type": "linear", "factor": _float(factor, "rotary_seq_len_interpolation_factor", file)}


def infer_family(fields: Mapping[str, Any], file: str) -> Family:
    """The one family whose ``infer`` condition holds.

    Raises
    ------
    ConfigError
        None or several do.
    """
    found = [family for family in FAMILIES if family.infer.names <= set(fields) | {"true", "false", "none"} and family.infer(fields)]
    if len(found) != 1:
        raise ConfigError(
            "the family cannot be told from the args", file=file, actual=[f.name for f in found], remedy="Name it with --family"
        )
    return found[0]
