"""The ledger: finished tiles, made durable and then journaled, in batches, by a thread of its own.

1. Lanes hand in finished tiles and go on. A batch closes when its tiles have written `BATCH_BYTES`, or its first one is
   `BATCH_SECONDS` old.
2. The batch's target files are synced. Then the source files that its tiles read are looked at again: a tile that may
   have been read from a changed source is never vouched for. Then its lines are appended, and the journal synced. A
   crash at any point costs at most the open batch.
3. Who hands in a tile waits while two batches are behind, so that unsynced data stays bounded (dirty pages count
   against a cgroup).
4. After an error in step 2 nothing more is journaled: a file whose sync has failed once may look clean afterwards. The
   error stops the run.

Boundary: decides when; how files are synced and sources checked is handed in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from threading import Condition, Thread
from types import TracebackType

from .extents import Checksums
from .journal import Journal, tile_line
from .stopping import Stop
from .tile import Receipt

__all__ = ["BATCH_BYTES", "BATCH_SECONDS", "Ledger"]

BATCH_BYTES = 4 << 30
"""Bytes that tiles write between two syncs: each costs the file system a commit for every file, so they are rare."""
BATCH_SECONDS = 30.0
"""Age of the first tile of a batch at which it is synced all the same."""

Files = Callable[[Collection[int]], None]


class Ledger:
    """Takes finished tiles from any thread; a context manager.

    Parameters
    ----------
    sync
        Flushes target files, by number.
    check
        Raises if one of these source files has changed.
    checksums
        Absorbs what the tiles wrote.

    Attributes
    ----------
    total
        The receipts of all journaled tiles, added up.
    """

    def __init__(self, journal: Journal, checksums: Checksums, stop: Stop, *, sync: Files, check: Files) -> None:
        self.total = Receipt()
        self.tiles = 0
        self._journal = journal
        self._checksums = checksums
        self._stop = stop
        self._sync = sync
        self._check = check
        self._changed = Condition()
        self._pending: list[tuple[int, Receipt]] = []
        self._bytes = 0
        self._since = 0.0
        self._closing = self._broken = False
        self._thread = Thread(target=self._run, name="ledger", daemon=True)

    def __enter__(self) -> Ledger:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Journal what is left, whatever happened: those tiles are finished."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def finished(self, tile: int, receipt: Receipt) -> None:
        """A tile has been written; waits while two batches are behind."""
        with self._changed:
            if not self._pending:
                self._since = time.monotonic()
            self._pending.append((tile, receipt))
            self._bytes += receipt.bytes_written
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._bytes < 2 * BATCH_BYTES or self._broken)

    def _run(self) -> None:
        while batch := self._next():
            try:
                self._commit(batch)
            except BaseException as error:
                self._stop.set(error)
                with self._changed:
                    self._broken = True
                    self._changed.notify_all()
                return

    def _next(self) -> list[tuple[int, Receipt]]:
        """The next batch, once it is due; empty when all is done."""
        with self._changed:
            while not self._closing and self._bytes < BATCH_BYTES:
                left = self._since + BATCH_SECONDS - time.monotonic() if self._pending else None
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)
            batch, self._pending, self._bytes = self._pending, [], 0
            self._changed.notify_all()
            return batch

    def _commit(self, batch: list[tuple[int, Receipt]]) -> None:
        self._sync(sorted({number for _, receipt in batch for number, *_ in receipt.extents}))
        self._check(sorted({number for _, receipt in batch for number in receipt.sources}))
        self._journal.append(tile_line(tile, receipt) for tile, receipt in batch)
        for _, receipt in batch:
            self._checksums.absorb(receipt.extents)
            self.total.add(receipt)
            self.tiles += 1
