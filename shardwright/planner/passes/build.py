"""Building a plan: all passes in order.

1. Expand the source's rows and bind them to its headers; expand the target's rows.
2. State what the target stores (casts, schemes), file it, lay out every container: now each operand has its place.
3. Lower to programs and bindings; cut into tiles; add up the cost; prove it with `check`.
4. Write ``shardwright.json``, the target's identity.

`locate` is the same path with the target's places read from an existing target's headers instead of laid out: `verify`
compares through it. Boundary: headers and metadata only, through the source's store.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from json.encoder import encode_basestring_ascii
from math import prod
from typing import Any

from ...errors import UsageError
from ..config import ModelConfig, to_huggingface
from ..containers import CONTAINERS
from ..containers.base import Container, UnitLayout
from ..formats import FORMATS
from ..formats.base import Filing, Source, Target, Unit
from ..identity import FILE_NAME, SCHEMA
from ..layout import Layout
from ..plan import PLAN_FORMAT, Dropped, Plan, SourceFile, TargetFile, TensorEntry
from ..schemes import SCHEMES, Scheme
from ..tables import DIALECTS, Dialect, Family, Ignore
from ..tensor.dtypes import dtype as dtype_of
from .check import check
from .lower import Lowered, lower
from .rows import RowInstance, expand, scope
from .sides import SourceSide, TargetSide, Wanted, place, resolve, targets
from .tiling import TILE_BYTES, choose_cuts, tile

__all__ = ["Located", "Request", "build", "castable", "locate", "padded_vocab", "plan_hash", "read_side"]


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for; together with the source it determines every byte of the target.

    Attributes
    ----------
    to
        Target format.
    dialect, container, spec
        Of the target; None is the format's default.
    dtype
        Cast floating tensors to it, except those the family keeps; None stores as in the source.
    quantize
        Name of a scheme.
    pad_vocab_to
        Pad the vocabulary to a multiple of this; None is the dialect's default.
    trust_replicas
        Do not read and compare copies.
    drop
        Patterns of stored names to leave out.
    """

    to: str
    layout: Layout = field(default_factory=Layout)
    dialect: str | None = None
    container: str | None = None
    spec: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    max_shard_size: int = 5_000_000_000
    pad_vocab_to: int | None = None
    trust_replicas: bool = False
    drop: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "layout": self.layout.to_json(), "drop": list(self.drop)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Request:
        """The request of `to_json`."""
        return cls(**{**values, "layout": Layout.from_json(values["layout"]), "drop": tuple(values["drop"])})


@dataclass(frozen=True)
class _Words:
    """The target's words, settled."""

    dialect: Dialect
    container: str
    spec: str
    padded_vocab: int | None
    config: ModelConfig
    scheme: Scheme | None


