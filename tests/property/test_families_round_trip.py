"""Any family, any two layouts that can hold it, any dialect and variant of names: bit for bit the same when it comes home."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shardwright as sw
from shardwright import Layout
from shardwright.planner.tables import DIALECTS, FAMILIES, specs_of
from tests.unit import reference as ref
from tests.unit.configs import CONFIGS, experts, holds

LAYERS = 4


@pytest.fixture(scope="module", autouse=True)
def no_sync() -> Iterator[None]:
    """These tests look at bytes, not at what survives a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's tiny checkpoint, made once."""
    folder = tmp_path_factory.mktemp("homes")

    @cache
    def home(family: str) -> Path:
        config = folder / f"{family}.json"
        config.write_text(json.dumps(CONFIGS[family]))
        return sw.synth(config, folder / family)

    return home


@st.composite
def layouts(draw: st.DrawFn, family: str, unequal: bool) -> Layout:
    tp, pp = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 3))
    vpp = draw(st.integers(1, 2)) if pp > 1 else 1
    edges = sorted(draw(st.lists(st.integers(0, LAYERS), min_size=pp * vpp - 1, max_size=pp * vpp - 1)))
    stages = tuple(b - a for a, b in zip([0, *edges], [*edges, LAYERS], strict=True))
    ep = draw(st.sampled_from([1, 2, 3, 4, 6])) if experts(family) else 1
    etp = draw(st.sampled_from([n for n in (1, 2, 4) if tp % n == 0])) if unequal and experts(family) else None
    return Layout(tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp, stages=stages)


@st.composite
def stops(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """A conversion that the family allows; what its table refuses is drawn again."""
    to, dialect = draw(st.sampled_from([("megatron-legacy", "megatron"), ("ranks", "megatron"), ("ranks", "huggingface")]))
    spec = draw(st.sampled_from(specs_of(DIALECTS.get(dialect), FAMILIES.get(family))))
    layout = draw(layouts(family, to == "ranks").filter(lambda layout: holds(family, dialect, spec, layout)))
    return {"to": to, "dialect": dialect, "spec": spec, "layout": layout, "pad_vocab_to": 4}


@st.composite
def journeys(draw: st.DrawFn) -> tuple[str, list[dict[str, Any]]]:
    family = draw(st.sampled_from(sorted(CONFIGS)))
    if not holds(family, "megatron"):
        one = draw(layouts(family, True))
        return family, [{"to": "ranks", "dialect": "huggingface", "layout": one, "pad_vocab_to": 4}]
    return family, draw(st.lists(stops(family), min_size=1, max_size=2))


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(journeys())
def test_every_journey_comes_home(homes: Callable[[str], Path], journey: tuple[str, list[dict[str, Any]]]) -> None:
    family, ways = journey
    home = homes(family)
    with tempfile.TemporaryDirectory() as folder:
        at = home
        for number, options in enumerate(ways):
            out = Path(folder) / f"stop{number}"
            sw.convert(at, out, **options)
            at = out
        assert sw.verify(at, home).ok
        sw.convert(at, Path(folder) / "back", to="huggingface")
        assert ref.differences({0: ref.read_huggingface(home)}, {0: ref.read_huggingface(Path(folder) / "back")}) == []
