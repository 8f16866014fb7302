"""What shardwright must be told of the models that `deepspeed` trains: configs of the Megatron stacks, family tables of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import shardwright as sw
from tests.clients.deepspeed_stack import STACKS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.clients.deepspeed import Run

__all__ = ["BUFFERS", "opened"]

BUFFERS = ("extra_*",)
"""The harness registers these in Hugging Face's models; no family knows them."""

_HEAD = """
name = "{name}"
model_types = ["{name}"]
architecture = "None"

[config]
num_hidden_layers = {{ key = "num_hidden_layers" }}
vocab_size = {{ key = "vocab_size" }}
"""


def _tensor(name: str, shape: list[int], more: str = "") -> str:
    extents = ", ".join(f'"{n}"' for n in shape)
    return f'\n[[tensor]]\nname = "{name}"\nshape = [{extents}]\n{more}'


_UNEVEN = {
    "embed.weight": [11, 7], "gain": [1], "mix.weight": [5, 7], "shift": [2], "out.weight": [3, 5], "out.bias": [3], "head.weight": [11, 3],
    "head.bias": [11],
}  # fmt: skip
_DENSE = {"embed.weight": [131, 12], "dense.weight": [12, 12], "dense.bias": [12], "head.weight": [131, 12]}
_MOE = "moe.{layer}.deepspeed_moe"
_EXPERT = {"0.weight": [20, 12], "0.bias": [20], "2.weight": [12, 20], "2.bias": [12]}
_RESIDUAL = {
    **{f"mlp.{key}": shape for key, shape in _EXPERT.items()}, "coefficient.weight": [2, 12], "coefficient.bias": [2],
}  # fmt: skip


def _tables() -> dict[str, str]:
    experts = "".join(_tensor(name, shape) for name, shape in _DENSE.items()) + _tensor(f"{_MOE}.gate.wg.weight", [4, 12])
    experts += "".join(_tensor(f"{_MOE}.experts.deepspeed_experts.{{expert}}.{key}", shape) for key, shape in _EXPERT.items())
    experts += "".join(_tensor(f"moe.{{layer}}.{key}", shape, 'when = "layer == 1"\n') for key, shape in _RESIDUAL.items())
    uneven = "".join(_tensor(name, shape) for name, shape in _UNEVEN.items())
    counted = 'num_experts = { key = "num_experts" }\n'
    return {"uneven": _HEAD.format(name="uneven") + uneven, "experts": _HEAD.format(name="experts") + counted + experts}


_CONFIGS = {
    "uneven": {"model_type": "uneven", "num_hidden_layers": 1, "vocab_size": 11},
    "experts": {"model_type": "experts", "num_hidden_layers": 2, "vocab_size": 131, "num_experts": 4},
}


def _stack_config(name: str) -> dict[str, Any]:
    stack = STACKS[name]
    common: dict[str, Any] = {"vocab_size": stack.vocab, "layer_norm_epsilon": 1e-5, "n_head": stack.heads, "n_layer": stack.layers}
    if stack.alibi:
        return common | {"model_type": "bloom", "hidden_size": stack.hidden}
    return common | {"model_type": "gpt2", "n_embd": stack.hidden, "n_positions": stack.positions, "tie_word_embeddings": stack.tied}


def opened(run: Run, folder: Path, scratch: Path) -> sw.Checkpoint:
    """A checkpoint of that run's model in `folder`, with what its files do not say; `scratch` is for tables."""
    model = run.job.model
    if model in STACKS:
        return sw.open(folder, config=_stack_config(model))
    if model in _CONFIGS:
        table = scratch / f"{model}.toml"
        table.write_text(_tables()[model])
        return sw.open(folder, family=table, config=_CONFIGS[model])
    return sw.open(folder, config=run.folder / "config.json")
