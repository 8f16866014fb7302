"""ZeRO and universal checkpoints against the rules: any cut is put together, optimizer state follows its weight, and what
contradicts itself is refused with file, what was expected and what is there."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

import shardwright as sw
from shardwright.cli import main
from shardwright.errors import CheckpointError, MissingTensorError, PaddingError, UnknownTensorError, UnsupportedError, UsageError
from shardwright.planner.passes.build import build
from shardwright.planner.request import Request
from tests.property.test_invariance import digest
from tests.unit.tiny import tiny_llama
from tests.unit.zero_writer import STATES, Zero, deepspeed_classes, write

few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", autouse=True)
def no_sync() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


class Model:
    """Masters and optimizer state of a small llama whose sizes nothing divides."""

    def __init__(self, folder: Path, **config: Any) -> None:
        tiny_llama(folder, layers=2, hidden=12, heads=2, kv=1, vocab=13, shards=1, **config)
        self.config = json.loads((folder / "config.json").read_text())
        self.masters = load_file(folder / "model.safetensors")
        rng = np.random.default_rng(1)
        self.states = {key: {n: rng.standard_normal(a.shape, np.float32) for n, a in self.masters.items()} for key in STATES}

    def write(self, folder: Path, **zero: Any) -> Path:
        return write(folder, self.masters, self.states, Zero(**zero), self.config)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    return Model(tmp_path_factory.mktemp("model") / "llama")


def universal(folder: Path, key: str) -> dict[str, np.ndarray]:
    found = {p.parent.name: torch.load(p, weights_only=True) for p in folder.glob(f"*/zero/*/{key}.pt")}
    return {name: value["param"].numpy() for name, value in found.items()}


def same(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[n], two[n]) and one[n].dtype == two[n].dtype for n in two)


def test_text_is_one_pattern(model, tmp_path):
    """The letters of a pattern are patterns too, and one of them may be a star."""
    source = sw.open(model.write(tmp_path / "run", buffers={"extra_one": torch.zeros(2), "more": torch.zeros(2)}))
    for reads in (lambda drop: source.state_dict(drop=drop), lambda drop: sw.plan(source, to="huggingface", drop=drop)):
        with pytest.raises(UnknownTensorError, match="'more'"):
            reads("extra_*")
        reads(["extra_*", "more"])


@few
@given(
    stage=st.sampled_from([1, 2, 3, "bf16"]),
    dp=st.sampled_from([1, 2, 3, 4, 7, 12, 13]),
    groups=st.integers(1, 4),
    alignment=st.sampled_from([1, 1, 4, 8]),
    elastic=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_run_is_put_together(stage, dp, groups, alignment, elastic, seed, model, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    dice = random.Random(seed)
    names = list(model.masters)
    dice.shuffle(names)
    frozen = names[: dice.choice((0, 0, 1, 3))]
    rest = names[len(frozen) :]
    cuts = [rest[i::groups] for i in range(groups)]
    flat = stage in (1, 2, "bf16")
    source = model.write(
        root / "run", stage=stage, dp=dp, groups=cuts, alignment=alignment if flat else 1, elastic=elastic and flat, frozen=frozen
    )
    ckpt = sw.open(source)
    assert (ckpt.format, ckpt.layout, list(ckpt.source.planes)) == ("deepspeed-zero", sw.Layout(), list(STATES))
    low = {n: torch.from_numpy(a).bfloat16().float().numpy() for n, a in model.masters.items() if n in frozen}
    expected = {**model.masters, **low}
    job = sw.plan(ckpt, root / "hf", to="huggingface", dtype="float32")
    outcome = job.execute()
    assert same(load_file(root / "hf" / "model.safetensors"), expected)
    assert outcome.bytes_read == sum(t.nbytes for t in job.plan.source_tensors)
    sw.convert(ckpt, root / "universal", to="deepspeed-universal")
    assert same(universal(root / "universal", "fp32"), expected)
    for key in STATES:
        assert same(universal(root / "universal", key), {n: a for n, a in model.states[key].items() if n not in frozen})
    assert sw.verify(root / "universal", ckpt).ok and sw.diff(root / "universal", root / "hf").ok
    steps = [torch.load(p, weights_only=True) for p in (root / "universal").glob("*/zero/*/step.pt")]
    assert len(steps) == len(rest) and all(step.equal(torch.tensor(3.0)) for step in steps)


def test_memory_and_tiles_never_change_a_byte(model, tmp_path):
    source = sw.open(model.write(tmp_path / "run", stage=3, dp=5))
    found = set()
    for number, (tile_bytes, memory, workers) in enumerate([(400, "1GiB", 1), (1001, "128MiB", 3), (1 << 27, "1GiB", 2)]):
        plan = build(source.source, Request("deepspeed-universal"), tile_bytes=tile_bytes)
        sw.Conversion(plan, tmp_path / f"{number}", memory=memory, workers=workers).execute()
        found.add(digest(tmp_path / f"{number}", skip=("shardwright.json",)))
    assert len(found) == 1


def test_a_bare_universal_checkpoint_is_read(model, tmp_path):
    """What ds_to_universal makes of ZeRO-3: vectors without a shape, and no step files."""
    sw.convert(model.write(tmp_path / "run", stage=3, dp=4, frozen=["model.norm.weight"]), tmp_path / "out", to="deepspeed-universal")
    sw.convert(tmp_path / "out", tmp_path / "expected", to="huggingface")
    for path in (tmp_path / "out").glob("*/zero/*/*.pt"):
        value = torch.load(path, weights_only=True)
        if path.stem == "step" or path.parent.name == "model.norm.weight":
            path.unlink()
        else:
            torch.save(value["param"].flatten(), path)
    shutil.rmtree(next((tmp_path / "out").glob("*/zero/model.norm.weight")))
    (tmp_path / "out" / "shardwright.json").unlink()
    bare = sw.open(tmp_path / "out")
    sw.convert(bare, tmp_path / "found", to="huggingface", dtype="float32")
    assert same(load_file(tmp_path / "found" / "model.safetensors"), load_file(tmp_path / "expected" / "model.safetensors"))
    sw.convert(bare, tmp_path / "again", to="deepspeed-universal")
    assert len(list((tmp_path / "again").glob("*/zero/*/step.pt"))) == len(model.masters) - 1


def test_a_universal_checkpoint_has_what_each_stage_asks_for(model, tmp_path):
    for stage in (2, 3):
        source = model.write(tmp_path / f"run{stage}", stage=stage, dp=2, groups=[list(model.masters)[:5], list(model.masters)[5:]])
        out = tmp_path / f"out{stage}"
        sw.convert(source, out, to="deepspeed-universal")
        assert (out / "latest_universal").read_text() == "global_step3_universal"
        states = torch.load(out / "global_step3_universal" / "zero" / "optimizer_state.pt", weights_only=True)
        assert states["ds_version"] == "0.19.8" and states["param_groups"][0]["lr"] == 0.1
        assert states["optimizer_state_dict"]["state"][0]["step"].equal(torch.tensor(3.0))
        assert states["optimizer_state_dict"]["param_groups"] == states["param_groups"]
        for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
            held = torch.load(out / "global_step3_universal" / name, weights_only=True)
            assert (held["global_steps"], held["lr_scheduler"], held["dp_world_size"]) == (3, {"last_batch_iteration": 3}, 2)
    copied = tmp_path / "out2" / "global_step3_universal" / "mp_rank_00_model_states.pt"
    assert copied.read_bytes() == (tmp_path / "run2" / "global_step3" / "mp_rank_00_model_states.pt").read_bytes()


def test_optimizer_state_is_kept_where_it_can_be(model, tmp_path):
    source = sw.open(model.write(tmp_path / "run"))
    job = sw.plan(source, to="huggingface")
    assert {d.name: d.reason for d in job.plan.dropped if d.name in STATES} == dict.fromkeys(
        STATES, "huggingface has no place for the optimizer's state"
    )
    with pytest.raises(UsageError, match=r"huggingface has no place for the optimizer's state.*deepspeed-universal"):
        sw.plan(source, to="huggingface", optimizer="keep")
    with pytest.raises(UsageError, match="--optimizer is keep or drop"):
        sw.plan(source, to="huggingface", optimizer="some")
    with pytest.raises(UsageError, match="holds float32 and nothing else"):
        sw.plan(source, to="deepspeed-universal", dtype="bfloat16")
    sw.convert(source, tmp_path / "weights", to="deepspeed-universal", optimizer="drop")
    assert {p.stem for p in (tmp_path / "weights").glob("*/zero/*/*.pt")} == {"fp32"}
    weights = sw.open(tmp_path / "weights")
    assert not weights.source.planes and sw.verify(weights, source).ok
    with pytest.raises(UsageError, match="the source holds no optimizer state"):
        sw.plan(weights, to="deepspeed-universal", optimizer="keep")
    with pytest.raises(UnsupportedError, match="goes on with a training run, and none is read from this source"):
        sw.plan(tiny_llama(tmp_path / "hf"), to="deepspeed-universal")
    with pytest.raises(UnsupportedError, match=r"only read here.*deepspeed-universal"):
        sw.plan(source, to="deepspeed-zero")


def test_planes_are_planned_as_the_weights_are(model, tmp_path):
    source = sw.open(model.write(tmp_path / "run", dp=3))
    job = sw.plan(source, tmp_path / "out", to="deepspeed-universal")
    name = "exp_avg_sq:model.layers.1.mlp.up_proj.weight"
    said = job.explain(name)
    assert f"{name} @ rank 0" in said and "zero_pp_rank_" in said and "exp_avg_sq.pt" in said
    assert job.lineage(name).number_of_nodes() >= 5
    job.save(tmp_path / "plan.json")
    again = sw.load_plan(tmp_path / "plan.json")
    assert again.plan.bindings[0].names == job.plan.bindings[0].names and again.hash == job.hash
    again.execute()
    assert sw.verify(tmp_path / "out", source).level == "values"
    whole = universal(tmp_path / "out", "fp32")
    path = next((tmp_path / "out").glob("*/zero/model.norm.weight/exp_avg.pt"))
    spoilt = bytearray(path.read_bytes())
    at = spoilt.index(model.states["exp_avg"]["model.norm.weight"].tobytes())
    spoilt[at] ^= 1
    path.write_bytes(spoilt)
    found = sw.verify(tmp_path / "out", source)
    assert not found.ok and found.different[0].startswith("exp_avg:model.norm.weight@0, element 0") and same(whole, model.masters)


def test_tied_weights_are_one_parameter(tmp_path):
    tied = Model(tmp_path / "llama", tie_word_embeddings=True)
    shared = {"lm_head.weight": "model.embed_tokens.weight"}
    source = sw.open(tied.write(tmp_path / "run", shared=shared))
    assert any(d.name == "lm_head.weight" and d.reason == "another name of model.embed_tokens.weight" for d in source.source.dropped)
    sw.convert(source, tmp_path / "out", to="huggingface")
    assert same(load_file(tmp_path / "out" / "model.safetensors"), tied.masters)
    # A model that shares them although its config does not say so has both names.
    loose = sw.open(tmp_path / "run", config={**tied.config, "tie_word_embeddings": False})
    sw.convert(loose, tmp_path / "loose", to="huggingface")
    found = load_file(tmp_path / "loose" / "model.safetensors")
    assert np.array_equal(found["lm_head.weight"], tied.masters["model.embed_tokens.weight"]) and len(found) == len(tied.masters) + 1


def test_buffers_are_no_parameters(model, tmp_path):
    buffers = {"model.extra": torch.tensor([1, 1 << 40])}
    source = sw.open(model.write(tmp_path / "run", buffers=buffers))
    with pytest.raises(UnknownTensorError, match=r"model\.extra.*int64 \(2,\)"):
        sw.plan(source, to="huggingface")
    sw.convert(source, tmp_path / "out", to="deepspeed-universal", drop=("model.extra",))
    assert sw.verify(tmp_path / "out", source).ok
    assert same(universal(tmp_path / "out", "fp32"), model.masters)


def test_what_is_left_out_when_it_is_opened_is_left_out_of_everything(model, tmp_path, capsys):
    run, name = model.write(tmp_path / "run", buffers={"model.extra": torch.tensor([1, 1 << 40])}), "model.norm.weight"
    with pytest.raises(UnknownTensorError):
        sw.open(run)[name]
    source = sw.open(run, drop="model.e*")
    assert np.array_equal(source[name].numpy(), model.masters[name]) and np.array_equal(source.state_dict()[name], model.masters[name])
    job = sw.convert(source, tmp_path / "out", to="huggingface")
    assert job.plan.recipe["drop"] == ["model.e*"] and sw.verify(tmp_path / "out", run).ok
    assert sw.diff(run, tmp_path / "out", drop="model.e*").ok
    for words, says in ((["inspect", run], "model.extra"), (["diff", run, tmp_path / "out"], "left out with --drop")):
        for drop, code in (([], 3), (["--drop", "model.extra"], 0)):
            with pytest.raises(SystemExit) as stop:
                main([*map(str, words), *drop, "--json"])
            assert stop.value.code == code and (code or says in capsys.readouterr().out)


REFUSED = [
    ("deepspeed-zero", sw.Layout()),
    ("deepspeed-mp", sw.Layout(tp=2, pp=2)),
    ("megatron-deepspeed", sw.Layout(pp=2)),
    ("deepspeed-universal", sw.Layout()),
]


@pytest.mark.parametrize(("to", "layout"), REFUSED, ids=[to for to, _ in REFUSED])
def test_loads_are_refused_what_convert_is(to, layout, model, tmp_path):
    source = sw.open(tiny_llama(tmp_path / "hf", heads=8, kv=8, vocab=128))
    with pytest.raises(UnsupportedError) as said:
        sw.plan(source, to=to, layout=layout)
    linear = torch.nn.Linear(1, 1)
    for load in (source.state_dict, source.state_dicts, partial(source.load_into, linear), partial(source.state_dict, device="meta")):
        with pytest.raises(UnsupportedError) as refused:
            load(to=to, layout=layout)
        assert str(refused.value) == str(said.value)
    # A source with a training run gives what a universal checkpoint of it would hold.
    held = sw.open(model.write(tmp_path / "run")).state_dict(to="deepspeed-universal")
    assert np.array_equal(held["model.norm.weight"], model.masters["model.norm.weight"])


# What bad input gets.

Change = Callable[[Path], None]


def edit(name: str, change: Callable[[dict[str, Any]], None]) -> Change:
    """Load a file of the step, change it, save it again."""

    def run(folder: Path) -> None:
        with deepspeed_classes():
            held = torch.load(folder / name, weights_only=False)
            change(held)
            torch.save(held, folder / name)

    return run


def optimizer(rank: int, change: Callable[[dict[str, Any]], None]) -> Change:
    return edit(f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", lambda held: change(held["optimizer_state_dict"]))


def states(change: Callable[[dict[str, Any]], None]) -> Change:
    return edit("mp_rank_00_model_states.pt", change)


def shorter(states: dict[str, Any]) -> None:
    states["single_partition_of_fp32_groups"][0] = states["single_partition_of_fp32_groups"][0][:-1]


def swapped(one: str, two: str) -> Change:
    """The names of two files exchanged."""

    def run(folder: Path) -> None:
        (folder / one).rename(folder / "one")
        (folder / two).rename(folder / one)
        (folder / "one").rename(folder / two)

    return run


OPTIM, MODEL = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"
BAD: dict[str, tuple[Change, str]] = {
    "a missing rank": (lambda f: (f / OPTIM).unlink(), r"data-parallel ranks.*expected ranks 0 … 3, actual missing: 1.*Copy"),
    "no rank at all": (lambda f: (f / "mp_rank_00_model_states.pt").unlink(), "without their model states.*mp_rank_00_model_states.pt"),
    "two of one rank": (lambda f: shutil.copy(f / OPTIM, f / OPTIM[5:]), "two files are of one rank.*Remove the stale one"),
    "a rank too many": (lambda f: shutil.copy(f / OPTIM, f / OPTIM.replace("1_mp", "4_mp")), "too many: 4"),
    "another model-parallel rank": (
        lambda f: shutil.copy(f / OPTIM, f / OPTIM.replace("mp_rank_00", "mp_rank_01")),
        "model-parallel ranks.*too many: 1",
    ),
    "ranks' names swapped": (
        swapped(OPTIM, OPTIM.replace("1_mp", "2_mp")),
        r"another data-parallel rank.*rank_1_mp.*expected the part of rank 1 .*group 0, actual that of rank 2.*names that DeepSpeed gave",
    ),
    "a place that is none": (optimizer(2, lambda s: s.update(param_slice_mappings=[{"x": 3}])), "'param_slice_mappings'.*start and numel"),
    "states of two stages": (
        lambda f: shutil.copy(f / MODEL, f / f"zero_pp_rank_0_{MODEL}"),
        "model states of ZeRO-3 and of another stage",
    ),
    "sizes that are not there": (
        states(lambda s: s.update(checkpoint_parallel_dimensions={"tp_degree": 2, "pp_degree": 1})),
        "expected tp 2 × pp 1 model-parallel ranks, actual 1",
    ),
    "a part in the middle too short": (optimizer(1, shorter), r"partitions of parameter group 0.*on rank 0, \d+ on rank 1"),
    "a part at the end too short": (optimizer(3, shorter), "partitions of parameter group 0 do not hold its parameters"),
    "moments too short": (
        optimizer(1, lambda s: s["base_optimizer_state"]["state"][0].update(exp_avg=torch.zeros(3))),
        "partitions of exp_avg of parameter group 0.*actual.*3 on rank 1",
    ),
    "moments of one rank": (
        optimizer(2, lambda s: s["base_optimizer_state"]["state"][0].pop("exp_avg")),
        r"state of group 0.*expected \['exp_avg'",
    ),
    "other steps": (
        optimizer(2, lambda s: s["base_optimizer_state"]["state"][0].update(step=torch.tensor(4.0))),
        "'step'.*as in .*rank_0_mp",
    ),
    "another stage": (optimizer(2, lambda s: s.update(zero_stage=1)), r"not of one run.*expected stage 2.*actual stage 1"),
    "model states of another config": (
        states(lambda s: s["ds_config"]["zero_optimization"].update(overlap_comm=True)),
        r"different runs: ds_config\.zero_optimization\.overlap_comm differs.*rank_0_mp.*True, as in .*mp_rank_00_model.*actual None",
    ),
    "model states of another stage": (
        states(lambda s: s.update(ds_config={**s["ds_config"], "zero_optimization": {"stage": 1}, "odd": torch.zeros(1)})),
        "different runs: zero_stage differs.*rank_0_mp.*expected 1, as in .*mp_rank_00_model_states.pt, actual 2",
    ),
    "model states of more ranks": (
        states(lambda s: s.update(dp_world_size=8)),
        "different runs: partition_count differs.*expected 8, as in .*mp_rank_00_model_states.pt, actual 4",
    ),
    "an unknown stage": (optimizer(0, lambda s: s.update(zero_stage=4)), "'zero_stage'.*expected 1, 2 or 3, actual 4"),
    "other partitions": (optimizer(0, lambda s: s.update(partition_count=[2])), "ranks 0 … 1, actual too many: 2, 3"),
    "no partition count": (optimizer(0, lambda s: s.pop("partition_count")), "'partition_count'.*positive numbers"),
    "no masters": (optimizer(0, lambda s: s.pop("single_partition_of_fp32_groups")), "single_partition_of_fp32_groups.*a list.*nothing"),
    "no optimizer": (optimizer(0, lambda s: s.pop("base_optimizer_state")), "'base_optimizer_state'.*actual nothing"),
    "a step of many numbers": (
        optimizer(0, lambda s: s["base_optimizer_state"]["state"][0].update(step=torch.zeros(99))),
        "'step'|state of group 0",
    ),
    "another group": (states(lambda s: s["param_shapes"].append({"x": torch.Size([2])})), "number of parameter groups.*expected 2"),
    "another shape": (
        states(lambda s: s["param_shapes"][0].update({"model.norm.weight": torch.Size([13])})),
        "do not hold its parameters",
    ),
    "no shape": (states(lambda s: s["param_shapes"][0].update({"model.norm.weight": "12"})), "'param_shapes'.*expected shapes"),
    "no module": (states(lambda s: s.pop("module")), "'module'.*a dictionary of tensors, or None, actual nothing"),
    "experts elsewhere": (states(lambda s: s.update(ds_autoep_layers=[{}])), "AutoEP.*ds_to_universal"),
    "a version of the rows": (states(lambda s: s.update(checkpoint_version="new")), "'checkpoint_version'.*a number"),
    "other padding": (
        optimizer(0, lambda s: s.update(param_alignment_paddings=[[0]])),
        "other alignment paddings than parameters",
    ),
    "a stale marker": (lambda f: (f.parent / "latest").write_text("global_step9"), "latest.*global_step9.*global_step3"),
    "two steps": (
        lambda f: (shutil.copytree(f, f.parent / "global_step4"), (f.parent / "latest").unlink()),  # type: ignore[func-returns-value]
        "several steps lie here.*global_step3, global_step4.*latest",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_runs_are_refused(case, model, tmp_path):
    change, message = BAD[case]
    source = model.write(tmp_path / "run", dp=4)
    change(source / "global_step3")
    with pytest.raises((CheckpointError, UnsupportedError), match="(?s)" + message) as refused:
        sw.open(source)
    assert refused.value.exit_code == 3 and refused.value.file and refused.value.remedy


def test_shards_of_mics_are_fewer_than_the_ranks(model, tmp_path):
    source = model.write(tmp_path / "run", dp=4)
    states(lambda s: s.update(dp_world_size=8))(source / "global_step3")
    with pytest.raises(CheckpointError, match="partition_count"):
        sw.open(source)
    for rank in range(4):
        name = OPTIM.replace("rank_1", f"rank_{rank}")
        edit(name, lambda s: s["ds_config"]["zero_optimization"].update(mics_shard_size=4))(source / "global_step3")
    states(lambda s: s["ds_config"]["zero_optimization"].update(mics_shard_size=4))(source / "global_step3")
    assert sw.open(source).source.layout.tp == 1


def test_padding_that_is_not_padding_is_refused(model, tmp_path):
    for number, zero in enumerate([{"stage": "bf16"}, {"stage": 2}, {"stage": 1, "alignment": 8, "elastic": True}]):
        source = sw.open(model.write(tmp_path / f"run{number}", dp=12, blank=0.5, **zero))
        with pytest.raises(PaddingError, match=r"padding of a flat partition is not zero.*optim_states.pt") as refused:
            sw.convert(source, tmp_path / f"out{number}", to="deepspeed-universal")
        assert refused.value.exit_code == 4 and not (tmp_path / f"out{number}").exists()


@pytest.mark.parametrize("zero", [{"stage": 1}, {"stage": 2, "alignment": 8}, {"stage": 3}, {"stage": "bf16"}], ids=str)
def test_any_rank_is_loaded_from_flat_partitions(zero, model, tmp_path):
    """Runs of several ranks' files make up a tensor: the state dict is what convert writes."""
    source = sw.open(model.write(tmp_path / "run", dp=7, **zero))
    options = {"to": "ranks", "layout": sw.Layout(tp=2, pp=2), "dialect": "megatron", "pad_vocab_to": 2, "dtype": "bfloat16"}
    sw.convert(source, tmp_path / "out", **options)
    found = source.state_dicts(**options)
    for rank, path in enumerate(sorted((tmp_path / "out").glob("rank_*.safetensors"))):
        expected = load_torch(path)
        for held in (found[rank], source.state_dict(rank=rank, **options)):
            assert held.keys() == expected.keys()
            assert all(torch.equal(held[name], tensor) for name, tensor in expected.items())


