"""``huggingface``: what ``save_pretrained`` writes, single or sharded.

Opening: ``model.safetensors`` or the files of ``model.safetensors.index.json`` (or ``pytorch_model.bin`` and its index);
index and headers must agree both ways. A key in two files is a replica if the bytes are equal, else refused. Weight
files that the index does not name are listed, not read. A manifest of DeepSpeed that lists weight files stands for an index.

Filing: tensors in order into files of at most ``--max-shard-size``; one file has no index (source of names and rule:
huggingface_hub ``serialization``, transformers ``modeling_utils.save_pretrained``).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from json.encoder import encode_basestring_ascii
from math import prod
from typing import Any

from ...errors import CheckpointError, UnsupportedError
from ..containers.base import StoredTensor, TensorSpec
from ..identity import read_identity, read_object
from ..layout import Layout
from ..manifest import Manifest, Resolved, below, find_manifest, manifests_in, names_weights, of_shards, resolve
from ..passes.sides import stored_bytes
from ..plan import Dropped
from ..store import Store
from ..tables import DIALECTS
from ..tensor.dtypes import dtype as dtype_of
from .base import Filing, Hints, Source, Target, Unit, companions
from .common import carried, missing_config, read_unit, scheme_of, settle, told_spec

__all__ = ["HuggingFace"]

_WEIGHTS = re.compile(r".*(?<!_states)\.(safetensors|bin|pt|pth|gguf)$")
"""DeepSpeed's files end in ``_states.pt`` and are no model's own."""
_COMPARE = 1 << 20


class HuggingFace:
    """See the module."""

    name = "huggingface"
    dialects: tuple[str, ...] = ("huggingface",)
    containers: tuple[str, ...] = ("safetensors",)
    ranked = False

    def detect(self, store: Store) -> bool:
        names = store.list()
        if any(_entry(names)):
            return not any(n.startswith("rank_") for n in names)
        found = manifests_in(store).values()
        return bool(found) and not any(map(of_shards, found))

    def open(self, store: Store, hints: Hints) -> Source:
        manifest = hints.manifest or (None if any(_entry(store.list())) else find_manifest(store))
        listed, notes = (None, ()) if manifest is None else _listed(store, manifest)
        container, entry, index = _find(store) if manifest is None else (_container(manifest, listed or ()), manifest.path, None)
        identity = read_identity(store)
        settled = settle(store, hints, identity, "config.json")
        if settled is None:
            raise missing_config(store, self.name)
        family, config, raw = settled
        files: dict[str, str] = {}
        tensors, dropped = _read(store, container, entry, index, files, listed)
        if index is not None or (manifest is not None and store.exists(entry)):
            files[entry] = hashlib.sha256(store.read(entry)).hexdigest()
        return Source(
            store=store,
            format=self.name,
            dialect=DIALECTS.get("huggingface"),
            spec=told_spec(DIALECTS.get("huggingface"), family, config, tensors),
            container=container,
            layout=Layout(),
            family=family,
            config=config,
            raw_config=raw,
            padded_vocab=None,
            units={(0, 0): tensors},
            files=files,
            companions=companions(store),
            dropped=tuple(dropped) + _strays(store, files),
            warnings=notes,
            scheme=scheme_of(raw, family, "config.json"),
            identity=identity,
            config_path="config.json",
        )

    def file(self, target: Target) -> Filing:
        shards = _shards(target)
        units, weight_map = [], {}
        for number, members in enumerate(shards):
            path = "model.safetensors" if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            tensors = tuple([TensorSpec(w.name, w.dtype, w.shape) for w in map(target.wanted.__getitem__, members)])
            units.append(Unit(path, members, tensors, metadata={"format": "pt"}))
            weight_map.update(dict.fromkeys([t.name for t in tensors], path))
        files, copies = carried(target, "")
        if len(shards) > 1:
            files += (("model.safetensors.index.json", _index(sum(_sizes(target)), weight_map)),)
        return Filing(tuple(units), files, copies)


def _index(total: int, weight_map: Mapping[str, str]) -> bytes:
    """What ``json.dumps(index, indent=2, sort_keys=True)`` gives, whose indenting encoder is slow."""
    paths = {path: json.dumps(path) for path in set(weight_map.values())}
    lines = [f"    {encode_basestring_ascii(name)}: {paths[path]}" for name, path in sorted(weight_map.items())]
    body = '{\n  "metadata": {\n    "total_size": %d\n  },\n  "weight_map": {\n%s\n  }\n}\n'
    return (body % (total, ",\n".join(lines))).encode()


def _entry(names: tuple[str, ...]) -> tuple[str, ...]:
    """The file that says where the weights are: an index or a single weight file, by preference."""
    known = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
    found = tuple(name for name in known if name in names)
    return found or tuple(n for n in names if len(names) == 1 and "/" not in n and _WEIGHTS.match(n) and not n.endswith("gguf"))


def _find(store: Store) -> tuple[str, str, Mapping[str, Any] | None]:
    """(container, entry file, index or None)."""
    entry = _entry(store.list())[0]
    container = "torch" if ".bin" in entry or entry.endswith((".pt", ".pth")) else "safetensors"
    return container, entry, read_object(store, entry) if entry.endswith(".json") else None


def _listed(store: Store, manifest: Manifest) -> Resolved:
    """The weight files that a manifest of DeepSpeed lists, where they are; any of them may hold any tensor."""
    if not names_weights(manifest):
        raise UnsupportedError(
            "the manifest is of shards that DeepSpeed-Inference saved, fused and transposed for its kernels; they are not read",
            file=manifest.path, expected="parallelization pp", actual=f"parallelization {manifest.parallelization}",
            remedy="Convert the checkpoint that they were made from",
        )  # fmt: skip
    return resolve(manifest, manifest.files, below(store))


def _container(manifest: Manifest, files: tuple[str, ...]) -> str:
    containers = {"safetensors" if path.endswith(".safetensors") else "torch" for path in files}
    if len(containers) > 1:
        raise CheckpointError("the manifest lists files of several containers", file=manifest.path, actual=list(files)[:5])
    return containers.pop()


def _read(
    store: Store,
    container: str,
    entry: str,
    index: Mapping[str, Any] | None,
    files: dict[str, str],
    listed: tuple[str, ...] | None,
) -> tuple[dict[str, StoredTensor], list[Dropped]]:
    """All tensors by name; fills `files` with header digests."""
    weight_map = None if index is None else _weight_map(index, entry)
    tensors: dict[str, StoredTensor] = {}
    dropped: list[Dropped] = []
    copies: set[tuple[str, str]] = set()
    for path in sorted(set(weight_map.values())) if weight_map is not None else (listed or [entry]):
        if not store.exists(path):
            raise CheckpointError(f"{entry} names a file that is not there", file=path, remedy="Download it")
        found = read_unit(store, container, path)
        files[path] = found.header_digest
        names = found.tensors.keys()
        if names.isdisjoint(tensors) and (weight_map is None or names <= weight_map.keys()):
            tensors.update(found.tensors)
            continue
        for name, tensor in found.tensors.items():
            if name in tensors:
                _same(store, tensors[name], tensor)
                copies.add((path, name))
                dropped.append(Dropped(f"{path}: {name}", f"an identical copy of the one in {tensors[name].file}"))
            elif weight_map is not None and name not in weight_map:
                raise CheckpointError(
                    f"a file holds a tensor that {entry} does not name", tensor=name, file=path, remedy="The index is stale: rebuild it"
                )
            else:
                tensors[name] = tensor
    if weight_map is not None and len(tensors) == len(weight_map) and not copies:
        if [tensors[name].file if name in tensors else "" for name in weight_map] == list(weight_map.values()):
            return tensors, dropped
    for name, path in (weight_map or {}).items():
        if name not in tensors or (tensors[name].file != path and (path, name) not in copies):
            raise CheckpointError(
                f"{entry} names a tensor that its file does not hold", tensor=name, file=path, remedy="One of them is stale: copy both"
            )
    return tensors, dropped


def _weight_map(index: Mapping[str, Any], entry: str) -> dict[str, str]:
    found = index.get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(path, str) for path in found.values()):
        raise CheckpointError("the index has no weight_map of names to files", file=entry, remedy="Copy the index again")
    return found


def _same(store: Store, one: StoredTensor, two: StoredTensor) -> None:
    """Two files hold one key: equal bytes, or refused."""
    equal = (one.dtype, one.shape, one.strides) == (two.dtype, two.shape, two.strides)
    if equal and one.strides is not None:
        raise UnsupportedError(
            "two files hold one tensor as a strided view", tensor=one.name, file=two.file, remedy="Remove the stale file"
        )
    size = stored_bytes(one)
    for at in range(0, size if equal else 0, _COMPARE):
        step = min(_COMPARE, size - at)
        if store.read(one.file, one.offset + at, step) != store.read(two.file, two.offset + at, step):
            equal = False
            break
    if not equal:
        raise CheckpointError(
            "two files hold one tensor with different content",
            tensor=one.name,
            expected=f"the bytes in {one.file}",
            actual=f"those in {two.file}",
            remedy="Remove the stale file",
        )


def _strays(store: Store, files: Mapping[str, str]) -> tuple[Dropped, ...]:
    """Weight files in the root that nothing names."""
    found = [n for n in store.list() if "/" not in n and _WEIGHTS.match(n) and n not in files]
    return tuple(Dropped(name, "a weight file that the index does not name") for name in found)


def _sizes(target: Target) -> list[int]:
    """Bytes of each of `target.wanted`."""
    kinds = [(w.dtype, w.shape) for w in target.wanted]
    known = {(dtype, shape): dtype_of(dtype).nbytes(prod(shape)) for dtype, shape in set(kinds)}
    return [known[kind] for kind in kinds]


def _shards(target: Target) -> list[tuple[int, ...]]:
    """Positions of `target.wanted` per file: in order, a new file when the next tensor would overfill it."""
    shards: list[list[int]] = [[]]
    filled = 0
    for i, size in enumerate(_sizes(target)):
        if shards[-1] and filled + size > target.max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(i)
        filled += size
    return [tuple(shard) for shard in shards]
