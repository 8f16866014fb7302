"""Progress of a run, told from any thread: a bar on a terminal, a line now and then elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from threading import Lock
from typing import Any, Protocol, TextIO

__all__ = ["NullProgress", "Progress", "StderrProgress"]


class Progress(Protocol):
    """Told what a run does. Every method may be called from any thread."""

    def start(self, total_bytes: int) -> None:
        """A run begins that will write that much."""

    def advance(self, nbytes: int) -> None:
        """That much more was written."""

    def stop(self) -> None:
        """The run ended, well or not."""


class NullProgress:
    """Says nothing."""

    def start(self, total_bytes: int) -> None:
        """Nothing."""

    def advance(self, nbytes: int) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


class StderrProgress:
    """Bytes, rate and time left on standard error; rich's bar on a terminal, plain lines elsewhere.

    Parameters
    ----------
    doing
        One word beside the bar.
    every
        Seconds between plain lines.
    """

    def __init__(self, stream: TextIO | None = None, *, doing: str = "writing", every: float = 5.0) -> None:
        self._doing = doing
        self._stream = sys.stderr if stream is None else stream
        self._every = every
        self._lock = Lock()
        self._total = self._done = 0
        self._began = self._said = 0.0
        self._bar: Any = None
        self._task: Any = None

    def start(self, total_bytes: int) -> None:
        """Show the bar, or remember when it began."""
        self._total, self._done = total_bytes, 0
        self._began = self._said = time.monotonic()
        if self._stream.isatty():
            self._bar = _rich_bar(self._stream)
            self._task = self._bar.add_task(self._doing, total=total_bytes)
            self._bar.start()

    def advance(self, nbytes: int) -> None:
        """Count, and say so when it is time."""
        with self._lock:
            self._done += nbytes
            if self._bar is not None:
                self._bar.update(self._task, completed=self._done)
            elif (now := time.monotonic()) - self._said >= self._every:
                self._said = now
                print(self._line(now), file=self._stream, flush=True)

    def stop(self) -> None:
        """Take the bar away."""
        with self._lock:
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    def _line(self, now: float) -> str:
        rate = self._done / max(now - self._began, 1e-9)
        left = (self._total - self._done) / rate if rate else 0.0
        share = 100 * self._done / self._total if self._total else 100.0
        return f"{share:3.0f} %  {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB  {rate / 1e9:.2f} GB/s  {left:.0f} s left"


def _rich_bar(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Bar(*columns, console=Console(file=stream), transient=True)
