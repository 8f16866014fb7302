"""From a plan to a published target, and from a plan and a target to their differences.

`execute`: fit the memory bound → refuse, prepare or resume → lay out files → run the tiles that are not done, journaling
them → seal → sync → publish. Whatever fails on the way leaves what the next run can go on from.

`compare`: the same run with a sink that compares. `read_box` reads one box of one lazy tensor into memory, `read_mean` a whole
one whose copies may have to be averaged.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ContradictionError, PlanError
from ..planner.passes.memory import STRIP_FLOOR, Fit, fit, itemsize, mean_bytes, plan_nbytes, whole_items
from ..planner.plan import Plan
from ..planner.tensor.pieces import FILL, Piece
from .arena import Buffer
from .averaging import Mean
from .compare import CompareFiles, Difference
from .extents import Checksums
from .host import default_workers, held_bytes, memory_room
from .layouts import moves
from .ledger import Ledger
from .local import run
from .padding import Padding
from .progress import Progress
from .publish import Publication, prepare
from .sealing import seal
from .sources import RESTORE, SourceFiles, check_unchanged, unchecked
from .stopping import Stop
from .targets import TargetFiles
from .tile import Receipt
from .transfer import gather, read_steps
from .watchdog import anonymous_bytes, watched

if TYPE_CHECKING:
    from .cluster import Cluster

__all__ = ["Difference", "Outcome", "compare", "execute", "fit_plan", "peak_rss_bytes", "read_box", "read_mean"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did.

    Attributes
    ----------
    bytes_read, bytes_written
        Of tensor data, by this run alone.
    peak_rss_bytes
        Most memory that this process has had resident so far, file pages included.
    tiles_resumed
        Tiles that earlier runs had finished.
    padding
        By hub tensor: what its padding rows held.
    notes
        What the user should be told.
    averaged
        By hub tensor whose copies were averaged and not equal: how many elements differed.
    """

    seconds: float
    bytes_read: int
    bytes_written: int
    peak_rss_bytes: int
    workers: int
    strip_bytes: int
    tiles_resumed: int
    padding: dict[str, Padding]
    notes: tuple[str, ...] = ()
    averaged: dict[str, int] = field(default_factory=dict)


def fit_plan(plan: Plan, memory: int, workers: int | None = None) -> Fit:
    """Workers and strips of a plan under a memory bound.

    Raises
    ------
    MemoryBoundError
        The bound is too small.
    """
    wanted = default_workers() if workers is None else workers
    return fit(plan.programs, memory, wanted, plan_nbytes(plan), whole_items(plan.programs, plan.tiles))


def execute(
    plan: Plan,
    out: str | os.PathLike[str],
    *,
    memory: int,
    workers: int | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    progress: Progress | None = None,
    scheduler: Any = "threads",
) -> Outcome:
    """Run a plan, or what is left of it, and publish its target.

    Parameters
    ----------
    memory
        Bound on this process's memory in bytes (on a cluster: on each worker's).
    workers
        Most lanes at a time; by default the cores, at most 8.
    overwrite
        Replace what OUT holds.
    fresh
        Forget what an unfinished run left.
    scheduler
        ``"threads"``, the address of a dask scheduler, or a dask `Client`.

    Raises
    ------
    Refusal
        Nothing was written; what an earlier run left is still there.
    ContradictionError
        The target was not published, and what was written is removed.
    RunError
        The target was not published; the same call resumes.
    """
    began = time.monotonic()
    with _connected(scheduler) as cluster:
        lanes = cluster.lanes if cluster else workers
        usable = memory if cluster else min(memory, memory_room() + anonymous_bytes())
        fitted = fit_plan(plan, usable, lanes)
        check_unchanged(plan.source_root, plan.source_files)
        stop = Stop()
        # A signal counts from the first byte on disk to the last; what is whole by then is published.
        with stop.on_signals(), prepare(Path(out), plan, overwrite=overwrite, fresh=fresh) as publication:
            if publication.left is not None:
                plan = publication.plan
                fitted = fit_plan(plan, usable, lanes)
            if cluster:
                cluster.check(fitted)
            receipt = Receipt()
            if publication.left is None or not publication.left.whole:
                with nullcontext() if cluster else watched(usable, fitted, plan_nbytes(plan), stop):
                    receipt = _fill(publication, fitted, cluster, progress, stop)
            publication.publish()
    for earlier in publication.done.values():
        receipt.found(earlier)
    lowered = () if usable == memory else (f"memory bound lowered to {usable} bytes: this machine or its cgroup has no more",)
    return Outcome(
        time.monotonic() - began,
        receipt.bytes_read,
        receipt.bytes_written,
        peak_rss_bytes(),
        fitted.workers,
        fitted.strip_bytes,
        len(publication.done),
        receipt.padding,
        (*lowered, *publication.notes),
        receipt.averaged,
    )


@contextmanager
def _connected(scheduler: Any) -> Iterator[Cluster | None]:
    """The cluster, or None for this machine."""
    if scheduler == "threads":
        yield None
        return
    from .cluster import Cluster

    cluster = Cluster(scheduler)
    try:
        yield cluster
    finally:
        cluster.close()


