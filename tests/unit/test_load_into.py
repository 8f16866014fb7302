"""Loading into modules: their own memory is filled, whatever its strides and dtype, and modules that do not fit are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright import Layout, errors
from shardwright.executors.tensors import Tensors, put
from tests.unit.tiny import tiny_llama

MEGATRON: dict[str, Any] = {"to": "megatron-legacy", "layout": Layout(tp=2, pp=2), "pad_vocab_to": 4}


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("load") / "src")


def module_of(tensors: Mapping[str, torch.Tensor], *, buffers: tuple[str, ...] = (), dtype: torch.dtype | None = None) -> nn.Module:
    """A module with parameters (or buffers) of these names and shapes, filled with something else."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        at = root
        for part in path:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        made = torch.full_like(tensor, 7, dtype=dtype or tensor.dtype)
        if name in buffers:
            at.register_buffer(last, made)
        else:
            at.register_parameter(last, nn.Parameter(made, requires_grad=made.is_floating_point()))
    return root


def rank(src: Path, number: int = 0, **options: Any) -> dict[str, torch.Tensor]:
    return dict(sw.open(src).state_dict(rank=number, lazy=False, **{**MEGATRON, **options}))


def filled(module: nn.Module, expected: Mapping[str, torch.Tensor]) -> None:
    found = module.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name


@pytest.mark.parametrize("number", range(4))
def test_a_rank_in_place(src: Path, number: int) -> None:
    expected = rank(src, number)
    module = module_of(expected, buffers=tuple(n for n in expected if "layer_norm" in n))
    places = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    report = sw.open(src).load_into(module, rank=number, memory="64MiB", **MEGATRON)
    filled(module, expected)
    assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == places
    assert isinstance(report, sw.loading.Loaded)
    assert (report.tensors, report.missing, report.unexpected, report.on_meta) == (len(expected), (), (), ())
    assert report.bytes_read > 0 and all(p.requires_grad and p.grad is None for p in module.parameters())


def test_hub_names_and_layouts_of_the_source(src: Path, tmp_path: Path) -> None:
    sw.convert(src, tmp_path / "m", **MEGATRON)
    expected = sw.open(src).state_dict(lazy=False)
    module = module_of(expected)
    sw.open(tmp_path / "m").load_into(module)
    filled(module, expected)


