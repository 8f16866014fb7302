"""``megatron-deepspeed``: one file per layer and tensor-parallel rank, against plain numpy (`deepspeed_reference`)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import shardwright as sw
from shardwright.errors import CheckpointError, MissingTensorError, RunError, UnknownTensorError, UnsupportedError
from tests.unit import deepspeed_reference as ds
from tests.unit import reference as ref
from tests.unit.gpt_reference import Gpt
from tests.unit.reference import Model

BLOOM = Gpt("bloom", layers=3, ffn=128)
GPT = Gpt("gpt2", layers=2)
UNTIED = Gpt("gpt2", layers=2, ffn=48, tied=False)
LLAMA = Model(layers=2, kv=8)
MODELS: dict[str, tuple[Model | Gpt, int]] = {"bloom": (BLOOM, 3), "gpt2": (GPT, 2), "gpt2-untied": (UNTIED, 2), "llama": (LLAMA, 2)}


@pytest.fixture(scope="module", autouse=True)
def no_sync() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


def made(model: Model | Gpt, folder: Path) -> tuple[ref.Arrays, ref.Arrays, Path]:
    """Hub tensors, stored tensors, and the Hugging Face checkpoint."""
    if isinstance(model, Gpt):
        hub = model.hub()
        return hub, model.stored(hub), model.write(folder, model.stored(hub))
    weights = model.weights()
    return weights, weights, ref.write(folder, model, weights)


def write_layers(folder: Path, files: dict[str, ref.Arrays], config: dict[str, Any] | None, **models: Any) -> Path:
    """Files as DeepSpeed writes them, without anything of shardwright's."""
    (folder / "step").mkdir(parents=True)
    (folder / "latest").write_text("step")
    for name, held in files.items():
        torch.save(ds.tensors(held), folder / "step" / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if models:
        torch.save({"module": None, **models}, folder / "step" / "mp_rank_00_model_states.pt")
    return folder


@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_what_megatron_deepspeed_writes(name, tp, tmp_path):
    model, first = MODELS[name]
    hub, stored, source = made(model, tmp_path / "source")
    sw.convert(source, tmp_path / "out", to="megatron-deepspeed", layout=sw.Layout(tp=tp))
    expected = ds.layer_files(hub, model.kv, model.head_dim, tp, first=first)
    assert ref.differences(expected, ds.read(tmp_path / "out" / "global_step0", "layer_*.pt", None)) == []
    state = torch.load(tmp_path / f"out/global_step0/mp_rank_{tp - 1:02d}_model_states.pt", weights_only=False)
    assert state["module"] is None and state["mp_world_size"] == tp and state["args"].num_layers == model.layers
    sw.convert(tmp_path / "out", tmp_path / "back", to="huggingface")
    assert ref.differences({0: stored}, {0: ref.read_huggingface(tmp_path / "back")}) == []
    assert sw.verify(tmp_path / "out", source).ok


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 8), (4, 1), (8, 2)])
@pytest.mark.parametrize("name", ["bloom", "llama"])
def test_from_foreign_files_to_another_degree(name, n, m, tmp_path):
    model, first = MODELS[name]
    hub, stored, _ = made(model, tmp_path / "hf")
    files = ds.layer_files(hub, model.kv, model.head_dim, n, first=first)
    source = write_layers(tmp_path / "source", files, json.loads((tmp_path / "hf" / "config.json").read_text()))
    opened = sw.open(source)
    assert (opened.format, opened.layout.tp) == ("megatron-deepspeed", n)
    sw.convert(opened, tmp_path / "out", to="megatron-deepspeed", layout=sw.Layout(tp=m))
    expected = ds.layer_files(hub, model.kv, model.head_dim, m, first=first)
    assert ref.differences(expected, ds.read(tmp_path / "out" / "global_step0", "layer_*.pt", None)) == []
    sw.convert(opened, tmp_path / "back", to="huggingface")
    assert ref.differences({0: stored}, {0: ref.read_huggingface(tmp_path / "back")}) == []


def test_where_blocks_begin_is_read_off_the_files(tmp_path):
    """Any number before the blocks: whoever adds a layer without parameters moves them."""
    hub = GPT.hub()
    for first in (2, 3, 5):
        files = ds.layer_files(hub, GPT.kv, GPT.head_dim, 1, first=first)
        opened = sw.open(write_layers(tmp_path / str(first), files, GPT.raw()))
        assert (ref.to_bits(opened["model.layers.1.mlp.up_proj.weight"].torch()) == hub["model.layers.1.mlp.up_proj.weight"]).all()


def test_masters_that_are_lost_are_told(tmp_path):
    files = ds.layer_files(GPT.hub(), GPT.kv, GPT.head_dim, 1, first=3)
    opened = sw.open(write_layers(tmp_path / "source", files, GPT.raw(), optimizer={"fp32_groups_flat": [torch.ones(3)]}))
    assert any("float32 master weights in it are lost" in warning for warning in opened.source.warnings)


