"""Explanations: in words what the bytes then show."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from shardwright.errors import UsageError
from shardwright.executors.execute import execute
from shardwright.planner.explain import explain
from shardwright.planner.formats import open_source
from shardwright.planner.formats.base import Hints
from shardwright.planner.layout import Layout
from shardwright.planner.passes.build import build
from shardwright.planner.plan import Plan, TensorEntry
from shardwright.planner.relations import Places, passages, sources_of
from shardwright.planner.request import Request
from shardwright.planner.store import LocalStore
from shardwright.planner.tensor.dtypes import dtype as dtype_of
from tests.unit.tiny import tiny_llama

QKV = "model.decoder.layers.0.self_attention.linear_qkv.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def plan(folder: Path) -> Plan:
    return build(open_source(LocalStore(folder), Hints()), Request("megatron-legacy", Layout(tp=2, pp=2)))


@pytest.fixture(scope="module")
def back(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    out = tmp_path_factory.mktemp("out") / "legacy"
    execute(plan, out, memory=1 << 30)
    return build(open_source(LocalStore(out), Hints()), Request("huggingface"))


def test_fused_tensor(plan: Plan) -> None:
    text = explain(plan, f"{QKV}@1")
    lines = text.splitlines()
    assert (
        lines[0] == f"{QKV} @ rank 1"
        and "float32 [64, 64], 16,384 bytes, stored in release/mp_rank_01_000/model_optim_rng.pt @ " in lines[1]
    )
    ranges = [re.sub(r" \(.*", "", line).strip() for line in lines[3:9]]
    assert ranges == [
        "rows 0…15 ← model.layers.0.self_attn.q_proj.weight rows 32…47",
        "rows 16…23 ← model.layers.0.self_attn.k_proj.weight rows 16…23",
        "rows 24…31 ← model.layers.0.self_attn.v_proj.weight rows 16…23",
        "rows 32…47 ← model.layers.0.self_attn.q_proj.weight rows 48…63",
        "rows 48…55 ← model.layers.0.self_attn.k_proj.weight rows 24…31",
        "rows 56…63 ← model.layers.0.self_attn.v_proj.weight rows 24…31",
    ]
    assert "written by tile 0 of 1" in lines[-1]


def test_offsets_are_those_of_the_ranges(plan: Plan, folder: Path) -> None:
    """The byte offset beside a passage is where its first element lies."""
    line = next(x for x in explain(plan, f"{QKV}@1").splitlines() if "q_proj" in x and "rows 0…15" in x)
    found = re.search(r"\((\S+) @ ([\d,]+)\)", line)
    assert found is not None
    data = (folder / found[1]).read_bytes()
    offset = int(found[2].replace(",", ""))
    weight = load_file(folder / found[1])["model.layers.0.self_attn.q_proj.weight"]
    assert np.array_equal(np.frombuffer(data, np.float32, 64, offset), weight[32])


def test_all_ranks(plan: Plan) -> None:
    """Megatron numbers layers within a stage: both stages hold a layer 0."""
    assert re.findall(r"@ rank (\d)$", explain(plan, QKV), re.MULTILINE) == ["0", "1", "2", "3"]


def test_padding(plan: Plan) -> None:
    text = explain(plan, "model.embedding.word_embeddings.weight@1")
    assert "rows 0…2 ← model.embed_tokens.weight rows 128…130" in text and "rows 3…127 ← zeros (padding)" in text


def test_columns(plan: Plan) -> None:
    assert "all ← model.layers.0.self_attn.o_proj.weight columns 32…63" in explain(
        plan, "model.decoder.layers.0.self_attention.linear_proj.weight@1"
    )


def test_replicas_and_copies(back: Plan) -> None:
    norm = "model.decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    assert f"compared with a copy in {norm} @ rank 1" in explain(back, "model.layers.0.input_layernorm.weight")
    assert "compared, not stored again" in explain(back, f"{norm}@1")


def test_ops(folder: Path) -> None:
    plan = build(open_source(LocalStore(folder), Hints()), Request("huggingface", quantize="int8"))
    assert "value op: int8 float32 → int8, output 1 of 2" in explain(plan, "model.layers.0.mlp.up_proj.weight")
    scale = explain(plan, "model.layers.0.mlp.up_proj.weight_scale")
    assert "all ← model.layers.0.mlp.up_proj.weight all" in scale and "output 2 of 2" in scale


def test_hub_and_source(plan: Plan, back: Plan) -> None:
    hub = explain(plan, "model.layers.0.self_attn.k_proj.weight")
    assert (
        hub.startswith("model.layers.0.self_attn.k_proj.weight (hub)")
        and "moved as one with its neighbours" in hub
        and f"{QKV} @ rank 1" in hub
    )
    source = explain(back, f"{QKV}@0")
    assert "(source, rank 0)" in source and "model.layers.0.self_attn.v_proj.weight @ rank 0" in source


def test_tiles(folder: Path) -> None:
    plan = build(open_source(LocalStore(folder), Hints()), Request("huggingface"), tile_bytes=4096)
    assert re.search(r"written by tiles \d+…\d+ of [\d,]+", explain(plan, "model.layers.0.self_attn.q_proj.weight"))


def test_unknown(plan: Plan) -> None:
    with pytest.raises(UsageError, match=r"Nearest: .*linear_qkv"):
        explain(plan, "decoder.layers.0.self_attention.linear_qkv")
    with pytest.raises(UsageError, match="Ranks that do: 0, 1, 2, 3"):
        explain(plan, f"{QKV}@7")


def _slice(words: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
    ranges = {m[1]: slice(int(m[2]), int(m[3] or m[2]) + 1) for m in re.finditer(r"(row|column|element)s? (\d+)(?:…(\d+))?", words)}
    names = ("element",) if len(shape) == 1 else ("row", "column")
    return tuple(ranges.get(name, slice(None)) for name, _ in zip(names, shape, strict=True))


def _load(root: Path, file: str, tensor: TensorEntry) -> np.ndarray:
    count = int(np.prod(tensor.shape))
    assert dtype_of(tensor.dtype).name == "float32"
    return np.fromfile(root / file, np.float32, count, offset=tensor.offset).reshape(tensor.shape)


@pytest.mark.parametrize(
    "request_",
    [
        Request("megatron-legacy", Layout(tp=2, pp=2)),
        Request("megatron-legacy", Layout(tp=4)),
        Request("ranks", Layout(tp=8), pad_vocab_to=8),
        Request("ranks", Layout(tp=2), dialect="megatron"),
    ],
    ids=["tp2pp2", "tp4", "hf-tp8", "megatron-tp2"],
)
def test_the_words_say_what_the_bytes_show(folder: Path, tmp_path: Path, request_: Request) -> None:
    """Doing by hand what the passages say, for every target tensor, gives the executor's bytes."""
    plan = build(open_source(LocalStore(folder), Hints()), request_)
    execute(plan, tmp_path / "out", memory=1 << 30)
    places = Places.of(plan)
    for tensor in plan.target_tensors:
        made = np.zeros(tensor.shape, np.float32)
        for use in places.writers(tensor):
            program = plan.programs[use.program]
            numbers = [places.source(use.program, use.row, k) for k in range(plan.bindings[use.program].source_file.shape[1])]
            sources = [plan.source_tensors[n] for n in numbers if n is not None]
            found = passages(program, use.operand, tensor.shape, [s.shape for s in sources])
            assert {p.operand for p in found} == set(sources_of(program, use.operand))
            for p in found:
                source = sources[p.operand]
                array = _load(folder, plan.source_files[source.file].path, source)
                made[_slice(p.target, tensor.shape)] = array[_slice(p.source, source.shape)]
        assert np.array_equal(made, _load(tmp_path / "out", plan.target_files[tensor.file].path, tensor)), tensor.name