def test_bytes_are_read_into_the_parameters_themselves(src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a strip is one run of a tensor nothing is copied; with the way closed the result is the same."""
    expected = sw.open(src).state_dict(lazy=False)
    copied: list[int] = []
    real = Tensors.place

    def counting(self: Tensors, number: int, offset: int, data: memoryview) -> None:
        copied.append(len(data))
        real(self, number, offset, data)

    monkeypatch.setattr(Tensors, "place", counting)
    straight, around = module_of(expected), module_of(expected)
    sw.open(src).load_into(straight)
    assert copied == []
    monkeypatch.setattr(Tensors, "memory", lambda self, number: None)
    sw.open(src).load_into(around)
    assert sum(copied) == sum(tensor.nbytes for tensor in expected.values())
    filled(straight, expected)
    filled(around, expected)


def test_virtual_chunks_and_several_ranks_in_one_pass(src: Path) -> None:
    options: dict[str, Any] = {"to": "megatron-legacy", "layout": Layout(tp=2, pp=2, vpp=2), "pad_vocab_to": 4}
    held = sw.open(src).state_dicts(**options)
    parts = {n: [{k[7:]: t for k, t in held[n].items() if k.startswith(f"model{v}.")} for v in (0, 1)] for n in (1, 2)}
    modules = {number: [module_of(part) for part in chunks] for number, chunks in parts.items()}
    reports = sw.open(src).load_into(modules, **options)
    assert isinstance(reports, dict) and reports.keys() == {1, 2}
    for number, chunks in modules.items():
        for chunk, part in zip(chunks, parts[number], strict=True):
            filled(chunk, part)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_of_another_dtype(src: Path, dtype: torch.dtype) -> None:
    expected = rank(src, 1)
    module = module_of(expected, dtype=dtype)
    sw.open(src).load_into(module, rank=1, **MEGATRON)
    assert {p.dtype for p in module.parameters()} == {dtype}
    filled(module, expected)


def test_a_cast_before(src: Path) -> None:
    """As ``convert --dtype``, then to the parameter's own."""
    expected = rank(src, 1, dtype="bfloat16")
    module = module_of(expected, dtype=torch.float32)
    sw.open(src).load_into(module, rank=1, dtype="bfloat16", **MEGATRON)
    filled(module, expected)


def test_strided_parameters(src: Path) -> None:
    expected = sw.open(src).state_dict(lazy=False)
    module = module_of(expected)
    strided = 0
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            assert parameter is not None
            if parameter.dim() == 2:
                room = torch.full((parameter.shape[1], 2 * parameter.shape[0]), 7.0)
                part._parameters[name] = nn.Parameter(room[:, ::2].T)
            else:
                part._parameters[name] = nn.Parameter(torch.full((len(parameter), 3), 7.0)[:, 1])
            strided += 1
    rooms = [p._base if p._base is not None else p for p in module.parameters()]
    assert strided == len(expected) and not any(p.is_contiguous() for p in module.parameters()) and len(rooms) == strided
    sw.open(src).load_into(module)
    filled(module, expected)


def test_any_part_of_any_strides() -> None:
    for shape in ((3, 4, 5), (60,), (1, 1), (2, 1, 3)):
        size = torch.Size(shape).numel()
        axes = tuple(reversed(range(len(shape))))
        for begin in range(size):
            for end in (begin + 1, begin + 7, size):
                expected, target = torch.zeros(size), torch.zeros(tuple(reversed(shape))).permute(axes)
                expected[begin:end] = torch.arange(1.0, min(end, size) - begin + 1)
                put(target, begin, torch.arange(1.0, min(end, size) - begin + 1))
                assert torch.equal(target.reshape(-1), expected)


def test_a_scalar_and_zeros_that_cannot_be_written_to() -> None:
    tensors = {0: torch.tensor(1.0), 1: torch.ones(4, dtype=torch.float16), 2: torch.ones(2, 2).T}
    sink = Tensors(tensors, {0: "float32", 1: "float32", 2: "float32"})
    for number, nbytes in ((0, 4), (1, 8), (2, 12), (3, 4)):
        with sink.writing(number) as write:
            write(0, memoryview(bytes(nbytes)))
    assert tensors[0] == 0 and tensors[1].tolist() == [0, 0, 1, 1] and tensors[2].tolist() == [[0, 0], [0, 1]]


class Tied(nn.Module):
    """Embedding and head are one parameter."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(131, 64, device=device)
        self.lm_head = nn.Linear(64, 131, bias=False, device=device)
        self.lm_head.weight = self.model.embed_tokens.weight
        self.register_buffer("table", torch.empty(3, device=device), persistent=False)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_parameters_are_filled_once_and_stay_tied(tmp_path: Path, device: str) -> None:
    home = tiny_llama(tmp_path / "tied", tie_word_embeddings=True, layers=1)
    module = Tied(device)
    names = "model.embed_tokens.weight", "lm_head.weight"
    report = sw.open(home).load_into(module, include=names[:1])
    assert module.lm_head.weight is module.model.embed_tokens.weight and not module.lm_head.weight.is_meta
    assert torch.equal(module.lm_head.weight, sw.open(home)["model.embed_tokens.weight"].torch())
    assert isinstance(report, sw.loading.Loaded)
    assert report.tensors == 2 and report.bytes_read == 131 * 64 * 4
    assert report.on_meta == (("table",) if device == "meta" else ())


def test_modules_on_meta_get_memory(src: Path) -> None:
    expected = rank(src, 3)
    with torch.device("meta"):
        module = module_of({name: tensor.to("meta") for name, tensor in expected.items()}, buffers=("decoder.final_layernorm.weight",))
    module.decoder.final_layernorm.weight.mark = "kept"  # type: ignore[union-attr]
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    sw.open(src).load_into(module, rank=3, **MEGATRON)
    filled(module, expected)
    assert not any(p.requires_grad or p.is_meta or not p.tensor_model_parallel for p in module.parameters())  # type: ignore[attr-defined]


@pytest.mark.parametrize("module", [5, "model", [nn.Linear(1, 1), 5], {0: 5}, {0: [None]}])
def test_only_modules_are_filled(module: Any, src: Path) -> None:
    with pytest.raises(errors.UsageError, match=r"only modules are filled; expected a torch.nn.Module"):
        sw.open(src).load_into(module)


class TestFit:
    def test_strict_names_what_differs(self, src: Path) -> None:
        expected = rank(src)
        lacking = module_of({name: t for name, t in expected.items() if "layers.1.mlp.linear_fc2" not in name})
        with pytest.raises(errors.ModuleMismatchError, match=r"no place for it: tensor 'decoder.layers.1.mlp.linear_fc2.weight'") as caught:
            sw.open(src).load_into(lacking, **MEGATRON)
        assert caught.value.actual == "1 unexpected: decoder.layers.1.mlp.linear_fc2.weight"
        assert "Nearest on the other side: decoder.layers." in str(caught.value)
        more = module_of({**expected, "decoder.layers.0.mlp.linear_fc3.weight": torch.zeros(2)})
        with pytest.raises(errors.ModuleMismatchError, match=r"nothing for it.*linear_fc3.*1 missing.*Nearest.*linear_fc[12].weight"):
            sw.open(src).load_into(more, **MEGATRON)
        assert all((t == 7).all() for module in (lacking, more) for name, t in module.state_dict().items() if "fc3" not in name)

    def test_not_strict_fills_what_both_have(self, src: Path) -> None:
        expected = rank(src)
        some = {name: t for name, t in expected.items() if "linear_fc2" not in name}
        module = module_of({**some, "extra": torch.zeros(2)})
        report = sw.open(src).load_into(module, strict=False, **MEGATRON)
        assert isinstance(report, sw.loading.Loaded)
        assert report.missing == ("extra",) and set(report.unexpected) == expected.keys() - some.keys()
        assert module.extra.tolist() == [7, 7]
        filled(module, {**some, "extra": torch.tensor([7.0, 7.0])})

    def test_patterns_leave_the_rest_alone(self, src: Path) -> None:
        expected = rank(src)
        module = module_of({**expected, "extra": torch.zeros(2)})
        sw.open(src).load_into(module, include=["*linear_qkv*"], **MEGATRON)
        found = module.state_dict()
        assert all(torch.equal(found[n], t) if "linear_qkv" in n else (found[n] == 7).all() for n, t in expected.items())

    def test_shapes(self, src: Path) -> None:
        expected = rank(src)
        name = "embedding.word_embeddings.weight"
        module = module_of({**expected, name: torch.zeros(64, 64)})
        with pytest.raises(errors.ModuleMismatchError, match=r"word_embeddings.weight'; expected \(66, 64\), actual \(64, 64\). Build"):
            sw.open(src).load_into(module, **MEGATRON)
        with pytest.raises(errors.ModuleMismatchError, match="another shape"):
            sw.open(src).load_into(module_of(expected), **{**MEGATRON, "layout": Layout(pp=2)})

    def test_kinds(self, src: Path) -> None:
        module = module_of({"model.norm.weight": torch.zeros(64, dtype=torch.int32)})
        with pytest.raises(errors.ModuleMismatchError, match=r"cannot take.*expected float32, actual int32"):
            sw.open(src).load_into(module, include="model.norm.weight")

    @pytest.mark.parametrize("kind", ["lazy", "sparse", "distributed"])
    def test_tensors_that_are_not_plain(self, src: Path, kind: str, tmp_path: Path) -> None:
        module = module_of({"model.norm.weight": torch.zeros(64)})
        norm = module.get_submodule("model.norm")
        if kind == "lazy":
            norm._parameters["weight"] = nn.UninitializedParameter()
        elif kind == "sparse":
            norm._parameters["weight"] = nn.Parameter(torch.zeros(64).to_sparse())
        else:
            norm._parameters["weight"] = nn.Parameter(distributed(tmp_path))
        with pytest.raises(errors.UnsupportedError, match=r"only plain tensors are filled.*model.norm.weight.*Load before"):
            sw.open(src).load_into(module, include="model.norm.weight")

    def test_meta_is_no_place_to_load_to(self, src: Path) -> None:
        with pytest.raises(errors.UsageError, match="nothing is loaded onto"):
            sw.open(src).load_into(nn.Linear(1, 1), device="meta")


def distributed(folder: Path) -> torch.Tensor:
    """A DTensor of one process."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        return DTensor.from_local(torch.zeros(64), init_device_mesh("cpu", (1,)), [Replicate()])
    finally:
        dist.destroy_process_group()


CHILD = """
import json, sys, torch
import shardwright as sw
from shardwright.executors.host import held_bytes
src, how, memory = sys.argv[1:]
ckpt = sw.open(src)
options = dict(to="megatron-legacy", layout=sw.Layout(tp=2), rank=1, memory=memory, workers=2)
meta = ckpt.state_dict(**options).meta
kind = torch.float16 if how == "cast" else torch.bfloat16
module = torch.nn.ParameterDict({name.replace(".", "/"): torch.zeros(t.shape, dtype=kind) for name, t in meta.items()})
for parameter in module.parameters():
    parameter.data.fill_(1)
tiny = sw.open(sys.argv[1] + "-tiny").state_dict(lazy=False, dtype="float16")  # every import and first call
by_name = torch.nn.Module()
for name, parameter in module.items():
    at = by_name
    *path, last = name.split("/")
    for part in path:
        if part not in at._modules:
            at.add_module(part, torch.nn.Module())
        at = at._modules[part]
    at.register_parameter(last, parameter)
open("/proc/self/clear_refs", "w").write("5")
before = held_bytes("VmRSS")
if how == "lazy":
    for name, tensor in ckpt.state_dict(**options).items():
        del tensor
else:
    ckpt.load_into(by_name, **options)
sizes = [t.nbytes for t in meta.values()]
print(json.dumps({"took": held_bytes("VmHWM") - before, "largest": max(sizes), "all": sum(sizes)}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are reset and read in /proc")
@pytest.mark.parametrize("how", ["plain", "cast", "lazy"])
def test_memory_stays_inside_the_bound(tmp_path: Path, how: str) -> None:
    """A sparse model of 450 MB, of which a rank holds half; the parameters are there before."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 3, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 64, "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    sw.synth(tmp_path / "config.json", tmp_path / "src", sparse=True)
    tiny_llama(tmp_path / "src-tiny")
    # Left to itself, glibc keeps what large tensors leave behind, up to 64 MiB of it.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
    command = [sys.executable, "-c", CHILD, str(tmp_path / "src"), how, "32MiB"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["all"] > 200 << 20
    assert found["took"] <= (32 << 20) + (found["largest"] if how == "lazy" else 0), found
