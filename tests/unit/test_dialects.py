"""Every dialect against a plain numpy reference: each stored tensor of each rank, bit for bit, and back.

Matrices are square on purpose (hidden = heads · head_dim = intermediate), so that a wrong axis or a wrong order has no
shape to give it away.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import shardwright as sw
from shardwright.errors import LayoutError
from shardwright.planner.operations import OPERATIONS
from shardwright.planner.tensor.lazy import concat
from tests.unit import reference as ref
from tests.unit.reference import Cut, Model

LLAMA = Model()
MODELS = {
    "llama": LLAMA,
    "mha": Model(kv=24),
    "gqa2": Model(kv=2, family="mistral"),
    "mqa": Model(kv=1),
    "mqa-odd": Model(kv=1, head_dim=3, hidden=72, ffn=72),
    "mqa-wide": Model(kv=1, head_dim=12, hidden=288, ffn=288, layers=3),
    "gqa3": Model(kv=3, family="mistral", dtype="bfloat16"),
    "tied": Model(kv=24, tied=True),
    "tied-mqa": Model(kv=1, tied=True, dtype="bfloat16", head_dim=3, hidden=72, ffn=72),
    "qwen2": Model(family="qwen2", qkv_bias=True, tied=True),
    "qwen2-mha": Model(family="qwen2", qkv_bias=True, kv=24),
    "qwen3": Model(family="qwen3", qk_norm=True, kv=24, head_dim=4),
    "qwen3-wide": Model(family="qwen3", qk_norm=True, kv=8, head_dim=8, tied=True),
    "biased": Model(qkv_bias=True, out_bias=True, mlp_bias=True, kv=24),
    "oblong": Model(kv=24, ffn=144, layers=13),
}


@pytest.fixture(scope="module", autouse=True)
def no_sync() -> Iterator[None]:
    """These tests look at bytes, not at what survives a power cut: waiting for the disk is most of their time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


def layout(cut: Cut) -> sw.Layout:
    return sw.Layout(tp=cut.tp, pp=cut.pp, vpp=cut.vpp, stages=cut.stages)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """Every model as a Hugging Face checkpoint, written once."""
    root = tmp_path_factory.mktemp("models")
    return {name: ref.write(root / name, model, model.weights(), shards=1 + len(name) % 3) for name, model in MODELS.items()}


GRID = [
    # model, layout, spec
    ("llama", Cut(2, 1), "te"),
    ("llama", Cut(8, 3), "local"),
    ("llama", Cut(8, 2, 2), "te"),
    ("mha", Cut(3, 1), "local"),
    ("mha", Cut(3, 2), "te"),
    ("mha", Cut(8, 1), "te"),
    ("gqa2", Cut(8, 2), "te"),
    ("gqa2", Cut(2, 3), "local"),
    ("mqa-odd", Cut(3, 3), "te"),
    ("mqa", Cut(8, 1), "local"),
    ("gqa3", Cut(3, 2), "te"),
    ("tied", Cut(3, 1), "te"),
    ("tied", Cut(8, 3, 2), "te"),
    ("tied-mqa", Cut(2, 2, 3), "local"),
    ("qwen2", Cut(2, 2, stages=(5, 7)), "te"),
    ("qwen2-mha", Cut(3, 2, 2, stages=(1, 5, 4, 2)), "local"),
    ("qwen3", Cut(8, 3, stages=(3, 4, 5)), "te"),
    ("qwen3-wide", Cut(2, 1), "local"),
    ("biased", Cut(3, 3), "te"),
    ("oblong", Cut(2, 3, stages=(6, 0, 7)), "local"),
]


def ids(case: object) -> str:
    if isinstance(case, Cut):
        return f"tp{case.tp}pp{case.pp}vpp{case.vpp}" + ("" if case.stages is None else "s" + "_".join(map(str, case.stages)))
    return str(case)


