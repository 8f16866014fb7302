"""Fuzz targets: configs, tables, expressions, layout files, saved plans, journals; and whole checkpoints of each format.

A checkpoint is a tree of files in one input (`stores`); it is opened as a user's is, up to the lookup of every tensor.
What is accepted is used: a family's tensors are listed, a layout's ranks are named, a config is written again.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import json
import os
import random
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from shardwright.errors import ShardwrightError
from shardwright.executors import journal
from shardwright.executors.padding import Padding
from shardwright.executors.tile import Receipt
from shardwright.options import read_layout
from shardwright.planner import codec
from shardwright.planner.config import family_of, from_huggingface, to_huggingface
from shardwright.planner.containers.base import TensorSpec
from shardwright.planner.containers.torch_zip import Namespace, TensorRef, TorchZip
from shardwright.planner.expressions import parse as parse_expression
from shardwright.planner.formats import open_source
from shardwright.planner.formats.base import Hints, Source
from shardwright.planner.identity import read_object
from shardwright.planner.layout import SPLITS, Layout, Split
from shardwright.planner.megatron_args import from_megatron, to_megatron
from shardwright.planner.passes.build import build, read_side
from shardwright.planner.passes.rows import expand, hub_tensors
from shardwright.planner.plan import PLAN_FORMAT, Plan, TargetFile
from shardwright.planner.request import Request
from shardwright.planner.store import LocalStore
from shardwright.planner.tables import DIALECTS, FAMILIES, load_dialect, load_family
from tests.unit import reference
from tests.unit.experts_reference import Experts
from tests.unit.tiny import tiny_llama

from .guard import scratch
from .harness import Target, register
from .mutators import edge, mutate_bytes, mutate_json, mutate_tree, text
from .stores import MemoryStore, pack, store_of, unpack
from .targets_containers import SAFETENSORS, TORCH_ZIP

__all__ = ["CONFIG", "EXPRESSIONS", "HUGGINGFACE", "JOURNAL", "LAYOUT", "MEGATRON_LEGACY", "RANKS", "SAVED_PLAN", "TABLES"]

_PLANNER = "shardwright.planner."
_TINY: dict[str, Any] = {"hidden": 8, "heads": 4, "kv": 2, "vocab": 6}


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _parse_checkpoint(data: bytes) -> None:
    """Open the tree as a user's folder, in whatever format it is, and find every tensor of the model in it."""
    source = open_source(store_of(data), Hints())
    experts = source.config.fields.get("num_experts", 1) if source.spec == "stacked" else 1
    assert len(source.hub) <= sum(map(len, source.units.values())) * len(source.family.tensors) * experts
    if source.scheme is None:
        read_side(source)


