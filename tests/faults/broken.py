"""Orders of steps that are wrong, for the proof that the crash tests see it."""

from __future__ import annotations

from pathlib import Path

from shardwright.executors.journal import Journal
from shardwright.executors.ledger import Ledger
from shardwright.executors.tile import Receipt

__all__ = ["Forgetful", "Hasty", "unsynced"]


class Hasty(Ledger):
    """Vouches for tiles whose data was never synced."""

    def _commit(self, batch: list[tuple[int, Receipt]]) -> None:
        self._sync = lambda numbers: None
        super()._commit(batch)


class Forgetful(Journal):
    """Goes on behind a torn line without cutting it off."""

    @classmethod
    def resume(cls, path: Path, nbytes: int) -> Journal:
        return super().resume(path, path.stat().st_size)


def unsynced(path: Path) -> None:
    """`descriptors.sync_path` that does not."""
