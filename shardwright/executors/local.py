"""Running a plan on this machine: a dask graph of lane tasks on dask's threaded scheduler.

1. Every lane takes a slab from the arena, then the next tile from one ordered, locked iterator, until the iterator ends
   or the stop flag is set. (Tiles as independent tasks would run in reverse order and go on after an exception.)
2. A finished tile's receipt is handed on at once; who takes it may make the lane wait.
3. The first error, or a signal, sets the flag; lanes look at it before each tile, and after an error between strips. No
   exception leaves a lane, so the scheduler waits for all of them.
4. When every lane has returned the scheduler's threads are gone, nothing writes any more, and the *first* cause is
   raised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

from ..planner.passes.memory import Fit
from ..planner.plan import Plan
from .arena import Arena
from .extents import Sink
from .layouts import Layouts
from .progress import NullProgress, Progress
from .sources import SourceFiles
from .stopping import Stop
from .tile import Job, Memory, Receipt, Runner, Stopped

__all__ = ["Finished", "begin", "jobs", "run"]

Finished = Callable[[int, Receipt], None]
"""Takes a finished tile and its receipt."""


def jobs(plan: Plan, tile: int) -> list[Job]:
    """The items of a tile with the places of their operands."""
    found = []
    for program, row, lo, hi in plan.items(tile):
        bound = plan.bindings[program]
        sources = tuple(zip(bound.source_file[row].tolist(), bound.source_offset[row].tolist(), strict=True))
        targets = tuple(zip(bound.target_file[row].tolist(), bound.target_offset[row].tolist(), strict=True))
        found.append(Job(program, bound.names[row], lo, hi, sources, targets))
    return found


class _Lanes:
    """What the lanes of one run share."""

    def __init__(
        self, plan: Plan, tiles: Iterable[int], runner: Runner, sink: Sink, arena: Arena, slab_bytes: int, finished: Finished, stop: Stop
    ) -> None:
        self.plan = plan
        self.runner = runner
        self.sink = sink
        self.arena = arena
        self.slab_bytes = slab_bytes
        self.finished = finished
        self.stop = stop
        self._tiles = iter(tiles)
        self._lock = Lock()
        runner.stopping = self.stop.at_once

    def next_tile(self) -> int | None:
        """The next tile in plan order; None when there is none or the run stops."""
        with self._lock:
            return None if self.stop.is_set() else next(self._tiles, None)

    def lane(self, number: int) -> None:
        """Run tiles until there are no more; never raises."""
        try:
            with self.arena.take(self.slab_bytes) as slab:
                while (tile := self.next_tile()) is not None:
                    self.finished(tile, self.runner.run(jobs(self.plan, tile), self.sink, slab))
        except Stopped:
            return
        except BaseException as error:
            self.stop.set(error)


def begin(progress: Progress, plan: Plan, tiles: Sequence[int]) -> None:
    """Say that a run begins, of which these tiles are left."""
    total = int(plan.tiles.bytes_written.sum())
    progress.start(total)
    progress.advance(total - int(plan.tiles.bytes_written[list(tiles)].sum()))


def run(
    plan: Plan,
    sources: SourceFiles,
    sink: Sink,
    fit: Fit,
    *,
    tiles: Sequence[int],
    finished: Finished,
    progress: Progress | None = None,
    stop: Stop | None = None,
    memory: Memory = lambda number: None,
) -> None:
    """Run tiles of a plan; after it returns or raises nothing reads or writes.

    Parameters
    ----------
    fit
        Workers and strips that fit the memory bound.
    tiles
        Which of the plan's tiles, in the order they start.
    finished
        Takes a tile and its receipt, in any thread.
    stop
        A flag that is shared with what comes before and after the run.
    memory
        As for `Runner`.

    Raises
    ------
    StoppedError
        A signal came (only the main thread can catch one).
    ShardwrightError
        The first error, as it was.
    RunError
        The first error, if it was one of the system's.
    """
    progress = progress or NullProgress()
    layouts = Layouts(dict(enumerate(plan.programs)), fit.strip_bytes)
    runner = Runner(layouts, sources, strip_bytes=fit.strip_bytes, advance=progress.advance, memory=memory)
    workers = max(1, min(fit.workers, len(tiles)))
    lanes = _Lanes(plan, tiles, runner, sink, Arena(workers * fit.slab_bytes), fit.slab_bytes, finished, stop or Stop())
    begin(progress, plan, tiles)
    try:
        with lanes.stop.on_signals():
            _schedule(lanes, workers)
    finally:
        progress.stop()
        lanes.arena.release()
    lanes.stop.raise_cause()


def _schedule(lanes: _Lanes, workers: int) -> None:
    import dask.threaded

    graph = {("lane", number): (lanes.lane, number) for number in range(workers)}
    # A pool of our own: the scheduler keeps the ones that it makes.
    with ThreadPoolExecutor(workers, thread_name_prefix="lane") as pool:
        dask.threaded.get(graph, list(graph), pool=pool, num_workers=workers)
