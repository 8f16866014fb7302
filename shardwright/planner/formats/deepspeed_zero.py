"""``deepspeed-zero``: what a DeepSpeed engine saves with ZeRO 1, 2 or 3, or with BF16_Optimizer. Source only.

1. Find the step's folder and its files by rank (`zero_files`), read every file's header and tree (`zero_states`).
2. For each model-parallel rank, say of which runs of which files each trained parameter is made (`zero_flat`): its master
   weight, and every vector that the optimizer keeps for it (``exp_avg``, ``exp_avg_sq``), which are the checkpoint's planes.
3. The weights are the masters, as ``zero_to_fp32`` takes them; parameters that are not trained and buffers come from the module
   (ZeRO-3: from each rank's part). The module's low-precision copies of the masters are not read: a cast of the masters
   (``--dtype bfloat16``) gives them, bit for bit. Further names of a shared parameter are the parameter itself.
4. Pipeline stages are put together, for every name says its layer (`zero_names`); a tied parameter is taken from the first stage
   that has it. Tensor-parallel ranks stay apart, as the dialect says.

Beside the tensors a checkpoint says how the training run goes on (`Training`), for a universal checkpoint to carry on.
Sources: deepspeed ``utils/zero_to_fp32.py``, ``checkpoint/ds_to_universal.py``, and those named in the modules above.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import CheckpointError, UnsupportedError, short
from ..config import ModelConfig
from ..containers.base import StoredTensor
from ..containers.torch_zip import TensorValue
from ..identity import read_identity
from ..layout import Layout
from ..passes.planes import MODULE, hub_name
from ..plan import Dropped
from ..store import Store
from ..tables import DIALECTS, Dialect, Family
from .base import Filing, Hints, Source, Target, Training, companions
from .common import read_unit, told_spec, versioned_spec
from .deepspeed_files import config_of
from .deepspeed_mp import dialect_of, padded_of
from .zero_files import OPTIMIZER, Files, folder_of, missing_rank
from .zero_flat import joined, placed, sliced, whole
from .zero_names import Names, global_expert, local_experts
from .zero_states import ModelStates, OptimizerStates, plain, refuse_experts, refuse_other_run

__all__ = ["DeepSpeedZero", "name_shared", "spec_of"]

MASTER = "fp32"
Shapes = Mapping[str, tuple[int, ...]]
Planes = dict[str, dict[str, StoredTensor]]


class DeepSpeedZero:
    """See the module."""

    name = "deepspeed-zero"
    dialects: tuple[str, ...] = ("huggingface", "megatron-nested", "megatron-deepspeed")
    containers: tuple[str, ...] = ("torch",)
    ranked = True

    def detect(self, store: Store) -> bool:
        return folder_of(store, "latest", OPTIMIZER) is not None

    def open(self, store: Store, hints: Hints) -> Source:
        folder = folder_of(store, "latest", OPTIMIZER)
        assert folder is not None
        files = Files.of(store, folder)
        identity = read_identity(store)
        run = _Run(store, files)
        names = Names(name for rank in run.ranks for name in rank.masters)
        units, copies, planes, dropped = _put_together(run, names)
        layout = Layout(tp=run.tp)
        everything = {name for unit in units.values() for name in unit}
        ranks = [path for (_, dp), path in run.paths.items() if dp == 0]
        dialect = DIALECTS.get("megatron-deepspeed") if names.pipeline else dialect_of(everything, ranks)
        first = run.models[0]
        family, config, raw, config_path, notes, shift = config_of(store, hints, identity, folder, first.objects, first.path, self.name)
        spec = spec_of(first, names, dialect, told_spec(dialect, family, config, everything))
        padded = padded_of(units[0, 0], dialect, spec, layout)
        shared = {alias: stored for rank in run.ranks for alias, stored in rank.shared.items()}
        dropped += name_shared(units, shared, names, family, config)
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
            files=run.digests,
            companions=companions(store, "hf/") or companions(store),
            dropped=tuple(dropped),
            warnings=notes,
            identity=identity,
            config_path=config_path,
            norm_shift=shift,
            copies=copies,
            planes=planes,
            training=_training(run, names),
        )

    def file(self, target: Target) -> Filing:
        raise UnsupportedError(
            "a ZeRO checkpoint is cut for the number of ranks of one run, and only read here",
            remedy="Use --to deepspeed-universal, which DeepSpeed loads at any number of ranks",
        )


@dataclass(slots=True)
class _Rank:
    """What one model-parallel rank holds: masters and planes by the run's names, and what is not trained."""

    number: int
    masters: dict[str, StoredTensor]
    planes: Planes
    rest: dict[str, StoredTensor]
    shared: dict[str, str]
    steps: dict[str, int | float | TensorValue] = field(default_factory=dict)
    copies: dict[str, StoredTensor] = field(default_factory=dict)
    """Tensors of the module that repeat masters, in the dtype that the model computes in."""


