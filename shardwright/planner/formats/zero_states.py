"""What ZeRO's files say, read with suspicion: the trees of model states and optimizer states as typed parts.

`ModelStates` is one ``*_model_states.pt``, `OptimizerStates` one ``*_optim_states.pt``. A key that is missing, or of a type that
DeepSpeed never writes, is refused with the file, the key, what was expected and what is there. Step counts and other single
numbers are read through the store: they are metadata that happens to be stored as tensors.

Keys: deepspeed ``runtime/engine.py`` (``_common_checkpoint_state``, ``_save_zero_checkpoint``), ``state_dict`` of
``runtime/zero/stage_1_and_2.py``, ``runtime/zero/stage3.py`` (``_rigid_state_dict``) and ``runtime/bf16_optimizer.py``.
Boundary: headers, and single numbers of at most 64 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from ...errors import CheckpointError, UnsupportedError, short
from ..containers.base import ContainerIndex, StoredTensor
from ..containers.torch_zip import Inert, Namespace, TensorRef, TensorValue, TorchDtype, TorchSize
from ..passes.sides import stored_bytes
from ..store import Store
from .common import read_unit

__all__ = ["CommonStates", "ModelStates", "OptimizerStates", "plain", "refuse_experts", "refuse_other_run"]

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

_LARGEST_NUMBER = 64
_FP32 = {False: "single_partition_of_fp32_groups", True: "fp32_flat_groups"}


class _File:
    """One file's tree."""

    def __init__(self, store: Store, path: str) -> None:
        self.store, self.path = store, path
        self.index: ContainerIndex = read_unit(store, "torch", path)

    def wrong(self, key: str, expected: str, actual: object) -> CheckpointError:
        if actual is None:
            actual = "nothing"
        elif not isinstance(actual, str):  # text is what the caller makes of a value
            actual = short(actual) if isinstance(actual, int | float) else type(actual).__name__
        return CheckpointError(
            f"the file's {key!r} is not what DeepSpeed writes",
            file=self.path,
            expected=expected,
            actual=actual,
            remedy="Copy the file again, or give the checkpoint that it belongs to",
        )

    def tensor(self, value: object, key: str) -> StoredTensor:
        if not isinstance(value, TensorRef):
            raise self.wrong(key, "a tensor", value)
        return self.index.tensors[value.name]

    def number(self, value: object, key: str) -> TensorValue:
        """A tensor of a few bytes, with its value."""
        tensor = self.tensor(value, key)
        nbytes = stored_bytes(tensor)
        if nbytes > _LARGEST_NUMBER or tensor.strides is not None:
            raise self.wrong(key, "a number", f"{tensor.dtype} {tensor.shape}")
        return TensorValue(tensor.dtype, tensor.shape, self.store.read(tensor.file, tensor.offset, nbytes))

    def groups_of(self, value: object) -> list[dict[str, Any]]:
        """Parameter groups: hyper-parameters by name."""
        return [self.named(group, "param_groups") for group in self.listed(value, "param_groups")]

    def common_of(self, states: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What of an optimizer's states is not cut over ranks: plain values, single numbers, and the loss scaler."""
        keys = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad", "ds_version")
        found = {key: states[key] for key in keys if key in states}
        found.setdefault("ds_version", self.index.objects.get("ds_version"))
        found["param_groups"] = [
            {key: self.number(value, key) if isinstance(value, TensorRef) else value for key, value in group.items()} for group in groups
        ]
        return found

    def named(self, value: object, key: str) -> dict[str, Any]:
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise self.wrong(key, "a dictionary of names", value)
        return value

    def listed(self, value: object, key: str) -> Sequence[Any]:
        if not isinstance(value, list | tuple):
            raise self.wrong(key, "a list", value)
        return value


class ModelStates(_File):
    """The states of one model-parallel rank (of one data-parallel rank, with ZeRO-3)."""

    @property
    def objects(self) -> Mapping[str, Any]:
        """The whole tree."""
        return self.index.objects

    @property
    def module(self) -> dict[str, StoredTensor] | None:
        """The module's own tensors; None in a pipeline, whose layers have files of their own."""
        if "module" not in self.objects:
            raise self.wrong("module", "a dictionary of tensors, or None", None)
        if (held := self.objects["module"]) is None:
            return None
        found = self.named(held, "module").items()
        return {name: self.index.tensors[ref.name] for name, ref in found if isinstance(ref, TensorRef)}

    @property
    def shapes(self) -> list[Shapes] | None:
        """Names and shapes of the parameters that are trained, by group; None without ZeRO."""
        if (groups := self.objects.get("param_shapes")) is None:
            return None
        return [self._shapes(group, "param_shapes") for group in self.listed(groups, "param_shapes")]

    @property
    def frozen(self) -> tuple[Shapes, dict[str, StoredTensor]]:
        """Parameters that are not trained: shapes, and what this file has of them."""
        shapes, parts = self.objects.get("frozen_param_shapes"), self.objects.get("frozen_param_fragments")
        if shapes is None and parts is None:
            return {}, {}
        held = {name: self.tensor(part, "frozen_param_fragments") for name, part in self.named(parts, "frozen_param_fragments").items()}
        found = self._shapes(shapes, "frozen_param_shapes")
        if held.keys() != found.keys():
            raise self.wrong("frozen_param_fragments", f"{sorted(found)[:5]}", short(sorted(held)[:5]))
        return found, held

    @property
    def buffers(self) -> set[str]:
        """Names in the module that are no parameters."""
        return {name for name in self.listed(self.objects.get("buffer_names") or [], "buffer_names") if isinstance(name, str)}

    @property
    def shared(self) -> dict[str, str]:
        """Further names of parameters that are stored under another."""
        found = self.named(self.objects.get("shared_params") or {}, "shared_params")
        if not all(isinstance(name, str) for name in found.values()):
            raise self.wrong("shared_params", "names", found)
        return found

    @property
    def degrees(self) -> tuple[int, int] | None:
        """Tensor-parallel and pipeline sizes, where the file says them."""
        held = self.objects.get("checkpoint_parallel_dimensions")
        if held is None:
            return None
        sizes = [self.named(held, "checkpoint_parallel_dimensions").get(key) for key in ("tp_degree", "pp_degree")]
        if not all(type(size) is int and size > 0 for size in sizes):
            raise self.wrong("checkpoint_parallel_dimensions", "two positive sizes", short(sizes))
        return sizes[0], sizes[1]  # type: ignore[return-value]

    def _shapes(self, value: object, key: str) -> Shapes:
        found = self.named(value, key)
        if not all(isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape) for shape in found.values()):
            raise self.wrong(key, "shapes", value)
        return {name: tuple(shape) for name, shape in found.items()}


