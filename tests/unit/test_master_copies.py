"""A 16-bit module beside its float32 masters: what a run computed with must be what its optimizer goes on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import shardwright as sw
from shardwright.errors import ReplicaMismatchError
from shardwright.executors.rounding import Rounded
from shardwright.planner.codec import dumps, from_json
from tests.unit.test_deepspeed_zero import Model

MODEL_STATES = Path("global_step3", "mp_rank_00_model_states.pt")
LOW = [torch.bfloat16, torch.float16, torch.float32]
TARGETS = [
    ("huggingface", sw.Layout(), {}),
    ("ranks", sw.Layout(tp=2), {"dialect": "megatron"}),  # fused rows are put together first
    ("deepspeed-universal", sw.Layout(), {}),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    made = Model(tmp_path_factory.mktemp("model") / "llama")
    rng = np.random.default_rng(2)
    made.masters = {name: rng.standard_normal(array.shape, np.float32) for name, array in made.masters.items()}
    return made


def of_two_runs(model: Model, folder: Path, **zero: object) -> Path:
    """The optimizer's files of one run beside the module of another, in which one element differs."""
    source = model.write(folder / "run", **zero)
    name = "model.layers.1.self_attn.k_proj.weight"
    kept, model.masters = model.masters, {**model.masters, name: model.masters[name].copy()}
    model.masters[name][3, 5] += 0.25
    other = model.write(folder / "other", **zero)
    model.masters = kept
    shutil.copy(other / MODEL_STATES, source / MODEL_STATES)
    return source


@pytest.mark.parametrize("stage", [1, 2, "bf16"])
@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize(("to", "layout", "options"), TARGETS, ids=[name for name, _, _ in TARGETS])
def test_equal_modules_are_compared_and_others_refused(stage, low, to, layout, options, model, tmp_path):
    source = model.write(tmp_path / "good", stage=stage, low=low)
    job = sw.plan(source, tmp_path / "out", to=to, layout=layout, **options)
    assert {kind for program in job.plan.programs for kind in program.rounded} == ({str(low)[6:]} - {"float32"})
    pairs = zip(job.plan.programs, job.plan.bindings, strict=True)
    assert all(program.replicas or ":" in bound.names[0] for program, bound in pairs)
    assert job.cost.read_amplification == 1
    assert dumps(from_json(json.loads(dumps(job.plan)))) == dumps(job.plan)
    job.execute()
    assert sw.verify(tmp_path / "out", source).ok

    odd = of_two_runs(model, tmp_path, stage=stage, low=low)
    with pytest.raises(ReplicaMismatchError) as caught:
        sw.convert(odd, tmp_path / "bad", to=to, layout=layout, **options)
    error = caught.value
    assert "k_proj.weight" in (error.tensor or "") and str(MODEL_STATES) in (error.file or "") and "optim_states" in (error.file or "")
    assert "--trust-replicas" in (error.remedy or "") and not (tmp_path / "bad").exists()
    if low is not torch.float32:
        assert "weights are not the float32 ones rounded" in str(error) and "largest difference" in str(error)
    sw.convert(odd, tmp_path / "trusted", to=to, layout=layout, trust_replicas=True, **options)
    assert sw.verify(tmp_path / "trusted", odd).ok


def test_trusted_masters_are_the_ones_taken(model, tmp_path):
    odd = of_two_runs(model, tmp_path)
    sw.convert(odd, tmp_path / "out", to="huggingface", trust_replicas=True)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(np.array_equal(found[name], array) for name, array in model.masters.items())


def test_loads_compare_too(model, tmp_path):
    odd = sw.open(of_two_runs(model, tmp_path))
    with pytest.raises(ReplicaMismatchError, match="k_proj"):
        odd.state_dict(to="ranks", layout=sw.Layout(tp=2), rank=0, pad_vocab_to=14, lazy=False)
    assert odd.state_dict(to="ranks", layout=sw.Layout(tp=2), rank=0, pad_vocab_to=14, lazy=False, trust_replicas=True)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["bfloat16", "float16"]), st.sampled_from([1, 7, 70_000]))
def test_rounding_is_torchs(seed, kind, count):
    bits = np.random.default_rng(seed).integers(0, 1 << 32, count, dtype=np.uint64).astype(np.uint32)
    strip, room = bits.view(np.float32), bytearray(4 * count)
    wanted = torch.from_numpy(strip.copy()).to(getattr(torch, kind))
    rounded = Rounded("float32", kind, memoryview(strip.view(np.uint8)).cast("B"), memoryview(room))
    found = torch.frombuffer(bytearray(rounded.expected), dtype=wanted.dtype)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    rounded.copy[:] = rounded.expected
    assert rounded.first_difference() is None
    at = seed % count
    value = torch.frombuffer(bytearray(rounded.copy), dtype=wanted.dtype)[at]
    rounded.copy[2 * at + 1] ^= 0x40  # the exponent's highest bit
    if not value.isnan():
        assert (odd := rounded.first_difference()) is not None and odd.element == at
