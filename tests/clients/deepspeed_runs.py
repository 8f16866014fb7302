"""What the ranks of a real DeepSpeed run do: train and save, or load and go on. Runs in the processes that `deepspeed` forks.

1. A `Job` is one model in one layout under one DeepSpeed configuration. Its global batch depends on the step only and is
   dealt out to the data-parallel ranks, so that a job that goes on in another layout sees the same tokens.
2. `Training` makes the first steps, saves with ``save_checkpoint``, asks the live optimizer for what it holds (the truth),
   then goes on for a few steps: the losses that a resumed run must repeat.
3. `Resumption` loads a checkpoint or a universal one, asks for the same truth, and goes on.

The truth is taken with DeepSpeed's ``safe_get_full_*``, which adds up the live partitions and knows nothing of files.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from tests.clients import deepspeed_models, deepspeed_stack
from tests.clients.deepspeed_stack import STACKS, TensorGroup

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deepspeed import DeepSpeedEngine
    from deepspeed.runtime.pipe import ProcessTopology

__all__ = ["Job", "Rank", "Resumption", "State", "Training", "prepare", "token_ids"]

_LENGTH = 9
_IMPORTS = (
    "deepspeed",
    "deepspeed.comm.torch",
    "deepspeed.checkpoint.ds_to_universal",
    "deepspeed.moe.layer",
    "deepspeed.pipe",
    "deepspeed.runtime.state_dict_factory",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.utils.zero_to_fp32",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)
"""Many are imported only when they are used: each forked rank would spend seconds on them."""

Rank = tuple[int, int, int]
"""Pipeline stage, tensor-parallel rank, expert-parallel rank."""


@dataclasses.dataclass(frozen=True)
class State:
    """What a model-parallel rank holds once its data-parallel ranks are joined; the names are the module's own."""

    param: dict[str, torch.Tensor]
    """Full float32 masters of the trained parameters."""
    exp_avg: dict[str, torch.Tensor]
    exp_avg_sq: dict[str, torch.Tensor]
    step: float
    """The optimizer's."""
    module: dict[str, torch.Tensor]
    """What the module computes with: every parameter, frozen ones too, in the job's dtype."""
    buffer: dict[str, torch.Tensor]
    shared: dict[str, str]
    """Other names of a parameter, each with the name under which it is listed."""
    expert: tuple[str, ...]
    """Parameters that belong to experts; their numbers count from 0 on each expert-parallel rank."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One model in one layout under one DeepSpeed configuration."""

    model: str
    stage: int = 0
    dp: int = 2
    tp: int = 1
    pp: int = 1
    ep: int = 1
    dtype: str = "float32"
    gradients: str | None = None
    """``"fp32"`` at stage 1 in bfloat16 makes DeepSpeed use its BF16_Optimizer."""
    groups: int = 1
    """Optimizer groups: all together, matrices and vectors, or matrices, vectors and embeddings."""
    frozen: tuple[str, ...] = ()
    """Parameters whose names contain one of these are not trained."""
    batch: int = 4
    zero: tuple[tuple[str, Any], ...] = ()
    """More settings of ``zero_optimization``."""

    @property
    def world(self) -> int:
        """Number of ranks: Megatron's order, tensor-parallel rank fastest, then data-parallel rank, then stage."""
        return self.dp * self.tp * self.pp

    def config(self, *, universal: bool) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        config: dict[str, Any] = {
            "train_batch_size": self.batch,
            "gradient_accumulation_steps": 1,
            "steps_per_print": 1 << 30,
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": 20000,
                "stage3_param_persistence_threshold": 40,
                **dict(self.zero),
            },
            "zero_allow_untested_optimizer": True,
            "checkpoint": {"load_universal": universal},
        }
        if self.dtype == "bfloat16":
            config["bf16"] = {"enabled": True}
        if self.dtype == "float16":
            config["fp16"] = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 3}
        if self.gradients:
            config["data_types"] = {"grad_accum_dtype": self.gradients}
        return config


def token_ids(job: Job, step: int) -> torch.Tensor:
    """The global batch of a step, ``[batch, length]``; the labels too."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(1, deepspeed_models.vocabulary(job.model), (job.batch, _LENGTH), generator=generator)


def prepare() -> None:
    """Import DeepSpeed and let it run without a GPU and without a compiler."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    for module in _IMPORTS:
        importlib.import_module(module)
    # Not `deepspeed.comm.torch`, which is torch itself: the package's star imports hide its module of that name.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # would compile an operator; gloo works without
    accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
    type(accelerator).is_fp16_supported = lambda _self: True  # torch computes it on every CPU, if slowly
    logging.getLogger("DeepSpeed").setLevel("ERROR")