class _Run:
    """All files of a checkpoint, read and checked against each other."""

    def __init__(self, store: Store, files: Files) -> None:
        self.store, self.files = store, files
        if files.models and files.partitions:
            raise CheckpointError(
                "model states of ZeRO-3 and of another stage lie in one folder",
                file=next(iter(files.partitions.values())),
                actual=f"also {next(iter(files.models.values()))}",
                remedy="Remove those of the other run",
            )
        self.paths = files.models or files.partitions
        self.models = [ModelStates(store, path) for path in self.paths.values()]
        if not self.models:
            raise CheckpointError(
                "optimizer states lie here without their model states",
                file=next(iter(files.optimizers.values())),
                expected="mp_rank_00_model_states.pt, or zero_pp_rank_0_mp_rank_00_model_states.pt",
                remedy="Copy the model states here too",
            )
        self.digests = {states.path: states.index.header_digest for states in self.models}
        for states in self.models:
            refuse_experts(states)
        self.tp, self.pp = self._degrees()
        ranks = range(self.tp * self.pp)
        missing_rank(store, files.folder, "model-parallel", ranks, {mp for mp, _ in self.paths})
        missing_rank(store, files.folder, "model-parallel", ranks, {mp for mp, _ in files.optimizers})
        self.layers = {at: read_unit(store, "torch", path) for at, path in files.layers.items()}
        self.digests |= {files.layers[at]: index.header_digest for at, index in self.layers.items()}
        self.common: dict[str, Any] = {}
        self.ranks = [self._rank(mp) for mp in ranks]

    def _degrees(self) -> tuple[int, int]:
        """Tensor-parallel and pipeline sizes: as stated, else told from the files."""
        first = self.models[0]
        count = max(mp for mp, _ in self.paths) + 1
        if (told := first.degrees) is not None:
            if told[0] * told[1] != count:
                raise CheckpointError(
                    "the files are not those of the sizes that they state",
                    file=first.path,
                    expected=f"tp {told[0]} × pp {told[1]} model-parallel ranks",
                    actual=f"{count} in the names of the files",
                    remedy="Copy the missing ranks' files here, or remove those of another run",
                )
            return told
        if self.files.layers:
            tp = max(rank for _, rank in self.files.layers) + 1
            if count % tp == 0:
                return tp, count // tp
        return count, 1

    def _rank(self, mp: int) -> _Rank:
        """One model-parallel rank, from its data-parallel ranks' files."""
        paths = {dp: path for (rank, dp), path in self.files.optimizers.items() if rank == mp}
        states = [OptimizerStates(self.store, path) for path in paths.values()]
        for one in states:
            self.digests[one.path] = one.index.header_digest
        first = states[0]
        missing_rank(self.store, self.files.folder, "data-parallel", range(max(first.counts)), paths)
        for other in states[1:]:
            if (other.stage, other.counts) != (first.stage, first.counts):
                raise CheckpointError(
                    "ranks' optimizer states are not of one run",
                    file=other.path,
                    expected=f"stage {first.stage}, partitions {first.counts}, as in {first.path}",
                    actual=f"stage {other.stage}, partitions {other.counts}",
                    remedy="Remove the files of the other run",
                )
        if first.sliced != bool(self.files.partitions):
            raise CheckpointError(
                "model states and optimizer states are of different ZeRO stages",
                file=first.path,
                expected="stage 3" if self.files.partitions else "stage 1 or 2",
                actual=f"stage {first.stage}",
                remedy="Remove the files of the other run",
            )
        for dp, one in zip(paths, states, strict=True):
            if (mp, dp) in self.paths:
                refuse_other_run(self._model(mp, dp), one)
        if mp == 0:
            self.common = first.common
        return self._sliced(mp, states) if first.sliced else self._joined(mp, states)

    def _joined(self, mp: int, states: list[OptimizerStates]) -> _Rank:
        """ZeRO 1, 2 and BF16_Optimizer: each group's vector is cut into one part per rank."""
        model, first = self._model(mp, 0), states[0]
        groups = model.shapes or self._shapes_of_layers(mp, states)
        counts, paddings = first.counts, first.paddings
        masters = [one.masters for one in states]
        if len({len(groups), len(counts), *map(len, masters), len(paddings or groups)}) > 1:
            raise CheckpointError(
                "the files do not agree on the number of parameter groups",
                file=first.path,
                expected=f"{len(groups)}, as param_shapes has",
                actual=f"{len(counts)} partition counts, {sorted({len(m) for m in masters})} vectors",
                remedy="Copy the checkpoint again",
            )
        found = _Rank(mp, {}, {}, {}, model.shared)
        for number, (shapes, count) in enumerate(zip(groups, counts, strict=True)):
            gaps = None if paddings is None else paddings[number]
            for held, named in self._expert_ranks(states, shapes, count):
                label = f"parameter group {number}"
                parts = [one.masters[number] for one in held]
                found.masters |= _renamed(joined(label, shapes, gaps, parts), named)
                _check_places(held, number, placed(shapes, gaps, parts[0].shape[0], count))
                for key in _keys(held, number):
                    vectors = [one.vectors(number)[key] for one in held]
                    plane = found.planes.setdefault(key, {})
                    plane |= _renamed(joined(f"{key} of {label}", shapes, gaps, vectors), named)
                found.steps |= {named(name): step for name, step in _steps(held, number, shapes)}
        module = model.module
        if module is not None:
            found.rest = {name: tensor for name, tensor in module.items() if name not in found.masters and name not in found.shared}
            found.copies = {name: tensor for name, tensor in module.items() if name in found.masters}
        return found

    def _expert_ranks(self, states: list[OptimizerStates], shapes: Shapes, count: int) -> Iterable[tuple[list[OptimizerStates], Any]]:
        """The ranks that share a group's vector, and what they call its parameters; several such sets for experts."""
        if count == len(states):
            return [(states, lambda name: name)]
        config = self.models[0].objects.get("ds_config")
        if isinstance(config, dict) and config.get("use_data_before_expert_parallelism"):
            raise UnsupportedError("experts that are dealt out across data-parallel ranks first are not read", file=states[0].path)
        sets, each = len(states) // count, local_experts(shapes)
        if sets * count != len(states) or not each:
            raise CheckpointError(
                "a parameter group is cut into another number of parts than there are ranks, and holds no experts",
                file=states[0].path,
                expected=f"{len(states)} partitions",
                actual=f"{count}",
            )
        return [(states[e::sets], lambda name, first=e * each: global_expert(name, first)) for e in range(sets)]

    def _sliced(self, mp: int, states: list[OptimizerStates]) -> _Rank:
        """ZeRO-3: each parameter is cut into one part per rank."""
        models = [self._model(mp, dp) for dp in range(len(states))]
        first, groups = models[0], models[0].shapes
        if groups is None:
            raise first.wrong("param_shapes", "names and shapes by group", None)
        found = _Rank(mp, sliced("fp32_flat_groups", groups, [one.masters for one in states]), {}, {}, first.shared)
        vectors = range(len(states[0].masters))
        for key in dict.fromkeys(key for number in vectors for key in _keys(states, number)):
            if held := [number for number in vectors if key not in states[0].vectors(number)]:
                raise states[0].wrong(f"state {held[0]}", f"{key!r}, as other sub-groups have", None)
            found.planes[key] = sliced(key, groups, [[one.vectors(number)[key] for number in vectors] for one in states])
        steps = [step for number in vectors for _, step in _steps(states, number, {"": ()})]
        found.steps = dict.fromkeys(found.masters, steps[0]) if steps else {}
        shapes, _ = first.frozen
        parts = [one.frozen[1] for one in models]
        for name, shape in shapes.items():
            if lacking := next((one for one, held in zip(models, parts, strict=True) if name not in held), None):
                raise lacking.wrong("frozen_param_fragments", short(name), None)
            found.rest[name] = whole(name, shape, [held[name] for held in parts])
        buffers = first.buffers
        found.rest |= {name: tensor for name, tensor in (first.module or {}).items() if name in buffers}
        return found

    def _model(self, mp: int, dp: int) -> ModelStates:
        """The model states of a rank."""
        path = self.paths.get((mp, dp))
        if path is None:
            missing_rank(self.store, self.files.folder, "data-parallel", {dp}, {d for m, d in self.paths if m == mp})
        return next(states for states in self.models if states.path == path)

    def _shapes_of_layers(self, mp: int, states: list[OptimizerStates]) -> list[dict[str, tuple[int, ...]]]:
        """Where the model states have no shapes (a pipeline without ZeRO), those of the layers' own tensors."""
        stored = {
            f"{layer}.{key}": t for (layer, tp), index in self.layers.items() if tp == mp % self.tp for key, t in index.tensors.items()
        }
        keys = {name.partition(".")[2]: tensor for name, tensor in reversed(stored.items())}
        groups: list[dict[str, tuple[int, ...]]] = []
        for one in states:
            for number, held in enumerate(one.slices):
                while len(groups) <= number:
                    groups.append({})
                for name in sorted(held, key=held.__getitem__):
                    tied = keys.get(name.split(".", 2)[-1]) if name.startswith("tied_modules.") else None
                    tensor = stored.get(name, tied)
                    if tensor is None:
                        raise one.wrong("param_slice_mappings", "parameters of the layers' files", short(name))
                    groups[number][name] = tensor.shape
        return groups