def test_twelve_ranks_and_a_hundred_layers(tmp_path):
    """Numbers, not text: layer 100 comes after 99 and rank 10 after 9."""
    model = Gpt("bloom", layers=100, heads=12, kv=12, head_dim=1, ffn=48)
    hub = model.hub()
    files = ds.layer_files(hub, 12, 1, 12, first=3, multiple=12)
    opened = sw.open(write_layers(tmp_path / "source", files, model.raw()))
    assert opened.layout.tp == 12
    for name in ("model.layers.99.mlp.down_proj.weight", "model.layers.97.self_attn.k_proj.weight", "model.norm.bias"):
        assert (ref.to_bits(opened[name].torch()) == hub[name]).all(), name


def test_the_config_is_in_the_args(tmp_path):
    _, _, source = made(GPT, tmp_path / "source")
    sw.convert(source, tmp_path / "out", to="megatron-deepspeed", layout=sw.Layout(tp=2))
    shutil.rmtree(tmp_path / "out" / "hf")
    (tmp_path / "out" / "shardwright.json").unlink()
    opened = sw.open(tmp_path / "out")
    assert opened.family == "gpt2" and any("told from the checkpoint's args" in note for note in opened.source.warnings)
    wanted = dict(sw.open(source).config.fields) | {"hidden_act": "gelu_new"}
    assert dict(opened.config.fields) == wanted


# -- averages -----------------------------------------------------------------------------------------------------------------


AVERAGED = ("word_embeddings.norm.", "input_layernorm.", "post_attention_layernorm.", "self_attention.dense.bias", "dense_4h_to_h.bias")


def drifted(tmp_path: Path, tp: int) -> tuple[Path, dict[str, np.ndarray], dict[str, int]]:
    """BLOOM in bfloat16 whose ranks' copies drifted apart: the folder, the mean of each copy by its hub name, and how many elements
    differ."""
    model = Gpt("bloom", layers=2, ffn=128)
    hub = {name: np.random.default_rng(len(name)).standard_normal(a.shape).astype(ml_dtypes.bfloat16) for name, a in model.hub().items()}
    bits = {name: a.view(np.uint16) for name, a in hub.items()}
    files = ds.layer_files(bits, model.kv, model.head_dim, tp, first=3)
    (tmp_path / "source" / "step").mkdir(parents=True)
    (tmp_path / "source" / "latest").write_text("step")
    (tmp_path / "source" / "config.json").write_text(json.dumps(model.raw() | {"torch_dtype": "bfloat16"}))
    copies: dict[str, list[np.ndarray]] = {}
    for path, held in files.items():
        made_up: ref.Arrays = {}
        layer, rank = int(path[6:8]), int(path.split("-model_")[1][:2])
        for name, array in held.items():
            if name.startswith(AVERAGED[:1]) or any(part in name for part in AVERAGED) or name in ("weight", "bias"):
                rng = np.random.default_rng([layer, len(name), rank])
                values = array.view(ml_dtypes.bfloat16).copy()
                at = rng.random(values.shape) < (0.5 if rank else 0)
                values[at] += (0.05 * rng.standard_normal(at.sum())).astype(ml_dtypes.bfloat16)
                array = values.view(np.uint16)
                copies.setdefault(hub_name(name, layer), []).append(values)
            made_up[name] = array
        torch.save(ds.tensors(made_up, "bfloat16"), tmp_path / "source" / "step" / path)
    means, counts = {}, {}
    for name, held in copies.items():
        total = held[0].astype(np.float32)
        for copy in held[1:]:
            total = total + copy.astype(np.float32)
        differ = np.any([c.view(np.uint16) != held[0].view(np.uint16) for c in held], axis=0)
        means[name] = np.where(differ, (total / np.float32(tp)).astype(ml_dtypes.bfloat16), held[0]).view(np.uint16)
        if differ.any():
            counts[name] = int(differ.sum())
    return tmp_path / "source", means, counts


def hub_name(name: str, layer: int) -> str:
    spelled = {"self_attention.dense": "self_attn.o_proj", "mlp.dense_4h_to_h": "mlp.down_proj"}
    if name.startswith("word_embeddings.norm."):
        return name.replace("word_embeddings.norm", "model.embed_layernorm")
    if name in ("weight", "bias"):
        return f"model.norm.{name}"
    stem, _, kind = name.rpartition(".")
    return f"model.layers.{layer - 3}.{spelled.get(stem, stem)}.{kind}"


