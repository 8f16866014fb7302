"""A server that imports a client once and forks a process per rank for every request.

1. The server is a fresh interpreter: spawned, not forked from pytest, whose threads a fork would lose. It runs ``prepare``.
2. A request says how many ranks it has and what each does. The ranks are forked from the server, meet through a file and
   talk over the loopback interface.
3. A rank that fails ends the others; its traceback is the error's text. What the ranks return comes back in rank order.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess
    from types import TracebackType

__all__ = ["RankError", "RankServer", "Request"]

_LOG_TAIL = 4000


class RankError(AssertionError):
    """A rank failed; the text holds the first failing rank's traceback."""


class Request(Protocol):
    """What the ranks do; pickled on its way to the server."""

    @property
    def world(self) -> int:
        """Number of ranks."""

    def run(self, rank: int, store: Path) -> Any:
        """Be one rank; ``store`` is a file that the ranks find each other through. The result is pickled."""


class RankServer:
    """Started by the first request, ended by `close` or the ``with`` block.

    Parameters
    ----------
    prepare
        What the server runs before it forks: imports, patches.
    seconds
        Deadline of one request.
    """

    def __init__(self, prepare: Callable[[], None], seconds: float = 180) -> None:
        self._prepare = prepare
        self._seconds = seconds
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def ask(self, request: Request) -> list[Any]:
        """Run a request; what its ranks returned, in rank order.

        Raises
        ------
        RankError
            A rank failed, or the deadline passed.
        """
        pipe = self._pipe or self._start()
        pipe.send(request)
        try:
            answer = pipe.recv()
        except EOFError:
            self.close()
            raise RankError("the server ended without an answer") from None
        if isinstance(answer, str):
            raise RankError(answer)
        return [pickle.loads(result) for result in answer]

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._prepare, self._seconds), name="ranks")
        self._process.start()
        theirs.close()
        return self._pipe

    def close(self) -> None:
        """End the server; another request starts a new one."""
        if self._pipe is not None and self._process is not None:
            self._pipe.close()
            self._process.join(timeout=10)
            if self._process.is_alive():
                self._process.kill()
            self._process.join()
        self._pipe = self._process = None

    def __enter__(self) -> RankServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _serve(pipe: Connection, prepare: Callable[[], None], seconds: float) -> None:
    """Answer requests until the other end of the pipe closes."""
    warnings.simplefilter("ignore")  # the client's own and torch's; none of our code runs here
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if os.path.exists("/sys/class/net/lo") else "lo0"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same run on every machine
    torch.set_num_threads(1)  # before any fork: a forked thread pool hangs
    prepare()
    gc.freeze()  # or a collection in a rank would copy every page that the fork shares
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        pipe.send(_answer(request, seconds))


def _answer(request: Request, seconds: float) -> list[bytes] | str:
    with tempfile.TemporaryDirectory(prefix="ranks-") as scratch:
        folder = Path(scratch)
        context = multiprocessing.get_context("fork")
        ranks = [context.Process(target=_rank, args=(rank, request, folder)) for rank in range(request.world)]
        for rank in ranks:
            rank.start()
        _supervise(ranks, seconds)
        complaints = sorted(folder.glob("rank_*.txt"), key=lambda file: file.stat().st_mtime_ns)
        if complaints:
            return f"{complaints[0].stem}: {complaints[0].read_text()}"
        codes = [rank.exitcode for rank in ranks]
        if any(codes):
            logs = [log.read_text(errors="replace")[-_LOG_TAIL:] for log in sorted(folder.glob("log_*"))]
            return f"exit codes {codes}, deadline {seconds} s; {''.join(logs)}"
        return [(folder / f"result_{rank}").read_bytes() for rank in range(request.world)]


def _supervise(ranks: list[BaseProcess], seconds: float) -> None:
    """Wait for all ranks; the first failure, or the deadline, ends those that still run."""
    deadline = time.monotonic() + seconds
    running = list(ranks)
    while running and time.monotonic() < deadline and not any(rank.exitcode for rank in ranks):
        wait([rank.sentinel for rank in running], timeout=deadline - time.monotonic())
        running = [rank for rank in running if rank.is_alive()]
    for rank in running:
        rank.kill()
    for rank in ranks:
        rank.join()


def _rank(rank: int, request: Request, folder: Path) -> None:
    try:
        log = os.open(folder / f"log_{rank}", os.O_WRONLY | os.O_CREAT)  # clients talk a lot
        os.dup2(log, 1)
        os.dup2(log, 2)
        result = pickle.dumps(request.run(rank, folder / "store"))
        (folder / f"result_{rank}").write_bytes(result)
    except BaseException:
        (folder / f"rank_{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)  # not through atexit: gloo waits for its peers there
    os._exit(0)
