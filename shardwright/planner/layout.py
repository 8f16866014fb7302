"""Layouts: which rank holds which part of a model, and the arithmetic of rank numbers.

* `Layout` is the sizes of the parallel axes and, where layers are dealt unevenly, the layers of each pipeline chunk.
* `Split` is one row's partition over the ranks that hold it: an axis cut in equal parts, each part held by `repeat`
  neighbouring ranks, all parts gone round `cycles` times; `SPLITS` names the kinds that tables use, and checks what must
  divide.

Rank number = tp + tp_size · (ep + ep_size · pp), tp fastest. Pipeline chunks are in Megatron's order: for each virtual
chunk, for each stage (source: Megatron-core ``transformer_layer.get_transformer_layer_offset``).

Experts: rank ``ep`` of E holds experts ``[ep · E / ep_size, (ep + 1) · E / ep_size)``. Everything else is held by every ep
rank of a stage, a copy each. Experts are cut into etp parts instead of tp; etp divides tp, and tensor-parallel rank t holds
part ``t % etp``, as Megatron's two rank generators (both tp fastest; ``parallel_state.RankGenerator``) say of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ..errors import LayoutError, UsageError, short

__all__ = ["MOST_LAYERS", "MOST_RANKS", "SPLITS", "Layout", "Place", "Split"]

MOST_RANKS = 1 << 20
"""Ranks times virtual chunks of one layout."""
MOST_LAYERS = 1 << 20
"""Layers are listed too."""


class Place(NamedTuple):
    """Where a layer lives: pipeline stage, virtual chunk, index within that chunk."""

    pp: int
    chunk: int
    local: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the parallel axes; an axis not given is 1.

    Attributes
    ----------
    tp, pp, ep
        Tensor, pipeline and expert parallel sizes.
    vpp
        Model chunks per pipeline stage (Megatron's virtual pipeline size); needs pp > 1.
    etp
        Tensor parallel size of the experts, a divisor of tp; None means tp.
    stages
        Layers of each pipeline chunk, in Megatron's order, where they are uneven; None deals them evenly.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int | None = None
    stages: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "vpp", "ep", "etp"):
            value = getattr(self, name)
            if name == "etp" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"{name} must be a positive integer", actual=short(value))
        # Ranks are listed in many places: a size out of a file must not decide how long those lists are.
        if max(self.tp, self.pp, self.vpp, self.ep, self.expert_tp) > MOST_RANKS or self.ranks * self.vpp > MOST_RANKS:
            raise LayoutError("a layout of so many ranks is not offered", expected=f"at most {MOST_RANKS:,} ranks and virtual chunks")
        if self.tp % self.expert_tp:
            raise LayoutError("etp must divide tp", expected=f"a divisor of {self.tp}", actual=f"etp {self.etp}, tp {self.tp}")
        if self.vpp > 1 and self.pp == 1:
            raise LayoutError("a virtual pipeline needs pp > 1", actual=f"pp 1, vpp {self.vpp}", remedy="Drop --vpp or raise --pp")
        if self.stages is not None and len(self.stages) != self.pp * self.vpp:
            raise LayoutError(
                "layers per stage do not match the pipeline",
                expected=f"{self.pp * self.vpp} numbers (pp × vpp)",
                actual=f"{len(self.stages)} numbers",
            )
        if wrong := [n for n in self.stages or () if type(n) is not int or not 0 <= n <= MOST_LAYERS]:
            raise LayoutError("layers per stage must be whole numbers", expected=f"0 … {MOST_LAYERS:,}", actual=short(wrong[0]))

    @property
    def ranks(self) -> int:
        """Number of ranks (data parallelism holds copies and is not counted)."""
        return self.tp * self.ep * self.pp

    @property
    def expert_tp(self) -> int:
        """Parts that an expert's tensors are cut into."""
        return self.tp if self.etp is None else self.etp

    def stage_ranks(self, pp: int, ep: int | None = None) -> tuple[int, ...]:
        """Ranks of a pipeline stage, of one expert-parallel rank or (None) of all, tp fastest.

        >>> Layout(tp=2, ep=2).stage_ranks(0), Layout(tp=2, ep=2).stage_ranks(0, ep=1)
        ((0, 1, 2, 3), (2, 3))
        """
        first = self.rank(pp=pp, ep=ep or 0)
        return tuple(range(first, first + self.tp * (self.ep if ep is None else 1)))

    def place_in_stage(self, rank: int) -> int:
        """Where a rank stands among those of its pipeline stage: its index in `stage_ranks`."""
        return rank % (self.tp * self.ep)

    def rank(self, tp: int = 0, pp: int = 0, ep: int = 0) -> int:
        """Rank number of a coordinate.

        >>> Layout(tp=2, pp=3).rank(tp=1, pp=2)
        5
        """
        for name, at, size in (("tp", tp, self.tp), ("pp", pp, self.pp), ("ep", ep, self.ep)):
            if not 0 <= at < size:
                raise UsageError(f"no such {name} rank", expected=f"0 … {size - 1}", actual=at)
        return tp + self.tp * (ep + self.ep * pp)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Coordinate of a rank number: the inverse of `rank`."""
        if not 0 <= rank < self.ranks:
            raise UsageError("no such rank", expected=f"0 … {self.ranks - 1}", actual=rank)
        return {"tp": rank % self.tp, "ep": rank // self.tp % self.ep, "pp": rank // self.tp // self.ep}

    def chunk_sizes(self, layers: int) -> tuple[int, ...]:
        """Layers of each chunk, in Megatron's order.

        Raises
        ------
        LayoutError
            The layers do not divide, or the given stages do not add up.
        """
        chunks = self.pp * self.vpp
        if self.stages is not None:
            if sum(self.stages) != layers:
                raise LayoutError(
                    "layers per stage do not add up", expected=f"{layers} layers", actual=f"{sum(self.stages)}: {self.stages}"
                )
            return self.stages
        if layers % chunks:
            raise LayoutError(
                f"{layers} layers do not divide into pp {self.pp} × vpp {self.vpp}",
                remedy=f"Give the layers of each of the {chunks} chunks with --pp-layers",
            )
        return (layers // chunks,) * chunks

    def places(self, layers: int) -> list[Place]:
        """Place of every layer, in order.

        >>> Layout(pp=2, vpp=2).places(4)
        [Place(pp=0, chunk=0, local=0), Place(pp=1, chunk=0, local=0), Place(pp=0, chunk=1, local=0), Place(pp=1, chunk=1, local=0)]
        """
        sizes = self.chunk_sizes(layers)
        return [Place(i % self.pp, i // self.pp, local) for i, size in enumerate(sizes) for local in range(size)]

    def to_json(self) -> dict[str, Any]:
        """As plain values; `from_json` reads it."""
        values = asdict(self)
        values["stages"] = None if self.stages is None else list(self.stages)
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Layout:
        """The layout of `to_json`, or of a user's layout file; absent axes are 1."""
        unknown = set(values) - {"tp", "pp", "vpp", "ep", "etp", "stages"}
        if unknown:
            raise UsageError(f"a layout has no axis {min(unknown)!r}", expected="tp, pp, vpp, ep, etp, stages")
        stages = values.get("stages")
        if stages is not None and not isinstance(stages, list | tuple):
            raise LayoutError("layers per stage must be a list", actual=short(stages))
        return cls(**{**values, "stages": None if stages is None else tuple(stages)})


