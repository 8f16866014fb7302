"""One rank of a Megatron checkpoint in the real ``megatron.core`` GPTModel, on CPU.

Runs in the processes that `mcore` forks; nothing here is called from pytest's own process.

1. `prepare` imports Megatron and replaces the few calls that insist on a GPU.
2. `run_rank` reads this rank's file with ``torch.load``, and builds the model from *the file's own* ``args``, the way
   Megatron's ``core_transformer_config_from_args`` and ``gpt_builder`` do, so that wrong or missing args fail too.
3. Tensors are matched strictly: missing, unexpected and misshapen ones are errors.
4. The forward pass goes chunk by chunk and stage by stage, with plain sends between the stages.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Mapping

__all__ = ["Request", "build", "prepare", "rank_file", "run_rank"]


@dataclasses.dataclass(frozen=True)
class Request:
    """What to run: a checkpoint, the layout it must state, token ids, and the true vocabulary; where `source` is given, the
    weights are not the checkpoint's but what `shardwright` loads from there, with all ranks together."""

    folder: str
    tp: int
    pp: int
    vpp: int
    ids: tuple[tuple[int, ...], ...]
    vocab: int
    ep: int = 1
    launch: tuple[str, ...] = ()
    source: str = ""

    @property
    def world(self) -> int:
        """Number of ranks: tensor parallel rank is the fastest, then the expert-parallel one, which is a data-parallel copy of
        everything but experts."""
        return self.stage * self.pp

    @property
    def stage(self) -> int:
        """Ranks of one pipeline stage."""
        return self.tp * self.ep

    def run(self, rank: int, store: Path) -> torch.Tensor | None:
        """Be one rank of it; see `run_rank`."""
        return run_rank(rank, self, store)


def prepare() -> None:
    """Import Megatron and let it run without a GPU."""
    torch.cuda.current_device = lambda: "cpu"  # Megatron passes it as device=
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self
    torch.nn.Module.cuda = lambda self, *_args, **_kwargs: self
    from megatron.core.fusions import fused_softmax
    from megatron.core.models import gpt  # noqa: F401 - here and not in each forked rank
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None  # named only where Transformer Engine is installed, but always looked at
    random.CudaRNGStatesTracker.fork = lambda _self, _name=None: contextlib.nullcontext()
    fused_softmax.get_sliding_window_causal_mask = _sliding_window_mask  # its own one lies on a GPU
    _let_latent_attention_run(multi_latent_attention, DotProductAttention)


def _sliding_window_mask(queries: int, keys: int, window: tuple[int, int]) -> torch.Tensor:
    """True where a query must not look: ``window`` says how many keys before it and after it are seen."""
    ones = torch.ones(queries, keys, dtype=torch.bool)
    before, after = keys - queries - window[0], keys - queries + window[1]
    return ~(torch.triu(ones, before) & torch.tril(ones, after))


def _let_latent_attention_run(module: Any, kernel: Any) -> None:
    """Latent attention is written for Transformer Engine: its classes are compared with, and its kernel is told the sizes of
    keys and values, which the kernel without it takes from ``kv_channels``."""
    for name in ("TELinear", "TEColumnParallelLinear"):
        if not isinstance(getattr(module, name, None), type):
            setattr(module, name, type(name, (), {}))
    plain = kernel.__init__

    def init(self: Any, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **options: Any) -> None:
        plain(self, *args, **options)
        _demand(v_channels in (None, self.hidden_size_per_attention_head), f"kv_channels is not {v_channels}")

    kernel.__init__ = init


def rank_file(folder: Path, tp: int, pp: int, *, pp_size: int, ep: int = 0, ep_size: int = 1) -> Path:
    """Where Megatron looks for a rank's file: the tracker's folder, ``mp_rank_TT``, ``_PPP`` if there are stages, ``_EEE`` if
    experts are dealt out."""
    step = (folder / "latest_checkpointed_iteration.txt").read_text().strip()
    iteration = "release" if step == "release" else f"iter_{int(step):07d}"
    name = f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if pp_size > 1 else "") + (f"_{ep:03d}" if ep_size > 1 else "")
    return folder / iteration / name / "model_optim_rng.pt"


