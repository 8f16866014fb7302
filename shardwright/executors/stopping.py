"""Stopping: one flag, the first cause, and the signals that set it.

An error ends every tile between two strips. A first signal lets running tiles finish, so that their work counts; a
second one ends them as an error does.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..errors import RunError, ShardwrightError, StoppedError

__all__ = ["Stop", "as_ours"]


def as_ours(cause: BaseException) -> BaseException:
    """An error of the system as a `RunError`; everything else as it is."""
    if isinstance(cause, OSError) and not isinstance(cause, ShardwrightError):
        error = RunError(f"the system reports an error: {cause.strerror or cause}", file=cause.filename)
        error.__cause__ = cause
        return error
    return cause


class Stop:
    """A flag that says that a run ends early, and why.

    >>> stop = Stop()
    >>> stop.set(ValueError("first")); stop.set(ValueError("second"))
    >>> stop.is_set(), stop.cause
    (True, ValueError('first'))
    """

    def __init__(self) -> None:
        self.cause: BaseException | None = None
        self._flag = threading.Event()
        self._at_once = threading.Event()
        # Re-entrant: a signal's handler runs in the main thread, which may be inside `set`.
        self._lock = threading.RLock()

    def is_set(self) -> bool:
        """Whether the run ends early: no tile begins any more."""
        return self._flag.is_set()

    def at_once(self) -> bool:
        """Whether running tiles end early, too."""
        return self._at_once.is_set()

    def set(self, cause: BaseException, *, finish_tiles: bool = False) -> None:
        """Set the flag; the first cause is kept."""
        with self._lock:
            if self.cause is None:
                self.cause = cause
        self._flag.set()
        if not finish_tiles:
            self._at_once.set()

    def raise_cause(self) -> None:
        """Raise the first cause, if there is one."""
        if self.cause is not None:
            raise as_ours(self.cause)

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM set the flag for the length of the block; only the main thread can have them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handler(number: int, frame: FrameType | None) -> None:
            self.set(StoppedError(f"stopped by {signal.Signals(number).name}"), finish_tiles=not self.is_set())

        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)
