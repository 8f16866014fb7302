"""Parts from outside the package: each one object or one table and one registration, and it converts, verifies and comes back.

What is registered here lives in this file alone; nothing inside the package knows of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import shardwright as sw
from shardwright import errors
from shardwright.cli import main
from shardwright.planner.containers import CONTAINERS
from shardwright.planner.containers.base import ContainerIndex, FileLayout, Placement, StoredTensor, TensorSpec, UnitLayout
from shardwright.planner.formats import FORMATS
from shardwright.planner.formats.base import Filing, Hints, Source, Target, Unit, companions
from shardwright.planner.formats.common import carried, missing_config, settle
from shardwright.planner.identity import read_identity
from shardwright.planner.layout import Layout
from shardwright.planner.operations import OPERATIONS
from shardwright.planner.schemes import SCHEMES, SchemeOutput
from shardwright.planner.store import Store
from shardwright.planner.tables import DIALECTS, FAMILIES
from shardwright.planner.tensor.dtypes import dtype
from shardwright.planner.tensor.lazy import LazyTensor, concat
from tests.unit.tiny import tiny_llama

REGISTRIES = (FORMATS, DIALECTS, FAMILIES, OPERATIONS, SCHEMES, CONTAINERS)
Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """Forget what a test registers."""
    before = [set(registry.names()) for registry in REGISTRIES]
    yield
    for registry, names in zip(REGISTRIES, before, strict=True):
        for name in set(registry.names()) - names:
            registry.remove(name)


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "src", vocab=128)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def round_trip(src: Path, root: Path, *, to: str, back: str = "huggingface", **options: Any) -> Path:
    """Convert, verify, convert back, verify, and compare every tensor; the target in between."""
    there, again = root / "there", root / "again"
    sw.convert(src, there, to=to, **options)
    assert sw.verify(there, src).ok
    assert sw.verify(there).ok
    sw.convert(there, again, to=back)
    assert sw.verify(again, src).ok
    assert sw.verify(again, there).ok
    expected, found = tensors_of(src), tensors_of(again)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    return there


def command(*args: object) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    assert not stop.value.code


# A container: a header line of JSON, then each tensor at a multiple of 512 bytes.


class Slabs:
    name = "slabs"
    suffix = ".slabs"

    def read(self, store: Store, path: str) -> ContainerIndex:
        size = int(store.read(path, 0, 16))
        header = store.read(path, 16, size)
        entries = json.loads(header)
        tensors = {n: StoredTensor(n, kind, tuple(shape), path, offset) for n, kind, shape, offset in entries}
        return ContainerIndex(tensors, header_digest=header.hex()[:64])

    def lay_out(
        self,
        path: str,
        tensors: Sequence[TensorSpec],
        *,
        objects: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> UnitLayout:
        assert objects is None
        assert metadata is None
        at, offsets = 1 << 16, []
        for spec in tensors:
            offsets.append(at)
            at += -(-dtype(spec.dtype).nbytes(int(np.prod(spec.shape, dtype=int))) // 512) * 512
        entries = [[t.name, t.dtype, t.shape, offset] for t, offset in zip(tensors, offsets, strict=True)]
        body = json.dumps(entries).encode()
        static = [(0, b"%16d" % len(body) + body + bytes((1 << 16) - 16 - len(body)))]
        for spec, offset, end in zip(tensors, offsets, [*offsets[1:], at], strict=True):
            used = dtype(spec.dtype).nbytes(int(np.prod(spec.shape, dtype=int)))
            if offset + used < end:
                static.append((offset + used, bytes(end - offset - used)))
        return UnitLayout((FileLayout(path, at, tuple(static)),), tuple(Placement(0, offset) for offset in offsets))


class TestContainer:
    @pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2)], ids=["one", "several"])
    @pytest.mark.parametrize("dialect", ["huggingface", "megatron"])
    def test_round_trip(self, src: Path, tmp_path: Path, layout: Layout, dialect: str) -> None:
        sw.register(container=Slabs())
        there = round_trip(src, tmp_path, to="ranks", container="slabs", layout=layout, dialect=dialect)
        assert (there / "rank_00000_tp0_pp0.slabs").is_file()
        assert sw.open(there).source.container == "slabs"

    def test_command(self, src: Path, tmp_path: Path) -> None:
        sw.register(container=Slabs())
        command("convert", src, tmp_path / "out", "--to", "ranks", "--container", "slabs", "--verify")
        command("inspect", tmp_path / "out")

    def test_is_unknown_without_registration(self, src: Path, tmp_path: Path) -> None:
        with pytest.raises(errors.UsageError, match="slabs"):
            sw.plan(src, to="ranks", container="slabs")


# A format: one safetensors file per tensor-parallel rank and layer in a folder of its own, and a file that says so.


class ByLayer:
    name = "by-layer"
    dialects = ("huggingface", "megatron")
    containers = ("safetensors", "torch")
    ranked = True

    def detect(self, store: Store) -> bool:
        return store.exists("by-layer.json")

    def open(self, store: Store, hints: Hints) -> Source:
        found = json.loads(store.read("by-layer.json"))
        settled = settle(store, hints, read_identity(store), "model/config.json")
        if settled is None:
            raise missing_config(store, self.name)
        family, config, raw = settled
        units: dict[tuple[int, int], dict[str, StoredTensor]] = {}
        files = {}
        for rank, paths in enumerate(found["ranks"]):
            units[rank, 0] = {}
            for path in paths:
                index = CONTAINERS.get(found["container"]).read(store, path)
                files[path] = index.header_digest
                units[rank, 0].update(index.tensors)
        dialect = DIALECTS.get(found["dialect"])
        return Source(
            store, self.name, dialect, found["spec"], found["container"], Layout.from_json(found["layout"]), family, config, raw,
            found["padded_vocab"], units, files, companions(store, "model/"), identity=read_identity(store),
            config_path="model/config.json",
        )  # fmt: skip

    def file(self, target: Target) -> Filing:
        groups: dict[tuple[tuple[int, ...], str], list[int]] = {}
        for i, wanted in enumerate(target.wanted):
            group = wanted.name.partition("layers.")[2].partition(".")[0] or "ends"
            groups.setdefault((wanted.ranks, group), []).append(i)
        suffix = CONTAINERS.get(target.container).suffix
        units: list[Unit] = []
        ranks: list[list[str]] = [[] for _ in range(target.layout.ranks)]
        for (holders, group), members in groups.items():
            specs = tuple(TensorSpec(target.wanted[i].name, target.wanted[i].dtype, target.wanted[i].shape) for i in members)
            for tp, rank in enumerate(holders):
                path = f"rank-{rank}/{group}{suffix}"
                ranks[rank].append(path)
                units.append(Unit(path, tuple(members), specs, place=tp))
        marker = {
            "ranks": ranks, "layout": target.layout.to_json(), "dialect": target.dialect.name, "spec": target.spec,
            "padded_vocab": target.padded_vocab, "container": target.container,
        }  # fmt: skip
        files, copies = carried(target, "model/")
        return Filing(tuple(units), (*files, ("by-layer.json", json.dumps(marker).encode())), copies)


class TestFormat:
    @pytest.mark.parametrize("container", ["safetensors", "torch"])
    @pytest.mark.parametrize("dialect", ["huggingface", "megatron"])
    def test_round_trip(self, src: Path, tmp_path: Path, container: str, dialect: str) -> None:
        sw.register(format=ByLayer())
        (src / "tokenizer.json").write_text("{}")
        there = round_trip(src, tmp_path, to="by-layer", layout=Layout(tp=2, pp=2), container=container, dialect=dialect)
        assert len(list((there / "rank-3").iterdir())) == 3
        assert (there / "model/tokenizer.json").read_text() == "{}"
        assert (tmp_path / "again/tokenizer.json").is_file()
        assert (tmp_path / "again/config.json").read_bytes() == (src / "config.json").read_bytes()

    def test_command(self, src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        sw.register(format=ByLayer())
        command("convert", src, tmp_path / "out", "--to", "by-layer", "--tp", 2, "--verify")
        command("convert", tmp_path / "out", tmp_path / "m", "--to", "megatron-legacy", "--pp", 2, "--verify")
        command("formats")
        assert "by-layer" in capsys.readouterr().out
        assert sw.open(tmp_path / "out").state_dict(to="by-layer", rank=0).keys() == sw.open(src).state_dict(to="by-layer").keys()


# An operation, and a dialect that uses it: query heads of all key/value groups reversed.


def upside_down(parts: Sequence[LazyTensor], fields: Mapping[str, Any], axis: int) -> LazyTensor:
    """Each of the parts reversed along an axis, one after the other."""
    cuts = [tuple(slice(None, None, -1) if k == axis else slice(None) for k in range(len(p.shape))) for p in parts]
    return concat([_cut(p, cut) for p, cut in zip(parts, cuts, strict=True)], axis=0)


def _cut(tensor: LazyTensor, cut: tuple[slice, ...]) -> LazyTensor:
    for axis, part in enumerate(cut):
        tensor = tensor.slice(axis, *part.indices(tensor.shape[axis]))
    return tensor


DIALECT = """
name = "odd"
numbering = "local"

