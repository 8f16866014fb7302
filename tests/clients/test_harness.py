"""The harness itself is right, and sees what is wrong.

A plain torch conversion from the rules, with no part of shardwright in it, makes Megatron files that give
transformers' logits; every mutation of those files is noticed. A harness that accepts anything would prove nothing.

The rules (``R = heads / groups``, ``D`` the head dimension):

- QKV: per kv group, its R query heads, then its key head, then its value head; ranks get equal cuts of the rows;
- gate and up: rank t holds ``[gate part t; up part t]``;
- output projections and ``down``: cut along the columns; norms: everywhere;
- vocabulary: zero rows up to a multiple of 128 · tp, then cut along the rows;
- layers: consecutive ones per stage, chunk v of stage p following chunk v of stage p - 1, numbered from 0 in each chunk.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.clients import hf_models
from tests.clients.hf_logits import logits as hf_logits
from tests.clients.hf_logits import token_ids
from tests.clients.mcore import Megatron, MegatronError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.clients("transformers", "megatron.core")

TOLERANCE = 1e-4

Tensors = dict[str, torch.Tensor]
Ranks = dict[tuple[int, int], dict[str, Any]]


def megatron_args(config: dict[str, Any], **more: Any) -> argparse.Namespace:
    """The arguments that Megatron would have saved for this model."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    family, rope = config["model_type"], config["rope_parameters"]
    args = argparse.Namespace(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        group_query_attention=groups != heads,
        num_query_groups=groups,
        kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
        max_position_embeddings=config["max_position_embeddings"],
        position_embedding_type="rope",
        rotary_base=rope["rope_theta"],
        rotary_percent=1.0,
        use_rope_scaling=rope["rope_type"] == "llama3",
        rope_scaling_factor=rope.get("factor", 8.0),
        normalization="RMSNorm",
        norm_epsilon=config["rms_norm_eps"],
        swiglu=True,
        add_bias_linear=bool(config.get("mlp_bias")),
        add_qkv_bias=family == "qwen2" or bool(config.get("attention_bias")),
        qk_layernorm=family == "qwen3",
        untie_embeddings_and_output_weights=not config["tie_word_embeddings"],
        params_dtype=getattr(torch, config["dtype"]),
        virtual_pipeline_model_parallel_size=None,
    )
    vars(args).update(more)
    return args


def convert(hf: Tensors, args: argparse.Namespace, stages: list[int]) -> Ranks:
    """Plain torch, from the rules: one file's content for each (tp, pp); ``stages`` are the layers per chunk."""
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    starts = [sum(stages[:i]) for i in range(len(stages))]
    ranks: Ranks = {(t, p): {"args": args, "checkpoint_version": 3.0, "iteration": 0} for t in range(tp) for p in range(pp)}
    for chunk, (start, count) in enumerate(zip(starts, stages, strict=True)):
        key = "model" if len(stages) == pp else f"model{chunk // pp}"
        for t in range(tp):
            model = ranks[t, chunk % pp][key] = {}
            if chunk == 0:
                model["embedding.word_embeddings.weight"] = vocabulary(hf["model.embed_tokens.weight"], args, t)
            for i in range(count):
                layer = {n.split(".", 3)[3]: w for n, w in hf.items() if n.startswith(f"model.layers.{start + i}.")}
                model |= {f"decoder.layers.{i}.{name}": w.contiguous() for name, w in layer_of_rank(layer, args, t).items()}
            if chunk == len(stages) - 1:
                model["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
                if args.untie_embeddings_and_output_weights or pp > 1:
                    head = hf.get("lm_head.weight", hf["model.embed_tokens.weight"])
                    model["output_layer.weight"] = vocabulary(head, args, t)
    return ranks


def layer_of_rank(layer: Tensors, args: argparse.Namespace, t: int) -> Tensors:
    """One decoder layer's tensors on tensor parallel rank ``t``, Transformer Engine names."""
    tp, groups = args.tensor_model_parallel_size, args.num_query_groups
    out = {
        "self_attention.linear_qkv.layer_norm_weight": layer["input_layernorm.weight"],
        "mlp.linear_fc1.layer_norm_weight": layer["post_attention_layernorm.weight"],
        "self_attention.linear_proj.weight": layer["self_attn.o_proj.weight"].chunk(tp, 1)[t],
        "mlp.linear_fc2.weight": layer["mlp.down_proj.weight"].chunk(tp, 1)[t],
    }
    for kind in ("weight", "bias"):
        if f"self_attn.q_proj.{kind}" in layer:
            parts = [layer[f"self_attn.{x}_proj.{kind}"].unflatten(0, (groups, -1)) for x in "qkv"]
            out[f"self_attention.linear_qkv.{kind}"] = torch.cat(parts, 1).flatten(0, 1).chunk(tp)[t]
        if f"mlp.gate_proj.{kind}" in layer:
            out[f"mlp.linear_fc1.{kind}"] = torch.cat([layer[f"mlp.{x}_proj.{kind}"].chunk(tp)[t] for x in ("gate", "up")])
    renamed = {
        "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
        "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
        "self_attn.o_proj.bias": "self_attention.linear_proj.bias",
        "mlp.down_proj.bias": "mlp.linear_fc2.bias",
    }
    return out | {new: layer[old] for old, new in renamed.items() if old in layer}


def vocabulary(weight: torch.Tensor, args: argparse.Namespace, t: int) -> torch.Tensor:
    """One rank's rows of the padded vocabulary."""
    padding = args.padded_vocab_size - weight.shape[0]
    return torch.nn.functional.pad(weight, (0, 0, 0, padding)).chunk(args.tensor_model_parallel_size)[t].clone()


def write(ranks: Ranks, out: Path, pp: int) -> Path:
    """Megatron's folders."""
    for (t, p), content in ranks.items():
        folder = out / "release" / (f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else ""))
        folder.mkdir(parents=True)
        torch.save(content, folder / "model_optim_rng.pt")
    (out / "latest_checkpointed_iteration.txt").write_text("release")
    return out


