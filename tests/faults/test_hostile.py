"""Input that was made to do harm: refused by name, at once, in little memory, whatever number or name is in it.

Each case runs against a clock and with its memory counted: what a number inside a small file can cost is bounded by the
file's size. Numbers that the machine does not decide: CPU seconds of this process, bytes that Python holds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import socket
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch

import shardwright as sw
from shardwright import errors
from shardwright.options import read_layout
from shardwright.planner import _saved, codec
from shardwright.planner.config import from_huggingface
from shardwright.planner.formats import open_source
from shardwright.planner.formats.base import Hints
from shardwright.planner.layout import MOST_RANKS, Layout
from shardwright.planner.megatron_args import from_megatron, to_megatron
from shardwright.planner.passes.build import build, read_side
from shardwright.planner.passes.disjoint import Allowance, clash
from shardwright.planner.passes.rows import hub_tensors
from shardwright.planner.request import Request
from shardwright.planner.store import LocalStore
from shardwright.planner.tables import FAMILIES, load_dialect, load_family
from shardwright.planner.tensor.pieces import Box
from tests.unit import reference
from tests.unit.experts_reference import Experts
from tests.unit.tiny import tiny_llama

INDEX = "model.safetensors.index.json"
QWEN3_MOE = Experts(layers=2, heads=4, kv=2, head_dim=2, hidden=8, ffn=4, expert_ffn=4, vocab=6, experts=8, dense=(0,), qk_norm=True)
SECONDS = 6.0
MEGABYTES = 64


@contextmanager
def bounded(seconds: float = SECONDS) -> Iterator[None]:
    """Fail the body when it hangs, computes for longer than `seconds`, or holds more than `MEGABYTES` at once."""

    def hangs(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(200)
    tracemalloc.start()
    started = time.process_time()
    try:
        yield
        assert time.process_time() - started < seconds
        assert tracemalloc.get_traced_memory()[1] < MEGABYTES << 20
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(call: Callable[[], object], *says: str, kind: type[errors.ShardwrightError] = errors.Refusal) -> str:
    """The message with which the call is refused, within bounds; a `Refusal` is the command's exit code 3."""
    with bounded(), pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert len(message) < 10_000
    assert all(text in message for text in says), message
    message.encode()
    json.dumps(caught.value.__dict__, default=str)
    return message


def opened(folder: Path) -> object:
    """Everything that opening reads."""
    source = open_source(LocalStore(folder), Hints())
    return source.hub, read_side(source)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "src", layers=2)


@pytest.fixture
def ranks(src: Path) -> Path:
    """A target of ours with two ranks, as its plan lays it out."""
    return laid_out(src, Request("ranks", Layout(tp=2), pad_vocab_to=2))


@pytest.fixture
def megatron(src: Path) -> Path:
    """A Megatron checkpoint without anything of ours: `args` say everything."""
    out = laid_out(src, Request("megatron-legacy"))
    (out / "shardwright.json").unlink()
    shutil.rmtree(out / "hf")
    return out


def laid_out(src: Path, request: Request) -> Path:
    """The files of a target, data zero."""
    out = src.parent / "out"
    plan = build(open_source(LocalStore(src), Hints()), request)
    for file in plan.target_files:
        path = out / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as target:
            target.truncate(file.nbytes)
            for offset, data in file.static:
                target.seek(offset)
                target.write(data)
    opened(out)
    return out


