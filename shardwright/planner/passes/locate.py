"""The plan onto a target that exists already: `verify` compares through it.

The same path as `build`, but each target operand's place is read from the target's own headers instead of laid out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from ..formats.base import Filing, Source
from ..plan import Plan, TargetFile, TensorEntry
from ..request import Request
from ..tensor.dtypes import dtype as dtype_of
from .build import assemble, no_collector, sides_of
from .planes import hub_name
from .request import Cast, settle_words
from .rows import RowInstance
from .sides import WEIGHT, Wanted, place
from .tiling import TILE_BYTES

__all__ = ["Located", "locate"]


@dataclass(frozen=True, slots=True)
class Located:
    """A plan onto an existing target, unless the target's names, dtypes or shapes are not the request's."""

    plan: Plan
    missing: tuple[str, ...]
    different: tuple[str, ...]
    extra: tuple[str, ...]


def locate(source: Source, request: Request, target: Source) -> Located:
    """The plan whose target operands are those of an existing `target`, found through its own headers."""
    with no_collector():
        grown = target.config["vocab_size"] if target.config["vocab_size"] > source.config["vocab_size"] else None
        words = replace(settle_words(source, request), padded_vocab=target.padded_vocab or grown, scheme=target.scheme)
        side, wanted = sides_of(source, request, words, _as_stored(target))
        paths = sorted(target.files)
        number = {path: i for i, path in enumerate(paths)}
        found: set[tuple[str, int, int, str]] = set()
        units = {WEIGHT: target.units, **target.planes}
        entries: list[TensorEntry] = []
        missing: list[str] = []
        different: list[str] = []

        def where(w: Wanted, rank: int) -> tuple[int, int]:
            found.add((w.plane, rank, w.chunk, w.name))
            stored = units.get(w.plane, {}).get((rank, w.chunk), {}).get(w.name)
            if stored is None:
                missing.append(f"{_named(w.plane, w.name)}@{rank}: {w.dtype} {w.shape}")
                return 0, 0
            if (stored.dtype, stored.shape) != (w.dtype, w.shape) or stored.form is not None:
                different.append(f"{_named(w.plane, w.name)}@{rank}: expected {w.dtype} {w.shape}, actual {stored.dtype} {stored.shape}")
            entries.append(TensorEntry(_named(w.plane, w.name), rank, w.dtype, w.shape, number[stored.file], stored.offset))
            return number[stored.file], stored.offset

        for at in range(max((len(w.ranks) for w in wanted.wanted), default=0)):
            members = [i for i, w in enumerate(wanted.wanted) if len(w.ranks) > at]
            places = [where(w, w.ranks[at]) for w in map(wanted.wanted.__getitem__, members)]
            place(wanted, members, at, [file for file, _ in places], [offset for _, offset in places])
        extra = [
            f"{_named(plane, name)}@{rank}"
            for plane, held in units.items()
            for (rank, chunk), unit in held.items()
            for name in unit
            if (plane, rank, chunk, name) not in found and not any(fnmatchcase(name, i.pattern) for i in words.dialect.ignore)
        ]
        files = [TargetFile(path, target.store.stat(path).nbytes) for path in paths]
        plan = assemble(source, request, words, side, wanted, files, entries, Filing((), (), ()), TILE_BYTES)
        return Located(plan, tuple(missing), tuple(different), tuple(extra))


def _named(plane: str, name: str) -> str:
    return name if plane == WEIGHT else hub_name(plane, name)


def _as_stored(target: Source) -> Cast:
    """Whatever dtype an existing target stores a row in; a quantised row goes in as it is."""

    def cast(row: RowInstance, name: str, before: str) -> str:
        stored = target.units.get((target.layout.rank(pp=row.pp, ep=row.ep or 0), row.chunk), {}).get(row.name)
        taken = target.scheme is not None and stored is not None and target.scheme.takes(name, stored.shape, before)
        return before if stored is None or taken or dtype_of(stored.dtype).kind != "float" else stored.dtype

    return cast