@dataclass(frozen=True, slots=True)
class Split:
    """A partition over ranks: `axis` cut into `parts` equal shards, the rank in place i holding shard ``i // repeat % parts``.

    ``axis=None`` is a full copy on every rank.

    >>> split = Split(0, 2, 1, cycles=2)
    >>> [(split.shard_of(i), split.copy_of(i)) for i in range(split.width)]
    [(0, 0), (1, 0), (0, 1), (1, 1)]
    """

    axis: int | None
    parts: int
    repeat: int
    cycles: int = 1

    @property
    def width(self) -> int:
        """Ranks that hold a shard."""
        return self.parts * self.repeat * self.cycles

    def shard_of(self, place: int) -> int:
        """The shard that the rank in this place holds."""
        return place // self.repeat % self.parts

    def copy_of(self, place: int) -> int:
        """Which of the shard's equal copies that is."""
        return place % self.repeat + self.repeat * (place // (self.parts * self.repeat))


def _extent(shape: tuple[int, ...], axis: int) -> int:
    if axis >= len(shape):
        raise UsageError("a tensor is split along an axis that it does not have", expected=f"axis {axis}", actual=f"shape {shape}")
    return shape[axis]


def _heads_of(fields: Mapping[str, Any], name: str) -> int:
    heads = fields.get(name)
    if not isinstance(heads, int) or heads < 1:
        raise LayoutError(f"a split by heads needs the config field {name!r}", actual=short(heads))
    return heads


def _even(axis: int, size: int, tp: int, what: str) -> Split:
    if size % tp:
        raise LayoutError(
            f"tp {tp} does not divide {what}", expected=f"a multiple of {tp}", actual=size, remedy=f"Choose a tp that divides {size}"
        )
    return Split(axis, tp, 1)


def _copies(shape: tuple[int, ...], tp: int, fields: Mapping[str, Any], kv: str) -> Split:
    return Split(None, 1, tp)


def _rows(shape: tuple[int, ...], tp: int, fields: Mapping[str, Any], kv: str) -> Split:
    return _even(0, _extent(shape, 0), tp, "the rows")


def _columns(shape: tuple[int, ...], tp: int, fields: Mapping[str, Any], kv: str) -> Split:
    return _even(1, _extent(shape, 1), tp, "the columns")


def _vocab(shape: tuple[int, ...], tp: int, fields: Mapping[str, Any], kv: str) -> Split:
    if _extent(shape, 0) % tp:
        raise LayoutError(
            f"tp {tp} does not divide the vocabulary",
            expected=f"a multiple of {tp}",
            actual=shape[0],
            remedy=f"Pad it: --pad-vocab-to {tp}",
        )
    return Split(0, tp, 1)


def _heads(shape: tuple[int, ...], tp: int, fields: Mapping[str, Any], kv: str) -> Split:
    _even(0, _heads_of(fields, "num_attention_heads"), tp, "the attention heads")
    return _even(0, _extent(shape, 0), tp, "the rows")


def _head_columns(shape: tuple[int, ...], tp: int, fields: Mapping[str, Any], kv: str) -> Split:
    _even(1, _heads_of(fields, "num_attention_heads"), tp, "the attention heads")
    return _even(1, _extent(shape, 1), tp, "the columns")


def _kv_heads(shape: tuple[int, ...], tp: int, fields: Mapping[str, Any], kv: str) -> Split:
    heads, rows = _heads_of(fields, "num_key_value_heads"), _extent(shape, 0)
    if heads % tp == 0:
        return _even(0, rows, tp, "the rows")
    if tp % heads:
        raise LayoutError(
            f"tp {tp} and {heads} key/value heads do not divide each other", expected=f"a divisor or multiple of {heads}", actual=f"tp {tp}"
        )
    return Split(0, heads, tp // heads) if kv == "replicate" else _even(0, rows, tp, "the rows")


def _qkv(shape: tuple[int, ...], tp: int, fields: Mapping[str, Any], kv: str) -> Split:
    _even(0, _heads_of(fields, "num_attention_heads"), tp, "the attention heads")
    _kv_heads(shape, tp, fields, "cut")
    return _even(0, _extent(shape, 0), tp, "the fused rows")


SPLITS: dict[str, Callable[[tuple[int, ...], int, Mapping[str, Any], str], Split]] = {
    "none": _copies,
    "rows": _rows,
    "columns": _columns,
    "vocab": _vocab,
    "heads": _heads,
    "head_columns": _head_columns,
    "kv_heads": _kv_heads,
    "qkv": _qkv,
}
"""Kinds of partition that tables name: ``(shape, tp, config fields, "replicate" | "cut")`` → `Split`."""
