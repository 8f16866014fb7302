"""The hall: checkpoints, lazy tensors and conversions, where the planner and the executors meet.

`open` reads headers. A `Checkpoint` gives hub tensors by name, each a `Tensor` that reads only the bytes asked for;
`plan` decides a whole conversion on paper; a `Conversion` shows it, saves it, and runs it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ReplicaMismatchError, UsageError
from .planner.config import ModelConfig
from .planner.containers import CONTAINERS
from .planner.cost import cost
from .planner.formats import FORMATS, open_source
from .planner.formats.base import Hints, Source
from .planner.identity import FILE_NAME, read_identity, read_object
from .planner.layout import Layout
from .planner.operations import OPERATIONS
from .planner.passes.build import Request, build, castable, locate, padded_vocab, plan_hash, read_side
from .planner.passes.check import check
from .planner.passes.rows import expand
from .planner.passes.sides import SourceSide, stored_bytes
from .planner.passes.view import View, hub_view, rank_views
from .planner.plan import Cost, Plan
from .planner.schemes import SCHEMES
from .planner.store import LocalStore
from .planner.tables import DIALECTS, FAMILIES, Family, load_dialect, load_family
from .planner.tensor.dtypes import dtype as dtype_of
from .planner.tensor.lazy import LazyTensor, leaf

if TYPE_CHECKING:
    import networkx as nx
    import numpy as np
    import torch

    from .executors.execute import Outcome
    from .executors.progress import Progress

__all__ = [
    "Checkpoint",
    "Conversion",
    "Tensor",
    "Verification",
    "convert",
    "find_family",
    "load_plan",
    "open",
    "parse_size",
    "plan",
    "register",
    "verify",
]

Shape = tuple[int, ...]
PathLike = str | os.PathLike[str]


def open(
    path: PathLike,
    *,
    family: str | Family | PathLike | None = None,
    config: PathLike | Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
) -> Checkpoint:
    """Open a checkpoint of any format: headers and metadata only.

    Parameters
    ----------
    path
        A directory, a single weight file, an index, or a target's ``shardwright.json``.
    family
        A family's name or a family table's path, where the checkpoint does not say or says otherwise.
    config
        A config.json (path or content), where the checkpoint has none.
    vocab_size
        The true vocabulary size, where only a padded one is stored.

    Raises
    ------
    Refusal
        It is no checkpoint, or not a whole one; names the file, the tensor, expected and actual.
    """
    place = Path(path).parent if Path(path).name == FILE_NAME else path
    return Checkpoint(open_source(LocalStore(place), Hints(find_family(family), _config(config), vocab_size)))


def find_family(family: str | Family | PathLike | None) -> Family | None:
    if family is None or isinstance(family, Family):
        return family
    text = os.fspath(family)
    return load_family(text) if text.endswith(".toml") or os.sep in text else FAMILIES.get(text)


def _config(config: PathLike | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if config is None or isinstance(config, Mapping):
        return config
    path = Path(config)
    return read_object(LocalStore(path.parent), path.name)


class Checkpoint(Mapping[str, "Tensor"]):
    """An opened checkpoint: hub tensors by canonical name, whatever its format and layout."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._names = source.hub

    @property
    def path(self) -> str:
        """Where it is."""
        return self._source.store.root

    @property
    def format(self) -> str:
        """Its format's name."""
        return self._source.format

    @property
    def family(self) -> str:
        """Its model family's name."""
        return self._source.family.name

    @property
    def layout(self) -> Layout:
        """Its parallel layout."""
        return self._source.layout

    @property
    def config(self) -> ModelConfig:
        """Its canonical config."""
        return self._source.config

    @property
    def source(self) -> Source:
        """Everything that was read from headers."""
        return self._source

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(stored_bytes(t) for unit in self._source.units.values() for t in unit.values())

    @cached_property
    def _side(self) -> SourceSide:
        return read_side(self._source)

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        """Stored tensors under the checkpoint's own names (``name@rank`` where several ranks hold that name)."""
        single = len(self._source.units) == 1
        found = {}
        for (rank, chunk), unit in self._source.units.items():
            for name, tensor in unit.items():
                lazy = _stored_view(tensor, [*self._source.files].index(tensor.file))
                label = name if single else f"{name}@{rank}" if not chunk else f"model{chunk}.{name}@{rank}"
                found[label] = Tensor(self, lazy)
        return found

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return Tensor(self, hub_view(self._side, name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"<Checkpoint {self.path}: {self.format}, {self.family}, {len(self)} tensors, {self.nbytes:,} bytes>"

    def state_dict(
        self,
        *,
        to: str | None = None,
        layout: Layout | None = None,
        rank: int | Mapping[str, int] = 0,
        device: str = "cpu",
        dtype: str | None = None,
        dialect: str | None = None,
        spec: str | None = None,
        pad_vocab_to: int | None = None,
        include: Sequence[str] = ("*",),
    ) -> dict[str, torch.Tensor]:
        """What one rank of a target would hold, as torch tensors: resharded while it is read, nothing written.

        Parameters
        ----------
        to
            Target format; its dialect gives the names. None: hub names, unsplit.
        rank
            A rank number, or ``dict(tp=1, pp=0)``.
        dialect, spec, pad_vocab_to
            As for `plan`.
        include
            Patterns of names to read.
        """
        after = None if dtype is None else castable(dtype)
        found = {}
        for view in self._views(to, rank, Request(to or "", layout or Layout(), dialect=dialect, spec=spec, pad_vocab_to=pad_vocab_to)):
            if any(fnmatchcase(view.name, pattern) for pattern in include):
                read = Tensor(self, view).torch()
                found[view.name] = read.to(device=device, dtype=_torch_dtype(after) if after and read.is_floating_point() else None)
        return found

    def _views(self, to: str | None, rank: int | Mapping[str, int], request: Request) -> Iterator[View]:
        if to is None:
            yield from (hub_view(self._side, name) for name in self)
            return
        target, layout = FORMATS.get(to), request.layout
        if not target.ranked and layout.ranks > 1:
            raise UsageError(f"{to} holds one rank", actual=f"{layout.ranks} ranks", remedy='Choose to="ranks"')
        number = _rank_number(rank, layout)
        words = DIALECTS.get(request.dialect or target.dialects[0])
        spec = request.spec or (words.specs or ("",))[0]
        if spec not in (words.specs or ("",)):
            raise UsageError(f"dialect {words.name} has no spec {spec!r}", remedy=f"Known: {', '.join(words.specs)}")
        padded = padded_vocab(self._source, request, words)
        expansion = expand(self._source.family, self._source.config, words, spec, layout, padded, hub=self._source.hub)
        yield from rank_views(self._side, expansion, layout, number, layout.vpp > 1 and words.numbering == "local")


def _rank_number(rank: int | Mapping[str, int], layout: Layout) -> int:
    """The number of a rank, checked."""
    if isinstance(rank, Mapping):
        if unknown := sorted(set(rank) - {"tp", "pp", "ep"}):
            raise UsageError(f"a rank has no coordinate {unknown[0]!r}", expected="tp, pp, ep")
        return layout.rank(**rank)
    layout.coordinates(rank)
    return rank


def _stored_view(tensor: Any, file: int) -> View:
    return View(tensor.name, tensor.dtype, leaf(0, tensor.shape, tensor.strides), ((file, tensor.offset),))


class Tensor:
    """A lazy tensor: slicing describes, `numpy` and `torch` read just those bytes.

    Supports integers, slices (also strided and backwards), ``...``, `reshape` and `permute`.
    """

    def __init__(self, checkpoint: Checkpoint, view: View) -> None:
        self._checkpoint, self._view = checkpoint, view

    @property
    def name(self) -> str:
        """Its name."""
        return self._view.name

    @property
    def shape(self) -> Shape:
        """In elements."""
        return self._view.tensor.shape

    @property
    def dtype(self) -> str:
        """torch's spelling."""
        return self._view.dtype

    @property
    def nbytes(self) -> int:
        """Bytes when read."""
        return dtype_of(self.dtype).nbytes(prod(self.shape))

    def __repr__(self) -> str:
        return f"<Tensor {self.name} {self.dtype} {self.shape}>"

    def __getitem__(self, key: Any) -> Tensor:
        keys = list(key) if isinstance(key, tuple) else [key]
        if Ellipsis in keys:
            at = keys.index(Ellipsis)
            keys[at : at + 1] = [slice(None)] * (len(self.shape) - len(keys) + 1)
        if len(keys) > len(self.shape):
            raise IndexError(f"too many indices for shape {self.shape}")
        lazy, axis = self._view.tensor, 0
        for index in keys:
            extent = lazy.shape[axis]
            if isinstance(index, slice):
                lazy, axis = lazy.slice(axis, *index.indices(extent)), axis + 1
            else:
                at = range(extent)[index]
                lazy = lazy.slice(axis, at, at + 1).reshape(*lazy.shape[:axis], *lazy.shape[axis + 1 :])
        return self._with(lazy)

    def reshape(self, *shape: int) -> Tensor:
        """The same elements under another shape."""
        return self._with(self._view.tensor.reshape(*shape))

    def permute(self, *axes: int) -> Tensor:
        """Axes in another order."""
        return self._with(self._view.tensor.permute(*axes))

    def _with(self, lazy: LazyTensor) -> Tensor:
        return Tensor(self._checkpoint, View(self._view.name, self._view.dtype, lazy, self._view.operands))

    def _bytes(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        from .executors.execute import read_box

        paths = list(self._checkpoint.source.files)
        operands = [(paths[file], offset) for file, offset in self._view.operands]
        return read_box(self._view.tensor.pieces, self.shape, self.dtype, operands=operands, root=self._checkpoint.path)

    def numpy(self) -> np.ndarray[Any, Any]:
        """Read into a numpy array (bfloat16 and float8 by ml_dtypes)."""
        import ml_dtypes
        import numpy as np

        kind = getattr(ml_dtypes, self.dtype, None) or np.dtype(self.dtype)
        return self._bytes().view(kind).reshape(self.shape)

    def torch(self) -> torch.Tensor:
        """Read into a torch tensor on the CPU."""
        import torch

        data = self._bytes()
        if not data.size:
            return torch.empty(self.shape, dtype=_torch_dtype(self.dtype))
        return torch.from_numpy(data).view(_torch_dtype(self.dtype)).reshape(self.shape)


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise UsageError(f"torch has no dtype {name!r}")
    return found


def plan(
    source: Checkpoint | PathLike,
    out: PathLike | None = None,
    *,
    to: str,
    layout: Layout | None = None,
    memory: int | str | None = None,
    workers: int | None = None,
    **options: Any,
) -> Conversion:
    """Decide a whole conversion on paper: headers in, a proven plan out; no tensor is read.

    Parameters
    ----------
    to
        Target format.
    memory
        Bound on this process's memory: bytes, or ``"8GiB"``. Default: a quarter of what is free, at most 2 GiB.
    options
        Fields of `shardwright.planner.passes.build.Request`: ``dialect, container, spec, dtype, quantize,
        max_shard_size, pad_vocab_to, trust_replicas, drop``.

    Raises
    ------
    UsageError
        The options contradict each other.
    Refusal
        Source and request do not fit.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open(source)
    try:
        request = Request(to, layout or Layout(), **options)
    except TypeError as error:
        raise UsageError(str(error).replace("Request.__init__()", "plan()")) from None
    return Conversion(build(checkpoint.source, request), out, memory=memory, workers=workers)


def load_plan(path: PathLike) -> Conversion:
    """A saved plan, checked again."""
    from .planner import codec

    found, root = codec.load(Path(path))
    return Conversion(found, root)


def convert(
    source: Checkpoint | PathLike, out: PathLike, *, to: str, overwrite: bool = False, progress: Progress | None = None, **options: Any
) -> Conversion:
    """Plan and execute; the finished conversion."""
    scheduler = options.pop("scheduler", "threads")
    job = plan(source, out, to=to, **options)
    job.execute(scheduler=scheduler, overwrite=overwrite, progress=progress)
    return job


class Conversion:
    """A plan and how to run it."""

    def __init__(self, plan: Plan, out: PathLike | None = None, *, memory: int | str | None = None, workers: int | None = None) -> None:
        from .executors.host import default_memory, default_workers

        self.plan = plan
        self.out = None if out is None else os.fspath(out)
        self.memory = default_memory() if memory is None else parse_size(memory)
        self.workers = default_workers() if workers is None else workers
        if self.workers < 1:
            raise UsageError("workers must be at least 1", actual=workers)

    @cached_property
    def cost(self) -> Cost:
        """What it moves and what memory it takes."""
        return cost(self.plan, self.memory, self.workers)

    @cached_property
    def hash(self) -> str:
        """The plan's hash."""
        return plan_hash(self.plan)

    def check(self) -> None:
        """Prove the plan again."""
        check(self.plan)

    def summary(self) -> dict[str, Any]:
        """The object that ``plan --json`` prints."""
        figures = self.cost
        names = (
            "tensors",
            "files",
            "bytes_read",
            "bytes_written",
            "source_bytes",
            "target_bytes",
            "read_amplification",
            "write_amplification",
        )
        more = ("requests", "tiles", "pieces", "programs", "base_bytes", "peak_bytes", "min_memory_bytes")
        return {
            **self.plan.summary,
            **{name: getattr(figures, name) for name in (*names, *more)},
            "dropped": [{"name": d.name, "reason": d.reason} for d in self.plan.dropped],
            "warnings": list(self.plan.warnings),
        }

    def explain(self, name: str) -> str:
        """How one tensor is made, in words."""
        from .planner.explain import explain

        return explain(self.plan, name)

    def lineage(self, pattern: str | None = None) -> nx.MultiDiGraph[Any]:
        """Source file → stored → hub → stored → target file → rank, as a graph of tensors."""
        from .planner.lineage import lineage

        return lineage(self.plan, pattern)

    def visualize(self, path: PathLike) -> None:
        """Write the plan as one static page."""
        from .planner.report import render

        text = render(self.plan, self.cost)
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError("the page cannot be written", file=path, actual=error.strerror) from None

    def save(self, path: PathLike) -> None:
        """Save the plan as JSON; `load_plan` and ``convert --plan`` take it."""
        from .planner import codec

        codec.save(self.plan, Path(path), target_root=self.out)

    def is_done(self) -> bool:
        """Whether the target exists already, made by this very plan."""
        if self.out is None or not (Path(self.out) / FILE_NAME).is_file():
            return False
        identity = read_identity(LocalStore(self.out))
        return identity is not None and identity.get("plan_hash") == self.hash

    def execute(self, *, scheduler: Any = "threads", overwrite: bool = False, progress: Progress | None = None) -> Outcome:
        """Run it and publish the target.

        Parameters
        ----------
        scheduler
            ``"threads"``, a dask scheduler's address, or a dask Client.

        Raises
        ------
        Refusal
            Nothing was written.
        ContradictionError
            The data contradicts the plan; nothing was published.
        RunError
            It failed or was stopped; nothing was published.
        """
        from .executors.execute import execute

        if self.out is None:
            raise UsageError("the plan has no target", remedy="Give OUT when planning")
        try:
            return execute(
                self.plan, self.out, memory=self.memory, workers=self.workers, overwrite=overwrite, progress=progress, scheduler=scheduler
            )
        except ReplicaMismatchError as error:
            raise _with_names(self.plan, error) from None


def _with_names(plan: Plan, error: ReplicaMismatchError) -> ReplicaMismatchError:
    """The error with the stored names of the two copies, where they go by different ones: tied tensors."""
    names = {(t.file, t.offset): t.name for t in plan.source_tensors}
    held = dict.fromkeys(names[place] for place in error.places if place in names)
    if len(held) > 1:
        error.message += f" ({' and '.join(held)}, which the config ties)"
        error.remedy = "If they are not tied, set tie_word_embeddings to false in config.json; else find out which copy is right"
    return error


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
    if source is None:
        if target.source.scheme is None:
            read_side(target.source)
        return Verification("names", count, 0, (), (), ())
    origin = source if isinstance(source, Checkpoint) else open(source, family=family, config=config, vocab_size=vocab_size)
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


def register(
    *, family: PathLike | None = None, dialect: PathLike | None = None, operation: Callable[..., LazyTensor] | None = None, **parts: Any
) -> None:
    """Add parts from outside the package, each under its own name.

    Parameters
    ----------
    family, dialect
        Path of a table.
    operation
        A layout operation; its ``__name__`` is what tables call it.
    parts
        ``format=``, ``container=``, ``scheme=``: an object with the protocol's members.
    """
    if family is not None:
        table = load_family(Path(family))
        FAMILIES.add(table.name, table)
    if dialect is not None:
        words = load_dialect(Path(dialect))
        DIALECTS.add(words.name, words)
    if operation is not None:
        OPERATIONS.add(operation.__name__, operation)
    registries: dict[str, Any] = {"format": FORMATS, "container": CONTAINERS, "scheme": SCHEMES}
    for kind, part in parts.items():
        if kind not in registries:
            raise UsageError(f"there is no kind of part {kind!r}", remedy=f"Known: family, dialect, operation, {', '.join(registries)}")
        registries[kind].add(part.name, part)


_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
}


def parse_size(text: int | str) -> int:
    """Bytes of ``"8GiB"``, ``"5GB"`` or a bare number.

    >>> parse_size("1.5GiB"), parse_size("5GB"), parse_size(1024)
    (1610612736, 5000000000, 1024)
    """
    plain = str(text).strip()
    digits = plain.rstrip("BKMGTIbkmgti ")
    unit = _UNITS.get(plain[len(digits) :].strip().upper())
    try:
        if unit is None or not digits.isascii() or not (value := Decimal(digits)).is_finite() or value < 0:
            raise ValueError
        nbytes = int(value * unit)
        if nbytes >= 1 << 63:
            raise ValueError
        return nbytes
    except (ValueError, InvalidOperation):
        raise UsageError(f"not a size: {text!r}", remedy="Write 512MiB, 8GiB, 5GB or a number of bytes") from None
