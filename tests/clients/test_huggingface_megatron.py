"""Hugging Face to Megatron and back: the real Megatron-core computes what transformers computes, and every bit comes home.

`SELECTION` covers every case, dtype, tp, pp, vpp, spec and way of dealing layers to stages, each family in several
layouts; `make soak` runs the whole grid.
"""

from __future__ import annotations

import itertools
import shutil
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

import shardwright as sw
from shardwright import Layout
from tests.clients import hf_models
from tests.clients.hf_logits import logits
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


class Trip(NamedTuple):
    """One way there and back."""

    case: str
    layout: Layout
    spec: str = "te"
    dtype: str = "float32"
    shards: str = "200KB"

    def __str__(self) -> str:
        sizes = f"tp{self.layout.tp}-pp{self.layout.pp}-vpp{self.layout.vpp}" + (f"-ep{self.layout.ep}" if self.layout.ep > 1 else "")
        stages = "" if self.layout.stages is None else "-" + "+".join(map(str, self.layout.stages))
        return f"{self.case}-{sizes}{stages}-{self.spec}-{self.dtype}-{self.shards}"


def _uneven(*stages: int, tp: int = 1, vpp: int = 1) -> Layout:
    return Layout(tp=tp, pp=len(stages) // vpp, vpp=vpp, stages=stages)


SELECTION = (
    Trip("llama", Layout(), "te", "float32", "5GB"),
    Trip("llama", Layout(tp=4), "local", "bfloat16"),
    Trip("llama", Layout(tp=2, pp=2), "local"),
    Trip("llama", Layout(tp=2, pp=3, vpp=2), "te", "bfloat16"),
    Trip("llama", _uneven(2, 5, 5), "te"),
    Trip("llama", _uneven(1, 2, 4, 5, tp=2, vpp=2), "local"),
    Trip("llama", _uneven(0, 7, 5), "local", "bfloat16"),
    Trip("llama_tied", Layout(tp=2), "te", "bfloat16"),
    Trip("llama_tied", Layout(tp=2, pp=2), "local"),
    Trip("llama_tied", _uneven(4, 5, 3), "te"),
    Trip("llama_mha", Layout(tp=4), "te"),
    Trip("llama_mha", Layout(tp=1, pp=2, vpp=2), "local", "bfloat16"),
    Trip("llama_mqa", Layout(tp=2), "local"),
    Trip("llama_mqa", Layout(tp=4), "te", "bfloat16"),
    Trip("llama_mqa", Layout(tp=4, pp=3), "te"),
    Trip("llama_bias", Layout(tp=2, pp=2), "te"),
    Trip("llama_bias", Layout(tp=4), "local", "bfloat16"),
    Trip("llama_rope3", Layout(tp=2), "local"),
    Trip("llama_rope3", Layout(pp=3), "te", "bfloat16"),
    Trip("llama_head_dim", Layout(tp=4), "te"),
    Trip("llama_head_dim", Layout(tp=2, pp=3), "local", "bfloat16"),
    Trip("llama_wide", Layout(tp=2, pp=2), "te", "float32", "1MB"),
    Trip("llama_wide", Layout(tp=4), "local", "bfloat16", "1MB"),
    Trip("mistral", Layout(tp=4, pp=2), "local"),
    Trip("mistral", Layout(pp=3, vpp=2), "te", "bfloat16"),
    Trip("mistral_window", Layout(tp=2), "te"),
    Trip("mistral_window", Layout(tp=1, pp=2), "local", "bfloat16"),
    Trip("qwen2", Layout(tp=2, pp=2, vpp=2), "te"),
    Trip("qwen2", Layout(tp=4), "local", "bfloat16"),
    Trip("qwen2", _uneven(1, 3, 5, 3, vpp=2), "te"),
    Trip("qwen2_tied", Layout(tp=4), "te"),
    Trip("qwen2_tied", Layout(tp=2, pp=3), "local", "bfloat16"),
    Trip("qwen3", Layout(tp=4, pp=3, vpp=2), "te"),
    Trip("qwen3", Layout(tp=2), "local", "bfloat16"),
    Trip("qwen3", _uneven(8, 4, tp=2), "te"),
    Trip("qwen3_tied", Layout(), "local"),
    Trip("qwen3_tied", Layout(tp=2, pp=2), "te", "bfloat16"),
    Trip("qwen3_tied", Layout(pp=3, vpp=2), "te"),
    Trip("mixtral", Layout(), "te"),
    Trip("mixtral", Layout(tp=2, ep=2), "te-sequential", "bfloat16"),
    Trip("mixtral", Layout(tp=2, pp=2, ep=2), "te"),
    Trip("mixtral", Layout(tp=4), "local"),
    Trip("mixtral", Layout(ep=4), "te"),
    Trip("qwen2_moe", Layout(tp=2, ep=2), "te"),
    Trip("qwen2_moe", Layout(pp=2, ep=3), "local"),
    Trip("qwen2_moe", Layout(tp=4), "te-sequential", "bfloat16"),
    Trip("qwen2_moe", _uneven(1, 2, 3), "te"),
    Trip("qwen3_moe", Layout(tp=2), "te", "bfloat16"),
    Trip("qwen3_moe", Layout(pp=3, vpp=2, ep=2), "te"),
    Trip("qwen3_moe", Layout(tp=4, ep=2), "local"),
    Trip("qwen3_moe_sparse", Layout(pp=2), "te-sequential"),
    Trip("qwen3_moe_sparse", Layout(tp=2, ep=3), "te"),
)


def _grid() -> Iterator[Trip]:
    """Everything that a case's layers and heads allow."""
    sizes = [(tp, pp, vpp) for tp in (1, 2, 4) for pp in (1, 2, 3) for vpp in (1, 2) if pp > 1 or vpp == 1]
    for case, (tp, pp, vpp), dtype in itertools.product(hf_models.CASES, sizes, ("float32", "bfloat16")):
        moe = "moe" in case or case == "mixtral"
        for ep, spec in itertools.product((1, 2, 3) if moe else (1,), ("te", "te-sequential", "local") if moe else ("te", "local")):
            if _layers(case) % (pp * vpp) == 0:
                yield Trip(case, Layout(tp=tp, pp=pp, vpp=vpp, ep=ep), spec, dtype)


def _layers(case: str) -> int:
    layers: int = hf_models.CASES[case].settings()["num_hidden_layers"]
    return layers


def _round_trip(trip: Trip, hf_case: Callable[..., Path], mcore: Megatron, tmp_path: Path) -> None:
    source, there, back = hf_case(trip.case, dtype=trip.dtype, max_shard_size=trip.shards), tmp_path / "there", tmp_path / "back"
    sw.convert(source, there, to="megatron-legacy", layout=trip.layout, spec=trip.spec, memory=MEMORY)
    _assert_spec(there, trip.spec)
    assert distance(megatron_logits(mcore, there, trip.layout), huggingface_logits(source)) < TOLERANCE
    assert sw.verify(there, source, memory=MEMORY).ok
    sw.convert(there, back, to="huggingface", memory=MEMORY)
    assert_same_model(back, source)


def _assert_spec(folder: Path, spec: str) -> None:
    names = {name for models in rank_contents(folder).values() for model in models.values() for name in model}
    assert any("linear_qkv.layer_norm_weight" in name for name in names) == (spec != "local")
    assert any("input_layernorm" in name for name in names) == (spec == "local")


@pytest.mark.parametrize("trip", SELECTION, ids=str)
def test_there_and_back(trip: Trip, hf_case: Callable[..., Path], mcore: Megatron, tmp_path: Path) -> None:
    _round_trip(trip, hf_case, mcore, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("trip", tuple(_grid()), ids=str)
def test_there_and_back_over_the_grid(trip: Trip, hf_case: Callable[..., Path], mcore: Megatron, tmp_path: Path) -> None:
    _round_trip(trip, hf_case, mcore, tmp_path)


def test_selection_covers_every_value() -> None:
    values: dict[str, set[Any]] = {
        "case": set(hf_models.CASES), "spec": {"te", "te-sequential", "local"}, "dtype": {"float32", "bfloat16"},
        "tp": {1, 2, 4}, "pp": {1, 2, 3}, "vpp": {1, 2}, "ep": {1, 2, 3, 4},
    }  # fmt: skip
    for axis, wanted in values.items():
        assert {getattr(trip if axis in Trip._fields else trip.layout, axis) for trip in SELECTION} == wanted, axis
    for family in {case.model_type for case in hf_models.CASES.values()}:
        layouts = {trip.layout for trip in SELECTION if hf_models.CASES[trip.case].model_type == family}
        assert len(layouts) >= 4, family
        assert {layout.tp for layout in layouts} >= {2, 4} or family == "mistral"
    assert any(trip.layout.stages for trip in SELECTION)


# One hop from one Megatron layout to another.

HOPS = (
    ("llama", Layout(tp=2, pp=2), "te", Layout(tp=4), "local"),
    ("llama", Layout(pp=3), "local", Layout(tp=2, pp=2, vpp=2), "te"),
    ("llama_mqa", Layout(tp=4), "te", Layout(tp=2, pp=2), "te"),
    ("llama_bias", Layout(tp=4), "te", Layout(tp=1, pp=2), "local"),
    ("llama_tied", Layout(tp=2, pp=2), "te", Layout(tp=4), "te"),
    ("llama_tied", Layout(tp=1), "te", Layout(tp=2, pp=3), "local"),
    ("llama_wide", Layout(tp=4), "local", Layout(tp=2, pp=2), "te"),
    ("mistral_window", _uneven(2, 5, 5), "te", Layout(tp=4), "te"),
    ("qwen2", Layout(tp=2, pp=2, vpp=2), "local", _uneven(1, 2, 4, 5, vpp=2), "te"),
    ("qwen3_tied", Layout(tp=1, pp=3, vpp=2), "te", Layout(tp=4, pp=2), "local"),
    ("qwen2_moe", Layout(tp=2, pp=2, ep=3), "te", Layout(tp=1, ep=4), "local"),
)


@pytest.mark.parametrize(("case", "before", "spec", "after", "new_spec"), HOPS)
def test_one_hop_between_megatron_layouts(
    case: str, before: Layout, spec: str, after: Layout, new_spec: str, hf_case: Callable[..., Path], mcore: Megatron, tmp_path: Path
) -> None:
    source, one, two, straight = hf_case(case), tmp_path / "one", tmp_path / "two", tmp_path / "straight"
    sw.convert(source, one, to="megatron-legacy", layout=before, spec=spec, memory=MEMORY)
    sw.convert(one, two, to="megatron-legacy", layout=after, spec=new_spec, memory=MEMORY)
    assert distance(megatron_logits(mcore, two, after), huggingface_logits(source)) < TOLERANCE
    assert sw.verify(two, one, memory=MEMORY).ok
    assert sw.verify(two, source, memory=MEMORY).ok
    sw.convert(source, straight, to="megatron-legacy", layout=after, spec=new_spec, memory=MEMORY)
    _assert_same_ranks(two, straight)
    sw.convert(two, tmp_path / "back", to="huggingface", memory=MEMORY)
    assert_same_model(tmp_path / "back", source)


def _assert_same_ranks(actual: Path, expected: Path) -> None:
    found, wanted = rank_contents(actual), rank_contents(expected)
    assert found.keys() == wanted.keys()
    for rank, models in wanted.items():
        assert found[rank].keys() == models.keys()
        for key, model in models.items():
            assert_same_bits(found[rank][key], model)


# .bin files as a source.


@pytest.mark.parametrize(
    ("case", "dtype", "layout"),
    [("qwen2", "float32", Layout(tp=2, pp=2)), ("llama_tied", "bfloat16", Layout(tp=2)), ("mistral", "bfloat16", Layout(pp=3))],
)
def test_bin_files(case: str, dtype: str, layout: Layout, hf_case: Callable[..., Path], mcore: Megatron, tmp_path: Path) -> None:
    source, plain = hf_case(case, dtype=dtype, bin_files=True), hf_case(case, dtype=dtype)
    sw.convert(source, tmp_path / "there", to="megatron-legacy", layout=layout, memory=MEMORY)
    assert distance(megatron_logits(mcore, tmp_path / "there", layout), huggingface_logits(plain)) < TOLERANCE
    sw.convert(plain, tmp_path / "plain", to="megatron-legacy", layout=layout, memory=MEMORY)
    _assert_same_ranks(tmp_path / "there", tmp_path / "plain")
    sw.convert(tmp_path / "there", tmp_path / "back", to="huggingface", memory=MEMORY)
    assert_same_model(tmp_path / "back", plain)


# Without what shardwright left beside the ranks.

STRANGERS = (
    ("llama", None, "float32", Layout(tp=2, pp=2), "te"),
    ("llama_tied", None, "bfloat16", Layout(tp=2, pp=2), "local"),
    ("llama_tied", None, "float32", Layout(tp=2), "local"),
    ("llama_mqa", None, "float32", Layout(tp=4), "te"),
    ("llama_mha", None, "float32", Layout(pp=3, vpp=2), "te"),
    ("llama_bias", "llama", "float32", Layout(tp=2), "local"),
    ("llama_rope3", None, "float32", Layout(tp=2), "te"),
    ("llama_head_dim", None, "bfloat16", _uneven(2, 5, 5), "te"),
    ("mistral", "mistral", "bfloat16", Layout(tp=2, pp=2), "te"),
    ("mistral_window", "mistral", "float32", Layout(tp=4), "local"),
    ("qwen2", None, "float32", Layout(tp=2, pp=2, vpp=2), "te"),
    ("qwen2_tied", None, "bfloat16", Layout(tp=4), "local"),
    ("qwen3", None, "bfloat16", _uneven(1, 2, 4, 5, vpp=2), "local"),
    ("qwen3_tied", None, "float32", Layout(tp=4), "te"),
    ("mixtral", None, "float32", Layout(tp=2, ep=2), "te"),
    ("qwen2_moe", None, "bfloat16", Layout(ep=3), "te-sequential"),
    ("qwen3_moe_sparse", None, "float32", Layout(tp=2, pp=2, ep=2), "local"),
)


@pytest.mark.parametrize(("case", "family", "dtype", "layout", "spec"), STRANGERS)
def test_megatron_that_says_only_its_args(
    case: str, family: str | None, dtype: str, layout: Layout, spec: str, hf_case: Callable[..., Path], tmp_path: Path
) -> None:
    source, there, back = hf_case(case, dtype=dtype), tmp_path / "there", tmp_path / "back"
    sw.convert(source, there, to="megatron-legacy", layout=layout, spec=spec, memory=MEMORY)
    (there / "shardwright.json").unlink()
    shutil.rmtree(there / "hf")
    opened = sw.open(there, family=family)
    assert opened.family == hf_models.CASES[case].model_type
    assert opened.layout == layout
    sw.convert(opened, back, to="huggingface", memory=MEMORY)
    assert_same_bits(hf_models.tensors(back), hf_models.tensors(source))
    assert torch.equal(_logits(back), huggingface_logits(source))
    for spelling in ({"rope_parameters"}, {"rope_theta", "rope_scaling"}):
        assert torch.equal(_logits(_without(back, spelling)), huggingface_logits(source)), spelling
    _assert_same_meaning(back, source)


def _logits(folder: Path) -> torch.Tensor:
    from tests.clients.hf_logits import token_ids

    return logits(folder, token_ids(hf_models.VOCAB, 96))


def _without(folder: Path, keys: set[str]) -> Path:
    """A copy of a checkpoint whose config lacks these keys; one of them must have been there."""
    import json

    copy = folder.with_name(folder.name + "-" + min(keys))
    shutil.copytree(folder, copy)
    config = hf_models.config(folder)
    assert keys & config.keys()
    (copy / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in keys}))
    return copy


_SAME_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters", "model_type", "dtype", "architectures",
    "hidden_act", "sliding_window", "attention_bias", "mlp_bias",
)  # fmt: skip


def _assert_same_meaning(actual: Path, expected: Path) -> None:
    """transformers reads the same settings out of both configs."""
    from transformers import AutoConfig

    found, wanted = (AutoConfig.from_pretrained(folder).to_dict() for folder in (actual, expected))
    for name in _SAME_FIELDS:
        assert found.get(name) == wanted.get(name), name


def test_mistral_must_be_named(hf_case: Callable[..., Path], tmp_path: Path) -> None:
    """Its tensors and args are llama's; the note says which family was assumed."""
    there = tmp_path / "there"
    sw.convert(hf_case("mistral"), there, to="megatron-legacy", memory=MEMORY)
    (there / "shardwright.json").unlink()
    shutil.rmtree(there / "hf")
    assert sw.open(there).family == "llama"
    assert any("--family" in line for line in sw.plan(there, to="huggingface").plan.warnings)
