"""Verification: a target is opened as a stranger would, and every byte is compared with what the source gives.

Three levels, each named in the result:

* ``values``, with the source: the recorded recipe is replayed, quantisation and all, into a sink that compares.
* ``bytes``, without it: every file has the checksums that ``shardwright.json`` recorded when it was written.
* ``names``, where there are no checksums: names, dtypes and shapes fit the target's own config and layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint, PathLike, no_values, open
from .conversion import Conversion
from .errors import CheckpointError
from .planner.identity import FILE_NAME, read_identity
from .planner.passes.build import read_names
from .planner.passes.locate import locate
from .planner.request import Request
from .planner.tables import Family

if TYPE_CHECKING:
    from .executors.progress import Progress

__all__ = ["Verification", "verify"]


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` proved.

    Attributes
    ----------
    level
        ``"values"``: every target byte recomputed from the source; ``"bytes"``: every file as its checksums say;
        ``"names"``: names, dtypes and shapes only.
    tensors, equal
        Target tensors, and those found equal (0 at level names; at level bytes, those in files that are as recorded).
    different, missing, extra
        Names, with what is wrong.
    """

    level: str
    tensors: int
    equal: int
    different: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not (self.different or self.missing or self.extra)


def verify(
    out: Checkpoint | PathLike,
    source: Checkpoint | PathLike | None = None,
    *,
    family: str | Family | PathLike | None = None,
    config: PathLike | Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
    memory: int | str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Open a target as a stranger would, and compare every tensor with what the source gives.

    Without a source, names, dtypes and shapes are checked against the target's own config and layout, and every file
    against the checksums that the target carries.

    Parameters
    ----------
    family
        As for `open`, of both.
    config, vocab_size
        As for `open`, of the source; of the target where no source is given.

    Raises
    ------
    Refusal
        The target or the source cannot be opened.
    """
    own = (config, vocab_size) if source is None else (None, None)
    target = out if isinstance(out, Checkpoint) else open(out, family=family, config=own[0], vocab_size=own[1])
    count = sum(1 for _ in target.source.stored())
    identity = read_identity(target.source.store) or {}
    if source is None and target.source.on_paper:
        raise no_values(target.path)
    if source is None:
        read_names(target.source)
        found = _recorded(identity)
        return _bytes(target, found, count, workers, progress) if found else Verification("names", count, 0, (), (), ())
    origin = source if isinstance(source, Checkpoint) else open(source, family=family, config=config, vocab_size=vocab_size)
    if on_paper := next((c for c in (target, origin) if c.source.on_paper), None):
        raise no_values(on_paper.path)
    asked = target.source
    optimizer = "keep" if asked.planes and origin.source.planes else "drop"
    request = Request(
        asked.format,
        asked.layout,
        dialect=asked.dialect.name,
        container=asked.container,
        spec=asked.spec,
        drop=_dropped(identity),
        trust_replicas=_trusted(identity),
        optimizer=optimizer,
    )
    located = locate(origin.source, request, asked)
    if located.missing or located.extra or located.different:
        return Verification("names", count, 0, located.different, located.missing, located.extra)
    from .executors.execute import compare

    job = Conversion(located.plan, target.path, memory=memory, workers=workers)
    unequal = compare(job.plan, target.path, memory=job.memory, workers=job.workers, progress=progress)
    different = tuple(
        dict.fromkeys(f"{d.tensor}@{d.rank}, element {d.index} ({d.file})" if d.tensor else f"{d.file}: {d.what}" for d in unequal)
    )
    return Verification("values", count, count - len({(d.tensor, d.rank) for d in unequal if d.tensor}), different, (), ())


def _trusted(identity: Mapping[str, Any]) -> bool:
    """Whether the conversion was told to take the first of all copies."""
    recipe = identity.get("recipe")
    return isinstance(recipe, dict) and recipe.get("trust_replicas") is True


def _dropped(identity: Mapping[str, Any]) -> tuple[str, ...]:
    """What the conversion was told to leave out."""
    recipe = identity.get("recipe")
    patterns = recipe.get("drop") if isinstance(recipe, dict) else None
    return tuple(p for p in patterns if isinstance(p, str)) if isinstance(patterns, list) else ()


def _recorded(identity: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The checksums of ``shardwright.json``, by path and kind.

    Raises
    ------
    CheckpointError
        They are not what a conversion writes.
    """
    tables = identity.get("checksums", {})
    found: dict[str, dict[str, str]] = {}
    for kind, table in tables.items() if isinstance(tables, dict) else [("", None)]:
        if kind not in ("crc32", "sha256") or not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
            raise CheckpointError("shardwright.json holds checksums that this version does not know", file=FILE_NAME, actual=kind[:40])
        for path, digits in table.items():
            found.setdefault(path, {})[kind] = digits
    return found


def _bytes(
    target: Checkpoint, recorded: Mapping[str, Mapping[str, str]], count: int, workers: int | None, progress: Progress | None
) -> Verification:
    """Every recorded file read once and compared with its checksums."""
    from .executors.digests import digests_of
    from .executors.host import default_workers
    from .executors.stopping import Stop

    present = {path: tuple(sums) for path, sums in recorded.items() if target.source.store.exists(path)}
    found = digests_of(Path(target.path), present, workers=workers or default_workers(), stop=Stop(), progress=progress)
    different = [(path, kind) for path, sums in found.items() for kind, digits in sums.items() if digits != recorded[path][kind]]
    missing = tuple(path for path in recorded if path not in present)
    bad = {path for path, _ in different} | set(missing)
    equal = sum(tensor.file not in bad for tensor in target.source.stored())
    said = tuple(f"{path}: {kind} {found[path][kind]}, recorded {recorded[path][kind]}" for path, kind in different)
    return Verification("bytes", count, equal, said, missing, ())
