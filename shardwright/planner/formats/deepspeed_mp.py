"""``deepspeed-mp``: one file per tensor-parallel rank with the whole module, as DeepSpeed writes it without ZeRO and without a
pipeline, and as its ``MegatronSDLoader`` reads it.

``<tag>/mp_rank_TT_model_states.pt`` beside a file ``latest``; or whatever files a manifest of type Megatron lists
(``mp_rank_TT/model_optim_rng.pt``, for one), in its order. The module is a dictionary under ``module`` or ``model``, flat or
nested; `manifest` says how QKV rows are ordered, else ``checkpoint_version`` does, and without either it is version 0, as
DeepSpeed and Megatron have it. Names of Megatron-LM are of dialect ``megatron-nested``; others are those of a Hugging Face
model, and then there is one rank.

A target is flat and has a manifest whose names count from itself. Rows are those of checkpoint version 2.0 unless a spec asks for
another: 3.0 has the same rows, and DeepSpeed's loader neither merges nor splits it.
Source: DeepSpeed ``runtime/state_dict_factory.py``, ``runtime/engine.py`` (``_save_checkpoint``, ``_load_checkpoint``).
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Mapping
from typing import Any

from ...errors import CheckpointError, UnsupportedError, short
from ..containers.base import ContainerIndex, StoredTensor, TensorSpec
from ..containers.torch_zip import Namespace, TensorRef
from ..identity import read_identity
from ..layout import Layout
from ..manifest import Manifest, below, find_manifest, known_version, manifest_bytes, names_shards, resolve
from ..megatron_deepspeed_args import to_megatron_deepspeed
from ..passes.sides import check_units
from ..store import Store
from ..tables import DIALECTS, Dialect
from .base import Filing, Hints, Source, Target, Unit, companions
from .common import carried, read_unit, stages, told_spec, versioned_spec
from .deepspeed_files import LATEST, LAYER_FILE, MODEL_FILE, TAG, config_of, dropped_of, folder_of, lost_masters, numbered, parallel_size

__all__ = ["META", "DeepSpeedMp", "dialect_of", "engine_states", "padded_of", "refuse_pipeline"]

MANIFEST = "checkpoints.json"
_MEGATRON = re.compile(r"(language_model\.|word_embeddings\.|position_embeddings\.|transformer\.(layers|final_layernorm)\.)")
_VERSIONS = {"": 2.0, "v1": 1.0, "v0": 0.0}
"""Checkpoint version that a spec's ending asks for."""
_RANK = re.compile(r"(?:^|/)mp_rank_(\d+)(?:_model_states\.pt$|/)")


class DeepSpeedMp:
    """See the module."""

    name = "deepspeed-mp"
    dialects: tuple[str, ...] = ("megatron-nested",)
    containers: tuple[str, ...] = ("torch",)
    ranked = True

    def detect(self, store: Store) -> bool:
        return names_shards(store) or folder_of(store, MODEL_FILE, (LAYER_FILE,)) is not None

    def open(self, store: Store, hints: Hints) -> Source:
        manifest = hints.manifest or find_manifest(store)
        paths, folder, warnings = _paths(store, manifest)
        indexes = [read_unit(store, "torch", path) for path in paths]
        identity = read_identity(store)
        layout = Layout(tp=len(paths))
        units = {}
        keys = set()
        for rank, (index, path) in enumerate(zip(indexes, paths, strict=True)):
            parallel_size(index, path, len(paths))
            units[rank, 0] = _module(index, path)
            keys.add(_module_key(index, path))
        version, note = _version(manifest, indexes, paths)
        dialect = dialect_of({name for unit in units.values() for name in unit}, paths)
        check_units(units, layout, dialect, self.name)
        first = indexes[0].objects
        family, config, raw, config_path, notes, shift = config_of(store, hints, identity, folder, first, paths[0], self.name)
        spec = told_spec(dialect, family, config, {name for unit in units.values() for name in unit})
        spec = spec if dialect.rows is None else versioned_spec(dialect, spec, version)
        files = {path: index.header_digest for path, index in zip(paths, indexes, strict=True)}
        if manifest is not None and store.exists(manifest.path):
            files[manifest.path] = hashlib.sha256(store.read(manifest.path)).hexdigest()
        padded = padded_of(units[0, 0], dialect, spec, layout)
        return Source(
            store=store,
            format=self.name,
            dialect=dialect,
            spec=spec,
            container="torch",
            layout=layout,
            family=family,
            config=config,
            raw_config=raw,
            padded_vocab=padded if padded != config["vocab_size"] else None,
            units=units,
            files=files,
            companions=companions(store, "hf/"),
            dropped=dropped_of(first, (*keys, *META)),
            warnings=(*warnings, *(note if dialect.rows is not None else ()), *notes, *lost_masters(first, paths[0])),
            identity=identity,
            config_path=config_path,
            norm_shift=shift,
        )

    def file(self, target: Target) -> Filing:
        refuse_pipeline(target.layout, self.name)
        version = _VERSIONS[target.spec.partition("-")[2]]
        tp = target.layout.tp
        padded = target.padded_vocab or target.config["vocab_size"]
        arguments = Namespace(to_megatron_deepspeed(target.config, tp, 1, padded))
        units: list[Unit] = []
        for ranks, positions in stages(target).items():
            chosen = [target.wanted[i] for i in positions]
            tensors = tuple([TensorSpec(f"module.{w.name}", w.dtype, w.shape) for w in chosen])
            module = {w.name: TensorRef(f"module.{w.name}") for w in chosen}
            objects = {
                "module": module,
                **engine_states(tp, padded, target.config["vocab_size"]),
                "checkpoint_version": version,
                "args": arguments,
            }
            units += [Unit(_path(rank), tuple(positions), tensors, objects, place=rank) for rank in ranks]
        files, copies = carried(target, "hf/")
        manifest = manifest_bytes("Megatron", [unit.path for unit in units], version, tp)
        return Filing(tuple(units), ((LATEST, TAG.encode()), (MANIFEST, manifest), *files), copies)


