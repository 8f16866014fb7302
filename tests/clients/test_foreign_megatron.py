"""Checkpoints that Megatron-core itself made and saved, with everything that a training run leaves in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import shardwright as sw
from shardwright import Layout
from shardwright.errors import ConfigError
from tests.clients import hf_models
from tests.clients.hf_logits import logits, token_ids
from tests.clients.judge import MEMORY, TOLERANCE, distance, megatron_logits
from tests.clients.mcore_foreign import Foreign
from tests.clients.test_harness import megatron_args

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from pathlib import Path

    from tests.clients.mcore import Megatron

pytestmark = pytest.mark.clients("transformers", "megatron.core")


def _args(folder: Path, layout: Layout, **more: Any) -> argparse.Namespace:
    """The args of a model of this Hugging Face config; ``vocab_size`` is not among them, as Megatron-LM may leave it."""
    sizes = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "padded_vocab_size": -(-hf_models.VOCAB // (128 * layout.tp)) * 128 * layout.tp,
    }
    return megatron_args(hf_models.config(folder), **sizes, **more)


@pytest.mark.parametrize(
    ("case", "family", "dtype", "layout", "spec", "more"),
    [
        ("llama", None, "float32", Layout(tp=2, pp=2), "te", {}),
        ("llama", None, "bfloat16", Layout(tp=2, pp=3), "te", {"decoder_first_pipeline_num_layers": 2}),
        ("llama_tied", None, "float32", Layout(tp=2, pp=2), "te", {}),
        ("llama_rope3", None, "float32", Layout(tp=4), "local", {}),
        ("mistral", "mistral", "float32", Layout(tp=2, pp=2), "te", {}),
        ("qwen2", None, "float32", Layout(tp=2, pp=2, vpp=2), "te", {}),
        ("qwen3", None, "bfloat16", Layout(tp=2, pp=2), "te", {"pipeline_model_parallel_layout": "Et*5|t*7L"}),
        ("qwen3_tied", None, "float32", Layout(), "local", {}),
    ],
)
def test_checkpoints_that_megatron_made(
    case: str, family: str | None, dtype: str, layout: Layout, spec: str, more: dict[str, Any],
    hf_case: Callable[..., Path], mcore: Megatron, tmp_path: Path,
) -> None:  # fmt: skip
    args = _args(hf_case(case, dtype=dtype), layout, **more)
    folder = mcore.save(Foreign(str(tmp_path / "foreign"), args, spec))
    expected = megatron_logits(mcore, folder, layout)
    opened = sw.open(folder, family=family, vocab_size=hf_models.VOCAB)
    job = sw.convert(opened, tmp_path / "hf", to="huggingface", memory=MEMORY)
    assert {"optimizer", "rng_state", "opt_param_scheduler"} <= {d.name for d in job.plan.dropped}
    assert any("_extra_state" in d.name for d in job.plan.dropped) == (spec == "te")
    assert distance(logits(tmp_path / "hf", token_ids(hf_models.VOCAB, 96)), expected) < TOLERANCE
    assert {t.dtype for t in hf_models.tensors(tmp_path / "hf").values()} == {getattr(torch, dtype)}
    assert sw.verify(tmp_path / "hf", opened, memory=MEMORY).ok


def test_another_layout_in_one_hop(hf_case: Callable[..., Path], mcore: Megatron, tmp_path: Path) -> None:
    before, after = Layout(tp=2, pp=2), Layout(tp=4, pp=3)
    folder = mcore.save(Foreign(str(tmp_path / "foreign"), _args(hf_case("qwen3"), before), "te"))
    opened = sw.open(folder, vocab_size=hf_models.VOCAB)
    sw.convert(opened, tmp_path / "there", to="megatron-legacy", layout=after, spec="local", memory=MEMORY)
    assert distance(megatron_logits(mcore, tmp_path / "there", after), megatron_logits(mcore, folder, before)) < TOLERANCE
    assert sw.verify(tmp_path / "there", opened, memory=MEMORY).ok


def test_trained_padding_rows_are_reported(hf_case: Callable[..., Path], mcore: Megatron, tmp_path: Path) -> None:
    folder = mcore.save(Foreign(str(tmp_path / "foreign"), _args(hf_case("llama"), Layout(tp=2)), "te"))
    job = sw.plan(sw.open(folder, vocab_size=hf_models.VOCAB), tmp_path / "hf", to="huggingface", memory=MEMORY)
    found = job.execute().padding
    assert found.keys() == {"model.embed_tokens.weight", "lm_head.weight"}


def test_an_unknown_vocabulary_is_refused(hf_case: Callable[..., Path], mcore: Megatron, tmp_path: Path) -> None:
    folder = mcore.save(Foreign(str(tmp_path / "foreign"), _args(hf_case("llama"), Layout(tp=2)), "te"))
    with pytest.raises(ConfigError, match="vocab-size"):
        sw.open(folder)
