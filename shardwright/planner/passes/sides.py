"""The two sides of a plan: rows bound to the places where their tensors lie.

* `resolve` looks up every row of an expansion in the units that a format read from headers. What a row needs and the
  files lack, what the files hold and no row names, and every shape that differs is an error; nothing is guessed.
* `targets` states what each row of the target stores (dtype after casts, outputs of a scheme), and `place` gives each of
  those the file and offset that the containers laid out, or that an existing target's headers say.

Rows with equal class, dtype and value op share a `Bound`; programs are lowered per bound class, never per layer.
Boundary: names, shapes and offsets; no file is opened here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import islice
from typing import NamedTuple

import numpy as np

from ...errors import CheckpointError, MissingTensorError, ShapeMismatchError, UnknownTensorError, UnsupportedError
from ..containers.base import Cut, StoredTensor
from ..layout import Layout, Split
from ..plan import KERNELS, Dropped, Ints, ValueOp
from ..schemes import Scheme
from ..tables import Dialect, Ignore
from ..tensor.dtypes import dtype as dtype_of
from ..tensor.lazy import LazyTensor, leaf
from .rows import Expansion, RowClass, RowInstance, apply_split

__all__ = [
    "WEIGHT",
    "Bound",
    "Form",
    "SourceSide",
    "StoredOutput",
    "TargetSide",
    "Units",
    "Wanted",
    "check_units",
    "place",
    "resolve",
    "stored_bytes",
    "targets",
    "without_scales",
]

_FLOATS = ("bfloat16", "float16", "float32", "float64")

Shape = tuple[int, ...]
Form = Shape | Cut | None
Units = Mapping[tuple[int, int], Mapping[str, StoredTensor]]
"""Stored tensors by name, for each (rank, virtual chunk)."""


@dataclass(frozen=True, slots=True)
class StoredOutput:
    """What a target row stores: one for a copy or cast, several for a scheme. `shards` are over output slot 0 when the
    row has a scheme, over hub slots otherwise."""

    suffix: str
    dtype: str
    shape: Shape
    ratio: Shape
    split: Split
    shards: tuple[LazyTensor, ...]


@dataclass(slots=True)
class Bound:
    """Rows of one class with one dtype and op, and where their operands lie.

    Attributes
    ----------
    dtype
        Stored dtype (source side) or the source's dtype that goes in (target side).
    forms
        Per rank, how its stored tensor lies (`StoredTensor.form`); empty where all are row-major in one place.
    outputs, op
        Target side only.
    hub
        Hub names of each row.
    files, offsets
        ``[rows, operands]``; operands are the ranks that hold the row (per output). On the source side a rank's tensor has as
        many operands as fragments and regions of padding.
    grain
        Axis-0 rows of the stored tensors that one tile must own whole; 1 when free.
    """

    row: RowClass
    dtype: str
    forms: tuple[Form, ...] = ()
    outputs: tuple[StoredOutput, ...] = ()
    op: ValueOp | None = None
    hub: list[tuple[str, ...]] = field(default_factory=list)
    files: Ints = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    offsets: Ints = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    grain: int = 1


@dataclass(slots=True)
class SourceSide:
    """All source rows. `holders`: hub name → (bound, row, slot); `aliases`: hub name → further (bound, row) copies; `copies`: hub
    name → (bound, row, slot) of what repeats it, perhaps rounded to a narrower dtype."""

    bounds: list[Bound] = field(default_factory=list)
    holders: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    aliases: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    copies: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    used: list[tuple[int, StoredTensor]] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)

    def dtype(self, hub: str) -> str:
        """Stored dtype of a hub tensor."""
        return self.bounds[self.holders[hub][0]].dtype


WEIGHT = "weight"
"""The plane of the weights."""


class Wanted(NamedTuple):
    """A tensor that the target stores on several ranks of a stage: its bound row and output, the ranks, tp fastest (of one
    expert-parallel rank for experts, else of all), and the chunk, key, dtype, shape and plane, which are the same on all."""

    bound: int
    row: int
    output: int
    ranks: tuple[int, ...]
    chunk: int
    name: str
    dtype: str
    shape: Shape
    plane: str = WEIGHT


@dataclass(slots=True)
class TargetSide:
    """All target rows, in file order. `positions` are (bound, row, output) of each of `wanted`, as columns."""

    bounds: list[Bound] = field(default_factory=list)
    instances: list[tuple[int, int]] = field(default_factory=list)
    wanted: list[Wanted] = field(default_factory=list)
    positions: Ints = field(default_factory=lambda: np.zeros((0, 3), dtype=np.int64))

    def renumber(self) -> None:
        """Take `positions` from `wanted`."""
        self.positions = np.array([w[:3] for w in self.wanted], dtype=np.int64).reshape(-1, 3)


def resolve(
    expansion: Expansion, layout: Layout, units: Units, file_number: Mapping[str, int], ignore: tuple[Ignore, ...], dialect: str
) -> SourceSide:
    """Bind every row of the source to its stored tensors.

    Raises
    ------
    MissingTensorError, UnknownTensorError, ShapeMismatchError
        Name the tensor, the file, expected and actual.
    """
    side = SourceSide()
    seen: dict[tuple[int, str, tuple[Form, ...]], int] = {}
    stages, several = _stages(layout, units), len(units) > 1
    places: list[list[StoredTensor]] = []
    classes, bounds, holders = expansion.classes, side.bounds, side.holders
    shapes = [row.shards[0].shape for row in classes]
    forms: tuple[Form, ...]
    for index, name, hub, pp, ep, chunk in expansion.instances:
        row, stage = classes[index], stages[pp, ep, chunk]
        # One rank, as a Hugging Face checkpoint is: a lookup and a comparison, and `_look_up` only to say what is wrong.
        lone = stage.units[0].get(name) if len(stage.units) == 1 else None
        if lone is not None and lone.shape == shapes[index]:
            stored, forms = [lone], (lone.form,)
        elif (looked := _look_up(name, row, stage, several, expansion)) is None:
            continue
        else:
            stored, forms = looked, tuple([s.form for s in looked])
        key = (index, stored[0].dtype, forms)
        number = seen.get(key, -1)
        if number < 0:
            number = seen[key] = len(bounds)
            bounds.append(Bound(row, stored[0].dtype, forms if any(forms) else ()))
            places.append([])
        rows = bounds[number].hub
        if row.alias:
            side.aliases.setdefault(hub[0], []).append((number, len(rows)))
        else:
            for slot, member in enumerate(hub):
                holders[member] = (number, len(rows), slot)
        rows.append(hub)
        stage.taken.add(name)
        for rank, tensor in zip(stage.ranks, stored, strict=True):
            held = _in_pieces(tensor) if tensor.fragments or tensor.blanks else [tensor]
            places[number] += held
            side.used += [(rank, part) for part in held]
    for bound, held in zip(side.bounds, places, strict=True):
        bound.files = np.array([file_number[s.file] for s in held], dtype=np.int64).reshape(len(bound.hub), -1)
        bound.offsets = np.array([s.offset for s in held], dtype=np.int64).reshape(len(bound.hub), -1)
    taken: dict[tuple[int, int], tuple[set[str], ...]] = {}
    for (_, _, chunk), stage in stages.items():
        for rank in stage.ranks:
            taken[rank, chunk] = (*taken.get((rank, chunk), ()), stage.taken)
    _account(units, taken, expansion, ignore, side, dialect)
    return side


def _in_pieces(tensor: StoredTensor) -> list[StoredTensor]:
    """Each fragment of a tensor, then each region of its padding, as a tensor of its own; the order of a bound's operands."""
    parts = [(tensor.name, run) for run in tensor.runs] + [(f"{tensor.name} (padding)", blank) for blank in tensor.blanks]
    return [StoredTensor(name, tensor.dtype, (run.elements,), run.file, run.offset) for name, run in parts]


