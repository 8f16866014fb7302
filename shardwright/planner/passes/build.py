"""Building a plan: all passes in order.

1. Expand the source's rows and bind them to its headers; expand the target's rows.
2. State what the target stores (casts, schemes), file it, lay out every container: now each operand has its place.
3. Lower to programs and bindings; cut into tiles; add up the cost; prove it with `check`.
4. Write ``shardwright.json``, the target's identity.

Boundary: headers and metadata only, through the source's store.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from ...errors import MissingTensorError, UnsupportedError
from ..config import to_huggingface
from ..containers import CONTAINERS
from ..containers.base import Container, UnitLayout
from ..formats import FORMATS
from ..formats.base import Filing, Source, Target, Unit
from ..plan import PAPER, Dropped, Plan, SourceFile, TargetFile, TensorEntry
from ..request import Request
from ..tables import Ignore
from ..tensor.dtypes import dtype as dtype_of
from ..tensor.pieces import FILL
from .check import check
from .identify import with_identity
from .lower import Lowered, lower
from .planes import MODULE, held_by, join_copies, join_sources, join_targets, rows_of, stored_in
from .request import Cast, Words, casts, settle_words
from .rows import Expansion, expand
from .sides import WEIGHT, SourceSide, TargetSide, place, resolve, targets, without_scales
from .tiling import TILE_BYTES, choose_cuts, tile

__all__ = [
    "assemble",
    "bind_weights",
    "build",
    "no_collector",
    "norm_shift",
    "read_names",
    "read_side",
    "refuse_target",
    "sides_of",
    "source_rows",
]


@contextmanager
def no_collector() -> Iterator[None]:
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
    with no_collector():
        words = settle_words(source, request)
        side, wanted = sides_of(source, request, words, casts(source.family, words.dtype))
        filing = _file(source, request, words, wanted)
        files, entries = _lay_out(filing, words, wanted)
        plan = assemble(source, request, words, side, wanted, files, entries, filing, tile_bytes)
        plan = with_identity(plan, source, request, words, wanted, filing)
        check(plan)
        return plan


def sides_of(source: Source, request: Request, words: Words, cast: Cast) -> tuple[SourceSide, TargetSide]:
    family, config = source.family, source.config
    read = source_rows(source)
    side = bind_weights(source, request, read)
    write = expand(family, config, words.dialect, words.spec, request.layout, words.padded_vocab, hub=source.hub)
    wanted = targets(write, request.layout, side, cast, words.scheme, norm_shift(source, request))
    for plane in words.planes:
        more = bind(source, read, request.drop, plane)
        rows = rows_of(write, plane, held_by(more))
        join_targets(wanted, targets(rows, request.layout, more, lambda row, name, before: before, None), plane)
        join_sources(side, more)
    side.dropped += [Dropped(plane, _left_out(request)) for plane in source.planes if plane not in words.planes]
    return side, wanted


def norm_shift(source: Source, request: Request) -> int:
    """What is added to stored norms: nothing for a target that goes on with the source's own run, whose args stay as they are."""
    return 0 if request.to and getattr(FORMATS.get(request.to), "keeps_names", False) else source.norm_shift


def _left_out(request: Request) -> str:
    """Why the optimizer's state is not converted."""
    return "left out with --optimizer drop" if request.optimizer == "drop" else f"{request.to} has no place for the optimizer's state"


def read_side(source: Source) -> SourceSide:
    """The source's rows, bound to its headers, for reading hub tensors as they are stored.

    Raises
    ------
    CheckpointError
        Missing, unknown or wrongly shaped tensors.
    UnsupportedError
        Norms are stored in another way than the model has them.
    """
    if source.norm_shift:
        raise UnsupportedError(
            "norm weights are stored in another way than the family's, and have to be converted before they are read or compared",
            file=source.store.root,
            expected=f"stored values {'+' if source.norm_shift > 0 else '-'} 1",
            remedy="Convert the checkpoint, to huggingface or ranks for example",
        )
    return bind(source, source_rows(source))


def source_rows(source: Source) -> Expansion:
    """Everything that the source's dialect stores for its model at its layout, aliases too. Large: not kept with the source."""
    family, config, padded = source.family, source.config, source.padded_vocab
    return expand(family, config, source.dialect, source.spec, source.layout, padded, hub=source.hub, reading=True)


def bind(source: Source, read: Expansion, drop: Sequence[str] = (), plane: str = WEIGHT) -> SourceSide:
    """The source's rows of one plane, bound to its headers, whatever has to be done to their values; `drop` adds to its own."""
    units = source.units
    if plane != WEIGHT:
        units = source.planes[plane]
        read = rows_of(read, plane, stored_in(units, source.layout))
    asked = tuple(Ignore(pattern, "left out with --drop") for pattern in (*source.drop, *drop))
    known = [ignore.of(source.config.fields) for ignore in source.family.ignore]
    numbers = {path: i for i, path in enumerate(source.files)}
    try:
        return resolve(read, source.layout, units, numbers, (*asked, *source.dialect.ignore, *known), source.dialect.name)
    except MissingTensorError as error:
        if source.given:
            error.remedy = f"Check {' and '.join(source.given)}: they may be another model's. If they are right, copy the checkpoint again"
        raise


