"""Real DeepSpeed: checkpoints that it trains and saves on CPU, and its own tools and engine as judges of ours.

::

    with DeepSpeed() as deepspeed:
        made = deepspeed.train(Job("llama", stage=2, dp=4), Path("ckpt"))
        deepspeed.zero_to_fp32(made.folder)
        deepspeed.to_universal(made.folder, Path("universal"))
        deepspeed.resume(Job("llama", stage=2, dp=2), Path("universal"), universal=True).losses

The work is done by the forked ranks of a `RankServer`; a failure is a `RankError` with the traceback, which ends in
DeepSpeed's own words.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tests.clients import deepspeed_runs
from tests.clients.deepspeed_runs import Job, Rank, Resumption, State, Training, token_ids
from tests.clients.deepspeed_stack import STACKS, join, loss
from tests.clients.deepspeed_tools import ShardLoad, Universal, ZeroToFp32
from tests.clients.rank_server import RankError, RankServer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["DeepSpeed", "Job", "Rank", "RankError", "Run", "State"]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that saved or loaded a checkpoint, and went on."""

    job: Job
    folder: Path
    """Holds ``latest`` and the folder that it names."""
    states: dict[Rank, State]
    """When it saved, or just after it loaded; by model-parallel rank."""
    losses: tuple[float, ...]
    """Of the steps after that."""
    steps: int
    """That were made before."""

    @property
    def tag(self) -> Path:
        """The checkpoint's own folder."""
        return self.folder / (self.folder / "latest").read_text().strip()

    @property
    def truth(self) -> State:
        """The only state of a run without model parallelism."""
        (state,) = self.states.values()
        return state

    def joined(self, kind: str) -> dict[str, torch.Tensor]:
        """``param``, ``exp_avg``, ``exp_avg_sq`` or ``module`` of a Megatron stack: full tensors, joined over tensor-parallel ranks.

        Of a parameter that several stages hold, the first stage's is taken: the tied weight is the same in all, and the
        others beside it take no part in the last stage.
        """
        stack = STACKS[self.job.model]
        full: dict[str, torch.Tensor] = {}
        for stage in range(self.job.pp):
            parts = [getattr(self.states[stage, rank, 0], kind) for rank in range(self.job.tp)]
            full = {name: join(name, [part[name] for part in parts], stack) for name in parts[0]} | full
        return full

    def next_loss(self, folder: Path) -> float:
        """Loss that a Hugging Face checkpoint has on the next step's tokens: `losses[0]`, if it holds these weights."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        return self.next_loss_of(model)

    def next_loss_of(self, model: torch.nn.Module) -> float:
        """The same of a transformers model in memory."""
        ids = token_ids(self.job, self.steps)
        with torch.no_grad():
            return float(loss(model.eval()(input_ids=ids, use_cache=False).logits, ids))


class DeepSpeed:
    """Started by the first call, ended by `close` or the ``with`` block."""

    def __init__(self) -> None:
        self._server = RankServer(deepspeed_runs.prepare)

    def train(self, job: Job, folder: Path, *, steps: int = 2, more: int = 2, client_state: Mapping[str, Any] | None = None) -> Run:
        """Train from scratch, save after ``steps`` steps, go on for ``more``.

        Parameters
        ----------
        job
            Model, layout and configuration.
        folder
            Where ``save_checkpoint`` writes; models of transformers get their ``config.json`` there too.
        client_state
            Keys that the client adds to the model-states files.
        """
        folder = Path(folder).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        request = Training(job, str(folder), steps, more, tuple((client_state or {}).items()))
        return _run(job, folder, self._server.ask(request), steps)

    def resume(self, job: Job, folder: Path, *, universal: bool = False, done: int = 2, more: int = 2) -> Run:
        """Build the job's model anew, load a checkpoint into it, and go on for ``more`` steps.

        Parameters
        ----------
        folder
            Holds ``latest``, or ``latest_universal`` if ``universal``.
        done
            Steps that the checkpoint must say were made.
        """
        folder = Path(folder).absolute()
        return _run(job, folder, self._server.ask(Resumption(job, str(folder), universal, done, more)), done)

    def zero_to_fp32(self, folder: Path, *, exclude_frozen: bool = False) -> dict[str, torch.Tensor]:
        """What ``zero_to_fp32`` makes of a ZeRO checkpoint; ``folder`` holds ``latest``."""
        return self._server.ask(ZeroToFp32(str(Path(folder).absolute()), exclude_frozen))[0]

    def to_universal(self, tag: Path, out: Path, *, inject: bool = False, strict: bool = True) -> Path:
        """Run ``ds_to_universal``; the folder that ``resume`` loads, where ``latest_universal`` names the converted one.

        Parameters
        ----------
        tag
            The checkpoint's own folder, ``global_step2``.
        out
            Folder to make; ``out/<name of tag>_universal`` holds the result.
        inject
            ``--inject_missing_state``: for a client that saved no ``universal_checkpoint_info``.
        strict
            Refuse patterns that no parameter matches.
        """
        out = Path(out).absolute()
        out.mkdir(parents=True, exist_ok=True)
        self._server.ask(Universal(str(Path(tag).absolute()), str(out / f"{Path(tag).name}_universal"), inject, strict))
        return out

    def load_shards(
        self,
        files: Sequence[Path],
        *,
        version: float | None,
        world: int,
        rank: int,
        module_key: str | None = "auto",
        is_pipe_parallel: bool = False,
    ) -> dict[str, torch.Tensor]:
        """What ``SDLoaderFactory`` gives one of ``world`` tensor-parallel ranks from Megatron shards.

        Parameters
        ----------
        files
            The shards, in the order of their ranks.
        version
            Checkpoint version, which says how fused query-key-value rows lie; None takes the file's own.
        module_key
            Key under which a file holds its tensors: ``"auto"`` finds ``module`` or ``model``, None is for layer files.
        """
        paths = tuple(str(Path(file).absolute()) for file in files)
        return self._server.ask(ShardLoad(paths, version, world, rank, module_key, is_pipe_parallel))[0]

    def close(self) -> None:
        """End the server; another call starts a new one."""
        self._server.close()

    def __enter__(self) -> DeepSpeed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _run(job: Job, folder: Path, answers: list[dict[str, Any]], steps: int) -> Run:
    """Join what the ranks returned; data-parallel ranks must agree to the bit."""
    states: dict[Rank, State] = {}
    for answer in answers:
        state = states.setdefault(answer["rank"], answer["truth"])
        _assert_equal(state, answer["truth"])
        assert answer["losses"] == answers[0]["losses"]
    return Run(job, folder, states, tuple(answers[0]["losses"]), steps)


def _assert_equal(one: State, two: State) -> None:
    for field in dataclasses.fields(State):
        a, b = getattr(one, field.name), getattr(two, field.name)
        if not isinstance(a, dict):
            assert a == b, field.name
            continue
        assert list(a) == list(b), field.name
        for name in a:
            assert torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name], (field.name, name)