def _files_of(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def _sparse(files: Mapping[str, bytes], sizes: Mapping[str, int] | None = None) -> bytes:
    """The tree, each file without the zeros that it ends in."""
    claimed = {path: max(len(data), (sizes or {}).get(path, 0)) for path, data in files.items()}
    return pack({path: data.rstrip(b"\0") for path, data in files.items()}, claimed)


def _laid_out(plan: Plan) -> dict[str, bytes]:
    """A target's files as the plan decides them, data zero, and the small files that it carries over."""
    files = {}
    for file in plan.target_files:
        data = bytearray(file.nbytes)
        for offset, part in file.static:
            data[offset : offset + len(part)] = part
        files[file.path] = bytes(data)
    # Of what a target says of itself, only what a reader takes from it: the rest would be most of the corpus.
    identity = json.loads(files["shardwright.json"])
    files["shardwright.json"] = json.dumps({key: identity[key] for key in _READ}, separators=(",", ":")).encode()
    return files | {to: b"{}" for _, to in plan.copies}


_READ = ("schema", "format", "dialect", "spec", "container", "layout", "family", "config")


@functools.cache
def _planned(request: Request, layers: int = 2, **config: Any) -> dict[str, bytes]:
    return _laid_out(_plan_of(request, layers, **config))


@functools.cache
def _plan_of(request: Request, layers: int = 2, **config: Any) -> Plan:
    with tempfile.TemporaryDirectory() as name:
        return _plan_from(tiny_llama(Path(name), layers=layers, shards=1, **{**_TINY, **config}), request)


def _plan_from(folder: Path, request: Request) -> Plan:
    (folder / "tokenizer.json").write_text("{}")
    for file in folder.iterdir():
        os.utime(file, ns=(0, 10**18))
    # The same plan in every process: it must not say where this folder was.
    return replace(build(open_source(LocalStore(folder), Hints()), request), source_root="/source")


_MIXTRAL = Experts("mixtral", layers=1, heads=4, kv=2, head_dim=2, hidden=8, ffn=4, expert_ffn=4, vocab=6, experts=2)
_QWEN3_MOE = replace(_MIXTRAL, family="qwen3_moe", layers=2, dense=(0,), qk_norm=True)


@functools.cache
def _with_experts(model: Experts, request: Request) -> dict[str, bytes]:
    """A model with experts, as another target."""
    with tempfile.TemporaryDirectory() as name:
        return _laid_out(_plan_from(reference.write(Path(name) / "m", model, model.weights(), shards=1), request))


def _without(files: Mapping[str, bytes], *starts: str) -> dict[str, bytes]:
    return {path: data for path, data in files.items() if not path.startswith(starts)}


def _saved(value: Any) -> bytes:
    made = io.BytesIO()
    torch.save(value, made)
    return made.getvalue()


@functools.cache
def _huggingface_seeds() -> list[bytes]:
    found = []
    with tempfile.TemporaryDirectory() as name:
        one = _files_of(tiny_llama(Path(name) / "one", layers=1, shards=1, **_TINY))
        two = _files_of(tiny_llama(Path(name) / "two", layers=1, shards=2, tie_word_embeddings=True, **_TINY))
        from safetensors.numpy import load_file

        arrays = {k: torch.from_numpy(v) for k, v in load_file(Path(name) / "one/model.safetensors").items()}
        bf16 = _files_of(tiny_llama(Path(name) / "rope", layers=1, shards=1, **_TINY, rope_scaling={"type": "linear", "factor": 2.0}))
    index = "model.safetensors.index.json"
    half = "pytorch_model-00001-of-00001.bin"
    found = [one, two, bf16, {"config.json": one["config.json"], "pytorch_model.bin": _saved(arrays)}]
    found.append({"config.json": one["config.json"], half: _saved(arrays), "pytorch_model.bin.index.json": _index_of(arrays, half)})
    # A replica: both files hold every tensor, the index names the one.
    copies = {**one, "copy.safetensors": one["model.safetensors"], "stray.gguf": b"x", "README.md": b"x"}
    copies[index] = _index_of(arrays, "model.safetensors", lm_head="copy.safetensors")
    found.append(copies)
    found.append(_planned(Request("huggingface", quantize="int8"), 1))
    found += [_with_experts(_MIXTRAL, Request("huggingface")), _with_experts(_QWEN3_MOE, Request("huggingface", spec="stacked"))]
    return [_sparse(files) for files in found]


def _index_of(names: Mapping[str, Any], file: str, **others: str) -> bytes:
    weight_map = {name: next((other for part, other in others.items() if part in name), file) for name in names}
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()


@functools.cache
def _ranks_seeds() -> list[bytes]:
    plain = _planned(Request("ranks", Layout(tp=2), pad_vocab_to=4), 1)
    virtual = _planned(Request("ranks", Layout(tp=1, pp=2, vpp=2), dialect="megatron", pad_vocab_to=2), 4)
    zarr = _planned(Request("ranks", Layout(tp=1), container="zarr"), 1)
    torch_ = _planned(Request("ranks", Layout(), container="torch", dialect="megatron", pad_vocab_to=2), 1)
    named = _without(plain, "shardwright.json")
    experts = {path.replace(".safetensors", "_ep0.safetensors"): data for path, data in named.items()}
    bare = _without(_planned(Request("ranks", Layout(), dialect="megatron"), 1), "shardwright.json")
    padded = _planned(Request("ranks", Layout(pp=2, stages=(1, 2)), dialect="megatron", spec="local"), 3)
    without_config = _without(plain, "hf/")
    dealt = _with_experts(_MIXTRAL, Request("ranks", Layout(tp=2, ep=2, etp=1)))
    local = _with_experts(_QWEN3_MOE, Request("ranks", Layout(tp=2, ep=2), dialect="megatron", pad_vocab_to=2))
    stacked = _without(_with_experts(_QWEN3_MOE, Request("ranks", Layout(ep=2), spec="stacked")), "shardwright.json")
    seeds = (plain, virtual, zarr, torch_, named, experts, bare, padded, without_config, dealt, local, stacked)
    return [_sparse(files) for files in seeds]


@functools.cache
def _megatron_seeds() -> list[bytes]:
    whole = _planned(Request("megatron-legacy", pad_vocab_to=2), 1)
    parts = _planned(Request("megatron-legacy", Layout(tp=2, pp=2), spec="local", pad_vocab_to=2))
    virtual = _planned(Request("megatron-legacy", Layout(pp=2, vpp=2), pad_vocab_to=2), 4)
    bare = _without(whole, "hf/", "shardwright.json")
    uneven = _without(_planned(Request("megatron-legacy", Layout(pp=2, stages=(1, 2)), pad_vocab_to=2), 3), "shardwright.json")
    path = "release/mp_rank_00/model_optim_rng.pt"
    iteration = {"latest_checkpointed_iteration.txt": b"5\n", "iter_0000005/mp_rank_00/model_optim_rng.pt": whole[path]}
    first = _with_args(uneven, decoder_first_pipeline_num_layers=1, decoder_last_pipeline_num_layers=2, pipeline_model_parallel_layout=None)
    scaled = _with_args(bare, use_rope_scaling=True, window_size=[3, 0])
    nested = {"mp_rank_00/model_optim_rng.pt": _saved({**_nested(), "optimizer": {"step": 1}, "rng_state": [1]})}
    model = _saved({"model": _nested()["model"], "checkpoint_version": 3.0})
    unnamed = {"mp_rank_00/model_optim_rng.pt": model, "hf/config.json": whole["hf/config.json"]}
    loose = {path.removeprefix("release/"): data for path, data in whole.items() if not path.startswith("latest")}
    dealt = _with_experts(_MIXTRAL, Request("megatron-legacy", Layout(ep=2), pad_vocab_to=2))
    sequential = _with_experts(_QWEN3_MOE, Request("megatron-legacy", Layout(tp=2, ep=2), spec="te-sequential", pad_vocab_to=2))
    told = _without(sequential, "hf/", "shardwright.json")
    seeds = (whole, parts, virtual, bare, uneven, iteration, first, scaled, nested, unnamed, loose, dealt, sequential, told)
    return [_sparse(files) for files in seeds]


def _nested() -> dict[str, Any]:
    """What Megatron-LM wrote before Megatron-core."""
    raw = json.loads(_planned(Request("megatron-legacy", pad_vocab_to=2), 1)["hf/config.json"])
    family = FAMILIES.get("llama")
    config = from_huggingface(raw, family)
    rows = expand(family, config, DIALECTS.get("megatron-nested"), "layernorm", Layout(), 6)
    model: dict[str, Any] = {}
    for row in rows.instances:
        node = model
        *folders, last = row.name.split(".")
        for part in folders:
            node = node.setdefault(part, {})
        node[last] = torch.zeros(rows.classes[row.row].shards[0].shape, dtype=torch.float16)
    arguments = {**to_megatron(config, family)[0], "padded_vocab_size": 6, "tensor_model_parallel_size": 1}
    return {"args": argparse.Namespace(**arguments), "checkpoint_version": 2.0, "iteration": 5, "model": model}


def _with_args(files: Mapping[str, bytes], **changes: Any) -> dict[str, bytes]:
    return {path: _relaid(data, lambda a: {**a, **changes}) if path.endswith(".pt") else data for path, data in files.items()}


def _relaid(data: bytes, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> bytes:
    """One of our own archives with its args changed, laid out again."""
    index = TorchZip().read(MemoryStore({"m.pt": data}), "m.pt")
    objects = dict(index.objects)
    arguments = objects.get("args")
    if isinstance(arguments, Namespace):
        objects["args"] = Namespace(edit(dict(arguments.fields)))
    for name in index.tensors:
        top, _, key = name.partition(".")
        objects[top] = {**objects.get(top, {}), key: TensorRef(name)}
    specs = [TensorSpec(name, t.dtype, t.shape) for name, t in index.tensors.items()]
    (file,) = TorchZip().lay_out("m.pt", specs, objects=objects).files
    made = bytearray(file.nbytes)
    for offset, part in file.static:
        made[offset : offset + len(part)] = part
    return bytes(made)


_CHECKPOINT_WORDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "mixtral", "qwen3_moe", "stacked", "per-expert", "te-sequential", 1 << 17),
    *("model_type", "llama", "qwen2", "rope_theta", "rope_scaling", "rope_parameters", "rope_type", "factor", "attention_bias", "silu"),
    *("quantization_config", "weight_map", "metadata", "schema", "layout", "tp", "pp", "vpp", "ep", "etp", "stages", "dialect", "spec"),
    *("container", "config", "family", "megatron", "huggingface", "safetensors", "zarr", "torch", "te", "local", "model.safetensors"),
    *(0, 1, 2, 3, 4, 8, [1, 1], {"rope_type": "linear", "factor": 2.0}, {"tp": 2}, None, True, False, 10**12, 1 << 62),
    {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}},
)
_ARGUMENT_WORDS = (
    *(None, True, False, 0, 1, 2, 3, -1, 10**12, 1 << 70, 10**5000, 1e300, "x", "Et*1|t*2L", "t|tt", "t*99999999", [1, 0], (2, 0), [], {}),
    *("RMSNorm", "rope", "silu", 4.0),
)


