"""``megatron-deepspeed``: one file per layer and tensor-parallel rank, as DeepSpeed writes a pipeline module; BLOOM is stored so.

``<tag>/layer_LL-model_TT-model_states.pt`` beside a file ``latest``: a flat dictionary of the layer's own parameters. LL counts
the module's layers, those without parameters too, so blocks begin at 3 in bigscience's fork and at 2 in Megatron-DeepSpeed; the
first file that holds a block's tensors says where. Before the blocks lies the embedding, behind them the final norm, whose names
are bare, and an untied head. The pipeline's stages leave no trace in these files. Parameters that every rank has are averaged
(the dialect says which); QKV rows are of checkpoint version 2.0, as DeepSpeed's loader takes them.

GPT-NeoX writes such files, too, with names of its own (dialect ``gpt-neox``): its embedding is layer 0, and behind the blocks from 2
on one layer without parameters comes before the norm.

A target's blocks begin at 3 where a norm follows the embeddings, which only bigscience's model has, else at 2. With the layer
files it has ``mp_rank_NN_model_states.pt`` for every tensor-parallel rank, whose module is None: DeepSpeed's engine asks for one.
Source: DeepSpeed ``runtime/pipe/module.py``, ``runtime/pipe/engine.py``; ``megatron/model/gpt_model.py`` of both forks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...errors import CheckpointError, UnsupportedError, short
from ..containers.base import StoredTensor, TensorSpec
from ..containers.torch_zip import Namespace, TensorRef
from ..identity import read_identity
from ..layout import MOST_LAYERS, Layout
from ..megatron_deepspeed_args import to_megatron_deepspeed
from ..passes.sides import Wanted, check_units
from ..store import Store
from ..tables import DIALECTS
from .base import Filing, Hints, Source, Target, Unit, companions
from .common import carried, read_unit, told_spec
from .deepspeed_files import LATEST, LAYER_FILE, MODEL_FILE, TAG, config_of, dropped_of, folder_of, lost_masters, numbered
from .deepspeed_mp import META, engine_states, refuse_pipeline

__all__ = ["MegatronDeepSpeed"]

_BLOCK = re.compile(r"(?:self_attention|attention)\.")
_PREFIX = re.compile(r"layers\.(\d+)\.")
_NEOX = re.compile(r"layers\.\d+\.attention\.")


class MegatronDeepSpeed:
    """See the module."""

    name = "megatron-deepspeed"
    dialects: tuple[str, ...] = ("megatron-deepspeed", "gpt-neox")
    containers: tuple[str, ...] = ("torch",)
    ranked = True

    def detect(self, store: Store) -> bool:
        return folder_of(store, LAYER_FILE) is not None

    def open(self, store: Store, hints: Hints) -> Source:
        folder = folder_of(store, LAYER_FILE)
        assert folder is not None
        paths = numbered(store, LAYER_FILE, folder)
        ranks = _ranks(paths)
        identity = read_identity(store)
        indexes = {path: read_unit(store, "torch", path) for path in paths.values()}
        tensors = {at: dict(indexes[path].tensors) for at, path in paths.items()}
        first = _first_block(tensors, paths)
        blocks = _blocks(tensors, first)
        units: dict[tuple[int, int], dict[str, StoredTensor]] = {(rank, 0): {} for rank in range(ranks)}
        for (layer, rank), held in tensors.items():
            prefix = f"layers.{layer - first}." if layer in blocks else ""
            for name, tensor in held.items():
                if (before := units[rank, 0].setdefault(f"{prefix}{name}", tensor)) is not tensor:
                    raise CheckpointError(
                        "two layers' files hold one tensor", file=tensor.file, tensor=name, actual=f"also in {before.file}"
                    )
        names = {name for unit in units.values() for name in unit}
        foreign = any(_NEOX.match(name) for name in names)
        layout, dialect = Layout(tp=ranks), DIALECTS.get("gpt-neox" if foreign else "megatron-deepspeed")
        check_units(units, layout, dialect, self.name)
        models = numbered(store, MODEL_FILE, folder)
        path = next(iter(models.values()), next(iter(paths.values())))
        indexes.update({path: read_unit(store, "torch", path)} if models else {})
        objects = indexes[path].objects if models else {}
        _check_version(objects, path)
        family, config, raw, config_path, notes, shift = config_of(store, hints, identity, folder, objects, path, self.name)
        _check_blocks(blocks, config["num_hidden_layers"], paths)
        padded = _padded(units[0, 0], layout)
        return Source(
            store=store,
            format=self.name,
            dialect=dialect,
            spec=told_spec(dialect, family, config, names),
            container="torch",
            layout=layout,
            family=family,
            config=config,
            raw_config=raw,
            padded_vocab=padded if padded != config["vocab_size"] else None,
            units=units,
            files={name: index.header_digest for name, index in indexes.items()},
            companions=companions(store, "hf/"),
            dropped=dropped_of(objects, ("module", *META)),
            warnings=(*notes, *lost_masters(objects, path)),
            identity=identity,
            config_path=config_path,
            norm_shift=shift,
        )

    def file(self, target: Target) -> Filing:
        refuse_pipeline(target.layout, self.name)
        layers, tp = target.config["num_hidden_layers"], target.layout.tp
        neox = target.dialect.name == "gpt-neox"
        first = 3 if any(w.name.startswith("word_embeddings.norm.") for w in target.wanted) else 2
        # bigscience's model and GPT-NeoX's have a layer without parameters behind the blocks, as they have one before them.
        behind = first + layers + (neox or first == 3)
        ends = {"word_embeddings.weight": 1 - neox, **dict.fromkeys(("weight", "bias", "norm.weight", "norm.bias"), behind)}
        ends |= {"lm_head.weight": behind + 1, "final_linear.weight": behind + 1}
        members: dict[int, list[int]] = {}
        for i, wanted in enumerate(target.wanted):
            members.setdefault(_file_number(wanted, first, ends), []).append(i)
        units = []
        for number, positions in sorted(members.items()):
            held = [target.wanted[i] for i in positions]
            tensors = tuple([TensorSpec(_PREFIX.sub("", w.name, count=1), w.dtype, w.shape) for w in held])
            objects = {spec.name: TensorRef(spec.name) for spec in tensors}
            units += [
                Unit(f"{TAG}/layer_{number:02d}-model_{rank:02d}-model_states.pt", tuple(positions), tensors, objects, place=rank)
                for rank in range(tp)
            ]
        padded = target.padded_vocab or target.config["vocab_size"]
        states = {
            "module": None,
            **engine_states(tp, padded, target.config["vocab_size"]),
            "checkpoint_version": 3.0,
            "args": Namespace(to_megatron_deepspeed(target.config, tp, 1, padded)),
        }
        units += [Unit(f"{TAG}/mp_rank_{rank:02d}_model_states.pt", (), (), states, place=rank) for rank in range(tp)]
        files, copies = carried(target, "hf/")
        return Filing(tuple(units), ((LATEST, TAG.encode()), *files), copies)


def _file_number(wanted: Wanted, first: int, ends: Mapping[str, int]) -> int:
    """The layer that a tensor lies in, as the pipeline module counts; what `ends` does not say is the embedding's."""
    match = _PREFIX.match(wanted.name)
    return first + int(match[1]) if match else ends.get(wanted.name, ends["word_embeddings.weight"])


