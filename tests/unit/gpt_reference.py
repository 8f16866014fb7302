"""The families with layer norms and an ungated MLP in plain numpy, written from transformers' and Megatron's own code.

Nothing of shardwright is imported here. Arrays hold bits, all of them different (`reference`); hidden and feed-forward sizes may
be equal, so that no shape tells a transposed matrix.

The rules, beyond those of `reference`:

* gpt2: ``Conv1D`` multiplies ``x @ weight``, so weights are ``[in, out]``; ``c_attn(x).split(embed, dim=2)`` is q, k, v;
* gpt_neox: ``view(..., heads, 3 * head_size).chunk(3, dim=-1)``; bloom and old Falcons: ``view(..., heads, 3, head_dim)``;
* falcon 7B: ``view(..., heads + 2, head_dim)``: query heads, one key, one value; new decoder: ``view(..., kv, heads // kv + 2,
  head_dim)``;
* opt: ``embed_positions(position + 2)``;
* Megatron: position p is row p; layer norms have a bias; linear_fc1 is the up projection.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from tests.unit.reference import Arrays, Cut, merged_qkv, padded, share, to_torch

LAYER = "model.layers.{}."
NAMES = {
    "gpt2": {
        "embed": "transformer.wte", "positions": "transformer.wpe", "layer": "transformer.h.{}.", "norm": "transformer.ln_f",
        "in": "ln_1", "post": "ln_2", "qkv": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj", "head": "lm_head",
    },
    "gpt_neox": {
        "embed": "gpt_neox.embed_in", "layer": "gpt_neox.layers.{}.", "norm": "gpt_neox.final_layer_norm", "in": "input_layernorm",
        "post": "post_attention_layernorm", "qkv": "attention.query_key_value", "o": "attention.dense", "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h", "head": "embed_out",
    },
    "bloom": {
        "embed": "transformer.word_embeddings", "embed_norm": "transformer.word_embeddings_layernorm", "layer": "transformer.h.{}.",
        "norm": "transformer.ln_f", "in": "input_layernorm", "post": "post_attention_layernorm", "qkv": "self_attention.query_key_value",
        "o": "self_attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h", "head": "lm_head",
    },
    "opt": {
        "embed": "model.decoder.embed_tokens", "positions": "model.decoder.embed_positions", "layer": "model.decoder.layers.{}.",
        "norm": "model.decoder.final_layer_norm", "in": "self_attn_layer_norm", "post": "final_layer_norm", "o": "self_attn.out_proj",
        "up": "fc1", "down": "fc2", "head": "lm_head",
    },
}  # fmt: skip
NAMES["falcon"] = {key: name for key, name in NAMES["bloom"].items() if key != "embed_norm"}


@dataclass(frozen=True)
class Gpt:
    """A model's sizes and switches; `config` adds to its config.json."""

    family: str
    layers: int = 4
    heads: int = 8
    kv: int = 8
    head_dim: int = 4
    ffn: int = 32
    vocab: int = 131
    positions: int = 64
    tied: bool = True
    bias: bool = True
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    final_norm: bool = True
    embed: int | None = None
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    def raw(self) -> dict[str, Any]:
        """A config.json."""
        sizes = {
            "gpt2": {
                "n_embd": self.hidden, "n_layer": self.layers, "n_head": self.heads, "n_inner": self.ffn, "n_positions": self.positions,
            },
            "bloom": {"hidden_size": self.hidden, "n_layer": self.layers, "n_head": self.heads},
        }.get(
            self.family,
            {
                "hidden_size": self.hidden, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
                {"opt": "ffn_dim", "falcon": "ffn_hidden_size"}.get(self.family, "intermediate_size"): self.ffn,
                "max_position_embeddings": self.positions,
            },
        )  # fmt: skip
        common = {"model_type": self.family, "vocab_size": self.vocab, "tie_word_embeddings": self.tied, "torch_dtype": "float32"}
        return {**common, **sizes, **self.config}

    def hub(self) -> Arrays:
        """Distinct bits for every element of every hub tensor."""
        H, Q, K, F, E = self.hidden, self.heads * self.head_dim, self.kv * self.head_dim, self.ffn, self.embed or self.hidden
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, E)}
        if "positions" in NAMES[self.family]:
            shapes["model.embed_positions.weight"] = (self.positions + 2 * (self.family == "opt"), H)
        if E != H:
            shapes |= {"model.project_in.weight": (H, E), "model.project_out.weight": (E, H)}
        if self.family == "bloom":
            shapes |= {"model.embed_layernorm.weight": (H,), "model.embed_layernorm.bias": (H,)}
        for i in range(self.layers):
            for norm in self.norms:
                shapes |= {f"{LAYER.format(i)}{norm}.{kind}": (H,) for kind in ("weight", "bias")}
            linears = {"self_attn.q_proj": (Q, H), "self_attn.k_proj": (K, H), "self_attn.v_proj": (K, H), "self_attn.o_proj": (H, Q)}
            for name, shape in {**linears, "mlp.up_proj": (F, H), "mlp.down_proj": (H, F)}.items():
                shapes[f"{LAYER.format(i)}{name}.weight"] = shape
                if self.bias:
                    shapes[f"{LAYER.format(i)}{name}.bias"] = shape[:1]
        if self.final_norm:
            shapes |= {"model.norm.weight": (H,), "model.norm.bias": (H,)}
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab, E)
        at, found = 0, {}
        for name, shape in shapes.items():
            numbers = np.arange(at, at + int(np.prod(shape)), dtype=np.uint64) * np.uint64(0x9E3779B1)
            found[name] = (numbers & np.uint64(0xFFFFFFFF)).astype(np.uint32).reshape(shape)
            at += numbers.size
        return found

    def stored(self, hub: Arrays) -> Arrays:
        """The same model as its Hugging Face files hold it."""
        names, found = NAMES[self.family], {}
        for old, new in (
            ("model.embed_tokens", "embed"),
            ("model.embed_layernorm", "embed_norm"),
            ("model.norm", "norm"),
            ("lm_head", "head"),
        ):
            found |= {f"{names[new]}.{kind}": hub[f"{old}.{kind}"] for kind in ("weight", "bias") if f"{old}.{kind}" in hub}
        if self.family == "gpt2":
            found["transformer.wpe.weight"] = hub["model.embed_positions.weight"]
        if self.family == "opt":
            table = hub["model.embed_positions.weight"]
            found["model.decoder.embed_positions.weight"] = np.concatenate([table[-2:], table[:-2]])
            found |= {
                f"model.decoder.{x}.weight": hub[f"model.{x}.weight"] for x in ("project_in", "project_out") if f"model.{x}.weight" in hub
            }
        for i in range(self.layers):
            found |= self._layer(i, {name.removeprefix(LAYER.format(i)): a for name, a in hub.items() if name.startswith(LAYER.format(i))})
        return found

    def _layer(self, i: int, w: Arrays) -> Arrays:
        names, found = NAMES[self.family], {}
        at = names["layer"].format(i)
        spelled = {"input_layernorm": names["in"], "post_attention_layernorm": names["post"]}
        if self.family == "falcon" and len(self.norms) == 2 and self.config.get("parallel_attn", True):
            spelled = {"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"}
        for norm in self.norms:
            found |= {f"{at}{spelled[norm]}.{kind}": w[f"{norm}.{kind}"] for kind in ("weight", "bias")}
        for kind in ("weight", "bias") if self.bias else ("weight",):
            across = (lambda a: a.T) if self.family == "gpt2" and kind == "weight" else (lambda a: a)
            for hub, name in (("self_attn.o_proj", "o"), ("mlp.up_proj", "up"), ("mlp.down_proj", "down")):
                found[f"{at}{names[name]}.{kind}"] = across(w[f"{hub}.{kind}"])
            q, k, v = (w[f"self_attn.{x}_proj.{kind}"] for x in "qkv")
            if self.family == "opt":
                found |= {f"{at}self_attn.{x}_proj.{kind}": a for x, a in (("q", q), ("k", k), ("v", v))}
            elif self.family == "gpt2":
                found[f"{at}{names['qkv']}.{kind}"] = across(np.concatenate([q, k, v]))
            else:
                found[f"{at}{names['qkv']}.{kind}"] = self._heads(q, k, v)
        return found

    def _heads(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """As the model's own ``view`` takes them apart."""
        D, rest = self.head_dim, q.shape[1:]
        if self.family == "falcon" and self.config.get("new_decoder_architecture"):
            fused = np.empty((self.kv, self.heads // self.kv + 2, D, *rest), q.dtype)
            fused[:, :-2] = q.reshape(self.kv, -1, D, *rest)
            fused[:, -2], fused[:, -1] = k.reshape(self.kv, D, *rest), v.reshape(self.kv, D, *rest)
        elif self.family == "falcon" and self.config.get("multi_query", True):
            fused = np.empty((self.heads + 2, D, *rest), q.dtype)
            fused[:-2], fused[-2], fused[-1] = q.reshape(self.heads, D, *rest), k, v
        else:
            fused = np.empty((self.heads, 3, D, *rest), q.dtype)
            fused[:, 0], fused[:, 1], fused[:, 2] = (a.reshape(self.heads, D, *rest) for a in (q, k, v))
        return fused.reshape(-1, *rest)

    def write(self, folder: Path, stored: Arrays) -> Path:
        """A Hugging Face checkpoint of these tensors."""
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.raw()))
        save_file({name: to_torch(a.copy(), "float32") for name, a in stored.items()}, folder / "model.safetensors", {"format": "pt"})
        return folder

    def megatron(self, hub: Arrays, cut: Cut, spec: str = "te") -> dict[tuple[int, int, int], Arrays]:
        """What each (tp, pp, virtual chunk) holds under Megatron-core's names."""
        ranks: dict[tuple[int, int, int], Arrays] = {(t, p, v): {} for t in range(cut.tp) for p in range(cut.pp) for v in range(cut.vpp)}
        norms = {
            "te": ("self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_"),
            "local": ("input_layernorm.", "pre_mlp_layernorm."),
        }[spec]
        for (t, p, v), held in ranks.items():
            first, last = (p, v) == (0, 0), (p, v) == (cut.pp - 1, cut.vpp - 1)
            table = share(padded(hub["model.embed_tokens.weight"], cut.tp), 0, cut.tp, t)
            if first:
                held["embedding.word_embeddings.weight"] = table
                if "model.embed_positions.weight" in hub:
                    held["embedding.position_embeddings.weight"] = hub["model.embed_positions.weight"]
            if last:
                held |= {f"decoder.final_layernorm.{kind}": hub[f"model.norm.{kind}"] for kind in ("weight", "bias")}
                if not self.tied:
                    held["output_layer.weight"] = share(padded(hub["lm_head.weight"], cut.tp), 0, cut.tp, t)
                elif cut.pp > 1:
                    held["output_layer.weight"] = table
            for layer, (stage, chunk, i) in enumerate(cut.home(self.layers)):
                if (stage, chunk) != (p, v):
                    continue
                w = {name.removeprefix(LAYER.format(layer)): a for name, a in hub.items() if name.startswith(LAYER.format(layer))}
                at = f"decoder.layers.{i}."
                for kind in ("weight", "bias"):
                    held[at + norms[0] + kind], held[at + norms[1] + kind] = w[f"{self.norms[0]}.{kind}"], w[f"{self.norms[1]}.{kind}"]
                for kind in ("weight", "bias") if self.bias else ("weight",):
                    qkv = merged_qkv(*(w[f"self_attn.{x}_proj.{kind}"] for x in "qkv"), self.kv, self.head_dim)
                    held[f"{at}self_attention.linear_qkv.{kind}"] = share(qkv, 0, cut.tp, t)
                    held[f"{at}mlp.linear_fc1.{kind}"] = share(w[f"mlp.up_proj.{kind}"], 0, cut.tp, t)
                    rows = kind == "weight"
                    for name, old in (("self_attention.linear_proj", "self_attn.o_proj"), ("mlp.linear_fc2", "mlp.down_proj")):
                        held[f"{at}{name}.{kind}"] = share(w[f"{old}.{kind}"], 1, cut.tp, t) if rows else w[f"{old}.{kind}"]
        return ranks
