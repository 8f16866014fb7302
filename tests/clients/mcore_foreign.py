"""Megatron checkpoints that Megatron-core makes: a `GPTModel` with random weights, saved as Megatron-LM saves it.

1. Every rank builds its chunks from ``args``, as `mcore_model` does when it loads.
2. Parameters get random values by name, the same on all ranks where Megatron holds copies; padding rows of the vocabulary
   are random too, as they are after training.
3. ``torch.save`` of what Megatron-LM's ``generate_state_dict`` collects: args, version, iteration, models with their
   ``_extra_state``, optimizer, scheduler, random states.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import random
import re
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from tests.clients import mcore_model

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ITERATION", "Foreign"]

ITERATION = 1200


@dataclasses.dataclass(frozen=True)
class Foreign:
    """What to make: a folder, the args of the model and its layout, and which names its spec has."""

    folder: str
    args: argparse.Namespace
    spec: str
    seed: int = 0

    @property
    def world(self) -> int:
        """Number of ranks; tensor parallel rank is the fastest."""
        return int(self.args.tensor_model_parallel_size * self.args.pipeline_model_parallel_size)

    def run(self, rank: int, store: Path) -> None:
        """Be one rank: build, fill, save."""
        from megatron.core import parallel_state

        args = self.args
        vpp = args.virtual_pipeline_model_parallel_size or 1
        dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=self.world)
        parallel_state.initialize_model_parallel(
            args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size
        )
        tp, pp = rank % args.tensor_model_parallel_size, rank // args.tensor_model_parallel_size
        models = {f"model{v}" if vpp > 1 else "model": self._chunk(tp, pp, v, vpp) for v in range(vpp)}
        file = _folder(Path(self.folder), tp, pp, args.pipeline_model_parallel_size) / "model_optim_rng.pt"
        file.parent.mkdir(parents=True)
        torch.save(_envelope(_training_args(args), models), file)
        (Path(self.folder) / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
        dist.barrier()
        dist.destroy_process_group()

    def _chunk(self, tp: int, pp: int, v: int, vpp: int) -> dict[str, Any]:
        """One model chunk's state dict."""
        last = pp == self.args.pipeline_model_parallel_size - 1 and v == vpp - 1
        model = mcore_model.build(self.args, (pp, v) == (0, 0), last, v if vpp > 1 else None)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self._values(name, parameter, tp, (pp, v)))
        state = model.to(self.args.params_dtype).state_dict()
        weights = {name: tensor for name, tensor in state.items() if not name.endswith("_extra_state")}
        return weights if self.spec == "local" else _as_transformer_engine(weights)

    def _values(self, name: str, parameter: torch.Tensor, tp: int, chunk: tuple[int, int]) -> torch.Tensor:
        """Random values that depend on the tensor and, where ranks hold different parts, on the rank."""
        copied = name.endswith(("norm.weight", "linear_proj.bias", "linear_fc2.bias"))
        tied = not self.args.untie_embeddings_and_output_weights and name in ("embedding.word_embeddings.weight", "output_layer.weight")
        key = f"{self.seed} {'vocabulary' if tied else (name, chunk)} {0 if copied else tp}"
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
        return 1 + 0.1 * noise if name.endswith("norm.weight") else noise * 0.8 / parameter.shape[-1] ** 0.5


def _folder(root: Path, tp: int, pp: int, pp_size: int) -> Path:
    return root / f"iter_{ITERATION:07d}" / (f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if pp_size > 1 else ""))


def _as_transformer_engine(weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Transformer Engine's names, with every kind of ``_extra_state`` that its versions have written."""
    found: dict[str, Any] = {}
    for name, tensor in weights.items():
        name = re.sub(r"input_layernorm\.(weight|bias)$", r"self_attention.linear_qkv.layer_norm_\1", name)
        name = re.sub(r"pre_mlp_layernorm\.(weight|bias)$", r"mlp.linear_fc1.layer_norm_\1", name)
        found[name] = tensor
    for name in [name for name in found if re.search(r"linear_(qkv|proj|fc1|fc2)\.weight$", name)]:
        module = name.removesuffix(".weight")
        kind = module.rpartition(".")[2]
        found[f"{module}._extra_state"] = {"linear_qkv": _bytes_io(), "linear_proj": None}.get(kind, torch.arange(37, dtype=torch.uint8))
    return found


def _bytes_io() -> io.BytesIO:
    """An empty FP8 state, the way that Transformer Engine 1 pickles it."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    return buffer


def _envelope(args: argparse.Namespace, models: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    weight = torch.nn.Parameter(torch.randn(7, 3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
        "num_floating_point_operations_so_far": 1.5e20,
        **models,
        "optimizer": {"optimizer": optimizer.state_dict(), "fp32_from_fp16_params": [[torch.randn(5, 3)]], "grad_scaler": None},
        "opt_param_scheduler": {"max_lr": 3e-4, "lr_decay_style": "cosine", "num_steps": ITERATION * 8},
        "rng_state": [
            {
                "random_rng_state": random.getstate(),
                "np_rng_state": np.random.get_state(),
                "torch_rng_state": torch.get_rng_state(),
                "cuda_rng_state": torch.get_rng_state(),
                "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
            }
        ],
    }


def _training_args(model: argparse.Namespace) -> argparse.Namespace:
    """A model's args among the many others that a training run has."""
    from megatron.core.transformer.enums import AttnBackend

    others = {
        "attention_backend": AttnBackend.auto, "ckpt_format": "torch", "data_path": ["a", "b"], "dist_ckpt_format_deprecated": None,
        "exit_signal": 15, "lr": 3e-4, "micro_batch_size": 1, "rank": 0, "seed": 1234, "split": "969, 30, 1", "world_size": 4,
        "rope_scaling_factor": 8.0, "squared_relu": False, "tokenizer_type": "HuggingFaceTokenizer", "train_iters": 5000,
        "main_grads_dtype": torch.float32, "num_experts": None, "use_mcore_models": True, "window_size": None,
        "expert_model_parallel_size": 1, "make_vocab_size_divisible_by": 128,
    }  # fmt: skip
    return argparse.Namespace(**others | vars(model))
