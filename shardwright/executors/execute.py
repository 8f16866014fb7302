"""From a plan to a published target, and from a plan and a target to their differences.

`execute`: fit the memory bound → refuse or prepare → lay out files → run → checksums → copies → sync → publish. Whatever
fails before the last step removes what was written.

`compare`: the same run with a sink that compares. `read_box` reads one box of one lazy tensor into memory.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RunError
from ..planner.passes.memory import STRIP_FLOOR, Fit, fit, itemsize, plan_nbytes, whole_items
from ..planner.plan import Plan
from ..planner.tensor.pieces import FILL, Piece
from .arena import Buffer
from .compare import CompareFiles, Difference
from .descriptors import failed
from .layouts import moves
from .local import run
from .padding import Padding
from .progress import Progress
from .publish import prepare
from .sources import SourceFiles, check_unchanged, unchecked
from .stopping import Stop
from .targets import Sink, TargetFiles
from .tile import Receipt
from .transfer import gather, read_steps

if TYPE_CHECKING:
    from .cluster import Cluster

__all__ = ["Difference", "Outcome", "compare", "execute", "fit_plan", "peak_rss_bytes", "read_box"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did.

    Attributes
    ----------
    peak_rss_bytes
        Most memory that this process has had resident so far, file pages included.
    padding
        By hub tensor: what its padding rows held.
    notes
        What the user should be told.
    """

    seconds: float
    bytes_read: int
    bytes_written: int
    peak_rss_bytes: int
    workers: int
    strip_bytes: int
    padding: dict[str, Padding]
    notes: tuple[str, ...] = ()


def fit_plan(plan: Plan, memory: int, workers: int | None = None) -> Fit:
    """Workers and strips of a plan under a memory bound.

    Raises
    ------
    MemoryBoundError
        The bound is too small.
    """
    wanted = min(8, os.cpu_count() or 1) if workers is None else workers
    return fit(plan.programs, memory, wanted, plan_nbytes(plan), whole_items(plan.programs, plan.tiles))


def execute(
    plan: Plan,
    out: str | os.PathLike[str],
    *,
    memory: int,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    scheduler: Any = "threads",
    plan_text: str | None = None,
) -> Outcome:
    """Run a plan and publish its target.

    Parameters
    ----------
    memory
        Bound on this process's memory in bytes (on a cluster: on each worker's).
    workers
        Most lanes at a time; by default the cores, at most 8.
    scheduler
        ``"threads"``, the address of a dask scheduler, or a dask `Client`.
    plan_text
        The plan as JSON, kept in OUT.partial while the run lasts.

    Raises
    ------
    Refusal
        Nothing was written.
    ContradictionError, RunError
        The target was not published.
    """
    began = time.monotonic()
    with _connected(scheduler) as cluster:
        fitted = fit_plan(plan, memory, cluster.lanes if cluster else workers)
        if cluster:
            cluster.check(fitted)
        check_unchanged(plan.source_root, plan.source_files)
        stop = Stop()
        # A signal counts from the first byte on disk to the last; what is whole by then is published.
        with stop.on_signals():
            publication = prepare(Path(out), plan, overwrite=overwrite, plan_text=plan_text)
            try:
                receipt = _fill(plan, publication.data, fitted, cluster, progress, stop)
            except BaseException:
                publication.discard()
                raise
            publication.publish()
    return Outcome(
        time.monotonic() - began,
        receipt.bytes_read,
        receipt.bytes_written,
        peak_rss_bytes(),
        fitted.workers,
        fitted.strip_bytes,
        receipt.padding,
        publication.notes,
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


def _fill(plan: Plan, data: Path, fitted: Fit, cluster: Cluster | None, progress: Progress | None, stop: Stop) -> Receipt:
    """Every byte of the target, synced."""
    targets = TargetFiles(data, plan.target_files, stop=stop)
    try:
        targets.create()
        if cluster is None:
            receipt = _run_here(plan, targets, fitted, progress, stop)
        else:
            receipt = cluster.run(plan, targets, fitted, progress=progress, stop=stop)
        targets.finish()
        _copy(plan, data)
        targets.sync()
    finally:
        targets.close()
    return receipt


def _run_here(plan: Plan, sink: Sink, fitted: Fit, progress: Progress | None, stop: Stop | None = None) -> Receipt:
    sources = SourceFiles(plan.source_root, plan.source_files)
    try:
        return run(plan, sources, sink, fitted, progress=progress, stop=stop)
    finally:
        sources.close()


def _copy(plan: Plan, data: Path) -> None:
    """The small files that are carried over as they are, synced."""
    for source, target in plan.copies:
        path = data / target
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(Path(plan.source_root) / source, "rb") as reading, open(path, "xb") as writing:
                shutil.copyfileobj(reading, writing, 1 << 18)
                writing.flush()
                os.fsync(writing.fileno())
        except FileNotFoundError:
            raise RunError("a file to be carried over is missing", file=source) from None
        except OSError as error:
            raise failed(error, source, "copying") from error


def compare(
    plan: Plan, target_root: str | os.PathLike[str], *, memory: int, workers: int | None = None, progress: Progress | None = None
) -> list[Difference]:
    """Every target tensor, header and carried file that is not what the plan makes of the source."""
    fitted = fit_plan(plan, memory, workers)
    target = CompareFiles(target_root, plan.target_files, plan.target_tensors)
    try:
        target.check_files()
        _run_here(plan, target, fitted, progress)
        target.finish()
        found = target.differences()
    finally:
        target.close()
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


def _no_read(offset: int, buffers: Sequence[memoryview]) -> None:
    raise AssertionError("zeros come from no file")


def peak_rss_bytes() -> int:
    """Most memory that this process has had resident."""
    try:
        # Not getrusage: its figure is inherited from whatever the process was forked from.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
