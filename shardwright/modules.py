"""Modules as places to load into: their parameters and persistent buffers against what a rank holds.

1. `slots_of` lists a module's parameters and persistent buffers by name (of virtual chunks: with their prefix), with who owns
   each, and compares names, shapes and dtypes with the rank's. Tied parameters are one place; all their names are served.
2. `Slots.materialised` gives those on the device ``meta`` memory, tied ones the same; then it hands out what is to be filled.

Boundary: torch modules and names; reads nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .errors import ModuleMismatchError, UnsupportedError, UsageError, short
from .planner.passes.holding import Holding
from .planner.tensor.dtypes import dtype as dtype_of

__all__ = ["Loaded", "Module", "Slots", "check_module", "slots_of"]

Module = torch.nn.Module | Sequence[torch.nn.Module]
"""A rank's module; where it has several virtual chunks, theirs in order."""


@dataclass(frozen=True)
class Loaded:
    """What a load did.

    Attributes
    ----------
    tensors
        Names that were filled, tied ones included.
    bytes_read
        From the source, by this process, for all ranks that were loaded in this call.
    missing
        Parameters and persistent buffers that the checkpoint has nothing for (``strict=False``), as they were.
    unexpected
        Tensors of the rank that the module has no place for (``strict=False``), not read.
    on_meta
        Parameters and buffers that still are on the device ``meta``: non-persistent buffers, which no checkpoint holds.
    """

    tensors: int
    bytes_read: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    on_meta: tuple[str, ...]


class _Owner(NamedTuple):
    """One place of a tensor: the module that has it, and under which name."""

    module: torch.nn.Module
    attribute: str


@dataclass
class _Slot:
    """One tensor of a module, under all its names."""

    tensor: torch.Tensor
    names: list[str] = field(default_factory=list)
    owners: list[_Owner] = field(default_factory=list)
    persistent: bool = False
    number: int | None = None


@dataclass
class Slots:
    """A module's tensors, and which of the rank's fill them."""

    slots: list[_Slot]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def materialised(self, device: torch.device) -> dict[int, torch.Tensor]:
        """What is to be filled, by number; those on ``meta`` get memory on `device` first."""
        found = {}
        for slot in self.slots:
            if slot.number is None:
                continue
            if slot.tensor.is_meta:
                slot.tensor = _replaced(slot, device)
            found[slot.number] = slot.tensor
        return found

    def loaded(self, bytes_read: int) -> Loaded:
        """The report."""
        filled = sum(len(slot.names) for slot in self.slots if slot.number is not None)
        on_meta = tuple(name for slot in self.slots if slot.tensor.is_meta for name in slot.names)
        return Loaded(filled, bytes_read, self.missing, self.unexpected, on_meta)


def check_module(module: object) -> None:
    """Refuse what is neither a module nor a list of them.

    Raises
    ------
    UsageError
        It is something else.
    """
    chunks = module if isinstance(module, Sequence) and not isinstance(module, str) else [module]
    if odd := [part for part in chunks if not isinstance(part, torch.nn.Module)]:
        raise UsageError(
            "only modules are filled",
            expected="a torch.nn.Module, a list of a rank's virtual chunks, or a dict of either by rank",
            actual=f"{type(odd[0]).__name__} {short(odd[0])}",
        )


def slots_of(module: Module, holding: Holding, rank: int, strict: bool) -> Slots:
    """A module's tensors against what a rank holds.

    Raises
    ------
    ModuleMismatchError
        A shape or dtype that does not fit; where `strict`, a name that only one side has.
    UnsupportedError
        A tensor that is no plain torch tensor: distributed, quantised, sparse, or not initialised.
    """
    slots = _slots(module)
    numbers, include = holding.numbers(rank), holding.include
    known: set[str] = set()
    missing: list[str] = []
    for slot in slots:
        served = [name for name in slot.names if name in numbers]
        known.update(served)
        if served:
            slot.number = numbers[served[0]]
            _check(slot, served, holding, numbers)
        elif slot.persistent:
            missing += [name for name in slot.names if any(fnmatchcase(name, pattern) for pattern in include)]
    unexpected = [name for name in numbers if name not in known]
    if strict and (missing or unexpected):
        raise _mismatch(missing, unexpected, [name for slot in slots for name in slot.names], list(numbers))
    return Slots(slots, tuple(missing), tuple(unexpected))


