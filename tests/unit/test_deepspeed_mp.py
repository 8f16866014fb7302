"""``deepspeed-mp``: shards of DeepSpeed's loader, against plain numpy (`deepspeed_reference`); manifests; refusals."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shardwright as sw
from shardwright.errors import CheckpointError, LayoutError, MissingTensorError, ReplicaMismatchError, UnknownTensorError, UnsupportedError
from tests.unit import deepspeed_reference as ds
from tests.unit import reference as ref
from tests.unit.gpt_reference import Gpt
from tests.unit.reference import Model

LLAMA = Model(layers=2, kv=24, ffn=96)
GQA = Model("qwen2", layers=2, kv=8, qkv_bias=True)
GPT = Gpt("gpt2", layers=2)
BLOOM = Gpt("bloom", layers=2, ffn=128)
VERSION = {"": 2, "-v1": 1, "-v0": 0}


@pytest.fixture(scope="module", autouse=True)
def no_sync() -> Iterator[None]:
    """These tests look at bytes, not at what survives a power cut: waiting for the disk is most of their time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


def made(model: Model | Gpt, folder: Path) -> tuple[ref.Arrays, ref.Arrays, Path]:
    """Hub tensors, stored tensors, and the Hugging Face checkpoint."""
    if isinstance(model, Gpt):
        hub = model.hub()
        stored = model.stored(hub)
        return hub, stored, model.write(folder, stored)
    weights = model.weights()
    return weights, weights, ref.write(folder, model, weights)


def write_shards(folder: Path, ranks: list[ref.Arrays], config: dict[str, Any] | None = None, *, key: str = "module", **more: Any) -> Path:
    """Files as DeepSpeed writes them, without anything of shardwright's."""
    (folder / "tag").mkdir(parents=True)
    (folder / "latest").write_text("tag")
    for rank, held in enumerate(ranks):
        state = {key: ds.tensors(held), "mp_world_size": len(ranks), "checkpoint_version": 2.0, **more}
        torch.save({k: v for k, v in state.items() if v is not ...}, folder / "tag" / f"mp_rank_{rank:02d}_model_states.pt")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def shards_of(model: Model | Gpt, hub: ref.Arrays, tp: int, naming: str = "layernorm", version: int = 2) -> list[ref.Arrays]:
    return ds.mp_ranks(hub, model.kv, model.head_dim, tp, naming, version)


def in_files(ranks: list[ref.Arrays]) -> dict[str, ref.Arrays]:
    return {f"mp_rank_{rank:02d}_model_states.pt": held for rank, held in enumerate(ranks)}


@pytest.mark.parametrize("order", ["", "-v1", "-v0"])
@pytest.mark.parametrize(
    ("name", "model", "tp"), [("layernorm", LLAMA, 3), ("layernorm", GPT, 4), ("transformer", GPT, 2), ("gpt2", GPT, 8)]
)
def test_what_is_written_is_the_layouts_definition(name, model, tp, order, tmp_path):
    hub, stored, source = made(model, tmp_path / "source")
    sw.convert(source, tmp_path / "out", to="deepspeed-mp", layout=sw.Layout(tp=tp), spec=name + order)
    expected = in_files(shards_of(model, hub, tp, name, VERSION[order]))
    assert ref.differences(expected, ds.read(tmp_path / "out" / "global_step0")) == []
    state = torch.load(tmp_path / "out/global_step0/mp_rank_00_model_states.pt", weights_only=False)
    assert (state["checkpoint_version"], state["mp_world_size"]) == (VERSION[order], tp)
    opened = sw.open(tmp_path / "out")
    assert (opened.format, opened.source.spec, opened.layout.tp) == ("deepspeed-mp", name + order, tp)
    sw.convert(opened, tmp_path / "back", to="huggingface")
    assert ref.differences({0: stored}, {0: ref.read_huggingface(tmp_path / "back")}) == []
    assert sw.verify(tmp_path / "out", source).ok