@pytest.mark.parametrize(("name", "cut", "spec"), GRID, ids=ids)
def test_megatron_ranks_hold_what_the_rules_say(name, cut, spec, sources, tmp_path):
    model, weights = MODELS[name], MODELS[name].weights()
    expected = ref.megatron(weights, model, cut, spec)

    sw.convert(sources[name], tmp_path / "legacy", to="megatron-legacy", layout=layout(cut), spec=spec)
    assert ref.differences(expected, ref.read_megatron(tmp_path / "legacy", cut)) == []
    sw.convert(sources[name], tmp_path / "ranks", to="ranks", dialect="megatron", layout=layout(cut), spec=spec)
    assert ref.differences(ref.by_rank(expected, cut), ref.read_ranks(tmp_path / "ranks", cut)) == []

    for written in ("legacy", "ranks"):
        found = sw.verify(tmp_path / written, sources[name])
        assert found.ok and found.level == "values"
        sw.convert(tmp_path / written, tmp_path / f"{written}-back", to="huggingface")
        assert ref.differences({0: weights}, {0: ref.read_huggingface(tmp_path / f"{written}-back")}) == []


@pytest.mark.parametrize(
    ("name", "cut", "multiple"),
    [
        ("llama", Cut(8, 3), 8),
        ("llama", Cut(2, 1), 2),
        ("mha", Cut(3, 2), 48),
        ("gqa2", Cut(8, 2), 64),
        ("mqa", Cut(3, 1), 3),
        ("mqa", Cut(8, 1), 8),
        ("gqa3", Cut(3, 3, stages=(2, 3, 7)), 6),
        ("tied", Cut(8, 2), 8),
        ("tied-mqa", Cut(2, 3), 2),
        ("qwen2", Cut(8, 1), 16),
        ("qwen3", Cut(3, 3), 9),
        ("biased", Cut(2, 2, 2), 2),
        ("oblong", Cut(12, 1), 12),
    ],
    ids=ids,
)
def test_huggingface_ranks_hold_what_the_rules_say(name, cut, multiple, sources, tmp_path):
    """Key/value heads are replicated where there are fewer than ranks; layer numbers are global, also with virtual chunks."""
    model, weights = MODELS[name], MODELS[name].weights()
    sw.convert(sources[name], tmp_path / "out", to="ranks", layout=layout(cut), pad_vocab_to=multiple)
    assert ref.differences(ref.huggingface_ranks(weights, model, cut, multiple), ref.read_ranks(tmp_path / "out", cut)) == []
    assert sw.verify(tmp_path / "out", sources[name]).ok
    sw.convert(tmp_path / "out", tmp_path / "back", to="huggingface")
    assert ref.differences({0: weights}, {0: ref.read_huggingface(tmp_path / "back")}) == []


def test_ranks_without_padding(tmp_path):
    model = Model(vocab=144, layers=3, tied=True)
    source = ref.write(tmp_path / "hf", model, model.weights())
    cut = Cut(8, 3)
    sw.convert(source, tmp_path / "out", to="ranks", layout=layout(cut))
    assert ref.differences(ref.huggingface_ranks(model.weights(), model, cut), ref.read_ranks(tmp_path / "out", cut)) == []


ONE_HOP = [
    ("llama", Cut(2, 3), "local", Cut(8, 2, 2), "te"),
    ("mqa-wide", Cut(8, 1), "te", Cut(3, 3), "local"),
    ("tied", Cut(3, 2, 2), "te", Cut(8, 3), "te"),
    ("tied", Cut(8, 2), "te", Cut(1, 1), "te"),
    ("tied-mqa", Cut(1, 1), "local", Cut(3, 2), "te"),
    ("qwen2-mha", Cut(2, 2, stages=(5, 7)), "te", Cut(3, 3, stages=(7, 1, 4)), "local"),
    ("gqa2", Cut(8, 3), "local", Cut(2, 1), "te"),
    ("qwen3", Cut(3, 1), "te", Cut(8, 3, 2), "te"),
]


