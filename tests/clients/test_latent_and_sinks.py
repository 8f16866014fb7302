"""DeepSeek-V2, DeepSeek-V3 and GPT-OSS between Hugging Face and Megatron: latent attention, biased choice of experts, sinks.

Megatron-core cuts the down projections of latent attention in its local spec, which is the one that runs on CPU, and copies
them in Transformer Engine's: files of the latter run here with tp 1, and with tp 2 are compared in
`tests/unit/test_latent_and_sinks`.
"""

from __future__ import annotations

import itertools
import json
import shutil
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

import shardwright as sw
from shardwright import Layout
from tests.clients import hf_models
from tests.clients.hf_models import Case
from tests.clients.judge import MEMORY, TOLERANCE, assert_same_bits, assert_same_model, distance, huggingface_logits, megatron_logits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.clients.mcore import Megatron

pytestmark = pytest.mark.clients("transformers", "megatron.core")

_LATENT: dict[str, Any] = {
    "num_hidden_layers": 4, "num_key_value_heads": 8, "kv_lora_rank": 24, "q_lora_rank": 64, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 12, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "first_k_dense_replace": 1,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale": 0.707, "mscale_all_dim": 0.9,
}  # fmt: skip
CASES = {
    "deepseek_v3": Case("deepseek_v3", {**_LATENT, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}),
    "deepseek_v3_yarn": Case("deepseek_v3", {**_LATENT, "n_group": 1, "topk_group": 1, "rope_parameters": _YARN, "q_lora_rank": None}),
    "deepseek_v2": Case("deepseek_v2", {**_LATENT, "rope_parameters": _YARN, "routed_scaling_factor": 1.5}),
    "deepseek_v2_lite": Case("deepseek_v2", {**_LATENT, "q_lora_rank": None, "v_head_dim": 16}),
    # Square experts, as the released ones are; the window is shorter than the texts.
    "gpt_oss": Case(
        "gpt_oss",
        {"num_hidden_layers": 4, "head_dim": 16, "intermediate_size": 64, "num_local_experts": 12, "num_experts_per_tok": 3,
         "sliding_window": 16},
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a case, made by the first call."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = hf_models.make(CASES[name], tmp_path_factory.mktemp("hf") / name)
        return made[name]

    return folder


class Trip(NamedTuple):
    """One way there and back."""

    case: str
    layout: Layout
    spec: str = "local"

    def __str__(self) -> str:
        sizes = "-".join(f"{axis}{getattr(self.layout, axis)}" for axis in ("tp", "pp", "vpp", "ep"))
        return f"{self.case}-{sizes}-{self.spec}"


SELECTION = (
    Trip("deepseek_v3", Layout(tp=2, ep=2)),
    Trip("deepseek_v3", Layout(pp=2, vpp=2, ep=3), "te"),
    Trip("deepseek_v3_yarn", Layout(tp=2, pp=2)),
    Trip("deepseek_v2", Layout(tp=2, ep=2)),
    Trip("deepseek_v2_lite", Layout(pp=2, ep=2), "te-sequential"),
    Trip("gpt_oss", Layout(pp=2, ep=2), "te"),
    Trip("gpt_oss", Layout()),
)


def _grid() -> Iterator[Trip]:
    """Everything that a case's layers, heads and experts allow."""
    sizes = [(tp, pp, vpp) for tp in (1, 2, 4) for pp in (1, 2, 4) for vpp in (1, 2) if pp > 1 or vpp == 1 if pp * vpp <= 4]
    for name, (tp, pp, vpp), ep, spec in itertools.product(CASES, sizes, (1, 2, 3), ("te", "te-sequential", "local")):
        if tp == 1 or (name != "gpt_oss" and spec == "local"):
            yield Trip(name, Layout(tp=tp, pp=pp, vpp=vpp, ep=ep), spec)


def _round_trip(trip: Trip, case: Callable[[str], Path], mcore: Megatron, tmp_path: Path) -> None:
    source, there, back = case(trip.case), tmp_path / "there", tmp_path / "back"
    sw.convert(source, there, to="megatron-legacy", layout=trip.layout, spec=trip.spec, memory=MEMORY)
    assert distance(megatron_logits(mcore, there, trip.layout), huggingface_logits(source)) < TOLERANCE
    sw.convert(there, back, to="huggingface", memory=MEMORY)
    assert_same_model(back, source)


@pytest.mark.parametrize("trip", SELECTION, ids=str)
def test_there_and_back(trip: Trip, case: Callable[[str], Path], mcore: Megatron, tmp_path: Path) -> None:
    _round_trip(trip, case, mcore, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("trip", tuple(_grid()), ids=str)
def test_there_and_back_over_the_grid(trip: Trip, case: Callable[[str], Path], mcore: Megatron, tmp_path: Path) -> None:
    _round_trip(trip, case, mcore, tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_megatron_that_says_only_its_args(name: str, case: Callable[[str], Path], tmp_path: Path) -> None:
    """The config is made again from ``args``; transformers computes the same with it."""
    source, there, back = case(name), tmp_path / "there", tmp_path / "back"
    sw.convert(source, there, to="megatron-legacy", memory=MEMORY)
    (there / "shardwright.json").unlink()
    shutil.rmtree(there / "hf")
    opened = sw.open(there)
    assert opened.family == CASES[name].model_type
    sw.convert(opened, back, to="huggingface", memory=MEMORY)
    assert_same_bits(hf_models.tensors(back), hf_models.tensors(source))
    assert torch.equal(huggingface_logits(back), huggingface_logits(source))


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_two_layers_in_each_others_place_are_noticed(name: str, case: Callable[[str], Path], tmp_path: Path) -> None:
    """The logits see every kind of tensor that only these families have."""
    source = case(name)
    tensors = hf_models.tensors(source)
    for part in (
        ("sinks", "mlp.router.bias", "down_proj_bias") if name == "gpt_oss" else ("e_score_correction_bias", "kv_a_layernorm.weight")
    ):
        one, two = (next(key for key in sorted(tensors) if f"layers.{layer}." in key and part in key) for layer in (2, 3))
        copy = tmp_path / part
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("*.safetensors*"))
        save_file({**tensors, one: tensors[two], two: tensors[one]}, copy / "model.safetensors", {"format": "pt"})
        assert distance(huggingface_logits(copy), huggingface_logits(source)) > 10 * TOLERANCE, part


def test_mxfp4_is_carried_as_it_is(case: Callable[[str], Path], tmp_path: Path) -> None:
    """Blocks and scales through expert-parallel ranks and back; transformers widens both alike, and computes the same."""
    source = _in_mxfp4(case("gpt_oss"), tmp_path / "mxfp4")
    sw.convert(source, tmp_path / "ranks", to="ranks", layout=Layout(tp=2, ep=3), pad_vocab_to=2, memory=MEMORY)
    sw.convert(tmp_path / "ranks", tmp_path / "back", to="huggingface", memory=MEMORY)
    assert_same_model(tmp_path / "back", source)


def _in_mxfp4(source: Path, out: Path) -> Path:
    """The model with random 4-bit experts under the names of released files."""
    tensors, random = hf_models.tensors(source), torch.Generator().manual_seed(5)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=random)
        tensors[f"{name}_scales"] = torch.randint(120, 126, (experts, outputs, inputs // 32), dtype=torch.uint8, generator=random)
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    shutil.copy(source / "generation_config.json", out)
    method = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head", "model.embed_tokens"]}
    (out / "config.json").write_text(
        json.dumps({**hf_models.config(source), "quantization_config": method}, indent=2, sort_keys=True) + "\n"
    )
    return out
