"""ZeRO checkpoints as DeepSpeed lays them out, written from arrays by the rules themselves, with torch and without DeepSpeed.

The rules (formats' own sources: deepspeed ``stage_1_and_2.py``, ``bf16_optimizer.py``, ``stage3.py``) are stated here once more, in
numpy, and know nothing of shardwright. `write` gives a folder that ``zero_to_fp32`` would read; objects of DeepSpeed's own classes
are pickled under its names.
"""

from __future__ import annotations

import enum
import json
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["STATES", "Zero", "deepspeed_classes", "write"]

STATES = ("exp_avg", "exp_avg_sq")
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Zero:
    """How a run cut its tensors.

    Attributes
    ----------
    stage
        1, 2, 3, or ``"bf16"`` for BF16_Optimizer.
    groups
        Names of trained parameters by group (at stage 3, sub-group), in flat order; None: one group of all.
    alignment
        Elements to a multiple of which parameters are padded (stages 1 and 2).
    elastic
        The optimizer's state without padding and groups (stages 1 and 2).
    shared
        Further names of parameters.
    """

    stage: int | str = 2
    dp: int = 2
    groups: Sequence[Sequence[str]] | None = None
    alignment: int = 1
    elastic: bool = False
    frozen: Sequence[str] = ()
    shared: Mapping[str, str] = field(default_factory=dict)
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tag: str = "global_step3"
    low: torch.dtype = torch.bfloat16
    blank: float = 0.0
    """What padding holds."""
    client: Mapping[str, Any] = field(default_factory=dict)


def write(root: Path, masters: Arrays, states: Mapping[str, Arrays], zero: Zero, config: Mapping[str, Any] | None = None) -> Path:
    """Write the checkpoint below `root`; `states` are those of `STATES`, by parameter."""
    folder = root / zero.tag
    folder.mkdir(parents=True)
    (root / "latest").write_text(zero.tag)
    if config is not None:
        (root / "config.json").write_text(json.dumps(config))
    trained = [name for name in masters if name not in zero.frozen]
    groups = zero.groups or [trained]
    shapes = [{name: torch.Size(masters[name].shape) for name in group} for group in groups]
    with deepspeed_classes() as (stage_of, place):
        for rank in range(zero.dp):
            optimizer = _sliced(rank, masters, states, groups, zero) if zero.stage == 3 else _joined(rank, masters, states, groups, zero)
            if zero.stage != 3:
                optimizer["param_slice_mappings"] = [
                    {name: place(numel=stop - start, start=start) for name, (start, stop) in _places(rank, masters, group, zero).items()}
                    for group in groups
                ]
            if zero.stage != "bf16":
                optimizer["zero_stage"] = stage_of(zero.stage)
            prefix = "bf16_" if zero.low is torch.bfloat16 else ""
            torch.save(
                {"optimizer_state_dict": optimizer, "ds_config": _config(zero), "ds_version": "0.19.8"},
                folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
            )
            name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if zero.stage == 3 else "mp_rank_00_model_states.pt"
            if zero.stage == 3 or rank == 0:
                torch.save(_model(rank, masters, shapes, zero), folder / name)
    return root


def _config(zero: Zero) -> dict[str, Any]:
    """What the run was configured with, which each of its files repeats."""
    return {"train_batch_size": 4, "zero_optimization": {"stage": 1 if zero.stage == "bf16" else zero.stage}}


def _model(rank: int, masters: Arrays, shapes: list[dict[str, torch.Size]], zero: Zero) -> dict[str, Any]:
    low = {name: torch.from_numpy(array).to(zero.low) for name, array in masters.items()}
    frozen = {name: low[name] for name in zero.frozen}
    module = low if zero.stage != 3 else {name: torch.empty(0) for name in masters}
    parts = frozen if zero.stage != 3 else {name: torch.from_numpy(_slice(t.float().numpy(), rank, zero)) for name, t in frozen.items()}
    return {
        "module": {**module, **{alias: module[name] for alias, name in zero.shared.items()}, **zero.buffers},
        "buffer_names": list(zero.buffers),
        "optimizer": None,
        "param_shapes": shapes,
        "frozen_param_shapes": None if zero.stage in (1, "bf16") else {name: torch.Size(t.shape) for name, t in frozen.items()},
        "frozen_param_fragments": None if zero.stage in (1, "bf16") else parts,
        "shared_params": dict(zero.shared) if rank == 0 else {},
        "lr_scheduler": {"last_batch_iteration": 3},
        "skipped_steps": 0, "global_steps": 3, "global_samples": 12, "dp_world_size": zero.dp, "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": _config(zero), "ds_version": "0.19.8",
        **zero.client,
    }  # fmt: skip


