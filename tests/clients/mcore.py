"""Logits of a Megatron checkpoint from the real ``megatron.core``: a server that imports it once and forks a process per rank.

::

    with Megatron() as mcore:
        mcore.logits(Path("out"), tp=2, pp=2, vocab=131)

The server is a fresh interpreter (spawned, not forked from pytest, whose threads a fork would lose); its ranks are forked
from it, meet through a file and talk over the loopback interface. A rank that fails ends the others; its traceback is the
error's text.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from tests.clients import mcore_model
from tests.clients.hf_logits import token_ids
from tests.clients.mcore_foreign import Foreign
from tests.clients.mcore_model import Request

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess
    from types import TracebackType

__all__ = ["Megatron", "MegatronError"]

_RUN_SECONDS = 180


class MegatronError(AssertionError):
    """Megatron does not accept the checkpoint; the text holds the first failing rank's traceback."""


class Megatron:
    """A Megatron server; started by the first call, ended by `close` or the ``with`` block."""

    def __init__(self) -> None:
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def logits(
        self,
        folder: Path,
        *,
        tp: int = 1,
        pp: int = 1,
        vpp: int = 1,
        ep: int = 1,
        vocab: int,
        ids: torch.Tensor | None = None,
        launch: tuple[str, ...] = (),
        source: Path | None = None,
    ) -> torch.Tensor:
        """Load a checkpoint into Megatron's GPTModel and run it.

        Parameters
        ----------
        folder
            Holds ``latest_checkpointed_iteration.txt`` and the ``mp_rank_*`` folders in the iteration that it names.
        tp, pp, vpp, ep
            The layout; the checkpoint's ``args`` must state the same. Uneven stages are read from ``args``.
        vocab
            True vocabulary size; logits of the padding rows are cut off.
        ids
            Token ids; `hf_logits.token_ids` of ``vocab`` by default.
        launch
            What the checkpoint's ``args`` cannot say, and whoever launches must: names in `mcore_model.LAUNCH`.
        source
            Take only the ``args`` from `folder`: the weights are loaded from this checkpoint, of any format, by shardwright.

        Returns
        -------
        torch.Tensor
            float32 logits ``[batch, length, vocab]``; weights are cast to float32 before they are used.

        Raises
        ------
        MegatronError
            A file or an argument is missing, tensors are missing, unexpected or of the wrong shape or dtype, or the run fails.
        """
        ids = token_ids(vocab) if ids is None else ids
        request = Request(
            str(Path(folder).absolute()), tp, pp, vpp, tuple(map(tuple, ids.tolist())), vocab, ep, launch, source and str(source)
        )
        answer = self._ask(request)
        if isinstance(answer, str):
            raise MegatronError(answer)
        return torch.from_numpy(answer)

    def save(self, foreign: Foreign) -> Path:
        """Let Megatron-core make a checkpoint with random weights; its folder.

        Raises
        ------
        MegatronError
            It cannot build the model or save it.
        """
        if complaint := self._ask(foreign):
            raise MegatronError(complaint)
        return Path(foreign.folder)

    def _ask(self, request: Request | Foreign) -> np.ndarray | str | None:
        pipe = self._pipe or self._start()
        pipe.send(request)
        try:
            return pipe.recv()
        except EOFError:
            self.close()
            return "the Megatron server ended without an answer"

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), name="megatron")
        self._process.start()
        theirs.close()
        return self._pipe

    def close(self) -> None:
        """End the server; another call starts a new one."""
        if self._pipe is not None and self._process is not None:
            self._pipe.close()
            self._process.join(timeout=10)
            if self._process.is_alive():
                self._process.kill()
            self._process.join()
        self._pipe = self._process = None

    def __enter__(self) -> Megatron:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _serve(pipe: Connection) -> None:
    """Answer requests until the other end of the pipe closes."""
    warnings.simplefilter("ignore")  # Megatron's and torch's own; none of our code runs here
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if os.path.exists("/sys/class/net/lo") else "lo0"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same run on every machine
    torch.set_num_threads(1)  # before any fork: a forked thread pool hangs
    mcore_model.prepare()
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        pipe.send(_answer(request))


def _answer(request: Request | Foreign) -> np.ndarray | str | None:
    with tempfile.TemporaryDirectory(prefix="mcore-") as scratch:
        folder = Path(scratch)
        context = multiprocessing.get_context("fork")
        ranks = [context.Process(target=_rank, args=(rank, request, folder)) for rank in range(request.world)]
        for rank in ranks:
            rank.start()
        _supervise(ranks)
        complaints = sorted(folder.glob("rank_*.txt"), key=lambda file: file.stat().st_mtime_ns)
        if complaints:
            return f"{complaints[0].stem}: {complaints[0].read_text()}"
        if isinstance(request, Foreign):
            codes = [rank.exitcode for rank in ranks]
            return f"exit codes {codes}" if any(codes) else None
        result = folder / "logits.npy"
        return np.load(result) if result.exists() else f"no logits; exit codes {[rank.exitcode for rank in ranks]}"


def _supervise(ranks: list[BaseProcess]) -> None:
    """Wait for all ranks; the first failure, or the deadline, ends those that still run."""
    deadline = time.monotonic() + _RUN_SECONDS
    running = list(ranks)
    while running and time.monotonic() < deadline and not any(rank.exitcode for rank in ranks):
        wait([rank.sentinel for rank in running], timeout=deadline - time.monotonic())
        running = [rank for rank in running if rank.is_alive()]
    for rank in running:
        rank.kill()
    for rank in ranks:
        rank.join()


def _rank(rank: int, request: Request | Foreign, folder: Path) -> None:
    try:
        logits = request.run(rank, folder / "store")
    except BaseException:
        (folder / f"rank_{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)  # not through atexit: gloo waits for its peers there
    if logits is not None:
        np.save(folder / "logits.npy", logits.numpy())
    os._exit(0)