@pytest.mark.parametrize(("name", "before", "spec_before", "after", "spec_after"), ONE_HOP, ids=ids)
def test_any_layout_to_any_other_in_one_hop(name, before, spec_before, after, spec_after, sources, tmp_path):
    model, weights = MODELS[name], MODELS[name].weights()
    sw.convert(sources[name], tmp_path / "a", to="megatron-legacy", layout=layout(before), spec=spec_before)
    expected = ref.megatron(weights, model, after, spec_after)
    sw.convert(tmp_path / "a", tmp_path / "b", to="megatron-legacy", layout=layout(after), spec=spec_after)
    assert ref.differences(expected, ref.read_megatron(tmp_path / "b", after)) == []
    assert sw.verify(tmp_path / "b", tmp_path / "a").ok
    sw.convert(tmp_path / "b", tmp_path / "c", to="ranks", layout=layout(after), pad_vocab_to=after.tp)
    assert ref.differences(ref.huggingface_ranks(weights, model, after, after.tp), ref.read_ranks(tmp_path / "c", after)) == []
    sw.convert(tmp_path / "c", tmp_path / "d", to="ranks", dialect="megatron", layout=layout(before), spec=spec_before)
    assert (
        ref.differences(ref.by_rank(ref.megatron(weights, model, before, spec_before), before), ref.read_ranks(tmp_path / "d", before))
        == []
    )


def test_a_state_dict_is_the_rank_file(sources):
    """The same rules without anything written."""
    model, cut = MODELS["mha"], Cut(3, 2)
    expected = ref.megatron(model.weights(), model, cut)
    opened = sw.open(sources["mha"])
    for (t, p, _), held in expected.items():
        found = opened.state_dict(to="megatron-legacy", layout=layout(cut), rank={"tp": t, "pp": p})
        assert ref.differences({0: held}, {0: {name: ref.to_bits(tensor) for name, tensor in found.items()}}) == []


@pytest.mark.parametrize(
    ("name", "cut", "options"),
    [
        ("llama", Cut(3, 1), {"to": "megatron-legacy"}),  # 8 key/value heads over 3 ranks
        ("mha", Cut(5, 1), {"to": "megatron-legacy"}),
        ("mha", Cut(16, 1), {"to": "megatron-legacy"}),
        ("mha", Cut(1, 5), {"to": "megatron-legacy"}),
        ("mha", Cut(1, 2, 5), {"to": "megatron-legacy"}),
        ("mha", Cut(1, 2, stages=(6, 7)), {"to": "megatron-legacy"}),
        ("mha", Cut(2, 1), {"to": "ranks"}),  # 131 rows of the vocabulary
    ],
    ids=ids,
)
def test_what_does_not_divide_is_refused(name, cut, options, sources, tmp_path):
    with pytest.raises(LayoutError, match=r"divide|add up"):
        sw.convert(sources[name], tmp_path / "out", layout=layout(cut), **options)
    assert not list(tmp_path.iterdir())


