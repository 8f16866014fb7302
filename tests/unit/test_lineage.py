"""The graph of a plan: what is connected, with which attributes, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest

from shardwright.errors import UsageError
from shardwright.planner import lineage as module
from shardwright.planner.formats import open_source
from shardwright.planner.formats.base import Hints
from shardwright.planner.layout import Layout
from shardwright.planner.lineage import lineage
from shardwright.planner.passes.build import build
from shardwright.planner.plan import Plan
from shardwright.planner.request import Request
from shardwright.planner.store import LocalStore
from tests.unit.tiny import tiny_llama

QKV = "decoder.layers.0.self_attention.linear_qkv.weight"


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    source = open_source(LocalStore(tiny_llama(tmp_path_factory.mktemp("s"))), Hints())
    return build(source, Request("megatron-legacy", Layout(tp=2, pp=2)))


def test_every_tensor_is_there_once(plan: Plan) -> None:
    graph = lineage(plan)
    kinds: dict[str, list[str]] = {}
    for _, attributes in graph.nodes(data=True):
        kinds.setdefault(attributes["kind"], []).append(attributes["name"])
    assert sorted(kinds["source"]) == sorted(t.name for t in plan.source_tensors)
    assert sorted(kinds["target"]) == sorted(t.name for t in plan.target_tensors)
    assert sorted(kinds["hub"]) == sorted(n for b in plan.bindings for n in b.names)
    assert sorted(kinds["rank"]) == ["rank 0", "rank 1", "rank 2", "rank 3"]
    assert nx.is_directed_acyclic_graph(graph)
    assert set(kinds) == {"source file", "source", "hub", "target", "target file", "rank"}


def test_path_from_file_to_rank(plan: Plan) -> None:
    graph = lineage(plan)
    source = next(n for n in graph if n[0] == "source" and n[-1] == "model.layers.0.self_attn.q_proj.weight")
    ranks = {n[1] for n in nx.descendants(graph, source) if n[0] == "rank"}
    assert ranks == {0, 1}
    target = next(n for n in graph if n[0] == "target" and n[-1].endswith(QKV))
    above = {n[-1] for n in nx.ancestors(graph, target) if n[0] == "source"}
    assert above == {f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"}
    assert graph.nodes[target] == {
        "kind": "target",
        "name": target[-1],
        "dtype": "float32",
        "shape": (64, 64),
        "bytes": 16384,
        "rank": target_rank(plan, target),
    }


def target_rank(plan: Plan, node: tuple[str, str, str]) -> int:
    return next(t.rank for t in plan.target_tensors if t.name == node[2] and plan.target_files[t.file].path == node[1])


# Megatron numbers layers within a stage: layer 0 of the second stage is the model's layer 2.
@pytest.mark.parametrize(("pattern", "layers"), [("model.layers.0.self_attn.q_proj.weight", [0]), (f"*{QKV}", [0, 2])])
def test_pattern(plan: Plan, pattern: str, layers: list[int]) -> None:
    graph = lineage(plan, pattern)
    assert {n[-1] for n in graph if n[0] == "source"} == {f"model.layers.{k}.self_attn.{x}_proj.weight" for x in "qkv" for k in layers}
    assert len([n for n in graph if n[0] == "hub"]) == len(layers)


def test_refusals(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="matches the pattern"):
        lineage(plan, "nothing*")
    monkeypatch.setattr(module, "MOST_TENSORS", 20)
    with pytest.raises(UsageError, match=r"too large.*pattern such as"):
        lineage(plan)
    assert lineage(plan, "model.norm.weight")
    with pytest.raises(UsageError, match="Narrow the pattern"):
        lineage(plan, "*")


def test_replicas_and_ops_are_marked(plan: Plan, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "s", layers=2)
    graph = lineage(build(open_source(LocalStore(folder), Hints()), Request("huggingface", quantize="int8")), "*q_proj*")
    roles = {(a["role"], a.get("output")) for _, to, a in graph.edges(data=True) if to[0] == "target"}
    assert roles == {("int8", 0), ("int8", 1)}


def test_networkx_is_imported_here_alone() -> None:
    modules = ("codec", "explain", "report", "relations")
    code = "import sys; " + "; ".join(f"import shardwright.planner.{m}" for m in modules) + "; assert 'networkx' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