def _mutate_checkpoint(names: Sequence[str], data: bytes, rng: random.Random) -> bytes:
    """A document, a container or the tree itself."""
    files, sizes = unpack(data)
    if not files or rng.random() < 0.02:
        return mutate_bytes(data, rng)
    documents = [path for path in files if path.endswith(".json") and path != "tokenizer.json"]
    containers = [path for path in files if path.endswith((".safetensors", ".pt", ".bin"))]
    draw = rng.random()
    if documents and draw < 0.5:
        path = rng.choice(documents)
        files[path] = mutate_json(files[path], rng, (*_CHECKPOINT_WORDS, *files))
        sizes.pop(path, None)
    elif containers and draw < 0.8:
        _edit_container(rng.choice(containers), files, sizes, rng)
    else:
        _edit_tree(files, sizes, names, rng)
    return pack(files, sizes)


def _edit_container(path: str, files: dict[str, bytes], sizes: dict[str, int], rng: random.Random) -> None:
    size = sizes.get(path, len(files[path]))
    if path.endswith(".safetensors"):
        header = 8 + int.from_bytes(files[path][:8], "little")
        files[path] = SAFETENSORS.mutate(files[path], rng)
        sizes[path] = size - header + 8 + int.from_bytes(files[path][:8], "little") if rng.random() < 0.7 else size
        sizes[path] = max(0, min(sizes[path], 1 << 40))
        return
    whole = files[path].ljust(min(size, 1 << 16), b"\0")
    if rng.random() < 0.7:
        try:
            files[path] = _relaid(whole, lambda a: _edited(a, rng))
            sizes[path] = len(files[path])
            return
        except (ShardwrightError, ValueError, TypeError, RecursionError, AttributeError):
            pass  # no longer one of ours
    files[path] = TORCH_ZIP.mutate(whole, rng)
    sizes[path] = len(files[path])


def _edited(arguments: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A Namespace's fields with one or two changed."""
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice(list(arguments) or ["x"])
        draw = rng.random()
        if draw < 0.15:
            arguments.pop(key, None)
        elif draw < 0.5 and isinstance(arguments.get(key), int):
            arguments[key] += rng.choice((-1, 1))
        else:
            arguments[key] = rng.choice(_ARGUMENT_WORDS)
    return arguments


def _edit_tree(files: dict[str, bytes], sizes: dict[str, int], names: Sequence[str], rng: random.Random) -> None:
    path = rng.choice(list(files))
    draw = rng.random()
    if draw < 0.2:
        del files[path]
    elif draw < 0.45:
        made = rng.choice((*names, re.sub(r"\d+", lambda m: str(int(m[0][:9]) + 1).zfill(len(m[0])), path), f"x/{path}", text(rng)))
        files[made], sizes[made] = files[path], sizes.get(path, 0)
        if rng.random() < 0.5 and made != path:
            del files[path]
    elif draw < 0.6:
        files[rng.choice(names)] = rng.choice((b"release", b"5", b"iter", b"9" * 60, b"", b"{}", b"[]", b"\xff"))
    elif draw < 0.75:
        sizes[path] = edge(rng, (len(files[path]),))
    else:
        files[rng.choice(("README.md", "tokenizer.model", "hf/LICENSE", "note.txt", "sub/model.safetensors", text(rng) or "a"))] = b"x"


def _checkpoint(
    name: str, modules: Sequence[str], seeds: Callable[[], list[bytes]], names: Sequence[str], elsewhere: Sequence[str]
) -> Target:
    return register(
        Target(
            name.replace("-", "_"),
            tuple(_PLANNER + module for module in modules),
            _parse_checkpoint,
            seeds,
            functools.partial(_mutate_checkpoint, names),
            tuple(_PLANNER + one for one in elsewhere),
        )
    )


HUGGINGFACE = _checkpoint(
    "huggingface",
    ("formats.huggingface", "formats.common"),
    _huggingface_seeds,
    ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "config.json", "a.pt"),
    (
        *(f"formats.huggingface:{name}" for name in ("HuggingFace.file", "_index", "_sizes", "_shards")),
        *(f"formats.common:{name}" for name in ("config_bytes", "stages", "carried")),
    ),
)
RANKS = _checkpoint(
    "ranks",
    ("formats.ranks", "identity"),
    _ranks_seeds,
    (
        *("rank_00000_tp0_pp0.safetensors", "rank_00001_tp1_pp0.safetensors", "rank_99999_tp99999_pp0.safetensors"),
        *("shardwright.json", "hf/config.json"),
    ),
    ("formats.ranks:Ranks.file", "formats.ranks:Ranks.dialects", "formats.ranks:Ranks.containers"),
)
MEGATRON_LEGACY = _checkpoint(
    "megatron-legacy",
    ("formats.megatron_legacy",),
    _megatron_seeds,
    ("latest_checkpointed_iteration.txt", "release/mp_rank_00/model_optim_rng.pt", "mp_rank_00_001/model_optim_rng.pt", "shardwright.json"),
    tuple(
        f"formats.megatron_legacy:{name}"
        for name in ("MegatronLegacy.file", "MegatronLegacy._units", "_folder", "_arguments", "_stage_arguments")
    ),
)


