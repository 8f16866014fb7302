"""DeepSpeed's model-parallel and layer files in plain numpy, written from the rules of the systems that write them.

Nothing of shardwright is imported here. Arrays hold bits, as in `reference`.

The rules (np of n heads on a rank, head size hn):

* QKV rows of a rank: version 0 ``[3, np, hn]``, 1.0 ``[np, hn, 3]``, 2.0 and 3.0 ``[np, 3, hn]``, which with fewer key/value
  heads is, per group, its query heads, its key head, its value head;
* ``dense`` and ``dense_4h_to_h`` weights are cut by columns, QKV, ``dense_h_to_4h`` and the vocabulary by rows; all else is on
  every rank; a gated ``dense_h_to_4h`` is a rank's share of gate, then its share of up;
* the vocabulary is padded with zeros to a multiple of ``128 · tp``;
* layer files: the embedding is layer 1; blocks begin at 3 in bigscience's model and at 2 in Megatron-DeepSpeed's; behind L blocks
  the final norm is layer L + 4 (bigscience) or L + 2, an untied head L + 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.unit.reference import Arrays, merged_qkv, padded, share, to_bits, to_torch

NAMINGS = {
    "layernorm": ("language_model.embedding.", "language_model.encoder.", "self_attention", "layernorm"),
    "norm": ("language_model.embedding.", "language_model.encoder.", "self_attention", "norm"),
    "transformer": ("language_model.embedding.", "language_model.transformer.", "attention", "layernorm"),
    "gpt2": ("", "transformer.", "attention", "layernorm"),
}
KINDS = ("weight", "bias")


def qkv_rows(q: np.ndarray, k: np.ndarray, v: np.ndarray, kv: int, head_dim: int, tp: int, rank: int, version: int) -> np.ndarray:
    """One rank's fused rows."""
    if version >= 2:
        return share(merged_qkv(q, k, v, kv, head_dim), 0, tp, rank)
    mine = [share(part, 0, tp, rank).reshape(-1, head_dim, *part.shape[1:]) for part in (q, k, v)]
    fused = np.stack(mine, axis=0 if version == 0 else 2)
    return fused.reshape(-1, *q.shape[1:])


def block(w: Mapping[str, np.ndarray], kv: int, head_dim: int, tp: int, rank: int, version: int, attention: str, norm: str) -> Arrays:
    """One rank's share of one layer."""
    found: Arrays = {}
    for kind in KINDS:
        for hub in ("input_layernorm", "post_attention_layernorm"):
            if f"{hub}.{kind}" in w:
                found[f"{hub.replace('layernorm', norm)}.{kind}"] = w[f"{hub}.{kind}"]
        if f"self_attn.q_proj.{kind}" in w:
            parts = (w[f"self_attn.{x}_proj.{kind}"] for x in "qkv")
            found[f"{attention}.query_key_value.{kind}"] = qkv_rows(*parts, kv, head_dim, tp, rank, version)
        up = [w[f"mlp.{x}_proj.{kind}"] for x in ("gate", "up") if f"mlp.{x}_proj.{kind}" in w]
        if up:
            found[f"mlp.dense_h_to_4h.{kind}"] = np.concatenate([share(part, 0, tp, rank) for part in up])
        for hub, name in (("self_attn.o_proj", f"{attention}.dense"), ("mlp.down_proj", "mlp.dense_4h_to_h")):
            if f"{hub}.{kind}" in w:
                found[f"{name}.{kind}"] = share(w[f"{hub}.{kind}"], 1, tp, rank) if kind == "weight" else w[f"{hub}.{kind}"]
    return found


def layers_of(hub: Mapping[str, np.ndarray]) -> list[Arrays]:
    """Every layer's tensors under what follows ``model.layers.N.``."""
    found: dict[int, Arrays] = {}
    for name, array in hub.items():
        if name.startswith("model.layers."):
            _, _, number, rest = name.split(".", 3)
            found.setdefault(int(number), {})[rest] = array
    return [found[n] for n in sorted(found)]


