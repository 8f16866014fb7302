"""Every command and flag: what it prints, what it writes, and the code it exits with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

import shardwright as sw
from shardwright.cli import main
from tests.unit.tiny import tiny_llama

PLAN_FIELDS = [
    "source_format", "source_layout", "family", "target_format", "target_layout", "tensors", "files", "bytes_read",
    "bytes_written", "source_bytes", "target_bytes", "read_amplification", "write_amplification", "requests", "tiles", "pieces",
    "programs", "base_bytes", "peak_bytes", "min_memory_bytes", "dropped", "warnings",
]  # fmt: skip
Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("cli") / "src")


class Shell:
    """Runs commands in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *args: object, code: int = 0) -> tuple[str, str]:
        """Standard output and standard error."""
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in args])
        out, err = self.capsys.readouterr()
        assert (stop.value.code or 0) == code, err
        return out, " ".join(err.split())

    def json(self, *args: object, code: int = 0) -> dict[str, Any]:
        """The one object on standard output."""
        out, _ = self(*args, "--json", code=code)
        assert out.count("\n") == 1
        found = json.loads(out)
        assert isinstance(found, dict)
        return found


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


class TestHelp:
    @pytest.mark.parametrize(
        "command", ["", "inspect", "plan", "convert", "verify", "explain", "synth", "formats", "families", "schemes", "demo", "diff"]
    )
    @pytest.mark.parametrize("flag", ["--help", "-h"])
    def test_help(self, shell: Shell, command: str, flag: str) -> None:
        out, _ = shell(*filter(None, [command]), flag)
        assert "Usage" in out

    def test_version(self, shell: Shell) -> None:
        assert sw.__version__ in shell("--version")[0]

    def test_unknown_command(self, shell: Shell) -> None:
        assert "nonsense" in shell("nonsense", code=2)[1]


class TestInspect:
    def test_table(self, shell: Shell, src: Path) -> None:
        out, _ = shell("inspect", src)
        assert all(text in out for text in ("huggingface", "llama", "39 tensors", "3 files", "float32"))
        assert Q0 not in out

    def test_tensors(self, shell: Shell, src: Path) -> None:
        out, _ = shell("inspect", src, "--tensors")
        assert Q0 in out
        assert "(64, 64)" in out or "[64, 64]" in out

    def test_json(self, shell: Shell, src: Path) -> None:
        found = shell.json("inspect", src)
        assert (found["format"], found["dialect"], found["container"], found["family"]) == (
            "huggingface",
            "huggingface",
            "safetensors",
            "llama",
        )
        assert (found["tensors"], found["files"], found["bytes"]) == (39, 3, sw.open(src).nbytes)
        assert found["dtypes"] == {"float32": found["bytes"]}
        assert found["layout"]["tp"] == 1
        assert found["config"]["num_hidden_layers"] == 4
        assert (found["padded_vocab"], found["quantization"], found["dropped"], found["warnings"]) == (None, None, [], [])
        assert "stored" not in found

    def test_json_tensors(self, shell: Shell, src: Path) -> None:
        stored = shell.json("inspect", src, "--tensors")["stored"]
        assert len(stored) == 39
        entry = next(t for t in stored if t["name"] == Q0)
        assert (entry["rank"], entry["dtype"], entry["shape"]) == (0, "float32", [64, 64])
        assert entry["file"].endswith(".safetensors")

    def test_names_with_brackets_are_printed_as_they_are(self, shell: Shell, tmp_path: Path) -> None:
        folder = tiny_llama(tmp_path / "a [red]b", layers=1)
        assert "[red]b" in shell("inspect", folder)[0]
        assert "o [bold]ut" in shell("convert", folder, tmp_path / "o [bold]ut", "--to", "ranks")[1]


