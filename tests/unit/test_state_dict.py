"""One state dict for any checkpoint: equal, to the bit, to what a conversion writes for that rank, and no byte read twice.

Sources are made with `synth` and `convert`; what convert writes is read by safetensors and `torch.load`, not by us.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import shardwright as sw
from shardwright import Layout, errors
from shardwright.executors import system
from shardwright.loading import StateDict
from shardwright.planner.passes.check import check_filling
from shardwright.planner.passes.holding import hold
from shardwright.planner.request import Request
from shardwright.planner.tables import DIALECTS
from tests.unit.configs import CONFIGS

Tensors = Mapping[str, torch.Tensor]


class Made(NamedTuple):
    """A source: a family's tiny model, and what it is converted to first (or not at all)."""

    family: str
    to: str | None = None
    layout: Layout = Layout()
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"{self.family}-{self.to or 'made'}" + "".join(
            f"-{axis}{n}" for axis, n in self.layout.to_json().items() if n not in (None, 1)
        )


class Way(NamedTuple):
    """A target."""

    to: str
    layout: Layout = Layout()
    options: tuple[tuple[str, Any], ...] = ()
    dtype: str | None = None

    def __str__(self) -> str:
        axes = "".join(f"-{axis}{n}" for axis, n in self.layout.to_json().items() if n not in (None, 1))
        return f"{self.to}{axes}" + "".join(f"-{value}" for _, value in self.options) + (f"-{self.dtype}" if self.dtype else "")


PAD = ("pad_vocab_to", 4)
MEGATRON = ("dialect", "megatron")
DENSE = (
    Made("llama"),
    Made("qwen2"),
    Made("llama", "ranks", Layout(tp=2, pp=2), (PAD,)),
    Made("llama", "ranks", Layout(tp=4), (PAD, MEGATRON, ("container", "zarr"))),
    Made("qwen2", "megatron-legacy", Layout(tp=4, pp=2), (PAD,)),
    Made("llama", "megatron-legacy", Layout(pp=2, vpp=2), (("spec", "local"),)),
    Made("gpt_neox", "megatron-legacy", Layout(tp=2), (PAD,)),
)
EXPERTS = (Made("deepseek_v3"), Made("qwen3_moe", "megatron-legacy", Layout(tp=2, ep=2, pp=2), (PAD,)))
DENSE_WAYS = (
    Way("huggingface", dtype="bfloat16"),
    Way("ranks", Layout(tp=2, pp=2), (PAD,)),
    Way("ranks", Layout(tp=8), (("pad_vocab_to", 8), MEGATRON), "float16"),
    Way("megatron-legacy", Layout(pp=3, stages=(1, 2, 1)), dtype="bfloat16"),
    Way("megatron-legacy", Layout(tp=2, pp=2, vpp=2), (PAD,)),
)
EXPERT_WAYS = (
    Way("huggingface", dtype="bfloat16"),
    Way("ranks", Layout(tp=2, ep=3), (PAD,), "bfloat16"),
    Way("megatron-legacy", Layout(tp=2, pp=2, ep=2), (PAD,), "float16"),
)
GRID = [(made, way) for made in DENSE for way in DENSE_WAYS] + [(made, way) for made in EXPERTS for way in EXPERT_WAYS]


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests look at bytes, not at what survives a power cut."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Made], Path]:
    """A source, made once."""
    folders: dict[Made, Path] = {}

    def of(made: Made) -> Path:
        if made not in folders:
            folder = folders[made] = tmp_path_factory.mktemp(made.family) / "made"
            if made.to is None:
                config = CONFIGS[made.family] | ({"quantization_config": {"quant_method": "mxfp4"}} if made.family == "gpt_oss" else {})
                (folder.parent / "config.json").write_text(json.dumps(config))
                sw.synth(folder.parent / "config.json", folder, max_shard_size=200_000)
            else:
                sw.convert(of(Made(made.family)), folder, to=made.to, layout=made.layout, **dict(made.options))
        return folders[made]

    return of


