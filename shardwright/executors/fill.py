"""Filling tensors: a plan whose targets are memory, run as any other.

1. Fit the bound: buffers and plan, and what is handed over to other processes. The process as it is, and the tensors that
   are filled, do not count: they are the caller's.
2. Run the tiles (this process's share of them) with the tensors as the sink; the sources are looked at again at the end.
3. Where processes load together: hand over what others hold, take what they hand over, and return when all have.

Boundary: a plan and tensors by number; knows no format, module or name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from ..planner.passes.memory import fit, plan_nbytes, whole_items
from ..planner.plan import Plan
from ..planner.tensor.pieces import FILL
from .host import default_workers
from .local import run
from .mates import Mates, Meeting
from .sources import SourceFiles, check_unchanged
from .stopping import Stop
from .tensors import Tensors
from .tile import Receipt

if TYPE_CHECKING:
    import torch

__all__ = ["Company", "fill"]


@dataclass(frozen=True)
class Company:
    """The other processes that run the same plan.

    Attributes
    ----------
    tiles
        The tiles that this process reads.
    takers
        By number of a target file: the other processes that hold that tensor.
    """

    meeting: Meeting
    tiles: Sequence[int]
    takers: Mapping[int, Sequence[int]]


def fill(
    plan: Plan, tensors: Mapping[int, torch.Tensor], *, memory: int, workers: int | None = None, company: Company | None = None
) -> Receipt:
    """Fill tensors with what a plan makes of its source.

    Parameters
    ----------
    tensors
        By number of the target file. Any dtype that torch casts the plan's to, any device, any strides.
    memory
        Most bytes that this takes beside the tensors and the process as it is.
    workers
        Most lanes at a time; by default the cores, at most 8.

    Raises
    ------
    MemoryBoundError
        The bound is too small.
    PlanError, RunError, ContradictionError
        The source changed, cannot be read, or contradicts itself, or another process failed: the tensors are filled in part.
    """
    shared = company.meeting.shared_bytes if company else 0
    wanted = default_workers() if workers is None else workers
    fitted = fit(plan.programs, memory - shared, wanted, plan_nbytes(plan), whole_items(plan.programs, plan.tiles), base=0)
    files = {number: plan.source_files[number] for number in _read(plan)}
    check_unchanged(plan.source_root, list(files.values()))
    stop, total = Stop(), Receipt()
    sources = SourceFiles(plan.source_root, files)
    dtypes = {entry.file: entry.dtype for entry in plan.target_tensors}
    lock = Lock()

    def finished(tile: int, receipt: Receipt) -> None:
        with lock:
            total.add(receipt)

    try:
        if company is None:
            sink, tiles = Tensors(tensors, dtypes), range(len(plan.tiles))
            run(plan, sources, sink, fitted, tiles=tiles, finished=finished, stop=stop, memory=sink.memory)
        else:
            with Mates(company.meeting, stop) as mates:
                sink = Tensors(tensors, dtypes, remote=lambda number, at, data: mates.hand(company.takers[number], number, at, data))
                mates.begin(sink.place)
                run(plan, sources, sink, fitted, tiles=company.tiles, finished=finished, stop=stop)
                mates.finish()
        sources.check(files)
    finally:
        sources.close()
    for device in {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}:
        _synchronise(device)
    return total


def _read(plan: Plan) -> list[int]:
    """The source files that the plan reads, of perhaps many."""
    found: set[int] = set()
    for program, bound in zip(plan.programs, plan.bindings, strict=True):
        pieces = [*program.gather, *program.padding, *(piece for replica in program.replicas for piece in replica)]
        for slot in {piece.slot for piece in pieces} - {FILL}:
            found.update(np.unique(bound.source_file[:, slot]).tolist())
    return sorted(found)


def _synchronise(device: torch.device) -> None:
    """Lanes copy on their own threads' streams."""
    import torch

    torch.cuda.synchronize(device)
