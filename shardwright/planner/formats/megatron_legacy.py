"""``megatron-legacy``: Megatron-LM's ``torch`` checkpoint format.

``latest_checkpointed_iteration.txt`` names ``release`` or an iteration; in that folder lies one
``mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`` per rank, a torch zip of ``args``, ``checkpoint_version``, ``iteration`` and
``model`` (``model0 … modelN`` with a virtual pipeline). ``_PPP`` is there only when pp > 1, ``_EEE`` only when ep > 1, so
``mp_rank_00_001`` is read by the sizes in ``args``, never by its name alone. A target's root also has the args as a list for
a launch script (`megatron_flags`).
Source: Megatron-LM ``training/checkpointing.py`` (``get_checkpoint_name``, ``generate_state_dict``).

Opening keeps the weights; optimizer, schedulers and random states are listed as dropped. Before Megatron-core, ``model``
was nested (``language_model.encoder…``); that is read too, in the order of QKV rows of its ``checkpoint_version``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...errors import CheckpointError, ConfigError, UnsupportedError, short
from .. import megatron_flags
from ..config import ModelConfig
from ..containers.base import StoredTensor, TensorSpec
from ..containers.torch_zip import Namespace, TensorRef, TorchDtype
from ..identity import read_identity
from ..layout import MOST_LAYERS, Layout
from ..manifest import known_version, names_shards
from ..megatron_args import from_megatron, norm_shift, to_megatron
from ..passes.sides import check_units
from ..plan import Dropped
from ..store import Store
from ..tables import DIALECTS, FAMILIES, Dialect, Family
from .base import Filing, Hints, Source, Target, Unit, companions
from .common import carried, missing_config, read_unit, settle, stages, told_spec, versioned_spec

__all__ = ["MegatronLegacy"]

TRACKER = "latest_checkpointed_iteration.txt"
_RANK = re.compile(r"(?:(release|iter_\d{7,})/)?mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?/model_optim_rng\.pt$")
_MODEL = re.compile(r"model(\d{0,9})$")


class MegatronLegacy:
    """See the module."""

    name = "megatron-legacy"
    dialects: tuple[str, ...] = ("megatron",)
    containers: tuple[str, ...] = ("torch",)
    ranked = True

    def detect(self, store: Store) -> bool:
        # A manifest of DeepSpeed's says what the files are, and in which order their QKV rows lie.
        return any(_RANK.match(path) for path in store.list()) and not names_shards(store)

    def open(self, store: Store, hints: Hints) -> Source:
        paths = _files(store)
        identity = read_identity(store)
        indexes = {key: read_unit(store, "torch", path) for key, path in paths.items()}
        first = next(iter(indexes.values()))
        arguments = first.objects.get("args")
        fields = arguments.fields if isinstance(arguments, Namespace) else {}
        layout = _layout(fields, identity, paths, first.objects)
        units, dropped = _units(indexes, paths, layout)
        names = {name for unit in units.values() for name in unit}
        nested = any(name.startswith("language_model.") for name in names)
        dialect = DIALECTS.get("megatron-nested" if nested else "megatron")
        check_units(units, layout, dialect, self.name)
        family, config, raw, warnings = _config(store, hints, identity, fields, next(iter(paths.values())))
        spec = told_spec(dialect, family, config, names)
        if nested:
            file = next(iter(paths.values()))
            # Megatron-LM takes a file that does not say for version 0 (training/checkpointing.py).
            spec = versioned_spec(dialect, spec, known_version(first.objects.get("checkpoint_version", 0), file, "checkpoint_version"))
        padded = _padded(units, dialect, spec, layout)
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
            files={paths[key]: index.header_digest for key, index in indexes.items()},
            companions=companions(store, "hf/"),
            dropped=dropped,
            warnings=warnings,
            identity=identity,
            norm_shift=norm_shift(fields, config),
        )

    def file(self, target: Target) -> Filing:
        arguments, warnings = _arguments(target)
        units: list[Unit] = []
        for ranks, positions in stages(target).items():
            units += self._units(target, ranks, tuple(positions), arguments, units[-1] if units else None)
        files, copies = carried(target, "hf/")
        listed = (megatron_flags.FILE_NAME, megatron_flags.argument_list(arguments).encode())
        return Filing(tuple(units), ((TRACKER, b"release"), listed, *files), copies, tuple(warnings))

    def _units(
        self, target: Target, ranks: tuple[int, ...], positions: tuple[int, ...], arguments: Mapping[str, Any], before: Unit | None
    ) -> list[Unit]:
        """The files of tp ranks that hold the same layers and experts: they differ in nothing but their paths and data."""
        virtual = target.layout.vpp > 1
        models: dict[str, dict[str, TensorRef]] = {f"model{v}" if virtual else "model": {} for v in range(target.layout.vpp)}
        tensors = []
        for i in positions:
            wanted = target.wanted[i]
            key = f"model{wanted.chunk}" if virtual else "model"
            models[key][wanted.name] = TensorRef(f"{key}.{wanted.name}")
            tensors.append(TensorSpec(f"{key}.{wanted.name}", wanted.dtype, wanted.shape))
        objects: Mapping[str, Any] = {"args": Namespace(dict(arguments)), "checkpoint_version": 3.0, "iteration": 0, **models}
        specs = tuple(tensors)
        if before is not None and before.objects is not None and specs == before.tensors:
            specs, objects = before.tensors, before.objects  # one object for alike ranks: they are laid out once
        paths = [(target.layout.place_in_stage(rank), f"release/{_folder(target.layout, rank)}/model_optim_rng.pt") for rank in ranks]
        return [Unit(path, positions, specs, objects, place=place) for place, path in paths]


def _folder(layout: Layout, rank: int) -> str:
    at = layout.coordinates(rank)
    return f"mp_rank_{at['tp']:02d}" + (f"_{at['pp']:03d}" if layout.pp > 1 else "") + (f"_{at['ep']:03d}" if layout.ep > 1 else "")


def _files(store: Store) -> dict[tuple[int, ...], str]:
    """Each rank's file by the numbers in its name."""
    found: dict[str, dict[tuple[int, ...], str]] = {}
    for path in store.list():
        if match := _RANK.match(path):
            ranks = found.setdefault(match[1] or "", {})
            if ranks.setdefault(tuple(int(n) for n in match.groups()[1:] if n is not None), path) != path:
                raise CheckpointError("two files are of one rank", file=path, remedy="Remove the stale one")
    if store.exists(TRACKER):
        text = store.read(TRACKER, 0, min(store.stat(TRACKER).nbytes, 64)).decode("ascii", "replace").strip()
        folder = text if text == "release" else f"iter_{int(text):07d}" if text.isdecimal() else ""
        if folder not in found:
            raise CheckpointError(
                "the tracker names an iteration whose rank files are not there",
                file=TRACKER,
                expected=f"{folder}/mp_rank_…" if folder else "release or a number",
                actual=f"rank files in {', '.join(sorted(found))}" if folder else repr(text),
                remedy="Copy that iteration too, or correct the tracker",
            )
    elif len(found) == 1:
        folder = next(iter(found))
    else:
        raise CheckpointError(
            "several iterations and no tracker file", file=store.root, actual=sorted(found), remedy="Give the folder of one iteration"
        )
    return dict(sorted(found[folder].items()))


