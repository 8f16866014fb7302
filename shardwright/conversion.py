"""Conversions: a whole plan, and how to show, save and run it."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint, PathLike, no_values, open
from .errors import ReplicaMismatchError, UsageError
from .planner.cost import cost, figures
from .planner.fingerprint import plan_hash
from .planner.identity import FILE_NAME, read_identity
from .planner.layout import Layout
from .planner.passes.build import build
from .planner.passes.check import check
from .planner.passes.planes import repeats
from .planner.plan import Cost, Plan
from .planner.request import Request
from .planner.store import LocalStore
from .sizes import parse_size

if TYPE_CHECKING:
    import networkx as nx

    from .executors.execute import Outcome
    from .executors.progress import Progress

__all__ = ["Conversion", "convert", "load_plan", "plan"]


def plan(
    source: Checkpoint | PathLike,
    out: PathLike | None = None,
    *,
    to: str,
    layout: Layout | None = None,
    memory: int | str | None = None,
    workers: int | None = None,
    **options: Any,
) -> Conversion:
    """Decide a whole conversion on paper: headers in, a proven plan out; no tensor is read.

    Parameters
    ----------
    to
        Target format.
    memory
        Bound on this process's memory: bytes, or ``"8GiB"``. Default: a quarter of what is free, at most 2 GiB.
    options
        Fields of `shardwright.planner.passes.request.Request`: ``dialect, container, spec, dtype, quantize,
        max_shard_size, pad_vocab_to, trust_replicas, drop, optimizer, sha256``.

    Raises
    ------
    UsageError
        The options contradict each other.
    Refusal
        Source and request do not fit.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open(source)
    try:
        request = Request(to, layout or Layout(), **options)
    except TypeError as error:
        raise UsageError(str(error).replace("Request.__init__()", "plan()")) from None
    # In the recipe, too: whoever verifies the target leaves out the same.
    request = replace(request, drop=tuple(dict.fromkeys((*checkpoint.source.drop, *request.drop))))
    return Conversion(build(checkpoint.source, request), out, memory=memory, workers=workers)


def load_plan(path: PathLike) -> Conversion:
    """A saved plan, checked again."""
    from .planner import codec

    found, root = codec.load(Path(path))
    return Conversion(found, root)


def convert(
    source: Checkpoint | PathLike,
    out: PathLike,
    *,
    to: str,
    overwrite: bool = False,
    fresh: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Conversion:
    """Plan and execute, or go on with what an earlier run left; the finished conversion."""
    scheduler = options.pop("scheduler", "threads")
    job = plan(source, out, to=to, **options)
    job.execute(scheduler=scheduler, overwrite=overwrite, fresh=fresh, progress=progress)
    return job


class Conversion:
    """A plan and how to run it."""

    def __init__(self, plan: Plan, out: PathLike | None = None, *, memory: int | str | None = None, workers: int | None = None) -> None:
        from .executors.host import default_memory, default_workers

        self.plan = plan
        self.out = None if out is None else os.fspath(out)
        self.memory = default_memory() if memory is None else parse_size(memory)
        self.workers = default_workers() if workers is None else workers
        if self.workers < 1:
            raise UsageError("workers must be at least 1", actual=workers)

    @cached_property
    def cost(self) -> Cost:
        """What it moves and what memory it takes."""
        return cost(self.plan, self.memory, self.workers)

    @cached_property
    def hash(self) -> str:
        """The plan's hash."""
        return plan_hash(self.plan)

    def check(self) -> None:
        """Prove the plan again."""
        check(self.plan)

    def summary(self) -> dict[str, Any]:
        """The object that ``plan --json`` prints."""
        return figures(self.plan, self.cost)

    def explain(self, name: str) -> str:
        """How one tensor is made, in words."""
        from .planner.explain import explain

        return explain(self.plan, name)

    def lineage(self, pattern: str | None = None) -> nx.MultiDiGraph[Any]:
        """Source file → stored → hub → stored → target file → rank, as a graph of tensors."""
        from .planner.lineage import lineage

        return lineage(self.plan, pattern)

    def visualize(self, path: PathLike) -> None:
        """Write the plan as one static page."""
        from .planner.report import render

        text = render(self.plan, self.cost)
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError("the page cannot be written", file=path, actual=error.strerror) from None

    def save(self, path: PathLike) -> None:
        """Save the plan as JSON; `load_plan` and ``convert --plan`` take it."""
        from .planner import codec

        try:
            codec.save(self.plan, Path(path), target_root=self.out)
        except OSError as error:
            raise UsageError("the plan cannot be written", file=path, actual=error.strerror) from None

    def is_done(self) -> bool:
        """Whether the target exists already, made by this very plan."""
        if self.out is None or not (Path(self.out) / FILE_NAME).is_file():
            return False
        identity = read_identity(LocalStore(self.out))
        return identity is not None and identity.get("plan_hash") == self.hash

    def tidy(self) -> None:
        """Where `is_done`: remove what is left beside the target of a run that was ended while it cleaned up."""
        from .executors.publish import tidy

        assert self.out is not None
        tidy(Path(self.out), self.plan)

    def execute(
        self, *, scheduler: Any = "threads", overwrite: bool = False, fresh: bool = False, progress: Progress | None = None
    ) -> Outcome:
        """Run it, or what an earlier run has left of it, and publish the target.

        Parameters
        ----------
        scheduler
            ``"threads"``, a dask scheduler's address, or a dask Client.
        overwrite
            Replace what the target holds.
        fresh
            Forget what an unfinished run left.

        Raises
        ------
        Refusal
            Nothing was written.
        ContradictionError
            The data contradicts the plan; nothing was published, and nothing is left to resume.
        RunError
            It failed or was stopped; nothing was published, and the same call resumes.
        """
        from .executors.execute import execute

        if self.plan.on_paper:
            raise no_values(self.plan.source_root)
        if self.out is None:
            raise UsageError("the plan has no target", remedy="Give OUT when planning")
        try:
            return execute(
                self.plan,
                self.out,
                memory=self.memory,
                workers=self.workers,
                overwrite=overwrite,
                fresh=fresh,
                progress=progress,
                scheduler=scheduler,
            )
        except ReplicaMismatchError as error:
            raise _with_names(self.plan, error) from None


def _with_names(plan: Plan, error: ReplicaMismatchError) -> ReplicaMismatchError:
    """The error with the stored names of the two copies, where they go by different ones: tied tensors."""
    names = {(t.file, t.offset): t.name for t in plan.source_tensors}
    held = dict.fromkeys(names[place] for place in error.places if place in names)
    if len(held) > 1 and not any(map(repeats, held)):
        error.message += f" ({' and '.join(held)}, which the config ties)"
        error.remedy = "If they are not tied, set tie_word_embeddings to false in config.json; else find out which copy is right"
    return error
