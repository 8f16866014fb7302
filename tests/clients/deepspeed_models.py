"""Tiny models that real DeepSpeed trains, beside the Megatron stacks of `deepspeed_stack`.

- Hugging Face's own llama and gpt2, with a float and an integer buffer registered beside their parameters; ``llama_large`` has
  130 million of them.
- ``uneven``: parameters of 1, 2, 3 and 35 elements, which no number of ranks divides and some ranks get nothing of.
- ``experts``: a dense layer, then two of DeepSpeed's own mixture-of-experts layers, the second with a residual branch.

Values depend on the parameter's name only, so that every layout starts from the same model. Hugging Face's models give an
output with ``logits``, the others the logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from tests.clients import hf_models
from tests.clients.deepspeed_stack import STACKS, MegatronModel, TensorGroup, pipeline, values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from deepspeed.runtime.pipe import ProcessTopology

__all__ = ["HF", "MODELS", "build", "vocabulary"]

HF: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 44},
    "llama_tied": {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 44, "tie_word_embeddings": True},
    "llama_large": {"num_hidden_layers": 9, "hidden_size": 1024, "intermediate_size": 2816, "vocab_size": 12000},
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}
_UNEVEN_VOCAB = 11


def vocabulary(name: str) -> int:
    """Token ids that a model takes are below this."""
    return _UNEVEN_VOCAB if name == "uneven" else hf_models.VOCAB


def build(name: str, *, tensor: TensorGroup, topology: ProcessTopology | None, ep: int) -> nn.Module:
    """Build a model of `MODELS` or `STACKS`; a stack with a topology of more than one stage is a pipeline."""
    if name in STACKS:
        stack = STACKS[name]
        if topology is None or topology.get_dim("pipe") == 1:
            return MegatronModel(stack, tensor)
        return pipeline(stack, tensor, topology)
    model = MODELS[name](ep)
    _fill(model.named_parameters())
    return model


def _fill(parameters: Iterator[tuple[str, nn.Parameter]]) -> None:
    with torch.no_grad():
        for name, parameter in parameters:
            parameter.copy_(values(name, tuple(parameter.shape)))


def _hugging_face(name: str) -> nn.Module:
    """A transformers model under its own names."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    settings = {"vocab_size": hf_models.VOCAB, **common} if name == "gpt2" else hf_models.CASES[name.removesuffix("_large")].settings()
    config = AutoConfig.for_model(name.split("_")[0], **settings | HF[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    model.register_buffer("extra_scale", torch.linspace(-1, 1, 5))
    model.register_buffer("extra_steps", torch.tensor([3, 1, (1 << 40) + 1]))
    return model


class _Uneven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(_UNEVEN_VOCAB, 7)
        self.gain = nn.Parameter(torch.empty(1))
        self.mix = nn.Linear(7, 5, bias=False)
        self.shift = nn.Parameter(torch.empty(2))
        self.out = nn.Linear(5, 3)
        self.head = nn.Linear(3, _UNEVEN_VOCAB)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = functional.gelu(self.mix(self.embed(ids) * self.gain))
        return self.head(functional.gelu(self.out(hidden)) + self.shift.sum())


class _Experts(nn.Module):
    def __init__(self, ep: int, hidden: int = 12, experts: int = 4) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.embed = nn.Embedding(hf_models.VOCAB, hidden)
        self.dense = nn.Linear(hidden, hidden)
        self.moe = nn.ModuleList(
            MoE(
                hidden,
                _expert(hidden),
                num_experts=experts,
                ep_size=ep,
                k=1,
                capacity_factor=4.0,
                min_capacity=0,
                use_rts=False,
                use_residual=residual,
            )
            for residual in (False, True)
        )
        self.head = nn.Linear(hidden, hf_models.VOCAB, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = functional.gelu(self.dense(self.embed(ids)))
        for layer in self.moe:
            hidden = hidden + layer(hidden)[0]
        return self.head(hidden)


def _expert(hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(hidden, 20), nn.GELU(), nn.Linear(20, hidden))


MODELS: dict[str, Callable[[int], nn.Module]] = {
    **{name: (lambda _ep, name=name: _hugging_face(name)) for name in HF},
    "uneven": lambda _ep: _Uneven(),
    "experts": _Experts,
}
