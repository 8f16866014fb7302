"""Loading into real models: transformers' and Megatron-core's own modules, filled in place, compute what the source computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

import shardwright as sw
from shardwright import Layout
from tests.clients import hf_models
from tests.clients.deepspeed_tables import opened
from tests.clients.hf_logits import token_ids
from tests.clients.judge import MEMORY, TOLERANCE, assert_same_bits, distance, huggingface_logits
from tests.clients.test_deepspeed_harness import RUNS
from tests.clients.test_deepspeed_zero import dropped

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.clients.deepspeed import Run
    from tests.clients.mcore import Megatron


@pytest.mark.clients("transformers")
@pytest.mark.parametrize(("case", "layout"), [("llama_tied", Layout(tp=4, pp=2)), ("qwen2_moe", Layout(tp=2, ep=2))], ids=str)
def test_transformers_from_megatron_ranks(case: str, layout: Layout, hf_case: Callable[..., Path], tmp_path: Path) -> None:
    """A model made on ``meta`` but for its buffers, tied where the config ties, from files of Megatron's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source = hf_case(case)
    sw.convert(source, tmp_path / "m", to="megatron-legacy", layout=layout, memory=MEMORY)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), attn_implementation="eager", dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    spelling = "stacked" if any("gate_up_proj" in name and "experts" in name for name, _ in model.named_parameters()) else None
    report = sw.open(tmp_path / "m").load_into(model, to="huggingface", spec=spelling, memory=MEMORY)
    assert (report.missing, report.unexpected, report.on_meta) == ((), (), ())
    with torch.no_grad():
        found = model.eval()(input_ids=token_ids(hf_models.VOCAB, 96), use_cache=False).logits.float()
    assert torch.equal(found, huggingface_logits(source))


@pytest.mark.clients("deepspeed", "transformers")
@pytest.mark.parametrize("name", ["stage 1, frozen", "stage 2, tied", "stage 3, bfloat16", "BF16_Optimizer", "tp 2, pp 2", "experts"])
def test_deepspeed_runs_at_another_layout(name: str, trained: Callable[..., Run], tmp_path: Path) -> None:
    """Genuine flat partitions, with what is averaged, tied or frozen: what convert writes, from whatever lies there."""
    run = trained(**RUNS[name])
    source, drop = opened(run, run.folder, tmp_path), dropped(run)
    layout = Layout() if run.job.model == "experts" else Layout(tp=2)
    options = {"to": "ranks", "layout": layout, "drop": drop, **({} if layout.ranks == 1 else {"pad_vocab_to": 2})}
    sw.convert(source, tmp_path / "out", memory=MEMORY, **options)
    found = source.state_dicts(memory=MEMORY, **options)
    for rank, path in enumerate(sorted((tmp_path / "out").glob("rank_*.safetensors"))):
        assert_same_bits(found[rank], load_file(path))
        assert_same_bits(dict(source.state_dict(rank=rank, **options)), load_file(path))


@pytest.mark.clients("transformers", "megatron.core")
@pytest.mark.parametrize(
    ("case", "before", "after"),
    [
        ("llama_tied", None, Layout(tp=2)),
        ("llama", Layout(tp=4), Layout(tp=2, pp=2, vpp=2)),
        ("qwen3_moe", Layout(pp=2), Layout(tp=2, ep=2)),
    ],
    ids=str,
)
def test_megatron_core_from_any_checkpoint(
    case: str, before: Layout | None, after: Layout, hf_case: Callable[..., Path], mcore: Megatron, tmp_path: Path
) -> None:
    """GPTModel's own parameters, on ranks that load together; from Hugging Face's files, or Megatron's at another layout."""
    source = hf_case(case)
    there = source
    if before is not None:
        there = tmp_path / "there"
        sw.convert(source, there, to="megatron-legacy", layout=before, memory=MEMORY)
    sw.convert(source, tmp_path / "args", to="megatron-legacy", layout=after, memory=MEMORY)
    sizes = {"tp": after.tp, "pp": after.pp, "vpp": after.vpp, "ep": after.ep}
    found = mcore.logits(tmp_path / "args", **sizes, vocab=hf_models.VOCAB, ids=token_ids(hf_models.VOCAB, 96), source=there)
    assert distance(found, huggingface_logits(source)) < TOLERANCE
