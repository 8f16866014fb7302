"""What one input may do to the process that parses it: bounded time, bounded memory, and nothing outside.

1. Time: a timer counts the process's CPU seconds and raises in the middle of the parse; a call into C that cannot be
   interrupted is measured when it returns.
2. Memory: the address space is capped, so that one allocation sized by a number from the file fails at once, and what
   a parse holds at its peak is measured for a part of the inputs, against a multiple of the input's length.
3. The outside: an audit hook sees each file opened, module imported, code run, process or socket made. None of it is a
   parser's business, except to read and list the package's own tables and the folder that a target lays its input out in.

A breach is a `BreachError`, no `Exception`: no parser can take it for bad input. One that is swallowed is remembered.

Boundary: `limit_memory` and the hook stay for the process's life; the hook is idle outside `guarded`.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType

import shardwright

__all__ = ["BreachError", "guarded", "limit_memory", "scratch"]

SECONDS = 3.0
"""CPU seconds for one input, whatever it says; genuine headers of this size take milliseconds."""
ADDRESS_SPACE = 4 << 30
"""Bytes that a fuzzing process may map beyond what it has when it begins."""
PEAK_ALLOWANCE, PEAK_FACTOR = 16 << 20, 100
"""Bytes that a parse may hold: so many, and so many times the input's length. One byte of JSON or pickle makes an object of 50 to 100."""

_PACKAGE = str(Path(shardwright.__file__).parent) + os.sep
_HARMLESS = frozenset({"compile", "array.__new__", "sys._getframe", "builtins.id", "object.__getattr__", "setopencodehook", "time.sleep"})
"""Events that change nothing and reach nothing; ``compile`` is also what `ast.parse` raises, and running the result is ``exec``."""


class BreachError(BaseException):
    """An input made its parser do what no parser should."""


class _State:
    active = False
    breach: BreachError | None = None
    installed = False


@cache
def scratch() -> Path:
    """A folder of this process's own, for targets whose parser wants a path; the guard lets them use it."""
    folder = tempfile.TemporaryDirectory(prefix="shardwright-fuzz-")
    _KEPT.append(folder)
    return Path(folder.name).resolve()


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def limit_memory() -> None:
    """Cap this process's address space; call it in a process made for fuzzing only."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    cap = pages * resource.getpagesize() + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (cap, cap))


@contextmanager
def guarded(nbytes: int, *, measure: bool) -> Iterator[None]:
    """Run the body, which parses an input of `nbytes`, under all guards; `measure` adds the peak of its memory.

    Raises
    ------
    BreachError
        The body went past a limit or reached outside; also when it swallowed the error.
    """
    _install()
    scratch()
    _State.breach = None
    if measure:
        tracemalloc.start()
    started = time.process_time()
    before = signal.signal(signal.SIGPROF, _too_slow)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    _State.active = True
    try:
        yield
    finally:
        _State.active = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        peak = tracemalloc.get_traced_memory()[1] if measure else 0
        if measure:
            tracemalloc.stop()
        # Here, so that a refusal cannot hide a breach that was swallowed on the way to it.
        _judge(nbytes, time.process_time() - started, peak)


def _judge(nbytes: int, seconds: float, peak: int) -> None:
    if _State.breach is not None:
        raise _State.breach
    if seconds > SECONDS:
        raise BreachError(f"{seconds:.1f} CPU seconds for {nbytes} bytes")
    if peak > PEAK_ALLOWANCE + PEAK_FACTOR * nbytes:
        raise BreachError(f"{peak} bytes held at once for an input of {nbytes}")


def _breach(message: str) -> None:
    _State.active = False
    _State.breach = BreachError(message)
    raise _State.breach


def _too_slow(_signal: int, _frame: FrameType | None) -> None:
    if _State.active:
        _breach(f"more than {SECONDS} CPU seconds")


def _install() -> None:
    if not _State.installed:
        _State.installed = True
        sys.addaudithook(_audit)


def _audit(event: str, args: tuple[object, ...]) -> None:
    if not _State.active or event in _HARMLESS:
        return
    if event == "open" and _may_open(args[0], args[1], args[2]):
        return
    if event in ("os.listdir", "os.scandir") and any(_inside(args[0], folder) for folder in (_PACKAGE, str(scratch()))):
        return
    _breach(f"{event} {args!r:.200}")


def _may_open(path: object, mode: object, flags: object) -> bool:
    reads = mode in ("r", "rb", None) and isinstance(flags, int) and not flags & (os.O_WRONLY | os.O_RDWR)
    return (reads and _inside(path, _PACKAGE)) or _inside(path, str(scratch()))


def _inside(path: object, folder: str) -> bool:
    # Symbolic links are followed: a link in the scratch folder leads out of it.
    return isinstance(path, str | os.PathLike) and os.path.realpath(path).startswith(os.path.join(folder, ""))
