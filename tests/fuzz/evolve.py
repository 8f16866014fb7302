"""Fuzzing guided by what inputs reach: a corpus that grows by every input that does something new.

1. The working corpus begins with the seeds and the kept corpus. A parent is drawn, mutated one to three times and parsed.
2. What an input *does* is the lines of the target's modules that it runs and the kind of its refusal. One that does
   anything not done before joins the working corpus, and is written to a folder if there is one.
3. Parents are accepted inputs in seven draws of ten, so that mutations get past the outer checks; newer ones more often.
4. `minimise` goes the other way: of many inputs, few and short ones that together reach all that all of them do.

Only functions with lines not yet reached are traced, so that tracing costs little once most have been. This is what atheris
would do here, in a hundred lines: with mutations that know the structure, the feedback is all that is needed from it.
"""

from __future__ import annotations

import hashlib
import importlib
import random
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from .harness import MEASURED, Statistics, Target, attempt, corpus, signature

__all__ = ["Reached", "evolve", "minimise"]

LARGEST = 1 << 16
"""Bytes of a parent; children of larger ones would take most of the time."""


class Reached:
    """Which lines of `modules` have been run; `take` gives those that are new since it was last called."""

    def __init__(self, modules: Iterable[str]) -> None:
        self.files = {importlib.import_module(name).__file__ for name in modules}
        self.seen: set[tuple[str, int]] = set()
        self._new: list[tuple[str, int]] = []
        # By identity: a code object is expensive to hash. Each is kept, so that its identity stays its own.
        self._pending: dict[int, set[int]] = {}
        self._kept: list[CodeType] = []

    def take(self) -> list[tuple[str, int]]:
        new, self._new = self._new, []
        return new

    @contextmanager
    def tracing(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(before)

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        pending = self._pending.get(id(code))
        if pending is None:
            pending = {line for _, _, line in code.co_lines() if line} if code.co_filename in self.files else set()
            pending -= {line for file, line in self.seen if file == code.co_filename}
            self._pending[id(code)] = pending
            self._kept.append(code)
        if not pending:
            return None
        file = code.co_filename

        def line(frame: FrameType, event: str, arg: Any) -> Any:
            if frame.f_lineno in pending:
                pending.discard(frame.f_lineno)
                self.seen.add((file, frame.f_lineno))
                self._new.append((file, frame.f_lineno))
            return line if pending else None

        return line(frame, event, arg)


def evolve(target: Target, runs: int, seed: int, into: Path | None = None) -> Statistics:
    """Parse `runs` mutations, following what is new; the new ones are written `into` that folder.

    Raises
    ------
    FailedInputError
        An input failed.
    """
    rng = random.Random(f"{target.name}:{seed}")
    reached, kinds, found = Reached(target.modules), set[str](), Statistics()
    pools: tuple[list[bytes], list[bytes]] = ([], [])

    def once(data: bytes, index: int) -> None:
        started = time.perf_counter()
        # Measured inputs go untraced, and what is traced is not timed as if it were not.
        measure = index % MEASURED == MEASURED - 1
        if measure:
            error = attempt(target, data)
        else:
            with reached.tracing():
                error = attempt(target, data, measure=False)
        found.count(error, time.perf_counter() - started)
        kind = "" if error is None else signature(error)
        if reached.take() or kind not in kinds:
            kinds.add(kind)
            if len(data) < LARGEST:
                pools[error is not None].append(data)
            if into is not None:
                _write(into, data)

    for data in [*target.seeds(), *corpus(target)]:
        once(data, 0)
    found = Statistics()
    for index in range(runs):
        once(_child(target, pools, rng), index)
    return found


def _child(target: Target, pools: tuple[list[bytes], list[bytes]], rng: random.Random) -> bytes:
    pool = pools[0] if pools[0] and (not pools[1] or rng.random() < 0.7) else pools[1]
    # The larger of two draws: newer parents more often.
    data = pool[max(rng.randrange(len(pool)), rng.randrange(len(pool)))] if rng.random() < 0.5 else rng.choice(pool)
    for _ in range(1 if rng.random() < 0.7 else rng.randint(2, 3)):
        data = target.mutate(data, rng)
    return data


def minimise(target: Target, inputs: Iterable[bytes]) -> list[bytes]:
    """The shortest inputs, greedily, that reach every line and every type of refusal that `inputs` do."""
    kept: list[bytes] = []
    reached, kinds = Reached(target.modules), set[str]()
    for data in sorted(set(inputs), key=lambda one: (len(one), one)):
        with reached.tracing():
            error = attempt(target, data, measure=False)
        kind = type(error).__name__
        if reached.take() or kind not in kinds:
            kinds.add(kind)
            kept.append(data)
    return kept


def _write(folder: Path, data: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)
