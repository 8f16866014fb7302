"""Judgements that several test modules share: equal bits, equal logits.

Logits are compared in float32 whatever a checkpoint stores, on 96 positions: enough for RoPE scaling to show.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tests.clients import hf_models
from tests.clients.hf_logits import logits, token_ids

if TYPE_CHECKING:
    from shardwright import Layout
    from tests.clients.mcore import Megatron

__all__ = [
    "MEMORY",
    "TOLERANCE",
    "assert_same_bits",
    "assert_same_model",
    "distance",
    "huggingface_logits",
    "megatron_logits",
    "rank_contents",
]

MEMORY = "256MiB"
TOLERANCE = 1e-4


def huggingface_logits(folder: Path) -> torch.Tensor:
    """transformers' float32 logits of a checkpoint that stays as it is; every key accounted for."""
    return _cached_logits(str(folder))


@functools.cache
def _cached_logits(folder: str) -> torch.Tensor:
    return logits(Path(folder), _ids())


def megatron_logits(mcore: Megatron, folder: Path, layout: Layout, launch: tuple[str, ...] = ()) -> torch.Tensor:
    """Megatron-core's float32 logits of a checkpoint in this layout; names, shapes, dtypes and args must fit."""
    sizes = {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "ep": layout.ep}
    return mcore.logits(folder, **sizes, vocab=hf_models.VOCAB, ids=_ids(), launch=launch)


def _ids() -> torch.Tensor:
    return token_ids(hf_models.VOCAB, 96)


def distance(one: torch.Tensor, two: torch.Tensor) -> float:
    """Largest difference; NaN where either holds one."""
    assert one.shape == two.shape
    return (one - two).abs().max().item()


def assert_same_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal names, dtypes, shapes and bytes."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        found = actual[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(_bytes(found), _bytes(tensor)), name


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same_model(actual: Path, expected: Path) -> None:
    """Two Hugging Face folders: equal tensors and configs, and transformers computes the same with both."""
    assert_same_bits(hf_models.tensors(actual), hf_models.tensors(expected))
    for name in ("config.json", "generation_config.json"):
        assert (actual / name).read_bytes() == (expected / name).read_bytes(), name
    assert torch.equal(logits(actual, _ids()), huggingface_logits(expected))


def rank_contents(folder: Path) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """The models of every Megatron rank file: ``{"mp_rank_00": {"model": {name: tensor}}}``."""
    found = {}
    for file in sorted(folder.glob("*/mp_rank_*/model_optim_rng.pt")):
        saved = torch.load(file, map_location="cpu", weights_only=False)
        found[file.parent.name] = {key: value for key, value in saved.items() if key.startswith("model")}
    return found
