"""The command ``shardwright diff``: thin. Parse, call the API, render; `shardwright.cli` adds it to the others."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import fields, is_dataclass
from typing import Any

import rich_click as click

from .options import as_json_option, bounds_options, drop_option, source_options

__all__ = ["diff"]

_DIFFERENT = 4


@click.command()
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option("--tolerance", type=float, metavar="T", help="Largest absolute difference of two values that is none. Default: bit by bit.")
@drop_option
@source_options
@bounds_options
@as_json_option
def diff(a: str, b: str, as_json: bool, **options: Any) -> None:
    """Compare two checkpoints of any formats and layouts, tensor by tensor; exit code 4 if they differ."""
    from .api import diff as compare
    from .executors.progress import StderrProgress

    report = compare(a, b, progress=StderrProgress(doing="comparing"), **options)
    found = _json(report)
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        from .render import show_diff

        show_diff(found)
    if not report.ok:
        sys.exit(_DIFFERENT)


def _json(value: Any) -> Any:
    """The report as plain JSON values; numbers that JSON has none for (infinities, NaN, complex) as text."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value):
        found = {field.name: _json(getattr(value, field.name)) for field in fields(value)}
        return {**found, "what": list(value.what)} if hasattr(value, "what") else found
    if isinstance(value, dict):
        return {str(name): _json(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return [_json(part) for part in value]
    if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)
    return value