@dataclasses.dataclass(frozen=True)
class Training:
    """Train, save, go on."""

    job: Job
    folder: str
    steps: int = 2
    more: int = 2
    client_state: tuple[tuple[str, Any], ...] = ()

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.job.world

    def run(self, rank: int, store: Path) -> dict[str, Any]:
        """Be one rank: its `Rank`, its `State` when it saved, and the losses of the further steps."""
        run = _Run(self.job, rank, store, universal=False)
        for step in range(self.steps):
            run.step(step)
        run.engine.save_checkpoint(self.folder, client_state=run.client_state() | dict(self.client_state))
        config = getattr(run.engine.module, "config", None)
        if rank == 0 and hasattr(config, "save_pretrained"):
            config.save_pretrained(self.folder)
        state = run.state()
        state["losses"] = [run.step(self.steps + i) for i in range(self.more)]
        dist.barrier()
        return state


@dataclasses.dataclass(frozen=True)
class Resumption:
    """Load, go on."""

    job: Job
    folder: str
    universal: bool
    done: int = 2
    more: int = 2

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.job.world

    def run(self, rank: int, store: Path) -> dict[str, Any]:
        """Be one rank: its `Rank`, its `State` just after loading, and the losses of the further steps."""
        run = _Run(self.job, rank, store, universal=self.universal)
        loaded, _ = run.engine.load_checkpoint(self.folder)
        if loaded is None:
            raise AssertionError(f"DeepSpeed found nothing to load in {self.folder}")
        if run.engine.global_steps != self.done:
            raise AssertionError(f"global_steps {run.engine.global_steps}, expected {self.done}")
        state = run.state()
        state["losses"] = [run.step(self.done + i) for i in range(self.more)]
        dist.barrier()
        return state


