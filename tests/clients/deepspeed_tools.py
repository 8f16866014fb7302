"""DeepSpeed's own tools, each as the request of a `RankServer` with one rank."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ShardLoad", "Universal", "ZeroToFp32"]


@dataclasses.dataclass(frozen=True)
class ZeroToFp32:
    """The consolidated float32 state dict."""

    folder: str
    exclude_frozen: bool
    world: int = 1

    def run(self, _rank: int, _store: Path) -> dict[str, torch.Tensor]:
        """Tensors by name, buffers and shared names too."""
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        found = get_fp32_state_dict_from_zero_checkpoint(self.folder, exclude_frozen_parameters=self.exclude_frozen)
        return {name: tensor.clone() for name, tensor in found.items()}


@dataclasses.dataclass(frozen=True)
class Universal:
    """The universal checkpoint of one folder, written to another."""

    tag: str
    out: str
    inject: bool
    strict: bool
    world: int = 1

    def run(self, _rank: int, _store: Path) -> None:
        """Do what the command line does."""
        from deepspeed.checkpoint import ds_to_universal

        ds_to_universal.main(
            argparse.Namespace(
                input_folder=self.tag,
                output_folder=self.out,
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=self.strict,
                inject_missing_state=self.inject,
            )
        )


@dataclasses.dataclass(frozen=True)
class ShardLoad:
    """One tensor-parallel rank's share of Megatron shards."""

    files: tuple[str, ...]
    version: float | None
    size: int
    rank: int
    module_key: str | None
    is_pipe_parallel: bool
    world: int = 1

    def run(self, _rank: int, _store: Path) -> dict[str, torch.Tensor]:
        """The tensors under the module's key."""
        from deepspeed.runtime.state_dict_factory import SDLoaderFactory

        loader = SDLoaderFactory.get_sd_loader(list(self.files), None, "Megatron", self.version)
        _, saved, _ = loader.load(self.size, self.rank, module_key=self.module_key, is_pipe_parallel=self.is_pipe_parallel)
        module = saved if self.module_key is None else loader.get_module(saved)
        return {name: tensor.clone() for name, tensor in module.items()}