def written(out: Path, to: str, layout: Layout) -> Iterator[Tensors]:
    """What each rank's file holds, rank by rank."""
    if to == "huggingface":
        yield {name: tensor for path in sorted(out.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    elif to == "ranks":
        yield from (load_file(path) for path in sorted(out.glob("rank_*.safetensors")))
    else:
        for rank in range(layout.ranks):
            at = layout.coordinates(rank)
            name = f"mp_rank_{at['tp']:02d}" + (f"_{at['pp']:03d}" if layout.pp > 1 else "") + (f"_{at['ep']:03d}" if layout.ep > 1 else "")
            saved = torch.load(out / "release" / name / "model_optim_rng.pt", weights_only=False)
            if layout.vpp == 1:
                yield saved["model"]
            else:
                yield {f"model{v}.{key}": tensor for v in range(layout.vpp) for key, tensor in saved[f"model{v}"].items()}


def same(found: Tensors, expected: Tensors) -> None:
    assert list(found) == list(expected) or set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize(("made", "way"), GRID, ids=str)
def test_equals_what_convert_writes(made: Made, way: Way, source: Callable[[Made], Path], tmp_path: Path) -> None:
    home, options = source(made), {**dict(way.options), "to": way.to, "layout": way.layout, "dtype": way.dtype}
    sw.convert(home, tmp_path / "out", **options)
    ckpt = sw.open(home)
    together = ckpt.state_dicts(**options)
    ranks = list(written(tmp_path / "out", way.to, way.layout))
    assert len(ranks) == way.layout.ranks == len(together)
    rank, expected = 0, ranks[0]
    for rank, expected in enumerate(ranks):
        same(together[rank], expected)
        same(ckpt.state_dict(rank=rank, lazy=False, **options), expected)
    same(ckpt.state_dict(rank=rank, **options), expected)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_norms_stored_in_the_other_way(source: Callable[[Made], Path], tmp_path: Path, dtype: str | None) -> None:
    """Where convert adds 1 to the stored values, so does a load, with the one rounding."""
    sw.convert(source(Made("gemma")), tmp_path / "m", to="megatron-legacy", layout=Layout(tp=2), dtype="bfloat16")
    for path in (tmp_path / "m").glob("release/*/model_optim_rng.pt"):
        state = torch.load(path, weights_only=False)
        state["args"].apply_layernorm_1p = False
        torch.save(state, path)
    sw.convert(tmp_path / "m", tmp_path / "out", to="huggingface", dtype=dtype)
    (expected,) = written(tmp_path / "out", "huggingface", Layout())
    ckpt = sw.open(tmp_path / "m")
    assert ckpt.source.norm_shift
    for lazy in (True, False):
        same(ckpt.state_dict(to="huggingface", dtype=dtype, lazy=lazy), expected)
    same(ckpt.state_dict(dtype=dtype, lazy=False), expected)


class Reads:
    """What goes through `preadv`, as (file, offset) → bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[int, int, int]] = []
        self._lock = threading.Lock()
        real = system.preadv

        def counting(fd: int, buffers: Any, offset: int) -> int:
            got = real(fd, buffers, offset)
            with self._lock:
                self.calls.append((os.fstat(fd).st_ino, offset, got))
            return got

        monkeypatch.setattr(system, "preadv", counting)

    @property
    def nbytes(self) -> int:
        return sum(got for _, _, got in self.calls)

    def overlap(self) -> bool:
        """Whether any byte was read twice."""
        calls = sorted(self.calls)
        return any(a[0] == b[0] and a[1] + a[2] > b[1] for a, b in pairwise(calls))


ALL_RANKS = [
    (Made("llama"), Way("megatron-legacy", Layout(tp=4, pp=2), (PAD,))),
    (Made("llama"), Way("ranks", Layout(tp=8), (("pad_vocab_to", 8),))),
    (Made("llama", "ranks", Layout(tp=2, pp=2), (PAD,)), Way("megatron-legacy", Layout(tp=4), (PAD,))),
    (Made("qwen2", "megatron-legacy", Layout(tp=4, pp=2), (PAD,)), Way("ranks", Layout(tp=2), (PAD,))),
    (Made("gpt_neox", "megatron-legacy", Layout(tp=2), (PAD,)), Way("ranks", Layout(tp=4), (PAD,))),
    (Made("qwen3_moe", "megatron-legacy", Layout(tp=2, ep=2, pp=2), (PAD,)), Way("ranks", Layout(tp=4, ep=3), (PAD,))),
]


@pytest.mark.parametrize(("made", "way"), ALL_RANKS, ids=str)
def test_all_ranks_together_read_each_byte_once(
    made: Made, way: Way, source: Callable[[Made], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused, transposed, replicated or not: with copies compared every stored byte, without them every byte of one copy."""
    ckpt = sw.open(source(made))
    options = {**dict(way.options), "to": way.to, "layout": way.layout}
    stored = sum(tensor.nbytes for tensor in ckpt.stored.values())
    hub = sum(tensor.nbytes for tensor in ckpt.values())
    padding = (ckpt.source.padded_vocab or 0) and 4 * 64 * (ckpt.source.padded_vocab - ckpt.config["vocab_size"])
    reads = Reads(monkeypatch)
    ckpt.state_dicts(**options)
    assert not reads.overlap()
    assert stored - 4 * padding <= reads.nbytes <= stored
    reads.calls.clear()
    ckpt.state_dicts(trust_replicas=True, **options)
    assert not reads.overlap()
    assert reads.nbytes == hub


def test_one_rank_reads_what_it_needs(source: Callable[[Made], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are read alone; of columns, the short gaps between them too, which costs less than another call."""
    ckpt, layout = sw.open(source(Made("llama"))), Layout(tp=4, pp=2)
    options: dict[str, Any] = {"to": "megatron-legacy", "layout": layout, "pad_vocab_to": 4}
    reads = Reads(monkeypatch)
    rows = ("*linear_qkv*", "*linear_fc1*", "embedding.*")
    held = ckpt.state_dict(rank=2, include=rows, lazy=False, **options)
    padded = 64 * 4 * 0  # rank 2 has no padding rows
    assert reads.nbytes == sum(t.nbytes for t in held.values()) - padded
    reads.calls.clear()
    held = ckpt.state_dict(rank=2, lazy=False, **options)
    assert sum(t.nbytes for t in held.values()) <= reads.nbytes <= sum(t.nbytes for t in ckpt.values()) // 2
    # Two ranks that are no neighbours leave out what lies between.
    reads.calls.clear()
    held_by = ckpt.state_dicts([0, 3], include=rows, **options)
    alone = sum(t.nbytes for rank in held_by.values() for name, t in rank.items() if "layer_norm" not in name and "bias" not in name)
    assert alone <= reads.nbytes < alone * 1.1


@pytest.mark.parametrize("ranks", [[0], [3], [1, 2], [0, 3], [0, 2, 5], list(range(8))], ids=str)
@pytest.mark.parametrize("made", [Made("llama"), Made("gpt_neox", "megatron-legacy", Layout(tp=2), (PAD,)), Made("qwen3_moe")], ids=str)
def test_the_plan_is_proven_for_any_ranks_and_names(made: Made, ranks: list[int], source: Callable[[Made], Path]) -> None:
    home = sw.open(source(made)).source
    for dialect in ("megatron", "huggingface"):
        request = Request("ranks", Layout(tp=4, pp=2), dialect=dialect, pad_vocab_to=4)
        holding = hold(home, request, ranks)
        assert {held.rank for held in holding.held} == set(ranks)
        for numbers in (None, range(0, len(holding.held), 3), [0]):
            plan = holding.plan(numbers)
            check_filling(plan)
            written = int(plan.tiles.bytes_written.sum())
            assert written == sum(holding.held[n].nbytes for n in (range(len(holding.held)) if numbers is None else numbers))


class TestMapping:
    def test_is_lazy(self, source: Callable[[Made], Path], monkeypatch: pytest.MonkeyPatch) -> None:
        ckpt = sw.open(source(Made("llama")))
        reads = Reads(monkeypatch)
        found = ckpt.state_dict(to="megatron-legacy", layout=Layout(tp=2), rank={"tp": 1}, dtype="bf16", pad_vocab_to=4)
        assert isinstance(found, StateDict) and len(found) == len(list(found)) and "nothing" not in found
        name = "decoder.layers.1.mlp.linear_fc2.weight"
        assert name in found and found.meta[name].is_meta
        assert (found.meta[name].shape, found.meta[name].dtype) == ((64, 32), torch.bfloat16)
        assert "rank 1" in repr(found) and not reads.calls
        tensor = found[name]
        assert found.meta[name].shape == tensor.shape and tensor.is_contiguous() and not tensor.requires_grad
        assert 0 < reads.nbytes <= 64 * 64 * 4
        with pytest.raises(KeyError, match="nothing"):
            found["nothing"]
        with pytest.raises(TypeError):
            found[name] = tensor  # type: ignore[index]

    def test_a_tensor_in_hand_is_not_read_again(self, source: Callable[[Made], Path], monkeypatch: pytest.MonkeyPatch) -> None:
        found = sw.open(source(Made("llama"))).state_dict()
        reads = Reads(monkeypatch)
        tensor = found["model.norm.weight"]
        first = len(reads.calls)
        assert found["model.norm.weight"] is tensor and len(reads.calls) == first
        del tensor
        gc.collect()
        assert found["model.norm.weight"].shape == (64,) and len(reads.calls) == 2 * first

    def test_modules_take_it(self, source: Callable[[Made], Path]) -> None:
        found = sw.open(source(Made("llama"))).state_dict(include="model.norm.weight")
        norm = torch.nn.Module()
        norm.register_module("model", torch.nn.Module())
        norm.model.register_module("norm", torch.nn.Linear(64, 1, bias=False))
        norm.model.norm.weight = torch.nn.Parameter(torch.zeros(64))
        assert norm.load_state_dict(found).missing_keys == []
        assert torch.equal(norm.model.norm.weight, found["model.norm.weight"])

    def test_tied_names_of_two_ranks_are_two_tensors(self, source: Callable[[Made], Path]) -> None:
        found = sw.open(source(Made("qwen2"))).state_dicts(to="megatron-legacy", layout=Layout(pp=2))
        one, two = found[0]["embedding.word_embeddings.weight"], found[1]["output_layer.weight"]
        assert torch.equal(one, two) and one.data_ptr() != two.data_ptr()

    def test_tied_names_of_one_rank_are_one_tensor(
        self, source: Callable[[Made], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A dialect that holds the head beside the embedding it is tied to, as a model's own state dict does."""
        text = (Path(sw.__file__).parent / "planner/dialects/megatron.toml").read_text()
        text = text.replace('name = "megatron"', 'name = "both"', 1).replace('when = "not tie_word_embeddings or pp > 1"\n', "")
        (tmp_path / "both.toml").write_text(text)
        monkeypatch.setattr(DIALECTS, "_parts", dict(DIALECTS._parts))
        sw.register(dialect=tmp_path / "both.toml")
        options: dict[str, Any] = {"to": "ranks", "dialect": "both", "layout": Layout(tp=2), "rank": 1}
        reads = Reads(monkeypatch)
        eager = sw.open(source(Made("qwen2"))).state_dict(lazy=False, **options)
        assert not reads.overlap()
        lazy = sw.open(source(Made("qwen2"))).state_dict(**options)
        for found in (eager, dict(lazy)):
            one, two = found["embedding.word_embeddings.weight"], found["output_layer.weight"]
            assert one is two and one.shape == (128, 64)
        same(eager, lazy)

    def test_meta_reads_nothing(self, source: Callable[[Made], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        home = source(Made("llama"))
        reads = Reads(monkeypatch)
        options: dict[str, Any] = {"to": "ranks", "layout": Layout(tp=2), "pad_vocab_to": 4, "device": "meta"}
        for paper in (home, home / "config.json"):
            lazy, eager = sw.open(paper).state_dict(**options), sw.open(paper).state_dict(lazy=False, **options)
            assert all(t.is_meta for t in eager.values()) and eager.keys() == lazy.keys()
        assert not reads.calls

    def test_what_the_family_keeps_is_not_cast(self, source: Callable[[Made], Path]) -> None:
        found = sw.open(source(Made("deepseek_v3"))).state_dict(dtype="float16")
        kinds = {name: tensor.dtype for name, tensor in found.meta.items()}
        assert {kinds[name] for name in kinds if name.endswith("e_score_correction_bias")} == {torch.float32}
        assert kinds["model.norm.weight"] == torch.float16

    def test_what_is_no_float_is_not_cast(self, source: Callable[[Made], Path]) -> None:
        ckpt = sw.open(source(Made("gpt_oss")))
        before, after = ckpt.state_dict(lazy=False), ckpt.state_dict(dtype="float16", lazy=False)
        packed = [name for name, tensor in before.items() if tensor.dtype == torch.uint8]
        assert packed and len(packed) < len(before)
        same({name: after[name] for name in packed}, {name: before[name] for name in packed})
        assert {after[name].dtype for name in after if name not in packed} == {torch.float16}


class TestRefusals:
    @pytest.mark.parametrize(
        ("call", "what"),
        [
            ({"rank": 2}, "no such rank; expected 0 … 1, actual 2"),
            ({"rank": {"tp": 2}}, "no such tp rank; expected 0 … 1, actual 2"),
            ({"rank": {"dp": 0}}, "no coordinate 'dp'; expected tp, pp, ep"),
            ({"rank": "1"}, "a rank is a number, or coordinates; expected 3, or dict.*actual '1'"),
            ({"rank": True}, "a rank is a number"),
            ({"include": ["*.q_prj.*"]}, r"no tensor has a name like that; actual \*.q_prj.\*. Nearest name: model.layers.*"),
            ({"include": ["model.norm.*", "nothing"]}, "actual nothing"),
            ({"device": "gpu"}, "no such device"),
            ({"device": "xpu:7"}, "no such device.*actual xpu:7"),
            ({"to": None}, "hub tensors are not split"),
            ({"to": "rank"}, "rank"),
            ({"workers": 0}, "workers must be at least 1"),
            ({"memory": "lots"}, "lots"),
            ({"lazy": True, "together": sw.Together("/tmp", 0, [[0]])}, "Give lazy=False"),
            ({"lazy": False, "together": sw.Together("/tmp", 0, [[1], [0]])}, r"not what it said it would; expected \[0\]"),
        ],
    )
    def test_usage(self, call: dict[str, Any], what: str, source: Callable[[Made], Path]) -> None:
        ckpt = sw.open(source(Made("llama")))
        with pytest.raises(errors.UsageError, match=what):
            ckpt.state_dict(**{"to": "ranks", "layout": Layout(tp=2), "pad_vocab_to": 4, **call})

    def test_a_config_has_no_values(self, source: Callable[[Made], Path]) -> None:
        paper = sw.open(source(Made("llama")) / "config.json")
        all_ranks = partial(paper.state_dicts, to="ranks", layout=Layout())
        for call in (paper.state_dict, partial(paper.load_into, torch.nn.Linear(1, 1)), all_ranks):
            with pytest.raises(errors.UnsupportedError, match=r"shapes and no values.*Download the checkpoint"):
                call()

    def test_a_quantised_source(self, source: Callable[[Made], Path], tmp_path: Path) -> None:
        sw.convert(source(Made("llama")), tmp_path / "q", to="huggingface", quantize="int8")
        with pytest.raises(errors.UnsupportedError, match=r"quantised checkpoint.*actual int8.*Load the original weights"):
            sw.open(tmp_path / "q").state_dict()

    def test_a_bound_that_is_too_small(self, source: Callable[[Made], Path]) -> None:
        with pytest.raises(errors.MemoryBoundError, match="too small for one worker; expected") as caught:
            sw.open(source(Made("llama"))).state_dict(lazy=False, memory=1000)
        needed = caught.value.expected
        assert isinstance(needed, int) and sw.open(source(Made("llama"))).state_dict(lazy=False, memory=needed, workers=4)

    def test_copies_that_differ(self, source: Callable[[Made], Path], tmp_path: Path) -> None:
        sw.convert(source(Made("llama")), tmp_path / "r", to="ranks", layout=Layout(tp=2), pad_vocab_to=4)
        path = next((tmp_path / "r").glob("rank_00001_*.safetensors"))
        held = load_file(path)
        held["model.norm.weight"][3] += 1
        save_file(held, path, {"format": "pt"})
        ckpt = sw.open(tmp_path / "r")
        with pytest.raises(errors.ReplicaMismatchError, match=r"element \(3,\).*model.norm.weight.*trust_replicas=True"):
            ckpt.state_dict(lazy=False)
        with pytest.raises(errors.ReplicaMismatchError):
            ckpt.state_dict()["model.norm.weight"]
        assert ckpt.state_dict()["lm_head.weight"].shape == (131, 64)
        assert ckpt.state_dict(lazy=False, trust_replicas=True)["model.norm.weight"][3] + 1 == held["model.norm.weight"][3]

    def test_what_no_rule_names(self, source: Callable[[Made], Path], tmp_path: Path) -> None:
        shutil.copytree(source(Made("llama")), tmp_path / "more")
        path = tmp_path / "more/model.safetensors.index.json"
        index = json.loads(path.read_text())
        save_file({"extra.scale": torch.ones(2)}, tmp_path / "more/extra.safetensors", {"format": "pt"})
        path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], "extra.scale": "extra.safetensors"}}))
        ckpt = sw.open(tmp_path / "more")
        with pytest.raises(errors.UnknownTensorError, match=r"extra.scale"):
            ckpt.state_dict()
        same(ckpt.state_dict(drop=["extra.*"]), sw.open(source(Made("llama"))).state_dict(lazy=False))

    def test_a_source_that_is_gone(self, source: Callable[[Made], Path], tmp_path: Path) -> None:
        """Only the files that are read are looked for."""
        sw.convert(source(Made("llama")), tmp_path / "r", to="ranks", layout=Layout(pp=2))
        found = sw.open(tmp_path / "r").state_dict()
        next((tmp_path / "r").glob("rank_00001_*.safetensors")).unlink()
        assert found["model.embed_tokens.weight"].shape == (131, 64)
        with pytest.raises(errors.PlanError, match=r"cannot be found.*rank_00001_tp0_pp1.safetensors"):
            found["lm_head.weight"]

    def test_a_source_that_changed(self, source: Callable[[Made], Path], tmp_path: Path) -> None:
        sw.convert(source(Made("llama")), tmp_path / "r", to="huggingface")
        found = sw.open(tmp_path / "r").state_dict()
        assert found["model.norm.weight"].shape == (64,)
        os.utime(tmp_path / "r/model.safetensors", (1, 1))
        with pytest.raises(errors.PlanError, match="has changed since it was planned"):
            found["lm_head.weight"]