class CommonStates(_File):
    """``optimizer_state.pt`` of a universal checkpoint: what of the optimizer's states is not cut over ranks."""

    @property
    def common(self) -> dict[str, Any]:
        """Loss scaler, clipping, version, parameter groups."""
        return self.common_of(self.index.objects, self.groups_of(self.index.objects.get("param_groups")))

    @property
    def step(self) -> int | float | TensorValue | None:
        """The updates of all parameters, where they are one number: in what stage 3 leaves."""
        inner = self.index.objects.get("optimizer_state_dict")
        states = inner.get("state") if isinstance(inner, dict) else None
        value = states[0].get("step") if isinstance(states, dict) and isinstance(states.get(0), dict) else None
        return value if value is None or type(value) in (int, float) else self.number(value, "step")


class Single(_File):
    """A file that holds one tensor or number: bare, or as ``param``."""

    @property
    def tensor_of_all(self) -> StoredTensor:
        """The tensor."""
        held = self.index.objects
        return self.tensor(held.get("") if "" in held else held.get("param"), "param")

    @property
    def value(self) -> int | float | TensorValue:
        """The number."""
        found = self.index.objects.get("")
        return found if isinstance(found, int | float) else self.number(found, "step")


class OptimizerStates(_File):
    """The optimizer's states on one data-parallel rank of one model-parallel rank."""

    def __init__(self, store: Store, path: str) -> None:
        super().__init__(store, path)
        self.states = self.named(self.index.objects.get("optimizer_state_dict"), "optimizer_state_dict")
        self.sliced = _FP32[True] in self.states

    @property
    def stage(self) -> int:
        """ZeRO's stage; BF16_Optimizer does not say, and partitions as stage 1 does."""
        stage = self.states.get("zero_stage", 1)
        if isinstance(stage, Inert) and stage.args and type(stage.args[0]) is int:
            stage = stage.args[0]
        if stage not in (1, 2, 3) or (stage == 3) != self.sliced:
            raise self.wrong("zero_stage", "1, 2 or 3", short(stage))
        return int(stage)

    @property
    def counts(self) -> list[int]:
        """Partitions of each group's vector; one number where all groups have as many."""
        count = self.states.get("partition_count")
        given = list(count) if isinstance(count, list | tuple) else [count]
        found = [n for n in given if type(n) is int and n > 0]
        if not found or len(found) != len(given):
            raise self.wrong("partition_count", "positive numbers", short(count))
        return found

    @property
    def masters(self) -> list[StoredTensor]:
        """This rank's part of each (sub-)group's vector of master weights."""
        key = _FP32[self.sliced]
        return [self.tensor(part, key) for part in self.listed(self.states.get(key), key)]

    @property
    def paddings(self) -> list[Sequence[int]] | None:
        """Zeros behind each parameter of each group, where parameters are aligned."""
        held = self.states.get("param_alignment_paddings")
        if held is None:
            return None
        return [self.listed(group, "param_alignment_paddings") for group in self.listed(held, "param_alignment_paddings")]

    @property
    def placed(self) -> bool:
        """Whether the file says where parameters lie; those of before universal checkpoints do not."""
        return self.states.get("param_slice_mappings") is not None

    @cached_property
    def slices(self) -> list[dict[str, tuple[int, int]]]:
        """By group, where parameters lie in this rank's part: start and length."""
        found = []
        for group in self.listed(self.states.get("param_slice_mappings"), "param_slice_mappings"):
            places = {}
            for name, at in self.named(group, "param_slice_mappings").items():
                state = at.state if isinstance(at, Inert) and isinstance(at.state, dict) else {}
                start, numel = state.get("start"), state.get("numel")
                if type(start) is not int or type(numel) is not int or min(start, numel) < 0:
                    raise self.wrong("param_slice_mappings", "start and numel", at)
                places[name] = start, numel
            found.append(places)
        return found

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups; none in an elastic checkpoint."""
        held = self._base()
        if isinstance(held, list):
            return []
        return self.groups_of(self.named(held, "base_optimizer_state").get("param_groups"))

    @property
    def common(self) -> dict[str, Any]:
        """Loss scaler, clipping, version, parameter groups; an elastic checkpoint's groups say nothing."""
        return self.common_of(self.states, self.groups or [{"params": [number]} for number, _ in enumerate(self.masters)])

    def state(self, group: int) -> dict[str, Any]:
        """What the optimizer keeps for a (sub-)group's vector: tensors of its length, and numbers."""
        held = self._base()
        if isinstance(held, list):
            return self.named(held[group], "base_optimizer_state") if group < len(held) else {}
        states = held.get("state") if isinstance(held, dict) else None
        if not isinstance(states, dict):
            raise self.wrong("base_optimizer_state", "a dictionary with 'state'", states)
        return self.named(states.get(self._number(group), {}), "state")

    def vectors(self, group: int) -> dict[str, StoredTensor]:
        """The tensors among `state` that have an entry for each element of the vector."""
        found = {}
        for key, value in self.state(group).items():
            if isinstance(value, TensorRef) and self.index.tensors[value.name].shape:
                found[key] = self.index.tensors[value.name]
        return found

    def step(self, group: int) -> int | float | TensorValue | None:
        """How many updates a group has had, as it is stored."""
        value = self.state(group).get("step")
        if value is None:
            held = self.groups
            value = held[group].get("step") if group < len(held) else self.states.get("base_optimizer_state_step")
        if value is None or type(value) in (int, float):
            return value
        return self.number(value, "step")

    def _number(self, group: int) -> int:
        """The number under which torch's optimizer keeps a (sub-)group's vector: it counts through the groups' parameters."""
        numbers = [n for held in self.groups for n in self.listed(held.get("params"), "params")]
        if group >= len(numbers) or type(numbers[group]) is not int:
            raise self.wrong("param_groups", f"a parameter for vector {group}", short(numbers))
        return int(numbers[group])

    def _base(self) -> Any:
        key = "optimizer_state_dict" if self.sliced else "base_optimizer_state"
        if not isinstance(held := self.states.get(key), dict | list):
            raise self.wrong(key, "the optimizer's state", held)
        return held


