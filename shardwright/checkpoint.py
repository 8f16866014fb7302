"""Checkpoints and lazy tensors: headers now, bytes when asked.

`open` reads headers in whatever format. A `Checkpoint` gives hub tensors by name; each is a `Tensor`, whose slices are
described by the planner's pieces and read by the executors, no byte more than asked for. `Checkpoint.state_dict` does the
same for everything that one rank of any target would hold.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, UnsupportedError, UsageError, short
from .planner.config import ModelConfig
from .planner.containers.base import StoredTensor
from .planner.formats import open_source
from .planner.formats.base import Hints, Source
from .planner.identity import FILE_NAME, read_json, read_object
from .planner.layout import Layout
from .planner.manifest import CONFIG_NAME, Manifest, is_manifest, read_manifest, resolve
from .planner.paper import open_config
from .planner.passes.build import read_side, refuse_target
from .planner.passes.holding import Holding, hold
from .planner.passes.sides import SourceSide, stored_bytes
from .planner.passes.view import View, hub_view
from .planner.plan import PAPER
from .planner.request import Request
from .planner.store import LocalStore
from .planner.tables import FAMILIES, Family, load_family
from .planner.tensor.dtypes import dtype as dtype_of
from .planner.tensor.lazy import LazyTensor, concat, leaf

if TYPE_CHECKING:
    import numpy as np
    import torch

    from .loading import Loaded, Together
    from .modules import Module

__all__ = ["Checkpoint", "PathLike", "Tensor", "find_family", "no_values", "open"]

Shape = tuple[int, ...]
PathLike = str | os.PathLike[str]


def open(
    path: PathLike,
    *,
    family: str | Family | PathLike | None = None,
    config: PathLike | Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
    drop: str | Sequence[str] = (),
) -> Checkpoint:
    """Open a checkpoint of any format: headers and metadata only.

    Parameters
    ----------
    path
        A directory, a single weight file, an index, a manifest of DeepSpeed, or a target's ``shardwright.json``; or a
        config.json alone, for a checkpoint on paper: it can be planned from and looked at, and has no values.
    family
        A family's name or a family table's path, where the checkpoint does not say or says otherwise.
    config
        A config.json (path or content), where the checkpoint has none.
    vocab_size
        The true vocabulary size, where only a padded one is stored.
    drop
        Patterns of stored names that the checkpoint may hold and no rule names, or one pattern: left out of whatever is done with it.

    Raises
    ------
    Refusal
        It is no checkpoint, or not a whole one; names the file, the tensor, expected and actual.
    """
    source = _source(path, Hints(find_family(family), _config(config), vocab_size))
    given = tuple(option for option, value in (("--family", family), ("--config", config)) if value is not None)
    return Checkpoint(replace(source, drop=(drop,) if isinstance(drop, str) else tuple(drop), given=given))


def _source(path: PathLike, hints: Hints) -> Source:
    _refuse_unfinished(Path(path))
    if (listed := _manifest(Path(path))) is not None:
        root, manifest, notes = listed
        # Files far from each other have a root that is no checkpoint's folder: nobody walks it.
        names = None if root == Path(path).absolute().parent else (*manifest.files, *(manifest.whole or ()))
        source = open_source(LocalStore(root, names), replace(hints, manifest=manifest))
        return replace(source, warnings=(*notes, *source.warnings))
    if _is_config(Path(path)):
        if hints.config is not None or hints.vocab_size is not None:
            raise UsageError("a config alone says what --config and --vocab-size would", file=path, remedy="Leave them out")
        return open_config(LocalStore(path), Path(path).name, hints.family)
    place = Path(path).parent if Path(path).name == FILE_NAME else path
    return open_source(LocalStore(place), hints)


def _refuse_unfinished(path: Path) -> None:
    """What a conversion is still writing looks like a checkpoint from inside: sizes and headers are right, the rest is zeros."""
    place = path.absolute()
    for folder in (place, *place.parents):
        # Any of them: after a loss of power the others may be missing.
        if folder.suffix == ".partial" and any((folder / name).is_file() for name in ("plan.json", "journal", "lock")):
            raise CheckpointError(
                "an unfinished conversion is no checkpoint", file=folder, remedy="Run the conversion again to finish it; it resumes"
            )


def _is_config(path: Path) -> bool:
    """A JSON file that is neither an index nor a target's identity."""
    return path.suffix == ".json" and path.name != FILE_NAME and not path.name.endswith(".index.json") and path.is_file()