def _keys(states: list[OptimizerStates], number: int) -> list[str]:
    """What the optimizer keeps for each element of a group: the same on all ranks that hold any of it."""
    keys = [list(one.vectors(number)) for one in states]
    if odd := next((rank for rank, held in enumerate(keys) if held != keys[0]), None):
        raise states[odd].wrong(f"state of group {number}", f"{keys[0]}, as in {states[0].path}", short(keys[odd]))
    return keys[0]


def _check_places(states: list[OptimizerStates], number: int, expected: list[dict[str, tuple[int, int]]]) -> None:
    """Refuse a file that says it holds another rank's part. Only its name says whose it is, and names get lost in copying.

    A mapping that is empty or no rank's is left alone: with ``round_robin_gradients`` DeepSpeed writes it in another order than the part's.
    """
    for rank, one in enumerate(states):
        told = one.slices[number] if one.placed and number < len(one.slices) else expected[rank]
        if told and told != expected[rank] and told in expected:
            raise CheckpointError(
                "a file holds the part of another data-parallel rank than its name says",
                file=one.path,
                expected=f"the part of rank {rank} of parameter group {number}",
                actual=f"that of rank {expected.index(told)}, by its param_slice_mappings",
                remedy="Give the files the names that DeepSpeed gave them",
            )