@pytest.mark.parametrize("tp", [2, 4])
def test_copies_that_drifted_apart(tp, tmp_path):
    source, means, counts = drifted(tmp_path, tp)
    opened = sw.open(source)
    job = sw.plan(opened, tmp_path / "out", to="huggingface")
    outcome = job.execute()
    assert outcome.averaged == counts and counts
    back = sw.open(tmp_path / "out")
    for name, expected in means.items():
        assert (ref.to_bits(back[name].torch()) == expected).all(), name
        # A lazy tensor, its slices, and a rank's state dict are the mean too.
        assert (ref.to_bits(opened[name].torch()) == expected).all(), name
        assert (ref.to_bits(opened[name][3:7].torch()) == expected[3:7]).all(), name
    held = opened.state_dict(to="ranks", layout=sw.Layout(tp=2), rank=1, pad_vocab_to=8)
    assert (ref.to_bits(held["transformer.ln_f.weight"]) == means["model.norm.weight"]).all()
    assert sw.verify(tmp_path / "out", source).ok
    assert sw.diff(source, tmp_path / "out").ok
    assert "averaged with a copy in" in job.explain("transformer.ln_f.weight")


def test_the_first_copy_where_copies_are_trusted(tmp_path):
    source, _, counts = drifted(tmp_path, 2)
    outcome = sw.plan(source, tmp_path / "out", to="huggingface", trust_replicas=True).execute()
    assert outcome.averaged == {}
    first = torch.load(source / "step" / "layer_03-model_00-model_states.pt")["input_layernorm.weight"]
    found = sw.open(tmp_path / "out")["model.layers.0.input_layernorm.weight"].torch()
    assert "model.layers.0.input_layernorm.weight" in counts and torch.equal(found, first)


def test_a_resumed_run_counts_all_of_them(tmp_path, monkeypatch):
    """What finished tiles averaged is in the journal."""
    from shardwright.executors import execute as module

    source, _, counts = drifted(tmp_path, 2)
    job = sw.plan(source, tmp_path / "out", to="huggingface")

    def stop(*args: Any, **more: Any) -> Any:
        raise RunError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(module, "seal", stop)
        with pytest.raises(RunError):
            job.execute()
    again = job.execute()
    assert again.tiles_resumed == len(job.plan.tiles) and again.averaged == counts


# -- what is refused ------------------------------------------------------------------------------------------------------------

Change = Callable[[Path], object]


