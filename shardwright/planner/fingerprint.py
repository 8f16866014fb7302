"""A plan's hash: what makes two plans the same work."""

from __future__ import annotations

import hashlib
import json

from .plan import PLAN_FORMAT, Plan

__all__ = ["plan_hash"]


def plan_hash(plan: Plan) -> str:
    """SHA-256 over the recipe, the plan format, the tiles, and each source file's size, header digest and mtime.

    Paths and the tool's version are left out: a moved source or a newer tool can resume.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps([PLAN_FORMAT, plan.recipe], sort_keys=True, default=str).encode())
    for column in (plan.tiles.first, plan.tiles.program, plan.tiles.row, plan.tiles.lo, plan.tiles.hi):
        digest.update(column.astype("<i8").tobytes())
    digest.update(json.dumps([(f.nbytes, f.header_digest, f.mtime_ns) for f in plan.source_files]).encode())
    return digest.hexdigest()
