"""ZeRO's flat partitions: which runs of which files each parameter is made of.

ZeRO-1, ZeRO-2 and BF16_Optimizer (deepspeed ``runtime/zero/stage_1_and_2.py``, ``runtime/bf16_optimizer.py``; reading as
``utils/zero_to_fp32.py``):

1. The parameters of a group lie one after the other, in the order of ``param_shapes``, each followed by its alignment padding
   (``param_alignment_paddings``) if any, and the vector is padded with zeros to a multiple of twice the number of ranks.
2. Each rank holds one equal part of the vector. The end's padding may have been taken off what is stored.
3. `joined` walks the parts in rank order and gives each parameter its runs; all padding is given to the parameter before it
   and must be zero.

ZeRO-3 (``runtime/zero/stage3.py``, ``runtime/zero/partition_parameters.py``):

1. Each parameter is cut into as many equal parts as there are ranks, rounded up; a rank's vector is its parts of all
   parameters of a sub-group, one after the other.
2. `sliced` gives each parameter one run per rank. Behind the last element a rank's part is memory that was never written
   (``torch.empty``), so it is neither read nor checked.

Boundary: numbers and places; no file is opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from ...errors import CheckpointError, short
from ..containers.base import Fragment, StoredTensor
from ..tensor.dtypes import dtype as dtype_of

__all__ = ["joined", "placed", "sliced", "whole"]

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


class _Walk:
    """Elements taken in order from runs of one dtype that follow one another."""

    def __init__(self, parts: Sequence[StoredTensor]) -> None:
        self.parts = parts
        self.size = dtype_of(parts[0].dtype).itemsize
        self.number = self.at = 0

    def take(self, elements: int) -> list[Fragment]:
        """The next elements; no run is empty."""
        found = []
        while elements:
            part = self.parts[self.number]
            count = min(elements, part.shape[0] - self.at)
            if count:
                found.append(Fragment(part.file, part.offset + self.at * self.size, count))
                self.at, elements = self.at + count, elements - count
            else:
                self.number, self.at = self.number + 1, 0
        return found


def joined(label: str, shapes: Shapes, paddings: Sequence[int] | None, parts: Sequence[StoredTensor]) -> dict[str, StoredTensor]:
    """The parameters of one group, from the parts of its vector in rank order.

    Parameters
    ----------
    paddings
        Zeros behind each parameter; None: none.
    parts
        1-D, one per rank.

    Raises
    ------
    CheckpointError
        The parts are not those of a vector that holds these parameters.
    """
    _flat(label, parts)
    gaps = list(paddings) if paddings is not None else [0] * len(shapes)
    if len(gaps) != len(shapes) or not all(type(gap) is int and gap >= 0 for gap in gaps):
        raise CheckpointError(
            f"{label} has other alignment paddings than parameters",
            file=parts[0].file,
            expected=f"{len(shapes)} numbers",
            actual=short(gaps),
            remedy="Copy the checkpoint again: the model states are of another run",
        )
    needed = sum(map(prod, shapes.values())) + sum(gaps)
    _check_parts(label, needed, parts)
    walk, found = _Walk(parts), {}
    for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
        found[name] = _stored(name, parts[0], shape, walk.take(prod(shape)), walk.take(gap))
    if found and (rest := sum(part.shape[0] for part in parts) - needed):
        last = next(reversed(found))
        found[last] = found[last]._replace(blanks=(*found[last].blanks, *walk.take(rest)))
    return found


def placed(shapes: Shapes, paddings: Sequence[int] | None, each: int, ranks: int) -> list[dict[str, tuple[int, int]]]:
    """By rank, where the parameters of one group lie in that rank's part of `each` elements: start and length.

    It is what DeepSpeed writes as ``param_slice_mappings`` (``utils/mixed_precision_linkage.py``).
    """
    found: list[dict[str, tuple[int, int]]] = [{} for _ in range(ranks)]
    at = 0
    for (name, shape), gap in zip(shapes.items(), paddings or [0] * len(shapes), strict=True):
        end = at + prod(shape)
        for rank in range(at // each, min(-(-end // each), ranks)) if each else ():
            start, stop = max(at - rank * each, 0), min(end - rank * each, each)
            if start < stop:
                found[rank][name] = start, stop - start
        at = end + gap
    return found


def _check_parts(label: str, needed: int, parts: Sequence[StoredTensor]) -> None:
    """Equal parts of one vector, with no more padding than rounding up gives; or the same with all padding taken off."""
    sizes, ranks = [part.shape[0] for part in parts], len(parts)
    each = sizes[0]
    stripped = [min(max(needed - rank * each, 0), each) for rank in range(ranks)]
    rounded = 0 <= each * ranks - needed < 2 * ranks
    if (sizes == [each] * ranks and rounded) or (sizes == stripped and sum(sizes) == needed and (rounded or each == needed)):
        return
    odd = next((rank for rank, size in enumerate(sizes) if size not in (each, stripped[rank])), ranks - 1)
    raise CheckpointError(
        f"the partitions of {label} do not hold its parameters",
        file=parts[odd].file,
        expected=f"{needed} elements over {ranks} ranks",
        actual=f"{each} elements on rank 0, {sizes[odd]} on rank {odd}, {sum(sizes)} in all",
        remedy="Copy the checkpoint again: a rank's file is missing, or of another run",
    )


def sliced(label: str, groups: Sequence[Shapes], vectors: Sequence[Sequence[StoredTensor]]) -> dict[str, StoredTensor]:
    """The parameters of all sub-groups, from each rank's vectors.

    Parameters
    ----------
    groups
        Names and shapes, by sub-group; older files have them by parameter group.
    vectors
        By rank, 1-D, one per sub-group.

    Raises
    ------
    CheckpointError
        A rank's vectors have another length than its parts of the parameters.
    """
    ranks = len(vectors)
    for rank, held in enumerate(vectors):
        _flat(label, held)
        same = len(held) == len(groups)
        sums = [sum(-(-prod(shape) // ranks) for shape in group.values()) for group in groups]
        sizes = [vector.shape[0] for vector in held]
        if sizes != sums if same else sum(sizes) != sum(sums):
            raise CheckpointError(
                f"{label} of rank {rank} does not hold its parts of the parameters",
                file=held[0].file if held else None,
                expected=f"{sums} elements",
                actual=f"{sizes}",
                remedy="Copy the checkpoint again: the file is of another run",
            )
    walks = [_Walk(held) for held in vectors]
    found = {}
    for group in groups:
        for name, shape in group.items():
            numel = prod(shape)
            part, runs = -(-numel // ranks), []
            for rank, walk in enumerate(walks):
                runs += _first(walk.take(part), max(0, min(part, numel - rank * part)))
            found[name] = _stored(name, vectors[0][0], shape, runs, [])
    return found


def whole(name: str, shape: Shape, parts: Sequence[StoredTensor]) -> StoredTensor:
    """A parameter that is not trained, from each rank's part of it.

    Raises
    ------
    CheckpointError
        A part has another length than the shape gives.
    """
    return sliced(f"the frozen parameter {name!r}", [{name: shape}], [[part] for part in parts])[name]


def _first(runs: Sequence[Fragment], elements: int) -> list[Fragment]:
    """The first elements of runs."""
    found = []
    for run in runs:
        count = min(run.elements, elements)
        if count:
            found.append(run._replace(elements=count))
        elements -= count
    return found


def _stored(name: str, like: StoredTensor, shape: Shape, runs: Sequence[Fragment], blanks: Sequence[Fragment]) -> StoredTensor:
    first = runs[0] if runs else Fragment(like.file, like.offset, 0)
    fragments = tuple(runs) if len(runs) > 1 else ()
    return StoredTensor(name, like.dtype, tuple(shape), first.file, first.offset, None, fragments, tuple(blanks))


def _flat(label: str, parts: Sequence[StoredTensor]) -> None:
    for part in parts:
        if len(part.shape) != 1 or part.strides is not None or part.dtype != parts[0].dtype:
            raise CheckpointError(
                f"{label} is not stored as flat vectors of one dtype",
                tensor=part.name,
                file=part.file,
                expected=f"{parts[0].dtype} (n,)",
                actual=f"{part.dtype} {part.shape}",
            )
