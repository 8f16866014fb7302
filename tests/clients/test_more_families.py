"""Families with a model or two each: Hugging Face to Megatron and back, and, where Megatron-core has such a model, its logits.

1. Each case is small, its matrices square where that hides most: as many queries as inputs, experts as wide as the model.
2. `SELECTION` has one layout of each case in which the real Megatron-core runs; `make soak` runs `_grid`.
3. What Megatron's args cannot say is passed to it by name (`launch`), and the plan must have said so in a warning.
4. Gemma 2 and 3 are Megatron-Bridge's models, not Megatron-core's: their tensors go there and back, and nothing runs them.
"""

from __future__ import annotations

import itertools
import json
import shutil
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import shardwright as sw
from shardwright import Layout
from shardwright.errors import UnsupportedError
from shardwright.planner.config import to_huggingface
from tests.clients import hf_models
from tests.clients.hf_models import Case
from tests.clients.judge import (
    MEMORY,
    TOLERANCE,
    assert_same_bits,
    assert_same_model,
    distance,
    huggingface_logits,
    megatron_logits,
    rank_contents,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.clients.mcore import Megatron

pytestmark = pytest.mark.clients("transformers", "megatron.core")

_SMALL = {"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 64, "intermediate_size": 64}
_GLM = {
    **_SMALL, "num_hidden_layers": 3, "n_routed_experts": 12, "num_experts_per_tok": 4, "moe_intermediate_size": 32, "n_shared_experts": 2,
    "routed_scaling_factor": 2.5, "first_k_dense_replace": 1,
}  # fmt: skip
_WINDOWS = {**_SMALL, "num_hidden_layers": 4, "head_dim": 16, "tie_word_embeddings": True, "query_pre_attn_scalar": 24, "sliding_window": 8}
CASES = {
    "gemma": Case("gemma", {**_SMALL, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": Case("gemma2", _WINDOWS),
    "gemma3": Case("gemma3_text", {**_WINDOWS, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "phi3": Case("phi3", {**_SMALL, "partial_rotary_factor": 0.5}),
    "olmoe": Case("olmoe", {**_SMALL, "num_key_value_heads": 8, "num_experts": 12, "num_experts_per_tok": 3}),
    "olmoe_gqa": Case("olmoe", {**_SMALL, "num_experts": 12, "num_experts_per_tok": 3}),
    "nemotron": Case("nemotron", _SMALL),
    "glm4_moe": Case("glm4_moe", {**_GLM, "attention_bias": True, "use_qk_norm": True}),
    "glm4_moe_groups": Case("glm4_moe", {**_GLM, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 0, "tie_word_embeddings": True}),
}
LAUNCH = {"gemma": ("gelu_tanh", "scaled_embeddings"), "olmoe": ("norm_over_heads",)}
WORDS = {"gelu_tanh": "gelu_pytorch_tanh", "scaled_embeddings": "square root of hidden_size", "norm_over_heads": "one norm over all heads"}


class Trip(NamedTuple):
    """One way there and back."""

    case: str
    layout: Layout
    spec: str = "te"
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.case}-tp{self.layout.tp}-pp{self.layout.pp}-ep{self.layout.ep}-{self.spec}-{self.dtype}"


SELECTION = (
    Trip("gemma", Layout(tp=2, pp=2)),
    Trip("phi3", Layout(tp=2, pp=2), "local", "bfloat16"),
    Trip("olmoe", Layout(pp=2, ep=2), "te-sequential"),
    Trip("nemotron", Layout(tp=2, pp=2)),
    Trip("glm4_moe", Layout(tp=2, ep=2), "te", "bfloat16"),
    Trip("glm4_moe_groups", Layout(pp=3), "local"),
)
UNRUN = (
    Trip("gemma2", Layout(tp=2, pp=2)),
    Trip("gemma3", Layout(tp=4), "te-sequential", "bfloat16"),
)


def _grid() -> Iterator[Trip]:
    """Everything that a case's layers, heads and experts allow, and Megatron runs."""
    for (case, made), tp, pp, ep, dtype in itertools.product(CASES.items(), (1, 2, 4), (1, 2, 3), (1, 2, 3), ("float32", "bfloat16")):
        moe = case.startswith(("olmoe", "glm"))
        divides = made.config["num_hidden_layers"] % pp == 0 and (ep == 1 or moe) and (tp == 1 or case != "olmoe")
        if divides and case not in ("gemma2", "gemma3", "olmoe_gqa"):
            for spec in ("te", "te-sequential", "local") if moe else ("te", "local"):
                yield Trip(case, Layout(tp=tp, pp=pp, ep=ep), spec, dtype)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """``source("phi3", "float32")``: that checkpoint, made by the first call. Leave it unchanged."""
    made: dict[tuple[str, str], Path] = {}

    def folder(case: str, dtype: str = "float32") -> Path:
        if (case, dtype) not in made:
            made[case, dtype] = hf_models.make(CASES[case], tmp_path_factory.mktemp("more") / case, dtype=dtype)
        return made[case, dtype]

    return folder


def _there(trip: Trip, source: Path, tmp_path: Path) -> Path:
    there = tmp_path / "there"
    sw.convert(source, there, to="megatron-legacy", layout=trip.layout, spec=trip.spec, memory=MEMORY)
    assert sw.verify(there, source, memory=MEMORY).ok
    return there


def _back(there: Path, source: Path, tmp_path: Path) -> None:
    sw.convert(there, tmp_path / "back", to="huggingface", memory=MEMORY)
    assert_same_model(tmp_path / "back", source)


def _round_trip(trip: Trip, source: Path, mcore: Megatron, tmp_path: Path) -> None:
    there, launch = _there(trip, source, tmp_path), LAUNCH.get(trip.case, ())
    assert distance(megatron_logits(mcore, there, trip.layout, launch), huggingface_logits(source)) < TOLERANCE
    _back(there, source, tmp_path)


@pytest.mark.parametrize("trip", SELECTION, ids=str)
def test_there_and_back(trip: Trip, source: Callable[..., Path], mcore: Megatron, tmp_path: Path) -> None:
    _round_trip(trip, source(trip.case, trip.dtype), mcore, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("trip", tuple(_grid()), ids=str)
def test_there_and_back_over_the_grid(trip: Trip, source: Callable[..., Path], mcore: Megatron, tmp_path: Path) -> None:
    _round_trip(trip, source(trip.case, trip.dtype), mcore, tmp_path)


@pytest.mark.parametrize("trip", UNRUN, ids=str)
def test_models_of_megatron_bridge(trip: Trip, source: Callable[..., Path], tmp_path: Path) -> None:
    there = _there(trip, source(trip.case, trip.dtype), tmp_path)
    names = {name for models in rank_contents(there).values() for model in models.values() for name in model}
    for layer in ("self_attention.linear_proj", "mlp.linear_fc2"):
        assert f"decoder.layers.0.{layer}.post_layernorm.weight" in names
    _back(there, source(trip.case, trip.dtype), tmp_path)


@pytest.mark.parametrize("case", LAUNCH)
def test_what_args_cannot_say_is_said(case: str, source: Callable[..., Path]) -> None:
    warnings = " ".join(sw.plan(source(case), to="megatron-legacy").plan.warnings)
    for word in LAUNCH[case]:
        assert WORDS[word] in warnings


def test_norms_over_fewer_key_heads_stay_with_hugging_face(source: Callable[..., Path], tmp_path: Path) -> None:
    """Megatron-Bridge's norm over keys is as wide as that over queries; rank files hold the model all the same."""
    with pytest.raises(UnsupportedError, match="OLMoESelfAttention"):
        sw.plan(source("olmoe_gqa"), to="megatron-legacy")
    sw.convert(source("olmoe_gqa"), tmp_path / "there", to="ranks", layout=Layout(tp=2, pp=2, ep=3), pad_vocab_to=2, memory=MEMORY)
    _back(tmp_path / "there", source("olmoe_gqa"), tmp_path)


@pytest.mark.parametrize("case", ["gemma", "gemma2"])
def test_the_local_spec_and_what_it_lacks(case: str, source: Callable[..., Path], tmp_path: Path) -> None:
    if case == "gemma":
        _back(_there(Trip(case, Layout(tp=4), "local"), source(case), tmp_path), source(case), tmp_path)
        return
    with pytest.raises(UnsupportedError, match=r"no row for this tensor.*post_self_attn_layernorm"):
        sw.plan(source(case), to="megatron-legacy", spec="local")


STRANGERS = (
    ("phi3", "phi3", Layout(tp=2)),
    ("olmoe", "olmoe", Layout(ep=3)),
    ("nemotron", None, Layout(tp=4)),
    ("glm4_moe", None, Layout(tp=2, ep=2)),
    ("glm4_moe_groups", None, Layout(pp=3)),
)


@pytest.mark.parametrize(("case", "family", "layout"), STRANGERS)
def test_megatron_that_says_only_its_args(
    case: str, family: str | None, layout: Layout, source: Callable[..., Path], tmp_path: Path
) -> None:
    there = _forgetful(_there(Trip(case, layout), source(case), tmp_path))
    opened = sw.open(there, family=family)
    assert opened.family == CASES[case].model_type
    sw.convert(opened, tmp_path / "back", to="huggingface", memory=MEMORY)
    assert_same_bits(hf_models.tensors(tmp_path / "back"), hf_models.tensors(source(case)))
    written = tmp_path / "back" / "config.json"  # args name no tokens; the one that transformers assumes is beyond this vocabulary
    written.write_text(json.dumps(hf_models.config(tmp_path / "back") | {"pad_token_id": 0}))
    assert torch.equal(huggingface_logits(tmp_path / "back"), huggingface_logits(source(case)))


def test_gemma_is_not_guessed_from_args(source: Callable[..., Path], tmp_path: Path) -> None:
    there = _forgetful(_there(Trip("gemma", Layout()), source("gemma"), tmp_path))
    with pytest.raises(UnsupportedError, match=r"no family here is built as the args say.*swiglu.*--config"):
        sw.open(there)
    with pytest.raises(UnsupportedError, match=r"'gemma' has no args.swiglu = False.*--config"):
        sw.open(there, family="gemma")
    opened = sw.open(there, config=source("gemma") / "config.json")
    sw.convert(opened, tmp_path / "back", to="huggingface", memory=MEMORY)
    assert torch.equal(huggingface_logits(tmp_path / "back"), huggingface_logits(source("gemma")))


@pytest.mark.parametrize("case", CASES)
def test_a_config_written_anew_means_the_same(case: str, source: Callable[..., Path], tmp_path: Path) -> None:
    """transformers reads the same settings out of a config.json that is made from the canonical fields alone."""
    from transformers import AutoConfig

    opened = sw.open(source(case)).source
    (tmp_path / "config.json").write_text(json.dumps(to_huggingface(opened.config, opened.family, "float32", None)))
    found, wanted = (AutoConfig.from_pretrained(folder).to_dict() for folder in (tmp_path, source(case)))
    different = {key: found.get(key) for key in wanted if key not in _OTHERS and (found.get(key) or None) != (wanted[key] or None)}
    assert not different


_OTHERS = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_name_or_path")
"""Not the model's."""


def _forgetful(there: Path) -> Path:
    """The checkpoint without what shardwright left beside the ranks."""
    (there / "shardwright.json").unlink()
    shutil.rmtree(there / "hf")
    return there


def test_the_layer_for_further_tokens_is_listed(source: Callable[..., Path], tmp_path: Path) -> None:
    """GLM-4.5's files have a layer more than the model; transformers leaves it out, and so does a conversion, which says so."""
    with_more = tmp_path / "more"
    shutil.copytree(source("glm4_moe"), with_more)
    extra = {"model.layers.3.eh_proj.weight": torch.ones(64, 128), "model.layers.3.mlp.experts.1.up_proj.weight": torch.ones(32, 64)}
    save_file(extra, with_more / "model-more.safetensors", {"format": "pt"})
    index = json.loads((with_more / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(extra, "model-more.safetensors")
    (with_more / "model.safetensors.index.json").write_text(json.dumps(index))
    plan = sw.plan(with_more, to="megatron-legacy", layout=Layout(tp=2)).plan
    assert {d.name for d in plan.dropped} == set(extra)
    assert all("multi-token" in d.reason for d in plan.dropped)
    sw.convert(with_more, tmp_path / "there", to="megatron-legacy", layout=Layout(tp=2), memory=MEMORY)
    sw.convert(tmp_path / "there", tmp_path / "back", to="huggingface", memory=MEMORY)
    assert_same_bits(hf_models.tensors(tmp_path / "back"), hf_models.tensors(source("glm4_moe")))


def test_the_bias_of_experts_stays_float32(source: Callable[..., Path], tmp_path: Path) -> None:
    """Also where the rest is cast; a model in bfloat16 has it in float32 too."""
    sw.convert(source("glm4_moe"), tmp_path / "there", to="megatron-legacy", dtype="bfloat16", memory=MEMORY)
    model = rank_contents(tmp_path / "there")["mp_rank_00"]["model"]
    kinds = {tensor.dtype for name, tensor in model.items() if name.endswith("expert_bias")}
    assert kinds == {torch.float32}
    assert {tensor.dtype for name, tensor in model.items() if not name.endswith("expert_bias")} == {torch.bfloat16}
    bias = next(
        t
        for file in source("glm4_moe").glob("*.safetensors")
        for n, t in load_file(file).items()
        if n.endswith("2.mlp.gate.e_score_correction_bias")
    )
    assert torch.equal(model["decoder.layers.2.mlp.router.expert_bias"], bias)


@pytest.mark.parametrize("case", ["olmoe", "glm4_moe"])
def test_stacked_files_are_what_transformers_holds(case: str, source: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    sw.convert(source(case), tmp_path / "stacked", to="huggingface", spec="stacked", memory=MEMORY)
    held = AutoModelForCausalLM.from_pretrained(source(case)).state_dict()
    assert_same_bits(hf_models.tensors(tmp_path / "stacked"), {name: tensor.contiguous() for name, tensor in held.items()})
    sw.convert(tmp_path / "stacked", tmp_path / "back", to="huggingface", memory=MEMORY)
    assert_same_model(tmp_path / "back", source(case))
