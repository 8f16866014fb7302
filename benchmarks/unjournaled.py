"""shardwright's command line without journal and checksums: what these two cost is the difference to the real one.

The tile loop writes straight to its files, finished tiles are only counted, and the files' checksums stay zeros. The
final sync is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

from shardwright.cli import main
from shardwright.executors import execute, tile
from shardwright.executors.extents import Extent, Sink
from shardwright.executors.tile import Receipt
from shardwright.executors.transfer import Write


class _Unwitnessed:
    """A `Witness` that remembers nothing."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def writing(self, number: int) -> AbstractContextManager[Write]:
        return self._sink.writing(number)

    def extents(self) -> list[Extent]:
        return []


class _Uncounted:
    """A `Ledger` that vouches for nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.total, self.tiles = Receipt(), 0

    def __enter__(self) -> _Uncounted:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Nothing is pending."""

    def finished(self, number: int, receipt: Receipt) -> None:
        self.tiles += 1


@contextmanager
def _without() -> Iterator[None]:
    kept = tile.Witness, execute.Ledger, execute.seal
    tile.Witness, execute.Ledger = _Unwitnessed, _Uncounted  # type: ignore[assignment,misc]
    execute.seal = lambda *_: 0  # type: ignore[assignment]
    try:
        yield
    finally:
        tile.Witness, execute.Ledger, execute.seal = kept  # type: ignore[misc]


if __name__ == "__main__":
    with _without():
        main()
