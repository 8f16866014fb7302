"""shardwright: model checkpoints from any framework and layout to any other, planned, bounded, proven.

>>> import shardwright as sw
>>> sw.Layout(tp=8, pp=4).ranks
32

Public names load their modules on first use, so importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Checkpoint, Conversion, DiffReport, Tensor, Verification, convert, diff, load_plan, open, plan, register, verify
    from .errors import ShardwrightError
    from .loading import Together
    from .planner.layout import Layout
    from .synthetic import synth

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "Conversion",
    "DiffReport",
    "Layout",
    "ShardwrightError",
    "Tensor",
    "Together",
    "Verification",
    "convert",
    "diff",
    "load_plan",
    "open",
    "plan",
    "register",
    "synth",
    "verify",
]

_HOMES = {"Layout": ".planner.layout", "ShardwrightError": ".errors", "Together": ".loading", "synth": ".synthetic"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES.get(name, ".api"), __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
