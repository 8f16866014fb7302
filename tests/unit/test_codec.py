"""A saved plan is the plan; a saved plan that was changed is refused by name."""

from __future__ import annotations

import base64
import copy
import json
import random
import zlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardwright.conversion import Conversion
from shardwright.errors import PlanError, UsageError
from shardwright.executors.execute import execute
from shardwright.planner import _saved, codec
from shardwright.planner.formats import open_source
from shardwright.planner.formats.base import Hints
from shardwright.planner.layout import Layout
from shardwright.planner.passes.build import build
from shardwright.planner.plan import Plan
from shardwright.planner.request import Request
from shardwright.planner.store import LocalStore
from tests.unit.tiny import tiny_llama

REQUESTS = {
    "legacy": Request("megatron-legacy", Layout(tp=2, pp=2)),
    "legacy-vpp": Request("megatron-legacy", Layout(tp=4, pp=2, vpp=2)),
    "one": Request("huggingface", max_shard_size=100_000),
    "cast": Request("huggingface", dtype="bfloat16"),
    "int8": Request("huggingface", quantize="int8"),
    "ranks": Request("ranks", Layout(tp=2, pp=2, stages=(1, 3)), pad_vocab_to=2),
    "zarr": Request("ranks", Layout(tp=4), container="zarr", dialect="megatron", drop=("nothing.*",)),
}