def _layout(
    arguments: Mapping[str, Any], identity: Mapping[str, Any] | None, paths: Mapping[tuple[int, ...], str], objects: Mapping[str, Any]
) -> Layout:
    """Sizes from args, else from the identity file, else from names that are not ambiguous."""
    file = next(iter(paths.values()))
    if "tensor_model_parallel_size" in arguments:
        return _layout_of(arguments, objects, file, len(paths))
    if identity is not None:
        return Layout.from_json(identity["layout"])
    widths = {len(key) for key in paths}
    if widths == {1}:
        return Layout(tp=len(paths))
    raise CheckpointError("the file has no args, and its folder's name could mean pipeline or expert rank", file=file)


def _layout_of(arguments: Mapping[str, Any], objects: Mapping[str, Any], file: str, files: int) -> Layout:
    def size(name: str) -> int:
        value = arguments.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise CheckpointError(f"args.{name} is no size", file=file, actual=short(value))
        if (value or 1) > files:
            raise CheckpointError(
                f"args.{name} says more ranks than there are files",
                file=file,
                expected=short(value),
                actual=f"{files} rank files",
                remedy="Copy the missing ranks' files here",
            )
        return value or 1

    tp, pp, ep = size("tensor_model_parallel_size"), size("pipeline_model_parallel_size"), size("expert_model_parallel_size")
    etp = size("expert_tensor_parallel_size") if arguments.get("expert_tensor_parallel_size") is not None else tp
    if etp != tp and arguments.get("num_experts") is not None:
        raise UnsupportedError(
            "Megatron's torch format does not say which part of its experts a rank's file holds where etp is not tp", file=file,
            expected=f"etp {tp}", actual=f"etp {etp}",
        )  # fmt: skip
    chunks = len([key for key in objects if _MODEL.match(str(key)) and key != "model"])
    return Layout(tp=tp, pp=pp, vpp=chunks or 1, ep=ep, stages=_stages(arguments, pp, chunks or 1, file))