class TestPlan:
    def test_nothing_is_written(self, shell: Shell, src: Path, tmp_path: Path) -> None:
        out, err = shell("plan", src, tmp_path / "out", "--to", "megatron-legacy", "--tp", 2, "--pp", 2)
        assert out == ""
        assert all(text in err for text in ("warning", "tp 2 × pp 2", "tiles", "memory"))
        assert not list(tmp_path.iterdir())

    def test_json(self, shell: Shell, src: Path) -> None:
        found = shell.json("plan", src, "--to", "megatron-legacy", "--tp", 2)
        assert list(found) == PLAN_FIELDS
        assert (found["source_format"], found["target_format"], found["family"]) == ("huggingface", "megatron-legacy", "llama")
        assert found["source_layout"] == sw.Layout().to_json()
        assert found["target_layout"] == sw.Layout(tp=2).to_json()
        assert found["read_amplification"] == found["write_amplification"] == 1.0
        assert found["base_bytes"] <= found["min_memory_bytes"] <= found["peak_bytes"]

    def test_save_and_convert(self, shell: Shell, src: Path, tmp_path: Path) -> None:
        file, out = tmp_path / "plan.json", tmp_path / "out"
        planned = shell.json("plan", src, out, "--to", "ranks", "--save", file)
        assert "wrote" in shell("plan", src, out, "--to", "ranks", "--save", file)[1]
        found = shell.json("convert", "--plan", file, "--memory", "256MiB", "--workers", 1, "--verify")
        assert {k: found[k] for k in ("tiles", "bytes_read", "bytes_written", "tensors")} == {
            k: planned[k] for k in ("tiles", "bytes_read", "bytes_written", "tensors")
        }
        assert found["verified"] == {"level": "values", "tensors": 39, "equal": 39}
        assert "done already" in shell("convert", "--plan", file)[1]

    def test_html(self, shell: Shell, src: Path, tmp_path: Path) -> None:
        shell("plan", src, "--to", "ranks", "--html", tmp_path / "plan.html")
        assert "<html" in (tmp_path / "plan.html").read_text()

    def test_synth_first(self, shell: Shell, src: Path, tmp_path: Path) -> None:
        shell("synth", src / "config.json", tmp_path / "sparse", "--sparse")
        assert shell.json("plan", tmp_path / "sparse", "--to", "ranks")["tensors"] == 39


