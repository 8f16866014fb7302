"""Loading: what ranks of a target hold, as torch tensors or in a module's own memory; nothing is written.

1. `StateDict` is the lazy mapping of one rank: names, shapes and dtypes now; a tensor is read when it is taken.
2. `read_ranks` reads whole ranks in one pass; `fill_modules` does so into the parameters and buffers of modules.
3. `Together` names the processes of one host that share a pass.

`Checkpoint`'s methods are the way in, and say what each argument means.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch

from .errors import ReplicaMismatchError, UsageError
from .executors.fill import Company, fill
from .executors.host import default_memory
from .executors.mates import Meeting
from .modules import Loaded, Module, Slots, check_module, slots_of
from .planner.fingerprint import plan_hash
from .planner.passes.holding import Holding, deal
from .sizes import parse_size

if TYPE_CHECKING:
    from .executors.tile import Receipt
    from .planner.plan import Plan

__all__ = ["Loaded", "StateDict", "Together", "check_module", "fill_modules", "read_ranks"]


@dataclass(frozen=True)
class How:
    """How a load runs: its bound in bytes, its lanes, and whether copies are read and compared."""

    memory: int
    workers: int | None = None
    trust_replicas: bool = False

    @classmethod
    def of(cls, memory: int | str | None, workers: int | None, trust_replicas: bool) -> How:
        if workers is not None and workers < 1:
            raise UsageError("workers must be at least 1", actual=workers)
        return cls(default_memory() if memory is None else parse_size(memory), workers, trust_replicas)


@dataclass(frozen=True)
class Together:
    """Processes of one host that load together: each byte of the source that any of them needs is read by one of them, and
    handed over to the others that need it through shared memory (8 MiB for each process). All of them make the same call,
    each for its own ranks, and none returns before all have what they need.

    Attributes
    ----------
    folder
        For this load alone: empty, reachable by all, and with a short path (sockets take about 100 letters).
    index
        This process among them, from 0.
    ranks
        The ranks of every process, in their order. Processes may load the same rank, as data-parallel ones do.
    temporary
        Whether the folder is removed when the load is over.
    """

    folder: str | os.PathLike[str]
    index: int
    ranks: Sequence[Sequence[int]]
    temporary: bool = False

    @classmethod
    def of_group(cls, ranks: Sequence[int], group: Any = None) -> Together:
        """The processes of a `torch.distributed` group (by default all) that run on this host; a collective call."""
        import torch.distributed as dist

        host = f"{socket.gethostname()} {_boot()}"
        folder = tempfile.mkdtemp(prefix="sw-")
        found: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, (host, folder, list(ranks)), group=group)
        me = dist.get_rank(group)
        here = [number for number, (where, _, _) in enumerate(found) if where == host]
        if here[0] != me:
            os.rmdir(folder)
        return cls(found[here[0]][1], here.index(me), [found[number][2] for number in here], temporary=True)


def _boot() -> str:
    """What tells two hosts of one name apart."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


class StateDict(Mapping[str, torch.Tensor]):
    """What one rank holds: name → tensor, read when it is taken.

    Taking a tensor reads its bytes, in strips, straight to where it will be. Nothing is kept: while you hold a tensor, taking
    it again gives the same one; later it is read again. Names that are tied are one tensor. ``dict(state_dict)`` takes them
    all, one by one; ``lazy=False`` reads them in one pass.
    """

    def __init__(self, holding: Holding, rank: int, device: torch.device, how: How) -> None:
        self._holding, self._rank, self._device, self._how = holding, rank, device, how
        self._numbers = holding.numbers(rank)
        self._alive: WeakValueDictionary[int, torch.Tensor] = WeakValueDictionary()

    @property
    def meta(self) -> dict[str, torch.Tensor]:
        """The same on the device ``meta``: every shape and dtype, without reading."""
        return {name: _empty(self._holding, number, torch.device("meta")) for name, number in self._numbers.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        number = self._holding.held[self._numbers[name]].twin
        tensor = self._alive.get(number)
        if tensor is None:
            tensor = self._alive[number] = _empty(self._holding, number, self._device)
            _run(self._holding, {number: tensor}, self._how, numbers=[number])
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._numbers

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __repr__(self) -> str:
        nbytes = sum(self._holding.held[number].nbytes for number in self._numbers.values())
        return f"<StateDict of rank {self._rank}: {len(self)} tensors, {nbytes:,} bytes>"


def read_ranks(
    holding: Holding, ranks: Sequence[int], device: torch.device, how: How, together: Together | None
) -> dict[int, dict[str, torch.Tensor]]:
    """Whole ranks in one pass."""
    names = {rank: holding.numbers(rank) for rank in ranks}
    twins = sorted({holding.held[number].twin for numbers in names.values() for number in numbers.values()})
    tensors = {number: _empty(holding, number, device) for number in twins}
    if device.type != "meta":
        _run(holding, tensors, how, numbers=None if together else twins, together=together)
    return {rank: {name: tensors[holding.held[number].twin] for name, number in numbers.items()} for rank, numbers in names.items()}


def fill_modules(
    holding: Holding, modules: Mapping[int, Module], how: How, *, device: torch.device, strict: bool, together: Together | None
) -> dict[int, Loaded]:
    """Whole modules in one pass, by rank.

    Raises
    ------
    ModuleMismatchError
        Before anything is read or changed.
    """
    places: dict[int, Slots] = {}
    for rank, module in modules.items():
        places[rank] = slots_of(module, holding, rank, strict)
    tensors: dict[int, torch.Tensor] = {}
    for slots in places.values():
        tensors.update(slots.materialised(device))
    receipt = _run(holding, tensors, how, numbers=None if together else tensors, together=together)
    return {rank: slots.loaded(receipt.bytes_read) for rank, slots in places.items()}


def _empty(holding: Holding, number: int, device: torch.device) -> torch.Tensor:
    held = holding.held[number]
    return torch.empty(held.shape, dtype=getattr(torch, held.dtype), device=device)


def _run(
    holding: Holding,
    tensors: Mapping[int, torch.Tensor],
    how: How,
    *,
    numbers: Collection[int] | None,
    together: Together | None = None,
) -> Receipt:
    """Fill tensors by number; `numbers` are the plan's (None: all, as those who load together must)."""
    count = len(together.ranks) if together else 1
    plan = holding.plan(numbers, trust_replicas=how.trust_replicas, processes=count)
    company = _company(plan, holding, together) if together and count > 1 else None
    try:
        return fill(plan, tensors, memory=how.memory, workers=how.workers, company=company)
    except ReplicaMismatchError as error:
        error.remedy = "Find out which copy is right; trust_replicas=True takes the first without comparing"
        raise
    finally:
        if together and together.temporary and not together.index:
            shutil.rmtree(together.folder, ignore_errors=True)


def _company(plan: Plan, holding: Holding, together: Together) -> Company:
    """The others, what each takes, and the tiles that are this process's to read."""
    count, me = len(together.ranks), together.index
    takers = {
        number: [process for process, ranks in enumerate(together.ranks) if held.rank in ranks] for number, held in enumerate(holding.held)
    }
    asked = [list(map(list, together.ranks)), plan_hash(plan)]
    meeting = Meeting(os.fspath(together.folder), me, count, hashlib.sha256(repr(asked).encode()).digest())
    others = {number: [process for process in found if process != me] for number, found in takers.items()}
    return Company(meeting, deal(plan, takers, count)[me], others)
