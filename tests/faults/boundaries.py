"""Runs that are stopped at a numbered boundary, with or without the loss of what was never synced.

1. `Host` is a process of its own that has imported everything once. For each `Order` it forks; the child runs the plan
   and reports through a pipe. (A fork of the test's own process would inherit the threads of whatever ran before.)
2. In the child `Boundaries` stands in for every function of `shardwright.executors.system`. A call has a kind, ``"pwrite
   data"`` or ``"sync journal"``: the function and what it is called on. Calls of a kind are numbered from 1.
3. A `Point` names one side of one numbered call: ``before`` it, ``after`` it, or ``torn``: half of it is done.
   There the child reports what it has done so far and kills itself (SIGKILL): what the kernel has taken survives.
4. With ``power`` it first takes back what no sync has made durable (`volatile`).

Boundary: knows the names of what lies in OUT.partial, and nothing of the journal's content.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import shutil
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock, RLock
from typing import Any, Literal, NoReturn

from shardwright.executors import publish, system
from shardwright.planner import codec
from shardwright.planner.plan import Plan
from tests.faults.volatile import Volatile

__all__ = ["Host", "Order", "Point", "Report", "cannot"]

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120
"""Seconds after which a child that hangs shows where, and ends."""


@dataclass(frozen=True, slots=True)
class Point:
    """Where a run ends.

    Attributes
    ----------
    kind, number
        The call, counted from 1 among those of its kind.
    side
        ``torn`` is for `pwrite`, `append` and `rmtree` alone: half of it is done.
    power
        Whether what was not synced is lost.
    seed
        Of the choices that a loss makes.
    """

    kind: str
    side: Literal["before", "after", "torn"]
    number: int
    power: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Order:
    """One run: `options` are `execute`'s, `settings` are ``module:NAME`` → value, `point` is where it ends (or nowhere)."""

    plan: Plan
    out: str
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    point: Point | None = None


@dataclass(slots=True)
class Report:
    """What a child says when it ends, of itself or not.

    Attributes
    ----------
    status
        0, or minus the signal that ended it.
    calls
        By kind.
    begun
        Tiles.
    written
        Bytes that finished tiles wrote.
    outcome, error
        What `execute` returned or raised.
    kept
        The part of the journal that no loss of power can take.
    """

    status: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    begun: int = 0
    written: int = 0
    outcome: Any = None
    error: BaseException | None = None
    kept: bytes = b""


def cannot(one: object, other: object) -> bool:
    """`system.exchange` of a kernel that has none."""
    return False


