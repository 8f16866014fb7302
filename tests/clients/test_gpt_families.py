"""gpt2, gpt_neox, opt, bloom, falcon: transformers writes them, Megatron-core computes the same where it has the model, and every
bit comes home.

One small case each; `make soak` runs the grid. Hidden and feed-forward sizes are equal where the family allows it, so that no
shape tells a transposed matrix.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

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


class Plain(Case):
    """A case whose config says everything itself."""

    def settings(self, **overrides: Any) -> dict[str, Any]:
        return {**self.config, **overrides}


SIZES = {"vocab_size": hf_models.VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {"vocab_size": hf_models.VOCAB, "n_embd": 32, "n_inner": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
OPT = {**SIZES, "ffn_dim": 32, "max_position_embeddings": 128, "activation_function": "gelu"}
NEOX = {**SIZES, "intermediate_size": 32, "max_position_embeddings": 128}
FALCON = {**SIZES, "ffn_hidden_size": 32, "max_position_embeddings": 128}
CASES = {
    "gpt2": Plain("gpt2", GPT2),
    "gpt2_untied": Plain("gpt2", GPT2 | {"tie_word_embeddings": False, "activation_function": "gelu"}),
    "gpt_neox": Plain("gpt_neox", NEOX | {"rotary_pct": 0.5, "use_parallel_residual": False}),
    "gpt_neox_parallel": Plain("gpt_neox", NEOX | {"rotary_pct": 0.25}),
    "opt": Plain("opt", OPT | {"activation_function": "relu"}),
    "opt_gelu": Plain("opt", OPT | {"enable_bias": False, "word_embed_proj_dim": 32}),
    "opt_350m": Plain("opt", OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False, "activation_function": "relu"}),
    "bloom": Plain("bloom", {**SIZES, "n_layer": 2, "n_head": 4}),
    "falcon_7b": Plain("falcon", FALCON | {"multi_query": True}),
    "falcon_40b": Plain("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_11b": Plain("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
    "falcon_rw": Plain("falcon", FALCON | {"multi_query": False, "parallel_attn": False, "bias": True, "alibi": True}),
    "falcon_serial": Plain("falcon", FALCON | {"multi_query": False, "parallel_attn": False, "bias": True}),
}
IN_MEGATRON = {
    "gpt2": (Layout(tp=2, pp=2), "te"),
    "gpt2_untied": (Layout(tp=2), "local"),
    "gpt_neox": (Layout(tp=2), "te"),
    "opt": (Layout(tp=2, pp=2), "te"),
    "opt_gelu": (Layout(tp=2), "local"),
    "falcon_serial": (Layout(pp=2), "local"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a case, made by the first call."""
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = hf_models.make(CASES[name], tmp_path_factory.mktemp("gpt") / name, max_shard_size="20KB")
        return folders[name]

    return folder


def _round_trip(name: str, layout: Layout, spec: str, made: Callable[[str], Path], mcore: Megatron, tmp_path: Path) -> None:
    source, there = made(name), tmp_path / "there"
    sw.convert(source, there, to="megatron-legacy", layout=layout, spec=spec, memory=MEMORY)
    launch = ("relu",) if CASES[name].config.get("activation_function") == "relu" else ()
    assert distance(megatron_logits(mcore, there, layout, launch), huggingface_logits(source)) < TOLERANCE
    assert sw.verify(there, source, memory=MEMORY).ok
    sw.convert(there, tmp_path / "back", to="huggingface", memory=MEMORY)
    assert_same_model(tmp_path / "back", source)


@pytest.mark.parametrize("name", IN_MEGATRON)
def test_megatron_computes_the_same(name: str, made: Callable[[str], Path], mcore: Megatron, tmp_path: Path) -> None:
    _round_trip(name, *IN_MEGATRON[name], made, mcore, tmp_path)


def _grid() -> Iterator[tuple[str, Layout, str]]:
    for name in IN_MEGATRON:
        for spec in ("te", "local"):
            for tp in (1, 2, 4):
                yield from ((name, Layout(tp=tp, pp=pp), spec) for pp in (1, 2))


@pytest.mark.soak
@pytest.mark.parametrize(("name", "layout", "spec"), tuple(_grid()))
def test_the_grid(name: str, layout: Layout, spec: str, made: Callable[[str], Path], mcore: Megatron, tmp_path: Path) -> None:
    _round_trip(name, layout, spec, made, mcore, tmp_path)


@pytest.mark.parametrize("name", sorted(CASES.keys() - IN_MEGATRON.keys()))
def test_rank_files_and_back(name: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    source = made(name)
    sw.convert(source, tmp_path / "ranks", to="ranks", layout=Layout(tp=2, pp=2), pad_vocab_to=2, memory=MEMORY)
    sw.convert(tmp_path / "ranks", tmp_path / "back", to="huggingface", memory=MEMORY)
    assert_same_model(tmp_path / "back", source)


@pytest.mark.parametrize("name", CASES)
def test_a_config_of_our_own_says_the_same(name: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    """Without the original config.json: transformers computes the same with the one that follows from the canonical config."""
    from shardwright.planner.config import from_huggingface, to_huggingface
    from shardwright.planner.tables import FAMILIES

    source = made(name)
    raw, family = hf_models.config(source), FAMILIES.get(CASES[name].model_type)
    shutil.copytree(source, tmp_path / "again")
    written = to_huggingface(from_huggingface(raw, family), family, "float32", None)
    (tmp_path / "again" / "config.json").write_text(json.dumps(written))
    assert torch.equal(huggingface_logits(tmp_path / "again"), huggingface_logits(source))


@pytest.mark.parametrize(("name", "prefix"), [("gpt2", "transformer."), ("bloom", "transformer."), ("opt", "model.")])
def test_files_of_the_base_model(name: str, prefix: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    """What transformers' base model saves is read, and what we write in that spelling is what it saves."""
    from transformers import AutoModel

    source, base = made(name), tmp_path / "base"
    AutoModel.from_pretrained(source).save_pretrained(base)
    assert not any(tensor.startswith(prefix) for tensor in hf_models.tensors(base))
    sw.convert(base, tmp_path / "full", to="huggingface", spec="causal-lm", memory=MEMORY)
    assert_same_bits(hf_models.tensors(tmp_path / "full"), hf_models.tensors(source))
    sw.convert(source, tmp_path / "bare", to="huggingface", spec="base-model", memory=MEMORY)
    assert_same_bits(hf_models.tensors(tmp_path / "bare"), hf_models.tensors(base))


@pytest.mark.parametrize(
    ("name", "one", "two"),
    [
        ("gpt2", "transformer.h.0.attn.c_proj.weight", None),
        ("gpt2", "transformer.h.0.mlp.c_fc.weight", None),
        ("opt", "model.decoder.layers.0.fc1.weight", None),
        ("falcon_40b", "transformer.h.0.ln_attn.weight", "transformer.h.0.ln_mlp.weight"),
    ],
)
def test_transposed_or_swapped_tensors_are_noticed(
    name: str, one: str, two: str | None, made: Callable[[str], Path], tmp_path: Path
) -> None:
    """transformers computes something else with them, so equal logits are evidence."""
    source = made(name)
    tensors = hf_models.tensors(source)
    wrong = {one: tensors[one].T} if two is None else {one: tensors[two], two: tensors[one]}
    shutil.copytree(source, tmp_path / "wrong", ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file({n: t.contiguous() for n, t in {**tensors, **wrong}.items()}, tmp_path / "wrong" / "model.safetensors", {"format": "pt"})
    assert distance(huggingface_logits(tmp_path / "wrong"), huggingface_logits(source)) > 1e-3