def _slots(module: Module) -> list[_Slot]:
    """Every parameter and buffer once; tied names together."""
    found: dict[object, _Slot] = {}
    for prefix, part in _chunks(module):
        for path, inner in part.named_modules(prefix=prefix, remove_duplicate=False):
            for attribute, tensor, persistent in _own(inner):
                slot = found.setdefault(_identity(tensor), _Slot(tensor))
                slot.names.append(f"{path}.{attribute}" if path else attribute)
                slot.owners.append(_Owner(inner, attribute))
                slot.persistent |= persistent
    return list(found.values())


def _chunks(module: Module) -> Iterator[tuple[str, torch.nn.Module]]:
    if isinstance(module, torch.nn.Module):
        yield "", module
    else:
        yield from ((f"model{number}", chunk) for number, chunk in enumerate(module))


def _own(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """A module's own tensors: attribute, tensor, and whether its state dict has it."""
    for attribute, parameter in module._parameters.items():
        if parameter is not None:
            yield attribute, parameter, True
    for attribute, buffer in module._buffers.items():
        if buffer is not None:
            yield attribute, buffer, attribute not in module._non_persistent_buffers_set


def _identity(tensor: torch.Tensor) -> object:
    """Equal for two tensors that are one memory, seen alike."""
    if not _plain(tensor) or tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def _plain(tensor: Any) -> bool:
    """Whether a tensor's elements are its own memory's: it is neither distributed, quantised, sparse nor uninitialised."""
    return not (is_lazy(tensor) or is_traceable_wrapper_subclass(tensor) or tensor.layout != torch.strided or tensor.is_quantized)


def _check(slot: _Slot, served: Sequence[str], holding: Holding, numbers: dict[str, int]) -> None:
    """The tensor is one that can be filled, and has the shape and kind of what fills it."""
    tensor, name = slot.tensor, served[0]
    if not _plain(tensor):
        kind = f"{type(tensor).__module__}.{type(tensor).__name__}"
        raise UnsupportedError(
            "only plain tensors are filled", tensor=name, actual=kind if tensor.layout == torch.strided else str(tensor.layout),
            remedy="Load before the module is sharded or quantised, with this rank's part under its layout",
        )  # fmt: skip
    for other in served:
        held = holding.held[numbers[other]]
        if tuple(tensor.shape) != held.shape:
            raise ModuleMismatchError(
                "a parameter has another shape than the rank's tensor", tensor=other, expected=held.shape, actual=tuple(tensor.shape),
                remedy="Build the module for the config, layout and vocabulary padding that are asked for",
            )  # fmt: skip
        spelled = str(tensor.dtype).removeprefix("torch.")
        if spelled != held.dtype and not (tensor.is_floating_point() and dtype_of(held.dtype).kind == "float"):
            raise ModuleMismatchError(
                "a parameter's dtype cannot take the rank's tensor", tensor=other, expected=held.dtype, actual=spelled,
                remedy="Give it the checkpoint's dtype",
            )  # fmt: skip


def _mismatch(missing: Sequence[str], unexpected: Sequence[str], own: Sequence[str], held: Sequence[str]) -> ModuleMismatchError:
    """One error for all names, with the nearest of the other side for the first."""
    what, name, others = ("unexpected", unexpected[0], own) if unexpected else ("missing", missing[0], held)
    near = difflib.get_close_matches(name, sorted(others)[:20_000], n=1, cutoff=0.0)
    where = "the checkpoint has nothing for it" if what == "missing" else "the module has no place for it"
    counts = [f"{len(names)} {kind}: {', '.join(names[:4])}{' …' if len(names) > 4 else ''}"
              for kind, names in (("missing", missing), ("unexpected", unexpected)) if names]  # fmt: skip
    return ModuleMismatchError(
        f"the module and the rank differ in their names: {where}",
        tensor=name,
        actual="; ".join(counts),
        remedy=(f"Nearest on the other side: {near[0]}. " if near else "")
        + "Check to, layout, rank, dialect and spec, and unwrap the module; strict=False fills what both have",
    )


def _replaced(slot: _Slot, device: torch.device) -> torch.Tensor:
    """Memory for a tensor on ``meta``, for all who own it."""
    old = slot.tensor
    new = torch.empty_like(old, device=device)
    if isinstance(old, torch.nn.Parameter):
        new = torch.nn.Parameter(new, requires_grad=old.requires_grad)
        new.__dict__.update(old.__dict__)
    for owner in slot.owners:
        held = owner.module._parameters if owner.attribute in owner.module._parameters else owner.module._buffers
        held[owner.attribute] = new  # type: ignore[assignment]
    return new