def _ranks(paths: Mapping[tuple[int, ...], str]) -> int:
    """Tensor-parallel ranks; every layer has a file of each."""
    layers: dict[int, list[int]] = {}
    for layer, rank in paths:
        layers.setdefault(layer, []).append(rank)
    most = max(max(ranks) for ranks in layers.values()) + 1
    for layer, ranks in layers.items():
        if ranks != list(range(most)):
            raise CheckpointError(
                "a layer does not have a file of every tensor-parallel rank",
                file=paths[layer, ranks[0]],
                expected=f"ranks 0 … {most - 1}",
                actual=short(ranks),
                remedy="Copy the missing files here, or remove those of another checkpoint",
            )
    return most


def _first_block(tensors: Mapping[tuple[int, ...], Mapping[str, StoredTensor]], paths: Mapping[tuple[int, ...], str]) -> int:
    """The number of the first block's file: the lowest that holds an attention."""
    found = [layer for (layer, _), held in tensors.items() if any(map(_BLOCK.match, held))]
    if not found:
        raise CheckpointError(
            "no layer's file holds a block of a transformer", file=next(iter(paths.values())), expected="self_attention.…",
            actual=short(sorted({name for held in tensors.values() for name in held})[:8]),
        )  # fmt: skip
    return min(found)


def _blocks(tensors: Mapping[tuple[int, ...], Mapping[str, StoredTensor]], first: int) -> set[int]:
    """The numbers of the files that are blocks: those from the first to the last that holds an attention."""
    last = max(layer for (layer, _), held in tensors.items() if any(map(_BLOCK.match, held)))
    return {layer for layer, _ in tensors if first <= layer <= last}


def _check_blocks(blocks: set[int], layers: int, paths: Mapping[tuple[int, ...], str]) -> None:
    first = min(blocks)
    if blocks != set(range(first, first + min(layers, MOST_LAYERS))):
        raise CheckpointError(
            "the files of blocks are not those that the config counts",
            file=paths[first, 0],
            expected=f"{layers} layers: layer_{first:02d} … layer_{first + layers - 1:02d}",
            actual=f"{len(blocks)} layers, the last layer_{max(blocks):02d}",
            remedy="Copy the missing files here, or give the config.json that belongs to the checkpoint (--config)",
        )


def _check_version(objects: Mapping[str, Any], path: str) -> None:
    """DeepSpeed's loader takes layer files as of version 2.0 whatever they say; older ones are no such files."""
    version = objects.get("checkpoint_version")
    if version is not None and (not isinstance(version, int | float) or version not in (2.0, 3.0)):
        raise UnsupportedError(
            "layer files hold QKV rows of checkpoint versions 2.0 and 3.0", file=path, expected="2.0 or 3.0", actual=short(version)
        )


def _padded(unit: Mapping[str, StoredTensor], layout: Layout) -> int | None:
    tensor = unit.get("word_embeddings.weight")
    return tensor.shape[0] * layout.tp if tensor is not None and tensor.shape else None