class TestNumbers:
    """A number in a header, a config or a manifest decides nothing but a refusal."""

    @pytest.mark.parametrize("value", [10**12, 2**62, 10**30, 10**4000, 0, -1, 1.5, True, "2", [2], None])
    @pytest.mark.parametrize("field", ["num_hidden_layers", "vocab_size", "hidden_size", "num_attention_heads", "intermediate_size"])
    def test_config(self, src: Path, field: str, value: Any) -> None:
        edit(src / "config.json", **{field: value})
        refused(lambda: opened(src))

    @pytest.mark.parametrize(
        "change",
        [
            *({"num_experts": value} for value in (10**12, 1 << 19, 0, -1, True, "8", [8], None, 1.5)),
            *({"num_experts_per_tok": value} for value in (10**12, 9, 0, "2", None)),
            *({"mlp_only_layers": value} for value in ({}, 3, "0", [[0]], [True], [0.5], [0] * (1 << 24))),
            *({"decoder_sparse_step": value} for value in (0, -1, "1", [])),
            *({"num_hidden_layers": 1 << 20}, {"num_hidden_layers": 1 << 17, "num_experts": 4}, {"router_aux_loss_coef": "x"}),
            *({"moe_intermediate_size": 10**20}, {"norm_topk_prob": "yes"}, {"num_local_experts": 10**5000}),
        ],
    )
    def test_config_with_experts(self, change: dict[str, Any]) -> None:
        raw = {**QWEN3_MOE.config(), **change}
        refused(lambda: from_huggingface(raw, FAMILIES.get("qwen3_moe")), kind=errors.ConfigError)

    def test_more_experts_than_tensors(self, tmp_path: Path) -> None:
        folder = reference.write(tmp_path / "moe", QWEN3_MOE, QWEN3_MOE.weights(), shards=1)
        opened(folder)
        edit(folder / "config.json", num_experts=1 << 17)
        refused(lambda: opened(folder), "131072 experts", "--config", kind=errors.CheckpointError)

    @pytest.mark.parametrize(
        "change",
        [
            *({"num_experts": value} for value in (10**12, 0, -1, True, "8", [], {}, 10**5000)),
            *({"moe_layer_freq": value} for value in (0, -1, "x", [1] * 3, [2, 2], True, None, {})),
            *({"moe_router_topk": value} for value in (10**12, 0, "2")),
            *({"num_layers": value, "moe_layer_freq": 1} for value in (10**12, 10**5000, "2", -1)),
            *({"moe_aux_loss_coeff": [1]}, {"moe_shared_expert_intermediate_size": "x"}),
            *({"moe_router_score_function": 10**5000}, {"moe_ffn_hidden_size": -(10**5000)}, {"moe_router_num_groups": []}),
        ],
    )
    def test_megatron_args_with_experts(self, change: dict[str, Any]) -> None:
        family = FAMILIES.get("qwen3_moe")
        arguments, _ = to_megatron(from_huggingface(QWEN3_MOE.config(), family), family)
        assert from_megatron(arguments, None, None, "m.pt").family == "qwen3_moe"
        changed = {**arguments, **change}
        for told in (None, family):
            refused(lambda told=told: from_megatron(changed, told, None, "m.pt"))  # type: ignore[misc]

    @pytest.mark.parametrize("text", ["1" + "0" * 5000, "1e999", "-1e999", "NaN", "1" * 100_000])
    def test_digits(self, src: Path, text: str) -> None:
        found = (src / "config.json").read_text().replace('"rope_theta": 10000.0', f'"rope_theta": {text}')
        (src / "config.json").write_text(found)
        refused(lambda: opened(src))

    def test_more_layers_than_tensors(self, src: Path) -> None:
        edit(src / "config.json", num_hidden_layers=1 << 20)
        refused(lambda: opened(src), "1048576 layers", "21 tensors", "--config", kind=errors.CheckpointError)

    def test_layers_of_a_bare_config(self, src: Path, tmp_path: Path) -> None:
        edit(src / "config.json", num_hidden_layers=10**12)
        refused(lambda: sw.synth(src / "config.json", tmp_path / "made", sparse=True), "num_hidden_layers", kind=errors.ConfigError)
        assert not (tmp_path / "made").exists()

    def test_a_tensor_of_2_to_the_64_elements(self, src: Path) -> None:
        config = {**json.loads((src / "config.json").read_text()), "hidden_size": 1 << 32, "vocab_size": 1 << 32, "num_attention_heads": 8}
        family = FAMILIES.get("llama")
        refused(lambda: hub_tensors(family, from_huggingface(config, family)), "impossible shape", kind=errors.ConfigError)

    @pytest.mark.parametrize(
        "layout",
        [
            *({"tp": 10**12}, {"tp": 2, "pp": 10**12}, {"tp": 2, "pp": 2, "vpp": 10**12}, {"tp": 1 << 20}, {"tp": 2, "etp": "x"}),
            *(
                {"tp": 2, "stages": ["x"]},
                {"tp": 2, "stages": "2"},
                {"tp": 2, "stages": 2},
                {"tp": 2, "stages": [10**400]},
                {"tp": 10**400},
            ),
        ],
    )
    def test_identity(self, ranks: Path, layout: dict[str, Any]) -> None:
        edit(ranks / "shardwright.json", layout=layout)
        refused(lambda: opened(ranks), "layout", kind=errors.CheckpointError)

    @pytest.mark.parametrize("change", [{"num_hidden_layers": "2"}, {"rope_scaling": "x"}, {"hidden_size": 10**20}, {"rms_norm_eps": []}])
    def test_identity_config(self, ranks: Path, change: dict[str, Any]) -> None:
        shutil.rmtree(ranks / "hf")
        identity = json.loads((ranks / "shardwright.json").read_text())
        edit(ranks / "shardwright.json", config={**identity["config"], **change})
        refused(lambda: opened(ranks), next(iter(change)), "shardwright.json", kind=errors.ConfigError)

    @pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "intermediate_size", "head_dim"])
    def test_config_of_ranks(self, ranks: Path, field: str) -> None:
        """Cutting an axis of billions for two ranks costs no more than cutting a short one."""
        edit(ranks / "hf/config.json", **{field: 1 << 32})
        refused(lambda: opened(ranks))

    def test_rank_names(self, ranks: Path) -> None:
        (ranks / "shardwright.json").unlink()
        (ranks / "rank_00001_tp1_pp0.safetensors").rename(ranks / "rank_999999999999_tp999999999999_pp0.safetensors")
        refused(lambda: opened(ranks), "ranks")

    @pytest.mark.parametrize(
        "change",
        [
            *({"tensor_model_parallel_size": 10**12}, {"pipeline_model_parallel_size": 10**12, "decoder_first_pipeline_num_layers": 1}),
            *({"expert_model_parallel_size": 2**62}, {"pipeline_model_parallel_layout": "t*" + "9" * 5000}, {"num_layers": 10**12}),
            *({"pipeline_model_parallel_layout": ["t"] * 3}, {"rotary_base": 10**400}, {"rotary_base": "x"}, {"kv_channels": -(10**5000)}),
            *({"kv_channels": None, "num_attention_heads": 0}, {"decoder_first_pipeline_num_layers": []}, {"hidden_size": 10**5000}),
            *({"use_rope_scaling": True, "rope_scaling_factor": "x"}, {"window_size": [10**5000, 0]}, {"normalization": 10**5000}),
        ],
    )
    def test_megatron_args(self, megatron: Path, change: dict[str, Any]) -> None:
        rewrite(megatron / "release/mp_rank_00/model_optim_rng.pt", lambda loaded: vars(loaded["args"]).update(change))
        refused(lambda: opened(megatron))

    @pytest.mark.parametrize("key", ["model" + "9" * 1000, "model99999999999"])
    def test_a_chunk_with_a_long_number(self, megatron: Path, key: str) -> None:
        rewrite(megatron / "release/mp_rank_00/model_optim_rng.pt", lambda loaded: loaded.update({key: loaded["model"]}))
        with bounded():
            source = open_source(LocalStore(megatron), Hints())
        assert [dropped.name for dropped in source.dropped] == [key]

    def test_layout_file(self, tmp_path: Path) -> None:
        file = tmp_path / "layout.json"
        for text in (
            '{"tp": 1000000000000}',
            '{"tp": 1048576, "pp": 2}',
            '{"pp": 2, "stages": [1, "x"]}',
            '{"tp": [[1]]}',
            "[" * 9000,
            "\x00",
        ):
            file.write_text(text)
            refused(lambda: read_layout(str(file)), str(file), kind=errors.LayoutError)
        assert Layout(tp=MOST_RANKS).ranks == MOST_RANKS


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Load what torch saved, change it, save it again."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = torch.load(path, weights_only=True)
    change(loaded)
    torch.save(loaded, path)


