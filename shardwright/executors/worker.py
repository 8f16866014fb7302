"""What a cluster's worker does with one tile.

1. A payload (bytes) holds the tile's jobs, with only the programs and files that they need. It is at most 1 MiB.
2. The worker keeps one `_Session` per run: open files, aligned programs, and an arena that bounds its memory.
3. The tile runs as it does locally. Then the worker syncs every file that it touched, looks at the sources again, and
   only then returns a small receipt: bytes, padding, and the checksums of what it wrote.
4. `halt` sets a run's stop flag: tiles that come later do not start; tiles that run end between two strips, or are
   finished first. `active` tells how many still run.

Boundary: knows nothing of dask; the functions here are what dask calls.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

from ..errors import RunError, ShardwrightError
from ..planner.plan import Program, SourceFile, TargetFile
from .arena import Arena
from .layouts import Layouts
from .sources import RESTORE, SourceFiles
from .stopping import as_ours
from .targets import TargetFiles
from .tile import Job, Receipt, Runner, Stopped

__all__ = ["RECEIPT_BYTES", "Payload", "active", "close", "halt", "run_tile"]

RECEIPT_BYTES = 4 << 10
"""Largest receipt, apart from `EXTENT_BYTES` for each checksummed extent."""
EXTENT_BYTES = 64
SESSIONS = 4
"""Runs whose files a worker keeps open."""


@dataclass(frozen=True, slots=True)
class Payload:
    """One tile for a worker; `token` names the run."""

    token: str
    strip_bytes: int
    slab_bytes: int
    lanes: int
    source_root: str
    target_root: str
    sources: dict[int, SourceFile]
    targets: dict[int, TargetFile]
    programs: dict[int, Program]
    jobs: list[Job]


class _Session:
    """One run on this worker."""

    def __init__(self, payload: Payload) -> None:
        self.sources = SourceFiles(payload.source_root, {}, remedy=RESTORE)
        self.targets = TargetFiles(payload.target_root, {})
        self.layouts = Layouts({}, payload.strip_bytes)
        self.arena = Arena(payload.lanes * payload.slab_bytes)
        self.active = 0

    def learn(self, payload: Payload) -> None:
        """Take over the payload's files and programs; numbers mean the same in every payload of a run."""
        self.sources.files.update(payload.sources)
        self.targets.files.update(payload.targets)
        self.layouts.programs.update(payload.programs)

    def close(self) -> None:
        """Close every file."""
        self.sources.close()
        self.targets.close()


_sessions: OrderedDict[str, _Session] = OrderedDict()
_halted: OrderedDict[str, bool] = OrderedDict()
"""Runs that end, and whether their running tiles are to be finished."""
_lock = Lock()


def run_tile(payload: bytes) -> Receipt:
    """Run one tile; returns after its bytes are on the device.

    Raises
    ------
    RunError, ContradictionError, Refusal
        As a local run does, or the run was halted.
    """
    tile: Payload = pickle.loads(payload)
    with _session(tile) as session:
        runner = Runner(session.layouts, session.sources, strip_bytes=tile.strip_bytes, stopping=lambda: not _halted.get(tile.token, True))
        try:
            with session.arena.take(tile.slab_bytes) as slab:
                receipt = runner.run(tile.jobs, session.targets, slab)
            session.targets.sync(sorted({number for number, *_ in receipt.extents}))
            session.sources.check(receipt.sources)
        except Stopped:
            raise RunError("the run was stopped") from None
        except ShardwrightError:
            raise
        except OSError as error:
            raise as_ours(error) from error
    size = len(pickle.dumps(receipt))
    assert size <= RECEIPT_BYTES + EXTENT_BYTES * len(receipt.extents), f"a receipt of {size} bytes"
    return receipt


@contextmanager
def _session(tile: Payload) -> Iterator[_Session]:
    with _lock:
        if tile.token in _halted:
            raise RunError("the run was stopped")
        session = _sessions.get(tile.token)
        if session is None:
            session = _sessions[tile.token] = _Session(tile)
            for token in [t for t, s in _sessions.items() if not s.active and t != tile.token][: max(0, len(_sessions) - SESSIONS)]:
                _sessions.pop(token).close()
        session.learn(tile)
        session.active += 1
    try:
        yield session
    finally:
        with _lock:
            session.active -= 1


def halt(token: str, finish_tiles: bool) -> None:
    """Stop a run on this worker; its running tiles end early, or are finished first."""
    with _lock:
        _halted[token] = finish_tiles
        while len(_halted) > 64:
            _halted.popitem(last=False)


def active(token: str) -> int:
    """Tiles of a run that are running here."""
    with _lock:
        return _sessions[token].active if token in _sessions else 0


def close(token: str) -> None:
    """Close a run's files."""
    with _lock:
        session = _sessions.pop(token, None)
    if session is not None:
        session.close()
