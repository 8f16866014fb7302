"""``ranks``: files that other code can take as they are.

Megatron's dialect equals a plain torch conversion from the rules, and Megatron-core runs it; Hugging Face's dialect is cut
the way transformers' own tensor-parallel plan cuts.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import pytest
import torch

import shardwright as sw
from shardwright import Layout
from tests.clients import hf_models
from tests.clients.judge import MEMORY, TOLERANCE, assert_same_bits, assert_same_model, distance, huggingface_logits, megatron_logits
from tests.clients.test_harness import Ranks, reference, write

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.clients.mcore import Megatron

pytestmark = pytest.mark.clients("transformers", "megatron.core")

Tensors = dict[str, torch.Tensor]


def _rank_files(folder: Path) -> dict[tuple[int, int], Tensors]:
    """Tensors of every rank file by (tp, pp), read with safetensors."""
    from safetensors.torch import load_file

    found = {}
    for file in folder.glob("rank_*.safetensors"):
        match = re.fullmatch(r"rank_\d{5}_tp(\d+)_pp(\d+)\.safetensors", file.name)
        assert match
        found[int(match[1]), int(match[2])] = load_file(file)
    return found


def _chunks(tensors: Tensors, vpp: int) -> dict[str, Tensors]:
    """``{"model": …}``, or one entry per virtual chunk."""
    if vpp == 1:
        return {"model": tensors}
    return {f"model{v}": {n.removeprefix(f"model{v}."): t for n, t in tensors.items() if n.startswith(f"model{v}.")} for v in range(vpp)}


@pytest.mark.parametrize(
    ("case", "dtype", "layout"),
    [
        ("llama", "float32", Layout(tp=2, pp=2)),
        ("llama_mqa", "float32", Layout(tp=4)),
        ("llama_bias", "bfloat16", Layout(tp=2)),
        ("llama_tied", "float32", Layout(tp=2, pp=3)),
        ("llama_wide", "bfloat16", Layout(tp=4)),
        ("mistral", "float32", Layout(pp=3)),
        ("qwen2", "float32", Layout(tp=2, pp=2, vpp=2)),
        ("qwen3_tied", "bfloat16", Layout(tp=2, pp=3, vpp=2)),
    ],
)
def test_megatron_dialect(case: str, dtype: str, layout: Layout, hf_case: Callable[..., Path], mcore: Megatron, tmp_path: Path) -> None:
    """Equal to plain torch, tensor by tensor; and Megatron-core runs the very tensors of the rank files."""
    source, out = hf_case(case, dtype=dtype), tmp_path / "out"
    sw.convert(source, out, to="ranks", dialect="megatron", layout=layout, memory=MEMORY)
    ranks: Ranks = reference(source, layout.tp, layout.pp, layout.vpp)
    files = _rank_files(out)
    assert files.keys() == ranks.keys()
    for place, content in ranks.items():
        models = _chunks(files[place], layout.vpp)
        for key, model in models.items():
            assert_same_bits(model, content[key])
        content.update(models)
    folder = write(ranks, tmp_path / "megatron", layout.pp)
    assert distance(megatron_logits(mcore, folder, layout), huggingface_logits(source)) < TOLERANCE
    sw.convert(out, tmp_path / "back", to="huggingface", memory=MEMORY)
    assert_same_model(tmp_path / "back", source)


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("case", ["llama", "llama_tied", "llama_mqa", "llama_bias", "mistral", "qwen2", "qwen3"])
def test_huggingface_dialect_follows_the_plan_of_transformers(case: str, pp: int, hf_case: Callable[..., Path], tmp_path: Path) -> None:
    source, out = hf_case(case), tmp_path / "out"
    sw.convert(source, out, to="ranks", layout=Layout(tp=2, pp=pp), pad_vocab_to=2, memory=MEMORY)
    whole, plan = hf_models.tensors(source), _plan(source)
    replicated = ("k_proj", "v_proj") if case == "llama_mqa" else ()
    held: set[str] = set()
    for (tp, _), tensors in _rank_files(out).items():
        held |= tensors.keys()
        planned = {name: tensor for name, tensor in tensors.items() if _style(name, plan) is not None}
        expected = {name: _planned(whole[name], name, _style(name, plan), tp, replicated) for name in planned}
        assert_same_bits(planned, expected)
        for name in tensors.keys() - planned.keys():
            table = whole.get(name, whole["model.embed_tokens.weight"])
            vocabulary = torch.nn.functional.pad(table, (0, 0, 0, 1)).chunk(2)[tp] if table.dim() == 2 else table
            assert torch.equal(tensors[name], vocabulary), name
    assert held - {"lm_head.weight"} == whole.keys() - {"lm_head.weight"}
    sw.convert(out, tmp_path / "back", to="huggingface", memory=MEMORY)
    assert_same_model(tmp_path / "back", source)


def _plan(folder: Path) -> dict[str, str]:
    """The config's plan: which linear is cut along its outputs, which along its inputs, which is not cut."""
    from transformers import AutoConfig

    plan: dict[str, str] = AutoConfig.from_pretrained(folder).base_model_tp_plan
    assert {"colwise", "rowwise"} <= set(plan.values())
    return plan


def _style(name: str, plan: dict[str, str]) -> str | None:
    module = name.removeprefix("model.").rpartition(".")[0]
    return next((style for pattern, style in plan.items() if fnmatchcase(module, pattern)), None)


def _planned(whole: torch.Tensor, name: str, style: str | None, tp: int, replicated: tuple[str, ...]) -> torch.Tensor:
    """One of two parts; fewer key/value heads than ranks are held whole, which the plan leaves to the engine."""
    if name.split(".")[-2] in replicated or (style or "").startswith("replicated"):
        return whole
    if style == "colwise":
        return whole.chunk(2)[tp]
    assert style == "rowwise"
    return whole.chunk(2, 1)[tp] if whole.dim() == 2 else whole


@pytest.mark.parametrize(("dialect", "spec", "pad"), [("huggingface", None, 2), ("megatron", "te", None), ("megatron", "local", 256)])
def test_every_rank_is_what_state_dict_reads(
    dialect: str, spec: str | None, pad: int | None, hf_case: Callable[..., Path], tmp_path: Path
) -> None:
    """Resharded at load, nothing written: the same tensors as in the files, from whatever source."""
    source, layout = hf_case("qwen3"), Layout(tp=2, pp=2)
    options = {"to": "ranks", "dialect": dialect, "spec": spec, "layout": layout, "pad_vocab_to": pad}
    sw.convert(source, tmp_path / "out", memory=MEMORY, **options)
    for (tp, pp), tensors in _rank_files(tmp_path / "out").items():
        for opened in (sw.open(source), sw.open(tmp_path / "out")):
            assert_same_bits(opened.state_dict(rank={"tp": tp, "pp": pp}, **options), tensors)