class TestText:
    """JSON that is valid, or nearly, and meant to hurt."""

    FILES = ("config.json", INDEX)

    @pytest.mark.parametrize("file", FILES)
    @pytest.mark.parametrize("depth", [65, 500, 940, 960, 980, 100_000])
    @pytest.mark.parametrize("pair", ["[]", ('{"a":', "}")])
    def test_nesting(self, src: Path, file: str, depth: int, pair: str) -> None:
        found = (src / file).read_text().rstrip().removesuffix("}")
        (src / file).write_text(f'{found}, "rope_scaling": {pair[0] * depth}1{pair[1] * depth}}}')
        refused(lambda: opened(src), file, kind=errors.CheckpointError)

    @pytest.mark.parametrize("file", FILES)
    def test_a_key_twice_among_many(self, src: Path, file: str) -> None:
        many = ", ".join(f'"k{i}": 0' for i in range(60_000))
        (src / file).write_text(f'{{{many}, "k59999": 1}}')
        refused(lambda: opened(src), "'k59999' twice")

    @pytest.mark.parametrize("file", FILES)
    @pytest.mark.parametrize("data", [b"\xff\xfe{\0}\0", b'{"a": "\\ud800"}', b'{"\\udfff": 1}', b'{"a": "\xff"}', b"", b"\0" * 100, b"3"])
    def test_no_utf_8(self, src: Path, file: str, data: bytes) -> None:
        (src / file).write_bytes(data)
        refused(lambda: opened(src), file, kind=errors.CheckpointError)

    def test_a_byte_order_mark_does_no_harm(self, src: Path) -> None:
        (src / "config.json").write_bytes(b"\xef\xbb\xbf" + (src / "config.json").read_bytes())
        opened(src)

    def test_many_replicas(self, src: Path) -> None:
        """As many identical copies as names: each is looked at once."""
        shutil.rmtree(src)
        tiny_llama(src, layers=600, hidden=8, heads=1, kv=1, vocab=3, shards=1)
        shutil.copy(src / "model.safetensors", src / "copy.safetensors")
        names = list(sw.open(src).stored)
        weight_map = {name: ("copy.safetensors", "model.safetensors")[i % 2] for i, name in enumerate(names)}
        (src / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with bounded(20):
            source = open_source(LocalStore(src), Hints())
        assert len(source.dropped) == len(names)

    @pytest.mark.parametrize(
        "value", [3, "int8", [1], True, {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": 3}]
    )
    def test_quantization_config(self, src: Path, value: Any) -> None:
        edit(src / "config.json", quantization_config=value)
        refused(lambda: opened(src), "config.json")

    @pytest.mark.parametrize(
        ("field", "value"), [("rope_scaling", "linear"), ("rope_parameters", [1]), ("hidden_act", {}), ("rope_scaling", {"type": 3})]
    )
    def test_wrong_types_are_no_defaults(self, src: Path, field: str, value: Any) -> None:
        edit(src / "config.json", **{field: value})
        refused(lambda: opened(src), kind=errors.ConfigError)


class TestNames:
    """Names out of manifests, and names of files."""

    @pytest.mark.parametrize(
        "name",
        [
            "../secret.safetensors",
            "/etc/passwd",
            "a/../../x.safetensors",
            "a\0b",
            "x" * 5000,
            "",
            ".",
            "a/" * 3000,
            "CON",
            "model-00001-of-00002.safetensors/x",
        ],
    )
    def test_index(self, src: Path, name: str) -> None:
        (src.parent / "secret.safetensors").write_bytes((src / "model-00001-of-00002.safetensors").read_bytes())
        index = json.loads((src / INDEX).read_text())
        edit(src / INDEX, weight_map={**index["weight_map"], "model.norm.weight": name})
        refused(lambda: opened(src), kind=errors.CheckpointError)

    def test_links_of_the_cache_are_followed(self, src: Path) -> None:
        """The Hugging Face cache: snapshots hold links into a folder beside them."""
        blobs = src.parent / "blobs"
        blobs.mkdir()
        for i, file in enumerate(sorted(src.iterdir())):
            file.rename(blobs / str(i))
            file.symlink_to(f"../blobs/{i}")
        opened(src)

    def test_a_circle_of_links(self, src: Path) -> None:
        (src / "config.json").unlink()
        (src / "config.json").symlink_to("config.json")
        refused(lambda: opened(src), "--config")
        (src / "sub").symlink_to(src)
        assert not any(name.startswith("sub/") for name in LocalStore(src).list())

    def test_two_files_of_one_rank(self, megatron: Path) -> None:
        shutil.copytree(megatron / "release/mp_rank_00", megatron / "release/mp_rank_000")
        refused(lambda: opened(megatron), "two files are of one rank", "mp_rank_00", kind=errors.CheckpointError)

    def test_a_name_that_is_not_utf_8(self, src: Path) -> None:
        with open(os.fsencode(src) + b"/README\xff", "wb"):
            pass
        refused(lambda: opened(src), "UTF-8", "udcff", "Rename", kind=errors.CheckpointError)

    def test_folders_without_end(self, src: Path) -> None:
        here = os.getcwd()
        try:
            os.chdir(src)
            for _ in range(1500):
                os.mkdir("d")
                os.chdir("d")
        finally:
            os.chdir(here)
        with bounded():
            opened(src)

    def test_a_folder_that_is_not_for_us(self, src: Path) -> None:
        """What a mount's root has beside the checkpoint; a superuser can read it and sees no difference."""
        (src / "lost+found").mkdir(mode=0)
        opened(src)


class TestSpecialFiles:
    """Pipes, devices, sockets and folders under the names of files: neither waited for nor read."""

    MADE = ("pipe", "device", "socket", "folder")

    def put(self, path: Path, what: str) -> None:
        path.unlink(missing_ok=True)
        if what == "pipe":
            os.mkfifo(path)
        elif what == "device":
            path.symlink_to("/dev/zero")
        elif what == "folder":
            path.mkdir()
        else:
            here = os.getcwd()
            os.chdir(path.parent)  # a socket's whole path may have no more than 107 bytes
            try:
                with socket.socket(socket.AF_UNIX) as made:
                    made.bind(path.name)
            finally:
                os.chdir(here)

    @pytest.mark.parametrize("what", MADE)
    @pytest.mark.parametrize("name", ["config.json", INDEX, "model-00002-of-00002.safetensors"])
    def test_huggingface(self, src: Path, name: str, what: str) -> None:
        self.put(src / name, what)
        refused(lambda: opened(src), kind=errors.CheckpointError)

    @pytest.mark.parametrize("what", MADE)
    def test_a_single_file(self, tmp_path: Path, what: str) -> None:
        tiny_llama(tmp_path / "src", layers=1, shards=1)
        self.put(tmp_path / "src/model.safetensors", what)
        refused(lambda: opened(tmp_path / "src"), kind=errors.CheckpointError)
        refused(lambda: opened(tmp_path / "src/model.safetensors"), kind=errors.CheckpointError)

    @pytest.mark.parametrize("what", MADE)
    def test_identity(self, ranks: Path, what: str) -> None:
        self.put(ranks / "shardwright.json", what)
        self.put(ranks / "rank_00001_tp1_pp0.safetensors", what)
        refused(lambda: opened(ranks), kind=errors.CheckpointError)

    @pytest.mark.parametrize("what", MADE)
    def test_tracker(self, megatron: Path, what: str) -> None:
        self.put(megatron / "latest_checkpointed_iteration.txt", what)
        with bounded():
            opened(megatron)  # as if there were no tracker: one iteration is not ambiguous

    def test_a_pipe_that_takes_a_files_place(self, src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store = LocalStore(src)
        found = store.stat("config.json")
        self.put(src / "config.json", "pipe")
        monkeypatch.setattr(LocalStore, "stat", lambda self, path: found)
        refused(lambda: store.read("config.json"), "not a regular file", kind=errors.CheckpointError)


class TestTables:
    """A stranger's family table."""

    def refused(self, tmp_path: Path, text: str, *says: str, load: Callable[[Path], object] = load_family) -> None:
        file = tmp_path / "table.toml"
        file.write_text(text)
        refused(lambda: load(file), "table.toml", *says, kind=errors.TableError)

    HEAD = 'name = "x"\narchitecture = "X"\nmodel_types = ["x"]\n'

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("a" + ".a" * 500_000 + " = 1", "dots"),
            ("[a" + ".a" * 300 + "]", "dots"),
            ("#" * (1 << 20) + "\n", "larger than 1 MiB"),
            ("name" + ".a" * 200 + " = 1", "nested"),
            ("x = " + "[" * 5000, "TOML"),
            ("x = " + "9" * 5000, "TOML"),
            ("x = 2020-13-45", "TOML"),
            ("x = 1\nx = 2", "TOML"),
        ],
    )
    def test_text(self, tmp_path: Path, text: str, says: str) -> None:
        self.refused(tmp_path, text, says)

    @pytest.mark.parametrize("name", ['"../secret"', '"/etc/x"', '"a/b"', '""', '"' + "x" * 300 + '"', "3", '["a"]', '"a\\u0000b"', '".."'])
    def test_extends(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "sub").mkdir()
        (tmp_path / "secret.toml").write_text(self.HEAD)
        self.refused(tmp_path / "sub", f'extends = {name}\nname = "x"', "extends" if name != '""' else "")

    def test_a_long_chain(self, tmp_path: Path) -> None:
        for i in range(100):
            (tmp_path / f"f{i}.toml").write_text(f'{self.HEAD}extends = "f{i + 1}"')
        refused(lambda: load_family(tmp_path / "f0.toml"), "f8.toml", "more than 8 others", kind=errors.TableError)

    @pytest.mark.parametrize("bases", [["f1"] * 9, ["f1"] * 4, [f"f{i}" for i in range(1, 10)]])
    def test_many_bases(self, tmp_path: Path, bases: list[str]) -> None:
        """Each of them extends two more: what is shared is read again, and counted again."""
        for i in range(12):
            (tmp_path / f"f{i}.toml").write_text(f"{self.HEAD}extends = {bases if i == 0 else [f'f{i + 1}'] * 2 if i < 8 else []}")
        refused(lambda: load_family(tmp_path / "f0.toml"), "more than 8 others", kind=errors.TableError)

    def test_a_circle_of_bases(self, tmp_path: Path) -> None:
        for one, other in (("a", "b"), ("b", "c"), ("c", "a")):
            (tmp_path / f"{one}.toml").write_text(f'{self.HEAD}extends = ["_experts", "{other}"]')
        refused(lambda: load_family(tmp_path / "a.toml"), "c.toml", "extends itself", kind=errors.TableError)

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            *((f'[layer]\n{word} = "1"', "name of something else") for word in ("hidden_size", "layer", "num_experts", "tp", "family")),
            (f"spellings = {[f's{i}' for i in range(33)]}", "more than 32"),
            ("spellings = [[1]]", "list of strings"),
            ("spellings = 3", "list of strings"),
            ('[[tensor]]\nshape = ["1"]', "needs 'name'"),
            ('[[row]]\nname = { stacked = 3 }\nhub = ["model.norm.weight"]', "one per spec"),
            ("layer = 3", "must be a table"),
            ('refuse = "x"', "must be a table"),
        ],
    )
    def test_tables_with_experts(self, tmp_path: Path, text: str, says: str) -> None:
        first, _, rest = text.partition("[") if text.startswith("[") else (text, "", "")
        self.refused(tmp_path, f'name = "x"\nextends = "qwen3_moe"\n{first}\n' + (f"[{rest}" if rest else ""), says)

    @pytest.mark.parametrize(
        ("word", "says"),
        [("mlp_only_layers", "depends on the layer"), ("1 // layer", "cannot be computed"), ("'a'", None), ("10 + layer", None)],
    )
    def test_words_of_layers(self, tmp_path: Path, word: str, says: str | None) -> None:
        file = tmp_path / "mine.toml"
        file.write_text(f'name = "mine"\nextends = "qwen3_moe"\n[layer]\nmoe = "{word}"')
        family = load_family(file)
        config = from_huggingface(QWEN3_MOE.config(), family)
        with bounded():
            if says is None:
                assert len(hub_tensors(family, config)) == len(replace(QWEN3_MOE, dense=()).shapes())
                return
        refused(lambda: hub_tensors(family, config), says)

    def test_layers_that_are_alike_are_decided_once(self) -> None:
        """As many layers as there may be, none of which has experts, and a list to look through for each."""
        family = FAMILIES.get("qwen3_moe")
        dense = {"num_hidden_layers": 1 << 15, "num_experts": 8, "mlp_only_layers": list(range(-512, 0)), "decoder_sparse_step": 1 << 16}
        config = from_huggingface({**QWEN3_MOE.config(), **dense}, family)
        started = time.process_time()
        assert len(hub_tensors(family, config)) == 3 + 11 * (1 << 15)
        assert time.process_time() - started < 10

    @pytest.mark.parametrize(
        "shape",
        [
            *("'a' * 1000000000", "2 ** 2 ** 30", "().__class__", "__import__('os')", "[0] * 9", "1 << 99", "x", "-" * 200 + "1", "f'{1}'"),
            *("1" + "+1" * 200, "(" * 100 + "1" + ")" * 100 + ".a", "9" * 600, "1if 2else 3", "é", "lambda: 1", "...", "1j"),
        ],
    )
    def test_expressions(self, tmp_path: Path, shape: str) -> None:
        self.refused(tmp_path, f'{self.HEAD}[[tensor]]\nname = "t"\nshape = ["""{shape}"""]')

    @pytest.mark.parametrize("value", ["0x" + "f" * 4000, "[1]", "{ a = 1 }", "2020-01-01"])
    def test_values_that_are_no_expressions(self, tmp_path: Path, value: str) -> None:
        self.refused(tmp_path, f'{self.HEAD}[[tensor]]\nname = "t"\nshape = [{value}]', "not an expression")

    def test_as_many_expressions_as_fit(self, tmp_path: Path) -> None:
        long = "+".join(["a"] * 90)
        rows = "\n".join(f'[[tensor]]\nname = "t{i}"\nshape = ["{long}"]' for i in range(400))
        file = tmp_path / "table.toml"
        file.write_text(f'{self.HEAD}{rows}\n[config]\na = {{ value = "1" }}\nnum_hidden_layers = {{ value = "1" }}')
        with bounded(30):
            assert len(load_family(file).tensors) == 400

    @pytest.mark.parametrize(
        "operation",
        [
            "transpose(" + "-" * 100_000 + "1)",
            "transpose(1)",
            "pad_vocab(((((",
            "packed({}.x)",
            "pad_vocab(" + "[" * 150 + "]" * 150 + ")",
        ],
    )
    def test_operations(self, tmp_path: Path, operation: str) -> None:
        row = f'name = "d"\n[[row]]\nname = "a"\nhub = ["b"]\nlayout = ["{operation}"]'
        self.refused(tmp_path, row, "[[row]] 1", load=load_dialect)

    @pytest.mark.parametrize(
        ("tensor", "says"),
        [
            ('name = "model.norm.weight"\nshape = ["hidden_size"]\nstage = "last"\nsplit = "columns"', "cuts a second axis"),
            ('name = "model.embed_tokens.weight"\nshape = []\nsplit = "vocab"', "pad_vocab"),
            ('name = "model.norm.weight"\nshape = ["hidden_size * 1000000000000000000"]\nstage = "last"', "impossible shape"),
            ('name = "model.norm.weight"\nshape = ["1.5 * hidden_size"]\nstage = "last"', "impossible shape"),
            ('name = "model.norm.weight"\nshape = ["1 // (hidden_size - hidden_size)"]\nstage = "last"', "cannot be computed"),
        ],
    )
    def test_tensors(self, src: Path, tmp_path: Path, tensor: str, says: str) -> None:
        file = tmp_path / "mine.toml"
        file.write_text(f'name = "mine"\nextends = "llama"\n[[tensor]]\n{tensor}')
        request = Request("ranks", Layout(tp=2), pad_vocab_to=2)
        refused(lambda: build(open_source(LocalStore(src), Hints(load_family(file))), request), says)

    def test_two_tensors_whose_names_meet(self, src: Path, tmp_path: Path) -> None:
        tensors = "".join(f'[[tensor]]\nname = "{name}"\nshape = [1]\n' for name in ("w1{layer}", "w{layer}1"))
        (tmp_path / "mine.toml").write_text(f'name = "mine"\nextends = "llama"\n{tensors}')
        family = load_family(tmp_path / "mine.toml")
        config = from_huggingface({**json.loads((src / "config.json").read_text()), "num_hidden_layers": 12}, family)
        refused(lambda: hub_tensors(family, config), "one name", "w11", kind=errors.TableError)