META = (
    "args", "checkpoint_version", "iteration", "mp_world_size", "dp_world_size", "global_steps", "global_samples", "skipped_steps",
    "checkpoint_info", "ds_config", "ds_version", "buffer_names", "checkpoint_parallel_dimensions", "param_shapes",
    "universal_checkpoint_info",
)  # fmt: skip
"""What a file says of itself, and no state that is lost."""


def refuse_pipeline(layout: Layout, name: str) -> None:
    """Refuse a target with ranks that the format does not have.

    Raises
    ------
    UnsupportedError
        More than tensor-parallel ranks are asked for.
    """
    if layout.pp > 1 or layout.ep > 1:
        raise UnsupportedError(
            f"{name} has tensor-parallel ranks only",
            expected="pp 1, ep 1",
            actual=f"pp {layout.pp}, ep {layout.ep}",
            remedy="Leave out --pp and --ep: DeepSpeed cuts a pipeline when it loads",
        )


def _path(rank: int) -> str:
    return f"{TAG}/mp_rank_{rank:02d}_model_states.pt"


def engine_states(tp: int, padded: int, vocab: int) -> dict[str, Any]:
    """What DeepSpeed's engine asks of a file besides the module."""
    return {
        "buffer_names": [], "optimizer": None, "param_shapes": None, "lr_scheduler": None, "skipped_steps": 0, "global_steps": 0,
        "global_samples": 0, "dp_world_size": 1, "mp_world_size": tp, "iteration": 0,
        "checkpoint_info": {"padded_vocab_size": padded, "original_vocab_size": vocab},
    }  # fmt: skip


def _paths(store: Store, manifest: Manifest | None) -> tuple[list[str], str, tuple[str, ...]]:
    """The ranks' files in order, the folder they lie in, and notes."""
    if manifest is None:
        folder = folder_of(store, MODEL_FILE, (LAYER_FILE,))
        assert folder is not None
        found = numbered(store, MODEL_FILE, folder)
        ranks = [key[0] for key in found]
        if ranks != list(range(len(ranks))):
            raise CheckpointError(
                "ranks are missing among the model-parallel files",
                file=next(iter(found.values())),
                expected=f"ranks 0 … {ranks[-1]}",
                actual=short(ranks),
                remedy="Copy the missing ranks' files here",
            )
        return list(found.values()), folder, ()
    _refuse_others(manifest)
    files, notes = resolve(manifest, manifest.files, below(store))
    if manifest.size is not None and manifest.size != len(files):
        raise CheckpointError(
            "the manifest does not list a file for each of its ranks", file=manifest.path, expected=f"{manifest.size} files",
            actual=f"{len(files)} files", remedy="List all of them, or correct its 'mp_size'",
        )  # fmt: skip
    ordered, more = _in_order(files, manifest)
    shared = posixpath.commonpath([posixpath.dirname(path) for path in ordered])
    return ordered, f"{shared}/" if shared else "", (*notes, *more)