def _manifest(path: Path) -> tuple[Path, Manifest, tuple[str, ...]] | None:
    """A file that is a manifest of DeepSpeed: the folder that holds all it names, the manifest with names that count from there,
    and notes. The files may lie anywhere on this machine."""
    if not _is_config(path):
        return None
    store = LocalStore(path)
    if path.name != CONFIG_NAME and not is_manifest(read_json(store, path.name)):
        return None
    manifest = read_manifest(store, path.name)
    folder = path.absolute().parent
    # DeepSpeed opens relative names of a Megatron manifest from where it was started.
    names = (*manifest.files, *(manifest.whole or ()))
    found, notes = resolve(manifest, names, lambda name: Path(name).is_file(), f"{folder}/", (f"{Path.cwd()}/",))
    files = [Path(os.path.normpath(name)) for name in found]
    root = folder if all(file.is_relative_to(folder) for file in files) else Path(os.path.commonpath([f.parent for f in files]))
    if root == Path(root.anchor):
        raise UnsupportedError(
            "the files of the manifest lie in folders that share nothing but the root", file=path, actual=[*map(str, files)][:3],
            remedy="Make a folder of links to them, and a manifest beside those",
        )  # fmt: skip
    relative = tuple(file.relative_to(root).as_posix() for file in files)
    cut = len(manifest.files)
    whole = None if manifest.whole is None else relative[cut:]
    return root, replace(manifest, files=relative[:cut], whole=whole, base_dir=None), notes


def no_values(path: PathLike) -> UnsupportedError:
    """The refusal to read from a config alone."""
    return UnsupportedError(
        "a config has shapes and no values: it can be planned from, not converted or compared", file=path,
        remedy="Download the checkpoint and give its folder",
    )  # fmt: skip


def find_family(family: str | Family | PathLike | None) -> Family | None:
    if family is None or isinstance(family, Family):
        return family
    text = os.fspath(family)
    return load_family(text) if text.endswith(".toml") or os.sep in text else FAMILIES.get(text)