@functools.cache
def _deepspeed_seeds() -> list[bytes]:
    mp = _planned(Request("deepspeed-mp", Layout(tp=2), pad_vocab_to=2), 1)
    bare = _without(mp, "hf/", "shardwright.json")
    unnamed = _without(bare, "checkpoints.json")
    layers = _planned(Request("megatron-deepspeed", Layout(tp=2), pad_vocab_to=2), 1)
    lone = _without(layers, "hf/", "shardwright.json")
    files = ["global_step0/mp_rank_00_model_states.pt", "global_step0/mp_rank_01_model_states.pt"]
    old = {
        "type": "Megatron",
        "version": 2.0,
        "checkpoints": [f"/old/{name}" for name in reversed(files)],
        "base_dir": "/older",
        "mp_size": 2,
    }
    moved = {**unnamed, "m.json": json.dumps(old).encode()}
    model = _planned(Request("huggingface"), 1)
    listed = {"type": "BLOOM", "version": 1.0, "checkpoints": ["a.safetensors"]}
    weights = {"config.json": model["config.json"], "a.safetensors": model["model.safetensors"], "m.json": json.dumps(listed).encode()}
    return [_sparse(files) for files in (mp, bare, unnamed, layers, lone, moved, weights)]


DEEPSPEED = _checkpoint(
    "deepspeed",
    ("formats.deepspeed_mp", "formats.deepspeed_files", "formats.megatron_deepspeed", "manifest", "megatron_deepspeed_args"),
    _deepspeed_seeds,
    (
        *("latest", "checkpoints.json", "ds_inference_config.json", "config.json", "global_step0/mp_rank_00_model_states.pt"),
        *("global_step0/layer_02-model_00-model_states.pt", "global_step0/zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    ),
    (
        *(f"formats.deepspeed_mp:{name}" for name in ("DeepSpeedMp.file", "refuse_pipeline", "_path", "engine_states")),
        *(f"formats.megatron_deepspeed:{name}" for name in ("MegatronDeepSpeed.file", "_file_number")),
        *("manifest:manifest_bytes", "megatron_deepspeed_args:to_megatron_deepspeed"),
    ),
)


# --- configs ---------------------------------------------------------------------------------------------------------


def _parse_config(data: bytes) -> None:
    """A config.json, or Megatron's args as an object of one key; what is read is written again."""
    raw = read_object(MemoryStore({"config.json": data}), "config.json")
    if isinstance(arguments := raw.get("args"), dict):
        name = raw.get("family")
        config = from_megatron(arguments, FAMILIES.get(name) if isinstance(name, str) else None, None, "m.pt")
        family = FAMILIES.get(config.family)
    else:
        family = family_of(raw)
        config = from_huggingface(raw, family)
    made = to_huggingface(config, family, "bfloat16", raw)
    with contextlib.suppress(ShardwrightError):
        to_megatron(config, family)
        made = to_huggingface(config, family, "bfloat16", None)
    json.dumps(made).encode()


@functools.cache
def _config_seeds() -> list[bytes]:
    raw = json.loads(_planned(Request("megatron-legacy", pad_vocab_to=2), 1)["hf/config.json"])
    found = []
    for kind in ("llama", "mistral", "qwen2", "qwen3"):
        config = {**raw, "model_type": kind}
        arguments, _ = to_megatron(from_huggingface({**config, "head_dim": 2}, FAMILIES.get(kind)), FAMILIES.get(kind))
        found += [config, {"args": arguments, "family": kind}]
    qwen2_moe = replace(_QWEN3_MOE, family="qwen2_moe", qk_norm=False, qkv_bias=True, shared=4)
    for model in (_MIXTRAL, _QWEN3_MOE, replace(_QWEN3_MOE, dense=(1,)), replace(_QWEN3_MOE, dense=()), qwen2_moe):
        family = FAMILIES.get(model.family)
        arguments, _ = to_megatron(from_huggingface(model.config(), family), family)
        found += [model.config(), {"args": arguments}, {"args": {**arguments, "moe_layer_freq": 2}, "family": model.family}]
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    arguments = found[1]["args"]
    found += [
        {**raw, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {**raw, "rope_scaling": {"type": "yarn", "factor": 2.0}},
        {**raw, "rope_parameters": {"rope_theta": 10000.0, **scaling}},
        {**raw, "model_type": "mistral", "sliding_window": 7},
        {"args": {**arguments, "use_rope_scaling": True, "window_size": [6, 0]}},
        {"args": {**arguments, "rotary_seq_len_interpolation_factor": 4, "kv_channels": None, "rotary_base": 10000}, "family": "llama"},
        {**raw, "attention_bias": True},
        {**raw, "hidden_act": "gelu"},
        {k: v for k, v in {**raw, "dtype": "float32"}.items() if k != "torch_dtype"},
    ]
    return [json.dumps(one).encode() for one in found]


_CONFIG_WORDS = (
    *(word for word in (*_CHECKPOINT_WORDS, *_ARGUMENT_WORDS) if word != 10**5000),
    *("mistral", "qwen3", "yarn", "llama3", "default", "args", "normalization", "window_size", "mixtral", "qwen2_moe", "qwen3_moe"),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "mlp_only_layers", "decoder_sparse_step"),
    *("moe_layer_freq", "moe_router_topk", "moe_ffn_hidden_size", "shared_expert_intermediate_size", [0, 1], 1 << 18, 1 << 20),
)

CONFIG = register(
    Target(
        "config",
        (_PLANNER + "config", _PLANNER + "megatron_args"),
        _parse_config,
        _config_seeds,
        lambda data, rng: mutate_json(data, rng, _CONFIG_WORDS),
    )
)


# --- expressions -----------------------------------------------------------------------------------------------------

_FIELDS: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "tie": False, "act": "silu", "kinds": ["a", "b"], "none_": None,
    "theta": 1e4, "layer": 3, "tp": 2, "huge": 10**400,
}  # fmt: skip


_EXPRESSIONS = (
    *("hidden_size // num_attention_heads", "not tie and tp > 1", "layer % 2 == 0", "128 * tp", "'silu'", "none", "true", "1e-6", "theta"),
    *("act in ('silu', 'swish')", "act not in ['gelu']", "1 if tie else (hidden_size if layer < 4 else 2)", "-(layer + 1) * 2"),
    *("1 < tp < 3", "(tie or layer) * 2", "-layer", "hidden_size * num_key_value_heads - 1"),
)


def _parse_expression(data: bytes) -> None:
    repr(parse_expression(data.decode("utf-8", "replace"), "fuzz")(_FIELDS).__class__)


def _expression(rng: random.Random, depth: int = 3) -> str:
    if depth == 0 or rng.random() < 0.2:
        return rng.choice((*_FIELDS, "true", "false", "none", "'silu'", "0", "1", "2", "1.5", "128", "1e308", "(1, 2)", "['a']"))
    one, two = (_expression(rng, depth - 1) for _ in range(2))
    return rng.choice(
        (
            *(f"{one} {op} {two}" for op in ("+", "-", "*", "//", "%", "==", "!=", "<", "<=", ">", ">=", "and", "or", "in", "not in")),
            *(f"({one})", f"-{one}", f"not {one}", f"{one} if {two} else 1", f"{one} < {two} < 3"),
        )
    )


_TOKENS = (
    *("__import__('os')", "().__class__", "f'{1}'", "lambda: 1", "x[0]", "a.b", "print(1)", "**", "<<", "/", "@", ":=", "await", "yield"),
    *("'a' * 9", "-" * 400, "(" * 150, "9" * 600, "1if 2else 3", "0x1for x in y", "#", "\n", "\0", "\t", "\\d", "{1}", "*hidden_size"),
    *("...", "1j", "b''", "1e999", "_"),
)


def _mutate_expression(data: bytes, rng: random.Random) -> bytes:
    draw = rng.random()
    if draw < 0.35:
        return _expression(rng).encode()
    if draw < 0.45:
        return mutate_bytes(data, rng)
    parts = re.split(r"(\W+)", data.decode("utf-8", "replace"))
    at = rng.randrange(len(parts))
    parts[at] = rng.choice((*_FIELDS, *_TOKENS, _expression(rng, 1), " + ", " // ", "", parts[at] * 2))
    return "".join(parts).encode("utf-8", "replace")


EXPRESSIONS = register(
    Target(
        "expressions",
        (_PLANNER + "expressions",),
        _parse_expression,
        lambda: [one.encode() for one in _EXPRESSIONS],
        _mutate_expression,
    )
)


# --- tables ----------------------------------------------------------------------------------------------------------

_FAMILY = b"""name = "mine"
model_types = ["mine"]
architecture = "MineForCausalLM"
infer = "not qk_norm"
keep_dtype = ["*.q.weight"]
[config]
hidden_size = { key = "hidden_size" }
num_hidden_layers = { key = "num_hidden_layers" }
num_attention_heads = { key = "num_attention_heads" }
num_key_value_heads = { key = "num_key_value_heads", default = "num_attention_heads" }
vocab_size = { key = "vocab_size" }
tie_word_embeddings = { key = "tie_word_embeddings", default = "false" }
qk_norm = { value = "false" }
[[tensor]]
name = "model.embed_tokens.weight"
shape = ["vocab_size", "hidden_size"]
split = "vocab"
[[tensor]]
name = "model.layers.{layer}.q.weight"
shape = ["hidden_size", "hidden_size"]
split = "heads"
huggingface = "h.{layer}.q.weight"
[[tensor]]
name = "model.layers.{layer}.k.weight"
shape = ["hidden_size // num_attention_heads * num_key_value_heads", "hidden_size"]
when = "layer % 2 == 0"
split = "kv_heads"
[[tensor]]
name = "lm_head.weight"
shape = ["vocab_size", "hidden_size"]
stage = "last"
split = "columns"
when = "not tie_word_embeddings"
[[alias]]
name = "lm_head.weight"
of = "model.embed_tokens.weight"
when = "tie_word_embeddings"
[[ignore]]
pattern = "*.inv_freq"
reason = "computed"
"""
_EXTENDED = b"""name = "more"
extends = "llama"
model_types = ["more"]
[config]
qk_norm = { value = "true" }
[[tensor]]
name = "model.norm.weight"
shape = ["hidden_size + 0"]
stage = "last"
[[tensor]]
name = "model.layers.{layer}.extra"
shape = [1, "layer + 1"]
"""
_DIALECT = b"""name = "mine"
numbering = "local"
kv_heads = "replicate"
pad_vocab = "128 * tp"
specs = ["one", "two"]
[[row]]
name = { one = "e.weight", two = "embed.weight" }
hub = ["model.embed_tokens.weight"]
layout = ["pad_vocab"]
split = "vocab"
[[row]]
name = "l.{layer}.qkv"
hub = [
  "model.layers.{layer}.self_attn.q_proj.weight",
  "model.layers.{layer}.self_attn.k_proj.weight",
  "model.layers.{layer}.self_attn.v_proj.weight",
]
layout = ["grouped_qkv()"]
split = "qkv"
[[row]]
name = "l.{layer}.out"
hub = ["model.layers.{layer}.self_attn.o_proj.weight"]
layout = ["transpose"]
split = "rows"
when = "hidden_size > 1"
[[ignore]]
pattern = "x*"
reason = "y"
"""
_EXPERTS = b"""name = "mixed"
extends = ["qwen3_moe", "_experts"]
model_types = ["mixed"]
spellings = ["mixed", "per-expert"]
[config]
num_experts = { key = ["num_experts", "num_local_experts"] }
[layer]
moe = "layer % 2 == 0"
wide = "2 if layer > 1 else 1"
[refuse]
megatron = "no"
[[tensor]]
name = "model.layers.{layer}.mlp.experts.{expert}.bias"
shape = ["moe_intermediate_size * wide"]
split = "rows"
when = "moe"
huggingface = "b.{layer}.{expert}"
[[row]]
name = { mixed = "model.layers.{layer}.mlp.experts.gate_up_proj" }
hub = ["model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight", "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"]
layout = ["interleave", "transpose", "stack_experts"]
split = "columns"
[[row]]
name = { mixed = "x.{layer}.{expert}.down", per-expert = "y.{layer}.{expert}" }
hub = ["model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"]
layout = ["packed()"]
when = "num_experts > 1"
"""
_EXPERT_ROWS = b"""# dialect
name = "mixed"
[[row]]
name = "e.{layer}"
hub = ["model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight", "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"]
layout = ["packed", "stack_experts"]
split = "rows"
when = "moe"
[[row]]
name = "d.{layer}.{expert}"
hub = ["model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"]
split = "columns"
[[row]]
name = "d.{layer}"
hub = ["model.layers.{layer}.mlp.down_proj.weight"]
when = "not moe"
"""
_MODEL: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 4,
}  # fmt: skip