@pytest.mark.parametrize("n", range(1, 9))
def test_any_degree_to_any_other(n, tmp_path):
    """Bit-exact for every m at once; what does not divide is refused."""
    heads = 24 if n in (3, 6) else 8
    model = Gpt("gpt2", layers=1, heads=heads, kv=heads, ffn=heads * 4)
    hub = model.hub()
    if heads % n:
        with pytest.raises(LayoutError, match=f"tp {n} does not divide the attention heads"):
            sw.convert(made(model, tmp_path / "s")[2], tmp_path / "o", to="deepspeed-mp", layout=sw.Layout(tp=n))
        return
    source = write_shards(tmp_path / "source", shards_of(model, hub, n, "gpt2", 0), model.raw(), checkpoint_version=...)
    for m in [m for m in range(1, 9) if heads % m == 0]:
        order = ("", "-v0", "-v1")[(n + m) % 3]
        sw.convert(source, tmp_path / f"{m}", to="deepspeed-mp", layout=sw.Layout(tp=m), spec=f"gpt2{order}")
        expected = in_files(shards_of(model, hub, m, "gpt2", VERSION[order]))
        assert ref.differences(expected, ds.read(tmp_path / f"{m}" / "global_step0")) == [], m


@pytest.mark.parametrize("key", ["module", "model"])
@pytest.mark.parametrize("shape", ["flat", "nested", "wrapped"])
@pytest.mark.parametrize(("naming", "model"), [("layernorm", GQA), ("norm", LLAMA), ("transformer", GPT), ("layernorm", BLOOM)])
def test_genuine_shapes_are_read(naming, model, shape, key, tmp_path):
    """Under either key, flat, as nested dictionaries, or with the module. of wrappers."""
    hub, stored, _ = made(model, tmp_path / "hf")
    ranks = shards_of(model, hub, 2, naming)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    source = write_shards(tmp_path / "source", ranks, config)
    for rank, held in enumerate(ranks):
        values = ds.tensors(held)
        if shape == "nested":
            values = ds.nested(values)
        if shape == "wrapped":
            values = {f"module.module.{name}": value for name, value in values.items()}
        torch.save({key: values, "checkpoint_version": 3.0}, source / "tag" / f"mp_rank_{rank:02d}_model_states.pt")
    opened = sw.open(source)
    assert (opened.format, opened.source.dialect.name, opened.source.spec) == ("deepspeed-mp", "megatron-nested", naming)
    sw.convert(opened, tmp_path / "back", to="huggingface")
    assert ref.differences({0: stored}, {0: ref.read_huggingface(tmp_path / "back")}) == []


@pytest.mark.parametrize("version", [0, 1.0, 2.0, 3.0, None])
def test_the_version_says_how_rows_are_ordered(version, tmp_path):
    hub, stored, _ = made(GPT, tmp_path / "hf")
    ranks = shards_of(GPT, hub, 2, "transformer", int(min(version or 0, 2)))
    source = write_shards(tmp_path / "source", ranks, GPT.raw(), checkpoint_version=... if version is None else version)
    opened = sw.open(source)
    assert opened.source.spec == {0: "transformer-v0", 1: "transformer-v1"}.get(int(version or 0), "transformer")
    assert any("version 0" in note for note in opened.source.warnings) == (version is None)
    sw.convert(opened, tmp_path / "back", to="huggingface")
    assert ref.differences({0: stored}, {0: ref.read_huggingface(tmp_path / "back")}) == []


def test_a_swapped_order_is_another_model(tmp_path):
    """The reference would notice: rows read as of another version are not the model's."""
    hub, stored, _ = made(GPT, tmp_path / "hf")
    source = write_shards(tmp_path / "source", shards_of(GPT, hub, 2, "gpt2", 0), GPT.raw(), checkpoint_version=2.0)
    sw.convert(source, tmp_path / "back", to="huggingface")
    wrong = ref.differences({0: stored}, {0: ref.read_huggingface(tmp_path / "back")})
    assert len(wrong) == 2 * GPT.layers and all("c_attn" in line for line in wrong)


def test_a_manifest_of_another_version_is_told(tmp_path):
    """The manifest's counts, as in DeepSpeed, and nobody should learn that from the model's answers."""
    out = tmp_path / "out"
    made(GPT, tmp_path / "hf")
    sw.convert(tmp_path / "hf", out, to="deepspeed-mp", layout=sw.Layout(tp=2))
    manifest = json.loads((out / "checkpoints.json").read_text())
    (out / "other.json").write_text(json.dumps({**manifest, "version": 0}))
    told = "other.json says version 0, the files say 2.0: the manifest's was taken, as DeepSpeed does"
    assert told in sw.open(out / "other.json").source.warnings
    assert not any("version" in note for note in sw.open(out / "checkpoints.json").source.warnings)