def bind_weights(source: Source, request: Request, read: Expansion) -> SourceSide:
    """The source's weights, and what repeats them."""
    side = bind(source, read, request.drop)
    held = sum(len(unit) for unit in source.copies.values())
    if held and request.trust_replicas:
        side.dropped.append(Dropped(MODULE, f"{held} tensors that repeat the master weights; not compared (--trust-replicas)"))
    elif held:
        more = _bind_copies(source, read)
        join_copies(side, more)
        if left := held - len(more.used):
            side.dropped.append(Dropped(MODULE, f"{left} tensors that repeat padded, averaged or left out master weights; not compared"))
    return side


def _bind_copies(source: Source, read: Expansion) -> SourceSide:
    """The rows of what repeats weights: not of those that are padded, tied or averaged, whose copies need not be equal."""
    plain = [
        not row.alias and not (row.average and row.split.width > 1) and not any(p.slot == FILL for s in row.shards for p in s.pieces)
        for row in read.classes
    ]
    kept = Expansion(read.classes, tuple([i for i in read.instances if plain[i.row]]))
    rows = rows_of(kept, MODULE, stored_in(source.copies, source.layout))
    names = {instance.name for instance in rows.instances}
    units = {key: {name: tensor for name, tensor in unit.items() if name in names} for key, unit in source.copies.items()}
    return resolve(rows, source.layout, units, {path: i for i, path in enumerate(source.files)}, (), source.dialect.name)


def read_names(source: Source) -> SourceSide:
    """As `read_side`, for a checkpoint that may be quantised: its scales are accounted for, its values mean nothing yet.

    Raises
    ------
    CheckpointError
        Also where a payload or a scale is missing, or is not what the scheme makes.
    """
    if source.scheme is not None:
        source = replace(source, units={key: without_scales(unit, source.scheme) for key, unit in source.units.items()})
    return bind(source, source_rows(source))


def refuse_target(source: Source, request: Request) -> None:
    """Refuse whatever `build` refuses of a target before it comes to its tensors, for loads, which file nothing.

    Raises
    ------
    Refusal
        The format has no such ranks, is only read, or asks for something that the source does not have.
    """
    _file(source, request, settle_words(source, request), TargetSide())


def _file(source: Source, request: Request, words: Words, wanted: TargetSide) -> Filing:
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
        tuple([bound.row for bound in wanted.bounds]),
        source.training,
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


def _lay_out(filing: Filing, words: Words, wanted: TargetSide) -> tuple[list[TargetFile], list[TensorEntry]]:
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
        place(wanted, unit.members, unit.place, numbers, offsets, [at.grain for at in laid.places])
        rank = _rank_of(unit, wanted)
        entries += [TensorEntry(t.name, rank, t.dtype, t.shape, n, o) for t, n, o in zip(unit.tensors, numbers, offsets, strict=True)]
    files += [TargetFile(path, len(data), ((0, data),) if data else ()) for path, data in filing.files]
    return files, entries


def _rank_of(unit: Unit, wanted: TargetSide) -> int:
    if not unit.members:
        return 0
    ranks = wanted.wanted[unit.members[0]].ranks
    return ranks[unit.place % len(ranks)]


def _like(before: tuple[Unit, UnitLayout] | None, unit: Unit, container: Container) -> UnitLayout | None:
    """The layout of the unit before, under this one's path, where they hold the same: the ranks of a stage."""
    alike = getattr(container, "lays_out_alike", None)
    if before is None or alike is None or not alike(before[0].path, unit.path):
        return None
    other, laid = before
    if unit.tensors is not other.tensors or unit.objects is not other.objects or unit.metadata is not other.metadata:
        return None
    return UnitLayout((replace(laid.files[0], path=unit.path),), laid.places)


def assemble(
    source: Source,
    request: Request,
    words: Words,
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
        (*source.warnings, *filing.warnings, *_warnings(source, request, words, programs), *_useless(request.drop, dropped, sources)),
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
        "source_format": PAPER if source.on_paper else source.format,
        "source_layout": source.layout.to_json(),
        "family": source.family.name,
        "target_format": request.to,
        "target_layout": request.layout.to_json(),
    }


def _warnings(source: Source, request: Request, words: Words, programs: Sequence[Any]) -> list[str]:
    found = []
    vocab = source.config["vocab_size"] if "vocab_size" in source.config.fields else None
    if source.padded_vocab is not None:
        found.append(
            f"the source's vocabulary is padded: rows {vocab} … {source.padded_vocab - 1} are dropped; the run says what they held"
        )
    if norm_shift(source, request):
        stored = "less 1" if source.norm_shift > 0 else "plus 1"
        found.append(
            f"norm weights are stored {stored} in the source and not in the target: what is written is the sum, which rounds below "
            "float32 (bfloat16: by up to 1/256 of a weight between 1 and 2)"
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