def _steps(states: list[OptimizerStates], number: int, shapes: Shapes) -> Iterable[tuple[str, int | float | TensorValue]]:
    """The updates of each parameter of a group, which are the same on all ranks."""
    steps = [one.step(number) for one in states]
    if odd := next((rank for rank, step in enumerate(steps) if step != steps[0]), None):
        raise states[odd].wrong("step", f"{short(steps[0])}, as in {states[0].path}", short(steps[odd]))
    return [] if steps[0] is None else [(name, steps[0]) for name in shapes]


def _renamed(tensors: Mapping[str, StoredTensor], named: Any) -> dict[str, StoredTensor]:
    return {named(name): tensor._replace(name=named(name)) for name, tensor in tensors.items()}


Held = dict[tuple[int, int], dict[str, StoredTensor]]
"""Tensors by name, for each (rank, virtual chunk)."""


def _put_together(run: _Run, names: Names) -> tuple[Held, Held, dict[str, Held], list[Dropped]]:
    """Weights, what repeats them, and planes of every tensor-parallel rank, its pipeline stages together; what is left out."""
    units: Held = {(tp, 0): {} for tp in range(run.tp)}
    copies: Held = {(tp, 0): {} for tp in range(run.tp)}
    planes: dict[str, Held] = {}
    dropped: list[Dropped] = []
    for rank in run.ranks:
        unit, copy = units[rank.number % run.tp, 0], copies[rank.number % run.tp, 0]
        taken = set()
        for name, tensor in {**rank.masters, **rank.rest}.items():
            if (own := names.plain(name)) in unit:
                dropped.append(Dropped(f"{name} (model-parallel rank {rank.number})", f"tied: that of {unit[own].file} is taken"))
                taken.add(name)
            else:
                unit[own] = tensor._replace(name=own)
                if name in rank.copies:
                    copy[own] = rank.copies[name]._replace(name=hub_name(MODULE, own))
        for key, plane in rank.planes.items():
            held = planes.setdefault(key, {(tp, 0): {} for tp in range(run.tp)})[rank.number % run.tp, 0]
            for name, tensor in plane.items():
                if name not in taken:
                    own = names.plain(name)
                    held[own] = tensor._replace(name=hub_name(key, own))
    _layers(run, names, units, copies)
    if run.files.experts:
        dropped.append(Dropped("experts", f"{len(run.files.experts)} files that repeat the master weights, which are taken"))
    return units, copies, planes, dropped