def test_ranks_are_numbers(tmp_path):
    """104 ranks: as text, mp_rank_100 comes before mp_rank_11."""
    model = Gpt("gpt2", layers=1, heads=104, kv=104, head_dim=1, ffn=104, vocab=128)
    hub = model.hub()
    source = write_shards(tmp_path / "source", ds.mp_ranks(hub, 104, 1, 104, "gpt2", 2, 104), model.raw())
    opened = sw.open(source)
    assert opened.layout.tp == 104
    assert (ref.to_bits(opened["model.layers.0.mlp.up_proj.weight"].torch()) == hub["model.layers.0.mlp.up_proj.weight"]).all()
    sw.convert(source, tmp_path / "out", to="deepspeed-mp", layout=sw.Layout(tp=52), spec="gpt2", pad_vocab_to=104)
    assert ref.differences(in_files(ds.mp_ranks(hub, 104, 1, 52, "gpt2", 2, 104)), ds.read(tmp_path / "out" / "global_step0")) == []


def test_config_out_of_args(tmp_path):
    """A target's args say all that a config must: Megatron-DeepSpeed's words, not Megatron-core's."""
    _, _, source = made(GQA, tmp_path / "source")
    sw.convert(source, tmp_path / "out", to="deepspeed-mp", layout=sw.Layout(tp=2))
    shutil.rmtree(tmp_path / "out" / "hf")
    (tmp_path / "out" / "shardwright.json").unlink()
    opened = sw.open(tmp_path / "out", family="qwen2")
    wanted = sw.open(source).config.fields
    said = {"attention_out_bias", "mlp_bias", "qkv_bias"}  # one switch for all of them
    assert {k: v for k, v in opened.config.fields.items() if k not in said} == {k: v for k, v in wanted.items() if k not in said}


# -- what is refused ------------------------------------------------------------------------------------------------------


def ruined(tmp_path: Path, change: Any, rank: int = 1) -> Path:
    """Two good ranks, one of which `change` alters."""
    source = write_shards(tmp_path / "source", shards_of(GPT, GPT.hub(), 2), GPT.raw())
    path = source / "tag" / f"mp_rank_{rank:02d}_model_states.pt"
    state = torch.load(path, weights_only=False)
    torch.save(change(state) or state, path)
    return source