def _refuse_others(manifest: Manifest) -> None:
    if manifest.whole is not None or manifest.type != "Megatron":
        raise UnsupportedError(
            "the manifest is of shards that DeepSpeed-Inference saved, fused and transposed for its kernels; they are not read",
            file=manifest.path,
            expected="type Megatron, and a list of checkpoints",
            actual=f"type {manifest.type}"
            + (", tp and non_tp" if manifest.whole is not None else f", parallelization {manifest.parallelization}"),
            remedy="Convert the checkpoint that they were made from",
        )


def _in_order(files: tuple[str, ...], manifest: Manifest) -> tuple[list[str], tuple[str, ...]]:
    """Files by rank: as listed, unless all their names say other ranks, as of a list that was sorted as text."""
    told = [match and int(match[1]) for match in map(_RANK.search, files)]
    if None in told or sorted(n for n in told if n is not None) != list(range(len(files))) or told == list(range(len(files))):
        return list(files), ()
    ordered = [path for _, path in sorted(zip([n or 0 for n in told], files, strict=True))]
    return ordered, (f"{manifest.path} lists ranks in the order {short(told)}; the numbers in their names were taken",)


def _module_key(index: ContainerIndex, path: str) -> str:
    """``module`` or ``model``: DeepSpeed refuses both, and neither."""
    found = [key for key in ("module", "model") if key in index.objects]
    if len(found) != 1:
        raise CheckpointError(
            "the file has both 'module' and 'model'" if found else "the file has neither 'module' nor 'model'",
            file=path,
            expected="one of them",
            actual=sorted(map(str, index.objects))[:12],
            remedy="Remove the one that is not the model" if found else "Give a checkpoint that holds a model",
        )
    return found[0]


def _module(index: ContainerIndex, path: str) -> dict[str, StoredTensor]:
    """The module's tensors, by names without what wraps the model."""
    key = _module_key(index, path)
    if index.objects[key] is None:
        raise UnsupportedError(
            "the file holds no module: a pipeline's weights are in layer files", file=path,
            remedy="Copy the files layer_*-model_*-model_states.pt here too",
        )  # fmt: skip
    tensors = {name.removeprefix(f"{key}."): tensor for name, tensor in index.tensors.items() if name.startswith(f"{key}.")}
    # Wrappers (FP16_Module, DistributedDataParallel) put a module. before every name.
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _version(manifest: Manifest | None, indexes: list[ContainerIndex], paths: list[str]) -> tuple[float, tuple[str, ...]]:
    """Checkpoint version of the QKV rows; the manifest's counts before the files'."""
    told = [index.objects.get("checkpoint_version") for index in indexes]
    if manifest is not None and manifest.version is not None:
        if odd := [version for version in told if version not in (None, manifest.version)]:
            note = f"{manifest.path} says version {manifest.version:g}, the files say {short(odd[0])}"
            return manifest.version, (f"{note}: the manifest's was taken, as DeepSpeed does",)
        return manifest.version, ()
    if any(other != told[0] for other in told):
        at = next(i for i, other in enumerate(told) if other != told[0])
        raise CheckpointError(
            "ranks are of different checkpoint versions", file=paths[at], expected=short(told[0]), actual=short(told[at]),
            remedy="Remove the files of another checkpoint",
        )  # fmt: skip
    if told[0] is None:
        return 0.0, ("the files have no checkpoint_version: QKV rows were taken as of version 0, as DeepSpeed and Megatron take them",)
    return known_version(told[0], paths[0], "checkpoint_version"), ()


def dialect_of(names: set[str], paths: list[str]) -> Dialect:
    """The dialect of a module with these names, in the files of all tensor-parallel ranks."""
    if any(_MEGATRON.match(name) for name in names):
        return DIALECTS.get("megatron-nested")
    if len(paths) > 1:
        raise UnsupportedError(
            "model-parallel files whose names are not Megatron's: nothing says how their tensors were cut",
            file=paths[0],
            expected="language_model.… or transformer.layers.…",
            actual=short(min(names, default="no tensors")),
        )
    return DIALECTS.get("huggingface")


def padded_of(unit: Mapping[str, StoredTensor], dialect: Dialect, spec: str, layout: Layout) -> int | None:
    """Rows of the embedding over all ranks, where the names are Megatron's."""
    row = next((row for row in dialect.rows or () if ("pad_vocab", ()) in row.layout), None)
    tensor = None if row is None else unit.get(row.names[spec])
    return tensor.shape[0] * layout.tp if tensor is not None and tensor.shape else None
