"""Planes: what lies beside the weights of a checkpoint, tensor by tensor, as one more pair of sides.

A plane (``exp_avg``) holds tensors of the weights' names and shapes, laid out as the weights are. So its rows are the
weights' rows under hub names of its own: ``exp_avg:model.norm.weight``.

1. `rows_of` gives a plane the rows whose hub tensors it has: what is not trained has no optimizer state.
2. `join_sources` and `join_targets` append a plane's sides to the weights', so that everything after them (lowering, filing,
   tiles) sees one source and one target.

Boundary: pure; names and numbers only.
"""

from __future__ import annotations

from collections.abc import Callable

from ...errors import UnsupportedError
from ..layout import Layout
from .rows import Expansion, RowInstance
from .sides import SourceSide, TargetSide, Units

__all__ = ["MODULE", "held_by", "hub_name", "join_copies", "join_sources", "join_targets", "repeats", "rows_of", "stored_in"]

MODULE = "module"
"""The plane of what repeats the weights: a run's module, beside the masters of its optimizer."""
Has = Callable[[RowInstance, str], bool]


def hub_name(plane: str, name: str) -> str:
    """A plane's own name for a hub tensor.

    >>> hub_name("exp_avg", "model.norm.weight")
    'exp_avg:model.norm.weight'
    """
    return f"{plane}:{name}"


def repeats(name: str) -> bool:
    """Whether a stored tensor of that name is a copy of a weight.

    >>> repeats(hub_name(MODULE, "model.norm.weight")), repeats("model.norm.weight")
    (True, False)
    """
    return name.startswith(hub_name(MODULE, ""))


def rows_of(expansion: Expansion, plane: str, has: Has) -> Expansion:
    """The rows that a plane has, under its own hub names.

    Parameters
    ----------
    has
        Whether the plane has a hub tensor (given by its plane's name) of a row.

    Raises
    ------
    UnsupportedError
        It has some of a row's hub tensors and not the others.
    """
    found = []
    for instance in expansion.instances:
        hub = tuple([hub_name(plane, name) for name in instance.hub])
        held = [has(instance, name) for name in hub]
        if any(held) and not all(held):
            raise UnsupportedError(
                f"only a part of a tensor that the target joins has {plane!r}: the rest is not trained",
                tensor=instance.name,
                actual=[name for name, here in zip(hub, held, strict=True) if here],
                remedy="Leave the optimizer state out with --optimizer drop",
            )
        if all(held):
            found.append(instance._replace(hub=hub))
    return Expansion(expansion.classes, tuple(found))


def stored_in(units: Units, layout: Layout) -> Has:
    """Whether the rank that comes first of those that hold a row has it stored."""
    ranks: dict[tuple[int, int | None], int] = {}

    def has(instance: RowInstance, name: str) -> bool:
        stage = instance.pp, instance.ep
        if stage not in ranks:
            ranks[stage] = layout.stage_ranks(*stage)[0]
        return instance.name in units[ranks[stage], instance.chunk]

    return has


def held_by(side: SourceSide) -> Has:
    """Whether a side of the source has a hub tensor."""
    return lambda _, name: name in side.holders


def join_sources(side: SourceSide, other: SourceSide) -> None:
    """Append the other side's rows to `side`."""
    base = len(side.bounds)
    side.bounds += other.bounds
    side.holders |= {name: (base + number, row, slot) for name, (number, row, slot) in other.holders.items()}
    side.aliases |= {name: [(base + number, row) for number, row in copies] for name, copies in other.aliases.items()}
    side.used += other.used
    side.dropped += other.dropped


def join_copies(side: SourceSide, other: SourceSide) -> None:
    """Append the other side's rows to `side`, as copies of its own."""
    base = len(side.bounds)
    side.bounds += other.bounds
    side.copies |= {name.partition(":")[2]: (base + number, row, slot) for name, (number, row, slot) in other.holders.items()}
    side.used += other.used


def join_targets(side: TargetSide, other: TargetSide, plane: str) -> None:
    """Append the other side's rows to `side`; what they want is of that plane."""
    base = len(side.bounds)
    side.bounds += other.bounds
    side.instances += [(base + number, row) for number, row in other.instances]
    side.wanted += [w._replace(bound=base + w.bound, plane=plane) for w in other.wanted]
    side.renumber()
