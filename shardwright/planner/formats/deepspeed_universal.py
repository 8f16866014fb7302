"""``deepspeed-universal``: DeepSpeed's checkpoint without ranks, which loads at any number of them.

``<tag>/zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt`` for each parameter under the run's own name, ``<tag>/zero/optimizer_state.pt``
for what all have in common, the model states of the run beside ``zero``, and ``latest_universal``, which names the tag.

Reading: a parameter's file holds a dictionary with ``param`` in its full shape, or (what ``ds_to_universal`` makes of ZeRO-3) a
bare vector, whose shape the model states say. A further name of a shared parameter is a copy of low precision there, and
buffers went through float32: both are taken from where they are exact.

Writing, from whatever holds a training run: every parameter in float32, whole, with what DeepSpeed needs to cut it again
(``cat_dim``, ``param_n_sub_params``, ``vocab_tensor``), always in the shape of dictionaries, which all stages load. The run's
model states are carried as they are, for counters, schedules and client states; ZeRO-3 asks for them under other names than the
other stages, so a file of the plain values of theirs is written under the name that is missing.

Sources: deepspeed ``checkpoint/ds_to_universal.py`` (``merge_tp_slices``, ``merge_zero3_slices``, ``_save_optimizer_state``),
``checkpoint/universal_checkpoint.py`` (``load_hp_checkpoint_state``), ``runtime/base_optimizer.py``
(``load_hp_checkpoint_state_from_checkpoint_dir``), ``runtime/zero/stage3.py``
(``load_hp_checkpoint_state_from_checkpoint_dir_stage3``), ``runtime/engine.py`` (``_get_ckpt_name``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from ...errors import CheckpointError, ShapeMismatchError, UnsupportedError
from ..containers.base import StoredTensor, TensorSpec
from ..containers.torch_zip import TensorRef
from ..identity import read_identity
from ..layout import Layout
from ..passes.planes import MODULE, hub_name
from ..passes.rows import RowClass
from ..passes.sides import WEIGHT
from ..plan import Dropped
from ..store import Store
from ..tables import DIALECTS
from .base import Filing, Hints, Source, Target, Training, Unit, companions
from .common import carried, told_spec
from .deepspeed_files import config_of
from .deepspeed_mp import dialect_of
from .deepspeed_zero import name_shared, spec_of
from .zero_files import Files, folder_of
from .zero_flat import whole
from .zero_names import Names
from .zero_states import CommonStates, ModelStates, Single, plain

__all__ = ["DeepSpeedUniversal"]

LATEST = "latest_universal"
MASTER = "fp32"
_PARAMETER = re.compile(r"zero/([^/]+)/([^/]+)\.pt")
_LEFT = ("module", "optimizer", "param_shapes", "buffer_names", "frozen_param_shapes", "frozen_param_fragments", "shared_params")
"""Entries of model states that are of one rank and one way to cut."""


class DeepSpeedUniversal:
    """See the module."""

    name = "deepspeed-universal"
    dialects: tuple[str, ...] = ("huggingface", "megatron-nested", "megatron-deepspeed")
    containers: tuple[str, ...] = ("torch",)
    ranked = False
    planes = True
    keeps_names = True
    dtype = "float32"

    def detect(self, store: Store) -> bool:
        return folder_of(store, LATEST, _PARAMETER) is not None

    def open(self, store: Store, hints: Hints) -> Source:
        folder = folder_of(store, LATEST, _PARAMETER)
        assert folder is not None
        identity = read_identity(store)
        run = _Run(store, folder, _left_out(identity))
        first = run.models[0]
        dialect = DIALECTS.get("megatron-deepspeed") if run.names.pipeline else dialect_of(set(run.weights), [first.path])
        family, config, raw, config_path, notes, shift = config_of(store, hints, identity, folder, first.objects, first.path, self.name)
        units = {(0, 0): run.weights}
        run.dropped += name_shared(units, run.shared, run.names, family, config)
        return Source(
            store=store,
            format=self.name,
            dialect=dialect,
            spec=spec_of(first, run.names, dialect, told_spec(dialect, family, config, run.weights)),
            container="torch",
            layout=Layout(),
            family=family,
            config=config,
            raw_config=raw,
            padded_vocab=None,
            units=units,
            files=run.digests,
            companions=companions(store, "hf/") or companions(store),
            dropped=tuple(run.dropped),
            warnings=notes,
            identity=identity,
            config_path=config_path,
            norm_shift=shift,
            copies={(0, 0): run.copies},
            planes={plane: {(0, 0): held} for plane, held in run.planes.items()},
            training=run.training(),
        )

    def file(self, target: Target) -> Filing:
        training = target.training
        if training is None:
            raise UnsupportedError(
                "a universal checkpoint goes on with a training run, and none is read from this source",
                expected="a deepspeed-zero or deepspeed-universal source",
                remedy="Convert the weights --to huggingface, and start the run from them",
            )
        tag = training.tag if training.tag.endswith("_universal") else f"{training.tag}_universal"
        units = [*_parameters(target, training, tag), _common(target, training, tag), *_states(training, tag)]
        files, copies = carried(target, "hf/")
        carried_on = tuple((path, f"{tag}/{name}") for path, name in training.files)
        return Filing(tuple(units), ((LATEST, tag.encode()), *files), (*copies, *carried_on))


def _parameters(target: Target, training: Training, tag: str) -> Iterator[Unit]:
    """Each parameter's files."""
    vocabulary = {tensor.name for tensor in target.family.tensors if tensor.split == "vocab"}
    steps = _steps(target, training)
    for position, wanted in enumerate(target.wanted):
        name = training.names.get(wanted.name, wanted.name)
        if "/" in name or "\0" in name or name.startswith("."):
            raise CheckpointError("a parameter's name cannot be a folder's", tensor=name, expected="no slash, and no dot before it")
        weight = wanted.plane == WEIGHT
        spec = TensorSpec(name if weight else hub_name(wanted.plane, name), wanted.dtype, wanted.shape)
        objects = {**_cut(target.rows[wanted.bound], vocabulary), "param": TensorRef(spec.name)}
        yield Unit(f"{tag}/zero/{name}/{MASTER if weight else wanted.plane}.pt", (position,), (spec,), objects)
        if weight and wanted.name in steps:
            yield Unit(f"{tag}/zero/{name}/step.pt", (), (), {"": steps[wanted.name]})