def spec_of(states: ModelStates, names: Names, dialect: Dialect, told: str) -> str:
    """The variant of the dialect's names, with the order of QKV rows that the run's checkpoint version has.

    Raises
    ------
    CheckpointError, UnsupportedError
        The version is no number, or there is no such order.
    """
    version = states.objects.get("checkpoint_version", 3.0)
    if type(version) not in (int, float):
        raise states.wrong("checkpoint_version", "a number", short(version))
    return told if names.pipeline or dialect.rows is None else versioned_spec(dialect, told, version)


def name_shared(
    units: Mapping[tuple[int, int], dict[str, StoredTensor]], shared: Mapping[str, str], names: Names, family: Family, config: ModelConfig
) -> list[Dropped]:
    """Further names of shared parameters: names of their own for a model that is not said to tie any; what is left out."""
    if any(alias.when(config.fields) for alias in family.aliases):
        return [Dropped(alias, f"another name of {stored}") for alias, stored in shared.items()]
    for alias, stored in shared.items():
        for unit in units.values():
            if (source := unit.get(names.plain(stored))) is not None:
                unit.setdefault(names.plain(alias), source)
    return []


def _layers(run: _Run, names: Names, units: Held, copies: Held) -> None:
    """A pipeline's layer files: what no master has (buffers, what is not trained); the rest repeats masters."""
    for (layer, tp), index in run.layers.items():
        if (unit := units.get((tp, 0))) is None:
            raise CheckpointError(
                "a layer's file is of a rank that the checkpoint does not have",
                file=run.files.layers[layer, tp],
                expected=f"tp {run.tp}",
                remedy="Remove the files of another run",
            )
        for key, tensor in index.tensors.items():
            own = names.of_layer(layer, key)
            if own in unit:
                copies[tp, 0].setdefault(own, tensor._replace(name=hub_name(MODULE, own)))
            else:
                unit[own] = tensor._replace(name=own)


def _training(run: _Run, names: Names) -> Training:
    """What else the run needs to go on."""
    tag = run.files.folder.rstrip("/") or f"global_step{run.models[0].objects.get('global_steps', 0)}"
    steps = {names.plain(name): step for rank in run.ranks for name, step in rank.steps.items()}
    called = {names.plain(name): name for rank in reversed(run.ranks) for name in rank.masters}
    states = {key: value for key, value in run.models[0].objects.items() if key != "module" and plain(value)}
    paths = tuple((path, path.rpartition("/")[2]) for path in run.paths.values())
    return Training(tag, run.common, steps, called, paths, states)