@contextmanager
def _no_collector() -> Iterator[None]:
    """Planning makes millions of small objects and no cycles worth collecting meanwhile."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if gc.get_freeze_count() == 0:
            # To the oldest generation at once, instead of a walk over all of them at the next allocation.
            gc.freeze()
            gc.unfreeze()
        if enabled:
            gc.enable()


def build(source: Source, request: Request, *, tile_bytes: int = TILE_BYTES) -> Plan:
    """The plan of a conversion, proven.

    Raises
    ------
    Refusal
        Whatever is wrong with source, request, or their combination.
    """
    with _no_collector():
        words = _words(source, request)
        side, wanted = _sides(source, request, words, _cast(source.family, request.dtype))
        filing = _file(source, request, words, side, wanted)
        files, entries = _lay_out(filing, words, wanted)
        plan = _assemble(source, request, words, side, wanted, files, entries, filing, tile_bytes)
        plan = _with_identity(plan, source, request, words, wanted, filing)
        check(plan)
        return plan


@dataclass(frozen=True, slots=True)
class Located:
    """A plan onto an existing target, unless the target's names, dtypes or shapes are not the request's."""

    plan: Plan
    missing: tuple[str, ...]
    different: tuple[str, ...]
    extra: tuple[str, ...]


def locate(source: Source, request: Request, target: Source) -> Located:
    """The plan whose target operands are those of an existing `target`, found through its own headers."""
    with _no_collector():
        grown = target.config["vocab_size"] if target.config["vocab_size"] > source.config["vocab_size"] else None
        words = replace(_words(source, request), padded_vocab=target.padded_vocab or grown, scheme=target.scheme)
        side, wanted = _sides(source, request, words, _as_stored(target))
        paths = sorted(target.files)
        number = {path: i for i, path in enumerate(paths)}
        found: set[tuple[int, int, str]] = set()
        entries: list[TensorEntry] = []
        missing: list[str] = []
        different: list[str] = []

        def where(w: Wanted, rank: int) -> tuple[int, int]:
            found.add((rank, w.chunk, w.name))
            stored = target.units.get((rank, w.chunk), {}).get(w.name)
            if stored is None:
                missing.append(f"{w.name}@{rank}: {w.dtype} {w.shape}")
                return 0, 0
            if (stored.dtype, stored.shape) != (w.dtype, w.shape) or stored.strides is not None:
                different.append(f"{w.name}@{rank}: expected {w.dtype} {w.shape}, actual {stored.dtype} {stored.shape}")
            entries.append(TensorEntry(w.name, rank, w.dtype, w.shape, number[stored.file], stored.offset))
            return number[stored.file], stored.offset

        for tp in range(request.layout.tp):
            places = [where(w, w.ranks[tp]) for w in wanted.wanted]
            place(wanted, range(len(places)), tp, [file for file, _ in places], [offset for _, offset in places])
        extra = [
            f"{name}@{rank}"
            for (rank, chunk), unit in target.units.items()
            for name in unit
            if (rank, chunk, name) not in found and not any(fnmatchcase(name, i.pattern) for i in words.dialect.ignore)
        ]
        files = [TargetFile(path, target.store.stat(path).nbytes) for path in paths]
        plan = _assemble(source, request, words, side, wanted, files, entries, Filing((), (), ()), TILE_BYTES)
        return Located(plan, tuple(missing), tuple(different), tuple(extra))


def _words(source: Source, request: Request) -> _Words:
    """Settle the target's words; refuse combinations that make no sense."""
    target = FORMATS.get(request.to)
    if not target.ranked and request.layout.ranks > 1:
        raise UsageError(f"{request.to} holds one rank", actual=f"{request.layout.ranks} ranks", remedy="For rank files use --to ranks")
    dialect = DIALECTS.get(_one_of(request.dialect, target.dialects, f"{request.to} has no dialect"))
    container = _one_of(request.container, target.containers, f"{request.to} has no container")
    spec = _one_of(request.spec, dialect.specs or ("",), f"dialect {dialect.name} has no spec")
    if source.scheme is not None:
        raise UsageError(
            "a quantised source can only be verified, not converted", actual=source.scheme.name, remedy="Convert the original weights"
        )
    scheme = None if request.quantize is None else SCHEMES.get(request.quantize)
    if scheme is not None and dialect.rows is not None:
        raise UsageError(f"dialect {dialect.name!r} has no place for quantised weights", remedy="Use --dialect huggingface")
    padded = padded_vocab(source, request, dialect)
    fields = dict(source.config.fields)
    if not target.ranked and padded is not None:
        fields["vocab_size"] = padded  # nothing but config.json says how long the table is
    return _Words(dialect, container, spec, padded, ModelConfig(source.config.family, fields), scheme)


def _one_of(wanted: str | None, known: Sequence[str], what: str) -> str:
    if wanted is None:
        return known[0]
    if wanted not in known:
        raise UsageError(f"{what} {wanted!r}", remedy=f"Known: {', '.join(known)}" if any(known) else "It has none: leave it out")
    return wanted


