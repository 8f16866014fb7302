"""Verification: a target is opened as a stranger would, and every byte is compared with what the source gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint, PathLike, no_values, open
from .conversion import Conversion
from .planner.passes.build import read_names
from .planner.passes.locate import locate
from .planner.passes.request import Request
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
        ``"values"``: every target byte recomputed from the source; ``"names"``: names, dtypes and shapes only.
    tensors, equal
        Target tensors, and those found equal (0 at level names).
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

    Without a source, names, dtypes and shapes are checked against the target's own config and layout.

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
    count = sum(len(unit) for unit in target.source.units.values())
    if source is None and not target.source.on_paper:
        read_names(target.source)
        return Verification("names", count, 0, (), (), ())
    if source is None:
        raise no_values(target.path)
    origin = source if isinstance(source, Checkpoint) else open(source, family=family, config=config, vocab_size=vocab_size)
    if on_paper := next((c for c in (target, origin) if c.source.on_paper), None):
        raise no_values(on_paper.path)
    asked = target.source
    request = Request(asked.format, asked.layout, dialect=asked.dialect.name, container=asked.container, spec=asked.spec)
    located = locate(origin.source, request, asked)
    if located.missing or located.extra or located.different:
        return Verification("names", count, 0, located.different, located.missing, located.extra)
    from .executors.execute import compare

    job = Conversion(located.plan, target.path, memory=memory, workers=workers)
    found = compare(job.plan, target.path, memory=job.memory, workers=job.workers, progress=progress)
    different = tuple(
        dict.fromkeys(f"{d.tensor}@{d.rank}, element {d.index} ({d.file})" if d.tensor else f"{d.file}: {d.what}" for d in found)
    )
    return Verification("values", count, count - len({(d.tensor, d.rank) for d in found if d.tensor}), different, (), ())