class TestConvert:
    def test_says_what_it_does(self, shell: Shell, src: Path, tmp_path: Path) -> None:
        out, err = shell("convert", src, tmp_path / "out", "--to", "ranks", "--verify")
        assert out == ""
        assert "done" in err and "verified" in err
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    def test_json(self, shell: Shell, src: Path, tmp_path: Path) -> None:
        found = shell.json("convert", src, tmp_path / "out", "--to", "ranks")
        assert list(found) == [*PLAN_FIELDS, "seconds", "bytes_per_second", "peak_rss_bytes", "tiles_resumed"]
        assert found["seconds"] > 0
        assert found["bytes_per_second"] == found["bytes_written"] / found["seconds"]
        assert found["peak_rss_bytes"] > 10**6
        assert found["tiles_resumed"] == 0
        written = sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file())
        assert found["target_bytes"] <= written

    def test_onto_a_finished_target(self, shell: Shell, src: Path, tmp_path: Path) -> None:
        shell("convert", src, tmp_path / "out", "--to", "ranks")
        before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
        assert "done already" in shell("convert", src, tmp_path / "out", "--to", "ranks")[1]
        assert shell.json("convert", src, tmp_path / "out", "--to", "ranks", "--verify")["verified"]["equal"] == 39
        assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before
        shell("convert", src, tmp_path / "out", "--to", "ranks", "--dtype", "bf16", code=3)
        shell("convert", src, tmp_path / "out", "--to", "ranks", "--dtype", "bf16", "--overwrite", "--verify")
        assert sw.open(tmp_path / "out")[Q0].dtype == "bfloat16"

    @pytest.mark.parametrize(
        ("options", "check"),
        [
            (
                ("--to", "ranks", "--dialect", "megatron", "--megatron-spec", "local"),
                lambda t: "decoder.layers.0.input_layernorm.weight" in t,
            ),
            (("--to", "ranks", "--dialect", "megatron"), lambda t: "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in t),
            (("--to", "ranks", "--dtype", "float16"), lambda t: t[Q0].dtype.itemsize == 2),
            (("--to", "ranks", "--quantize", "int8"), lambda t: f"{Q0}_scale" in t),
            (("--to", "ranks", "--pad-vocab-to", "256"), lambda t: t["model.embed_tokens.weight"].shape == (256, 64)),
            (("--to", "ranks", "--memory", "256 MiB", "--workers", "1", "--trust-replicas"), lambda t: Q0 in t),
        ],
    )
    def test_options(self, shell: Shell, src: Path, tmp_path: Path, options: tuple[str, ...], check: Any) -> None:
        shell("convert", src, tmp_path / "out", *options, "--verify")
        assert check(load_file(tmp_path / "out/rank_00000_tp0_pp0.safetensors"))

    def test_zarr(self, shell: Shell, src: Path, tmp_path: Path) -> None:
        shell("convert", src, tmp_path / "out", "--to", "ranks", "--container", "zarr", "--verify")
        assert (tmp_path / "out/rank_00000_tp0_pp0/zarr.json").is_file()

    def test_shard_size(self, shell: Shell, src: Path, tmp_path: Path) -> None:
        found = shell.json("convert", src, tmp_path / "out", "--to", "huggingface", "--max-shard-size", "100KB", "--verify")
        files = sorted((tmp_path / "out").glob("*.safetensors"))
        assert 5 < len(files) < found["files"]
        assert all(p.stat().st_size < 110_000 for p in files)

    def test_uneven_stages(self, shell: Shell, src: Path, tmp_path: Path) -> None:
        shell("convert", src, tmp_path / "out", "--to", "megatron-legacy", "--pp", 2, "--pp-layers", "1,3", "--verify")
        assert sw.open(tmp_path / "out").layout == sw.Layout(pp=2, stages=(1, 3))

    def test_virtual_pipeline(self, shell: Shell, src: Path, tmp_path: Path) -> None:
        shell("convert", src, tmp_path / "out", "--to", "megatron-legacy", "--pp", 2, "--vpp", 2, "--verify")
        assert sw.open(tmp_path / "out").layout == sw.Layout(pp=2, vpp=2)

    def test_layout_file(self, shell: Shell, src: Path, tmp_path: Path) -> None:
        (tmp_path / "layout.json").write_text('{"tp": 2, "pp": 2, "stages": [3, 1]}')
        shell("convert", src, tmp_path / "out", "--to", "megatron-legacy", "--layout", tmp_path / "layout.json", "--verify")
        assert sw.open(tmp_path / "out").layout == sw.Layout(tp=2, pp=2, stages=(3, 1))

    def test_config_and_family(self, shell: Shell, src: Path, tmp_path: Path) -> None:
        (tmp_path / "bare").mkdir()
        for path in src.glob("model*"):
            os.link(path, tmp_path / "bare" / path.name)
        hints = ("--config", src / "config.json", "--family", "llama")
        shell("inspect", tmp_path / "bare", *hints)
        shell("convert", tmp_path / "bare", tmp_path / "out", "--to", "ranks", *hints, "--verify")
        assert shell.json("verify", tmp_path / "out", tmp_path / "bare", *hints)["equal"] == 39


class TestVerify:
    @pytest.fixture
    def out(self, src: Path, tmp_path: Path) -> Path:
        sw.convert(src, tmp_path / "out", to="ranks", layout=sw.Layout(tp=2), pad_vocab_to=2)
        return tmp_path / "out"

    def test_bytes(self, shell: Shell, out: Path) -> None:
        found = shell.json("verify", out)
        assert found == {"level": "bytes", "tensors": 78, "equal": 78, "different": [], "missing": [], "extra": []}
        assert "checksums that were recorded" in shell("verify", out)[1]

    def test_names(self, shell: Shell, out: Path) -> None:
        """A target of an older version carries no checksums."""
        said = json.loads((out / "shardwright.json").read_text())
        del said["checksums"]
        (out / "shardwright.json").write_text(json.dumps(said))
        found = shell.json("verify", out)
        assert found == {"level": "names", "tensors": 78, "equal": 0, "different": [], "missing": [], "extra": []}
        assert "no checksums are recorded" in shell("verify", out)[1]

    def test_values(self, shell: Shell, src: Path, out: Path) -> None:
        found = shell.json("verify", out, src, "--memory", "256MiB", "--workers", 1)
        assert found == {"level": "values", "tensors": 78, "equal": 78, "different": [], "missing": [], "extra": []}

    def test_flipped_byte(self, shell: Shell, src: Path, out: Path) -> None:
        path = out / "rank_00001_tp1_pp0.safetensors"
        with safe_open(path, "pt") as file:
            assert Q0 in list(file.keys())
        data = bytearray(path.read_bytes())
        size = int.from_bytes(data[:8], "little")
        begin = json.loads(data[8 : 8 + size])[Q0]["data_offsets"][0]
        data[8 + size + begin + 4 * 70 + 1] ^= 1
        path.write_bytes(data)
        found = shell.json("verify", out, src, code=4)
        assert (found["level"], found["tensors"], found["equal"]) == ("values", 78, 77)
        assert len(found["different"]) == 1
        assert all(text in found["different"][0] for text in (Q0, "@1", "70", path.name))
        _, err = shell("verify", out, src, code=4)
        assert Q0 in err and "VerificationError" in err

    def test_another_layout_is_no_difference_of_the_source(self, shell: Shell, src: Path, out: Path, tmp_path: Path) -> None:
        shell("convert", out, tmp_path / "back", "--to", "huggingface", "--verify")
        assert shell.json("verify", tmp_path / "back", src)["equal"] == 39
        assert shell.json("verify", out, tmp_path / "back")["equal"] == 78

    def test_other_source(self, shell: Shell, out: Path, tmp_path: Path) -> None:
        found = shell.json("verify", out, tiny_llama(tmp_path / "other", layers=3), code=4)
        assert found["level"] == "names"
        assert any("layers.3" in name for name in found["extra"])

    def test_missing_file(self, shell: Shell, src: Path, out: Path) -> None:
        (out / "rank_00001_tp1_pp0.safetensors").unlink()
        assert shell.json("verify", out, src, code=3)["error"]["type"] == "CheckpointError"


class TestExplain:
    @pytest.mark.parametrize("name", [Q0, "decoder.layers.0.self_attention.linear_qkv.weight"])
    def test_names_both_sides(self, shell: Shell, src: Path, name: str) -> None:
        out, _ = shell("explain", src, "--to", "megatron-legacy", "--tp", 2, name)
        assert Q0 in out
        assert "linear_qkv.weight" in out

    def test_unknown(self, shell: Shell, src: Path) -> None:
        _, err = shell("explain", src, "--to", "ranks", "model.layers.0.self_attn.q_proj.weights", code=2)
        assert Q0 in err


class TestSynth:
    def test_random(self, shell: Shell, src: Path, tmp_path: Path) -> None:
        assert str(tmp_path / "made") in shell("synth", src / "config.json", tmp_path / "made", "--dtype", "bf16", "--seed", 7)[1].replace(
            " ", ""
        )
        tensors = load_file(tmp_path / "made/model.safetensors")
        assert {name: t.shape for name, t in tensors.items()} == {name: t.shape for name, t in sw.open(src).items()}
        assert all(t.isfinite().all() and t.dtype.itemsize == 2 for t in tensors.values())
        shell("convert", tmp_path / "made", tmp_path / "out", "--to", "megatron-legacy", "--verify")

    def test_sparse(self, shell: Shell, src: Path, tmp_path: Path) -> None:
        shell("synth", src, tmp_path / "made", "--sparse", "--max-shard-size", "200KB")
        found = shell.json("plan", tmp_path / "made", "--to", "ranks", "--pp", 2)
        assert found["tensors"] == 39
        assert sum(p.stat().st_blocks for p in (tmp_path / "made").iterdir()) * 512 < found["source_bytes"] / 2

    def test_refusals(self, shell: Shell, src: Path, tmp_path: Path) -> None:
        (tmp_path / "made").mkdir()
        (tmp_path / "made/precious").write_text("mine")
        assert "TargetExistsError" in shell("synth", src, tmp_path / "made", code=3)[1]
        (tmp_path / "config.json").write_text("{}")
        assert "model_type" in shell("synth", tmp_path / "config.json", tmp_path / "new", code=3)[1]
        assert not (tmp_path / "new").exists()
        shell("synth", src, tmp_path / "new", "--dtype", "float15", code=2)


class TestListings:
    def test_formats(self, shell: Shell) -> None:
        found = shell.json("formats")
        assert list(found) == [
            "huggingface",
            "ranks",
            "megatron-legacy",
            "deepspeed-mp",
            "megatron-deepspeed",
            "deepspeed-zero",
            "deepspeed-universal",
        ]
        assert found["ranks"]["ranks"] is True
        assert {"safetensors", "zarr"} <= set(found["ranks"]["containers"])
        assert {"huggingface", "megatron"} <= set(found["ranks"]["dialects"])
        assert "megatron-legacy" in shell("formats")[0]

    def test_families(self, shell: Shell) -> None:
        found = shell.json("families")
        assert {"llama", "mistral", "qwen2", "qwen3"} <= set(found)
        tensor = next(t for t in found["llama"]["tensors"] if t["name"].endswith("q_proj.weight"))
        assert tensor["shape"] == ["num_attention_heads * head_dim", "hidden_size"]
        assert "LlamaForCausalLM" in shell("families")[0]

    def test_schemes(self, shell: Shell) -> None:
        assert shell.json("schemes")["int8"]["config"]["format"] == "int-quantized"
        assert "int8" in shell("schemes")[0]


def test_demo(shell: Shell, tmp_path: Path) -> None:
    _, err = shell("demo", tmp_path / "demo")
    assert "bit-identical" in err
    assert {"llama", "megatron", "back"} <= {p.name for p in (tmp_path / "demo").iterdir()}


SLOW = """
import os, sys, time
real = os.pwrite
def slow(*args):
    time.sleep(0.02)
    return real(*args)
os.pwrite = slow
from shardwright.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("as_json", [False, True])
def test_signals(tmp_path: Path, number: signal.Signals, as_json: bool) -> None:
    config = tiny_llama(tmp_path / "tiny", layers=4, hidden=512)
    args = ["convert", str(config), str(tmp_path / "out"), "--to", "ranks", *(["--json"] if as_json else [])]
    run = subprocess.Popen([sys.executable, "-c", SLOW, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    data = tmp_path / "out.partial/data/rank_00000_tp0_pp0.safetensors"
    deadline = time.monotonic() + 30
    while not data.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    run.send_signal(number)
    out, err = run.communicate(timeout=30)
    assert run.returncode == 5, err
    assert number.name in err
    assert "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny"]
    if as_json:
        assert json.loads(out)["error"]["type"] == "StoppedError"
    else:
        assert out == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_while_planning(src: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Before anything is written a signal ends the command just as well."""
    code = f"""
import os, sys, shardwright.planner.passes.build as build
real = build.check
def check(plan):
    os.kill(os.getpid(), {int(number)})
    for _ in range(1000): pass
    real(plan)
build.check = check
from shardwright.cli import main
main(sys.argv[1:])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", str(src), str(tmp_path / "out"), "--to", "ranks", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 5
    assert json.loads(done.stdout)["error"]["type"] == "StoppedError"
    assert number.name in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_name_cannot_drive_the_terminal(shell: Shell, tmp_path: Path) -> None:
    _, err = shell("inspect", tmp_path / "\x1b]0;owned\x07", code=3)
    assert "\x1b" not in err and "\\x1b]0;owned\\x07" in err