def _parse_table(data: bytes) -> None:
    """A dialect where the text says so in its first line, else a family; what it says of a small model is worked out."""
    file = scratch() / "table.toml"
    file.write_bytes(data)
    if data.startswith(b"# dialect"):
        dialect = load_dialect(file)
        family = FAMILIES.get("qwen3_moe" if b"{expert}" in data else "llama")
        dialects = [(dialect, spec) for spec in dialect.specs or ("",)]
    else:
        family = load_family(file)
        dialects = [(DIALECTS.get("huggingface"), spec) for spec in family.spellings or ("",)]
    with contextlib.suppress(ShardwrightError):
        config = from_huggingface(_MODEL, family)
        hub = hub_tensors(family, config)
        for dialect, spec in dialects:
            for layout in (Layout(), Layout(tp=2, pp=2), Layout(tp=2, ep=2, etp=1)):
                with contextlib.suppress(ShardwrightError):
                    expand(family, config, dialect, spec, layout, None, hub=hub)


@functools.cache
def _table_seeds() -> list[bytes]:
    dialects = [b"# dialect\n" + _DIALECT, b'# dialect\nname = "d"\nrows = "family"\n', b"# dialect\n" + _DIALECT.partition(b"[[row]]")[0]]
    dialects += [_EXPERT_ROWS]
    return [_EXPERTS, _FAMILY, _EXTENDED, _FAMILY + b'[[tensor]]\nname = "x"\nshape = []\n', *dialects]


