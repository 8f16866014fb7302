"""Small Hugging Face llama checkpoints with random weights, made in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

KINDS = {"bfloat16": ml_dtypes.bfloat16}


def tiny_llama(
    folder: Path,
    layers: int = 4,
    hidden: int = 64,
    heads: int = 8,
    kv: int = 4,
    vocab: int = 131,
    dtype: str = "float32",
    shards: int = 2,
    **config: Any,
) -> Path:
    """Write config.json and safetensors files; `config` adds to or replaces config.json's fields."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": dtype, "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": hidden * 3 // 2, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
        "vocab_size": vocab, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
        **config,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    shapes = _shapes(fields)
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape, np.float32).astype(KINDS.get(dtype, dtype)) for name, shape in shapes.items()}
    names, paths = list(shapes), [f"model-{k + 1:05}-of-{shards:05}.safetensors" for k in range(shards)]
    if shards == 1:
        paths = ["model.safetensors"]
    files = {path: names[len(names) * k // shards : len(names) * (k + 1) // shards] for k, path in enumerate(paths)}
    for file, held in files.items():
        save_file({name: arrays[name] for name in held}, folder / file, {"format": "pt"})
    if shards > 1:
        index = {"metadata": {}, "weight_map": {n: file for file, held in files.items() for n in held}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _shapes(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, middle, vocab = fields["hidden_size"], fields["intermediate_size"], fields["vocab_size"]
    kv = hidden // fields["num_attention_heads"] * fields["num_key_value_heads"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(fields["num_hidden_layers"]):
        inner = {
            "input_layernorm": (hidden,), "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden), "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (middle, hidden), "mlp.up_proj": (middle, hidden), "mlp.down_proj": (hidden, middle),
        }  # fmt: skip
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in inner.items()}
    found["model.norm.weight"] = (hidden,)
    if not fields["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocab, hidden)
    return found
