"""What stands in a torch file's tree where torch, argparse or a framework would have put an object of its own. Pure data.

Reading never imports what a pickle names and writing never needs torch: both sides speak of these stand-ins instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Inert", "Namespace", "TensorRef", "TensorValue", "TorchDtype", "TorchSize"]


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor's place in the tree; its bytes are the `StoredTensor` or `TensorSpec` of that name."""

    name: str


@dataclass(frozen=True, slots=True)
class TensorValue:
    """A small tensor whose bytes are known before any data moves, such as a step count; only written, never read as such.

    Attributes
    ----------
    dtype, shape
        torch's name, and its extents.
    data
        Its elements, row-major, little-endian.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class TorchDtype:
    """``torch.<name>`` as a value, e.g. ``params_dtype`` in Megatron's args."""

    name: str


class TorchSize(tuple[int, ...]):
    """``torch.Size``: a tuple that some loaders call ``numel`` on, so it keeps its type."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Namespace:
    """``argparse.Namespace``."""

    fields: dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Inert:
    """Something a pickle asked for that is carried and never run.

    Compared by identity: a hostile tree could make comparison by value take forever.

    Attributes
    ----------
    module, name
        What the pickle called it.
    args
        What it was to be called with; None when the pickle only mentions it (a class or function as a value).
        For ``io.BytesIO`` the one argument is its contents.
    state
        What was to be set on it, usually a dict of attributes.
    items
        What was to be appended (values) or set ((key, value) pairs), for subclasses of list and dict.
    """

    module: str
    name: str
    args: tuple[Any, ...] | None = None
    state: Any = None
    items: tuple[Any, ...] = ()
