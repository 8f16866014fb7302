"""Models with experts, merged and split in plain numpy: what `reference` is for dense ones, and by its functions for their dense part.

The rules:

* expert-parallel rank e of N holds experts ``e · E / N`` to ``(e + 1) · E / N - 1``, numbered from 0 in Megatron's files and
  as in the model in Hugging Face's; every rank of a stage holds everything else;
* an expert's fc1 is its share of gate, then its share of up, in shares of the experts' own tensor parallel size (etp); rank t
  holds share ``t mod etp``;
* grouped experts are called ``experts.linear_fc1.weight3``, sequential ones ``experts.local_experts.3.linear_fc1.weight``;
* the norm before experts is ``pre_mlp_layernorm`` in every spec;
* stacked, a layer's experts are ``gate_up_proj`` (experts, gate rows then up rows, inputs) and ``down_proj``;
* shared experts and the router are nobody's in particular: cut over tp as a dense MLP, and copied.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from tests.unit import reference as ref
from tests.unit.reference import Arrays, Cut, Model, share

_ARCHITECTURES = {"mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}


@dataclass(frozen=True)
class Experts(Model):
    """A model with experts in all layers but `dense`."""

    family: str = "qwen3_moe"
    layers: int = 4
    heads: int = 8
    kv: int = 4
    hidden: int = 32
    ffn: int = 48
    experts: int = 12
    expert_ffn: int = 24
    shared: int = 0
    dense: tuple[int, ...] = ()

    def names(self, layer: int, expert: int) -> tuple[str, str, str]:
        """Gate, up and down of one expert on disk."""
        if self.family == "mixtral":
            at = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
            return f"{at}w1.weight", f"{at}w3.weight", f"{at}w2.weight"
        at = f"model.layers.{layer}.mlp.experts.{expert}."
        return f"{at}gate_proj.weight", f"{at}up_proj.weight", f"{at}down_proj.weight"

    def router(self, layer: int) -> str:
        """The router on disk."""
        return f"model.layers.{layer}.{'block_sparse_moe' if self.family == 'mixtral' else 'mlp'}.gate.weight"

    def shared_names(self, layer: int) -> tuple[str, str, str]:
        """Gate, up and down of the shared expert on disk."""
        at = f"model.layers.{layer}.mlp.shared_expert."
        return f"{at}gate_proj.weight", f"{at}up_proj.weight", f"{at}down_proj.weight"

    def sparse(self) -> list[int]:
        """Layers with experts."""
        return [n for n in range(self.layers) if n not in self.dense]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        found = Model.shapes(self)
        for layer in self.sparse():
            for name in ("gate_proj", "up_proj", "down_proj"):
                del found[f"model.layers.{layer}.mlp.{name}.weight"]
            found[self.router(layer)] = (self.experts, self.hidden)
            triples = [(self.names(layer, e), self.expert_ffn) for e in range(self.experts)]
            if self.shared:
                triples.append((self.shared_names(layer), self.shared))
                found[f"model.layers.{layer}.mlp.shared_expert_gate.weight"] = (1, self.hidden)
            for (gate, up, down), rows in triples:
                found[gate] = found[up] = (rows, self.hidden)
                found[down] = (self.hidden, rows)
        return found

    def config(self) -> dict[str, Any]:
        plain = replace(self, family="llama") if self.family != "llama" else self
        made = Model.config(plain) | {"architectures": [_ARCHITECTURES[self.family]], "model_type": self.family, "num_experts_per_tok": 2}
        if self.family == "mixtral":
            return made | {"num_local_experts": self.experts, "intermediate_size": self.expert_ffn, "sliding_window": None}
        made |= {"num_experts": self.experts, "moe_intermediate_size": self.expert_ffn, "mlp_only_layers": list(self.dense)}
        return made | {"decoder_sparse_step": 1, "norm_topk_prob": True, "shared_expert_intermediate_size": self.shared}


@dataclass(frozen=True)
class ExpertCut(Cut):
    """A parallel layout with expert parallelism."""

    ep: int = 1
    etp: int | None = None


Ranks = dict[tuple[int, int, int, int], Arrays]
"""By tp rank, stage, virtual chunk, ep rank."""


def megatron(weights: Arrays, model: Experts, cut: ExpertCut, spec: str = "te", multiple: int | None = None) -> Ranks:
    """What each rank holds under Megatron-core's names."""
    plain = ref.megatron(weights, model, cut, "local" if spec == "local" else "te", multiple)
    ranks = {(t, p, v, e): dict(held) for (t, p, v), held in plain.items() for e in range(cut.ep)}
    for (t, p, v, e), held in ranks.items():
        for layer, (stage, chunk, i) in enumerate(cut.home(model.layers)):
            if (stage, chunk) == (p, v) and layer in model.sparse():
                at = f"decoder.layers.{i}."
                held[f"{at}pre_mlp_layernorm.weight"] = weights[f"model.layers.{layer}.post_attention_layernorm.weight"]
                held[f"{at}mlp.router.weight"] = weights[model.router(layer)]
                _put_experts(held, f"{at}mlp.experts.", weights, model, cut, (t, e), layer, spec)
                if model.shared:
                    gate, up, down = (weights[name] for name in model.shared_names(layer))
                    shared = np.concatenate([share(gate, 0, cut.tp, t), share(up, 0, cut.tp, t)])
                    held[f"{at}mlp.shared_experts.linear_fc1.weight"] = shared
                    held[f"{at}mlp.shared_experts.linear_fc2.weight"] = share(down, 1, cut.tp, t)
                    held[f"{at}mlp.shared_experts.gate_weight"] = weights[f"model.layers.{layer}.mlp.shared_expert_gate.weight"]
    return ranks


