"""Running a plan on a dask cluster.

1. `Cluster` connects (an address or a client), and checks the workers: those that declare a resource ``bytes`` must all
   declare at least one slab of it; it is then taken per tile. Where none does, each worker's own arena bounds it.
2. One task per tile, ``priority=-index``, a window of them at a time. The payload is the tile alone, under 1 MiB; no
   tensor crosses the wire. Source and target must be visible to every worker under the same paths.
3. Each result is a receipt that follows the worker's own fsync, and is handed on.
4. The first error halts what runs, a signal lets it finish; what waits does not start. When no worker runs a tile of
   this run any more the first cause is raised.
"""

from __future__ import annotations

import os
import pickle
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from ..errors import PlanError, RunError, UsageError
from ..planner.passes.memory import Fit
from ..planner.plan import Plan, TargetFile
from . import worker
from .local import Finished, begin, jobs
from .progress import NullProgress, Progress
from .stopping import Stop

__all__ = ["PAYLOAD_BYTES", "Cluster", "payload"]

PAYLOAD_BYTES = 1 << 20
"""Largest payload."""
RESOURCE = "bytes"
"""The workers' resource that bounds tiles."""
_PATIENCE = 10.0
"""Seconds to wait for a first worker."""
_GLANCE = 0.5
"""Seconds between two looks at the stop flag."""
_PATIENT_GLANCES = 40
"""Looks, 0.05 s apart, at workers that run nothing, before what has not come back is given up."""


class Cluster:
    """A connection to a dask scheduler.

    Parameters
    ----------
    scheduler
        The scheduler's address, or a `distributed.Client` (which stays open).

    Raises
    ------
    UsageError
        No answer, or no workers.
    """

    def __init__(self, scheduler: Any) -> None:
        from distributed import Client

        connect: Any = Client
        self._own = not isinstance(scheduler, Client)
        try:
            self.client: Any = connect(scheduler, set_as_default=False, timeout=_PATIENCE) if self._own else scheduler
        except (OSError, ValueError) as error:
            raise UsageError(f"no dask scheduler answers at {scheduler}", remedy="Start one: dask scheduler") from error
        try:
            self.client.wait_for_workers(1, timeout=_PATIENCE)
        except TimeoutError:
            self.close()
            raise UsageError("the cluster has no workers", remedy=f"Start some: {_command('SCHEDULER', 1, None)}") from None
        self.workers = _workers(self.client)

    @property
    def lanes(self) -> int:
        """Most threads of one worker."""
        return max(int(w["nthreads"]) for w in self.workers.values())

    def check(self, fit: Fit) -> dict[str, int]:
        """The resources that a task takes.

        Raises
        ------
        UsageError
            Some workers declare too few bytes, or none while others do.
        """
        declared = {address: w.get("resources", {}).get(RESOURCE) for address, w in self.workers.items()}
        if all(nbytes is None for nbytes in declared.values()):
            return {}
        for address, nbytes in declared.items():
            if nbytes is None or nbytes < fit.slab_bytes:
                raise UsageError(
                    f"worker {address} declares too small a resource {RESOURCE!r}",
                    expected=fit.slab_bytes,
                    actual=nbytes,
                    remedy=f"Start workers with: {_command(self.client.scheduler.address, fit.workers, fit.workers * fit.slab_bytes)}",
                )
        return {RESOURCE: fit.slab_bytes}

    def close(self) -> None:
        """Close the connection, if it is ours."""
        if self._own:
            self.client.close()

    def run(
        self,
        plan: Plan,
        target_root: Path,
        fit: Fit,
        *,
        tiles: Sequence[int],
        finished: Finished,
        progress: Progress | None = None,
        stop: Stop | None = None,
    ) -> None:
        """Run tiles of a plan; after it returns or raises no worker writes. Parameters as in `local.run`.

        Raises
        ------
        StoppedError
            A signal came.
        ShardwrightError
            The first error of any worker, as it was.
        """
        progress = progress or NullProgress()
        window = 4 * sum(int(w["nthreads"]) for w in self.workers.values())
        run = _Run(self.client, plan, str(target_root), fit, self.check(fit), finished, progress, stop or Stop(), window=window)
        begin(progress, plan, tiles)
        try:
            with run.stop.on_signals():
                run.drive(tiles)
        finally:
            progress.stop()
        run.stop.raise_cause()