def _fill(publication: Publication, fitted: Fit, cluster: Cluster | None, progress: Progress | None, stop: Stop) -> Receipt:
    """Every byte of the target, synced; what this run did."""
    plan, done = publication.plan, publication.done
    targets = TargetFiles(publication.data, plan.target_files, stop=stop)
    sources = SourceFiles(plan.source_root, plan.source_files, remedy=RESTORE)
    checksums = Checksums(targets.files)
    try:
        if publication.left is None:
            targets.create()
            targets.sync()  # a file that lost its size could not be resumed
        else:
            targets.reopen()
        journal = publication.begin()
        try:
            for receipt in done.values():
                checksums.absorb(receipt.extents)
        except ContradictionError as error:
            raise PlanError(f"the journal contradicts itself: {error}", remedy="Start over with --fresh") from error
        tiles = [tile for tile in range(len(plan.tiles)) if tile not in done]
        # A cluster's workers have synced and checked before they hand in a tile.
        durable = (_nothing, _nothing) if cluster else (targets.sync, sources.check)
        ledger = Ledger(journal, checksums, stop, sync=durable[0], check=durable[1])
        try:
            with ledger:
                if cluster is None:
                    run(plan, sources, targets, fitted, tiles=tiles, finished=ledger.finished, progress=progress, stop=stop)
                else:
                    cluster.run(plan, targets.root, fitted, tiles=tiles, finished=ledger.finished, progress=progress, stop=stop)
        finally:
            publication.finished = ledger.tiles
        stop.raise_cause()
        ledger.total.bytes_read += seal(plan, targets, checksums, fitted.workers, stop)
        targets.sync()
    finally:
        targets.close()
        sources.close()
    return ledger.total


def _nothing(numbers: Collection[int]) -> None:
    """What a worker has done already."""


def compare(
    plan: Plan, target_root: str | os.PathLike[str], *, memory: int, workers: int | None = None, progress: Progress | None = None
) -> list[Difference]:
    """Every target tensor, header and carried file that is not what the plan makes of the source."""
    fitted = fit_plan(plan, memory, workers)
    target = CompareFiles(target_root, plan.target_files, plan.target_tensors)
    sources = SourceFiles(plan.source_root, plan.source_files)
    try:
        target.check_files()
        run(
            plan,
            sources,
            target,
            fitted,
            tiles=range(len(plan.tiles)),
            finished=lambda tile, receipt: target.absorb(receipt.extents),
            progress=progress,
        )
        target.finish()
        found = target.differences()
    finally:
        target.close()
        sources.close()
    return [*found, *_compare_copies(plan, Path(target_root))]


def _compare_copies(plan: Plan, root: Path) -> list[Difference]:
    found = []
    for source, target in plan.copies:
        expected = (Path(plan.source_root) / source).read_bytes()
        if not (root / target).is_file():
            found.append(Difference(target, "missing", 0))
        elif (actual := (root / target).read_bytes()) != expected:
            at = next((i for i, (a, b) in enumerate(zip(expected, actual, strict=False)) if a != b), min(len(expected), len(actual)))
            found.append(Difference(target, "size" if len(actual) != len(expected) else "header", at))
    return found


def read_box(
    pieces: Sequence[Piece],
    shape: tuple[int, ...],
    dtype: str,
    *,
    operands: Sequence[tuple[str, int]],
    root: str | os.PathLike[str],
    lo: tuple[int, ...] | None = None,
    hi: tuple[int, ...] | None = None,
) -> Buffer:
    """The bytes of a box of a lazy tensor, row-major.

    Parameters
    ----------
    pieces
        The tensor as a layout of its operands.
    operands
        ``(path below root, byte offset)`` of each operand.
    lo, hi
        The box; the whole tensor by default.
    """
    lo = (0,) * len(shape) if lo is None else lo
    hi = tuple(shape) if hi is None else hi
    size = itemsize(dtype)
    result = np.empty(prod(b - a for a, b in zip(lo, hi, strict=True)) * size, np.uint8)
    if not result.nbytes:
        return result
    strip, staging, zeros = result.data, memoryview(bytearray(STRIP_FLOOR)), memoryview(bytes(16))
    sources = SourceFiles(root, [unchecked(path) for path, _ in operands])
    try:
        for move in moves(pieces, shape, lo, hi, size):
            if move.slot == FILL:
                for step in read_steps(move, len(staging)):
                    gather(step, _no_read, 0, strip, staging, zeros)
                continue
            with sources.reading(move.slot) as read:
                for step in read_steps(move, len(staging)):
                    gather(step, read, operands[move.slot][1], strip, staging, zeros)
    finally:
        sources.close()
    return result


def read_mean(
    copies: Sequence[Sequence[Piece]],
    shape: tuple[int, ...],
    dtype: str,
    *,
    operands: Sequence[tuple[str, int]],
    root: str | os.PathLike[str],
) -> Buffer:
    """The bytes of a lazy tensor, row-major; of several copies, their mean as `averaging` has it."""
    first, *others = copies
    result = read_box(first, shape, dtype, operands=operands, root=root)
    if others and result.nbytes:
        mean = Mean(dtype, result.data, memoryview(bytearray(mean_bytes(dtype, prod(shape)))))
        for copy in others:
            mean.add(read_box(copy, shape, dtype, operands=operands, root=root).data)
        mean.finish()
    return result


def _no_read(offset: int, buffers: Sequence[memoryview]) -> None:
    raise AssertionError("zeros come from no file")


def peak_rss_bytes() -> int:
    """Most memory that this process has had resident."""
    # Not getrusage where it can be helped: its figure is inherited from whatever the process was forked from.
    if (held := held_bytes("VmHWM")) is not None:
        return held
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
