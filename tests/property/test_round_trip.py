"""Any small model, any layout, any dialect and container, to any other and back: bit for bit the same.

Each example writes a random checkpoint, converts it to a random layout, converts that to another one, checks both against
the numpy reference where the dialect is one of those it knows, and returns to Hugging Face.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from math import gcd, lcm
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shardwright as sw
from tests.unit import reference as ref
from tests.unit.reference import Cut, Model


@pytest.fixture(scope="module", autouse=True)
def no_sync() -> Iterator[None]:
    """These tests look at bytes, not at what survives a power cut: waiting for the disk is most of their time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@st.composite
def models(draw: st.DrawFn) -> Model:
    heads = draw(st.sampled_from([1, 2, 4, 6, 8, 12]))
    kv = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    head_dim = draw(st.sampled_from([1, 2, 3, 4, 12]))
    family = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    bias = family == "llama" and draw(st.booleans())
    return Model(
        family=family,
        layers=draw(st.integers(1, 6)),
        heads=heads,
        kv=kv,
        head_dim=head_dim,
        hidden=draw(st.sampled_from([heads * head_dim, 8, 30])),
        ffn=draw(st.sampled_from([12, 24, heads * head_dim * 12])),
        vocab=draw(st.integers(1, 40)),
        tied=draw(st.booleans()),
        qkv_bias=bias or family == "qwen2",
        out_bias=bias,
        mlp_bias=bias,
        qk_norm=family == "qwen3",
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
    )


@st.composite
def cuts(draw: st.DrawFn, model: Model) -> Cut:
    """A layout that fits the model."""
    fused = (model.heads + 2 * model.kv) * model.head_dim

    def fits(tp: int) -> bool:
        return not (model.heads % tp or model.ffn % tp or fused % tp) and (model.kv % tp == 0 or tp % model.kv == 0)

    tp = draw(st.sampled_from([n for n in range(1, 13) if fits(n)]))
    pp = draw(st.integers(1, 3))
    vpp = draw(st.integers(1, 2)) if pp > 1 else 1
    chunks = pp * vpp
    if model.layers % chunks == 0 and draw(st.booleans()):
        return Cut(tp, pp, vpp)
    edges = sorted(draw(st.lists(st.integers(0, model.layers), min_size=chunks - 1, max_size=chunks - 1)))
    return Cut(tp, pp, vpp, tuple(b - a for a, b in zip([0, *edges], [*edges, model.layers], strict=True)))


@st.composite
def targets(draw: st.DrawFn, model: Model) -> tuple[Cut, dict[str, object]]:
    """A layout and the options of a conversion to it."""
    cut = draw(cuts(model))
    to, dialect, container = draw(
        st.sampled_from(
            [
                ("megatron-legacy", None, None),
                ("megatron-legacy", None, None),
                ("ranks", "megatron", "safetensors"),
                ("ranks", "huggingface", "safetensors"),
                ("ranks", "huggingface", "safetensors"),
                ("ranks", "megatron", "zarr"),
                ("ranks", "huggingface", "zarr"),
            ]
        )
    )
    options: dict[str, object] = {"to": to, "dialect": dialect, "container": container}
    if dialect != "huggingface":
        options["spec"] = draw(st.sampled_from(["te", "local"]))
    options["pad_vocab_to"] = cut.tp * draw(st.integers(1, 3))
    return cut, {name: value for name, value in options.items() if value is not None}


@st.composite
def journeys(draw: st.DrawFn) -> tuple[Model, list[tuple[Cut, dict[str, object]]], int]:
    model = draw(models())
    return model, [draw(targets(model)) for _ in range(2)], draw(st.integers(1, 3))


def compared(root: Path, model: Model, weights: ref.Arrays, cut: Cut, options: dict[str, object]) -> list[str]:
    """What differs from the reference; zarr groups are left to the way back."""
    multiple = int(str(options["pad_vocab_to"]))
    if options.get("container") == "zarr":
        return []
    if options.get("dialect") == "huggingface":
        return ref.differences(ref.huggingface_ranks(weights, model, cut, multiple), ref.read_ranks(root, cut))
    expected = ref.megatron(weights, model, cut, str(options["spec"]), multiple)
    if options["to"] == "megatron-legacy":
        return ref.differences(expected, ref.read_megatron(root, cut))
    return ref.differences(ref.by_rank(expected, cut), ref.read_ranks(root, cut))


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(journeys())
def test_every_journey_comes_home(journey):
    model, stops, shards = journey
    weights = model.weights()
    with tempfile.TemporaryDirectory() as folder:
        at = home = ref.write(Path(folder) / "home", model, weights, min(shards, len(weights)))
        for number, (cut, options) in enumerate(stops):
            out = Path(folder) / f"stop{number}"
            layout = sw.Layout(tp=cut.tp, pp=cut.pp, vpp=cut.vpp, stages=cut.stages)
            sw.convert(at, out, layout=layout, workers=1 + number, **options)
            assert compared(out, model, weights, cut, options) == []
            at = out
        assert sw.verify(at, home).ok
        sw.convert(at, Path(folder) / "back", to="huggingface")
        assert ref.differences({0: weights}, {0: ref.read_huggingface(Path(folder) / "back")}) == []


def test_the_journeys_are_many_sided():
    """The strategy reaches what it is meant to reach (a guard against a filter that quietly empties it)."""
    seen: set[str] = set()

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(journeys())
    def look(journey):
        model, stops, _ = journey
        for cut, options in stops:
            seen.update(f"{k}={v}" for k, v in options.items() if k != "pad_vocab_to")
            seen.add(f"ranks>=10:{cut.tp * cut.pp >= 10}")
            seen.add(f"kv<tp:{model.kv < cut.tp and gcd(model.kv, cut.tp) > 1}")
            seen.add(f"uneven:{cut.stages is not None}")
            seen.add(f"vpp={cut.vpp}")
            seen.add(f"pads:{model.vocab % lcm(cut.tp, 2) > 0}")
            seen.add(f"tied copy:{model.tied and cut.pp > 1}")

    look()
    for wanted in (
        "ranks>=10:True",
        "kv<tp:True",
        "uneven:True",
        "vpp=2",
        "container=zarr",
        "to=megatron-legacy",
        "spec=local",
        "tied copy:True",
    ):
        assert wanted in seen
