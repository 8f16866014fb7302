"""Megatron's tensor-parallel shards as DeepSpeed's ``SDLoaderFactory`` takes them, made from their definition in plain torch.

`full` makes a model with the query, key and value rows apart; `shard` gives one rank's share of it. The fused rows of a rank
with ``np`` heads of ``hn`` rows lie as ``[3, np, hn]`` in version 0, ``[np, hn, 3]`` in 1.0, ``[np, 3, hn]`` in 2.0 and 3.0.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Classic", "full", "shard", "write"]

Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Classic:
    """A Megatron model of the old names."""

    layers: int = 2
    hidden: int = 48
    heads: int = 12
    vocab: int = 96
    bias: bool = True
    head: bool = False
    """An output layer of its own, cut by rows like the embedding."""
    swiglu: bool = False
    """``dense_h_to_4h`` holds gate and up: each rank ``[gate part; up part]``."""


def full(model: Classic, seed: int = 0) -> Tensors:
    """Random tensors of the whole model; ``query_key_value`` as ``[3, heads, rows, …]``, a SwiGLU's as ``[2, rows, …]``."""
    generator = torch.Generator().manual_seed(seed)
    h, f = model.hidden, 4 * model.hidden
    shapes: dict[str, tuple[int, ...]] = {"word_embeddings.weight": (model.vocab, h), "position_embeddings.weight": (16, h)}
    for i in range(model.layers):
        layer = f"transformer.layers.{i}."
        gates = (2, f) if model.swiglu else (f,)
        for name, rows, columns in (
            ("attention.query_key_value", (3, model.heads, h // model.heads), (h,)),
            ("attention.dense", (h,), (h,)),
            ("mlp.dense_h_to_4h", gates, (h,)),
            ("mlp.dense_4h_to_h", (h,), (f,)),
            ("input_layernorm", (h,), ()),
            ("post_attention_layernorm", (h,), ()),
        ):
            shapes[f"{layer}{name}.weight"] = (*rows, *columns)
            if model.bias:
                shapes[f"{layer}{name}.bias"] = rows
    shapes |= {f"transformer.final_layernorm.{kind}": (h,) for kind in ("weight", *(["bias"] if model.bias else []))}
    if model.head:
        shapes["output_layer.weight"] = (model.vocab, h)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def shard(tensors: Tensors, world: int, rank: int, version: float) -> Tensors:
    """One tensor-parallel rank's tensors."""
    return {name: _cut(name, tensor, world, rank, version).contiguous().clone() for name, tensor in tensors.items()}


def _cut(name: str, tensor: torch.Tensor, world: int, rank: int, version: float) -> torch.Tensor:
    if "query_key_value" in name:
        mine = tensor.chunk(world, 1)[rank]
        rest = range(3, mine.dim())
        order = {0: (0, 1, 2), 1.0: (1, 2, 0), 2.0: (1, 0, 2), 3.0: (1, 0, 2)}[version]
        return mine.permute(*order, *rest).flatten(0, 2)
    if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
        return tensor.chunk(world, 1)[rank]
    if "dense_h_to_4h" in name and tensor.dim() == (3 if name.endswith("weight") else 2):
        return tensor.chunk(world, 1)[rank].flatten(0, 1)
    if any(part in name for part in ("dense_h_to_4h", "word_embeddings", "output_layer")):
        return tensor.chunk(world)[rank]
    return tensor


def write(tensors: Tensors, folder: Path, world: int, version: float, *, key: str = "module", stated: bool = True) -> list[Path]:
    """``mp_rank_XX_model_states.pt`` of every rank, in rank order; ``stated`` puts the version into the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"mp_rank_{rank:02d}_model_states.pt" for rank in range(world)]
    for rank, file in enumerate(files):
        content = {key: shard(tensors, world, rank, version), "mp_world_size": world}
        torch.save(content | ({"checkpoint_version": version} if stated else {}), file)
    return files