def plain(value: object, depth: int = 32) -> bool:
    """Whether a value has no tensor and no object of a framework in it."""
    if value is None or type(value) in (str, int, float, bool, bytes, TorchSize, TorchDtype):
        return True
    if isinstance(value, Namespace):
        value = value.fields
    inner = [*value, *value.values()] if isinstance(value, dict) else value
    return depth > 0 and isinstance(inner, list | tuple) and all(plain(item, depth - 1) for item in inner)


def refuse_experts(states: ModelStates) -> None:
    """Refuse experts whose placement the format's own files do not say.

    Raises
    ------
    UnsupportedError
        AutoEP dealt them out.
    """
    if states.objects.get("ds_autoep_layers") or states.objects.get("autoep_layers"):
        raise UnsupportedError(
            "experts that AutoEP dealt out are not read", file=states.path, remedy="Convert it with DeepSpeed's ds_to_universal first"
        )


def refuse_other_run(model: ModelStates, optimizer: OptimizerStates) -> None:
    """Refuse two files of one rank that say different things of their run: one process writes both, in one go.

    Raises
    ------
    CheckpointError
        ``ds_config``, the stage or the number of data-parallel ranks differ.
    """
    for key, said, found in _told(model, optimizer):
        if said != found:
            raise CheckpointError(
                f"model states and optimizer states are of different runs: {key} differs",
                file=optimizer.path,
                expected=f"{short(said)}, as in {model.path}",
                actual=short(found),
                remedy="Remove the files of the other run",
            )