class _Stage(NamedTuple):
    """Ranks of one pipeline stage (of one ep rank, or of all) with their units of one chunk, and what rows took from each."""

    ranks: tuple[int, ...]
    units: list[Mapping[str, StoredTensor]]
    taken: set[str]


def _stages(layout: Layout, units: Units) -> dict[tuple[int, int | None, int], _Stage]:
    found: dict[tuple[int, int | None, int], _Stage] = {}
    chunks = sorted({chunk for _, chunk in units})
    for pp in range(layout.pp):
        for ep in (None, *range(layout.ep)):
            ranks = layout.stage_ranks(pp, ep)
            for chunk in chunks:
                found[pp, ep, chunk] = _Stage(ranks, [units[rank, chunk] for rank in ranks], set())
    return found


def _look_up(name: str, row: RowClass, stage: _Stage, several: bool, expansion: Expansion) -> list[StoredTensor] | None:
    """The row's tensor on each rank that holds it, checked; None for an alias that no file holds."""
    shape = row.shards[0].shape  # equal on all ranks
    stored: list[StoredTensor] = []
    for rank, unit in zip(stage.ranks, stage.units, strict=True):
        found = unit.get(name)
        if found is None:
            if row.alias and not stored:
                return None
            raise _missing(name, f"shape {shape}" + (f" on rank {rank}" if several else ""), unit, expansion)
        if found.shape != shape:
            raise ShapeMismatchError(
                "a tensor's shape is not what the config implies" + (" for this layout" if several else ""), tensor=found.name,
                file=found.file, expected=shape, actual=found.shape,
                remedy="Give the config.json that belongs to the checkpoint (--config), or copy the file again",
            )  # fmt: skip
        if stored and found.dtype != stored[0].dtype:
            raise ShapeMismatchError(
                "ranks hold one tensor in several dtypes", tensor=found.name, file=found.file, expected=stored[0].dtype, actual=found.dtype
            )
        stored.append(found)
    return stored


