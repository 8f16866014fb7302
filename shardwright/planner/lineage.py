"""A plan as a graph of tensors: source file → stored → hub → stored → target file → rank.

1. Choose the pivot tensors: all of them, or those that touch a name matching the pattern on any side.
2. For each, one ``hub`` node, an edge from every source tensor that it is gathered from or compared with, and an edge to
   every target tensor that it is scattered to; tensors hang on their files, target files on their ranks.

Nodes are tensors, files and ranks, never pieces: ``("source file", path)``, ``("source", path, name)``, ``("hub", name)``,
``("target", path, name)``, ``("target file", path)``, ``("rank", number)``. Hub tensors that move as one are one node, their
names joined with ``+``. Boundary: the only module that imports networkx.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING, Any

import networkx as nx

from ..errors import UsageError
from .plan import Plan, Program, TensorEntry
from .relations import Places
from .tensor.dtypes import dtype as dtype_of

if TYPE_CHECKING:
    Graph = nx.MultiDiGraph[Any]

__all__ = ["MOST_TENSORS", "lineage"]

MOST_TENSORS = 50_000
"""Graphs with more tensors than this help nobody and take gigabytes."""


def lineage(plan: Plan, pattern: str | None = None) -> Graph:
    """The graph of the plan, or of what a pattern touches.

    Parameters
    ----------
    pattern
        Shell pattern (``model.layers.0.*``) over target, hub and source names; everything connected to a match through
        one hub tensor comes along.

    Raises
    ------
    UsageError
        More than 50,000 tensors, or no match.
    """
    if pattern is None and _count(plan) > MOST_TENSORS:
        raise UsageError(
            "the whole lineage is too large", expected=f"at most {MOST_TENSORS:,} tensors", actual=f"{_count(plan):,}",
            remedy="Pass a pattern such as 'model.layers.0.*'",
        )  # fmt: skip
    graph: Graph = nx.MultiDiGraph()
    places = Places.of(plan)
    names = _Names(places, pattern)
    for number, row in names.rows():
        _add(graph, places, number, row)
        if graph.number_of_nodes() > 2 * MOST_TENSORS:
            raise UsageError("the pattern touches too many tensors", expected=f"at most {MOST_TENSORS:,}", remedy="Narrow the pattern")
    if pattern is not None and not graph:
        raise UsageError("no tensor of the plan matches the pattern", actual=pattern)
    return graph


def _count(plan: Plan) -> int:
    return len(plan.source_tensors) + len(plan.target_tensors) + sum(len(b.names) for b in plan.bindings)


class _Names:
    """Which binding rows a pattern touches; each distinct name is matched once."""

    def __init__(self, places: Places, pattern: str | None) -> None:
        self.places, self.pattern = places, pattern
        self.known: dict[str, bool] = {}

    def rows(self) -> Iterator[tuple[int, int]]:
        for number, (program, bound) in enumerate(zip(self.places.plan.programs, self.places.plan.bindings, strict=True)):
            for row, hub in enumerate(bound.names):
                if self.pattern is None or self._touches(program, number, row, hub):
                    yield number, row

    def _touches(self, program: Program, number: int, row: int, hub: str) -> bool:
        plan = self.places.plan
        return (
            any(map(self._match, hub.split("+")))
            or any(self._match(plan.source_tensors[i].name) for i, _ in _sources(self.places, program, number, row))
            or any(self._match(plan.target_tensors[i].name) for i, _ in _targets(self.places, program, number, row))
        )

    def _match(self, name: str) -> bool:
        if name not in self.known:
            self.known[name] = self.pattern is not None and fnmatchcase(name, self.pattern)
        return self.known[name]


def _sources(places: Places, program: Program, number: int, row: int) -> Iterator[tuple[int, str]]:
    """(source tensor, ``"gather" | "replica" | "padding"``) of one pivot tensor."""
    gathered = {p.slot for p in program.gather}
    compared = {p.slot for r in program.replicas for p in r} - gathered
    padding = {p.slot for p in program.padding} - gathered - compared
    for role, slots in (("gather", gathered), ("replica", compared), ("padding", padding)):
        for operand in sorted(slots):
            found = places.source(number, row, operand)
            if found is not None:
                yield found, role


def _targets(places: Places, program: Program, number: int, row: int) -> Iterator[tuple[int, int]]:
    """(target tensor, output) of one pivot tensor."""
    for k, output in enumerate(program.outputs):
        for operand in sorted({p.slot for p in (*output.scatter, *output.zeros)}):
            found = places.target(number, row, operand)
            if found is not None:
                yield found, k


def _add(graph: Graph, places: Places, number: int, row: int) -> None:
    plan, program = places.plan, places.plan.programs[number]
    hub = ("hub", plan.bindings[number].names[row])
    graph.add_node(hub, kind="hub", name=hub[1], dtype=program.dtype, shape=program.shape, bytes=program.nbytes, rank=None)
    for i, role in _sources(places, program, number, row):
        tensor = plan.source_tensors[i]
        file = plan.source_files[tensor.file]
        node = ("source", file.path, tensor.name)
        if node not in graph:
            graph.add_node(node, **_attributes("source", tensor))
            graph.add_node(
                ("source file", file.path), kind="source file", name=file.path, dtype=None, shape=None, bytes=file.nbytes, rank=None
            )
            graph.add_edge(("source file", file.path), node, role="holds")
        graph.add_edge(node, hub, role=role)
    for i, k in _targets(places, program, number, row):
        tensor = plan.target_tensors[i]
        to = plan.target_files[tensor.file]
        node = ("target", to.path, tensor.name)
        if node not in graph:
            graph.add_node(node, **_attributes("target", tensor))
            graph.add_node(
                ("target file", to.path), kind="target file", name=to.path, dtype=None, shape=None, bytes=to.nbytes, rank=tensor.rank
            )
            graph.add_node(
                ("rank", tensor.rank), kind="rank", name=f"rank {tensor.rank}", dtype=None, shape=None, bytes=None, rank=tensor.rank
            )
            graph.add_edge(node, ("target file", to.path), role="stored in")
            graph.add_edge(("target file", to.path), ("rank", tensor.rank), key="read by", role="read by")
        graph.add_edge(hub, node, role="copy" if program.op is None else program.op.name, output=k)


def _attributes(kind: str, tensor: TensorEntry) -> dict[str, Any]:
    nbytes = dtype_of(tensor.dtype).nbytes(prod(tensor.shape))
    return {"kind": kind, "name": tensor.name, "dtype": tensor.dtype, "shape": tensor.shape, "bytes": nbytes, "rank": tensor.rank}