_TABLE_WORDS = (
    *("model.layers.{layer}.w", "model.embed_tokens.weight", "lm_head.weight", "hidden_size", "layer", "vocab_size // 2", "true", "1"),
    *("none", "rows", "columns", "vocab", "heads", "head_columns", "kv_heads", "qkv", "first", "last", "{expert}", "{layer"),
    *("{layer}{layer}", "-1", "transpose", "packed", "grouped_qkv", "pad_vocab(1)", "pad_vocab(", "transpose()", "llama", "../x"),
    *(
        "more",
        "mine",
        "huge",
        "*",
        "[a-",
        "_experts",
        "mixtral",
        "qwen3_moe",
        "stack_experts",
        "packed",
        "interleave",
        "moe",
        "num_experts",
    ),
    *("model.layers.{layer}.e.{expert}", "{layer}.{expert}", "not moe", "stacked", "per-expert", "num_local_experts"),
    *("10 ** 9", "'a' * 9", "hidden_size * 1000000000000000000000", "hidden_size == 8", "tp", "local", "global", "cut", "family", ""),
)
_TABLE_LINES = (
    *('extends = "llama"', 'extends = "table"', 'name = "x"', 'stage = "last"', 'split = "columns"', 'when = "layer > 0"', "[config]"),
    *("[[tensor]]", "[[alias]]", "[[row]]", "[[ignore]]", "x = 1", "shape = []", "shape = [1, 2, 3]", "a.b.c.d = 1", "d = 2020-13-45"),
    *("n = " + "9" * 5000, "n = 0x" + "f" * 5000),
    *("shape = 3", 'layout = ["transpose", "transpose"]', 'hub = ["lm_head.weight"]', 'rows = "family"', "x = " + "[" * 60 + "]" * 60, "."),
    *("x = " + ".".join("a" * 400), "infer = 0xfffffffffffffffffffffffffff", "infer = nan", 'name = { one = "a" }', "specs = []"),
    *("name = 1", 'extends = ["llama", "_experts", "table"]', "[layer]", 'moe = "layer > 1"', "[refuse]", 'spellings = ["a", "b"]'),
    *("b" + ".b" * 40 + " = 1", "config = 3", "tensor = 1", 'names = ["a"]', 'reason = ""', 'of = "x"', 'default = "1"'),
)


def _mutate_table(data: bytes, rng: random.Random) -> bytes:
    """A line taken out, doubled, moved or put in; a string in it changed; or any byte."""
    draw = rng.random()
    if draw < 0.08:
        return mutate_bytes(data, rng)
    lines = data.decode("utf-8", "replace").split("\n")
    first = 1 if lines[0].startswith("# dialect") and draw < 0.99 else 0
    at = rng.randrange(first, len(lines)) if len(lines) > first else 0
    if draw < 0.6:
        strings = list(re.finditer(r'"([^"]*)"', lines[at]))
        if strings:
            match = rng.choice(strings)
            nearly = (match[1] + "x", match[1][:-1], match[1].replace("{layer}", "0"))
            inside = rng.choice((*_TABLE_WORDS, _expression(rng, 2), *nearly))
            lines[at] = f'{lines[at][: match.start()]}"{inside}"{lines[at][match.end() :]}'
        else:
            lines[at] = re.sub(r"\w+", lambda m: rng.choice((m[0], m[0] + "x", "name", "shape")), lines[at])
    elif draw < 0.7:
        del lines[at]
    elif draw < 0.85:
        lines.insert(at, rng.choice((*_TABLE_LINES, rng.choice(lines))))
    else:
        other = rng.randrange(first, len(lines)) if len(lines) > first else 0
        lines[at], lines[other] = lines[other], lines[at]
    return "\n".join(lines).encode("utf-8", "replace")