[[row]]
name = "table"
hub = ["model.embed_tokens.weight"]
layout = ["transpose"]
split = "columns"

[[row]]
name = "block.{layer}.qkv"
hub = [
    "model.layers.{layer}.self_attn.q_proj.weight",
    "model.layers.{layer}.self_attn.k_proj.weight",
    "model.layers.{layer}.self_attn.v_proj.weight",
]
layout = ["upside_down(1)"]
"""
SINGLE = ["input_layernorm", "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
DIALECT += "".join(f'\n[[row]]\nname = "block.{{layer}}.{n}"\nhub = ["model.layers.{{layer}}.{n}.weight"]\n' for n in SINGLE)
DIALECT += "".join(
    f'\n[[row]]\nname = "{n}"\nhub = ["{hub}.weight"]\nstage = "last"\n' for n, hub in [("norm", "model.norm"), ("head", "lm_head")]
)


class TestDialectAndOperation:
    @pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2), Layout(pp=2, vpp=2)], ids=["one", "tp-pp", "vpp"])
    def test_round_trip(self, src: Path, tmp_path: Path, layout: Layout) -> None:
        (tmp_path / "odd.toml").write_text(DIALECT)
        sw.register(operation=upside_down)
        sw.register(dialect=tmp_path / "odd.toml")
        there = round_trip(src, tmp_path, to="ranks", dialect="odd", layout=layout)
        first = load_file(there / "rank_00000_tp0_pp0.safetensors")
        hub = tensors_of(src)
        fused = torch.cat([hub[Q0.replace("q_proj", f"{n}_proj")].flip(1) for n in "qkv"])
        assert torch.equal(first["model0.block.0.qkv" if layout.vpp > 1 else "block.0.qkv"], fused)
        assert sw.open(there).source.dialect.name == "odd"

    def test_command(self, src: Path, tmp_path: Path) -> None:
        (tmp_path / "odd.toml").write_text(DIALECT)
        sw.register(operation=upside_down)
        sw.register(dialect=tmp_path / "odd.toml")
        command("convert", src, tmp_path / "out", "--to", "ranks", "--dialect", "odd", "--tp", 2, "--verify")
        command("convert", tmp_path / "out", tmp_path / "back", "--to", "huggingface", "--verify")

    def test_operation_is_unknown_without_registration(self, tmp_path: Path) -> None:
        (tmp_path / "odd.toml").write_text(DIALECT)
        with pytest.raises(errors.TableError, match="upside_down"):
            sw.register(dialect=tmp_path / "odd.toml")

    def test_target_is_refused_where_the_dialect_is_not_registered(self, src: Path, tmp_path: Path) -> None:
        (tmp_path / "odd.toml").write_text(DIALECT)
        sw.register(operation=upside_down)
        sw.register(dialect=tmp_path / "odd.toml")
        sw.convert(src, tmp_path / "out", to="ranks", dialect="odd")
        DIALECTS.remove("odd")
        with pytest.raises(errors.CheckpointError, match=r"'odd'.*[Rr]egister"):
            sw.open(tmp_path / "out")


# A family: its own spelling in Hugging Face's files, a tensor more, and a field of its own.

FAMILY = """
name = "lemur"
extends = "llama"
model_types = ["lemur"]
architecture = "LemurForCausalLM"

