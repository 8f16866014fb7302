"""Every family through every dialect, spelling and layout that can hold it, and home again: bit for bit the same.

The source is made by `synth` from the family's config in `configs`, so this says nothing about what real files look like: the
client tests do. Where plain numpy has the family's Megatron layout too, each rank is compared with that.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import shardwright as sw
from shardwright import Layout
from shardwright.errors import Refusal, UnsupportedError
from shardwright.planner.tables import DIALECTS, FAMILIES
from tests.unit import experts_reference as moe
from tests.unit import reference as ref
from tests.unit.configs import CONFIGS, experts, holds
from tests.unit.experts_reference import ExpertCut, Experts
from tests.unit.reference import Cut, Model

PAD = 4
"""Vocabularies are padded to a multiple of this, so that they divide by every tp here."""


class Way(NamedTuple):
    """A target: format, dialect, layout, variant of names."""

    family: str
    to: str
    dialect: str
    layout: Layout
    spec: str | None = None

    def __str__(self) -> str:
        axes = "-".join(f"{axis}{size}" for axis, size in self.layout.to_json().items() if size not in (None, 1))
        return f"{self.family}-{self.to}-{self.dialect}-{axes or 'one'}-{self.spec or 'usual'}"


def _ways() -> Iterator[Way]:
    for family in CONFIGS:
        layouts = [Layout(), Layout(tp=2), Layout(pp=2, vpp=2), Layout(tp=4, pp=2)]
        if experts(family):
            layouts = [Layout(), Layout(tp=2), Layout(tp=2, pp=2, vpp=2, ep=2), Layout(pp=2, ep=3)]
        found = [Way(family, "megatron-legacy", "megatron", layout) for layout in layouts]
        found += [Way(family, "ranks", dialect, layout) for dialect in ("megatron", "huggingface") for layout in layouts[2:]]
        found += [Way(family, "megatron-legacy", "megatron", layouts[-1], spec) for spec in DIALECTS.get("megatron").specs[1:]]
        if experts(family):
            found.append(Way(family, "ranks", "megatron", Layout(tp=4, ep=2, etp=1)))
        found += [Way(family, "huggingface", "huggingface", Layout(), spec) for spec in FAMILIES.get(family).spellings]
        yield from (way for way in found if holds(family, way.dialect, way.spec, way.layout))


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's tiny checkpoint, made once."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            (made[family] / "config.json").write_text(json.dumps(CONFIGS[family]))
            sw.synth(made[family] / "config.json", made[family] / "made")
        return made[family] / "made"

    return of


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests look at bytes, not at what survives a power cut."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def test_every_family_has_a_config() -> None:
    assert set(CONFIGS) == set(FAMILIES.names()), "a family's tiny config belongs into tests/unit/configs.py"
    assert all(experts(name) in (0, 12) for name in CONFIGS)
    for name, config in CONFIGS.items():
        family = FAMILIES.get(name)
        assert config["model_type"] in family.model_types
        assert config["architectures"] == [family.architecture]


@pytest.mark.parametrize("way", list(_ways()), ids=str)
def test_there_and_back(way: Way, source: Callable[[str], Path], tmp_path: Path) -> None:
    home, there = source(way.family), tmp_path / "there"
    options: dict[str, Any] = {"dialect": way.dialect, "spec": way.spec}
    if way.to != "huggingface":
        options["pad_vocab_to"] = PAD
    job = sw.convert(home, there, to=way.to, layout=way.layout, **options)
    assert job.plan.dropped == ()
    assert sw.verify(there, home).ok
    sw.convert(there, tmp_path / "back", to="huggingface")
    assert ref.differences({0: ref.read_huggingface(home)}, {0: ref.read_huggingface(tmp_path / "back")}) == []
    assert (tmp_path / "back" / "config.json").read_bytes() == (home / "config.json").read_bytes()


def test_what_a_dialect_cannot_hold_is_refused_with_the_reason(source: Callable[[str], Path]) -> None:
    for family in CONFIGS:
        assert holds(family, "huggingface"), family
        if not holds(family, "megatron"):
            with pytest.raises(UnsupportedError, match=rf"dialect 'megatron' cannot hold .*{family}.*: .{{20,}}"):
                sw.plan(source(family), to="megatron-legacy")


def _dense(config: dict[str, Any]) -> Model:
    biases = {"llama": {"qkv_bias": True, "out_bias": True, "mlp_bias": True}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}
    return Model(
        config["model_type"], layers=4, heads=8, kv=4, head_dim=8, hidden=64, ffn=64, tied=config["tie_word_embeddings"],
        **biases.get(config["model_type"], {}),
    )  # fmt: skip


def _sparse(config: dict[str, Any]) -> Experts:
    family, step = config["model_type"], config.get("decoder_sparse_step", 1)
    dense = {n for n in range(4) if n in config.get("mlp_only_layers", []) or (n + 1) % step}
    return Experts(
        family=family, layers=4, heads=8, kv=4, head_dim=8, hidden=64, ffn=64, experts=12, expert_ffn=64, dense=tuple(sorted(dense)),
        shared=config.get("shared_expert_intermediate_size", 0), qkv_bias=family == "qwen2_moe", qk_norm=family == "qwen3_moe",
    )  # fmt: skip


REFERENCES: dict[str, Callable[[dict[str, Any]], Model]] = {
    "llama": _dense, "mistral": _dense, "qwen2": _dense, "qwen3": _dense, "mixtral": _sparse, "qwen2_moe": _sparse, "qwen3_moe": _sparse,
}  # fmt: skip
"""Families whose Megatron layout `reference` or `experts_reference` can make of their files."""


@pytest.mark.parametrize("family", REFERENCES)
def test_ranks_are_what_plain_numpy_makes(family: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    home, model = source(family), REFERENCES[family](CONFIGS[family])
    weights = ref.read_huggingface(home)
    assert {name: array.shape for name, array in weights.items()} == model.shapes()
    layout = Layout(tp=2, pp=2, vpp=2, ep=3 if isinstance(model, Experts) else 1)
    sw.convert(home, tmp_path / "there", to="megatron-legacy", layout=layout, pad_vocab_to=PAD)
    if isinstance(model, Experts):
        cut = ExpertCut(2, 2, 2, None, 3)
        assert ref.differences(moe.megatron(weights, model, cut, "te", PAD), moe.read_megatron(tmp_path / "there", cut)) == []
    else:
        plain = Cut(2, 2, 2)
        assert ref.differences(ref.megatron(weights, model, plain, "te", PAD), ref.read_megatron(tmp_path / "there", plain)) == []


_ACTIVATION = "Megatron-LM has no argument for this activation; the plan says which to set"
NEEDS_CONFIG = dict.fromkeys(("gemma", "gemma2", "gemma3", "opt"), _ACTIVATION)
"""Families that Megatron's args alone do not tell, and why: opening them so is refused, with the advice to give a config.json."""


@pytest.mark.parametrize("family", [name for name in CONFIGS if holds(name, "megatron")])
def test_megatrons_args_alone_give_the_same_config(family: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    """Without what shardwright left beside the ranks: config.json → args → config.json says the same."""
    home, there = source(family), tmp_path / "there"
    sw.convert(home, there, to="megatron-legacy", layout=Layout(pp=2))
    (there / "shardwright.json").unlink()
    shutil.rmtree(there / "hf")
    config = None
    if family in NEEDS_CONFIG:
        with pytest.raises(Refusal, match=r"--config config\.json"):
            sw.open(there, family=family)
        config = home / "config.json"
    opened = sw.open(there, family=family, config=config)
    found, wanted = dict(opened.config.fields), dict(sw.open(home).config.fields)
    assert {name: found.get(name) for name in wanted} == wanted
    sw.convert(opened, tmp_path / "back", to="huggingface")
    assert sw.open(tmp_path / "back").config == sw.open(home).config
    assert ref.differences({0: ref.read_huggingface(home)}, {0: ref.read_huggingface(tmp_path / "back")}) == []
    raw, kept = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "back", home))
    assert {name: raw[name] for name in ("model_type", "architectures")} == {name: kept[name] for name in ("model_type", "architectures")}
