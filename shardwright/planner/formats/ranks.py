"""``ranks``: one file per GPU rank, self-describing.

``rank_00003_tp1_pp1[_ep0].safetensors`` (or a zarr group of that name) beside ``shardwright.json``; config and companions
in ``hf/``. Every dialect and container that is registered can be written and read. With a dialect that numbers layers
within a chunk, and a virtual pipeline, keys begin with ``model{chunk}.``. Without ``shardwright.json`` the layout is
read off the file names and the dialect off the keys; the config then comes from ``hf/config.json`` or the user.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from ...errors import CheckpointError
from ..containers import CONTAINERS
from ..containers.base import StoredTensor, TensorSpec
from ..identity import FILE_NAME, named_in, read_identity
from ..layout import Layout
from ..passes.sides import check_units
from ..store import Store
from ..tables import DIALECTS, Dialect, Family
from .base import Filing, Hints, Source, Target, Unit, companions
from .common import carried, missing_config, read_unit, scheme_of, settle, stages, told_spec

__all__ = ["Ranks"]

_NAME = re.compile(r"rank_(\d{5,})_tp(\d+)_pp(\d+)(?:_ep(\d+))?(\.\w+)?$")
_CHUNK = re.compile(r"model(\d{1,9})\.(.*)$", re.DOTALL)


class Ranks:
    """See the module."""

    name = "ranks"
    ranked = True

    @property
    def dialects(self) -> tuple[str, ...]:
        """Every dialect there is, Hugging Face's first."""
        return ("huggingface", *(name for name in DIALECTS.names() if name != "huggingface"))

    @property
    def containers(self) -> tuple[str, ...]:
        """Every container there is, safetensors first."""
        return ("safetensors", *(name for name in CONTAINERS.names() if name != "safetensors"))

    def detect(self, store: Store) -> bool:
        return bool(_names(store))

    def open(self, store: Store, hints: Hints) -> Source:
        identity = read_identity(store)
        settled = settle(store, hints, identity, "hf/config.json")
        if settled is None:
            raise missing_config(store, self.name)
        family, config, raw = settled
        paths = _paths(store)
        container = _container(paths, identity)
        layout = Layout.from_json(identity["layout"]) if identity else _layout(paths)
        files: dict[str, str] = {}
        by_rank = {}
        for rank, path in sorted(paths.items()):
            found = read_unit(store, container, path)
            files.update(dict.fromkeys(_data_files(found.tensors) or _empty(store, path), found.header_digest))
            by_rank[rank] = found.tensors
        dialect = named_in(identity, "dialect", DIALECTS) if identity else _dialect(by_rank)
        units = _units(by_rank, layout, dialect)
        check_units(units, layout, dialect, self.name)
        spec = told_spec(dialect, family, config, {name for unit in by_rank.values() for name in unit})
        if identity:
            files[FILE_NAME] = hashlib.sha256(store.read(FILE_NAME)).hexdigest()
        return Source(
            store=store,
            format=self.name,
            dialect=dialect,
            spec=spec,
            container=container,
            layout=layout,
            family=family,
            config=config,
            raw_config=raw,
            padded_vocab=_vocab(by_rank, dialect, family, spec, layout, config["vocab_size"]),
            units=units,
            files=files,
            companions=companions(store, "hf/"),
            scheme=scheme_of(raw, family, "hf/config.json"),
            identity=identity,
        )

    def file(self, target: Target) -> Filing:
        prefixed = target.layout.vpp > 1 and target.dialect.numbering == "local"
        suffix = CONTAINERS.get(target.container).suffix
        metadata = {"format": "pt"} if target.container in ("safetensors", "zarr") else None
        units = []
        before: tuple[TensorSpec, ...] = ()
        for ranks, positions in stages(target).items():
            chosen, members = [target.wanted[i] for i in positions], tuple(positions)
            tensors = tuple([TensorSpec(f"model{w.chunk}.{w.name}" if prefixed else w.name, w.dtype, w.shape) for w in chosen])
            before = tensors = before if tensors == before else tensors  # one object for alike ranks: they are laid out once
            paths = [(target.layout.place_in_stage(rank), _stem(target.layout, rank) + suffix) for rank in ranks]
            units += [Unit(path, members, tensors, metadata=metadata, place=place) for place, path in paths]
        files, copies = carried(target, "hf/")
        return Filing(tuple(units), files, copies)


def _stem(layout: Layout, rank: int) -> str:
    at = layout.coordinates(rank)
    return f"rank_{rank:05d}_tp{at['tp']}_pp{at['pp']}" + (f"_ep{at['ep']}" if layout.ep > 1 else "")