class _Run:
    """One run: futures in flight, and what came of them."""

    def __init__(
        self,
        client: Any,
        plan: Plan,
        target_root: str,
        fit: Fit,
        resources: dict[str, int],
        finished: Finished,
        progress: Progress,
        stop: Stop,
        *,
        window: int,
    ) -> None:
        self.client = client
        self.plan = plan
        self.target_root = target_root
        self.fit = fit
        self.resources = resources
        self.finished = finished
        self.progress = progress
        self.window = window
        self.token = uuid.uuid4().hex
        self.stop = stop
        self._done: SimpleQueue[Any] = SimpleQueue()
        self._flying: dict[str, Any] = {}

    def drive(self, tiles: Iterable[int]) -> None:
        """Submit and collect until nothing is left, or the run stops; then no worker runs a tile of it."""
        waiting = iter(tiles)
        try:
            while not self.stop.is_set():
                while len(self._flying) < self.window and (tile := next(waiting, None)) is not None:
                    self._submit(tile)
                if not self._flying:
                    break
                self._collect()
        except BaseException as error:
            self.stop.set(error)
        if self.stop.is_set():
            self._halt()
        self._everywhere(worker.close)

    def _submit(self, tile: int) -> None:
        data = payload(self.plan, tile, self.fit, self.token, self.target_root)
        future = self.client.submit(
            worker.run_tile, data, key=f"tile-{self.token}-{tile}", priority=-tile, resources=self.resources or None, pure=False
        )
        self._flying[future.key] = tile, future
        future.add_done_callback(self._done.put)

    def _collect(self) -> None:
        """One finished future, or nothing within half a second (so that signals are seen)."""
        try:
            future = self._done.get(timeout=_GLANCE)
        except Empty:
            return
        tile, _ = self._flying.pop(future.key)
        try:
            receipt = future.result()
        except Exception as error:
            self.stop.set(_cause(error), finish_tiles=self.stop.is_set() and not self.stop.at_once())
            return
        self.finished(tile, receipt)
        self.progress.advance(receipt.bytes_written)

    def _halt(self) -> None:
        """Tell every worker, also those that join meanwhile, until nothing of this run is running; what is finished counts."""
        idle = 0
        while idle < _PATIENT_GLANCES:
            self._everywhere(worker.halt, not self.stop.at_once())
            while not self._done.empty():
                self._collect()
            busy = any(isinstance(n, int) and n for n in self._everywhere(worker.active).values())
            # Tiles that no worker has begun come back refused; those of workers that died may not come back at all.
            idle = 0 if busy else _PATIENT_GLANCES if not self._flying else idle + 1
            time.sleep(0.05)
        if self._flying:
            self.client.cancel([future for _, future in self._flying.values()], force=True)

    def _everywhere(self, function: Any, *arguments: Any) -> dict[str, Any]:
        found: dict[str, Any] = self.client.run(function, self.token, *arguments, on_error="ignore")
        return found


def _cause(error: Exception) -> BaseException:
    from distributed import KilledWorker

    if isinstance(error, KilledWorker):
        return RunError("workers died while they ran a tile", remedy="Give them more memory, or see their logs")
    return error


def payload(plan: Plan, tile: int, fit: Fit, token: str, target_root: str) -> bytes:
    """A tile for a worker: its jobs and only what they need.

    Raises
    ------
    PlanError
        It is larger than `PAYLOAD_BYTES`.
    """
    found = jobs(plan, tile)
    sources = {number for job in found for number, _ in job.sources}
    targets = {number for job in found for number, _ in job.targets}
    data = pickle.dumps(
        worker.Payload(
            token,
            fit.strip_bytes,
            fit.slab_bytes,
            fit.workers,
            os.path.abspath(plan.source_root),
            os.path.abspath(target_root),
            {number: plan.source_files[number] for number in sources},
            {number: _slim(plan.target_files[number]) for number in targets},
            {job.program: plan.programs[job.program] for job in found},
            found,
        ),
        protocol=pickle.HIGHEST_PROTOCOL,
    )
    if len(data) >= PAYLOAD_BYTES:
        raise PlanError(
            f"tile {tile} is too large to send to a worker",
            expected=f"under {PAYLOAD_BYTES} bytes",
            actual=f"{len(data)} bytes",
            remedy="Run it on this machine: --scheduler threads",
        )
    return data


def _slim(file: TargetFile) -> TargetFile:
    """Without static bytes, which the client has written."""
    return TargetFile(file.path, file.nbytes, (), file.crcs)


def _workers(client: Any) -> dict[str, Any]:
    try:
        info = client.scheduler_info(n_workers=-1)
    except TypeError:  # before dask 2025.4 all of them, always
        info = client.scheduler_info()
    found: dict[str, Any] = info["workers"]
    return found


def _command(address: str, threads: int, nbytes: int | None) -> str:
    resources = "" if nbytes is None else f' --resources "{RESOURCE}={nbytes}"'
    return f"dask worker {address} --nthreads {threads}{resources}"