class Boundaries:
    """Counts a process's calls, and ends it at a point."""

    def __init__(self, out: Path, point: Point | None, say: Callable[[Report], None]) -> None:
        self.point, self.report, self._say = point, Report(), say
        self.out, self.partial = out, out.with_name(out.name + ".partial")
        self._counting = Lock()
        # While power is lost nothing may be written, and what a call has done must be known.
        self._world: AbstractContextManager[Any] = RLock() if point is not None and point.power else nullcontext()
        self._disk = Volatile(out, point.seed) if point is not None and point.power else None

    def install(self) -> None:
        """Stand in for the system's functions and count tiles, in this process and for good."""
        from shardwright.executors.tile import Runner

        for name in system.__all__:
            setattr(system, name, partial(self._call, name, getattr(system, name)))
        # The planner saves plans itself, and folders are removed by the standard library.
        setattr(codec, "os", _Instead(os, fsync=partial(self._call, "sync", os.fsync), replace=partial(self._call, "rename", os.replace)))  # noqa: B010
        setattr(publish, "os", _Instead(os, rmdir=partial(self._call, "rmdir", os.rmdir)))  # noqa: B010
        setattr(publish, "shutil", _Instead(shutil, rmtree=partial(self._call, "rmtree", shutil.rmtree)))  # noqa: B010
        run = Runner.run

        def counted(runner: Runner, *args: Any) -> Any:
            with self._counting:
                self.report.begun += 1
            found = run(runner, *args)
            with self._counting:
                self.report.written += found.bytes_written
            return found

        Runner.run = counted  # type: ignore[method-assign]

    def _call(self, name: str, real: Callable[..., Any], *args: Any) -> Any:
        kind = f"{name} {self._what(args[0])}"
        with self._counting:
            self.report.calls[kind] += 1
            point = self.point
            here = point is not None and (kind, self.report.calls[kind]) == (point.kind, point.number)
        with self._world:
            if here and point is not None:
                self._end(point.side, name, real, *args)
            return self._do(name, real, *args)

    def _do(self, name: str, real: Callable[..., Any], *args: Any) -> Any:
        modelled = getattr(self._disk, name, None)
        if modelled is not None:
            return modelled(real, *args)
        # A flush takes long and shows nothing here: what the kernel has taken survives, and what it has not is modelled.
        return None if name == "sync" else real(*args)

    def _end(self, side: str, name: str, real: Callable[..., Any], *args: Any) -> NoReturn:
        if side == "torn" and name == "rmtree":
            for path in sorted(Path(args[0]).rglob("*"))[::2]:
                path.unlink() if path.is_file() else None
        elif side == "torn":
            self._do(name, real, args[0], args[1][: len(args[1]) // 2], *args[2:])
        elif side == "after":
            self._do(name, real, *args)
        with self._counting:
            if self._disk is not None:
                self.report.kept = self._disk.kept()
                self._disk.lose()
            self._say(self.report)
            os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("nobody survives that")

    def _what(self, of: Any) -> str:
        """What a descriptor or a path is to the run."""
        path = Path(os.readlink(f"/proc/self/fd/{of}") if isinstance(of, int) else os.path.abspath(of))
        if path.is_dir() and isinstance(of, int):
            return "folder"
        if path.is_relative_to(self.partial):
            below = path.relative_to(self.partial).parts
            return below[0].partition(".")[0] if below else "partial"
        return "target" if path.is_relative_to(self.out) else "source"


class _Instead:
    """A module with some other functions."""

    def __init__(self, module: Any, **functions: Callable[..., Any]) -> None:
        self.__dict__.update(functions)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Host:
    """A warm process that forks for each order."""

    def __init__(self) -> None:
        code = "from tests.faults.boundaries import serve; serve()"
        command = [sys.executable, "-W", "error", "-c", code]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, order: Order) -> Report:
        """Carry out an order; returns when its process has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        pickle.dump(order, self._process.stdin)
        self._process.stdin.flush()
        found = pickle.load(self._process.stdout)
        assert isinstance(found, Report)
        return found

    def close(self) -> None:
        """End it."""
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[Host]:
        """A host for the length of a ``with`` block."""
        host = cls()
        try:
            yield host
        finally:
            host.close()


def serve() -> None:
    """The host's own loop: orders in, reports out."""
    with os.fdopen(os.dup(0), "rb") as orders, os.fdopen(os.dup(1), "wb") as reports:
        os.dup2(2, 1)  # what a child prints is no report
        _warm()
        while True:
            try:
                order = pickle.load(orders)
            except EOFError:
                return
            pickle.dump(_fork(order), reports)
            reports.flush()


def _warm() -> None:
    """Import what a run imports; no thread may start here."""
    import dask.threaded  # noqa: F401
    import torch

    import shardwright.executors.execute
    import shardwright.executors.kernels  # noqa: F401

    torch.set_num_threads(1)


def _fork(order: Order) -> Report:
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        _child(order, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    report = pickle.loads(said) if said else Report()
    report.status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return report


def _child(order: Order, pipe: int) -> None:
    """Run one order in this process, which then ends."""
    import importlib

    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    boundaries = Boundaries(Path(order.out), order.point, lambda report: _say(pipe, report))
    try:
        from shardwright.executors.execute import execute

        for place, value in order.settings.items():
            module, name = place.split(":")
            assert hasattr(importlib.import_module(module), name)
            setattr(importlib.import_module(module), name, value)
        boundaries.install()
        try:
            boundaries.report.outcome = execute(order.plan, order.out, **order.options)
        except Exception as error:
            boundaries.report.error = error
            traceback.print_exc()
        _say(pipe, boundaries.report)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(70)


def _say(pipe: int, report: Report) -> None:
    data = memoryview(pickle.dumps(report))
    while data:
        data = data[os.write(pipe, data) :]
