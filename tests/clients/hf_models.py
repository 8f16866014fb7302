"""Tiny Hugging Face checkpoints, written by transformers itself.

1. Build the config of a case; the sizes are such that heads, rows, layers and the vocabulary divide unevenly wherever that
   is allowed: 131 words (padding matters), 12 layers (1, 2, 3 or 4 stages, and 2 chunks on each of 2 or 3), 12 experts
   (numbers of two digits; 1, 2, 3 or 4 expert ranks).
2. Fill every parameter with distinct random values, norms and biases too, so that a lost, doubled or swapped tensor always
   changes the logits.
3. Save with transformers: safetensors in several files, or ``.bin`` files under the same names.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

__all__ = ["CASES", "VOCAB", "Case", "config", "make", "tensors"]

VOCAB = 131

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_hidden_layers": 6, "num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One model: its Hugging Face ``model_type`` and what its config says beyond the common sizes."""

    model_type: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def settings(self, **overrides: Any) -> dict[str, Any]:
        """All config fields: the common ones, the case's, the caller's."""
        return {**_BASE, **self.config, **overrides}


CASES: dict[str, Case] = {
    "llama": Case("llama"),
    "llama_tied": Case("llama", {"tie_word_embeddings": True}),
    "llama_mha": Case("llama", {"num_key_value_heads": 8}),
    "llama_mqa": Case("llama", {"num_key_value_heads": 1}),
    "llama_bias": Case("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_rope3": Case("llama", {"head_dim": 16, "rope_parameters": _LLAMA3_ROPE, "max_position_embeddings": 131072}),
    "llama_head_dim": Case("llama", {"head_dim": 16}),
    # A head's rows are 64 · 512 · 4 = 128 KiB, more than a pivot group's 64 KiB: q, k and v pivot on their own.
    "llama_wide": Case(
        "llama",
        {"hidden_size": 512, "head_dim": 64, "intermediate_size": 768, "num_hidden_layers": 2},
    ),
    "mistral": Case("mistral", {"head_dim": 16, "sliding_window": None}),
    "mistral_window": Case("mistral", {"sliding_window": 4096, "max_position_embeddings": 32768}),
    "qwen2": Case("qwen2"),
    "qwen2_tied": Case("qwen2", {"tie_word_embeddings": True}),
    "qwen3": Case("qwen3", {"head_dim": 16}),
    "qwen3_tied": Case("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "mixtral": Case("mixtral", {"head_dim": 16, "num_hidden_layers": 6, "num_local_experts": 12, "num_experts_per_tok": 3}),
    "qwen2_moe": Case("qwen2_moe", {**_EXPERTS, "norm_topk_prob": False, "shared_expert_intermediate_size": 80, "mlp_only_layers": [1]}),
    "qwen3_moe": Case("qwen3_moe", {**_EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
    # Every other layer has experts, and a token's weights are not normalised over those it is sent to.
    "qwen3_moe_sparse": Case("qwen3_moe", {**_EXPERTS, "decoder_sparse_step": 2, "norm_topk_prob": False, "tie_word_embeddings": True}),
}


def make(
    case: str | Case,
    out: Path,
    *,
    dtype: str = "float32",
    max_shard_size: str = "200KB",
    bin_files: bool = False,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write one checkpoint.

    Parameters
    ----------
    case
        A name in `CASES`, or a case of the caller's own.
    out
        Folder to create; it is also the result.
    dtype
        How the tensors are stored, as torch spells it.
    max_shard_size
        As transformers takes it; the default splits every case into several files, ``"5GB"`` makes one.
    bin_files
        Write ``pytorch_model-*.bin`` and no safetensors.
    seed
        Two seeds give two models that differ in every tensor.
    **overrides
        Config fields, for example ``num_hidden_layers=4``.
    """
    case = CASES[case] if isinstance(case, str) else case
    model = _model(case, getattr(torch, dtype), overrides)
    _randomise(model, seed)
    model.save_pretrained(out, max_shard_size=max_shard_size)
    if bin_files:
        _to_bin(out, max_shard_size)
    return Path(out)


def _model(case: Case, dtype: torch.dtype, overrides: dict[str, Any]) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = AutoConfig.for_model(case.model_type, **case.settings(**overrides))
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _randomise(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # The scale keeps logits of order 1 at any width: a tolerance then means the same for all cases.
            values = 1 + 0.1 * noise if _is_norm(name, parameter) else noise * 0.8 / parameter.shape[-1] ** 0.5
            parameter.copy_(values.to(parameter.dtype))
        saved = model.state_dict().keys()
        for buffer in [buffer for name, buffer in model.named_buffers() if name in saved]:
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)


def _is_norm(name: str, parameter: torch.Tensor) -> bool:
    return parameter.dim() == 1 and "norm" in name and name.endswith("weight")


def _to_bin(folder: Path, max_shard_size: str) -> None:
    """Rewrite a folder's safetensors as torch files with the same names in the same order of sizes."""
    from huggingface_hub import save_torch_state_dict
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    save_torch_state_dict(
        tensors,
        folder,
        max_shard_size=max_shard_size,
        safe_serialization=False,
        filename_pattern="pytorch_model{suffix}.bin",
    )
    for file in [*files, folder / "model.safetensors.index.json"]:
        file.unlink(missing_ok=True)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read a checkpoint's tensors with safetensors or torch, under the names on disk."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    for file in sorted(folder.glob("*.bin")):
        found |= torch.load(file, weights_only=True)
    return found


def config(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's config.json."""
    return dict(json.loads((folder / "config.json").read_text()))
