"""Merging and splitting checkpoints in plain numpy, written from the formats' own rules and from nothing else.

Nothing of shardwright is imported here: a conversion that is wrong in the same way on both sides would still undo itself,
so what it writes is compared with these few functions. Arrays hold *bits* (``uint16`` for bfloat16, ``uint32`` for
float32), all of them different within a float32 model, so every misplaced element shows.

The rules:

* fused QKV, per group of key/value heads: its query heads, its key head, its value head; cut over ranks by rows, also
  where there are fewer groups than ranks;
* fused gate and up: rank t holds its share of gate, then its share of up;
* vocabulary rows padded with zeros to a multiple of ``128 · tp``;
* layers: with P stages of V chunks each, chunk v of stage p begins at layer ``v · (L / V) + p · (L / (P · V))``; uneven
  chunks come in the order: for each v, for each p;
* the embedding on the first stage; final norm and head on the last, which holds a copy of a tied embedding if it is
  not also the first;
* rank files under Hugging Face's names replicate key/value heads where there are fewer than ranks, and have no padding
  unless asked for.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Arrays = dict[str, np.ndarray]
BITS = {"float32": np.uint32, "bfloat16": np.uint16}
KINDS = {"float32": (torch.int32, torch.float32), "bfloat16": (torch.int16, torch.bfloat16)}


@dataclass(frozen=True)
class Model:
    """A model's sizes and switches."""

    family: str = "llama"
    layers: int = 12
    heads: int = 24
    kv: int = 8
    head_dim: int = 4
    hidden: int = 96
    ffn: int = 96
    vocab: int = 131
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    dtype: str = "float32"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor under Hugging Face's name."""
        H, Q, K, F = self.hidden, self.heads * self.head_dim, self.kv * self.head_dim, self.ffn
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, H)}
        for i in range(self.layers):
            at = f"model.layers.{i}."
            for name, rows in (("q_proj", Q), ("k_proj", K), ("v_proj", K)):
                found[f"{at}self_attn.{name}.weight"] = (rows, H)
                if self.qkv_bias:
                    found[f"{at}self_attn.{name}.bias"] = (rows,)
            found[f"{at}self_attn.o_proj.weight"] = (H, Q)
            if self.out_bias:
                found[f"{at}self_attn.o_proj.bias"] = (H,)
            if self.qk_norm:
                found[f"{at}self_attn.q_norm.weight"] = found[f"{at}self_attn.k_norm.weight"] = (self.head_dim,)
            for name, shape in (("gate_proj", (F, H)), ("up_proj", (F, H)), ("down_proj", (H, F))):
                found[f"{at}mlp.{name}.weight"] = shape
                if self.mlp_bias:
                    found[f"{at}mlp.{name}.bias"] = shape[:1]
            found[f"{at}input_layernorm.weight"] = found[f"{at}post_attention_layernorm.weight"] = (H,)
        found["model.norm.weight"] = (H,)
        if not self.tied:
            found["lm_head.weight"] = (self.vocab, H)
        return found

    def config(self) -> dict[str, Any]:
        """A config.json."""
        kind = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
        made = {
            "architectures": [kind[self.family]],
            "model_type": self.family,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.tied,
            "torch_dtype": self.dtype,
        }
        if self.family == "llama":
            made |= {"attention_bias": self.qkv_bias, "mlp_bias": self.mlp_bias}
        if self.family == "qwen3":
            made |= {"attention_bias": self.qkv_bias}
        return made

    def weights(self, seed: int = 0) -> Arrays:
        """Distinct bits for every element (float32), or random ones."""
        kind, at, found = BITS[self.dtype], seed * 7919, {}
        for name, shape in self.shapes().items():
            size = int(np.prod(shape))
            numbers = np.arange(at, at + size, dtype=np.uint64) * np.uint64(0x9E3779B1)  # odd: different numbers stay different
            found[name] = (numbers & np.uint64(np.iinfo(kind).max)).astype(kind).reshape(shape)
            at += size
        return found


def write(folder: Path, model: Model, weights: Arrays, shards: int = 2) -> Path:
    """The model as a Hugging Face checkpoint."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model.config()))
    names = list(weights)
    paths = [f"model-{k + 1:05}-of-{shards:05}.safetensors" for k in range(shards)] if shards > 1 else ["model.safetensors"]
    held = {path: names[len(names) * k // shards : len(names) * (k + 1) // shards] for k, path in enumerate(paths)}
    for path, members in held.items():
        save_file({name: to_torch(weights[name], model.dtype) for name in members}, folder / path, {"format": "pt"})
    if shards > 1:
        index = {"metadata": {}, "weight_map": {name: path for path, members in held.items() for name in members}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def to_torch(bits: np.ndarray, dtype: str) -> torch.Tensor:
    """Bits as a tensor of that dtype."""
    whole, kind = KINDS[dtype]
    return torch.from_numpy(np.ascontiguousarray(bits).view({"float32": np.int32, "bfloat16": np.int16}[dtype])).to(whole).view(kind)


def to_bits(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's bits."""
    name = str(tensor.dtype).removeprefix("torch.")
    return tensor.contiguous().view(KINDS[name][0]).numpy().view(BITS[name])


