"""Megatron-DeepSpeed's model in small, tensor parallel, as one module or as a pipeline of layers.

1. Each layer holds its tensor-parallel share under Megatron-DeepSpeed's names, cut from values that depend on the full
   tensor's name only: every layout starts from the same model.
2. ``bloom`` is BLOOM: a norm after the embedding, ALiBi, and two layers without weights that shift the numbers of the layer
   files. ``gpt`` has learned positions, ``gpt_untied`` a head of its own. In ``bloom_drift`` the copies on tensor-parallel
   ranks start a little apart, as those of the real one ended.
3. `universal_info` is what Megatron-DeepSpeed tells ``ds_to_universal`` about its parameters. `join` and `huggingface` say
   the same in plain torch, as a definition to compare with.
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from tests.clients import hf_models

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deepspeed.runtime.pipe import PipelineModule, ProcessTopology

__all__ = ["STACKS", "MegatronModel", "Stack", "TensorGroup", "huggingface", "join", "loss", "pipeline", "universal_info", "values"]


@dataclasses.dataclass(frozen=True)
class TensorGroup:
    """The ranks that share each layer: this one's number, how many, and their process group."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None


@dataclasses.dataclass(frozen=True)
class Stack:
    """A Megatron-DeepSpeed model."""

    layers: int = 3
    hidden: int = 24
    heads: int = 4
    vocab: int = hf_models.VOCAB
    divisible_by: int = 8
    positions: int = 32
    alibi: bool = False
    tied: bool = True
    drift: float = 0.0
    """How far copies on tensor-parallel ranks start apart."""

    def padded_vocab(self, tp: int) -> int:
        """Rows of the vocabulary that all tensor-parallel ranks hold together."""
        multiple = self.divisible_by * tp
        return -(-self.vocab // multiple) * multiple


STACKS = {
    "bloom": Stack(alibi=True),
    "bloom_drift": Stack(alibi=True, drift=1e-3),
    "gpt": Stack(),
    "gpt_untied": Stack(tied=False),
}


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next token, in float32."""
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())


def values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """What a parameter starts with: distinct values that depend on its name; vectors of weights are around 1."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if len(shape) == 1:
        return 0.1 * noise + (0 if name.endswith("bias") else 1)
    return noise * 0.8 / shape[-1] ** 0.5


class _Copy(torch.autograd.Function):
    """The same value on all ranks; their gradients are added."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, tensor: TensorGroup) -> torch.Tensor:
        ctx.tensor = tensor
        return value

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _sum(gradient, ctx.tensor), None


class _Reduce(torch.autograd.Function):
    """Partial values are added; the gradient goes to every rank as it is."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, tensor: TensorGroup) -> torch.Tensor:
        return _sum(value, tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    """Parts of the last dimension are joined; each rank's part of the gradient goes back to it."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, tensor: TensorGroup) -> torch.Tensor:
        ctx.tensor = tensor
        if tensor.size == 1:
            return value
        parts = [torch.empty_like(value) for _ in range(tensor.size)]
        dist.all_gather(parts, value.contiguous(), group=tensor.group)
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.chunk(ctx.tensor.size, -1)[ctx.tensor.rank].contiguous(), None


def _sum(value: torch.Tensor, tensor: TensorGroup) -> torch.Tensor:
    if tensor.size > 1:
        value = value.contiguous().clone()
        dist.all_reduce(value, group=tensor.group)
    return value


class _Part(nn.Module):
    """A linear layer's or an embedding's share: cut along ``dim`` of the weight; the bias is cut only with the rows."""

    def __init__(self, name: str, shape: tuple[int, int], dim: int, tensor: TensorGroup, *, bias: bool = True) -> None:
        super().__init__()
        self.tensor = tensor
        self.weight = nn.Parameter(values(f"{name}.weight", shape).chunk(tensor.size, dim)[tensor.rank].contiguous())
        self.weight.tensor_model_parallel = True
        if bias:
            bias_values = values(f"{name}.bias", shape[:1])
            self.bias = nn.Parameter(bias_values.chunk(tensor.size)[tensor.rank].contiguous() if dim == 0 else bias_values)
            self.bias.tensor_model_parallel = dim == 0


class _Column(_Part):
    def __init__(self, name: str, shape: tuple[int, int], tensor: TensorGroup) -> None:
        super().__init__(name, shape, 0, tensor)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return functional.linear(_Copy.apply(value, self.tensor), self.weight, self.bias)


class _Row(_Part):
    def __init__(self, name: str, shape: tuple[int, int], tensor: TensorGroup) -> None:
        super().__init__(name, shape, 1, tensor)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return _Reduce.apply(functional.linear(value, self.weight), self.tensor) + self.bias


class _Vocabulary(_Part):
    """Rows of the padded vocabulary: looks ids up, or gives logits."""

    def __init__(self, name: str, stack: Stack, tensor: TensorGroup) -> None:
        super().__init__(name, (stack.padded_vocab(tensor.size), stack.hidden), 0, tensor, bias=False)
        with torch.no_grad():  # the rows of the true vocabulary are the same whatever the padding
            rows = torch.cat([values(name, (stack.vocab, stack.hidden)), torch.full((len(self.weight) * tensor.size, stack.hidden), 0.25)])
            self.weight.copy_(rows[len(self.weight) * tensor.rank :][: len(self.weight)])
        self.vocab = stack.vocab

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        local = ids - len(self.weight) * self.tensor.rank
        here = (local >= 0) & (local < len(self.weight))
        found = functional.embedding(local.clamp(0, len(self.weight) - 1), self.weight) * here.unsqueeze(-1)
        return _Reduce.apply(found, self.tensor)

    def logits(self, value: torch.Tensor) -> torch.Tensor:
        parts = functional.linear(_Copy.apply(value, self.tensor), self.weight)
        return _Gather.apply(parts, self.tensor)[..., : self.vocab]


class _Norm(nn.LayerNorm):
    """A copy on each tensor-parallel rank, which may have drifted from the others."""

    def __init__(self, name: str, stack: Stack, tensor: TensorGroup) -> None:
        super().__init__(stack.hidden)
        drift = torch.randn(stack.hidden, generator=torch.Generator().manual_seed(tensor.rank)) * stack.drift
        with torch.no_grad():
            self.weight.copy_(values(f"{name}.weight", (stack.hidden,)) + drift)
            self.bias.copy_(values(f"{name}.bias", (stack.hidden,)) - drift)


class _Embedding(nn.Module):
    def __init__(self, stack: Stack, tensor: TensorGroup) -> None:
        super().__init__()
        self.word_embeddings = _Vocabulary("word_embeddings", stack, tensor)
        if stack.alibi:
            self.word_embeddings.norm = _Norm("word_embeddings.norm", stack, tensor)
        else:
            self.position_embeddings = nn.Embedding(stack.positions, stack.hidden)
            with torch.no_grad():
                self.position_embeddings.weight.copy_(values("position_embeddings", (stack.positions, stack.hidden)))

    @property
    def word_embeddings_weight(self) -> nn.Parameter:
        """What the tied head uses."""
        return self.word_embeddings.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found = self.word_embeddings(ids)
        if hasattr(self, "position_embeddings"):
            return found + self.position_embeddings(torch.arange(ids.shape[-1], device=ids.device))
        return self.word_embeddings.norm(found)


class _Head(nn.Module):
    def __init__(self, stack: Stack, tensor: TensorGroup) -> None:
        super().__init__()
        self.lm_head = _Vocabulary("lm_head", stack, tensor)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.lm_head.logits(value)


class _SelfAttention(nn.Module):
    """Rows of the fused projection: for each head its query, key and value, which Megatron calls version 2."""

    def __init__(self, name: str, stack: Stack, tensor: TensorGroup) -> None:
        super().__init__()
        h = stack.hidden
        self.query_key_value = _Column(f"{name}.query_key_value", (3 * h, h), tensor)
        self.dense = _Row(f"{name}.dense", (h, h), tensor)
        self.heads = stack.heads // tensor.size
        self.first = self.heads * tensor.rank
        self.stack = stack

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        query, key, content = self.query_key_value(value).unflatten(-1, (self.heads, 3, -1)).transpose(1, 2).unbind(-2)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        length = value.shape[1]
        if self.stack.alibi:
            slopes = torch.tensor([2.0 ** (-8 * (i + 1) / self.stack.heads) for i in range(self.stack.heads)])
            mine = slopes[self.first : self.first + self.heads].to(scores.dtype)
            scores = scores + mine[:, None, None] * torch.arange(length, dtype=scores.dtype)
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
        return self.dense((weights @ content).transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, name: str, stack: Stack, tensor: TensorGroup) -> None:
        super().__init__()
        h = stack.hidden
        self.dense_h_to_4h = _Column(f"{name}.dense_h_to_4h", (4 * h, h), tensor)
        self.dense_4h_to_h = _Row(f"{name}.dense_4h_to_h", (h, 4 * h), tensor)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(functional.gelu(self.dense_h_to_4h(value), approximate="tanh"))


class _Block(nn.Module):
    def __init__(self, number: int, stack: Stack, tensor: TensorGroup) -> None:
        super().__init__()
        self.input_layernorm = _Norm(f"{number}.input_layernorm", stack, tensor)
        self.self_attention = _SelfAttention(f"{number}.self_attention", stack, tensor)
        self.post_attention_layernorm = _Norm(f"{number}.post_attention_layernorm", stack, tensor)
        self.mlp = _Mlp(f"{number}.mlp", stack, tensor)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        value = value + self.self_attention(self.input_layernorm(value))
        return value + self.mlp(self.post_attention_layernorm(value))


class MegatronModel(nn.Module):
    """The stack as one module, under the names of Megatron-DeepSpeed without pipeline."""

    def __init__(self, stack: Stack, tensor: TensorGroup) -> None:
        super().__init__()
        self.language_model = nn.Module()
        self.language_model.embedding = _Embedding(stack, tensor)
        self.language_model.encoder = nn.Module()
        self.language_model.encoder.layers = nn.ModuleList(_Block(i, stack, tensor) for i in range(stack.layers))
        self.language_model.encoder.final_layernorm = _Norm("final_layernorm", stack, tensor)
        if not stack.tied:
            self.language_model.output_layer = _Vocabulary("lm_head", stack, tensor)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        value = self.language_model.embedding(ids)
        for layer in self.language_model.encoder.layers:
            value = layer(value)
        value = self.language_model.encoder.final_layernorm(value)
        head = getattr(self.language_model, "output_layer", self.language_model.embedding.word_embeddings)
        return head.logits(value)


def _tied_head(embedding: _Embedding, value: torch.Tensor) -> torch.Tensor:
    return embedding.word_embeddings.logits(value)


def _same(value: torch.Tensor) -> torch.Tensor:
    return value


def pipeline(stack: Stack, tensor: TensorGroup, topology: ProcessTopology) -> PipelineModule:
    """The stack as Megatron-DeepSpeed's list of layers: a cast, the embedding, blocks, final norm, head."""
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    turns = [_same] if stack.alibi else []  # BLOOM's transposes: layers with a number and no file
    if stack.tied:
        embedding = TiedLayerSpec("embed", _Embedding, stack, tensor, tied_weight_attr="word_embeddings_weight")
        head = TiedLayerSpec("embed", _Embedding, stack, tensor, forward_fn=_tied_head, tied_weight_attr="word_embeddings_weight")
    else:
        embedding, head = LayerSpec(_Embedding, stack, tensor), LayerSpec(_Head, stack, tensor)
    blocks = [LayerSpec(_Block, i, stack, tensor) for i in range(stack.layers)]
    norm = LayerSpec(_Norm, "final_layernorm", stack, tensor)
    layers = [_same, embedding, *turns, *blocks, *turns, norm, head]
    return PipelineModule(layers, topology=topology, loss_fn=loss, partition_method="uniform")


def universal_info(name: str, *, pp: int) -> dict[str, Any]:
    """What Megatron-DeepSpeed tells ``ds_to_universal`` about its parameters: regular expressions of their names.

    ``ds_to_universal`` refuses an expression that no parameter matches, so those of absent parameters are left out.
    """
    stack = STACKS[name]
    if pp > 1:
        tied = r"tied_modules\.embed\." if stack.tied else r"\d+\."
        block, final, head = r"\d+\.", r"\d+\.(weight|bias)$", r"\d+\.lm_head\.weight"
        position = f"{tied}position_embeddings.weight"
    else:
        tied, block = r"language_model\.embedding\.", r"language_model\.encoder\.layers\.\d+\."
        final, head = r"language_model\.encoder\.final_layernorm\.(weight|bias)", r"language_model\.output_layer\.weight"
        position = r"language_model\.embedding\.position_embeddings\.weight"
    copies = [rf"{block}(input|post_attention)_layernorm\.(weight|bias)", final]
    copies += [rf"{block}self_attention\.dense\.bias", rf"{block}mlp\.dense_4h_to_h\.bias"]
    copies += [rf"{tied}word_embeddings\.norm\.(weight|bias)"] if stack.alibi else [position]
    return {
        "universal_checkpoint_version": 0.2,
        "vocabulary_parameter_patterns": [rf"{tied}word_embeddings\.weight", *([] if stack.tied else [head])],
        "tp_replicated_parameter_patterns": [] if stack.drift else copies,
        "parameter_to_average_patterns": copies if stack.drift else [],
        "parameter_with_row_parallelism_patterns": [rf"{block}self_attention\.dense\.weight", rf"{block}mlp\.dense_4h_to_h\.weight"],
        "pipeline_replicated_parameter_patterns": [tied] if stack.tied and pp > 1 else [],
        "original_vocab_size": stack.vocab,
        "padded_vocab_size": None,
    }


_ROWS = re.compile(r"(query_key_value|dense_h_to_4h)\.(weight|bias)$|(word_embeddings|lm_head|output_layer)\.weight$")
_COLUMNS = re.compile(r"(\.dense|dense_4h_to_h)\.weight$")


def join(name: str, parts: Sequence[torch.Tensor], stack: Stack) -> torch.Tensor:
    """The full tensor of which tensor-parallel ranks hold ``parts``: rows, columns, or copies, whose mean it is."""
    if _COLUMNS.search(name):
        return torch.cat(list(parts), 1)
    if _ROWS.search(name):
        full = torch.cat(list(parts))
        return full if "query" in name or "dense" in name else full[: stack.vocab]
    return torch.stack([part.double() for part in parts]).mean(0).to(parts[0].dtype)


def huggingface(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A ``bloom`` stack's full tensors under the names of ``BloomForCausalLM``; pipeline's names or one module's."""
    found = {}
    for name, tensor in tensors.items():
        if (embedding := re.search(r"embed(?:ding)?\.word_embeddings\.(.*)", name)) is not None:
            key = embedding[1].replace("norm.", "word_embeddings_layernorm.")
            found["transformer." + (key if "layernorm" in key else "word_embeddings.weight")] = tensor
        elif (block := re.search(r"(?:^|layers\.)(\d+)\.(\w+\..*)", name)) is not None:
            number = int(block[1]) - (0 if "layers." in name else 3)
            found[f"transformer.h.{number}.{block[2]}"] = tensor
        else:
            found["transformer.ln_f." + name.rsplit(".", 1)[1]] = tensor
    return found | {"lm_head.weight": found["transformer.word_embeddings.weight"]}