def reference(folder: Path, tp: int, pp: int, vpp: int = 1, stages: list[int] | None = None, **args: Any) -> Ranks:
    """Convert the Hugging Face checkpoint in ``folder``."""
    config = hf_models.config(folder)
    stages = stages or [config["num_hidden_layers"] // (pp * vpp)] * (pp * vpp)
    padded = -(-config["vocab_size"] // (128 * tp)) * 128 * tp
    layout = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "padded_vocab_size": padded}
    layout["virtual_pipeline_model_parallel_size"] = vpp if vpp > 1 else None
    return convert(hf_models.tensors(folder), megatron_args(config, **layout, **args), stages)


def worst(ranks: Ranks, out: Path, folder: Path, mcore: Megatron, *, tp: int, pp: int, vpp: int = 1, length: int = 24) -> float:
    """Largest difference of Megatron's logits from transformers'."""
    ids = token_ids(hf_models.VOCAB, length)
    theirs = mcore.logits(write(ranks, out, pp), tp=tp, pp=pp, vpp=vpp, vocab=hf_models.VOCAB, ids=ids)
    expected = hf_logits(folder, ids)
    assert theirs.shape == expected.shape
    return (theirs - expected).abs().max().item()


@pytest.mark.parametrize(
    ("case", "tp", "pp", "vpp"),
    [
        ("llama", 2, 2, 1),
        ("llama_tied", 2, 2, 1),
        ("llama_tied", 1, 1, 1),
        ("llama_mqa", 2, 1, 1),
        ("llama_bias", 2, 1, 1),
        ("llama_rope3", 1, 1, 1),
        ("llama_wide", 2, 1, 1),
        ("mistral", 4, 1, 1),
        ("qwen2", 1, 2, 2),
        ("qwen3_tied", 1, 3, 2),
    ],
)
def test_reference_conversion_gives_the_same_logits(
    case: str, tp: int, pp: int, vpp: int, hf_case: Callable[..., Path], mcore: Megatron, tmp_path: Path
) -> None:
    folder = hf_case(case)
    assert worst(reference(folder, tp, pp, vpp), tmp_path, folder, mcore, tp=tp, pp=pp, vpp=vpp, length=96) < TOLERANCE


def test_bfloat16(hf_case: Callable[..., Path], mcore: Megatron, tmp_path: Path) -> None:
    folder = hf_case("llama", dtype="bfloat16")
    assert worst(reference(folder, 2, 1), tmp_path, folder, mcore, tp=2, pp=1) < TOLERANCE


@pytest.mark.parametrize(
    ("stages", "args"),
    [
        ([2, 5, 5], {"decoder_first_pipeline_num_layers": 2}),
        ([5, 5, 2], {"decoder_last_pipeline_num_layers": 2}),
        ([3, 4, 5], {"pipeline_model_parallel_layout": "Et*3|t*4|t*5L"}),
    ],
)
def test_uneven_stages(stages: list[int], args: dict[str, Any], hf_case: Callable[..., Path], mcore: Megatron, tmp_path: Path) -> None:
    folder = hf_case("llama")
    ranks = reference(folder, 1, 3, stages=stages, **args)
    assert worst(ranks, tmp_path, folder, mcore, tp=1, pp=3) < TOLERANCE


def swap_heads(model: Tensors, args: argparse.Namespace) -> None:
    d = args.kv_channels
    qkv = model["decoder.layers.1.self_attention.linear_qkv.weight"]
    qkv[: 2 * d] = torch.cat([qkv[d : 2 * d], qkv[:d]])


def swap_key_and_value(model: Tensors, args: argparse.Namespace) -> None:
    d = args.kv_channels
    qkv = model["decoder.layers.1.self_attention.linear_qkv.weight"]
    qkv[2 * d : 4 * d] = torch.cat([qkv[3 * d : 4 * d], qkv[2 * d : 3 * d]])


def swap_gate_and_up(model: Tensors, args: argparse.Namespace) -> None:
    fc1 = model["decoder.layers.1.mlp.linear_fc1.weight"]
    fc1.copy_(fc1.roll(fc1.shape[0] // 2, 0))


def swap_layers(model: Tensors, args: argparse.Namespace) -> None:
    first, second = (f"decoder.layers.{i}.mlp.linear_fc2.weight" for i in (0, 1))
    model[first], model[second] = model[second], model[first]


def nudge_one_norm(model: Tensors, args: argparse.Namespace) -> None:
    model["decoder.layers.1.mlp.linear_fc1.layer_norm_weight"][5] += 0.5


@pytest.mark.parametrize("mutate", [swap_heads, swap_key_and_value, swap_gate_and_up, swap_layers, nudge_one_norm])
def test_wrong_values_change_the_logits(
    mutate: Callable[[Tensors, argparse.Namespace], None], hf_case: Callable[..., Path], mcore: Megatron, tmp_path: Path
) -> None:
    folder = hf_case("llama")
    ranks = reference(folder, 2, 1)
    mutate(ranks[1, 0]["model"], ranks[1, 0]["args"])
    assert worst(ranks, tmp_path, folder, mcore, tp=2, pp=1) > 10 * TOLERANCE


def drop_tensor(content: dict[str, Any]) -> None:
    del content["model"]["decoder.final_layernorm.weight"]


def add_tensor(content: dict[str, Any]) -> None:
    content["model"]["decoder.layers.12.mlp.linear_fc2.weight"] = torch.zeros(1)


def trim_tensor(content: dict[str, Any]) -> None:
    content["model"]["decoder.layers.0.mlp.linear_fc1.weight"] = content["model"]["decoder.layers.0.mlp.linear_fc1.weight"][:-1]


def half_tensor(content: dict[str, Any]) -> None:
    content["model"]["decoder.final_layernorm.weight"] = content["model"]["decoder.final_layernorm.weight"].half()


def forget_argument(content: dict[str, Any]) -> None:
    content["args"] = argparse.Namespace(**vars(content["args"]))
    del content["args"].kv_channels


def claim_other_layout(content: dict[str, Any]) -> None:
    content["args"] = argparse.Namespace(**vars(content["args"]) | {"tensor_model_parallel_size": 4})


def chunk_key(content: dict[str, Any]) -> None:
    content["model0"] = content.pop("model")


@pytest.mark.parametrize(
    ("mutate", "complaint"),
    [
        (drop_tensor, r"missing \['decoder.final_layernorm.weight'\]"),
        (add_tensor, "unexpected .*decoder.layers.12"),
        (trim_tensor, "wrong shapes: .*linear_fc1"),
        (half_tensor, "stored are .*float16"),
        (forget_argument, "kv_channels"),
        (claim_other_layout, r"args state tp, pp, vpp, ep = \(4, 1, 1, 1\)"),
        (chunk_key, "model keys"),
    ],
)
def test_wrong_files_are_refused(
    mutate: Callable[[dict[str, Any]], None], complaint: str, hf_case: Callable[..., Path], mcore: Megatron, tmp_path: Path
) -> None:
    ranks = reference(hf_case("llama"), 2, 1)
    mutate(ranks[1, 0])
    with pytest.raises(MegatronError, match=re.compile(complaint, re.DOTALL)):
        mcore.logits(write(ranks, tmp_path, 1), tp=2, vocab=hf_models.VOCAB)


def test_transformers_refuses_missing_tensors(tmp_path: Path) -> None:
    folder = hf_models.make("llama", tmp_path, max_shard_size="5GB", num_hidden_layers=2)
    from safetensors.torch import save_file

    tensors = hf_models.tensors(folder)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError, match="up_proj"):
        hf_logits(folder)


@pytest.mark.parametrize("case", sorted(hf_models.CASES))
def test_every_case_is_made_in_several_files(case: str, hf_case: Callable[..., Path]) -> None:
    folder = hf_case(case)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    for name, tensor in hf_models.tensors(folder).items():
        assert tensor.unique(dim=0).shape[0] > 0.9 * tensor.shape[0], f"rows of {name} repeat"
    assert hf_logits(folder).std() > 0.1


def test_bin_files_hold_the_same_tensors(hf_case: Callable[..., Path]) -> None:
    folder, binary = hf_case("qwen2"), hf_case("qwen2", bin_files=True)
    assert len(list(binary.glob("pytorch_model-*.bin"))) > 1
    assert not list(binary.glob("*.safetensors*"))
    expected, found = hf_models.tensors(folder), hf_models.tensors(binary)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_helpers_import_without_clients() -> None:
    modules = "sys, tests.clients.conftest, tests.clients.test_harness, tests.clients.test_deepspeed_harness"
    code = f"import {modules}; print(*({{'deepspeed', 'megatron', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.split()
