"""``ranks`` as zarr groups, read back by tensorstore, which shares no code with zarr-python or with us."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import shardwright as sw
from shardwright import Layout
from tests.clients import hf_models
from tests.clients.judge import MEMORY, assert_same_bits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.clients("transformers", "tensorstore")


def _read(folder: Path, name: str) -> torch.Tensor:
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / name)}}
    store = tensorstore.open(spec, read=True, open=True).result()
    found = np.ascontiguousarray(store.read().result())
    dtype = getattr(torch, store.dtype.name)
    return torch.from_numpy(found.reshape(-1).view(np.uint8).copy()).view(dtype).reshape(found.shape)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float32", {"dialect": "megatron"}),
        ("bfloat16", {"dialect": "megatron"}),
        ("float16", {"pad_vocab_to": 2}),
        ("bfloat16", {"pad_vocab_to": 2, "quantize": "int8"}),
    ],
    ids=str,
)
def test_tensorstore_reads_every_tensor(dtype: str, options: dict[str, object], hf_case: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source, layout = hf_case("qwen2", dtype=dtype), Layout(tp=2, pp=2)
    for container in ("zarr", "safetensors"):
        sw.convert(source, tmp_path / container, to="ranks", container=container, layout=layout, memory=MEMORY, **options)
    files = sorted((tmp_path / "safetensors").glob("rank_*.safetensors"))
    assert len(files) == 4
    for file in files:
        group = tmp_path / "zarr" / file.stem
        assert group.is_dir()
        wanted = load_file(file)
        assert_same_bits({name: _read(group, name) for name in wanted}, wanted)
    assert sw.verify(tmp_path / "zarr", source, memory=MEMORY).ok


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_back_from_zarr(dtype: str, hf_case: Callable[..., Path], tmp_path: Path) -> None:
    source = hf_case("llama_tied", dtype=dtype)
    sw.convert(source, tmp_path / "there", to="ranks", container="zarr", dialect="megatron", layout=Layout(tp=4), memory=MEMORY)
    sw.convert(tmp_path / "there", tmp_path / "back", to="huggingface", memory=MEMORY)
    assert_same_bits(hf_models.tensors(tmp_path / "back"), hf_models.tensors(source))
