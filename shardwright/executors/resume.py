"""What an earlier run left in OUT.partial, and whether this run may go on with it.

1. Without a journal nothing is safe on the device yet: there is nothing to resume from.
2. The saved plan is read and proven again. It governs: a newer version, another tile size or other workers make no
   difference. It must belong to the journal.
3. It must be the conversion that is asked for now: the same recipe, and the same source to its last byte and time. Where
   the source lies does not matter.
4. The journal's tiles are done. If it ends with a publish line, the inodes of ``data/`` and OUT tell how far the renames
   came.

Boundary: reads; nothing is changed here.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import PlanError, RunError, TargetError
from ..planner import codec
from ..planner.fingerprint import plan_hash
from ..planner.identity import read_identity
from ..planner.plan import Plan
from ..planner.request import Request
from ..planner.store import LocalStore
from .journal import Recorded, parse
from .sources import changed

__all__ = ["Left", "inspect"]

_FRESH = "Start over with --fresh"


@dataclass(frozen=True, slots=True)
class Left:
    """An unfinished conversion that can be gone on with.

    Attributes
    ----------
    plan
        Its own plan, reading from where the source is now.
    recorded
        What its journal says.
    whole
        All that is left to do is to rename.
    published
        Nothing is left to do but to clean up.
    """

    plan: Plan
    recorded: Recorded
    whole: bool = False
    published: bool = False


def inspect(partial: Path, out: Path, plan: Plan) -> Left | None:
    """What was left of this very conversion; None if it had not come as far as a journal.

    Raises
    ------
    PlanError
        The saved plan or the journal is damaged, or the source has changed.
    TargetError
        What was left is another conversion.
    """
    journal = partial / "journal"
    if not journal.is_file():
        return None
    saved = _saved(partial / "plan.json")
    recorded = _recorded(journal, saved)
    if not recorded.plan_hash:
        return None
    if recorded.plan_hash != plan_hash(saved):
        raise PlanError("the journal belongs to another plan", file=journal, remedy=_FRESH)
    _same_recipe(saved.recipe, plan.recipe, partial)
    _same_source(saved, plan)
    saved = replace(saved, source_root=plan.source_root)
    if recorded.publishing is None:
        return Left(saved, recorded)
    if _inode(out) == recorded.publishing and _made_by(out, recorded.plan_hash):
        return Left(saved, recorded, whole=True, published=True)
    if _inode(partial / "data") == recorded.publishing:
        return Left(saved, recorded, whole=True)
    raise TargetError("an earlier run was publishing, and its files have been moved since", file=partial, remedy=_FRESH)


def _recorded(path: Path, plan: Plan) -> Recorded:
    try:
        with open(path, "rb") as stream:
            # Mapped, for what lies behind the last whole line may be of any size.
            size = os.fstat(stream.fileno()).st_size
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except OSError as error:
        raise RunError(f"the journal cannot be read ({error.strerror})", file=path) from error
    return parse(data, len(plan.tiles), plan.target_files, file=path)


def _inode(path: Path) -> int | None:
    try:
        return os.stat(path, follow_symlinks=False).st_ino
    except FileNotFoundError:
        return None


def _made_by(out: Path, made: str) -> bool:
    # Inodes are used again: a folder that came later may have the number of one that is gone.
    identity = read_identity(LocalStore(out))
    return identity is not None and identity.get("plan_hash") == made


def _saved(path: Path) -> Plan:
    try:
        return codec.load(path).plan
    except PlanError as error:
        error.message = f"the plan of the unfinished conversion cannot be used: {error.message}"
        error.remedy = _FRESH
        raise


def _same_recipe(saved: Mapping[str, Any], asked: Mapping[str, Any], partial: Path) -> None:
    """Equal but for what only concerns how the plan was made."""
    before, now = (
        {**Request.from_json(recipe).to_json(), "family": recipe["family"], "config": recipe["config"]} for recipe in (saved, asked)
    )
    different = [key for key in now if before[key] != now[key]]
    if different:
        raise TargetError(
            "an unfinished conversion with other options is in the way",
            file=partial,
            expected=", ".join(f"{key} {before[key]}" for key in different)[:300],
            actual=", ".join(f"{key} {now[key]}" for key in different)[:300],
            remedy="Give the same options to resume it, or start over with --fresh",
        )


def _same_source(saved: Plan, plan: Plan) -> None:
    before, now = ({f.path: f for f in p.source_files} for p in (saved, plan))
    for path, file in before.items():
        if path not in now:
            raise _changed(path, "in the source", "gone")
        found = now.pop(path)
        if (what := changed(file, found.nbytes, found.mtime_ns)) is not None:
            raise _changed(path, *what)
        if found.header_digest != file.header_digest:
            raise _changed(path, f"header {file.header_digest[:12]}", f"header {found.header_digest[:12]}")
    if now:
        raise _changed(next(iter(now)), "not in the source", "new")


def _changed(path: str, expected: str, actual: str) -> PlanError:
    return PlanError(
        "a source file has changed since the unfinished conversion began",
        file=path,
        expected=expected,
        actual=actual,
        remedy="Put it back as it was to resume, or start over with --fresh",
    )