def test_a_run_that_goes_on_keeps_its_norms_as_they_are(model, tmp_path):
    """Its args say how they are stored; a target of weights alone has them as the family does."""
    opened = sw.open(model.write(tmp_path / "run", low=torch.float32)).source
    source = sw.Checkpoint(dataclasses.replace(opened, norm_shift=1))
    norm = torch.from_numpy(model.masters["model.norm.weight"])
    for to, shift in (("deepspeed-universal", 0), ("huggingface", 1)):
        sw.convert(source, tmp_path / to, to=to)
        assert torch.equal(source.state_dict(to=to)["model.norm.weight"], (norm.double() + shift).float())
    assert np.array_equal(universal(tmp_path / "deepspeed-universal", "fp32")["model.norm.weight"], norm.numpy())
    assert torch.equal(load_torch(tmp_path / "huggingface" / "model.safetensors")["model.norm.weight"], (norm.double() + 1).float())


def test_padding_that_is_not_padding_is_refused_by_loads_too(model, tmp_path):
    source = sw.open(model.write(tmp_path / "run", dp=12, blank=0.5, stage="bf16"))
    with pytest.raises(PaddingError, match="padding of a flat partition is not zero"):
        source.state_dict(lazy=False)


def test_the_step_folder_is_found(model, tmp_path):
    source = model.write(tmp_path / "run")
    shutil.copytree(source / "global_step3", source / "global_step12")
    (source / "latest").write_text("global_step12\n")
    assert next(iter(sw.open(source).source.files)).startswith("global_step12/")
    (source / "latest").unlink()
    shutil.rmtree(source / "global_step3")
    assert next(iter(sw.open(source).source.files)).startswith("global_step12/")
    shutil.copy(source / "config.json", source / "global_step12")
    assert sw.open(source / "global_step12").source.training.tag == "global_step3"
    assert not json.loads(inspect_json(source))["dropped"]