def _names(store: Store) -> dict[str, re.Match[str]]:
    """Names in the root that are a rank's, in a container that is registered."""
    suffixes = {part.suffix for part in CONTAINERS}
    found = {name: _NAME.match(name) for name in dict.fromkeys(path.split("/")[0] for path in store.list())}
    return {name: match for name, match in found.items() if match and (match[5] or "") in suffixes}


def _paths(store: Store) -> dict[int, str]:
    """File or folder of each rank."""
    found: dict[int, str] = {}
    for name, match in _names(store).items():
        rank = int(match[1])
        if found.setdefault(rank, name) != name:
            raise CheckpointError("two files are of one rank", file=name, actual=f"{found[rank]} and {name}", remedy="Remove the stale one")
    return found


def _container(paths: Mapping[int, str], identity: Mapping[str, Any] | None) -> str:
    """The container of the files' suffix; where several have that suffix, the one that shardwright.json names."""
    suffixes = {match[5] or "" for path in paths.values() if (match := _NAME.match(path))}
    if len(suffixes) > 1:
        raise CheckpointError("rank files of several containers lie in one folder", actual=sorted(suffixes), remedy="Remove the stale ones")
    known = [part.name for part in CONTAINERS if part.suffix in suffixes]
    named = (identity or {}).get("container")
    return named if named in known else known[0]


def _layout(paths: Mapping[int, str]) -> Layout:
    """The layout that the file names say."""
    at = [match for path in paths.values() if (match := _NAME.match(path))]
    tp, pp, ep = (max(int(m[k] or 0) for m in at) + 1 for k in (2, 3, 4))
    layout = Layout(tp=tp, pp=pp, ep=ep)
    for rank, path in paths.items():
        if rank >= layout.ranks or not path.startswith(_stem(layout, rank)):
            raise CheckpointError("a rank's file name contradicts the others", file=path, expected=f"ranks of {layout.to_json()}")
    return layout


def _dialect(by_rank: Mapping[int, Mapping[str, StoredTensor]]) -> Dialect:
    megatron = any(name.startswith("decoder.") or _CHUNK.match(name) for unit in by_rank.values() for name in unit)
    return DIALECTS.get("megatron" if megatron else "huggingface")


def _units(
    by_rank: Mapping[int, Mapping[str, StoredTensor]], layout: Layout, dialect: Dialect
) -> Mapping[tuple[int, int], Mapping[str, StoredTensor]]:
    """Tensors by (rank, chunk); chunk prefixes are taken off."""
    if layout.vpp == 1 or dialect.numbering == "global":
        return {(rank, 0): unit for rank, unit in by_rank.items()}
    units: dict[tuple[int, int], dict[str, StoredTensor]] = {(rank, chunk): {} for rank in by_rank for chunk in range(layout.vpp)}
    for rank, unit in by_rank.items():
        for name, tensor in unit.items():
            match = _CHUNK.match(name)
            if match is None or int(match[1]) >= layout.vpp:
                raise CheckpointError("a key does not say its virtual pipeline chunk", tensor=name, file=tensor.file, expected="model0. … ")
            units[rank, int(match[1])][match[2]] = tensor
    return units


def _vocab(
    by_rank: Mapping[int, Mapping[str, StoredTensor]], dialect: Dialect, family: Family, spec: str, layout: Layout, vocab: int
) -> int | None:
    """Rows of the stored embedding over all tp ranks where that is more than the vocabulary."""
    for row in dialect.rows or ():
        if ("pad_vocab", ()) in row.layout:
            for unit in by_rank.values():
                for name, tensor in unit.items():
                    if name.endswith(tuple(row.names.values())) and tensor.shape:
                        return tensor.shape[0] * layout.tp
    names = [family.stored_name(t, spec) for t in family.tensors if t.split == "vocab" and t.stage == "first"]
    for table in (unit[name] for unit in by_rank.values() for name in names if name in unit):
        if dialect.rows is None and table.shape and table.shape[0] * layout.tp > vocab:
            return table.shape[0] * layout.tp
    return None


def _empty(store: Store, path: str) -> list[str]:
    """The files of a unit without tensors (a pipeline stage without layers): itself, or what is in its group."""
    return [path] if store.exists(path) else [name for name in store.list() if name.startswith(f"{path}/")]


def _data_files(tensors: Mapping[str, StoredTensor]) -> list[str]:
    return list(dict.fromkeys(tensor.file for tensor in tensors.values()))
