"""``model_optim_rng.pt`` as torch and ``unzip`` see it: mapped, without running any pickle code, every CRC right."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch

import shardwright as sw
from shardwright import Layout
from tests.clients.judge import MEMORY, assert_same_bits
from tests.clients.test_harness import reference

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.clients("transformers")

CASES = (("llama", "float32", Layout(tp=2, pp=2)), ("qwen2_tied", "bfloat16", Layout(tp=4)), ("qwen3", "bfloat16", Layout(pp=2, vpp=2)))


@pytest.fixture(params=CASES, ids=lambda case: case[0])
def made(request: pytest.FixtureRequest, hf_case: Callable[..., Path], tmp_path: Path) -> tuple[Path, dict[tuple[int, int], Any]]:
    """A converted checkpoint, and what its files should hold by (tp, pp)."""
    case, dtype, layout = request.param
    source = hf_case(case, dtype=dtype)
    sw.convert(source, tmp_path / "out", to="megatron-legacy", layout=layout, memory=MEMORY)
    return tmp_path / "out" / "release", reference(source, layout.tp, layout.pp, layout.vpp)


def _file(folder: Path, place: tuple[int, int], ranks: dict[tuple[int, int], Any]) -> Path:
    several = max(pp for _, pp in ranks) > 0
    return folder / (f"mp_rank_{place[0]:02d}" + (f"_{place[1]:03d}" if several else "")) / "model_optim_rng.pt"


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_weights_only(mmap: bool, made: tuple[Path, dict[tuple[int, int], Any]]) -> None:
    folder, ranks = made
    assert len(list(folder.glob("*/model_optim_rng.pt"))) == len(ranks)
    for place, content in ranks.items():
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(_file(folder, place, ranks), weights_only=True, mmap=mmap, map_location="cpu")
        assert saved["checkpoint_version"] == 3.0
        assert saved["args"].num_layers == content["args"].num_layers
        assert saved["args"].params_dtype == content["args"].params_dtype
        for key in (key for key in content if key.startswith("model")):
            assert_same_bits(dict(saved[key]), content[key])


def test_args_say_what_the_reference_says(made: tuple[Path, dict[tuple[int, int], Any]]) -> None:
    folder, ranks = made
    for place, content in ranks.items():
        args = vars(torch.load(_file(folder, place, ranks), weights_only=False)["args"])
        wanted = {k: v for k, v in vars(content["args"]).items() if k != "rope_scaling_factor"}
        assert {k: args.get(k, "absent") for k in wanted} == wanted


def test_mapped_tensors_are_aligned_and_apart(made: tuple[Path, dict[tuple[int, int], Any]]) -> None:
    """Storages of their own, 64 bytes aligned in the file, so that a mapped tensor can be used in place."""
    folder, ranks = made
    for place in ranks:
        file = _file(folder, place, ranks)
        saved = torch.load(file, weights_only=False, mmap=True)
        tensors = [t for key, model in saved.items() if key.startswith("model") for t in model.values()]
        assert all(t.is_contiguous() and t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors)
        starts = [t.untyped_storage().data_ptr() for t in tensors]
        assert len(set(starts)) == len(starts)
        assert {start % 64 for start in starts} == {0}


def test_archives_are_sound(made: tuple[Path, dict[tuple[int, int], Any]]) -> None:
    folder, ranks = made
    for place in ranks:
        file = _file(folder, place, ranks)
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None
        if unzip := shutil.which("unzip"):
            done = subprocess.run([unzip, "-t", str(file)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout[-500:] + done.stderr
            assert "No errors detected" in done.stdout


def test_a_saved_tensor_can_be_saved_again(made: tuple[Path, dict[tuple[int, int], Any]], tmp_path: Path) -> None:
    """What torch writes of our file converts to the same Hugging Face model."""
    folder, ranks = made
    sw.convert(folder.parent, tmp_path / "one", to="huggingface", memory=MEMORY)
    for place in ranks:
        file = _file(folder, place, ranks)
        torch.save(torch.load(file, weights_only=False), file)
    sw.convert(folder.parent, tmp_path / "two", to="huggingface", memory=MEMORY)
    from tests.clients import hf_models

    assert_same_bits(hf_models.tensors(tmp_path / "two"), hf_models.tensors(tmp_path / "one"))