_EXPERT = re.compile(r"(?<=experts\.)\d+(?=\.)|(?<=\.weight)\d+$|(?<=\.bias)\d+$")
"""The number of an expert in a stored name, in any dialect."""


def _missing(name: str, wanted: str, unit: Mapping[str, StoredTensor], expansion: Expansion) -> MissingTensorError:
    """The refusal of a unit without this tensor; where other experts have it, it says which."""
    file = _home(name, unit)
    if (number := _EXPERT.search(name)) is not None and (held := _experts(name, number, unit)):
        counted = _experts(name, number, {i.name for i in expansion.instances})
        return MissingTensorError(
            "a layer's experts are not those that the config counts",
            tensor=name,
            file=file,
            expected=f"experts {_ranges(counted)}",
            actual=f"experts {_ranges(held)}",
            remedy="Copy the checkpoint again, or give the config.json that belongs to it (--config)",
        )
    return MissingTensorError(
        "a tensor that the config implies is missing",
        tensor=name,
        file=file,
        expected=wanted,
        actual="not there",
        remedy="Copy the checkpoint again, or give the config.json that belongs to it (--config)",
    )


def _home(name: str, unit: Mapping[str, StoredTensor]) -> str | None:
    """The file that would hold this tensor, as far as can be told: that of the tensor with the most similar name. Where that has a
    file to itself, this one would have, too: of the same path but for the name."""
    beside = unit.get(max(unit, key=lambda other: _alike(name, other), default=""))
    if beside is None:
        return None
    files = [tensor.file for tensor in unit.values()]
    if files.count(beside.file) > 1 or len(files) == 1:
        return beside.file
    return beside.file.replace(beside.name, name) if beside.name in beside.file else None


def _alike(one: str, other: str) -> int:
    """How many letters two names begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _experts(name: str, number: re.Match[str], names: Iterable[str]) -> list[int]:
    """The numbers that stand in the place of the expert's in `names` that are otherwise equal."""
    head, tail = name[: number.start()], name[number.end() :]
    middles = [n[len(head) : len(n) - len(tail)] for n in names if n.startswith(head) and n.endswith(tail)]
    return sorted(int(text) for text in middles if text.isdecimal())