[config]
gates = { key = "num_gates", default = "4" }

[[tensor]]
name = "model.layers.{layer}.self_attn.q_proj.weight"
huggingface = "model.layers.{layer}.attention.query.weight"
shape = ["num_attention_heads * head_dim", "hidden_size"]
split = "heads"

[[tensor]]
name = "model.layers.{layer}.gate.weight"
shape = ["gates", "hidden_size"]
when = "layer % 2 == 1"
"""


@pytest.fixture
def lemur(tmp_path: Path) -> Path:
    """A checkpoint of that family."""
    table = tmp_path / "lemur.toml"
    table.write_text(FAMILY)
    config = json.loads((tiny_llama(tmp_path / "base", vocab=128) / "config.json").read_text())
    config |= {"model_type": "lemur", "architectures": ["LemurForCausalLM"], "num_gates": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    command("synth", tmp_path / "config.json", tmp_path / "lemur", "--family", table, "--max-shard-size", "100KB")
    found = tensors_of(tmp_path / "lemur")
    assert found["model.layers.1.gate.weight"].shape == (3, 64)
    assert "model.layers.2.gate.weight" not in found
    assert "model.layers.0.attention.query.weight" in found
    return tmp_path / "lemur"


class TestFamily:
    def test_registered(self, lemur: Path, tmp_path: Path) -> None:
        sw.register(family=tmp_path / "lemur.toml")
        round_trip(lemur, tmp_path, to="ranks", layout=Layout(tp=2, pp=2))
        ckpt = sw.open(tmp_path / "there")
        assert ckpt.family == "lemur"
        assert ckpt["model.layers.1.gate.weight"].shape == (3, 64)
        assert Q0 in ckpt

    def test_command(self, lemur: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """``--family FILE`` all the way, and the target is read back with it."""
        family = ("--family", tmp_path / "lemur.toml")
        command("inspect", lemur, *family)
        command("plan", lemur, "--to", "ranks", *family)
        command("convert", lemur, tmp_path / "out", "--to", "ranks", "--tp", 2, "--verify", *family)
        command("inspect", tmp_path / "out", *family)
        command("verify", tmp_path / "out", *family)
        command("verify", tmp_path / "out", lemur, *family)
        command("convert", tmp_path / "out", tmp_path / "back", "--to", "huggingface", "--max-shard-size", "100KB", "--verify", *family)
        expected, found = tensors_of(lemur), tensors_of(tmp_path / "back")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((lemur / "config.json").read_text())
        command("plan", lemur, tmp_path / "saved", "--to", "ranks", "--save", tmp_path / "plan.json", *family)
        command("convert", "--plan", tmp_path / "plan.json", "--verify", *family)
        command("explain", lemur, "--to", "ranks", Q0, *family)
        assert "lemur" not in FAMILIES

    def test_forgotten(self, lemur: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        family = ("--family", tmp_path / "lemur.toml")
        command("convert", lemur, tmp_path / "out", "--to", "ranks", *family)
        for path in (lemur, tmp_path / "out"):
            with pytest.raises(SystemExit) as stop:
                main(["inspect", str(path)])
            assert stop.value.code == 3
            err = capsys.readouterr().err
            assert "lemur" in err
            assert "--family" in err

    def test_dialect_that_has_no_row(self, lemur: Path, tmp_path: Path) -> None:
        with pytest.raises(errors.UnsupportedError, match=r"gate\.weight"):
            sw.plan(sw.open(lemur, family=tmp_path / "lemur.toml"), to="megatron-legacy")


# A scheme: a sign bit (as int8) and one mean magnitude per row; its kernel is named as module:function.


def signs(source: torch.Tensor, outputs: list[torch.Tensor], scratch: torch.Tensor) -> None:
    """Kernel of `Signs`."""
    outputs[0].copy_(torch.sign(source))
    outputs[1].copy_(source.abs().mean(1, keepdim=True))


class Signs:
    name = "signs"
    kernel = f"{__name__}:signs"

    def takes(self, name: str, shape: tuple[int, ...], dtype: str) -> bool:
        return name.endswith("_proj.weight") and dtype == "float32"

    def outputs(self, name: str, shape: tuple[int, ...], dtype: str) -> Sequence[SchemeOutput]:
        return (SchemeOutput(name, "int8", shape, (1, 1)), SchemeOutput(f"{name}_mean", dtype, (shape[0], 1), (1, shape[1])))

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1, 0)

    def scratch(self) -> int:
        return 4

    def config(self) -> dict[str, Any]:
        return {"quant_method": "signs"}

    def recognises(self, config: dict[str, Any]) -> bool:
        return config.get("quant_method") == "signs"


class TestScheme:
    @pytest.mark.parametrize(("to", "layout"), [("huggingface", Layout()), ("ranks", Layout(tp=2, pp=2))])
    def test_convert_and_verify(self, src: Path, tmp_path: Path, to: str, layout: Layout) -> None:
        sw.register(scheme=Signs())
        sw.convert(src, tmp_path / "out", to=to, quantize="signs", layout=layout)
        found = sw.verify(tmp_path / "out", src)
        assert (found.level, found.ok) == ("values", True)
        assert sw.verify(tmp_path / "out").ok
        stored = load_file(next(iter(sorted((tmp_path / "out").glob("*.safetensors")))))
        weight = tensors_of(src)[Q0]
        weight = weight[: weight.shape[0] // layout.tp]
        assert torch.equal(stored[Q0], torch.sign(weight).to(torch.int8))
        assert torch.allclose(stored[f"{Q0}_mean"], weight.abs().mean(1, keepdim=True))

    def test_command(self, src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        sw.register(scheme=Signs())
        command("convert", src, tmp_path / "out", "--to", "huggingface", "--quantize", "signs", "--verify")
        capsys.readouterr()
        command("inspect", tmp_path / "out", "--json")
        assert json.loads(capsys.readouterr().out)["quantization"] == "signs"

    def test_a_plan_cannot_choose_code(self, src: Path, tmp_path: Path) -> None:
        """A saved plan runs a scheme's kernel only where somebody registered the scheme."""
        sw.register(scheme=Signs())
        sw.plan(src, tmp_path / "out", to="huggingface", quantize="signs").save(tmp_path / "plan.json")
        sw.load_plan(tmp_path / "plan.json").execute()
        SCHEMES.remove("signs")
        with pytest.raises(errors.PlanError, match="registered"):
            sw.load_plan(tmp_path / "plan.json").execute(overwrite=True)


class TestRegister:
    def test_a_name_is_taken_once(self, tmp_path: Path) -> None:
        sw.register(container=Slabs())
        with pytest.raises(errors.UsageError, match="slabs"):
            sw.register(container=Slabs())
        with pytest.raises(errors.UsageError, match="transpose"):
            sw.register(operation=lambda_named("transpose"))

    def test_unknown_kind(self) -> None:
        with pytest.raises(errors.UsageError, match="gadget"):
            sw.register(gadget=object())

    @pytest.mark.parametrize("kind", ["family", "dialect"])
    def test_no_table(self, tmp_path: Path, kind: str) -> None:
        with pytest.raises(errors.TableError, match=r"nothing\.toml"):
            sw.register(**{kind: tmp_path / "nothing.toml"})


def lambda_named(name: str) -> Any:
    def operation(parts: Sequence[LazyTensor], fields: Mapping[str, Any]) -> LazyTensor:
        return parts[0]

    operation.__name__ = name
    return operation