def _told(model: ModelStates, optimizer: OptimizerStates) -> Iterator[tuple[str, object, object]]:
    """What both files say: key, the model states' value, the optimizer states'."""
    config, other = model.objects.get("ds_config"), optimizer.index.objects.get("ds_config")
    if isinstance(config, dict) and isinstance(other, dict) and plain(config) and plain(other):
        yield from _unequal("ds_config", config, other)
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    zero = zero if isinstance(zero, dict) else {}
    # Where the config says 0, or the optimizer says nothing, BF16_Optimizer has parted the vectors by itself.
    if "zero_stage" in optimizer.states and zero.get("stage") in (1, 2, 3):
        yield "zero_stage", zero["stage"], optimizer.stage
    # With MiCS every so many ranks hold all of it; else all do, together.
    ranks, shard = model.objects.get("dp_world_size"), zero.get("mics_shard_size")
    if type(ranks) is int:
        yield "partition_count", shard if type(shard) is int and shard > 0 else ranks, max(optimizer.counts)


def _unequal(key: str, one: object, two: object) -> Iterator[tuple[str, object, object]]:
    """Where two plain values differ, by the path of keys that leads there."""
    if isinstance(one, dict) and isinstance(two, dict):
        for name in dict.fromkeys((*one, *two)):
            yield from _unequal(f"{key}.{short(name) if not isinstance(name, str) else name}", one.get(name), two.get(name))
    elif one != two:
        yield key, one, two