def _ranges(numbers: Sequence[int]) -> str:
    """``0 … 3, 5``."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1] = [runs[-1][0], n]
        else:
            runs.append([n])
    return ", ".join(" … ".join(map(str, run)) for run in runs)


def _account(
    units: Units,
    taken: Mapping[tuple[int, int], Sequence[set[str]]],
    expansion: Expansion,
    ignore: tuple[Ignore, ...],
    side: SourceSide,
    dialect: str,
) -> None:
    """Every stored tensor is used, or dropped for a stated reason, or refused."""
    for key, unit in units.items():
        used = taken[key]
        if len(unit) == sum(map(len, used)):
            continue
        for name, tensor in unit.items():
            if any(name in names for names in used):
                continue
            reason = next((entry.reason for entry in ignore if fnmatchcase(name, entry.pattern)), None)
            if reason is None:
                rules = {i.name for i in expansion.instances}
                if (number := _EXPERT.search(name)) is not None and (counted := _experts(name, number, rules)):
                    raise UnknownTensorError(
                        "a tensor is of an expert that the config does not count",
                        tensor=name,
                        file=tensor.file,
                        expected=f"experts {_ranges(counted)}",
                        actual=f"experts {_ranges(_experts(name, number, unit))}",
                        remedy="Give the config.json that belongs to the checkpoint (--config), or leave it out with --drop PATTERN",
                    )
                near = difflib.get_close_matches(name, sorted(rules)[:20_000], n=1)
                raise UnknownTensorError(
                    f"no rule of dialect {dialect!r} names this tensor",
                    tensor=name,
                    file=tensor.file,
                    expected="no tensor of that name",
                    actual=f"{tensor.dtype} {tensor.shape}",
                    remedy=(f"Nearest rule: {near[0]}. " if near else "")
                    + "Leave it out with --drop PATTERN, or bring a table with --family",
                )
            side.dropped.append(Dropped(name, reason))


def targets(
    expansion: Expansion,
    layout: Layout,
    source: SourceSide,
    cast: Callable[[RowInstance, str, str], str],
    scheme: Scheme | None,
    norm_shift: int = 0,
) -> TargetSide:
    """What the target stores.

    Parameters
    ----------
    cast
        ``(row, hub name, stored dtype) → target dtype``.
    scheme
        Quantisation for the tensors it takes, or None.
    norm_shift
        1 or -1 where that is added to norm weights.
    """
    side = TargetSide()
    seen: dict[tuple[int, str, str, bool, int], int] = {}
    ranks = {(pp, ep): layout.stage_ranks(pp, ep) for pp in range(layout.pp) for ep in (None, *range(layout.ep))}
    dtypes, holders = [bound.dtype for bound in source.bounds], source.holders
    for instance in expansion.instances:
        row = expansion.classes[instance.row]
        before = dtypes[holders[instance.hub[0]][0]]
        after = cast(instance, instance.hub[0], before)
        for name in instance.hub[1:]:
            if source.dtype(name) != before or cast(instance, name, before) != after:
                raise UnsupportedError(
                    "tensors that the target joins have different dtypes",
                    tensor=instance.name,
                    actual={n: source.dtype(n) for n in instance.hub},
                    remedy="Cast them with --dtype",
                )
        taken = scheme is not None and scheme.takes(instance.hub[0], row.shapes[0], after)
        shift = norm_shift if norm_shift and instance.hub[0].endswith("norm.weight") else 0
        key = (instance.row, before, after, taken, shift)
        if key not in seen:
            seen[key] = len(side.bounds)
            side.bounds.append(_target_bound(row, before, after, scheme if taken else None, shift))
        number = seen[key]
        bound = side.bounds[number]
        at = len(bound.hub)
        side.instances.append((number, at))
        stage = ranks[instance.pp, instance.ep]
        for k, output in enumerate(bound.outputs):
            name = instance.name + output.suffix
            side.wanted.append(Wanted(number, at, k, stage, instance.chunk, name, output.dtype, output.shards[0].shape))
        bound.hub.append(instance.hub)
    for bound in side.bounds:
        bound.files = np.zeros((len(bound.hub), bound.row.split.width * len(bound.outputs)), dtype=np.int64)
        bound.offsets = np.zeros_like(bound.files)
    side.renumber()
    return side


def _target_bound(row: RowClass, before: str, after: str, scheme: Scheme | None, shift: int) -> Bound:
    ones = (1,) * len(row.whole.shape)
    if scheme is None:
        op = None if after == before else ValueOp("cast", KERNELS["cast"], ones, 0)
        if shift:
            op = ValueOp("affine", KERNELS["add_one" if shift > 0 else "subtract_one"], ones, 8)  # one float64 each
        return Bound(row, before, outputs=(StoredOutput("", after, row.whole.shape, ones, row.split, row.shards),), op=op)
    if row.whole != leaf(0, row.shapes[0]):
        raise UnsupportedError(
            f"scheme {scheme.name!r} cannot quantise a fused or padded tensor", tensor=row.label, remedy="Use --dialect huggingface"
        )
    if after != before:
        raise UnsupportedError(
            "a cast and a quantisation of one tensor at once are not offered", tensor=row.label, remedy="Leave out --dtype"
        )
    outputs = []
    for out in scheme.outputs(row.label, row.shapes[0], after):
        whole = leaf(0, out.shape)
        split = row.split
        if split.axis is not None and out.shape[split.axis] == 1:
            split = replace(split, axis=None, parts=1, repeat=split.parts * split.repeat)
        outputs.append(
            StoredOutput(out.name.removeprefix(row.label), out.dtype, out.shape, out.ratio, split, tuple(apply_split(whole, split)))
        )
    op = ValueOp(scheme.name, scheme.kernel, scheme.block(row.shapes[0]), scheme.scratch())
    return Bound(row, before, outputs=tuple(outputs), op=op)


def place(
    side: TargetSide, members: Sequence[int], place: int, files: Sequence[int], offsets: Sequence[int], grains: Sequence[int] | None = None
) -> None:
    """Give wanted tensors their file numbers, byte offsets and grains on the rank in this place of its stage.

    A row that fewer ranks hold than the stage has (experts) counts places among its own.
    """
    number, row, output = side.positions[np.array(members, dtype=np.int64)].T
    places = np.array([files, offsets, grains or [1] * len(members)], dtype=np.int64)
    order = np.argsort(number, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(number[order])) + 1):
        if len(part):
            bound = side.bounds[number[part[0]]]
            width = bound.row.split.width
            operands = output[part] * width + place % width
            bound.files[row[part], operands], bound.offsets[row[part], operands] = places[:2, part]
            bound.grain = max(bound.grain, int(places[2, part].max()))


def stored_bytes(tensor: StoredTensor) -> int:
    """Bytes of a stored tensor's elements."""
    count = 1
    for extent in tensor.shape:
        count *= extent
    return dtype_of(tensor.dtype).nbytes(count)