def test_a_wrong_operation_undoes_itself_but_not_before_the_reference(sources, tmp_path, monkeypatch):
    """Why the reference is there: with key and value swapped, the way back is still perfect."""
    model, cut = MODELS["mha"], Cut(2, 2)

    def swapped(parts, fields):
        q, k, v = parts
        groups, rest = fields["num_key_value_heads"], q.shape[1:]
        fused = concat([p.reshape(groups, p.shape[0] // groups, *rest) for p in (q, v, k)], axis=1)
        return fused.reshape(fused.shape[0] * fused.shape[1], *rest)

    with monkeypatch.context() as patch:
        patch.setitem(OPERATIONS._parts, "grouped_qkv", swapped)
        sw.convert(sources["mha"], tmp_path / "out", to="megatron-legacy", layout=layout(cut))
        sw.convert(tmp_path / "out", tmp_path / "back", to="huggingface")
        assert sw.verify(tmp_path / "out", sources["mha"]).ok
    weights = model.weights()
    assert ref.differences({0: weights}, {0: ref.read_huggingface(tmp_path / "back")}) == []
    wrong = ref.differences(ref.megatron(weights, model, cut), ref.read_megatron(tmp_path / "out", cut))
    assert len(wrong) == model.layers * cut.tp and all("linear_qkv.weight" in line for line in wrong)
    assert not sw.verify(tmp_path / "out", sources["mha"]).ok


def test_the_reference_notices_one_element():
    model = Model(layers=1)
    weights = model.weights()
    one = ref.megatron(weights, model, Cut(2, 1))
    two = ref.megatron(weights, model, Cut(2, 1))
    assert ref.differences(one, two) == []
    assert len(np.unique(np.concatenate([a.ravel() for a in weights.values()]))) == sum(a.size for a in weights.values())
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    two[1, 0, 0][name] = two[1, 0, 0][name].copy()
    two[1, 0, 0][name][5, 7] ^= 1
    assert ref.differences(one, two) == [f"(1, 0, 0): {name} differs in 1 elements"]


@pytest.mark.parametrize("name", ["tied", "mqa"])
def test_trusted_copies_give_the_same_bytes(name, sources, tmp_path):
    """Tied copies and replicated heads are not read, padding beside them still is."""
    model, cut = MODELS[name], Cut(8, 3)
    sw.convert(sources[name], tmp_path / "serving", to="ranks", layout=layout(cut), pad_vocab_to=40)
    compared = sw.plan(tmp_path / "serving", to="megatron-legacy", layout=layout(Cut(2, 2)))
    trusted = sw.plan(tmp_path / "serving", tmp_path / "out", to="megatron-legacy", layout=layout(Cut(2, 2)), trust_replicas=True)
    assert trusted.cost.bytes_read < compared.cost.bytes_read and len(trusted.plan.dropped) > len(compared.plan.dropped)
    trusted.execute()
    assert ref.differences(ref.megatron(model.weights(), model, Cut(2, 2)), ref.read_megatron(tmp_path / "out", Cut(2, 2))) == []


def test_views_and_shared_storages_of_a_torch_source(tmp_path):
    """A ``.bin`` file whose tied head is the embedding's storage, with transposed and offset views."""
    model = Model(layers=2, heads=4, kv=2, hidden=16, ffn=16, tied=True)
    weights = model.weights()
    state = {name: ref.to_torch(bits, model.dtype) for name, bits in weights.items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        state[name] = state[name].T.contiguous().T
    both = torch.cat([state["model.layers.0.mlp.gate_proj.weight"], state["model.layers.0.mlp.up_proj.weight"]])
    state["model.layers.0.mlp.gate_proj.weight"], state["model.layers.0.mlp.up_proj.weight"] = both.chunk(2)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_text(json.dumps(model.config()))
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    cut = Cut(2, 2)
    sw.convert(tmp_path / "bin", tmp_path / "out", to="megatron-legacy", layout=layout(cut))
    assert ref.differences(ref.megatron(weights, model, cut), ref.read_megatron(tmp_path / "out", cut)) == []
    sw.convert(tmp_path / "out", tmp_path / "back", to="huggingface")
    assert ref.differences({0: weights}, {0: ref.read_huggingface(tmp_path / "back")}) == []


@pytest.mark.parametrize("container", ["safetensors", "torch", "zarr"])
def test_a_stage_that_holds_nothing(container, tmp_path):
    model = Model(layers=1, heads=2, kv=2, head_dim=2, hidden=4, ffn=4, vocab=3)
    weights = model.weights()
    ref.write(tmp_path / "a", model, weights)
    sw.convert(tmp_path / "a", tmp_path / "b", to="ranks", container=container, layout=sw.Layout(pp=3, stages=(0, 0, 1)))
    sw.convert(tmp_path / "b", tmp_path / "c", to="huggingface")
    assert ref.differences({0: weights}, {0: ref.read_huggingface(tmp_path / "c")}) == []