def run_rank(rank: int, request: Request, store: Path) -> torch.Tensor | None:
    """Be one rank: load, run, and return the logits if this rank is the one that has them.

    Parameters
    ----------
    rank
        Number among ``request.world``.
    request
        The run; the same in all ranks.
    store
        A file that the ranks find each other through.
    """
    from megatron.core import parallel_state

    dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=request.world)
    parallel_state.initialize_model_parallel(
        request.tp, request.pp, request.vpp if request.vpp > 1 else None, expert_model_parallel_size=request.ep
    )
    tp, pp = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    ep = parallel_state.get_expert_model_parallel_rank()
    file = rank_file(Path(request.folder), tp, pp, pp_size=request.pp, ep=ep, ep_size=request.ep)
    saved = torch.load(file, map_location="cpu", weights_only=False)
    _check_envelope(saved, request)
    chunks = [_chunk(saved, request, pp, v) for v in range(request.vpp)]
    if request.source:
        _load_into(chunks, request, rank)
    with torch.no_grad():
        logits = _forward(chunks, request, rank)
    dist.barrier()
    dist.destroy_process_group()
    return logits[..., : request.vocab] if logits is not None and rank % request.stage == 0 else None


def _check_envelope(saved: Mapping[str, Any], request: Request) -> None:
    args = saved["args"]
    stated = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size or 1,
        getattr(args, "expert_model_parallel_size", 1),
    )
    _demand(stated == (request.tp, request.pp, request.vpp, request.ep), f"args state tp, pp, vpp, ep = {stated}")
    _demand(float(saved["checkpoint_version"]) == 3.0, f"checkpoint_version {saved['checkpoint_version']}")
    _demand(saved["iteration"] >= 0, "no iteration")
    models = {key for key in saved if key.startswith("model")}
    wanted = {"model"} if request.vpp == 1 else {f"model{v}" for v in range(request.vpp)}
    _demand(models == wanted, f"model keys {sorted(models)}, expected {sorted(wanted)}")


def _demand(condition: bool, complaint: str) -> None:
    if not condition:
        raise AssertionError(complaint)


def _chunk(saved: Mapping[str, Any], request: Request, pp: int, v: int) -> torch.nn.Module:
    """Build one model chunk and fill it from the file."""
    first, last = pp == 0 and v == 0, pp == request.pp - 1 and v == request.vpp - 1
    model = build(saved["args"], first, last, v if request.vpp > 1 else None, request.launch)
    if not request.source:
        _load(model, saved["model" if request.vpp == 1 else f"model{v}"], saved["args"])
    return model


LAUNCH = ("gelu_tanh", "relu", "scaled_embeddings", "norm_over_heads")
"""What args cannot say: a gated tanh GELU; ReLU; embeddings times the square root of the hidden size; a norm over all heads at once."""


def build(args: Namespace, first: bool, last: bool, vp_stage: int | None, launch: tuple[str, ...] = ()) -> torch.nn.Module:
    """One chunk of the model that ``args`` and `launch` describe, its parameters not yet filled."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec

    config = _transformer_config(args, launch)
    if config.num_moe_experts:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=args.normalization, vp_stage=vp_stage)
    else:
        spec = get_gpt_layer_local_spec(
            qk_layernorm=args.qk_layernorm, normalization=args.normalization, multi_latent_attention=config.multi_latent_attention
        )
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=first,
        post_process=last,
        parallel_output=False,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=getattr(args, "rotary_base", 10000),
        rope_scaling=getattr(args, "use_rope_scaling", False),
        rope_scaling_factor=getattr(args, "rope_scaling_factor", None) or 8.0,
        vp_stage=vp_stage,
    )
    if first and "scaled_embeddings" in launch:
        model.embedding.register_forward_hook(lambda _module, _inputs, output: output * args.hidden_size**0.5)
    if "norm_over_heads" in launch:
        for layer in model.decoder.layers:
            _norm_over_heads(layer.self_attention)
    return model.eval()


def _norm_over_heads(attention: torch.nn.Module) -> None:
    """One norm over all heads, as Megatron-Bridge's ``OLMoESelfAttention`` has it; for one tensor-parallel rank."""

    class OverHeads(torch.nn.RMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.flatten(-2)).view(x.shape)

    config = attention.config
    width = config.num_attention_heads * config.kv_channels
    attention.q_layernorm = OverHeads(width, eps=config.layernorm_epsilon)
    attention.k_layernorm = OverHeads(width, eps=config.layernorm_epsilon)


