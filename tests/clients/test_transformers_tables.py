"""transformers' own tables say what ours say: names, shapes, stacking of experts, and who holds what under tensor parallelism.

For every built-in family, on the tiny model of `tests/unit/configs.py`:

* the tensors that transformers saves are those that a config.json alone implies;
* a made-up checkpoint is loaded whole, and what transformers then has in memory (its ``conversion_mapping`` at work) is what our
  spelling of that memory holds; what it saves again is the checkpoint;
* the model is sharded with transformers' own plan and code (``base_model_tp_plan``, ``apply_tensor_parallelism``) over a pretended
  group of two ranks, and each rank's part of each parameter is, bit for bit, what our rank holds. `DIFFERENCES` lists where
  it is not, and why; an entry that is no difference any more fails too.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch

import shardwright as sw
from shardwright import Layout
from shardwright.planner.tables import FAMILIES
from tests.clients import hf_models
from tests.clients.judge import MEMORY, assert_same_bits
from tests.unit.configs import CONFIGS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedModel

pytestmark = pytest.mark.clients("transformers")

WORDS = {"vocab_size": 132}
"""An even vocabulary: transformers does not pad it, so its ranks would have unequal shares."""

_WHOLE = "transformers' plan does not name it, so every rank has the whole; ranks here share it as Megatron's do"
_CUT = "transformers cuts the fused rows as they lie and gathers the output; each rank here has its share of each fused part"
_LAYER = "model.layers.{layer}."
DIFFERENCES: dict[str, dict[str, str]] = {
    "qwen2_moe": {f"{_LAYER}mlp.shared_expert.{name}_proj.weight": _WHOLE for name in ("gate", "up", "down")},
    "phi3": {f"{_LAYER}self_attn.qkv_proj.weight": _CUT, f"{_LAYER}mlp.gate_up_proj.weight": _CUT},
    "gpt_neox": {"gpt_neox.embed_in.weight": _WHOLE},
    "deepseek_v3": {f"{_LAYER}self_attn.{name}_proj.weight": _WHOLE for name in ("q_b", "kv_b", "o")},
}
"""By family: parameters whose shares differ, counters open, and why."""

NO_PLAN = frozenset(("bloom", "falcon", "gpt2", "gpt_oss", "opt"))
"""Families that transformers has no tensor-parallel plan for (GPT-OSS: for the head alone)."""


def _config(folder: Path, family: str, **fields: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(CONFIGS[family] | fields))
    return path


def _load(folder: Path) -> PreTrainedModel:
    """The model, with every key of the checkpoint accounted for."""
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    return model


def _memory_spelling(family: str, names: set[str], source: Path) -> str | None:
    """The spelling of the family that has most of these names; None where it has but one."""
    spellings = FAMILIES.get(family).spellings
    return max(spellings, key=lambda s: len(names & set(_held(source, 1, 0, s))), default=None)


def _held(source: Path, tp: int, rank: int, spelling: str | None) -> dict[str, torch.Tensor]:
    return sw.open(source).state_dict(to="ranks", layout=Layout(tp=tp), rank=rank, spec=spelling)


def _in_memory(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Its parameters and saved buffers, tied ones once."""
    tied = {name for name in model.state_dict() if name not in dict(model.named_parameters())} - set(dict(model.named_buffers()))
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


@pytest.mark.parametrize("family", CONFIGS)
def test_a_config_implies_what_transformers_saves(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {k: v for k, v in CONFIGS[family].items() if k not in ("architectures", "dtype", "torch_dtype")}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "saved")
    saved = hf_models.tensors(tmp_path / "saved")
    implied = sw.open(tmp_path / "saved" / "config.json")
    kinds = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in saved.items()}
    assert {name: (t.dtype, t.shape) for name, t in implied.stored.items()} == kinds
    assert implied.family == family


@pytest.mark.parametrize("family", CONFIGS)
def test_conversion_tables_agree(family: str, tmp_path: Path) -> None:
    made = sw.synth(_config(tmp_path, family), tmp_path / "made")
    model = _load(made)
    memory = _in_memory(model)
    assert_same_bits(_held(made, 1, 0, _memory_spelling(family, set(memory), made)), memory)
    model.save_pretrained(tmp_path / "saved")
    assert_same_bits(hf_models.tensors(tmp_path / "saved"), hf_models.tensors(made))
    sw.convert(tmp_path / "saved", tmp_path / "ranks", to="ranks", layout=Layout(pp=2), memory=MEMORY)
    assert sw.verify(tmp_path / "ranks", made, memory=MEMORY).ok


@pytest.fixture
def pretended_group() -> Iterator[Any]:
    """``group(rank)``: a group of two ranks of which this process is that one, and the others do not exist."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def group(rank: int) -> Any:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
        return init_device_mesh("cpu", (2,))

    yield group
    if dist.is_initialized():
        dist.destroy_process_group()


def _shares(model: PreTrainedModel, mesh: Any) -> dict[str, torch.Tensor]:
    """What transformers' plan leaves of each parameter on this rank; of tied ones, once."""
    from torch.distributed.tensor import DTensor
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    names = dict(model.named_parameters()).keys()
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - names
    plan, _, _ = model._resolve_parallel_plans(DistributedConfig(tp_size=2))
    apply_tensor_parallelism(model, mesh, {name: style for name, style in plan.items() if name not in tied})
    saved = model.state_dict().keys()
    held = {name: p for name, p in (*model.named_parameters(), *model.named_buffers()) if name in names | (saved - tied)}
    return {name: (p.to_local() if isinstance(p, DTensor) else p).detach() for name, p in held.items()}


@pytest.mark.parametrize("family", CONFIGS)
def test_tensor_parallel_plans_agree(family: str, pretended_group: Any, tmp_path: Path) -> None:
    made = sw.synth(_config(tmp_path, family, **WORDS), tmp_path / "made")
    assert bool(_load(made).base_model.tp_plan) == (family not in NO_PLAN)
    if family in NO_PLAN:
        assert family not in DIFFERENCES
        return
    differ = set()
    for rank in range(2):
        theirs = _shares(_load(made), pretended_group(rank))
        ours = _held(made, 2, rank, _memory_spelling(family, set(theirs), made))
        assert len(theirs.keys() & ours.keys()) > 10, "names of the same model"
        equal = {name for name in theirs.keys() & ours.keys() if theirs[name].shape == ours[name].shape and theirs[name].equal(ours[name])}
        differ |= {re.sub(r"\.layers\.\d+\.", ".layers.{layer}.", name) for name in (theirs.keys() | ours.keys()) - equal}
        if rank:
            assert any(theirs[name].shape != p.shape for name, p in _load(made).named_parameters()), "the plan does split"
    assert differ == set(DIFFERENCES.get(family, {})), family
    assert all(len(why) > 20 for why in DIFFERENCES.get(family, {}).values())