TABLES = register(
    Target("tables", (_PLANNER + "tables", _PLANNER + "_toml"), _parse_table, _table_seeds, _mutate_table, (f"{_PLANNER}tables:_builtin",))
)


# --- layout files ----------------------------------------------------------------------------------------------------


def _parse_layout(data: bytes) -> None:
    """A layout as a file of the user's; its ranks and stages are counted, and every kind of split tried."""
    file = scratch() / "layout.json"
    file.write_bytes(data)
    layout = read_layout(str(file))
    assert Layout.from_json(layout.to_json()) == layout
    for rank in {0, layout.ranks // 2, layout.ranks - 1}:
        assert layout.rank(**layout.coordinates(rank)) == rank
    with contextlib.suppress(ShardwrightError):
        layout.coordinates(layout.ranks)
    with contextlib.suppress(ShardwrightError):
        layout.rank(tp=layout.tp)
    with contextlib.suppress(ShardwrightError):
        assert len(layout.places(24)) == 24
    assert layout.tp % layout.expert_tp == 0
    if layout.tp * layout.ep <= 4096:
        stage = layout.stage_ranks(layout.pp - 1)
        assert [layout.place_in_stage(rank) for rank in stage] == list(range(len(stage)))
        assert layout.stage_ranks(layout.pp - 1, layout.ep - 1) == stage[-layout.tp :]
    for split in SPLITS.values():
        for shape in ((), (24,), (24, 48)):
            for kv in ("cut", "replicate"):
                for fields in ({"num_attention_heads": 24, "num_key_value_heads": 4}, {}):
                    with contextlib.suppress(ShardwrightError):
                        _check_split(replace(split(shape, layout.tp, fields, kv), cycles=layout.ep))


def _check_split(split: Split) -> None:
    """Each shard has as many copies, one after the other."""
    if split.width <= 256:
        held = [(split.shard_of(place), split.copy_of(place)) for place in range(split.width)]
        assert sorted(held) == [(shard, copy) for shard in range(split.parts) for copy in range(split.repeat * split.cycles)]


_LAYOUTS: tuple[dict[str, Any], ...] = (
    *({}, {"tp": 8}, {"tp": 2, "pp": 4, "vpp": 2}, {"tp": 3, "pp": 2, "stages": [10, 14]}, {"tp": 4, "ep": 4, "etp": 2}),
    *({"pp": 5}, {"tp": 48}),
    {"tp": 4, "pp": 1, "vpp": 1, "ep": 1, "etp": None, "stages": None},
)
_LAYOUT_WORDS = ("tp", "pp", "vpp", "ep", "etp", "stages", 1, 2, 3, 4, 8, [12, 12], [1, 23], None, 1 << 20, 10**12, True)

LAYOUT = register(
    Target(
        "layout",
        (_PLANNER + "layout",),
        _parse_layout,
        lambda: [json.dumps(one).encode() for one in _LAYOUTS],
        lambda data, rng: mutate_json(data, rng, _LAYOUT_WORDS),
    )
)


# --- saved plans -----------------------------------------------------------------------------------------------------


def _parse_plan(data: bytes) -> None:
    file = scratch() / "plan.json"
    file.write_bytes(data)
    codec.load(file)


@functools.cache
def _plan_seeds() -> list[bytes]:
    parts = Request("ranks", Layout(tp=2), pad_vocab_to=4)
    others = (replace(parts, container="torch"), Request("huggingface", quantize="int8"), Request("huggingface", max_shard_size=100))
    with tempfile.TemporaryDirectory() as name:
        folder, table = Path(name) / "source", Path(name) / "small.toml"
        table.write_bytes(_SMALL)
        shapes = {"model.embed_tokens.weight": (6, 8), "model.layers.0.q_proj.weight": (8, 8), "model.norm.weight": (8,)}
        config = json.dumps(_MODEL | {"vocab_size": 6, "num_hidden_layers": 1}).encode()
        _put(
            folder, {"model.safetensors": save({key: np.zeros(shape, np.float32) for key, shape in shapes.items()}), "config.json": config}
        )
        plans = [_slim(build(_opened(folder, table), request)) for request in (parts, *others)]
        # Back again: copies to compare, padding to look at, and a cast.
        _put(Path(name) / "parts", _laid_out(build(_opened(folder, table), parts)) | {"hf/config.json": config})
        plans.append(_slim(build(_opened(Path(name) / "parts", table), Request("huggingface", dtype="bfloat16"))))
    return [codec.dumps(plan, target_root="/out").encode() for plan in plans]


def _put(folder: Path, files: Mapping[str, bytes]) -> None:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
        os.utime(folder / path, ns=(0, 10**18))


def _opened(folder: Path, table: Path) -> Source:
    return open_source(LocalStore(folder), Hints(load_family(table)))


def _slim(plan: Plan) -> Plan:
    """The plan from no folder in particular, with as little in ``shardwright.json`` as its seals go over."""
    *files, identity = plan.target_files
    seals = tuple(seal._replace(offset=8 * k) for k, seal in enumerate(identity.seals))
    data = b"0" * (8 * len(seals))
    return replace(
        plan, source_root="/source", target_files=(*files, replace(identity, nbytes=len(data), static=((0, data),), seals=seals))
    )


_PLAN_WORDS: tuple[Any, ...] = (
    *(0, 1, 2, 3, 4, 8, 16, 64, -1, 1 << 24, 1 << 40, 1 << 60, 1 << 61, None, True, [], [0], {}),
    *({"delta": [0, 1]}, {"delta": [8]}, "a/b"),
)
_SMALL = b"""name = "small"
model_types = ["small"]
architecture = "Small"
[config]
hidden_size = { key = "hidden_size" }
num_hidden_layers = { key = "num_hidden_layers" }
vocab_size = { key = "vocab_size" }
[[tensor]]
name = "model.embed_tokens.weight"
shape = ["vocab_size", "hidden_size"]
split = "vocab"
[[tensor]]
name = "model.layers.{layer}.q_proj.weight"
shape = ["hidden_size", "hidden_size"]
split = "columns"
[[tensor]]
name = "model.norm.weight"
shape = ["hidden_size"]
stage = "last"
"""


def _mutate_plan(data: bytes, rng: random.Random) -> bytes:
    """One field, with the hash made true again in most draws: without that, nothing behind it would be seen."""
    draw = rng.random()
    if draw < 0.1:
        return mutate_json(data, rng, _PLAN_WORDS)
    try:
        tree = json.loads(data)
        field = rng.choice(list(tree))
        if draw < 0.35:
            _harmless(tree, rng)
        elif draw < 0.5:
            _move_tensors(tree, rng)
        elif isinstance(tree[field], dict | list):
            tree[field] = mutate_tree(tree[field], rng, _PLAN_WORDS)
        else:
            mutate_tree(tree, rng, _PLAN_WORDS)
        if rng.random() < 0.9:
            tree["plan_hash"] = _hash_of(tree)
        return json.dumps(tree, separators=(",", ":")).encode("utf-8", "surrogatepass")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError, IndexError):
        return mutate_json(data, rng, _PLAN_WORDS)