def _activation(args: Namespace, launch: tuple[str, ...]) -> dict[str, Any]:
    """The MLP's kind, as ``core_transformer_config_from_args`` chooses it: what is fused with the bias is GELU's tanh form."""
    from megatron.core.fusions.fused_bias_geglu import quick_gelu

    tanh = functools.partial(torch.nn.functional.gelu, approximate="tanh")
    if args.swiglu:
        return {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
    if getattr(args, "quick_geglu", False):
        return {"gated_linear_unit": True, "activation_func": quick_gelu}
    if args.squared_relu:
        return {"gated_linear_unit": False, "activation_func": lambda x: torch.relu(x) ** 2}  # Megatron compiles its own for half a minute
    if "gelu_tanh" in launch:
        return {"gated_linear_unit": True, "activation_func": tanh}
    if "relu" in launch:
        return {"gated_linear_unit": False, "activation_func": torch.relu}
    return {"gated_linear_unit": False, "activation_func": tanh if args.bias_gelu_fusion else torch.nn.functional.gelu}


def _transformer_config(args: Namespace, launch: tuple[str, ...]) -> Any:
    """Megatron's ``core_transformer_config_from_args``, for what these models use, with every fusion off.

    Norms whose weight is stored less 1 (``apply_layernorm_1p``) need a GPU: `_load` adds the 1.
    """
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    latent = getattr(args, "multi_latent_attention", False)
    made = (MLATransformerConfig if latent else TransformerConfig)(
        **{name: getattr(args, name) for name in _SAME_NAME},
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        layernorm_epsilon=args.norm_epsilon,
        rotary_interleaved=getattr(args, "rotary_interleaved", False),
        **_activation(args, launch),
        num_layers_in_first_pipeline_stage=getattr(args, "decoder_first_pipeline_num_layers", None),
        num_layers_in_last_pipeline_stage=getattr(args, "decoder_last_pipeline_num_layers", None),
        pipeline_model_parallel_layout=getattr(args, "pipeline_model_parallel_layout", None),
        pipeline_dtype=torch.float32,
        params_dtype=torch.float32,
        use_cpu_initialization=True,
        perform_initialization=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        **(_experts(args) if getattr(args, "num_experts", None) else {}),
        **{name: getattr(args, name) for name in (_SAME_NAME_LATENT if latent else ())},
        **{name: getattr(args, name) for name in _SAME_NAME_SINKS if hasattr(args, name) and hasattr(args, "softmax_type")},
    )
    for name, value in vars(args).items():
        if name.startswith("yarn_"):  # read by the model, not declared by the config
            setattr(made, name, value)
    return made


def _experts(args: Namespace) -> dict[str, Any]:
    """What the args say of experts; tokens are sent in the one way that runs on CPU, and no loss balances them."""
    return {
        "num_moe_experts": args.num_experts,
        **{name: getattr(args, name) for name in _SAME_NAME_EXPERTS},
        **{name: getattr(args, name) for name in _SAME_NAME_ROUTING if hasattr(args, name)},
        "moe_token_dispatcher_type": "allgather",
        "moe_router_load_balancing_type": "none",
    }


_SAME_NAME_EXPERTS = (
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "moe_layer_freq",
    "moe_ffn_hidden_size",
    "moe_router_topk",
    "moe_router_score_function",
    "moe_router_pre_softmax",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
)


_SAME_NAME_ROUTING = (
    "moe_router_topk_scaling_factor",
    "moe_router_enable_expert_bias",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_dtype",
)


_SAME_NAME_LATENT = (
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "rope_type",
    "rotary_base",
    "rotary_scaling_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)


_SAME_NAME_SINKS = ("softmax_type", "window_size", "window_attn_skip_freq", "glu_linear_offset", "activation_func_clamp_value")


_SAME_NAME = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "normalization",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
)


def _load(model: torch.nn.Module, stored: Mapping[str, Any], args: Namespace) -> None:
    """Copy the stored tensors into the model, all of them and nothing else."""
    given = {_local_name(name): tensor for name, tensor in stored.items() if not name.endswith("_extra_state")}
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("_extra_state")}
    missing, unexpected = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    _demand(not missing and not unexpected, f"missing {missing[:6]}, unexpected {unexpected[:6]}")
    misshapen = [f"{name} {tuple(given[name].shape)}, not {tuple(wanted[name].shape)}"
                 for name in wanted if given[name].shape != wanted[name].shape]  # fmt: skip
    _demand(not misshapen, f"wrong shapes: {misshapen[:6]}")
    foreign = [f"{name} {tensor.dtype}" for name, tensor in given.items() if tensor.dtype != _dtype(name, args)]
    _demand(not foreign, f"args state {args.params_dtype}, stored are {foreign[:6]}")
    less = float(getattr(args, "apply_layernorm_1p", False))
    model.load_state_dict({n: t.float() + less if n.endswith("norm.weight") else t.float() for n, t in given.items()}, strict=False)