def padded_vocab(source: Source, request: Request, dialect: Dialect) -> int | None:
    """Rows of the padded vocabulary, or None for the true one."""
    fields = scope(source.config, request.layout, None)
    multiple = request.pad_vocab_to or (dialect.pad_vocab(fields) if dialect.pad_vocab else None)
    if multiple is None:
        return None
    if multiple < 1:
        raise UsageError("--pad-vocab-to needs a positive number", actual=multiple)
    vocab: int = source.config["vocab_size"]
    return -(-vocab // multiple) * multiple


Cast = Callable[[RowInstance, str, str], str]


def _sides(source: Source, request: Request, words: _Words, cast: Cast) -> tuple[SourceSide, TargetSide]:
    family, config = source.family, source.config
    side = read_side(source, request.drop)
    write = expand(family, config, words.dialect, words.spec, request.layout, words.padded_vocab, hub=source.hub)
    return side, targets(write, request.layout, side, cast, words.scheme)


def read_side(source: Source, drop: Sequence[str] = ()) -> SourceSide:
    """The source's rows, bound to its headers.

    Raises
    ------
    CheckpointError
        Missing, unknown or wrongly shaped tensors.
    """
    family, config, padded = source.family, source.config, source.padded_vocab
    read = expand(family, config, source.dialect, source.spec, source.layout, padded, hub=source.hub, reading=True)
    asked = tuple(Ignore(pattern, "left out with --drop") for pattern in drop)
    numbers = {path: i for i, path in enumerate(source.files)}
    return resolve(read, source.layout, source.units, numbers, (*asked, *source.dialect.ignore, *source.family.ignore), source.dialect.name)


def _cast(family: Family, dtype: str | None) -> Cast:
    """The user's dtype for floating tensors of 16 bits and more, but for those the family keeps."""
    after = None if dtype is None else castable(dtype)

    def cast(row: RowInstance, name: str, before: str) -> str:
        if after is None:
            return before
        known = dtype_of(before)
        if known.kind != "float" or known.bits < 16 or any(fnmatchcase(name, pattern) for pattern in family.keep_dtype):
            return before
        return after

    return cast


_CASTABLE = (
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
)  # fmt: skip


def castable(dtype: str) -> str:
    """The full name of a dtype that weights can be cast to."""
    name = dtype_of(dtype).name
    if name not in _CASTABLE:
        raise UsageError(f"weights are not cast to {name}", remedy=f"Known: {', '.join(_CASTABLE)}; to integers with --quantize")
    return name


def _as_stored(target: Source) -> Cast:
    """Whatever dtype an existing target stores a row in; a quantised row goes in as it is."""

    def cast(row: RowInstance, name: str, before: str) -> str:
        stored = target.units.get((target.layout.rank(pp=row.pp), row.chunk), {}).get(row.name)
        taken = target.scheme is not None and stored is not None and target.scheme.takes(name, stored.shape, before)
        return before if stored is None or taken or dtype_of(stored.dtype).kind != "float" else stored.dtype

    return cast


def _file(source: Source, request: Request, words: _Words, side: SourceSide, wanted: TargetSide) -> Filing:
    main = _main_dtype(wanted)
    made = to_huggingface(words.config, source.family, main, source.raw_config)
    if words.scheme is not None:
        made["quantization_config"] = words.scheme.config()
    path = source.config_path
    same = source.raw_config is not None and made == source.raw_config and source.store.exists(path)
    target = Target(
        request.layout,
        words.dialect,
        words.spec,
        words.container,
        words.config,
        source.family,
        main,
        words.padded_vocab,
        request.max_shard_size,
        wanted.wanted,
        made,
        source.store.read(path) if same else None,
        source.companions,
    )
    return FORMATS.get(request.to).file(target)


def _main_dtype(wanted: TargetSide) -> str:
    """The floating dtype that most bytes of the target's unquantised tensors have."""
    sizes: Counter[str] = Counter()
    for bound in wanted.bounds:
        name = bound.outputs[0].dtype if len(bound.outputs) == 1 else bound.dtype
        sizes[name] += len(bound.hub) * prod(bound.row.whole.shape)
    floats = {name: size for name, size in sizes.items() if dtype_of(name).kind == "float"}
    return max(floats, key=lambda name: floats[name]) if floats else "float32"


def _lay_out(filing: Filing, words: _Words, wanted: TargetSide) -> tuple[list[TargetFile], list[TensorEntry]]:
    """Every target file and every target tensor; each operand of `wanted` is given its place."""
    container = CONTAINERS.get(words.container)
    files: list[TargetFile] = []
    entries: list[TensorEntry] = []
    before: tuple[Unit, UnitLayout] | None = None
    for unit in filing.units:
        laid = _like(before, unit, container) or container.lay_out(unit.path, unit.tensors, objects=unit.objects, metadata=unit.metadata)
        before = unit, laid
        numbers = [len(files) + at.file for at in laid.places]
        offsets = [at.offset for at in laid.places]
        files += [TargetFile(f.path, f.nbytes, f.static, f.crcs) for f in laid.files]
        place(wanted, unit.members, unit.tp, numbers, offsets, [at.grain for at in laid.places])
        rank = wanted.wanted[unit.members[0]].ranks[unit.tp] if unit.members else 0
        entries += [TensorEntry(t.name, rank, t.dtype, t.shape, n, o) for t, n, o in zip(unit.tensors, numbers, offsets, strict=True)]
    files += [TargetFile(path, len(data), ((0, data),) if data else ()) for path, data in filing.files]
    return files, entries


def _like(before: tuple[Unit, UnitLayout] | None, unit: Unit, container: Container) -> UnitLayout | None:
    """The layout of the unit before, under this one's path, where they hold the same: the tp ranks of a stage."""
    if before is None or not getattr(container, "ignores_path", False):
        return None
    other, laid = before
    if unit.tensors is not other.tensors or unit.objects is not other.objects or unit.metadata is not other.metadata:
        return None
    return UnitLayout((replace(laid.files[0], path=unit.path),), laid.places)


def _assemble(
    source: Source,
    request: Request,
    words: _Words,
    side: SourceSide,
    wanted: TargetSide,
    files: list[TargetFile],
    entries: list[TensorEntry],
    filing: Filing,
    tile_bytes: int,
) -> Plan:
    lowered = lower(side, wanted, trust_replicas=request.trust_replicas)
    programs = choose_cuts(lowered, tile_bytes)
    tiles = tile(programs, lowered.bindings, lowered.grains, tile_bytes)
    numbers = {path: i for i, path in enumerate(source.files)}
    sources = tuple(TensorEntry(s.name, rank, s.dtype, s.shape, numbers[s.file], s.offset, s.strides is None) for rank, s in side.used)
    sources, skipped = _read_or_skipped(sources, lowered) if request.trust_replicas else (sources, [])
    stats = {path: source.store.stat(path) for path in source.files}
    fingerprints = tuple(SourceFile(path, stats[path].nbytes, stats[path].mtime_ns, digest) for path, digest in source.files.items())
    dropped = (*source.dropped, *side.dropped, *skipped)
    recipe = {**request.to_json(), "family": source.family.name, "config": dict(source.config.fields), "tile_bytes": tile_bytes}
    return Plan(
        recipe,
        source.store.root,
        _summary(source, request),
        fingerprints,
        tuple(files),
        filing.copies,
        tuple(programs),
        tuple(lowered.bindings),
        tiles,
        sources,
        tuple(entries),
        dropped,
        (*source.warnings, *filing.warnings, *_warnings(source, words, programs), *_useless(request.drop, dropped, sources)),
        sum(source.store.stat(path).nbytes for path, _ in filing.copies),
    )


def _read_or_skipped(sources: tuple[TensorEntry, ...], lowered: Lowered) -> tuple[tuple[TensorEntry, ...], list[Dropped]]:
    """Split source tensors into those that a program reads and copies that are trusted."""
    read: set[tuple[int, int]] = set()
    for program, bound in zip(lowered.programs, lowered.bindings, strict=True):
        for operand in {p.slot for p in (*program.gather, *program.padding)}:
            read.update(zip(bound.source_file[:, operand].tolist(), bound.source_offset[:, operand].tolist(), strict=True))
    skipped = [t for t in sources if (t.file, t.offset) not in read and t.nbytes]
    kept = tuple(t for t in sources if (t.file, t.offset) in read or not t.nbytes)
    return kept, [Dropped(f"{t.name} (rank {t.rank})", "a copy, not compared (--trust-replicas)") for t in skipped]


def _summary(source: Source, request: Request) -> dict[str, Any]:
    return {
        "source_format": source.format,
        "source_layout": source.layout.to_json(),
        "family": source.family.name,
        "target_format": request.to,
        "target_layout": request.layout.to_json(),
    }


def _warnings(source: Source, words: _Words, programs: Sequence[Any]) -> list[str]:
    found = []
    vocab = source.config["vocab_size"] if "vocab_size" in source.config.fields else None
    if source.padded_vocab is not None:
        found.append(
            f"the source's vocabulary is padded: rows {vocab} … {source.padded_vocab - 1} are dropped; the run says what they held"
        )
    if words.padded_vocab is not None and words.padded_vocab != vocab:
        found.append(f"the vocabulary is padded with zeros from {vocab} to {words.padded_vocab} rows")
    for program in programs:
        pieces = len(program.gather) + sum(len(o.scatter) for o in program.outputs)
        if pieces > 100_000:
            found.append(f"{program.label}: {pieces} pieces")
    return found


def _useless(patterns: Sequence[str], dropped: Sequence[Dropped], used: Sequence[TensorEntry]) -> list[str]:
    """What ``--drop`` asked for in vain."""
    found = []
    for pattern in patterns:
        if not any(fnmatchcase(d.name, pattern) for d in dropped):
            needed = any(fnmatchcase(t.name, pattern) for t in used)
            why = "the model needs what it names" if needed else "no tensor has such a name"
            found.append(f"--drop {pattern!r} left nothing out: {why}")
    return found


def plan_hash(plan: Plan) -> str:
    """SHA-256 over the recipe, the plan format, the tiles, and each source file's size, header digest and mtime.

    Paths and the tool's version are left out: a moved source or a newer tool can resume.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps([PLAN_FORMAT, plan.recipe], sort_keys=True, default=str).encode())
    for column in (plan.tiles.first, plan.tiles.program, plan.tiles.row, plan.tiles.lo, plan.tiles.hi):
        digest.update(column.astype("<i8").tobytes())
    digest.update(json.dumps([(f.nbytes, f.header_digest, f.mtime_ns) for f in plan.source_files]).encode())
    return digest.hexdigest()


def _with_identity(plan: Plan, source: Source, request: Request, words: _Words, wanted: TargetSide, filing: Filing) -> Plan:
    """The plan with ``shardwright.json`` among its target files."""
    made = {
        "schema": SCHEMA,
        "format": request.to,
        "dialect": words.dialect.name,
        "spec": words.spec,
        "container": words.container,
        "layout": request.layout.to_json(),
        "family": source.family.name,
        "config": dict(words.config.fields),
        "padded_vocab": words.padded_vocab,
        "recipe": plan.recipe,
        "plan_hash": plan_hash(plan),
        "source_config": source.raw_config,
        "companions": [to for _, to in filing.copies],
        "source": {"format": source.format, "layout": source.layout.to_json(), "files": [asdict(f) for f in plan.source_files]},
        "dropped": [asdict(d) for d in plan.dropped],
    }
    text = json.dumps(made, sort_keys=False, default=str)
    data = f'{text[:-1]}, "tensors": {_tensor_table(plan, wanted, filing)}}}\n'.encode()
    return replace(plan, target_files=(*plan.target_files, TargetFile(FILE_NAME, len(data), ((0, data),))))


def _tensor_table(plan: Plan, wanted: TargetSide, filing: Filing) -> str:
    """``[key, rank, dtype, shape, partition axis or null, file]`` per stored tensor, as JSON.

    Written by hand: there can be a million, and the tp ranks of a stage have all but rank and file in common.
    """
    paths = [json.dumps(f.path) for f in plan.target_files]
    rows: list[str] = []
    spelled: list[tuple[str, str]] = []
    before: Unit | None = None
    for unit in filing.units:
        if before is None or unit.tensors is not before.tensors or unit.members is not before.members:
            spelled = _spelled(unit, wanted)
        before = unit
        entries = plan.target_tensors[len(rows) : len(rows) + len(spelled)]
        rows += [f"{head}{t.rank}{tail}{paths[t.file]}]" for (head, tail), t in zip(spelled, entries, strict=True)]
    return f"[{', '.join(rows)}]"


def _spelled(unit: Unit, wanted: TargetSide) -> list[tuple[str, str]]:
    """What stands before the rank and between rank and file, for each tensor of a unit."""
    tails: dict[tuple[int, int], str] = {}
    found = []
    for position, (name, dtype, shape) in zip(unit.members, unit.tensors, strict=True):
        number, _, output = wanted.wanted[position][:3]
        if (number, output) not in tails:
            split = wanted.bounds[number].outputs[output].split
            tails[number, output] = f", {json.dumps([dtype, shape, split.axis if split.parts > 1 else None])[1:-1]}, "
        found.append((f"[{encode_basestring_ascii(name)}, ", tails[number, output]))
    return found