def inspect_json(folder: Path) -> str:
    from click.testing import CliRunner

    from shardwright.cli import main

    result = CliRunner().invoke(main, ["inspect", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    return result.stdout


JUNK = [
    None, True, -1, 10**9, 1.5, "x", "a/b", b"z", [], {}, (), [1], {"x": 1}, torch.zeros(2), torch.zeros(()), torch.zeros(3, 2),
    torch.Size([4]), ["a"],
]  # fmt: skip


def spoil(value: Any, dice: random.Random, depth: int = 0) -> Any:
    """The value with something in it lost, renamed or replaced."""
    if depth and dice.random() < 0.3:
        return dice.choice(JUNK)
    if isinstance(value, dict) and value:
        key, fate = dice.choice(list(value)), dice.random()
        made = dict(value)
        if fate < 0.15:
            del made[key]
        elif fate < 0.25:
            made[dice.choice(["new", 7, "module.x"])] = made[key]
        else:
            made[key] = spoil(made[key], dice, depth + 1)
        return made
    if isinstance(value, list | tuple) and value and not isinstance(value, torch.Size):
        at = dice.randrange(len(value))
        return [spoil(item, dice, depth + 1) if i == at else item for i, item in enumerate(value)]
    return dice.choice(JUNK)


def test_whatever_the_trees_hold_is_planned_or_refused(model, tmp_path):
    sources = [model.write(tmp_path / f"run{stage}", stage=stage, dp=2, frozen=["model.norm.weight"]) for stage in (2, 3, "bf16")]
    sw.convert(sources[1], tmp_path / "universal", to="deepspeed-universal")
    refused: list[int] = []
    for seed in range(120):
        dice = random.Random(seed)
        source = dice.choice([*sources, tmp_path / "universal"])
        path = dice.choice(sorted(p for p in source.rglob("*.pt") if "exp_avg" not in p.name))
        before = path.read_bytes()
        with deepspeed_classes():
            torch.save(spoil(torch.load(path, weights_only=False), dice), path)
        try:
            for to in ("huggingface", "deepspeed-universal"):
                sw.plan(sw.open(source), to=to)
        except sw.ShardwrightError as error:
            refused.append(error.exit_code)
        path.write_bytes(before)
    assert 20 < len(refused) < 110 and set(refused) <= {2, 3}


BAD_UNIVERSAL: dict[str, tuple[Change, type[Exception], str]] = {
    "no model states": (
        lambda f: [p.unlink() for p in f.glob("*_model_states.pt")],
        CheckpointError,
        "without its model states.*mp_rank_00",
    ),
    "no common state": (lambda f: (f / "zero/optimizer_state.pt").unlink(), CheckpointError, "what its optimizers share"),
    "no common state in another's": (
        lambda f: [p.unlink() for p in (f / "zero/optimizer_state.pt", f.parent / "shardwright.json")],
        CheckpointError,
        "what its optimizers share",
    ),
    "a moment of one parameter": (
        lambda f: (f / "zero/model.norm.weight/exp_avg.pt").unlink(),
        CheckpointError,
        r"a part of the optimizer's state.*model.norm.weight.*expected exp_avg.pt, exp_avg_sq.pt, fp32.pt, actual exp_avg_sq.pt, fp32.pt",
    ),
    "no weights": (
        lambda f: (f / "zero/model.norm.weight/fp32.pt").unlink(),
        CheckpointError,
        "has no weights.*model.norm.weight.*fp32.pt",
    ),
    "no parameter": (
        lambda f: shutil.rmtree(f / "zero/model.norm.weight"),
        MissingTensorError,
        r"'model.norm.weight', file global_step3_universal/zero/model.norm.weight/fp32.pt.*not there. Copy the checkpoint again",
    ),
    "another length": (
        lambda f: torch.save(torch.zeros(7), f / "zero/lm_head.weight/fp32.pt"),
        CheckpointError,
        r"another number of elements.*\(13, 12\), actual \(7,\)",
    ),
    "no tensor": (
        lambda f: torch.save({"cat_dim": 0}, f / "zero/model.norm.weight/fp32.pt"),
        CheckpointError,
        "'param'.*a tensor.*nothing",
    ),
    "a parameter that no rule names": (
        lambda f: shutil.copytree(f / "zero/model.norm.weight", f / "zero/model.more.weight"),
        UnknownTensorError,
        "model.more.weight",
    ),
    "both kinds of checkpoint": (lambda f: torch.save({}, f / OPTIM), CheckpointError, "several formats.*deepspeed-universal"),
}


@pytest.mark.parametrize("case", BAD_UNIVERSAL)
def test_bad_universal_checkpoints_are_refused(case, model, tmp_path):
    change, kind, message = BAD_UNIVERSAL[case]
    sw.convert(model.write(tmp_path / "run"), tmp_path / "out", to="deepspeed-universal")
    change(tmp_path / "out" / "global_step3_universal")
    with pytest.raises(kind, match="(?s)" + message):
        sw.plan(sw.open(tmp_path / "out"), to="huggingface")


def test_what_the_user_said_of_the_model_is_looked_at_first(model, tmp_path):
    sw.convert(model.write(tmp_path / "run"), tmp_path / "out", to="deepspeed-universal")
    more = {**model.config, "attention_bias": True}
    with pytest.raises(MissingTensorError, match=r"q_proj\.bias.*Check --config: they may be another model's.*copy the checkpoint again"):
        sw.plan(sw.open(tmp_path / "out", config=more), to="huggingface")
    heads = model.config["hidden_size"] // model.config["num_attention_heads"]
    other = sw.open(tmp_path / "out", family="qwen3", config={**model.config, "head_dim": heads})
    with pytest.raises(MissingTensorError, match=r"q_norm\.weight.*Check --family and --config"):
        other["model.norm.weight"]
