"""The memory watchdog: a run that passes its bound is stopped while it can still be resumed, before the kernel ends it.

Anonymous memory of this process is sampled; pages of files do not count, the kernel takes those back. What the process
held before the run beyond the model's base (a program that imports shardwright may hold much) is added to the bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

from ..errors import RunError
from ..planner.passes.memory import Fit
from .host import held_bytes
from .stopping import Stop

__all__ = ["anonymous_bytes", "watched"]

INTERVAL = 0.25
"""Seconds between samples."""


def anonymous_bytes() -> int:
    """Anonymous memory that this process has resident; 0 where the system does not say."""
    return held_bytes("RssAnon") or 0


@contextmanager
def watched(memory: int, fit: Fit, plan_bytes: int, stop: Stop) -> Iterator[None]:
    """Stop the run when the process passes `memory` bytes of anonymous memory."""
    bound = memory + max(0, anonymous_bytes() - fit.base_bytes - plan_bytes)
    ended = Event()

    def watch() -> None:
        while not ended.wait(INTERVAL):
            if (held := anonymous_bytes()) > bound:
                stop.set(
                    RunError(
                        "the run needs more memory than its bound",
                        expected=f"at most {bound} bytes",
                        actual=f"{held} bytes",
                        remedy="Resume with a larger --memory or fewer --workers",
                    )
                )
                return

    thread = Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