def _config(config: PathLike | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if config is None or isinstance(config, Mapping):
        return config
    path = Path(config)
    if not path.is_file():
        raise UsageError("the config is no file", file=path, remedy="Give the config.json that belongs to the checkpoint")
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
        """Its format's name; ``"config"`` where there is nothing but a config."""
        return PAPER if self._source.on_paper else self._source.format

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
        if self._source.scheme is not None:
            raise UnsupportedError(
                "a quantised checkpoint's values are not read yet", file=self.path, remedy="Its stored tensors are in `stored`"
            )
        return read_side(self._source)

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        """Stored tensors under the checkpoint's own names (``name@rank`` where several ranks hold that name)."""
        single = len(self._source.units) == 1
        number = {path: i for i, path in enumerate(self._source.files)}
        found = {}
        for (rank, chunk), unit in self._source.units.items():
            for name, tensor in unit.items():
                lazy = _stored_view(tensor, number)
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
        device: str | torch.device = "cpu",
        dtype: str | None = None,
        dialect: str | None = None,
        spec: str | None = None,
        pad_vocab_to: int | None = None,
        include: Sequence[str] = ("*",),
        drop: Sequence[str] = (),
        lazy: bool = True,
        memory: int | str | None = None,
        workers: int | None = None,
        trust_replicas: bool = False,
        together: Together | None = None,
    ) -> Mapping[str, torch.Tensor]:
        """What one rank of a target would hold, as torch tensors: resharded while it is read, nothing written.

        The values are those that `convert` would have written for that rank, to the bit.

        Parameters
        ----------
        to
            Target format; its dialect gives the names. None: hub names, unsplit.
        layout, rank
            Of the target: a layout, and a rank number or ``dict(tp=1, pp=0)``.
        device
            Where the tensors are: ``"cpu"``, ``"cuda:1"``; ``"meta"`` has shapes and dtypes and reads nothing.
        dtype
            Cast floating tensors as ``convert --dtype`` does: not those that the family keeps, and nothing else.
        dialect, spec, pad_vocab_to, drop
            As for `plan`: `drop` has patterns of stored names that the source may hold and no rule names, besides those of `open`.
        include
            Patterns of the target's names; others are not there.
        lazy
            Read a tensor when it is taken (a `StateDict`); False reads all in one pass, each byte once, into a dict.
        memory
            Bound on what the load takes beside the tensors themselves: bytes, or ``"512MiB"``. Default: a quarter of what is
            free, at most 2 GiB.
        workers
            Lanes that read at once. Default: cores, at most 8.
        trust_replicas
            Do not read and compare copies that the source has of a tensor.
        together
            Processes of this host that load at the same time, with ``lazy=False``: they read each byte once among them.

        Raises
        ------
        UsageError
            No such format, rank or name, or options that contradict each other.
        Refusal
            Source and request do not fit, the source is quantised or nothing but a config, or the bound is too small.
        ReplicaMismatchError, RunError
            When tensors are read: copies differ, or the source cannot be read.

        ::

            ckpt.state_dict(to="megatron-legacy", layout=Layout(tp=4), rank=1)
            # <StateDict of rank 1: 148 tensors, 4,015,263,744 bytes>
        """
        from .loading import How, StateDict, read_ranks

        layout = layout or Layout()
        request = Request(to or "", layout, dialect=dialect, spec=spec, dtype=dtype, pad_vocab_to=pad_vocab_to, drop=drop)
        number, where = _rank_number(rank, request.layout), _device(device)
        how = How.of(memory, workers, trust_replicas)
        if lazy and together is not None:
            raise UsageError("processes that load together read in one pass", remedy="Give lazy=False")
        holding = self._hold(request, [number], include, together, reads=where.type != "meta")
        if lazy:
            return StateDict(holding, number, where, how)
        return read_ranks(holding, [number], where, how, together)[number]

    def state_dicts(
        self,
        ranks: Sequence[int | Mapping[str, int]] | None = None,
        *,
        to: str,
        layout: Layout,
        device: str | torch.device = "cpu",
        dtype: str | None = None,
        dialect: str | None = None,
        spec: str | None = None,
        pad_vocab_to: int | None = None,
        include: Sequence[str] = ("*",),
        drop: Sequence[str] = (),
        memory: int | str | None = None,
        workers: int | None = None,
        trust_replicas: bool = False,
        together: Together | None = None,
    ) -> dict[int, dict[str, torch.Tensor]]:
        """What several ranks of a target would hold (all by default), by rank number: one pass, each byte read once.

        Parameters and errors are those of `state_dict`.
        """
        from .loading import How, read_ranks

        request = Request(to, layout, dialect=dialect, spec=spec, dtype=dtype, pad_vocab_to=pad_vocab_to, drop=drop)
        numbers = [_rank_number(rank, layout) for rank in (range(layout.ranks) if ranks is None else ranks)]
        where, how = _device(device), How.of(memory, workers, trust_replicas)
        holding = self._hold(request, numbers, include, together, reads=where.type != "meta")
        return read_ranks(holding, numbers, where, how, together)

    def load_into(
        self,
        module: Module | Mapping[int, Module],
        *,
        to: str | None = None,
        layout: Layout | None = None,
        rank: int | Mapping[str, int] = 0,
        device: str | torch.device = "cpu",
        dtype: str | None = None,
        dialect: str | None = None,
        spec: str | None = None,
        pad_vocab_to: int | None = None,
        include: Sequence[str] = ("*",),
        drop: Sequence[str] = (),
        strict: bool = True,
        memory: int | str | None = None,
        workers: int | None = None,
        trust_replicas: bool = False,
        together: Together | None = None,
    ) -> Loaded | dict[int, Loaded]:
        """Fill a module's parameters and persistent buffers with what its rank of a target holds, in place.

        Each is written where it is, strip by strip, without a copy of the tensor. A parameter of another floating dtype is
        cast to as ``copy_`` casts; one that is strided or on another device is copied to. Tied parameters are filled once.

        Parameters
        ----------
        module
            The module that one rank runs, unwrapped; a list of its virtual chunks where ``vpp > 1``; or such by rank number, to
            fill several ranks in one pass (then `rank` says nothing).
        device
            Where parameters and persistent buffers that are on the device ``meta`` get their memory (tied ones stay tied);
            others stay where they are. Non-persistent buffers are in no checkpoint: those on ``meta`` stay there, and are listed.
        dtype
            Cast as ``convert --dtype`` first.
        include
            Patterns of names to fill; others are left alone.
        strict
            Refuse a module with names that the rank does not have, or without some that it has; False fills what both have.
        to, layout, rank, dialect, spec, pad_vocab_to, drop, memory, workers, trust_replicas, together
            As for `state_dict`.

        Returns
        -------
        Loaded
            What was filled, and what was not; by rank number where `module` is.

        Raises
        ------
        ModuleMismatchError
            Names, shapes or dtypes do not fit; nothing was read or changed.
        UnsupportedError
            A parameter is no plain tensor (a DTensor, for one).
        UsageError, Refusal, ReplicaMismatchError, RunError
            As for `state_dict`; of the last two the module is filled in part.
        """
        from .loading import How, check_module, fill_modules

        layout = layout or Layout()
        request = Request(to or "", layout, dialect=dialect, spec=spec, dtype=dtype, pad_vocab_to=pad_vocab_to, drop=drop)
        several = isinstance(module, Mapping)
        modules = module if isinstance(module, Mapping) else {_rank_number(rank, request.layout): module}
        for each in modules.values():
            check_module(each)
        where, how = _device(device), How.of(memory, workers, trust_replicas)
        numbers = [_rank_number(number, request.layout) for number in modules]
        if where.type == "meta":
            raise UsageError("nothing is loaded onto the device meta", remedy='Give device="cpu" or another')
        holding = self._hold(request, numbers, include, together, reads=True)
        found = fill_modules(holding, modules, how, device=where, strict=strict, together=together)
        return found if several else found[numbers[0]]

    def _hold(self, request: Request, ranks: Sequence[int], include: Sequence[str], together: Together | None, *, reads: bool) -> Holding:
        """What these ranks hold; with others, what all of them do."""
        if reads and self._source.on_paper:
            raise no_values(self.path)
        asked = ranks
        if together is not None:
            if not 0 <= together.index < len(together.ranks) or sorted(together.ranks[together.index]) != sorted(ranks):
                raise UsageError(
                    "what this process loads is not what it said it would", expected=sorted(ranks),
                    actual=f"process {together.index} of {list(together.ranks)}",
                )  # fmt: skip
            asked = [rank for each in together.ranks for rank in each]
        holding = hold(self._source, request, asked, (include,) if isinstance(include, str) else tuple(include))
        if request.to:
            refuse_target(self._source, request)
        return holding