def same(a: Any, b: Any) -> bool:
    """Equal field by field, of equal types; columns by value."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def plans(folder: Path) -> dict[str, Plan]:
    source = open_source(LocalStore(folder), Hints())
    return {name: build(source, request) for name, request in REQUESTS.items()}


@pytest.fixture(scope="module")
def saved(plans: dict[str, Plan]) -> dict[str, Any]:
    """One plan as JSON text would give it back."""
    found: dict[str, Any] = json.loads(json.dumps(codec.to_json(plans["legacy"], target_root="/somewhere/out")))
    return found


@pytest.mark.parametrize("name", REQUESTS)
def test_identity(plans: dict[str, Plan], name: str) -> None:
    made = codec.to_json(plans[name], target_root=None)
    assert same(codec.from_json(made), plans[name])
    assert same(codec.from_json(json.loads(json.dumps(made, allow_nan=False))), plans[name])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    model=st.fixed_dictionaries(
        {
            "layers": st.integers(1, 3),
            "kv": st.sampled_from([1, 2, 4, 8]),
            "vocab": st.integers(1, 70),
            "shards": st.integers(1, 3),
            "dtype": st.sampled_from(["float32", "bfloat16"]),
            "tie_word_embeddings": st.booleans(),
        }
    ),
    tp=st.sampled_from([1, 2, 4]),
    dtype=st.sampled_from([None, "float16"]),
    tile=st.sampled_from([999, 1 << 27]),
)
def test_identity_of_many(tmp_path_factory: pytest.TempPathFactory, model: dict[str, Any], tp: int, dtype: str | None, tile: int) -> None:
    root = tiny_llama(tmp_path_factory.mktemp("s"), **model)
    plan = build(open_source(LocalStore(root), Hints()), Request("ranks", Layout(tp=tp), pad_vocab_to=tp, dtype=dtype), tile_bytes=tile)
    assert same(codec.from_json(json.loads(json.dumps(codec.to_json(plan, target_root=None)))), plan)


def test_back_again(folder: Path, plans: dict[str, Plan], tmp_path: Path) -> None:
    """A plan whose source has replicas, padding and several ranks."""
    execute(plans["legacy"], tmp_path / "out", memory=1 << 30)
    back = build(open_source(LocalStore(tmp_path / "out"), Hints()), Request("huggingface"))
    assert any(p.replicas for p in back.programs) and any(p.padding for p in back.programs)
    assert same(codec.from_json(json.loads(json.dumps(codec.to_json(back, target_root=None)))), back)


def test_file(plans: dict[str, Plan], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    codec.save(plans["int8"], file, target_root="some/out")
    found = codec.load(file)
    assert same(found.plan, plans["int8"]) and found.target_root == str(Path("some/out").absolute())
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    with pytest.raises(UsageError, match="cannot be written"):
        Conversion(plans["int8"]).save(tmp_path / "absent" / "plan.json")


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[1]", b"[" * 100_000, b'{"plan_format": NaN}', b'{"a": 1, "a": 2}', b"1" * 5000])
def test_no_plan(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(data)
    with pytest.raises(PlanError):
        codec.load(file)
    with pytest.raises(PlanError, match="cannot be read"):
        codec.load(tmp_path / "absent")


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(made: dict[str, Any]) -> None:
        for key in path[:-1]:
            made = made[key]
        made[path[-1]] = to

    return change


def _bomb(made: dict[str, Any]) -> None:
    made["target_files"]["static"]["data"] = {"zlib": base64.b64encode(zlib.compress(bytes(50_000_000))).decode()}


CHANGES: list[tuple[str, Callable[[dict[str, Any]], None]]] = [
    ("plan_format", _set("plan_format", to=1)),
    ("plan_format", _set("plan_format", to=3)),
    ("plan_format", _set("plan_format", to=True)),
    ("plan_hash", _set("plan_hash", to="0" * 64)),
    ("plan_hash", _set("source_files", "mtime_ns", 0, to=12345)),
    ("top", _set("more", to=1)),
    ("recipe", _set("recipe", to=[])),
    ("recipe.tp", _set("recipe", "layout", "tp", to=0)),
    ("recipe.dtype", _set("recipe", "dtype", to=5)),
    ("recipe", _set("recipe", "config", "x", to=float("inf"))),
    ("source_root", _set("source_root", to="relative")),
    ("target_root", _set("target_root", to="relative/out")),
    ("source_files.path", _set("source_files", "path", 0, to="../secret")),
    ("target_files.path", _set("target_files", "path", 0, to="/etc/passwd")),
    ("target_files.path", _set("target_files", "path", 0, to="a/../../b")),
    ("target_files.path", _set("target_files", "path", 0, to="release")),
    ("copies", _set("copies", to=[["a", "../b"]])),
    ("target_files.nbytes", _set("target_files", "nbytes", 0, to=-1)),
    ("target_files.nbytes", _set("target_files", "nbytes", 0, to=10**40)),
    ("target_files.static", _set("target_files", "static", "offset", to=[0])),
    ("target_files.static.data", _bomb),
    ("target_files.crcs", _set("target_files", "crcs", "patch", 0, to=5700)),
    ("source_root", lambda made: made.pop("source_root")),
    ("names", _set("names", 0, to=7)),
    ("names", _set("names", 0, to="\ud800")),
    ("kinds", _set("kinds", 0, to=["float33", [1]])),
    ("kinds", _set("kinds", 0, to=["float32", [2**59, 2**59]])),
    ("programs", _set("programs", 0, "dtype", to="float4_e2m1fn")),
    ("programs", _set("programs", 0, "gather", to=[[0, 0, 0, 5]])),
    ("programs", _set("programs", 0, "gather", 0, 0, to=9)),
    ("programs", _set("programs", 0, "gather", 0, 0, to=-1)),
    ("programs", _set("programs", 0, "gather", 0, 2, to=2**50)),
    ("programs", _set("programs", 0, "gather", 0, to=[0, 0, 0, 8384, 0, 1])),
    ("programs", _set("programs", 0, "op", to={"name": "x", "kernel": "shardwright.cli:main", "block": [1, 1], "scratch": 0})),
    ("programs", _set("programs", 0, "cut", to=[3])),
    ("programs", _set("programs", 0, "outputs", 0, "ratio", to=[0, 1])),
    ("programs", _set("programs", 0, "outputs", 0, "shape", to=[131, 65])),
    ("programs", _set("programs", to={})),
    ("bindings", _set("bindings", 0, "source_file", 0, to=[99])),
    ("bindings", _set("bindings", 0, "names", to=[-1])),
    ("bindings", _set("bindings", to=[])),
    ("tiles.first", _set("tiles", "first", to=[0])),
    ("tiles.row", _set("tiles", "row", 0, to=1)),
    ("tiles.hi0", _set("tiles", "hi0", to=[1])),
    ("tiles.lo", _set("tiles", "hi0", 0, to=500)),
    ("tiles.requests", _set("tiles", "requests", 0, to=1.5)),
    ("source_tensors.file", _set("source_tensors", "file", to={"delta": [0, 10**30]})),
    ("target_tensors", _set("target_tensors", "offset", 0, to=2**59)),
    ("warnings", _set("warnings", to=[None])),
    ("copied_bytes", _set("copied_bytes", to="216")),
]


@pytest.mark.parametrize(("field", "change"), CHANGES, ids=lambda v: v if isinstance(v, str) else "")
def test_refused_by_name(saved: dict[str, Any], field: str, change: Callable[[dict[str, Any]], None]) -> None:
    made = _plain_columns(copy.deepcopy(saved))
    codec.from_json(made)
    change(made)
    with pytest.raises(PlanError) as caught:
        codec.from_json(made)
    assert field.split(".")[0] in str(caught.value)


def _plain_columns(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"delta"}:
        return np.cumsum(value["delta"]).tolist()
    if isinstance(value, dict):
        return {k: _plain_columns(v) for k, v in value.items()}
    return [_plain_columns(v) for v in value] if isinstance(value, list) else value


def test_ragged_piece_is_refused(saved: dict[str, Any]) -> None:
    """A piece of a few bytes whose alignment would unroll to billions of boxes."""
    made = copy.deepcopy(saved)
    program = next(p for p in made["programs"] if p["label"] == "model.norm.weight")
    wide = 1 << 25
    program["shape"], program["outputs"][0]["shape"], program["outputs"][0]["ratio"] = [wide, wide + 1], [wide, wide + 1], [1, 1]
    program["gather"] = [[0, 0, 0, 1 << 24, wide + 2, 0]]
    with pytest.raises(PlanError, match="ragged"):
        codec.from_json(made)


HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 2, 7, 63, 64, 2**31, 2**59, 2**63, 10**30, 1.5, "", "x", "..", "\ud800", [], [0], [-1], [[]], {}, {"delta": [1]},
    {"delta": [2**59, 1]},
]  # fmt: skip

ROUNDS = 400


def _spots(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    found: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        item = pending.pop()
        inner = list(item.items()) if isinstance(item, dict) else list(enumerate(item))
        found += [(item, key) for key, _ in inner]
        pending += [v for _, v in inner if isinstance(v, dict | list)]
    return found


@pytest.mark.parametrize("name", ["legacy", "int8", "zarr"])
def test_only_plan_errors(plans: dict[str, Plan], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any value anywhere: read as it is, or refused with a PlanError, also where the hash does not stand in the way."""
    made = codec.to_json(plans[name], target_root="/out")
    monkeypatch.setattr(_saved, "plan_hash", lambda plan: made["plan_hash"])
    rng = random.Random(name)
    text = json.dumps(made)
    refused = 0
    for _ in range(ROUNDS):
        changed = json.loads(text)
        # Some fields are long and some short: choose a field first, so that all are tried.
        field = rng.choice(list(changed))
        spots = _spots(changed[field] if isinstance(changed[field], dict | list) else changed)
        for _ in range(rng.choice([1, 1, 3])):
            place, key = rng.choice(spots or [(changed, field)])
            if key not in (place if isinstance(place, dict) else range(len(place))):
                continue  # an earlier change took it away
            if rng.random() < 0.1:
                del place[key]
            elif type(place[key]) is int and rng.random() < 0.6:
                place[key] += rng.choice([-1, 1, 64, -64, 4096])
            else:
                place[key] = rng.choice(HOSTILE)
        try:
            codec.from_json(changed)
        except PlanError:
            refused += 1
    assert refused > 100, "the changes should do harm"