BLOCK = "language_model.encoder.layers.0."
BAD = {
    "both": (lambda s: s.update(model=s["module"]), CheckpointError, "both 'module' and 'model'"),
    "neither": (lambda s: {"weights": s["module"]}, CheckpointError, "neither 'module' nor 'model'"),
    "pipeline": (lambda s: s.update(module=None), UnsupportedError, "layer files"),
    "world": (lambda s: s.update(mp_world_size=4), CheckpointError, "mp_world_size.*expected 4 files.*actual 2 files"),
    "versions": (lambda s: s.update(checkpoint_version=1.0), CheckpointError, "different checkpoint versions.*mp_rank_01"),
    "unknown name": (lambda s: s["module"].update(extra=torch.ones(3)), UnknownTensorError, "no rule.*extra"),
    "missing name": (lambda s: s["module"].__delitem__(f"{BLOCK}mlp.dense_h_to_4h.bias"), MissingTensorError, "dense_h_to_4h.bias"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_shard_is_refused(case, tmp_path):
    change, error, match = BAD[case]
    source = ruined(tmp_path, change)
    with pytest.raises(error, match=match):
        sw.plan(source, tmp_path / "out", to="huggingface")


@pytest.mark.parametrize("version", [4.0, "2.0", True, -1])
def test_a_version_that_nobody_knows(version, tmp_path):
    source = write_shards(tmp_path / "source", shards_of(GPT, GPT.hub(), 1), GPT.raw(), checkpoint_version=version)
    with pytest.raises(UnsupportedError, match=r"checkpoint_version is none that.*expected one of 0, 1.0, 2.0, 3.0"):
        sw.open(source)


def test_replicas_that_differ(tmp_path):
    def change(state: Any) -> None:
        state["module"][f"{BLOCK}input_layernorm.weight"] = state["module"][f"{BLOCK}input_layernorm.weight"] + 1

    source = ruined(tmp_path, change)
    with pytest.raises(ReplicaMismatchError, match=r"first at element.*input_layernorm.weight.*mp_rank_00.*mp_rank_01"):
        sw.convert(source, tmp_path / "out", to="huggingface")


def test_a_missing_rank(tmp_path):
    source = write_shards(tmp_path / "source", shards_of(GPT, GPT.hub(), 4), GPT.raw())
    (source / "tag" / "mp_rank_02_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"ranks are missing.*expected ranks 0 … 3.*\[0, 1, 3\]"):
        sw.open(source)
    shutil.copy(source / "tag" / "mp_rank_01_model_states.pt", source / "tag" / "mp_rank_001_model_states.pt")
    with pytest.raises(CheckpointError, match="two files are of one rank"):
        sw.open(source)


def test_tags(tmp_path):
    source = write_shards(tmp_path / "source", shards_of(GPT, GPT.hub(), 1), GPT.raw())
    shutil.copytree(source / "tag", source / "older")
    assert sw.open(source).layout.tp == 1
    assert sw.open(source / "tag", config=source / "config.json").layout.tp == 1
    (source / "latest").write_text("gone")
    with pytest.raises(CheckpointError, match=r"names a tag whose files are not there.*'gone'.*older"):
        sw.open(source)
    (source / "latest").unlink()
    with pytest.raises(CheckpointError, match="several tags and no file latest"):
        sw.open(source)


def test_what_the_format_does_not_hold(tmp_path):
    _, _, source = made(GQA, tmp_path / "source")
    with pytest.raises(UnsupportedError, match=r"tensor-parallel ranks only.*actual pp 2"):
        sw.plan(source, tmp_path / "out", to="deepspeed-mp", layout=sw.Layout(pp=2))
    for spec in ("layernorm-v0", "layernorm-v1"):
        with pytest.raises(UnsupportedError, match=r"no grouped-query attention.*expected 24.*actual 8"):
            sw.plan(source, tmp_path / "out", to="deepspeed-mp", spec=spec)
    with pytest.raises(UnsupportedError, match="has no row for this tensor"):
        sw.plan(source, tmp_path / "out", to="deepspeed-mp", spec="gpt2")


def test_names_of_nobody_cannot_be_joined(tmp_path):
    ranks = [{"transformer.h.0.ln_1.weight": np.ones(4, np.uint32)}] * 2
    with pytest.raises(UnsupportedError, match="names are not Megatron's"):
        sw.open(write_shards(tmp_path / "source", ranks, GPT.raw()))


def test_a_hugging_face_model_in_one_rank(tmp_path):
    _, stored, _ = made(GPT, tmp_path / "hf")
    source = write_shards(tmp_path / "source", [stored | {"lm_head.weight": stored["transformer.wte.weight"]}], GPT.raw())
    opened = sw.open(source)
    assert opened.source.dialect.name == "huggingface"
    sw.convert(opened, tmp_path / "back", to="huggingface")
    assert ref.differences({0: stored}, {0: ref.read_huggingface(tmp_path / "back")}) == []


@pytest.mark.parametrize("key", ["fp32_groups_flat", "fp32_groups", None])
def test_masters_that_are_lost_are_told(key, tmp_path):
    optimizer = {"optimizer_state_dict": {"state": {}}} | ({key: [torch.ones(3)]} if key else {})
    source = write_shards(tmp_path / "source", shards_of(GPT, GPT.hub(), 1), GPT.raw(), optimizer=optimizer)
    job = sw.plan(source, to="huggingface")
    (left,) = [d for d in job.plan.dropped if d.name == "optimizer"]
    lost = "float32 master weights in it are lost"
    told = [w for w in job.plan.warnings if lost in w and "mp_rank_00" in w]
    assert (lost in left.reason, len(told)) == ((True, 1) if key else (False, 0))


@pytest.mark.parametrize("beside", ["zero_pp_rank_0_mp_rank_00_optim_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_zero_is_not_this_format(beside, tmp_path):
    from shardwright.planner.formats import FORMATS
    from shardwright.planner.store import LocalStore

    source = write_shards(tmp_path / "source", shards_of(GPT, GPT.hub(), 1), GPT.raw())
    assert FORMATS.get("deepspeed-mp").detect(LocalStore(source))
    (source / "tag" / beside).write_bytes(b"")
    assert not FORMATS.get("deepspeed-mp").detect(LocalStore(source))