def _device(device: str | torch.device) -> torch.device:
    import torch

    try:
        # A name that torch knows may still be a device that this machine, or this torch, does not have.
        return torch.empty(0, device=torch.device(device)).device
    except (RuntimeError, TypeError, AssertionError) as error:
        raise UsageError(f"no such device ({str(error).splitlines()[0]})", actual=device) from None


def _rank_number(rank: int | Mapping[str, int], layout: Layout) -> int:
    """The number of a rank, checked."""
    if isinstance(rank, Mapping):
        if unknown := sorted(set(rank) - {"tp", "pp", "ep"}):
            raise UsageError(f"a rank has no coordinate {unknown[0]!r}", expected="tp, pp, ep")
        return layout.rank(**rank)
    if type(rank) is not int:
        raise UsageError("a rank is a number, or coordinates", expected="3, or dict(tp=1, pp=0)", actual=short(rank))
    layout.coordinates(rank)
    return rank


def _stored_view(tensor: StoredTensor, number: Mapping[str, int]) -> View:
    """A stored tensor under its own name; its runs, where there are several, are the operands."""
    if not tensor.fragments:
        return View(tensor.name, tensor.dtype, leaf(0, tensor.shape, tensor.strides), ((number[tensor.file], tensor.offset),))
    joined = concat([leaf(slot, (run.elements,)) for slot, run in enumerate(tensor.fragments)], 0)
    places = tuple((number[run.file], run.offset) for run in tensor.fragments)
    return View(tensor.name, tensor.dtype, joined.reshape(*tensor.shape), places)


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
        return self._with(lambda lazy: _cut(lazy, keys))

    def reshape(self, *shape: int) -> Tensor:
        """The same elements under another shape."""
        return self._with(lambda lazy: lazy.reshape(*shape))

    def permute(self, *axes: int) -> Tensor:
        """Axes in another order."""
        return self._with(lambda lazy: lazy.permute(*axes))

    def _with(self, change: Callable[[LazyTensor], LazyTensor]) -> Tensor:
        return Tensor(self._checkpoint, self._view.mapped(change))

    def _bytes(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        from .executors.execute import read_mean

        if self._checkpoint.source.on_paper:
            raise no_values(self._checkpoint.path)
        paths = list(self._checkpoint.source.files)
        operands = [(paths[file], offset) for file, offset in self._view.operands]
        copies = [lazy.pieces for lazy in (self._view.tensor, *self._view.copies)]
        return read_mean(copies, self.shape, self.dtype, operands=operands, root=self._checkpoint.path)

    def numpy(self) -> np.ndarray[Any, Any]:
        """Read into a numpy array (bfloat16 and float8 by ml_dtypes)."""
        from .executors.elements import numpy_dtype

        return self._bytes().view(numpy_dtype(self.dtype)).reshape(self.shape)

    def torch(self) -> torch.Tensor:
        """Read into a torch tensor on the CPU."""
        import torch

        data = self._bytes()
        if not data.size:
            return torch.empty(self.shape, dtype=_torch_dtype(self.dtype))
        return torch.from_numpy(data).view(_torch_dtype(self.dtype)).reshape(self.shape)


def _cut(lazy: LazyTensor, keys: Sequence[Any]) -> LazyTensor:
    """The part of a tensor that integers and slices name, one for each of the first axes."""
    axis = 0
    for index in keys:
        extent = lazy.shape[axis]
        if isinstance(index, slice):
            lazy, axis = lazy.slice(axis, *index.indices(extent)), axis + 1
        else:
            at = range(extent)[index]
            lazy = lazy.slice(axis, at, at + 1).reshape(*lazy.shape[:axis], *lazy.shape[axis + 1 :])
    return lazy


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise UsageError(f"torch has no dtype {name!r}")
    return found