# -- splitting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """A parallel layout."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    stages: tuple[int, ...] | None = None

    def home(self, layers: int) -> list[tuple[int, int, int]]:
        """(stage, chunk, number within the chunk) of every layer."""
        found: list[tuple[int, int, int]] = [(-1, -1, -1)] * layers
        begin = 0
        for v in range(self.vpp):
            for p in range(self.pp):
                if self.stages is None:
                    per = layers // self.pp // self.vpp
                    begin = v * (layers // self.vpp) + p * per
                else:
                    per = self.stages[v * self.pp + p]
                for i in range(per):
                    found[begin + i] = (p, v, i)
                begin += per
        return found


def merged_qkv(q: np.ndarray, k: np.ndarray, v: np.ndarray, groups: int, head_dim: int) -> np.ndarray:
    """Head by head."""
    rows = []
    per = q.shape[0] // head_dim // groups
    for g in range(groups):
        rows += [q[h * head_dim : (h + 1) * head_dim] for h in range(g * per, (g + 1) * per)]
        rows.append(k[g * head_dim : (g + 1) * head_dim])
        rows.append(v[g * head_dim : (g + 1) * head_dim])
    return np.concatenate(rows)


def padded(table: np.ndarray, tp: int, multiple: int | None = None) -> np.ndarray:
    """Zero rows up to the multiple, 128 per rank unless said otherwise."""
    unit = multiple or 128 * tp
    rows = (table.shape[0] + unit - 1) // unit * unit
    full = np.zeros((rows, *table.shape[1:]), table.dtype)
    full[: table.shape[0]] = table
    return full


def share(array: np.ndarray, axis: int, parts: int, which: int) -> np.ndarray:
    """Equal share `which` of `parts` along an axis."""
    return np.split(array, parts, axis)[which]


def megatron(weights: Arrays, model: Model, cut: Cut, spec: str = "te", multiple: int | None = None) -> dict[tuple[int, int, int], Arrays]:
    """What each (tp, pp, virtual chunk) holds under Megatron-core's names."""
    ranks: dict[tuple[int, int, int], Arrays] = {(t, p, v): {} for t in range(cut.tp) for p in range(cut.pp) for v in range(cut.vpp)}
    norms = {
        "te": ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"),
        "local": ("input_layernorm.weight", "pre_mlp_layernorm.weight"),
    }[spec]
    table = padded(weights["model.embed_tokens.weight"], cut.tp, multiple)
    for t in range(cut.tp):
        ranks[t, 0, 0]["embedding.word_embeddings.weight"] = share(table, 0, cut.tp, t)
    for layer, (p, v, i) in enumerate(cut.home(model.layers)):
        w = {name.removeprefix(f"model.layers.{layer}."): a for name, a in weights.items() if name.startswith(f"model.layers.{layer}.")}
        for t in range(cut.tp):
            held = ranks[t, p, v]
            at = f"decoder.layers.{i}."
            held[at + norms[0]] = w["input_layernorm.weight"]
            for kind in ("weight", "bias") if model.qkv_bias else ("weight",):
                fused = merged_qkv(*(w[f"self_attn.{x}_proj.{kind}"] for x in "qkv"), model.kv, model.head_dim)
                held[f"{at}self_attention.linear_qkv.{kind}"] = share(fused, 0, cut.tp, t)
            held[at + "self_attention.linear_proj.weight"] = share(w["self_attn.o_proj.weight"], 1, cut.tp, t)
            if model.out_bias:
                held[at + "self_attention.linear_proj.bias"] = w["self_attn.o_proj.bias"]
            if model.qk_norm:
                held[at + "self_attention.q_layernorm.weight"] = w["self_attn.q_norm.weight"]
                held[at + "self_attention.k_layernorm.weight"] = w["self_attn.k_norm.weight"]
            if "mlp.gate_proj.weight" not in w:  # a layer with experts: see `experts_reference`
                continue
            held[at + norms[1]] = w["post_attention_layernorm.weight"]
            for kind in ("weight", "bias") if model.mlp_bias else ("weight",):
                pair = [share(w[f"mlp.{x}_proj.{kind}"], 0, cut.tp, t) for x in ("gate", "up")]
                held[f"{at}mlp.linear_fc1.{kind}"] = np.concatenate(pair)
            held[at + "mlp.linear_fc2.weight"] = share(w["mlp.down_proj.weight"], 1, cut.tp, t)
            if model.mlp_bias:
                held[at + "mlp.linear_fc2.bias"] = w["mlp.down_proj.bias"]
    head = weights["model.embed_tokens.weight" if model.tied else "lm_head.weight"]
    for t in range(cut.tp):
        held = ranks[t, cut.pp - 1, cut.vpp - 1]
        held["decoder.final_layernorm.weight"] = weights["model.norm.weight"]
        if not model.tied or cut.pp > 1:
            held["output_layer.weight"] = share(padded(head, cut.tp, multiple), 0, cut.tp, t)
    return ranks


def huggingface_ranks(weights: Arrays, model: Model, cut: Cut, multiple: int | None = None) -> dict[tuple[int, int], Arrays]:
    """What each (tp, pp) holds under Hugging Face's names, as serving engines want it."""
    ranks: dict[tuple[int, int], Arrays] = {(t, p): {} for t in range(cut.tp) for p in range(cut.pp)}
    homes = [p for p, _, _ in cut.home(model.layers)]
    heads = gcd(model.kv, cut.tp)
    for name, array in weights.items():
        stage = homes[int(name.split(".")[2])] if name.startswith("model.layers.") else 0 if "embed" in name else cut.pp - 1
        for t in range(cut.tp):
            if "embed_tokens" in name or "lm_head" in name:
                part = share(padded(array, cut.tp, multiple or 1), 0, cut.tp, t)
            elif "k_proj" in name or "v_proj" in name:
                part = share(array, 0, heads, t // (cut.tp // heads))
            elif "q_proj" in name or "gate_proj" in name or "up_proj" in name:
                part = share(array, 0, cut.tp, t)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                part = share(array, 1, cut.tp, t)
            else:
                part = array
            ranks[t, stage][name] = part
    if model.tied and cut.pp > 1:
        table = padded(weights["model.embed_tokens.weight"], cut.tp, multiple or 1)
        for t in range(cut.tp):
            ranks[t, cut.pp - 1]["lm_head.weight"] = share(table, 0, cut.tp, t)
    return ranks


# -- reading what was written ------------------------------------------------------------------------------------------


def read_megatron(root: Path, cut: Cut) -> dict[tuple[int, int, int], Arrays]:
    """The weights of every rank file, read by torch."""
    found = {}
    for t in range(cut.tp):
        for p in range(cut.pp):
            folder = f"mp_rank_{t:02d}" + (f"_{p:03d}" if cut.pp > 1 else "")
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(root / "release" / folder / "model_optim_rng.pt", map_location="cpu", weights_only=True)
            for v in range(cut.vpp):
                model = state[f"model{v}" if cut.vpp > 1 else "model"]
                found[t, p, v] = {name: to_bits(tensor) for name, tensor in model.items()}
    return found


def read_ranks(root: Path, cut: Cut) -> dict[tuple[int, int], Arrays]:
    """The tensors of every rank file, read by safetensors."""
    found = {}
    for t in range(cut.tp):
        for p in range(cut.pp):
            path = root / f"rank_{t + cut.tp * p:05d}_tp{t}_pp{p}.safetensors"
            found[t, p] = {name: to_bits(tensor) for name, tensor in load_file(path).items()}
    return found


def read_huggingface(root: Path) -> Arrays:
    """All tensors of a Hugging Face checkpoint."""
    found: Arrays = {}
    for path in sorted(root.glob("*.safetensors")):
        found |= {name: to_bits(tensor) for name, tensor in load_file(path).items()}
    return found


def by_rank(chunks: Mapping[tuple[int, int, int], Arrays], cut: Cut) -> dict[tuple[int, int], Arrays]:
    """Chunks of one rank under one roof, as rank files spell them."""
    found: dict[tuple[int, int], Arrays] = {(t, p): {} for t in range(cut.tp) for p in range(cut.pp)}
    for (t, p, v), held in chunks.items():
        found[t, p] |= {f"model{v}.{name}" if cut.vpp > 1 else name: array for name, array in held.items()}
    return found


def differences(expected: Mapping[Any, Arrays], actual: Mapping[Any, Arrays]) -> list[str]:
    """Every tensor that is missing, extra, or not bit for bit equal."""
    found = [f"rank {key}" for key in expected.keys() ^ actual.keys()]
    for key in expected.keys() & actual.keys():
        one, two = expected[key], actual[key]
        found += [f"{key}: {name} is in one only" for name in sorted(one.keys() ^ two.keys())]
        for name in one.keys() & two.keys():
            if one[name].shape != two[name].shape or one[name].dtype != two[name].dtype:
                found.append(f"{key}: {name} is {two[name].dtype} {two[name].shape}, expected {one[name].dtype} {one[name].shape}")
            elif not np.array_equal(one[name], two[name]):
                found.append(f"{key}: {name} differs in {np.count_nonzero(one[name] != two[name])} elements")
    return sorted(found)
