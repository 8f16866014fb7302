"""Logits of a Megatron checkpoint from the real ``megatron.core``, run by the ranks of a `RankServer`.

::

    with Megatron() as mcore:
        mcore.logits(Path("out"), tp=2, pp=2, vocab=131)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tests.clients import mcore_model
from tests.clients.hf_logits import token_ids
from tests.clients.mcore_model import Request
from tests.clients.rank_server import RankError, RankServer

if TYPE_CHECKING:
    from tests.clients.mcore_foreign import Foreign

__all__ = ["Megatron", "MegatronError"]

MegatronError = RankError
"""Megatron does not accept the checkpoint; the text holds the first failing rank's traceback."""


class Megatron:
    """A Megatron server; started by the first call, ended by `close` or the ``with`` block."""

    def __init__(self) -> None:
        self._server = RankServer(mcore_model.prepare)

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
        (logits,) = [found for found in self._server.ask(request) if found is not None]
        return logits

    def save(self, foreign: Foreign) -> Path:
        """Let Megatron-core make a checkpoint with random weights; its folder.

        Raises
        ------
        MegatronError
            It cannot build the model or save it.
        """
        self._server.ask(foreign)
        return Path(foreign.folder)

    def close(self) -> None:
        """End the server; another call starts a new one."""
        self._server.close()

    def __enter__(self) -> Megatron:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
