"""``--quantize int8``: our bytes are compressed-tensors' own, and transformers loads and runs them.

The oracle is the library's whole path: its config parsed from our config.json, applied to a transformers model, its scales
from `calculate_qparams`, its `ModelCompressor` on the model.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

import shardwright as sw
from shardwright import Layout
from tests.clients import hf_models
from tests.clients.hf_logits import logits
from tests.clients.judge import MEMORY, assert_same_bits, distance

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.clients("transformers", "compressed_tensors")

DTYPES = ("float32", "bfloat16", "float16")
EXACT = 1e-6
"""Room for sums in another order; the weights are equal."""


def _edged(folder: Path, out: Path) -> Path:
    """A copy of a checkpoint with rows of zeros, rows that are huge, tiny and subnormal, and ties between two integers."""
    from safetensors.torch import save_file

    shutil.copytree(folder, out)
    for file in out.glob("*.safetensors*"):
        file.unlink()
    tensors = hf_models.tensors(folder)
    weight = tensors["model.layers.0.self_attn.q_proj.weight"]
    weight[0] = 0
    weight[1] = torch.finfo(weight.dtype).tiny
    weight[2] = torch.finfo(weight.dtype).smallest_normal / 4
    weight[3] = torch.arange(weight.shape[1]) - 0.5
    weight[3, 0] = 127.5
    weight[4, 5] = -60000.0
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def _compressed(folder: Path, quantization: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The state dict that compressed-tensors makes of a checkpoint."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    apply_quantization_config(model, QuantizationConfig.model_validate({**quantization, "quantization_status": "frozen"}))
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            weight = module.weight.detach()
            scale, _ = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), module.quantization_scheme.weights)
            assert scale.shape == module.weight_scale.shape
            module.weight_scale.data = scale
    ModelCompressor.from_pretrained_model(model, quantization_format="int-quantized").compress_model(model)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["llama", "llama_tied", "qwen2", "qwen3"])
def test_bytes_are_the_librarys_own(case: str, dtype: str, hf_case: Callable[..., Path], tmp_path: Path) -> None:
    source, out = _edged(hf_case(case, dtype=dtype), tmp_path / "source"), tmp_path / "out"
    sw.convert(source, out, to="huggingface", quantize="int8", memory=MEMORY)
    config = hf_models.config(out)
    assert_same_bits(hf_models.tensors(out), _compressed(source, config["quantization_config"]))
    assert {k: v for k, v in config.items() if k != "quantization_config"} == hf_models.config(source)
    assert sw.verify(out, source, memory=MEMORY).ok


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2_tied", "qwen3"])
def test_transformers_runs_it(case: str, dtype: str, hf_case: Callable[..., Path], tmp_path: Path) -> None:
    source, out, plain = hf_case(case, dtype=dtype), tmp_path / "out", tmp_path / "plain"
    sw.convert(source, out, to="huggingface", quantize="int8", max_shard_size=100_000, memory=MEMORY)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    found = logits(out)
    assert distance(found, logits(_dequantised(out, plain))) < EXACT
    assert 0 < distance(found, logits(source)) < 0.2


def _dequantised(folder: Path, out: Path) -> Path:
    """The same checkpoint in float32, each payload times its scale."""
    import json

    from safetensors.torch import save_file

    tensors = hf_models.tensors(folder)
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("_scale")}
    plain = {
        name: tensor.float() * scales[f"{name}_scale"].float() if f"{name}_scale" in scales else tensor for name, tensor in tensors.items()
    }
    out.mkdir()
    config = {k: v for k, v in hf_models.config(folder).items() if k != "quantization_config"}
    (out / "config.json").write_text(json.dumps(config))
    save_file(plain, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_from_megatron_ranks_it_is_the_same(hf_case: Callable[..., Path], tmp_path: Path) -> None:
    source = hf_case("llama", dtype="bfloat16")
    sw.convert(source, tmp_path / "there", to="megatron-legacy", layout=Layout(tp=4, pp=2), memory=MEMORY)
    for start, name in ((source, "straight"), (tmp_path / "there", "by_way_of_megatron")):
        sw.convert(start, tmp_path / name, to="huggingface", quantize="int8", memory=MEMORY)
    assert_same_bits(hf_models.tensors(tmp_path / "by_way_of_megatron"), hf_models.tensors(tmp_path / "straight"))
    assert sw.verify(tmp_path / "by_way_of_megatron", source, memory=MEMORY).ok


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["llama", "llama_mqa", "qwen2"])
def test_ranks(case: str, dtype: str, hf_case: Callable[..., Path], tmp_path: Path) -> None:
    """Row-parallel scales belong to whole rows, so every rank holds them all; column-parallel scales are cut with the rows."""
    source, layout = hf_case(case, dtype=dtype), Layout(tp=2, pp=2)
    sw.convert(source, tmp_path / "whole", to="huggingface", quantize="int8", memory=MEMORY)
    sw.convert(source, tmp_path / "ranks", to="ranks", layout=layout, quantize="int8", pad_vocab_to=2, memory=MEMORY)
    whole = hf_models.tensors(tmp_path / "whole")
    replicated = ("k_proj", "v_proj") if case == "llama_mqa" else ()
    for file in sorted((tmp_path / "ranks").glob("rank_*.safetensors")):
        tp = int(file.name.split("_tp")[1][0])
        held = {name: tensor for name, tensor in _read(file).items() if "_proj.weight" in name}
        assert_same_bits(held, {name: _part(name, whole[name], tp, replicated) for name in held})
    assert sum(len(_read(file)) for file in (tmp_path / "ranks").glob("rank_*_tp0_*")) == len(whole)
    assert sw.verify(tmp_path / "ranks", source, memory=MEMORY).ok


def _read(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def _part(name: str, whole: torch.Tensor, tp: int, replicated: tuple[str, ...]) -> torch.Tensor:
    """What tensor-parallel rank `tp` of 2 holds of a linear weight or of its scale."""
    module = name.split(".")[-2]
    if module in replicated:
        return whole
    if module in ("o_proj", "down_proj"):
        return whole if name.endswith("_scale") else whole.chunk(2, 1)[tp]
    return whole.chunk(2)[tp]


@pytest.mark.parametrize("suffix", ["weight", "weight_scale"])
def test_verify_sees_a_flipped_byte(suffix: str, hf_case: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source, out = hf_case("llama", dtype="bfloat16"), tmp_path / "out"
    sw.convert(source, out, to="huggingface", quantize="int8", memory=MEMORY)
    file = out / "model.safetensors"
    tensors = _read(file)
    name = f"model.layers.7.mlp.up_proj.{suffix}"
    tensors[name].view(torch.uint8).flatten()[-1] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    found = sw.verify(out, source, memory=MEMORY)
    assert not found.ok
    assert name in found.different[0]