def _steps(target: Target, training: Training) -> Mapping[str, Any]:
    """The updates of each parameter; they go with the rest of the optimizer's state."""
    return training.steps if any(wanted.plane != WEIGHT for wanted in target.wanted) else {}


def _cut(row: RowClass, vocabulary: set[str]) -> dict[str, Any]:
    """How DeepSpeed cuts a parameter for tensor-parallel ranks: not at all, along an axis, or each half of it along an axis."""
    if row.split.axis is None or row.average:
        return {}
    found: dict[str, Any] = {"cat_dim": row.split.axis}
    if len(row.hub) == 2:  # gate and up: the tables join nothing else in pairs
        found["param_n_sub_params"] = 2
    if any(name.rpartition(":")[2] in vocabulary for name in row.hub):
        found["vocab_tensor"] = True
    return found


def _common(target: Target, training: Training, tag: str) -> Unit:
    """``optimizer_state.pt``, as stages 1 and 2 and as stage 3 read it."""
    step = next(iter(_steps(target, training).values()), None)
    inner = {"state": {0: {} if step is None else {"step": step}}, "param_groups": training.optimizer["param_groups"]}
    return Unit(f"{tag}/zero/optimizer_state.pt", (), (), {**training.optimizer, "optimizer_state_dict": inner})