def _harmless(tree: dict[str, Any], rng: random.Random) -> None:
    """A change that means no harm: words for people, recipe, fingerprints."""
    choice = rng.randrange(6)
    if choice == 0:
        tree["warnings"] = [*tree["warnings"], text(rng)]
    elif choice == 1:
        tree["dropped"] = [*tree["dropped"], [text(rng), "why"]]
    elif choice == 2:
        tree["source_files"]["mtime_ns"] = [rng.randrange(1 << 62) for _ in tree["source_files"]["path"]]
    elif choice == 3:
        tree["recipe"][rng.choice(("note", "drop", "to", "dtype"))] = rng.choice(("x", ["a"], None))
    elif choice == 4:
        tree["copied_bytes"] = edge(rng)
    else:
        for program in tree["programs"]:
            program["label"] = text(rng)


def _move_tensors(tree: dict[str, Any], rng: random.Random) -> None:
    """The same number in every place of one column or of one piece."""
    program = rng.choice(tree["programs"])
    side = rng.choice((program["gather"], program["outputs"][0]["scatter"], program["outputs"][0]["zeros"], program["padding"]))
    if side and rng.random() < 0.7:
        piece = rng.choice(side)
        at = rng.randrange(len(piece))
        piece[at] = rng.choice((piece[at] + 1, piece[at] * 2, piece[at] // 2, edge(rng), 1, 0))
        if rng.random() < 0.3:
            piece += [edge(rng), 1, 1]
    else:
        program["shape"] = [rng.choice((n, n + 1, n * 2, edge(rng))) for n in program["shape"]]
        program["outputs"][0]["shape"] = program["shape"]


def _hash_of(tree: Mapping[str, Any]) -> str:
    """`plan_hash`, of the JSON."""
    digest = hashlib.sha256(json.dumps([PLAN_FORMAT, tree["recipe"]], sort_keys=True, default=str).encode())
    tiles = {name: _plain(tree["tiles"][name]) for name in ("first", "program", "row", "lo0", "lo1", "hi0", "hi1")}
    boxes = [np.column_stack([tiles[f"{side}0"], tiles[f"{side}1"]]) for side in ("lo", "hi")]
    for column in (tiles["first"], tiles["program"], tiles["row"], *boxes):
        digest.update(np.ascontiguousarray(column).astype("<i8").tobytes())
    files = tree["source_files"]
    times = [int(n) for n in _plain(files["mtime_ns"])]
    digest.update(json.dumps(list(zip(files["nbytes"], files["header_digest"], times, strict=True))).encode())
    return digest.hexdigest()


def _plain(column: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.cumsum(np.array(column["delta"], dtype=np.int64)) if isinstance(column, dict) else np.array(column, dtype=np.int64)


SAVED_PLAN = register(
    Target(
        "saved_plan",
        tuple(_PLANNER + name for name in ("codec", "_saved", "_strict", "_coherent", "passes.check", "passes.disjoint")),
        _parse_plan,
        _plan_seeds,
        _mutate_plan,
        tuple(
            f"{_PLANNER}codec:{name}"
            for name in ("to_json", "from_json", "dumps", "save", "_text", "_Tables", "_column", "_target_files", "_program", "_pieces")
        )
        + tuple(f"{_PLANNER}codec:{name}" for name in ("_bindings", "_tiles", "_tensors")),
    )
)


# --- journals --------------------------------------------------------------------------------------------------------

_TARGETS = (TargetFile("a", 1000), TargetFile("b", 0), TargetFile("c", 1 << 40))


def _parse_journal(data: bytes) -> None:
    found = journal.parse(data, 8, _TARGETS)
    assert 0 <= found.nbytes <= len(data)
    assert all(0 <= tile < 8 for tile in found.tiles)


@functools.cache
def _journal_seeds() -> list[bytes]:
    first = journal._line([journal._NAME, journal._VERSION, "ab" * 32])
    padding = {"p": Padding(1, 2, 3, 4)}
    extents = [[(0, 8 * tile, 8, 1234), (2, 0, 1 << 20, 0)] for tile in range(5)]
    lines = [journal.tile_line(tile, Receipt(100, 50, padding if tile % 2 else {}, held)) for tile, held in enumerate(extents)]
    return [first, b"".join([first, *lines]), b"".join([first, *lines, journal.publish_line(12345)]), b"".join([first, *lines])[:-7]]


def _mutate_journal(data: bytes, rng: random.Random) -> bytes:
    """One line's JSON, with its checksum made true again; lines moved; or any byte."""
    draw = rng.random()
    if draw < 0.2:
        return mutate_bytes(data, rng)
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    if draw < 0.75:
        body = mutate_json(lines[at][9:], rng, (*_PLAN_WORDS, "tile", "publish", {"p": [1, 2, 3, 4]}, [0, 0, 8, 1])).replace(b"\n", b" ")
        lines[at] = b"%08x %s" % (journal.crc32(body), body)
    elif draw < 0.9:
        lines.insert(rng.randrange(len(lines) + 1), rng.choice((lines[at], journal.publish_line(7)[:-1])))
    else:
        del lines[at]
    return b"\n".join(lines)


JOURNAL = register(
    Target(
        "journal",
        ("shardwright.executors.journal",),
        _parse_journal,
        _journal_seeds,
        _mutate_journal,
        tuple(f"shardwright.executors.journal:{name}" for name in ("Journal", "_open", "tile_line", "publish_line", "_line")),
    )
)
