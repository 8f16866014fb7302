"""Megatron's ``args`` as an argument list for a launch script: one flag to a line, quoted as a shell wants it.

``xargs -a megatron_args.txt torchrun … pretrain_gpt.py --load DIR`` starts Megatron-LM on the target; the checkpoint's own
``args`` say the same, but Megatron reads only some of them back (``load_args_from_checkpoint``), and only when asked.

1. A value is ``--its-name value``; true is ``--its-name``; false and None, being Megatron's defaults, are nothing.
2. What Megatron's parser spells otherwise, or works out from other flags, is in the tables below.
3. What no flag can say is left to `unsaid`, unless it is what Megatron takes anyway.

Source: Megatron-LM core_v0.16.1 ``training/arguments.py`` and core ``TransformerConfig`` (whose fields become flags). The flags
are called the same in core_v0.13 to core_v0.19, but that ``--moe-shared-expert-gate`` is new in core_v0.16.
Boundary: dictionaries in, text out.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["FILE_NAME", "argument_list", "unsaid", "with_newer_names"]

FILE_NAME = "megatron_args.txt"

_FALSE = {
    "add_bias_linear": "--disable-bias-linear", "add_position_embedding": "--no-position-embedding",
    "bias_gelu_fusion": "--no-bias-gelu-fusion", "bias_swiglu_fusion": "--no-bias-swiglu-fusion",
    "bias_dropout_fusion": "--no-bias-dropout-fusion", "apply_rope_fusion": "--no-rope-fusion",
    "masked_softmax_fusion": "--no-masked-softmax-fusion",
}  # fmt: skip
"""Arguments that are true unless a flag says otherwise."""
_NEWER = {"norm_epsilon": "layernorm_epsilon", "apply_layernorm_1p": "layernorm_zero_centered_gamma"}
"""What core_v0.16 calls two arguments of the versions before; the flags kept their names."""
_NO_FLAG = {
    "params_dtype",                           # --bf16, --fp16
    "padded_vocab_size",                      # --vocab-size and --make-vocab-size-divisible-by
    "virtual_pipeline_model_parallel_size",   # --num-layers-per-virtual-pipeline-stage or --pipeline-model-parallel-layout
    "use_mcore_models",                       # always so; the flag is deprecated
    "consumed_train_samples", "consumed_valid_samples", "iteration",   # a run's state
    *_NEWER.values(),
    # YaRN outside latent attention, which `megatron_sinks` warns of: fields of core's configs that its parser lacks
    "yarn_rotary_scaling_factor", "yarn_original_max_position_embeddings", "yarn_beta_fast", "yarn_beta_slow", "yarn_mscale",
    "yarn_mscale_all_dim", "yarn_correction_range_round_to_int",
}  # fmt: skip
_WHOLE = {"rotary_base"}
"""Numbers that the parser wants without a point."""
_FIXED = {"original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
"""Fields of core's ``MLATransformerConfig`` that have no flag, and their values there."""


def with_newer_names(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with what newer versions call some of them beside the older names, whichever are there.

    >>> with_newer_names({"norm_epsilon": 1e-5}) == with_newer_names({"layernorm_epsilon": 1e-5})
    True
    """
    found = dict(arguments)
    for older, newer in _NEWER.items():
        for name, other in ((older, newer), (newer, older)):
            if name in arguments:
                found.setdefault(other, arguments[name])
    return found


def argument_list(arguments: Mapping[str, Any]) -> str:
    """The lines.

    >>> print(argument_list({"num_layers": 2, "add_bias_linear": False, "swiglu": True, "window_size": (63, 0)}), end="")
    --num-layers 2
    --disable-bias-linear
    --swiglu
    --window-size 63,0
    """
    return "".join(f"{line}\n" for line in _lines(arguments))


def unsaid(arguments: Mapping[str, Any]) -> list[str]:
    """Warnings about arguments that no flag can say, and that are not what Megatron takes without one.

    >>> unsaid({"beta_fast": 16.0, "beta_slow": 1.0, "num_layers": 2})
    ['no flag of Megatron-LM says beta_fast = 16.0: it would take 32; set it in the launching code']
    """
    found = [(name, usual) for name, usual in _FIXED.items() if arguments.get(name, usual) != usual]
    found += [(name, int(arguments[name])) for name in sorted(_WHOLE) if _fraction(arguments.get(name))]
    return [
        f"no flag of Megatron-LM says {name} = {arguments[name]!r}: it would take {usual}; set it in the launching code"
        for name, usual in found
    ]


def _fraction(value: Any) -> bool:
    return isinstance(value, float) and not value.is_integer()


def _lines(arguments: Mapping[str, Any]) -> Iterator[str]:
    for name, value in arguments.items():
        if name in _NO_FLAG or name in _FIXED or value is None:
            continue
        flag = "--" + name.replace("_", "-")
        if name in _FALSE:
            if not value:
                yield _FALSE[name]
        elif isinstance(value, bool):
            if value:
                yield flag
        else:
            yield f"{flag} {shlex.quote(_spelled(name, value))}"


def _spelled(name: str, value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if name == "position_embedding_type" and value == "yarn":
        return "rope"  # the parser's nearest choice; the model takes "yarn" from code alone
    if name in _WHOLE and isinstance(value, float):
        return str(int(value))  # `unsaid` tells of a fraction
    return str(value)