class TestPlans:
    """A stranger's saved plan."""

    def test_interleaved_pieces(self, src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Valid, but a proof would compare each of 8,000 pieces with each other."""
        made = self.saved(src)
        program, rows, columns = made["programs"][0], 1 << 13, 64
        program["shape"] = program["outputs"][0]["shape"] = [rows * 16, columns]
        program["gather"] = [[0, i * columns, i * columns, 16, rows * columns, rows * columns, columns, 1, 1] for i in range(rows)]
        made["source_files"]["nbytes"] = [1 << 40 for _ in made["source_files"]["nbytes"]]
        monkeypatch.setattr(_saved, "plan_hash", lambda plan: made["plan_hash"])
        with bounded(30), pytest.raises(errors.PlanError, match="ragged"):
            codec.from_json(made)

    @pytest.mark.parametrize(
        "change",
        [
            *(
                {"kernel": "os:system"},
                {"kernel": "shardwright.executors.kernels:quantise_int8_channel.__globals__"},
                {"kernel": "x" * 10_000},
            ),
            {"kernel": "subprocess:run"},
        ],
    )
    def test_kernels(self, src: Path, change: dict[str, str]) -> None:
        made = json.loads(codec.dumps(build(open_source(LocalStore(src), Hints()), Request("huggingface", dtype="bfloat16"))))
        made["programs"][0]["op"].update(change)
        with bounded(10), pytest.raises(errors.PlanError, match="value op"):
            codec.from_json(made)

    @pytest.mark.parametrize("name", ["../x", "/etc/cron.d/x", "a/../../x", "a\0", "", "."])
    @pytest.mark.parametrize("side", ["source_files", "target_files"])
    def test_paths(self, src: Path, side: str, name: str) -> None:
        made = self.saved(src)
        made[side]["path"][0] = name
        with bounded(10), pytest.raises(errors.PlanError, match="path"):
            codec.from_json(made)

    def saved(self, src: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(codec.dumps(build(open_source(LocalStore(src), Hints()), Request("ranks")), target_root="/out"))
        codec.from_json(found)
        return found


class TestClash:
    """The proof that boxes are disjoint: exact, and never longer than its allowance."""

    def test_against_listing(self) -> None:
        rng = random.Random(1)
        met = 0
        for _ in range(3000):
            axes = rng.choice([1, 1, 2, 3])
            boxes = [self.box(rng, axes) for _ in range(rng.randint(2, 5))]
            expected = any(self.elements(a) & self.elements(b) for a, b in combinations(boxes, 2))
            found = clash(boxes, Allowance(10**6))
            assert (found is not None) is expected, boxes
            if found:
                assert self.elements(found[0]) & self.elements(found[1])
            met += expected
        assert 600 < met < 2400

    def box(self, rng: random.Random, axes: int) -> Box:
        dims = tuple((rng.randrange(axes), rng.randint(1, 4), rng.randint(1, 7), 0) for _ in range(rng.randint(0, 3)))
        return Box(0, tuple(rng.randrange(20) for _ in range(axes)), 0, dims)

    def elements(self, box: Box) -> set[tuple[int, ...]]:
        coordinates = [{at} for at in box.start]
        for axis, extent, step, _ in box.dims:
            coordinates[axis] = {at + i * step for at in coordinates[axis] for i in range(extent)}
        return set(product(*coordinates))

    def test_long_axes_cost_nothing(self) -> None:
        """Two sets of 2⁵⁰ coordinates each, which meet nowhere or in one place far out."""
        even = Box(0, (0,), 0, ((0, 1 << 50, 6, 1),))
        assert clash([even, Box(0, (3,), 0, ((0, 1 << 50, 4, 1),))], Allowance(100)) is None
        assert clash([even, Box(0, (2,), 0, ((0, 1 << 50, 4, 1),))], Allowance(100)) is not None

    def test_a_grid_is_no_effort(self) -> None:
        grid = [Box(0, (4 * i, 4 * k), 0, ((0, 4, 1, 8), (1, 4, 1, 1))) for i in range(60) for k in range(60)]
        assert clash(grid, Allowance(4 * len(grid))) is None

    def test_what_costs_more_is_refused(self) -> None:
        rows = [Box(0, (i,), 0, ((0, 9, 5000, 1),)) for i in range(5000)]
        refused(lambda: clash(rows, Allowance(100_000)), "ragged", kind=errors.PlanError)


def test_this_process_may_open_few_files(src: Path) -> None:
    """A folder of more files than may be open at once is listed and read with a handful."""
    shutil.rmtree(src)
    tiny_llama(src, layers=30, hidden=8, heads=1, kv=1, vocab=3, shards=120)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        opened(src)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_megatron_seeds_are_sound(megatron: Path) -> None:
    """What these tests break is whole before they break it."""
    rewrite(megatron / "release/mp_rank_00/model_optim_rng.pt", lambda loaded: None)
    source = open_source(LocalStore(megatron), Hints())
    assert to_megatron(source.config, source.family)[0]["num_layers"] == 2