def without_scales(unit: Mapping[str, StoredTensor], scheme: Scheme) -> dict[str, StoredTensor]:
    """The unit with only the payload of each quantised tensor, once all outputs of its scheme are known to be there.

    Raises
    ------
    MissingTensorError, ShapeMismatchError
        An output is missing, or has another shape or dtype than the scheme gives.
    """
    extra: set[str] = set()
    for name, tensor in unit.items():
        # The dtype before quantisation is not stored; any that the scheme takes says which outputs there must be.
        before = next((d for d in _FLOATS if scheme.takes(name, tensor.shape, d)), None)
        if before is None:
            continue
        payload, *others = scheme.outputs(name, tensor.shape, before)
        if tensor.dtype != payload.dtype:
            raise ShapeMismatchError(
                "a tensor is not quantised as the config says", tensor=name, file=tensor.file, expected=payload.dtype, actual=tensor.dtype
            )
        for output in others:
            found = unit.get(output.name)
            if found is None:
                raise MissingTensorError("a tensor is missing", tensor=output.name, file=tensor.file, expected=f"shape {output.shape}")
            if found.shape != output.shape:
                raise ShapeMismatchError(
                    "a scale does not fit its tensor", tensor=output.name, file=found.file, expected=output.shape, actual=found.shape
                )
            extra.add(output.name)
    return {name: tensor for name, tensor in unit.items() if name not in extra}


def check_units(units: Units, layout: Layout, dialect: Dialect, format_name: str) -> None:
    """Every rank of the layout has its unit, and no unit is of another layout.

    Raises
    ------
    CheckpointError
        Names the ranks that are missing, or too many.
    """
    chunks = layout.vpp if dialect.numbering == "local" else 1
    axes = ", ".join(f"{axis} {size}" for axis, size in layout.to_json().items() if size not in (None, 1)) or "one rank"
    # Looked for one by one: the layout may say far more ranks than there are files.
    wanted = ((rank, chunk) for rank in range(layout.ranks) for chunk in range(chunks))
    missing = list(islice((key for key in wanted if key not in units), 5))
    extra = sorted(key for key in units if key[0] >= layout.ranks or key[1] >= chunks)
    if missing or extra:
        what, odd = ("missing", missing) if missing else ("too many", extra)
        named = [_rank_name(rank, chunk, layout, chunks) for rank, chunk in odd[:4]] + (["…"] if len(odd) > 4 else [])
        raise CheckpointError(
            f"the {format_name} checkpoint does not have the ranks of its layout",
            expected=f"{layout.ranks} ranks ({axes})",
            actual=f"{what}: {', '.join(named)}",
            remedy="Copy the missing ranks' files here" if missing else "Remove the files of another layout",
        )


def _rank_name(rank: int, chunk: int, layout: Layout, chunks: int) -> str:
    """``rank 5 (tp 1, pp 2)``, with its chunk where there are several."""
    at = {axis: n for axis, n in layout.coordinates(rank).items() if axis != "ep" or layout.ep > 1} if rank < layout.ranks else {}
    where = [f"{axis} {n}" for axis, n in at.items()] + ([f"virtual chunk {chunk}"] if chunks > 1 else [])
    return f"rank {rank}" + (f" ({', '.join(where)})" if where else "")
