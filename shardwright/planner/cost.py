"""Adding up what a plan costs. Every figure follows from the plan and the memory bound; nothing is estimated."""

from __future__ import annotations

from typing import Any

from .passes.memory import fit, min_memory, plan_nbytes, whole_items
from .plan import Cost, Plan, Program

__all__ = ["cost", "figures"]

_SUMMARY = ("source_format", "source_layout", "family", "target_format", "target_layout")
_COST = (
    "tensors", "files", "bytes_read", "bytes_written", "source_bytes", "target_bytes", "read_amplification", "write_amplification",
    "requests", "tiles", "pieces", "programs", "base_bytes", "peak_bytes", "min_memory_bytes",
)  # fmt: skip


def cost(plan: Plan, memory: int, workers: int) -> Cost:
    """What the plan moves, and the memory it takes under the bound `memory` (bytes) with at most `workers` lanes.

    Raises
    ------
    MemoryBoundError
        The bound is too small; names the smallest that works.
    """
    items = whole_items(plan.programs, plan.tiles)
    fitted = fit(plan.programs, memory, workers, plan_nbytes(plan), items)
    static = sum(len(data) for file in plan.target_files for _, data in file.static)
    needed = sum(tensor.nbytes for tensor in plan.source_tensors)
    sealed = [seal.file for file in plan.target_files for seal in file.seals if seal.kind == "sha256"]
    again = sum(plan.target_files[i].nbytes for i in sealed if i < len(plan.target_files)) + (plan.copied_bytes if sealed else 0)
    return Cost(
        tensors=len(plan.target_tensors),
        files=len(plan.target_files) + len(plan.copies),
        bytes_read=int(plan.tiles.bytes_read.sum()) + plan.copied_bytes + again,
        bytes_written=int(plan.tiles.bytes_written.sum()) + static + plan.copied_bytes,
        source_bytes=needed + plan.copied_bytes,
        target_bytes=sum(file.nbytes for file in plan.target_files) + plan.copied_bytes,
        requests=int(plan.tiles.requests.sum()),
        tiles=len(plan.tiles),
        pieces=sum(_pieces(program) for program in plan.programs),
        programs=len(plan.programs),
        base_bytes=fitted.base_bytes,
        peak_bytes=fitted.peak_bytes,
        min_memory_bytes=min_memory(plan.programs, plan_nbytes(plan), items),
    )


def _pieces(program: Program) -> int:
    written = sum(len(output.scatter) + len(output.zeros) for output in program.outputs)
    return len(program.gather) + sum(map(len, program.replicas)) + len(program.padding) + written


def figures(plan: Plan, cost: Cost) -> dict[str, Any]:
    """The fields of ``plan --json``."""
    return {
        **{key: plan.summary.get(key) for key in _SUMMARY},
        **{key: getattr(cost, key) for key in _COST},
        "dropped": [{"name": d.name, "reason": d.reason} for d in plan.dropped],
        "warnings": list(plan.warnings),
    }