def _put_experts(
    held: Arrays, at: str, weights: Arrays, model: Experts, cut: ExpertCut, rank: tuple[int, int], layer: int, spec: str
) -> None:
    t, e = rank
    parts = cut.etp or cut.tp
    mine = np.split(np.arange(model.experts), cut.ep)[e]
    for inside, expert in enumerate(mine):
        gate, up, down = (weights[name] for name in model.names(layer, int(expert)))
        fc1 = f"linear_fc1.weight{inside}" if spec == "te" else f"local_experts.{inside}.linear_fc1.weight"
        held[at + fc1] = np.concatenate([share(gate, 0, parts, t % parts), share(up, 0, parts, t % parts)])
        held[at + fc1.replace("fc1", "fc2")] = share(down, 1, parts, t % parts)


def stacked(weights: Arrays, model: Experts) -> Arrays:
    """The whole model with its experts stacked, as transformers 5 holds it."""
    single = {name for layer in model.sparse() for e in range(model.experts) for name in model.names(layer, e)}
    found = {name.replace("block_sparse_moe", "mlp"): array for name, array in weights.items() if name not in single}
    for layer in model.sparse():
        each = [[weights[name] for name in model.names(layer, e)] for e in range(model.experts)]
        at = f"model.layers.{layer}.mlp.experts."
        found[f"{at}gate_up_proj"] = np.array([np.concatenate([gate, up]) for gate, up, _ in each])
        found[f"{at}down_proj"] = np.array([down for _, _, down in each])
    return found


def huggingface(weights: Arrays, model: Experts, cut: ExpertCut, spelling: str, multiple: int | None = None) -> Ranks:
    """What each rank holds under Hugging Face's names."""
    single = {name for layer in model.sparse() for e in range(model.experts) for name in model.names(layer, e)}
    router = {model.router(layer) for layer in model.sparse()}
    homes = [p for p, _, _ in cut.home(model.layers)]
    parts = cut.etp or cut.tp
    plain = ref.huggingface_ranks({n: a for n, a in weights.items() if n not in single | router}, model, cut, multiple)
    ranks: Ranks = {(t, p, 0, e): dict(held) for (t, p), held in plain.items() for e in range(cut.ep)}
    for (t, p, _, e), held in ranks.items():
        mine = np.split(np.arange(model.experts), cut.ep)[e]
        for layer in [n for n in model.sparse() if homes[n] == p]:
            name = model.router(layer)
            held[name.replace("block_sparse_moe", "mlp") if spelling == "stacked" else name] = weights[name]
            pieces = []
            for expert in mine:
                gate, up, down = model.names(layer, int(expert))
                cuts = [
                    share(weights[gate], 0, parts, t % parts),
                    share(weights[up], 0, parts, t % parts),
                    share(weights[down], 1, parts, t % parts),
                ]
                pieces.append(cuts)
                if spelling != "stacked":
                    held |= dict(zip((gate, up, down), cuts, strict=True))
            if spelling == "stacked":
                at = f"model.layers.{layer}.mlp.experts."
                held[f"{at}gate_up_proj"] = np.array([np.concatenate(cuts[:2]) for cuts in pieces])
                held[f"{at}down_proj"] = np.array([cuts[2] for cuts in pieces])
    return ranks


def read_megatron(root: Path, cut: ExpertCut) -> Ranks:
    """The weights of every rank's file, read by torch."""
    found: Ranks = {}
    for t in range(cut.tp):
        for p in range(cut.pp):
            for e in range(cut.ep):
                name = f"mp_rank_{t:02d}" + (f"_{p:03d}" if cut.pp > 1 else "") + (f"_{e:03d}" if cut.ep > 1 else "")
                with torch.serialization.safe_globals([argparse.Namespace]):
                    state = torch.load(root / "release" / name / "model_optim_rng.pt", map_location="cpu", weights_only=True)
                for v in range(cut.vpp):
                    model = state[f"model{v}" if cut.vpp > 1 else "model"]
                    found[t, p, v, e] = {name: ref.to_bits(tensor) for name, tensor in model.items()}
    return found


def read_ranks(root: Path, cut: ExpertCut, chunked: bool = False) -> Ranks:
    """The tensors of every rank file, read by safetensors; `chunked` takes the chunk off the keys."""
    found: Ranks = {}
    for t in range(cut.tp):
        for p in range(cut.pp):
            for e in range(cut.ep):
                number = t + cut.tp * (e + cut.ep * p)
                path = root / (f"rank_{number:05d}_tp{t}_pp{p}" + (f"_ep{e}" if cut.ep > 1 else "") + ".safetensors")
                if not chunked:
                    found[t, p, 0, e] = {}
                for name, tensor in load_file(path).items():
                    chunk, _, rest = name.partition(".") if chunked and cut.vpp > 1 else ("model0", "", name)
                    found.setdefault((t, p, int(chunk.removeprefix("model")), e), {})[rest] = ref.to_bits(tensor)
    return found