def mp_ranks(
    hub: Mapping[str, np.ndarray], kv: int, head_dim: int, tp: int, naming: str = "layernorm", version: int = 2, multiple: int | None = None
) -> list[Arrays]:
    """What each model-parallel rank's module holds."""
    embedding, body, attention, norm = NAMINGS[naming]
    ranks: list[Arrays] = []
    for rank in range(tp):
        held = {f"{embedding}word_embeddings.weight": share(padded(hub["model.embed_tokens.weight"], tp, multiple), 0, tp, rank)}
        if "model.embed_positions.weight" in hub:
            held[f"{embedding}position_embeddings.weight"] = hub["model.embed_positions.weight"]
        for kind in KINDS:
            if f"model.embed_layernorm.{kind}" in hub:
                held[f"{embedding}word_embeddings.norm.{kind}"] = hub[f"model.embed_layernorm.{kind}"]
            if f"model.norm.{kind}" in hub:
                held[f"{body}final_{norm}.{kind}"] = hub[f"model.norm.{kind}"]
        for number, w in enumerate(layers_of(hub)):
            one = block(w, kv, head_dim, tp, rank, version, attention, norm)
            held |= {f"{body}layers.{number}.{name}": array for name, array in one.items()}
        if "lm_head.weight" in hub:
            held["language_model.output_layer.weight"] = share(padded(hub["lm_head.weight"], tp, multiple), 0, tp, rank)
        ranks.append(held)
    return ranks


def layer_files(
    hub: Mapping[str, np.ndarray], kv: int, head_dim: int, tp: int, *, first: int, multiple: int | None = None
) -> dict[str, Arrays]:
    """What each layer's file holds, by its name."""
    found: dict[str, Arrays] = {}
    layers = layers_of(hub)
    behind = first + len(layers) + (first - 2)
    for rank in range(tp):
        files: dict[int, Arrays] = {
            1: {"word_embeddings.weight": share(padded(hub["model.embed_tokens.weight"], tp, multiple), 0, tp, rank)}
        }
        if "model.embed_positions.weight" in hub:
            files[1]["position_embeddings.weight"] = hub["model.embed_positions.weight"]
        files[behind] = {kind: hub[f"model.norm.{kind}"] for kind in KINDS if f"model.norm.{kind}" in hub}
        files[1] |= {f"word_embeddings.norm.{k}": hub[f"model.embed_layernorm.{k}"] for k in KINDS if f"model.embed_layernorm.{k}" in hub}
        for number, w in enumerate(layers):
            files[first + number] = block(w, kv, head_dim, tp, rank, 2, "self_attention", "layernorm")
        if "lm_head.weight" in hub:
            files[behind + 1] = {"lm_head.weight": share(padded(hub["lm_head.weight"], tp, multiple), 0, tp, rank)}
        found |= {f"layer_{number:02d}-model_{rank:02d}-model_states.pt": held for number, held in files.items()}
    return found


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's own dictionaries: embedding by embedding, and the rest under ``encoder`` or ``transformer``."""
    made: dict[str, Any] = {}
    for name, value in flat.items():
        parts = name.split(".")
        cut = 4 if parts[1] == "embedding" else 2
        at = made
        for part in parts[:cut] if len(parts) > cut else parts[:-1]:
            at = at.setdefault(part, {})
        at[".".join(parts[cut:]) if len(parts) > cut else parts[-1]] = value
    return made


def tensors(held: Mapping[str, np.ndarray], dtype: str = "float32") -> dict[str, torch.Tensor]:
    return {name: to_torch(array, dtype) for name, array in held.items()}


def read(folder: Path, pattern: str = "*.pt", key: str | None = "module") -> dict[str, Arrays]:
    """The tensors of every file, read by torch."""
    found = {}
    for path in sorted(folder.glob(pattern)):
        state = torch.load(path, map_location="cpu", weights_only=False)
        state = state[key] if key else state
        if state is not None:
            found[path.name] = {name: to_bits(tensor) for name, tensor in state.items()}
    return found