def _joined(rank: int, masters: Arrays, states: Mapping[str, Arrays], groups: Sequence[Sequence[str]], zero: Zero) -> dict[str, Any]:
    """Stages 1 and 2, and BF16_Optimizer: equal parts of one vector per group."""
    paddings = [[-masters[name].size % zero.alignment for name in group[:-1]] + [0] for group in groups]

    def part(arrays: Arrays, group: Sequence[str], gaps: Sequence[int], stored: bool) -> torch.Tensor:
        blank = np.float32(zero.blank)
        pieces = [np.concatenate([arrays[n].reshape(-1), np.full(gap, blank, np.float32)]) for n, gap in zip(group, gaps, strict=True)]
        flat = np.concatenate(pieces)
        whole = np.concatenate([flat, np.full(-flat.size % (2 * zero.dp), blank, np.float32)])
        each = whole.size // zero.dp
        end = whole.size if stored else flat.size
        return torch.from_numpy(whole[min(rank * each, end) : min((rank + 1) * each, end)].copy())

    step = torch.tensor(3.0)
    kept = [
        {"step": step, **{key: part(states[key], group, gaps, not zero.elastic) for key in STATES}}
        for group, gaps in zip(groups, paddings, strict=True)
    ]
    param_groups = [{"lr": 0.1 * (i + 1), "betas": (0.9, 0.99), "params": [i]} for i in range(len(groups))]
    return {
        "clip_grad": 1.0,
        "base_optimizer_state": kept if zero.elastic else {"state": dict(enumerate(kept)), "param_groups": param_groups},
        "single_partition_of_fp32_groups": [
            part(masters, group, gaps, zero.stage == "bf16") for group, gaps in zip(groups, paddings, strict=True)
        ],
        "param_alignment_paddings": paddings,
        "partition_count": [zero.dp] * len(groups),
        "ds_version": "0.19.8",
    }


def _places(rank: int, masters: Arrays, group: Sequence[str], zero: Zero) -> dict[str, tuple[int, int]]:
    """Where each parameter lies in a rank's part, as its elements' numbers tell."""
    sizes = [masters[name].size + -masters[name].size % zero.alignment for name in group[:-1]] + [masters[group[-1]].size]
    each = -(-sum(sizes) // (2 * zero.dp)) * 2
    found = {}
    for name, begin in zip(group, np.cumsum([0, *sizes]), strict=False):
        mine = np.arange(begin, begin + masters[name].size) - rank * each
        mine = mine[(mine >= 0) & (mine < each)]
        if mine.size:
            found[name] = int(mine[0]), int(mine[-1]) + 1
    return found


def _sliced(rank: int, masters: Arrays, states: Mapping[str, Arrays], groups: Sequence[Sequence[str]], zero: Zero) -> dict[str, Any]:
    """Stage 3: a part of each parameter; what lies behind a parameter's end was never written."""

    def vector(arrays: Arrays, group: Sequence[str]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([_slice(arrays[name], rank, zero) for name in group]))

    kept = {i: {"step": torch.tensor(3.0), **{key: vector(states[key], group) for key in STATES}} for i, group in enumerate(groups)}
    return {
        "loss_scaler": None,
        "partition_count": zero.dp,
        "optimizer_state_dict": {"state": kept, "param_groups": [{"lr": 0.1, "params": list(range(len(groups)))}]},
        "fp32_flat_groups": [vector(masters, group) for group in groups],
    }


def _slice(array: np.ndarray, rank: int, zero: Zero) -> np.ndarray:
    each = -(-array.size // zero.dp)
    part = np.full(each, np.float32(np.nan))
    mine = array.reshape(-1)[rank * each : (rank + 1) * each]
    part[: mine.size] = mine
    return part


@contextmanager
def deepspeed_classes() -> Iterator[Any]:
    """DeepSpeed's enumeration of stages and its place of a fragment under their own names, so that pickles mention them."""
    linkage = types.ModuleType("deepspeed.utils.tensor_fragment")
    place = make_dataclass("fragment_address", [("numel", int), ("start", int)])
    place.__module__, linkage.fragment_address = linkage.__name__, place  # type: ignore[attr-defined]
    module = types.ModuleType("deepspeed.runtime.zero.config")
    kind = enum.IntEnum("ZeroStageEnum", {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3, "later": 4})
    kind.__module__, module.ZeroStageEnum = module.__name__, kind  # type: ignore[attr-defined]
    packages = ["deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero", "deepspeed.utils"]
    made = {name: types.ModuleType(name) for name in packages} | {module.__name__: module, linkage.__name__: linkage}
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    try:
        yield kind, place
    finally:
        for name, old in before.items():
            if old is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = old
