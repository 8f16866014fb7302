"""Experts as transformers itself holds them: stacked in memory, one by one on disk."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import save_file

import shardwright as sw
from shardwright import Layout
from tests.clients import hf_models
from tests.clients.judge import MEMORY, assert_same_bits, assert_same_model, distance, huggingface_logits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.clients("transformers")

CASES = ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_moe_sparse")


def _dumped(source: Path, out: Path) -> Path:
    """The model's ``state_dict()`` as transformers 5 has it in memory, saved as it is."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    out.mkdir()
    save_file(
        {name: t.contiguous() for name, t in model.state_dict().items() if name not in tied}, out / "model.safetensors", {"format": "pt"}
    )
    for name in ("config.json", "generation_config.json"):
        shutil.copy(source / name, out / name)
    return out


@pytest.mark.parametrize("case", CASES)
def test_a_dump_of_the_memory_is_read(case: str, hf_case: Callable[..., Path], tmp_path: Path) -> None:
    source = hf_case(case)
    dump = _dumped(source, tmp_path / "dump")
    assert any("experts.gate_up_proj" in name for name in hf_models.tensors(dump)), "transformers stacks them still"
    opened = sw.open(dump)
    assert opened.source.spec == "stacked"
    sw.convert(opened, tmp_path / "disk", to="huggingface", memory=MEMORY)
    assert_same_model(tmp_path / "disk", source)
    sw.convert(opened, tmp_path / "ranks", to="megatron-legacy", layout=Layout(tp=2, ep=3), memory=MEMORY)
    assert sw.verify(tmp_path / "ranks", source, memory=MEMORY).ok


@pytest.mark.parametrize("case", CASES)
def test_stacked_files_are_what_transformers_holds(case: str, hf_case: Callable[..., Path], tmp_path: Path) -> None:
    source = hf_case(case)
    sw.convert(source, tmp_path / "stacked", to="huggingface", spec="stacked", memory=MEMORY)
    assert_same_bits(hf_models.tensors(tmp_path / "stacked"), hf_models.tensors(_dumped(source, tmp_path / "dump")))
    # Equal bits, but transformers' own stack may lie differently in memory, and then another kernel multiplies it.
    assert distance(huggingface_logits(tmp_path / "stacked"), huggingface_logits(source)) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_swapped_experts_are_noticed(case: str, hf_case: Callable[..., Path], tmp_path: Path) -> None:
    """Two experts in each other's place: transformers computes something else, so equal logits prove their order."""
    source = hf_case(case)
    tensors = hf_models.tensors(source)
    swapped = {name: tensors[_swap(name)] for name in tensors}
    assert swapped.keys() == tensors.keys()
    shutil.copytree(source, tmp_path / "swapped", ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(swapped, tmp_path / "swapped" / "model.safetensors", {"format": "pt"})
    assert distance(huggingface_logits(tmp_path / "swapped"), huggingface_logits(source)) > 1e-2


def _swap(name: str) -> str:
    """Experts 1 and 10 of every layer, in each other's place."""
    one, ten = ".experts.1.", ".experts.10."
    return name.replace(one, ten) if one in name else name.replace(ten, one)