class _Run:
    """One rank's engine."""

    def __init__(self, job: Job, rank: int, store: Path, *, universal: bool) -> None:
        import deepspeed
        from deepspeed.runtime.pipe.topology import PipelineParallelGrid

        self.job = job
        local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.world, "LOCAL_SIZE": job.world, "CCL_LOCAL_RANK": rank}
        os.environ.update({name: str(value) for name, value in local.items()})
        dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=job.world)
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        topology = self._topology()
        model = deepspeed_models.build(job.model, tensor=_tensor_group(topology, rank), topology=topology, ep=job.ep)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in job.frozen))
        optimizer = torch.optim.AdamW(self._groups(model), lr=2e-3)
        mpu = PipelineParallelGrid(topology=topology) if topology is not None and job.pp == 1 else None
        config = job.config(universal=universal)
        self.engine: DeepSpeedEngine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)[0]
        self.rank = _coordinates(topology, rank, job)
        self.data_rank = topology.get_coord(rank).data if topology is not None else rank

    def _topology(self) -> ProcessTopology | None:
        from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

        if self.job.model not in STACKS:
            return None
        return PipeModelDataParallelTopology(num_pp=self.job.pp, num_mp=self.job.tp, num_dp=self.job.dp)

    def _groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        kinds = {name: self._kind(name, p) for name, p in named}
        groups = [
            {"params": [p for name, p in named if kinds[name] == kind], "weight_decay": decay, "name": kind}
            for kind, decay in (("matrix", 0.1), ("vector", 0.0), ("embedding", 0.05))
            if kind in kinds.values()
        ]
        if self.job.model == "experts":
            from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

            groups = split_params_into_different_moe_groups_for_optimizer(groups)
        return groups

    def _kind(self, name: str, parameter: torch.nn.Parameter) -> str:
        if self.job.groups == 1:
            return "matrix"
        if self.job.groups == 3 and ("embed" in name or "wte" in name):
            return "embedding"
        return "matrix" if parameter.dim() > 1 else "vector"

    def client_state(self) -> dict[str, Any]:
        """What Megatron-DeepSpeed adds to its files: versions, and what ``ds_to_universal`` must know."""
        if self.job.model not in STACKS:
            return {}
        stack = STACKS[self.job.model]
        info = deepspeed_stack.universal_info(self.job.model, pp=self.job.pp)
        sizes = {"original_vocab_size": stack.vocab, "padded_vocab_size": stack.padded_vocab(self.job.tp)}
        info["padded_vocab_size"] = stack.padded_vocab(self.job.tp)
        return {"checkpoint_version": 3.0, "iteration": 2, "checkpoint_info": sizes, "universal_checkpoint_info": info}

    def step(self, number: int) -> float:
        """One optimizer step; the loss before it, over the global batch."""
        job = self.job
        mine = token_ids(job, number).chunk(job.dp)[self.data_rank]
        if job.pp > 1:
            return float(self.engine.train_batch(iter([(mine, mine)])))
        output = self.engine(mine)
        loss = deepspeed_stack.loss(getattr(output, "logits", output), mine)
        self.engine.backward(loss)
        self.engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        return float(total / job.world)

    def state(self) -> dict[str, Any]:
        """What the live engine holds; collective. ``truth`` is a `State`."""
        module = self.engine.module
        _link(self.engine.optimizer)
        first = {id(p): name for name, p in module.named_parameters()}
        every = module.named_parameters(remove_duplicate=False)
        truth = State(
            param=dict(self._full(module, None)),
            exp_avg=dict(self._full(module, "exp_avg")),
            exp_avg_sq=dict(self._full(module, "exp_avg_sq")),
            step=self._optimizer_step(),
            module=dict(self._low(module)),
            buffer={name: buffer.detach().clone() for name, buffer in module.named_buffers()},
            shared={name: first[id(p)] for name, p in every if first[id(p)] != name},
            expert=tuple(name for name, p in module.named_parameters() if not getattr(p, "allreduce", True)),
        )
        return {"rank": self.rank, "truth": truth}

    def _low(self, module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        from deepspeed.runtime.zero import GatheredParameters

        for name, parameter in module.named_parameters():
            with GatheredParameters([parameter], enabled=self.job.stage == 3):
                yield name, parameter.detach().clone()

    def _full(self, module: torch.nn.Module, key: str | None) -> Iterator[tuple[str, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
                full = safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
            else:
                full = self._unpartitioned(parameter, key)
            yield name, full.detach().float().reshape(getattr(parameter, "ds_shape", parameter.shape)).clone()

    def _unpartitioned(self, parameter: torch.nn.Parameter, key: str | None) -> torch.Tensor:
        """Without ZeRO the optimizer holds the parameter itself, or a float32 copy in a list beside the low-precision one."""
        optimizer = self.engine.optimizer
        for low, high in zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=True):
            for one, master in zip(low, high, strict=True):
                if one is parameter:
                    parameter = master
        base = getattr(optimizer, "optimizer", optimizer)
        return parameter if key is None else base.state[parameter][key]

    def _optimizer_step(self) -> float:
        base = getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)
        (step,) = {float(state["step"]) for state in base.state.values() if "step" in state}
        return step


def _link(optimizer: Any) -> None:
    """Make ``safe_get_full_*`` right where DeepSpeed's own links between parameters and flat vectors are not."""
    from deepspeed.utils import link_hp_params

    if getattr(optimizer, "round_robin_gradients", False):
        # It links them in the order of the group, but the flat vector has them in the reordered one.
        for i, group in enumerate(optimizer.round_robin_bit16_groups):
            size = optimizer.bit16_groups_flat[i].numel() // optimizer.partition_count[i]
            link_hp_params(
                lp_param_list=group,
                flat_hp_partition=optimizer.single_partition_of_fp32_groups[i],
                gradient_dict=optimizer.averaged_gradients,
                offload_gradient_dict=None,
                use_offload=False,
                param_group_index=i,
                partition_start=dist.get_rank(group=optimizer.real_dp_process_group[i]) * size,
                partition_size=size,
                dp_group=optimizer.real_dp_process_group[i],
                param_offsets=optimizer.round_robin_bit16_offsets[i],
            )
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        # It links the states after the first group's first step, when those of the other groups do not exist yet.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _tensor_group(topology: ProcessTopology | None, rank: int) -> TensorGroup:
    if topology is None or topology.get_dim("model") == 1:
        return TensorGroup()
    mine = TensorGroup()
    for ranks in topology.get_axis_comm_lists("model"):
        group = dist.new_group(ranks)  # every rank makes every group
        if rank in ranks:
            mine = TensorGroup(ranks.index(rank), len(ranks), group)
    return mine


def _coordinates(topology: ProcessTopology | None, rank: int, job: Job) -> Rank:
    if topology is None:
        return 0, 0, rank % job.ep
    place = topology.get_coord(rank)
    return place.pipe, place.model, 0