def _load_into(chunks: list[torch.nn.Module], request: Request, rank: int) -> None:
    """Fill a rank's chunks from any checkpoint, every byte of it read by one of the ranks."""
    import shardwright as sw

    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    layout = sw.Layout(tp=request.tp, pp=request.pp, vpp=request.vpp, ep=request.ep)
    sw.open(request.source).load_into(
        chunks if request.vpp > 1 else chunks[0], to="megatron-legacy", layout=layout, rank=rank, spec="local", memory="128MiB",
        together=sw.Together.of_group([rank]),
    )  # fmt: skip


def _dtype(name: str, args: Namespace) -> torch.dtype:
    """Megatron's routers hold the bias of their experts in float32, whatever the model is."""
    return torch.float32 if name.endswith("router.expert_bias") else args.params_dtype


def _local_name(name: str) -> str:
    """Transformer Engine's names, for norms fused into the next linear and experts in a grouped GEMM, as the local spec's."""
    name = re.sub(r"self_attention\.linear_qkv\.layer_norm_(weight|bias)$", r"input_layernorm.\1", name)
    name = re.sub(r"mlp\.linear_fc1\.layer_norm_(weight|bias)$", r"pre_mlp_layernorm.\1", name)
    name = re.sub(r"self_attention\.linear_(q|kv)_up_proj\.layer_norm_weight$", r"self_attention.\1_layernorm.weight", name)
    return re.sub(r"mlp\.experts\.linear_fc([12])\.(weight|bias)(\d+)$", r"mlp.experts.local_experts.\3.linear_fc\1.\2", name)


def _forward(chunks: list[torch.nn.Module], request: Request, rank: int) -> torch.Tensor | None:
    """Run every chunk in turn; activations travel ``[length, batch, hidden]`` to the next stage, logits stay."""
    ids = torch.tensor(request.ids)
    batch, length = ids.shape
    positions = torch.arange(length).expand(batch, -1)
    mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    pp, out = rank // request.stage, None
    for v, chunk in enumerate(chunks):
        if (pp, v) != (0, 0):
            received = torch.empty(length, batch, chunk.config.hidden_size)
            dist.recv(received, (rank - request.stage) % request.world)
            chunk.set_input_tensor(received)
        out = chunk(input_ids=ids, position_ids=positions, attention_mask=mask)
        if (pp, v) == (request.pp - 1, request.vpp - 1):
            return out.float()
        dist.send(out.contiguous(), (rank + request.stage) % request.world)
    return None