def gone(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def altered(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    def alter(folder: Path) -> None:
        state = torch.load(folder / name)
        change(state)
        torch.save(state, folder / name)

    return alter


BLOCK = "layer_04-model_01-model_states.pt"
BAD: dict[str, tuple[Change, type[Exception], str]] = {
    "rank": (gone(BLOCK), CheckpointError, r"a file of every tensor-parallel rank.*layer_04.*ranks 0 … 1.*\[0\]"),
    "layer": (
        lambda folder: [(folder / f"layer_05-model_0{rank}-model_states.pt").unlink() for rank in (0, 1)],
        CheckpointError,
        "blocks are not those that the config counts.*3 layers: layer_03 … layer_05.*2 layers",
    ),
    "hole": (
        lambda folder: [(folder / f"layer_04-model_0{rank}-model_states.pt").unlink() for rank in (0, 1)],
        CheckpointError,
        "blocks are not those.*the last layer_05",
    ),
    "unknown": (altered(BLOCK, lambda s: s.update(extra=torch.ones(2))), UnknownTensorError, r"layers\.1\.extra.*layer_04-model_01"),
    "missing": (altered(BLOCK, lambda s: s.pop("mlp.dense_h_to_4h.bias")), MissingTensorError, r"layers\.1\.mlp\.dense_h_to_4h\.bias"),
    "twice": (
        altered("layer_07-model_00-model_states.pt", lambda s: s.update({"word_embeddings.weight": torch.ones(2)})),
        CheckpointError,
        "two layers' files hold one tensor.*word_embeddings.weight",
    ),
    "no block": (
        lambda folder: [path.unlink() for path in folder.glob("layer_0[345]*")],
        CheckpointError,
        "no layer's file holds a block of a transformer",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused(case, tmp_path):
    change, error, match = BAD[case]
    source = write_layers(tmp_path / "source", ds.layer_files(BLOOM.hub(), BLOOM.kv, BLOOM.head_dim, 2, first=3), BLOOM.raw())
    change(source / "step")
    with pytest.raises(error, match=match):
        sw.plan(source, tmp_path / "out", to="huggingface")


def test_other_refusals(tmp_path):
    files = ds.layer_files(BLOOM.hub(), BLOOM.kv, BLOOM.head_dim, 1, first=3)
    with pytest.raises(CheckpointError, match="nothing describes the model"):
        sw.open(write_layers(tmp_path / "bare", files, None))
    with pytest.raises(UnsupportedError, match=r"checkpoint versions 2.0 and 3.0.*actual 1.0"):
        sw.open(write_layers(tmp_path / "old", files, BLOOM.raw(), checkpoint_version=1.0))
    _, _, source = made(BLOOM, tmp_path / "hf")
    with pytest.raises(UnsupportedError, match="tensor-parallel ranks only"):
        sw.plan(source, tmp_path / "out", to="megatron-deepspeed", layout=sw.Layout(tp=2, pp=3))
    parallel = Gpt("gpt_neox", layers=1, tied=False)
    with pytest.raises(UnsupportedError, match="no parallel residual"):
        sw.plan(made(parallel, tmp_path / "neox")[2], tmp_path / "out", to="megatron-deepspeed")


def test_averaged_dtypes(tmp_path):
    """A copy of another dtype than the first is no copy."""
    source = write_layers(tmp_path / "source", ds.layer_files(BLOOM.hub(), BLOOM.kv, BLOOM.head_dim, 2, first=3), BLOOM.raw())
    altered(BLOCK, lambda s: s.update({"input_layernorm.weight": s["input_layernorm.weight"].half()}))(source / "step")
    with pytest.raises(CheckpointError, match="several dtypes"):
        sw.plan(source, tmp_path / "out", to="huggingface")


def test_bloom_under_the_names_of_a_module_that_is_no_pipeline(tmp_path):
    hub, stored, source = made(BLOOM, tmp_path / "source")
    sw.convert(source, tmp_path / "out", to="deepspeed-mp", layout=sw.Layout(tp=4))
    expected = {f"mp_rank_{r:02d}_model_states.pt": held for r, held in enumerate(ds.mp_ranks(hub, BLOOM.kv, BLOOM.head_dim, 4))}
    assert ref.differences(expected, ds.read(tmp_path / "out" / "global_step0")) == []
    sw.convert(tmp_path / "out", tmp_path / "layers", to="megatron-deepspeed", layout=sw.Layout(tp=2))
    sw.convert(tmp_path / "layers", tmp_path / "back", to="huggingface")
    assert ref.differences({0: stored}, {0: ref.read_huggingface(tmp_path / "back")}) == []


# -- GPT-NeoX ---------------------------------------------------------------------------------------------------------------------


NEOX = Gpt("gpt_neox", layers=3, tied=False, config={"rotary_pct": 0.25})


@pytest.mark.parametrize("spec", ["linear", "dense"])
@pytest.mark.parametrize("tied", [False, True])
def test_gpt_neox(tied, spec, tmp_path):
    model = Gpt("gpt_neox", layers=3, tied=tied, config={"rotary_pct": 0.25})
    hub, stored, source = made(model, tmp_path / "hf")
    expected = ds.neox_files(hub, model.kv, model.head_dim, linear=spec == "linear")
    sw.convert(source, tmp_path / "out", to="megatron-deepspeed", dialect="gpt-neox", spec=spec)
    assert ref.differences(expected, ds.read(tmp_path / "out" / "global_step0", "layer_*.pt", None)) == []
    foreign = write_layers(tmp_path / "source", expected, model.raw())
    buffer = torch.ones(2)
    altered("layer_02-model_00-model_states.pt", lambda s: s.update({"attention.rotary_emb.inv_freq": buffer}))(foreign / "step")
    opened = sw.open(foreign)
    assert (opened.source.dialect.name, opened.source.spec) == ("gpt-neox", spec)
    job = sw.plan(opened, tmp_path / "back", to="huggingface")
    assert [dropped.name for dropped in job.plan.dropped] == ["layers.0.attention.rotary_emb.inv_freq"]
    job.execute()
    assert ref.differences({0: stored}, {0: ref.read_huggingface(tmp_path / "back")}) == []


def test_biases_that_gpt_neox_adds_up(tmp_path):
    """Two ranks' files of GPT-NeoX: no copies and no parts, so they are refused rather than averaged."""
    _, _, source = made(NEOX, tmp_path / "hf")
    with pytest.raises(UnsupportedError, match="adds up the biases"):
        sw.plan(source, tmp_path / "out", to="megatron-deepspeed", dialect="gpt-neox", layout=sw.Layout(tp=2))
    one = ds.neox_files(NEOX.hub(), NEOX.kv, NEOX.head_dim, linear=True)
    two = one | {name.replace("model_00", "model_01"): held for name, held in one.items()}
    with pytest.raises(UnsupportedError, match="adds up the biases"):
        sw.plan(write_layers(tmp_path / "source", two, NEOX.raw()), tmp_path / "out", to="huggingface")
    with pytest.raises(UnsupportedError, match="has no row for this tensor"):
        sw.plan(made(BLOOM, tmp_path / "bloom")[2], tmp_path / "out", to="megatron-deepspeed", dialect="gpt-neox")