def _stages(arguments: Mapping[str, Any], pp: int, vpp: int, file: str) -> tuple[int, ...] | None:
    """Layers per chunk where the args say that they are uneven."""
    text = arguments.get("pipeline_model_parallel_layout")
    if text is not None:
        return _parse_stages(text, file)
    first, last = arguments.get("decoder_first_pipeline_num_layers"), arguments.get("decoder_last_pipeline_num_layers")
    if first is None and last is None:
        return None
    for size in (arguments.get("num_layers"), 0 if first is None else first, 0 if last is None else last):
        if not isinstance(size, int) or not 0 <= size <= MOST_LAYERS:
            raise CheckpointError("args do not say how many layers a stage has", file=file, actual=short(size))
    middle = pp - (first is not None) - (last is not None)
    rest = arguments["num_layers"] - (first or 0) - (last or 0)
    if middle < 0 or rest < 0 or (middle and rest % middle):
        raise CheckpointError(
            "the layers between the first and last stage do not divide", file=file, expected=f"a multiple of {middle}", actual=rest
        )
    sizes = ([first] if first is not None else []) + [rest // middle if middle else 0] * middle + ([last] if last is not None else [])
    if any(size % vpp for size in sizes):
        raise CheckpointError("uneven stages do not divide into virtual chunks", file=file, actual=sizes)
    return tuple(size // vpp for _ in range(vpp) for size in sizes)


def _parse_stages(text: Any, file: str) -> tuple[int, ...]:
    """``"Et*3|t*4|tttL"`` → ``(3, 4, 3)``: layers per chunk, in Megatron's order."""
    if not isinstance(text, str):
        raise UnsupportedError("this pipeline layout is not read", file=file, actual=short(text))
    pattern = re.compile(r"E?((?:t(?:\*\d{1,7})?)*)L?$")
    sizes = []
    for stage in text.replace(",", "").replace(" ", "").split("|"):
        match = pattern.match(stage)
        if match is None:
            raise UnsupportedError("this pipeline layout is not read", file=file, actual=short(text))
        sizes.append(sum(int(n or 1) for n in re.findall(r"t(?:\*(\d+))?", match[1])))
    return tuple(sizes)


def _units(
    indexes: Mapping[tuple[int, ...], Any], paths: Mapping[tuple[int, ...], str], layout: Layout
) -> tuple[dict[tuple[int, int], dict[str, StoredTensor]], tuple[Dropped, ...]]:
    """Weights by (rank, chunk) and name; whatever else the files hold is dropped, by its top key."""
    units: dict[tuple[int, int], dict[str, StoredTensor]] = {}
    dropped: dict[str, Dropped] = {}
    for numbers, index in indexes.items():
        rank = _rank(numbers, layout, paths[numbers])
        for top in index.objects:
            match = _MODEL.match(str(top))
            if match:
                units[rank, int(match[1] or 0)] = _weights(index.tensors, f"{top}.")
            elif top not in ("args", "checkpoint_version", "iteration"):
                dropped.setdefault(str(top), Dropped(str(top), "only weights are converted"))
    return units, tuple(dropped.values())


def _weights(tensors: Mapping[str, StoredTensor], prefix: str) -> dict[str, StoredTensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _rank(numbers: tuple[int, ...], layout: Layout, path: str) -> int:
    """Rank number of a folder's numbers, read by the layout's sizes."""
    rest = list(numbers[1:])
    pp = rest.pop(0) if layout.pp > 1 and rest else 0
    ep = rest.pop(0) if layout.ep > 1 and rest else 0
    fits = len(numbers) == 1 + (layout.pp > 1) + (layout.ep > 1) and numbers[0] < layout.tp and pp < layout.pp and ep < layout.ep
    if not fits:
        raise CheckpointError(
            "a rank's folder does not fit the sizes in args",
            file=path,
            expected=f"tp {layout.tp}, pp {layout.pp}, ep {layout.ep}",
            actual=numbers,
        )
    return layout.rank(tp=numbers[0], pp=pp, ep=ep)


def _padded(units: Mapping[tuple[int, int], Mapping[str, StoredTensor]], dialect: Dialect, spec: str, layout: Layout) -> int | None:
    """Rows of the embedding over all tp ranks."""
    name = next(row.names[spec] for row in dialect.rows or () if ("pad_vocab", ()) in row.layout)
    tensor = units[0, 0].get(name)
    return tensor.shape[0] * layout.tp if tensor is not None and tensor.shape else None


def _config(
    store: Store, hints: Hints, identity: Mapping[str, Any] | None, arguments: Mapping[str, Any], file: str
) -> tuple[Family, ModelConfig, Mapping[str, Any] | None, tuple[str, ...]]:
    """Family and config: from the user or the files that travelled along, else from args."""
    if settled := settle(store, hints, identity, "hf/config.json"):
        return *settled, ()
    if not arguments:
        raise missing_config(store, "megatron-legacy")
    config = from_megatron(arguments, hints.family, hints.vocab_size, file)
    family = hints.family or FAMILIES.get(config.family)
    note = () if hints.family else (f"family {family.name!r} was told from the checkpoint's args; name another with --family",)
    return family, config, None, note


def _arguments(target: Target) -> tuple[dict[str, Any], list[str]]:
    """Everything that Megatron reads back from ``args``."""
    layout = target.layout
    model, warnings = to_megatron(target.config, target.family)
    vocab, unit = target.config["vocab_size"], 128 * layout.tp
    padded = target.padded_vocab or vocab
    if padded % layout.tp:
        raise ConfigError("the padded vocabulary does not divide by tp", expected=f"a multiple of {layout.tp}", actual=padded)
    if layout.etp not in (None, layout.tp):
        raise UnsupportedError(
            "Megatron's torch format cannot name an expert tensor size of its own", expected=f"etp {layout.tp}", actual=f"etp {layout.etp}"
        )
    arguments = {
        **model,
        "padded_vocab_size": padded,
        "make_vocab_size_divisible_by": 128 if -(-vocab // unit) * unit == padded else padded // layout.tp,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp or layout.tp,
        "context_parallel_size": 1,
        "sequence_parallel": False,
        **_stage_arguments(target),
        "params_dtype": TorchDtype(target.dtype),
        "bf16": target.dtype == "bfloat16",
        "fp16": target.dtype == "float16",
        "transformer_impl": "local" if target.spec == "local" else "transformer_engine",
        "moe_grouped_gemm": model["num_experts"] is not None and target.spec == "te",
        "use_mcore_models": True,
        "ckpt_format": "torch",
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "iteration": 0,
    }
    return megatron_flags.with_newer_names(arguments), [*warnings, *megatron_flags.unsaid(arguments)]


def _stage_arguments(target: Target) -> dict[str, Any]:
    layout = target.layout
    layers = target.config["num_hidden_layers"]
    uneven = layout.stages is not None and len(set(layout.stages)) > 1
    if not uneven:
        per_chunk = layers // (layout.pp * layout.vpp)
        return {"num_layers_per_virtual_pipeline_stage": per_chunk if layout.vpp > 1 else None, "pipeline_model_parallel_layout": None}
    sizes = layout.chunk_sizes(layers)
    stages = [f"t*{n}" if n else "" for n in sizes]
    stages[0], stages[-1] = "E" + stages[0], stages[-1] + "L"
    return {"num_layers_per_virtual_pipeline_stage": None, "pipeline_model_parallel_layout": "|".join(stages)}