def _states(training: Training, tag: str) -> Iterator[Unit]:
    """Model states under the names that the run's own do not have: of ZeRO-3, or of the other stages."""
    names = {name for _, name in training.files}
    ranks = sorted({int(name.rpartition("mp_rank_")[2].partition("_")[0]) for name in names})
    kept = {key: value for key, value in training.state.items() if key not in _LEFT}
    for rank in ranks:
        for name in (f"mp_rank_{rank:02d}_model_states.pt", f"zero_pp_rank_0_mp_rank_{rank:02d}_model_states.pt"):
            if name not in names:
                yield Unit(f"{tag}/{name}", (), (), {"module": {}, "buffer_names": [], **kept})


def _left_out(identity: Mapping[str, Any] | None) -> Sequence[str]:
    """Patterns of what was left out when this was made; the run's own model states, which are carried along, still have it."""
    recipe = (identity or {}).get("recipe")
    patterns = recipe.get("drop") if isinstance(recipe, dict) else None
    return [pattern for pattern in patterns if isinstance(pattern, str)] if isinstance(patterns, list) else []


@dataclass(slots=True)
class _Held:
    """One parameter's files."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    step: Any = None


class _Run:
    """A universal checkpoint, read: weights and planes by the dialect's names."""

    def __init__(self, store: Store, folder: str, left_out: Sequence[str]) -> None:
        self.store, self.folder, self.left_out = store, folder, left_out
        files = Files.of(store, folder)
        self.paths = [*files.models.values(), *files.partitions.values()]
        if not self.paths:
            raise CheckpointError(
                "a universal checkpoint without its model states",
                file=folder or store.root,
                expected="mp_rank_00_model_states.pt, or zero_pp_rank_0_mp_rank_00_model_states.pt",
                remedy="Copy the model states here too",
            )
        found = [ModelStates(store, path) for path in self.paths]
        # Those that hold a module first: the others only repeat its plain values.
        self.models = sorted(found, key=lambda states: not states.objects.get("module") and not states.objects.get("param_shapes"))
        self.partitions = [states for states in found if states.path in files.partitions.values() and states.objects.get("param_shapes")]
        self.digests = {states.path: states.index.header_digest for states in found}
        self.shared = {alias: stored for states in found for alias, stored in states.shared.items()}
        self.shapes = {name: shape for states in found for group in states.shapes or () for name, shape in group.items()}
        self.dropped: list[Dropped] = []
        held = self._parameters()
        trained = [name for name, one in held.items() if len(one.tensors) > 1] or list(held)
        self.names = Names(trained)
        self.weights: dict[str, StoredTensor] = {}
        self.planes: dict[str, dict[str, StoredTensor]] = {}
        self.called: dict[str, str] = {}
        self.steps: dict[str, Any] = {}
        self._take(held)
        self._untrained()
        self.copies = self._copies()
        self.common = self._common()

    def _parameters(self) -> dict[str, _Held]:
        """Every file below ``zero``, by the run's names."""
        found: dict[str, _Held] = {}
        for path in self.store.list():
            match = _PARAMETER.fullmatch(path[len(self.folder) :]) if path.startswith(self.folder) else None
            if match is None:
                continue
            one, held = found.setdefault(match[1], _Held()), Single(self.store, path)
            self.digests[path] = held.index.header_digest
            if match[2] == "step":
                one.step = held.value
            else:
                one.tensors[match[2]] = self._shaped(match[1], held.tensor_of_all)
        return found

    def _shaped(self, name: str, tensor: StoredTensor) -> StoredTensor:
        """A bare vector gets the shape that the model states give the parameter."""
        shape = self.shapes.get(name)
        if len(tensor.shape) != 1 or tensor.strides is not None or shape is None or len(shape) == 1:
            return tensor
        if prod(shape) != tensor.shape[0]:
            raise ShapeMismatchError(
                "a parameter's file holds another number of elements than its shape in the model states",
                tensor=name,
                file=tensor.file,
                expected=shape,
                actual=tensor.shape,
                remedy="Copy the checkpoint again",
            )
        return tensor._replace(shape=shape)

    def _take(self, held: Mapping[str, _Held]) -> None:
        """Weights, planes and steps under the dialect's names."""
        buffers = {name for states in self.models for name in states.buffers}
        # What an optimizer keeps differs by group; a part of what another parameter has is a file that was lost.
        kinds = {frozenset(one.tensors) for one in held.values()}
        for name, one in held.items():
            if MASTER not in one.tensors:
                raise CheckpointError(
                    "a parameter has no weights",
                    tensor=name,
                    file=f"{self.folder}zero/{name}",
                    expected=f"{MASTER}.pt",
                    actual=", ".join(sorted(one.tensors)) or "nothing",
                    remedy="Copy the checkpoint again",
                )
            if len(one.tensors) > 1 and (more := next((kind for kind in kinds if kind > one.tensors.keys()), None)):
                raise CheckpointError(
                    "a parameter has a part of the optimizer's state that others have",
                    tensor=name,
                    file=f"{self.folder}zero/{name}",
                    expected=", ".join(f"{key}.pt" for key in sorted(more)),
                    actual=", ".join(f"{key}.pt" for key in sorted(one.tensors)),
                    remedy="Copy the checkpoint again",
                )
            if name in self.shared or name in buffers:
                continue
            own = self.names.plain(name)
            self.called[own] = name
            for key, tensor in one.tensors.items():
                if key == MASTER:
                    self.weights[own] = tensor._replace(name=own)
                else:
                    self.planes.setdefault(key, {})[own] = tensor._replace(name=hub_name(key, own))
            if one.step is not None:
                self.steps[own] = one.step

    def _untrained(self) -> None:
        """Buffers as the module has them, and what ZeRO-3 leaves of parameters that are not trained."""
        for states in self.models:
            module = states.module or {}
            for name in sorted(states.buffers & module.keys()):
                if not any(fnmatchcase(name, pattern) for pattern in self.left_out):
                    self.weights.setdefault(self.names.plain(name), module[name])
        if self.partitions:
            shapes, _ = self.partitions[0].frozen
            parts = [states.frozen[1] for states in self.partitions]
            for name, shape in shapes.items():
                if self.names.plain(name) not in self.weights:
                    self.weights[self.names.plain(name)] = whole(name, shape, [held[name] for held in parts])

    def _copies(self) -> dict[str, StoredTensor]:
        """What the module of a run without model parallelism has of the weights, as it computed with them."""
        modules = [states.module for states in self.models if states.module]
        if len(modules) != 1 or self.names.pipeline:
            return {}
        found = {own: modules[0].get(name) for own, name in self.called.items()}
        return {
            own: tensor._replace(name=hub_name(MODULE, own))
            for own, tensor in found.items()
            if tensor is not None and tensor.shape == self.weights[own].shape
        }

    def _common(self) -> dict[str, Any]:
        path = f"{self.folder}zero/optimizer_state.pt"
        if not self.store.exists(path):
            raise CheckpointError("a universal checkpoint without what its optimizers share", file=path, remedy="Copy the file here too")
        states = CommonStates(self.store, path)
        self.digests[path] = states.index.header_digest
        if not self.steps and (step := states.step) is not None:
            trained = {name for plane in self.planes.values() for name in plane}
            self.steps = dict.fromkeys(trained, step)
        return states.common

    def training(self) -> Training:
        """What else the run needs to go on."""
        tag = self.folder.rstrip("/") or f"global_step{self.models[0].objects.get('global_steps', 0)}_universal"
        states = {key: value for key, value in self.models[0].objects.items() if key != "module" and plain(value)}
        return Training(tag, self.common, self.steps, self.called, tuple((path, path.rpartition("/")[2]) for path in self.paths), states)
