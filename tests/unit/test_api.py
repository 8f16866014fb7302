"""The Python surface: checkpoints as mappings, tensors that read only what is asked for, state dicts of any layout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import shardwright as sw
from shardwright import errors
from shardwright.api import parse_size
from shardwright.executors import system
from tests.unit.tiny import tiny_llama

Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("api") / "src")


@pytest.fixture(scope="module")
def arrays(src: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(src.glob("*.safetensors")) for name, t in load_file(path).items()}


class TestCheckpoint:
    def test_is_a_mapping(self, src: Path, arrays: dict[str, torch.Tensor]) -> None:
        ckpt = sw.open(src)
        assert set(ckpt) == set(arrays)
        assert len(ckpt) == len(arrays)
        assert Q0 in ckpt
        assert "nothing" not in ckpt
        with pytest.raises(KeyError, match="nothing"):
            ckpt["nothing"]
        assert all(torch.equal(tensor.torch(), arrays[name]) for name, tensor in ckpt.items())

    def test_says_what_it_is(self, src: Path, arrays: dict[str, torch.Tensor]) -> None:
        ckpt = sw.open(str(src))
        assert (ckpt.path, ckpt.format, ckpt.family, ckpt.layout) == (str(src), "huggingface", "llama", sw.Layout())
        assert ckpt.config["hidden_size"] == 64
        assert ckpt.nbytes == sum(a.nbytes for a in arrays.values())
        assert "llama" in repr(ckpt) and str(src) in repr(ckpt)
        with pytest.raises(errors.ConfigError, match="colour"):
            ckpt.config["colour"]

    def test_config_and_family_can_be_given(self, src: Path, tmp_path: Path) -> None:
        raw = {"model_type": "mistral", **{k: sw.open(src).config[k] for k in ("hidden_size", "intermediate_size", "vocab_size")}}
        raw |= {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
        assert sw.open(src, config=raw).family == "mistral"
        assert sw.open(src, config=raw, family="llama").family == "llama"

    def test_single_file(self, tmp_path: Path) -> None:
        folder = tiny_llama(tmp_path / "one", layers=1, shards=1)
        config = sw.open(folder).source.raw_config
        ckpt = sw.open(folder / "model.safetensors", config=config)
        assert ckpt[Q0].numpy().shape == (64, 64)

    def test_index_and_manifest(self, src: Path, tmp_path: Path) -> None:
        assert sw.open(src / "model.safetensors.index.json")[Q0].shape == (64, 64)
        sw.convert(src, tmp_path / "out", to="ranks", layout=sw.Layout(pp=2))
        ckpt = sw.open(tmp_path / "out/shardwright.json")
        assert (ckpt.format, ckpt.layout.pp) == ("ranks", 2)

    def test_stored_has_the_files_own_names(self, src: Path, tmp_path: Path, arrays: dict[str, torch.Tensor]) -> None:
        assert set(sw.open(src).stored) == set(arrays)
        sw.convert(src, tmp_path / "m", to="megatron-legacy", layout=sw.Layout(tp=2, pp=2, vpp=2))
        stored = sw.open(tmp_path / "m").stored
        found = torch.load(tmp_path / "m/release/mp_rank_01_001/model_optim_rng.pt", weights_only=False)
        for key in ("model0", "model1"):
            for name, tensor in found[key].items():
                assert torch.equal(stored[f"{key}.{name}@3" if key != "model0" else f"{name}@3"].torch(), tensor)


class TestTensor:
    @pytest.mark.parametrize(
        "cut",
        [
            lambda t: t[...], lambda t: t[3], lambda t: t[-1], lambda t: t[3, 5], lambda t: t[:16], lambda t: t[..., 7],
            lambda t: t[5, ...], lambda t: t[::3], lambda t: t[::-1], lambda t: t[10:2:-3], lambda t: t[:, ::-2],
            lambda t: t[1:-1, 2:60:7], lambda t: t[4:4],
            lambda t: t[100:], lambda t: t[-5:][1:3][:, 3], lambda t: t[:, :4], lambda t: t[::-1][::-1], lambda t: t[2:9][::-1, ::2][1],
        ],
    )  # fmt: skip
    def test_slices_like_numpy(self, src: Path, arrays: dict[str, torch.Tensor], cut: Callable[[Any], Any]) -> None:
        expected = cut(arrays[Q0].numpy())
        found = cut(sw.open(src)[Q0])
        assert found.shape == expected.shape
        assert np.array_equal(found.numpy(), expected)
        assert torch.equal(found.torch(), torch.from_numpy(np.array(expected)))

    def test_slices_through_ranks(self, src: Path, arrays: dict[str, torch.Tensor], tmp_path: Path) -> None:
        sw.convert(src, tmp_path / "m", to="megatron-legacy", layout=sw.Layout(tp=4, pp=2))
        ckpt = sw.open(tmp_path / "m")
        for name, array in arrays.items():
            assert np.array_equal(ckpt[name][::-3, ...].numpy(), array.numpy()[::-3]), name

    def test_reshape_and_permute(self, src: Path, arrays: dict[str, torch.Tensor]) -> None:
        expected = arrays[Q0].numpy().reshape(8, 8, 64).transpose(2, 0, 1)[::5, 1]
        assert np.array_equal(sw.open(src)[Q0].reshape(8, 8, 64).permute(2, 0, 1)[::5, 1].numpy(), expected)

    @pytest.mark.parametrize("key", [64, -65, (0, 64), (0, 0, 0)])
    def test_outside(self, src: Path, key: Any) -> None:
        with pytest.raises(IndexError):
            sw.open(src)[Q0][key]

    @pytest.mark.parametrize("key", [None, "a", 1.5, [1, 2], (..., ...)])
    def test_nonsense(self, src: Path, key: Any) -> None:
        with pytest.raises((TypeError, IndexError)):
            sw.open(src)[Q0][key]

    def test_is_no_sequence_to_walk(self, src: Path) -> None:
        rows = list(sw.open(src)["model.norm.weight"][:3])
        assert [row.shape for row in rows] == [()] * 3

    def test_facts(self, src: Path) -> None:
        tensor = sw.open(src)[Q0]
        assert (tensor.name, tensor.shape, tensor.dtype, tensor.nbytes) == (Q0, (64, 64), "float32", 64 * 64 * 4)
        assert Q0 in repr(tensor)
        assert tensor[:16].nbytes == 16 * 64 * 4

    def test_bfloat16(self, tmp_path: Path) -> None:
        folder = tiny_llama(tmp_path / "b", layers=1, dtype="bfloat16")
        tensor = sw.open(folder)[Q0][3:5]
        assert tensor.torch().dtype == torch.bfloat16
        assert tensor.numpy().dtype.name == "bfloat16"
        assert np.array_equal(tensor.numpy().view(np.int16), tensor.torch().view(torch.int16).numpy())

    def test_reads_just_those_bytes(self, src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tensor = sw.open(src)[Q0]
        read = 0
        real = system.preadv

        def counting(fd: int, buffers: Any, offset: int) -> int:
            nonlocal read
            got = real(fd, buffers, offset)
            read += got
            return got

        monkeypatch.setattr(system, "preadv", counting)
        for cut, nbytes in (
            (tensor[:16], 16 * 64 * 4),
            (tensor[7], 64 * 4),
            (tensor[3, 5], 4),
            (tensor[::-1][:2], 2 * 64 * 4),
            (tensor[4:4], 0),
        ):
            read = 0
            cut.numpy()
            assert read == nbytes

    def test_a_file_that_changed_shape_is_noticed(self, tmp_path: Path) -> None:
        folder = tiny_llama(tmp_path / "b", layers=1, shards=1)
        tensor = sw.open(folder)["model.norm.weight"]
        os.truncate(folder / "model.safetensors", 100)
        with pytest.raises(errors.RunError, match="shrank"):
            tensor.numpy()


LAYOUTS = [sw.Layout(), sw.Layout(tp=2), sw.Layout(tp=8, pp=2), sw.Layout(pp=3, stages=(1, 2, 1)), sw.Layout(tp=2, pp=2, vpp=2)]


class TestStateDict:
    def test_hub_names_by_default(self, src: Path, arrays: dict[str, torch.Tensor]) -> None:
        found = sw.open(src).state_dict()
        assert found.keys() == arrays.keys()
        assert all(torch.equal(found[k], arrays[k]) for k in found)

    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    @pytest.mark.parametrize("dialect", ["huggingface", "megatron"])
    def test_equals_what_convert_writes_for_ranks(self, tmp_path: Path, layout: sw.Layout, dialect: str) -> None:
        src = tiny_llama(tmp_path / "src", vocab=128)
        sw.convert(src, tmp_path / "r", to="ranks", layout=layout, dialect=dialect)
        ckpt = sw.open(src)
        files = sorted((tmp_path / "r").glob("rank_*"))
        assert len(files) == layout.ranks
        for rank, path in enumerate(files):
            same(ckpt.state_dict(to="ranks", layout=layout, rank=rank, dialect=dialect), load_file(path))
        last = layout.coordinates(layout.ranks - 1)
        by_name = ckpt.state_dict(to="ranks", layout=layout, rank={k: last[k] for k in ("tp", "pp")}, dialect=dialect)
        same(by_name, load_file(files[-1]))

    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    def test_equals_what_convert_writes_for_megatron(self, src: Path, tmp_path: Path, layout: sw.Layout) -> None:
        sw.convert(src, tmp_path / "m", to="megatron-legacy", layout=layout)
        ckpt = sw.open(src)
        for rank in range(layout.ranks):
            at = layout.coordinates(rank)
            folder = f"mp_rank_{at['tp']:02d}" + (f"_{at['pp']:03d}" if layout.pp > 1 else "")
            loaded = torch.load(tmp_path / "m/release" / folder / "model_optim_rng.pt", weights_only=False)
            if layout.vpp == 1:
                expected = loaded["model"]
            else:
                expected = {f"model{v}.{k}": t for v in range(layout.vpp) for k, t in loaded[f"model{v}"].items()}
            same(ckpt.state_dict(to="megatron-legacy", layout=layout, rank=rank), expected)

    def test_from_ranks(self, src: Path, tmp_path: Path) -> None:
        """Any layout to any layout, read straight from rank files."""
        sw.convert(src, tmp_path / "m", to="megatron-legacy", layout=sw.Layout(tp=4, pp=2))
        for layout in (sw.Layout(tp=2), sw.Layout(pp=2)):
            same(
                sw.open(tmp_path / "m").state_dict(to="megatron-legacy", layout=layout, rank=1),
                sw.open(src).state_dict(to="megatron-legacy", layout=layout, rank=1),
            )

    def test_dtype_device_include(self, src: Path, arrays: dict[str, torch.Tensor]) -> None:
        found = sw.open(src).state_dict(dtype="bf16", device="cpu", include=["*.q_proj.weight", "model.norm.*"])
        assert len(found) == 5
        assert torch.equal(found[Q0], arrays[Q0].to(torch.bfloat16))

    @pytest.mark.parametrize(
        ("call", "kind"),
        [
            ({"to": "nothing"}, errors.UsageError),
            ({"to": "ranks", "rank": 1}, errors.UsageError),
            ({"to": "ranks", "rank": -1}, errors.UsageError),
            ({"to": "ranks", "layout": sw.Layout(tp=2), "rank": {"tp": 2}}, errors.UsageError),
            ({"to": "ranks", "rank": {"tq": 0}}, errors.UsageError),
            ({"to": "ranks", "dialect": "nothing"}, errors.UsageError),
            ({"to": "huggingface", "layout": sw.Layout(tp=2)}, errors.UsageError),
            ({"to": "ranks", "layout": sw.Layout(tp=3)}, errors.LayoutError),
            ({"dtype": "float15"}, errors.UsageError),
            ({"dtype": "int8"}, errors.UsageError),
        ],
    )
    def test_refusals(self, src: Path, call: dict[str, Any], kind: type[Exception]) -> None:
        with pytest.raises(kind):
            sw.open(src).state_dict(**call)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


class TestConversion:
    def test_verify_says_what_differs(self, src: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        sw.convert(src, out, to="ranks")
        found = sw.verify(out, src)
        assert (found.level, found.ok, found.equal, found.tensors) == ("values", True, 39, 39)
        other = tiny_llama(tmp_path / "other", layers=3)
        found = sw.verify(out, other)
        assert (found.level, found.ok) == ("names", False)

    def test_finished_target_is_known(self, src: Path, tmp_path: Path) -> None:
        job = sw.plan(src, tmp_path / "out", to="ranks")
        assert not job.is_done()
        job.execute()
        assert sw.plan(src, tmp_path / "out", to="ranks").is_done()
        assert not sw.plan(src, tmp_path / "out", to="ranks", dtype="bf16").is_done()

    def test_a_plan_without_a_target(self, src: Path) -> None:
        with pytest.raises(errors.UsageError, match="no target"):
            sw.plan(src, to="ranks").execute()

    @pytest.mark.parametrize("call", [{"workers": 0}, {"memory": "lots"}, {"quantise": "int8"}, {"to": "rank"}])
    def test_usage(self, src: Path, call: dict[str, Any]) -> None:
        with pytest.raises(errors.UsageError):
            sw.plan(src, **{"to": "ranks", **call})

    def test_check_and_hash(self, src: Path) -> None:
        job = sw.plan(src, to="ranks")
        job.check()
        assert job.hash == sw.plan(src, "elsewhere", to="ranks").hash


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GiB", 8 << 30),
        ("5GB", 5 * 10**9),
        ("512 mib", 512 << 20),
        ("1.5KiB", 1536),
        ("17", 17),
        (17, 17),
        ("2TB", 2 * 10**12),
        ("9B", 9),
        ("0", 0),
    ],
)
def test_sizes(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "8XB", "-1GiB", "8 8", "1e400GB", "nan", "inf", "٣x", -1, True, None, [8]])
def test_no_sizes(text: Any) -> None:
    with pytest.raises(errors.UsageError):
        parse_size(text)


HEAVY = ["numpy", "torch", "dask", "rich", "click", "networkx", "zarr"]


@pytest.mark.parametrize("use", ["", "dir(shardwright); shardwright.__version__; shardwright.ShardwrightError"])
def test_importing_loads_nothing_heavy(use: str) -> None:
    code = f"import sys, shardwright; {use}\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names() -> None:
    for name in sw.__all__:
        assert getattr(sw, name) is not None
    assert dir(sw) == sorted(sw.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = sw.nothing


def test_no_submodule_hides_a_public_name() -> None:
    code = "import shardwright as sw, shardwright.cli, shardwright.demo; print([n for n in sw.__all__ if not callable(getattr(sw, n))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
