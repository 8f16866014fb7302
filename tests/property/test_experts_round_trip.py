"""Any small model with experts, any layout, any dialect, to any other and back: bit for bit the same."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shardwright as sw
from tests.unit import experts_reference as moe
from tests.unit import reference as ref
from tests.unit.experts_reference import ExpertCut, Experts


@pytest.fixture(scope="module", autouse=True)
def no_sync() -> Iterator[None]:
    """These tests look at bytes, not at what survives a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@st.composite
def models(draw: st.DrawFn) -> Experts:
    family = draw(st.sampled_from(["mixtral", "qwen2_moe", "qwen3_moe"]))
    layers = draw(st.integers(1, 4))
    return Experts(
        family=family,
        layers=layers,
        heads=4,
        kv=draw(st.sampled_from([1, 2, 4])),
        hidden=8,
        ffn=8,
        vocab=draw(st.integers(1, 20)),
        experts=draw(st.sampled_from([2, 3, 6, 12])),
        expert_ffn=draw(st.sampled_from([4, 12])),
        shared=draw(st.sampled_from([4, 20])) if family == "qwen2_moe" else 0,
        dense=() if family == "mixtral" else tuple(n for n in range(layers) if draw(st.booleans())),
        tied=draw(st.booleans()),
        qkv_bias=family == "qwen2_moe",
        qk_norm=family == "qwen3_moe",
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
    )


@st.composite
def cuts(draw: st.DrawFn, model: Experts, unequal: bool) -> ExpertCut:
    tp = draw(st.sampled_from([1, 2, 4]))
    ep = draw(st.sampled_from([n for n in range(1, model.experts + 1) if model.experts % n == 0 and n < 7]))
    pp = draw(st.integers(1, 3))
    vpp = draw(st.integers(1, 2)) if pp > 1 else 1
    edges = sorted(draw(st.lists(st.integers(0, model.layers), min_size=pp * vpp - 1, max_size=pp * vpp - 1)))
    stages = tuple(b - a for a, b in zip([0, *edges], [*edges, model.layers], strict=True))
    etp = draw(st.sampled_from([n for n in (1, 2, 4) if tp % n == 0])) if unequal else None
    return ExpertCut(tp, pp, vpp, stages, ep, etp)


@st.composite
def stops(draw: st.DrawFn, model: Experts) -> tuple[ExpertCut, dict[str, str | int]]:
    """A layout and a conversion to it."""
    to, dialect, specs = draw(
        st.sampled_from(
            [
                ("megatron-legacy", "megatron", ("te", "te-sequential", "local")),
                ("ranks", "megatron", ("te", "te-sequential", "local")),
                ("ranks", "huggingface", ("per-expert", "stacked")),
            ]
        )
    )
    cut = draw(cuts(model, to == "ranks"))
    return cut, {"to": to, "dialect": dialect, "spec": draw(st.sampled_from(specs)), "pad_vocab_to": 4}


@st.composite
def journeys(draw: st.DrawFn) -> tuple[Experts, list[tuple[ExpertCut, dict[str, str | int]]]]:
    model = draw(models())
    return model, [draw(stops(model)) for _ in range(2)]


def compared(root: Path, model: Experts, cut: ExpertCut, options: dict[str, str | int]) -> list[str]:
    spec = str(options["spec"])
    if options["dialect"] == "huggingface":
        return ref.differences(moe.huggingface(model.weights(), model, cut, spec, 4), moe.read_ranks(root, cut))
    expected = moe.megatron(model.weights(), model, cut, spec, 4)
    if options["to"] == "megatron-legacy":
        return ref.differences(expected, moe.read_megatron(root, cut))
    held = {rank: arrays for rank, arrays in expected.items() if arrays}
    return ref.differences(held, moe.read_ranks(root, cut, chunked=True))


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(journeys())
def test_every_journey_comes_home(journey):
    model, ways = journey
    with tempfile.TemporaryDirectory() as folder:
        at = home = ref.write(Path(folder) / "home", model, model.weights(), 1)
        for number, (cut, options) in enumerate(ways):
            out = Path(folder) / f"stop{number}"
            layout = sw.Layout(tp=cut.tp, pp=cut.pp, vpp=cut.vpp, ep=cut.ep, etp=cut.etp, stages=cut.stages)
            sw.convert(at, out, layout=layout, **options)
            assert compared(out, model, cut, options) == []
            at = out
        assert sw.verify(at, home).ok
        sw.convert(at, Path(folder) / "back", to="huggingface")
        assert ref.differences({0: model.weights()}, {0: ref.read_huggingface(Path(folder) / "back")}) == []
