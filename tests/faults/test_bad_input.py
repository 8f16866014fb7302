"""Bad input, one kind at a time: refused before anything is written, with a message that says where, what and what to do.

Every case goes through the command's entry with ``--json`` and through the API: the exit code is 3, the error is of its
own class, standard output is one JSON object, no target and no partial one is left, and the source is as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import shardwright as sw
from shardwright import errors
from shardwright.cli import main
from tests.unit.tiny import tiny_llama

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Q0 = "model.layers.0.self_attn.q_proj.weight"


def tree(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, dict[str, Any]]:
    """A command with ``--json``: its exit code, and the one object on standard output."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*map(str, args), "--json"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    found = json.loads(lines[0])
    assert isinstance(found, dict)
    return int(stop.value.code or 0), found


class Bench:
    """A checkpoint to break, a place for the target, and the proof that a conversion is refused."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.capsys = root, capsys
        self.src, self.out = root / "src", root / "out"

    def llama(self, **config: Any) -> Path:
        return tiny_llama(self.src, **{"layers": 2, **config})

    def convert(self, *options: object, to: str = "ranks") -> tuple[int, dict[str, Any]]:
        return run(self.capsys, "convert", self.src, self.out, "--to", to, *options)

    def refused(
        self,
        kind: type[errors.ShardwrightError],
        *options: object,
        to: str = "ranks",
        code: int = 3,
        says: tuple[object, ...] = (),
        opening: Mapping[str, Any] | None = None,
        **call: Any,
    ) -> dict[str, Any]:
        """Refuse it twice. `options` are the command's, `opening` and `call` the API's; `says` must be in the message."""
        before, there = tree(self.src), sorted(self.root.iterdir())
        status, printed = self.convert(*options, to=to)
        error = printed["error"]
        print(error["message"])
        assert (status, error["type"]) == (code, kind.__name__), error
        with pytest.raises(kind) as caught:
            sw.convert(sw.open(self.src, **(opening or {})), self.out, to=to, **call)
        assert type(caught.value) is kind
        assert caught.value.exit_code == code
        assert str(caught.value) == error["message"]
        for text in says:
            assert str(text) in error["message"], (text, error["message"])
        assert tree(self.src) == before
        assert sorted(self.root.iterdir()) == there
        return error


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    return Bench(tmp_path, capsys)


def edit_header(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change a safetensors header, keeping the data."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    edit(header)
    made = json.dumps(header).encode()
    path.write_bytes(len(made).to_bytes(8, "little") + made + data[8 + size :])


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    found = json.loads(path.read_text())
    edit(found)
    path.write_text(json.dumps(found))


def edit_tensors(path: Path, edit: Callable[[dict[str, np.ndarray]], Any]) -> None:
    found = load_file(path)
    edit(found)
    save_file(found, path, {"format": "pt"})


class TestFiles:
    """The files themselves are broken, or do not belong together."""

    def test_truncated(self, bench: Bench) -> None:
        path = bench.llama() / TWO
        size = path.stat().st_size
        os.truncate(path, size - 5)
        bench.refused(errors.ContainerError, says=(TWO, "truncated", f"expected {size} bytes", f"actual {size - 5} bytes", "again"))

    def test_truncated_inside_the_header(self, bench: Bench) -> None:
        os.truncate(bench.llama() / TWO, 100)
        bench.refused(errors.ContainerError, says=(TWO, "ends inside its header", "actual 100 bytes"))

    def test_empty(self, bench: Bench) -> None:
        os.truncate(bench.llama() / TWO, 0)
        bench.refused(errors.ContainerError, says=(TWO, "the file is empty", "actual 0 bytes"))

    def test_empty_json(self, bench: Bench) -> None:
        os.truncate(bench.llama() / INDEX, 0)
        bench.refused(errors.CheckpointError, says=(INDEX, "the file is empty", "again"))

    @pytest.mark.parametrize(("shift", "says"), [(-64, "overlaps"), (64, "gap")])
    def test_overlap_and_gap(self, bench: Bench, shift: int, says: str) -> None:
        def move(header: dict[str, Any]) -> None:
            last = max((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"])
            header[last]["data_offsets"] = [n + shift for n in header[last]["data_offsets"]]

        edit_header(bench.llama() / TWO, move)
        bench.refused(errors.ContainerError, says=(TWO, says, "tensor '", "expected begin", "actual begin", "again"))

    def test_not_safetensors(self, bench: Bench) -> None:
        (bench.llama() / ONE).write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 4)
        bench.refused(errors.ContainerError, says=(ONE, "git lfs pull"))

    def test_index_names_a_missing_file(self, bench: Bench) -> None:
        (bench.llama() / TWO).unlink()
        bench.refused(errors.CheckpointError, says=(TWO, INDEX, "Download"))

    def test_index_names_a_missing_tensor(self, bench: Bench) -> None:
        edit_json(bench.llama() / INDEX, lambda i: i["weight_map"].update({"model.more.weight": ONE}))
        bench.refused(errors.CheckpointError, says=("'model.more.weight'", ONE, INDEX))

    def test_stale_index(self, bench: Bench) -> None:
        edit_json(bench.llama() / INDEX, lambda i: i["weight_map"].pop(Q0))
        bench.refused(errors.CheckpointError, says=(f"'{Q0}'", ONE, "stale"))

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "null", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": "b", "a": "b"}}']
    )
    def test_index_is_garbage(self, bench: Bench, text: str) -> None:
        (bench.llama() / INDEX).write_text(text)
        bench.refused(errors.CheckpointError, says=(INDEX,))

    def test_index_leaves_the_folder(self, bench: Bench) -> None:
        edit_json(bench.llama() / INDEX, lambda i: i["weight_map"].update({Q0: "../secret.safetensors"}))
        bench.refused(errors.CheckpointError, says=("../secret.safetensors",))

    def test_two_files_hold_one_key(self, bench: Bench) -> None:
        bench.llama()
        twin = load_file(bench.src / ONE)[Q0]
        edit_tensors(bench.src / TWO, lambda t: t.update({Q0: twin + 1}))
        bench.refused(errors.CheckpointError, says=(Q0, ONE, TWO, "Remove"))

    def test_two_files_hold_one_key_equally(self, bench: Bench) -> None:
        bench.llama()
        twin = load_file(bench.src / ONE)[Q0]
        edit_tensors(bench.src / TWO, lambda t: t.update({Q0: twin}))
        code, found = bench.convert("--verify")
        assert code == 0
        assert [d["name"] for d in found["dropped"]] == [f"{TWO}: {Q0}"]
        assert ONE in found["dropped"][0]["reason"]

    def test_no_checkpoint(self, bench: Bench) -> None:
        bench.src.mkdir()
        (bench.src / "notes.txt").write_text("nothing here")
        bench.refused(errors.CheckpointError, says=(bench.src, "huggingface", "megatron-legacy"))
        code, found = run(bench.capsys, "inspect", bench.src)
        assert (code, found["error"]["type"]) == (3, "CheckpointError")

    def test_no_such_source(self, bench: Bench) -> None:
        code, found = bench.convert()
        assert (code, found["error"]["type"]) == (3, "CheckpointError")
        assert str(bench.src) in found["error"]["message"]

    def test_unreadable(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        bench.llama()
        real = open

        def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
            if str(path).endswith(TWO):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *args, **kwargs)

        monkeypatch.setattr("shardwright.planner.store.open", refuse, raising=False)
        with pytest.raises(errors.CheckpointError, match="Permission denied") as caught:
            sw.open(bench.src)
        assert caught.value.file == TWO


class TestModel:
    """Headers and config do not fit together."""

    def test_wrong_shape(self, bench: Bench) -> None:
        bench.llama()
        edit_tensors(bench.src / ONE, lambda t: t.update({Q0: t[Q0][:, :32].copy()}))
        error = bench.refused(errors.ShapeMismatchError, says=(f"'{Q0}'", ONE, "expected (64, 64)", "actual (64, 32)"))
        assert (error["tensor"], error["expected"], error["actual"]) == (Q0, [64, 64], [64, 32])

    def test_config_contradicts_headers(self, bench: Bench) -> None:
        edit_json(bench.llama() / "config.json", lambda c: c.update(intermediate_size=128))
        bench.refused(errors.ShapeMismatchError, says=("model.layers.0.mlp.gate_proj.weight", "(128, 64)", "(96, 64)", "config"))

    def test_config_names_fewer_layers(self, bench: Bench) -> None:
        edit_json(bench.llama() / "config.json", lambda c: c.update(num_hidden_layers=1))
        bench.refused(errors.UnknownTensorError, says=("model.layers.1.", "--drop"))

    def test_unknown_tensor(self, bench: Bench) -> None:
        bench.llama()
        odd = "model.layers.0.self_attn.q_proj.weights"
        edit_tensors(bench.src / ONE, lambda t: t.update({odd: np.zeros((2, 3), np.float32)}))
        edit_json(bench.src / INDEX, lambda i: i["weight_map"].update({odd: ONE}))
        bench.refused(errors.UnknownTensorError, says=(f"'{odd}'", ONE, "float32 (2, 3)", f"Nearest rule: {Q0}", "--drop"))
        code, found = bench.convert("--drop", "*.weights")
        assert code == 0
        assert found["dropped"] == [{"name": odd, "reason": "left out with --drop"}]
        assert json.loads((bench.out / "shardwright.json").read_text())["dropped"] == found["dropped"]

    @pytest.mark.parametrize(("pattern", "why"), [("no.such.*", "no tensor"), (Q0, "needs")])
    def test_drop_in_vain_is_said(self, bench: Bench, pattern: str, why: str) -> None:
        bench.llama()
        code, found = bench.convert("--drop", pattern)
        assert code == 0
        assert any(pattern in text and why in text for text in found["warnings"])

    def test_missing_tensor(self, bench: Bench) -> None:
        bench.llama()
        edit_tensors(bench.src / ONE, lambda t: t.pop(Q0))
        edit_json(bench.src / INDEX, lambda i: i["weight_map"].pop(Q0))
        bench.refused(errors.MissingTensorError, says=(f"'{Q0}'", "(64, 64)", "config"))
        code, found = run(bench.capsys, "inspect", bench.src)
        assert (code, found["error"]["type"]) == (3, "MissingTensorError")

    def test_no_config(self, bench: Bench) -> None:
        (bench.llama() / "config.json").rename(bench.root / "config.json")
        bench.refused(errors.CheckpointError, says=(bench.src, "--config config.json"))
        code, _ = bench.convert("--config", bench.root / "config.json", "--verify")
        assert code == 0

    def test_unknown_model_type(self, bench: Bench) -> None:
        bench.llama(model_type="lama")
        bench.refused(errors.UnknownFamilyError, says=("'lama'", "config.json", "Nearest: llama", "--family"))
        assert bench.convert("--family", "llama")[0] == 0

    def test_no_model_type(self, bench: Bench) -> None:
        edit_json(bench.llama() / "config.json", lambda c: c.pop("model_type"))
        bench.refused(errors.ConfigError, says=("model_type", "config.json", "--family"))

    def test_unknown_family(self, bench: Bench) -> None:
        bench.llama()
        bench.refused(errors.UnknownFamilyError, "--family", "lama", opening={"family": "lama"}, says=("'lama'", "Nearest: llama"))

    @pytest.mark.parametrize("text", ["name = ", 'name = "mine"', 'name = "mine"\nextends = "nothing"', 'surprise = 1\nname = "mine"'])
    def test_family_table_is_garbage(self, bench: Bench, text: str) -> None:
        bench.llama()
        table = bench.root / "mine.toml"
        table.write_text(text)
        bench.refused(errors.TableError, "--family", table, opening={"family": table}, says=("mine.toml",))

    @pytest.mark.parametrize("value", [0, -1, "64", 1.5, True])
    def test_config_field_is_no_size(self, bench: Bench, value: object) -> None:
        bench.llama()
        edit_json(bench.src / "config.json", lambda c: c.update(hidden_size=value))
        bench.refused(errors.ConfigError, says=("hidden_size", "config.json", repr(value)))

    def test_config_lacks_a_field(self, bench: Bench) -> None:
        edit_json(bench.llama() / "config.json", lambda c: c.pop("hidden_size"))
        bench.refused(errors.ConfigError, says=("'hidden_size'", "config.json"))

    @pytest.mark.parametrize("text", ["", "{]", "[1]", '{"a": 1, "a": 2}', "[" * 100_000])
    def test_config_is_garbage(self, bench: Bench, text: str) -> None:
        (bench.llama() / "config.json").write_text(text)
        bench.refused(errors.CheckpointError, says=("config.json",))

    def test_tied_claim_with_another_head(self, bench: Bench) -> None:
        edit_json(bench.llama() / "config.json", lambda c: c.update(tie_word_embeddings=True))
        error = bench.refused(errors.ReplicaMismatchError, code=4, says=("model.embed_tokens.weight", "lm_head.weight", TWO))
        assert "tie_word_embeddings" in error["message"]

    def test_tied_claim_that_holds(self, bench: Bench) -> None:
        bench.llama()
        table = load_file(bench.src / ONE)["model.embed_tokens.weight"]
        edit_tensors(bench.src / TWO, lambda t: t.update({"lm_head.weight": table}))
        edit_json(bench.src / "config.json", lambda c: c.update(tie_word_embeddings=True))
        assert bench.convert("--verify", to="megatron-legacy")[0] == 0

    def test_quantised_by_somebody_else(self, bench: Bench) -> None:
        bench.llama(quantization_config={"quant_method": "gptq"})
        bench.refused(errors.UnsupportedError, says=("config.json", "gptq"))


class TestLayouts:
    """The model does not divide so, or rank files are not whole."""

    def test_heads(self, bench: Bench) -> None:
        bench.llama(heads=6, kv=6, hidden=96)
        bench.refused(
            errors.LayoutError, "--tp", 4, to="megatron-legacy", layout=sw.Layout(tp=4), says=("tp 4", "attention heads", "actual 6")
        )

    def test_kv_heads(self, bench: Bench) -> None:
        bench.llama(heads=12, kv=3, hidden=96)
        bench.refused(errors.LayoutError, "--tp", 2, to="megatron-legacy", layout=sw.Layout(tp=2), says=("tp 2", "3"))

    def test_vocabulary(self, bench: Bench) -> None:
        bench.llama()
        bench.refused(errors.LayoutError, "--tp", 2, layout=sw.Layout(tp=2), says=("vocabulary", "131", "--pad-vocab-to 2"))
        assert bench.convert("--tp", 2, "--pad-vocab-to", 2)[0] == 0

    def test_layers(self, bench: Bench) -> None:
        bench.llama(layers=4)
        bench.refused(errors.LayoutError, "--pp", 3, layout=sw.Layout(pp=3), says=("4 layers", "pp 3", "--pp-layers"))
        assert bench.convert("--pp", 3, "--pp-layers", "1,2,1")[0] == 0

    def test_stages_do_not_add_up(self, bench: Bench) -> None:
        bench.llama(layers=4)
        bench.refused(errors.LayoutError, "--pp", 2, "--pp-layers", "1,2", layout=sw.Layout(pp=2, stages=(1, 2)), says=("4 layers", "3"))

    def test_virtual_pipeline_without_a_pipeline(self, bench: Bench) -> None:
        bench.llama()
        code, found = bench.convert("--vpp", 2)
        assert (code, found["error"]["type"]) == (3, "LayoutError")
        assert "--pp" in found["error"]["message"]
        with pytest.raises(errors.LayoutError):
            sw.Layout(vpp=2)

    @pytest.mark.parametrize(
        "text", ["", "tp: 2", "[2]", '{"tp": "two"}', '{"tq": 2}', '{"tp": 0}', '{"pp": 2, "stages": 7}', '{"vpp": 2}']
    )
    def test_layout_file_is_garbage(self, bench: Bench, text: str) -> None:
        bench.llama()
        file = bench.root / "layout.json"
        file.write_text(text)
        code, found = bench.convert("--layout", file)
        print(found["error"]["message"])
        assert (code, found["error"]["type"]) == (3, "LayoutError")
        assert str(file) in found["error"]["message"]
        assert not bench.out.exists()

    @pytest.mark.parametrize("to", ["ranks", "megatron-legacy"])
    def test_missing_ranks(self, bench: Bench, to: str) -> None:
        whole = tiny_llama(bench.root / "whole", layers=3, hidden=96, heads=12, kv=4)
        sw.convert(whole, bench.src, to=to, layout=sw.Layout(tp=4, pp=3), pad_vocab_to=4)
        ranks = sorted(bench.src.glob("rank_*" if to == "ranks" else "release/mp_rank_*"))
        assert len(ranks) == 12
        shutil.rmtree(ranks[10]) if ranks[10].is_dir() else ranks[10].unlink()
        number = 10 if to == "ranks" else 7  # release/ sorts by tp first: mp_rank_03_001
        axes = "(tp 2, pp 2)" if to == "ranks" else "(tp 3, pp 1)"
        bench.refused(errors.CheckpointError, to="huggingface", says=("12 ranks (tp 4, pp 3)", f"missing: rank {number} {axes}", "Copy"))

    def test_ranks_are_numbers(self, bench: Bench) -> None:
        """Rank 2 comes before rank 10, whatever the folders' names sort like."""
        whole = tiny_llama(bench.root / "whole", layers=2, hidden=96, heads=12, kv=12)
        sw.convert(whole, bench.src, to="megatron-legacy", layout=sw.Layout(tp=12))
        for path in sorted((bench.src / "release").iterdir()):
            path.rename(path.with_name(path.name.replace("mp_rank_", "mp_rank_0")))  # as wide as somebody's script wrote them
        assert bench.convert("--verify", to="huggingface")[0] == 0
        for name, array in {**load_file(whole / ONE), **load_file(whole / TWO)}.items():
            assert np.array_equal(sw.open(bench.out)[name].numpy(), array)

    def test_rank_of_another_layout(self, bench: Bench) -> None:
        whole = tiny_llama(bench.root / "whole", layers=2)
        sw.convert(whole, bench.src, to="ranks", layout=sw.Layout(tp=2), pad_vocab_to=2)
        shutil.copy(bench.src / "rank_00000_tp0_pp0.safetensors", bench.src / "rank_00002_tp2_pp0.safetensors")
        bench.refused(errors.CheckpointError, to="huggingface", says=("2 ranks (tp 2)", "too many: rank 2", "Remove"))

    def test_foreign_megatron_without_a_vocabulary(self, bench: Bench) -> None:
        foreign_megatron(bench, lambda args: args.pop("vocab_size"))
        bench.refused(
            errors.ConfigError, to="huggingface", says=("vocabulary", "padded_vocab_size 256", "--vocab-size N", "model_optim_rng.pt")
        )
        assert bench.convert("--vocab-size", 131, to="huggingface")[0] == 0
        assert sw.open(bench.out).config["vocab_size"] == 131

    def test_foreign_megatron_that_no_family_describes(self, bench: Bench) -> None:
        foreign_megatron(bench, lambda args: args.update(normalization="LayerNorm"))
        bench.refused(errors.UnsupportedError, to="huggingface", says=("normalization", "LayerNorm", "RMSNorm"))

    def test_tracker_names_a_missing_folder(self, bench: Bench) -> None:
        foreign_megatron(bench, lambda args: None)
        (bench.src / "latest_checkpointed_iteration.txt").write_text("120")
        bench.refused(errors.CheckpointError, to="huggingface", says=("latest_checkpointed_iteration.txt", "iter_0000120"))

    def test_replicas_differ(self, bench: Bench) -> None:
        whole = tiny_llama(bench.root / "whole", layers=2)
        sw.convert(whole, bench.src, to="ranks", layout=sw.Layout(tp=2), pad_vocab_to=2)
        norm = "model.layers.1.input_layernorm.weight"
        edit_tensors(bench.src / "rank_00001_tp1_pp0.safetensors", lambda t: t[norm].__setitem__(3, t[norm][3] + 1))
        bench.refused(
            errors.ReplicaMismatchError, to="huggingface", code=4,
            says=(f"'{norm}'", "rank_00000_tp0_pp0.safetensors", "rank_00001_tp1_pp0.safetensors", "--trust-replicas"),
        )  # fmt: skip
        code, found = bench.convert("--trust-replicas", to="huggingface")
        assert code == 0
        assert any(norm in d["name"] and "trust" in d["reason"] for d in found["dropped"])
        assert np.array_equal(sw.open(bench.out)[norm].numpy(), sw.open(whole)[norm].numpy())


def foreign_megatron(bench: Bench, edit: Callable[[dict[str, Any]], Any]) -> None:
    """A Megatron checkpoint as Megatron writes it, without anything of ours in it."""
    whole = tiny_llama(bench.root / "whole", layers=2)
    sw.convert(whole, bench.src, to="megatron-legacy")
    (bench.src / "shardwright.json").unlink()
    shutil.rmtree(bench.src / "hf")
    path = bench.src / "release/mp_rank_00/model_optim_rng.pt"
    with torch.serialization.safe_globals([__import__("argparse").Namespace]):
        loaded = torch.load(path, weights_only=True)
    edit(vars(loaded["args"]))
    torch.save(loaded, path)


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


class TestHarm:
    """Files that mean harm."""

    @pytest.mark.parametrize("index", [False, True])
    def test_pickle_that_runs_code(self, bench: Bench, index: bool) -> None:
        bench.llama(shards=1)
        marker = bench.root / "marker"
        tensors: dict[str, Any] = {k: torch.from_numpy(v) for k, v in load_file(bench.src / "model.safetensors").items()}
        (bench.src / "model.safetensors").unlink()
        name = "pytorch_model-00001-of-00001.bin" if index else "pytorch_model.bin"
        torch.save({**tensors, "more": Hostile(f"touch {marker}")}, bench.src / name)
        if index:
            (bench.src / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
        bench.refused(errors.UnsafePickleError, says=(name, "system"))
        assert not marker.exists()
        with pytest.raises(pickle.UnpicklingError):
            sw.open(bench.src)

    def test_megatron_pickle_that_runs_code(self, bench: Bench) -> None:
        marker = bench.root / "marker"
        path = bench.src / "release/mp_rank_00/model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        torch.save({"args": Hostile(f"touch {marker}"), "model": {}}, path)
        bench.refused(errors.UnsafePickleError, to="huggingface", says=("model_optim_rng.pt", "system"))
        assert not marker.exists()

    def test_identity_that_lies(self, bench: Bench) -> None:
        whole = tiny_llama(bench.root / "whole", layers=2)
        sw.convert(whole, bench.src, to="ranks", layout=sw.Layout(tp=2), pad_vocab_to=2)
        edit_json(bench.src / "shardwright.json", lambda i: i["layout"].update(tp=1, pp=2))
        bench.refused(errors.ShapeMismatchError, to="huggingface", says=("rank_0000", "layout"))

    @pytest.mark.parametrize(
        "edit", [{"schema": 99}, {"layout": None}, {"layout": {"tp": "x"}}, {"dialect": "none"}, {"config": {}}, {"spec": "odd"}]
    )
    def test_identity_is_garbage(self, bench: Bench, edit: dict[str, Any]) -> None:
        whole = tiny_llama(bench.root / "whole", layers=2)
        sw.convert(whole, bench.src, to="ranks", dialect="megatron")
        shutil.rmtree(bench.src / "hf")
        edit_json(bench.src / "shardwright.json", lambda i: i.update(edit))
        if edit == {"spec": "odd"}:
            assert bench.convert(to="huggingface")[0] == 0  # the headers say it themselves
            return
        code, found = bench.convert(to="huggingface")
        print(found["error"]["message"])
        assert code == 3
        assert "shardwright.json" in found["error"]["message"]
        assert not bench.out.exists()


class TestTargets:
    """The target cannot be where it should be."""

    def test_holds_something(self, bench: Bench) -> None:
        bench.llama()
        bench.out.mkdir()
        (bench.out / "precious").write_text("mine")
        bench.refused(errors.TargetExistsError, says=(bench.out, "--overwrite"))
        assert (bench.out / "precious").read_text() == "mine"
        assert bench.convert("--overwrite")[0] == 0
        assert not (bench.out / "precious").exists()
        assert not (bench.root / "out.partial").exists()
        assert sw.open(bench.out).format == "ranks"

    def test_empty_folder_is_free(self, bench: Bench) -> None:
        bench.llama()
        bench.out.mkdir()
        assert bench.convert()[0] == 0

    def test_is_a_file(self, bench: Bench) -> None:
        bench.llama()
        bench.out.write_text("mine")
        bench.refused(errors.TargetExistsError, "--overwrite", overwrite=True, says=(bench.out, "not a folder"))
        assert bench.out.read_text() == "mine"

    @pytest.mark.parametrize("inside", ["out", "deep/out", "", "."])
    def test_inside_the_source(self, bench: Bench, inside: str) -> None:
        bench.llama()
        bench.out = bench.src / inside
        bench.refused(errors.TargetError, "--overwrite", overwrite=True, says=(bench.src,))

    def test_source_inside_it(self, bench: Bench) -> None:
        tiny_llama(bench.root / "all/src", layers=2)
        bench.src, bench.out = bench.root / "all/src", bench.root / "all"
        bench.refused(errors.TargetError, "--overwrite", overwrite=True, says=("holds the source", "elsewhere"))

    def test_working_directory(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        bench.llama()
        bench.out.mkdir()
        monkeypatch.chdir(bench.out)
        bench.out = Path()
        bench.refused(errors.TargetError, "--overwrite", overwrite=True, says=("working directory",))

    def test_no_parent(self, bench: Bench) -> None:
        bench.llama()
        bench.out = bench.root / "not/there"
        bench.refused(errors.TargetError, says=(bench.root / "not", "Create it"))

    def test_disk_too_small(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        bench.llama()
        real = os.statvfs(bench.root)
        monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((*real[:3], 5, 5, *real[5:])))
        error = bench.refused(errors.DiskSpaceError, says=(bench.root, "room", f"actual {5 * real.f_frsize} bytes"))
        assert int(error["expected"].split()[0]) > 5 * real.f_frsize

    def test_memory_too_small(self, bench: Bench) -> None:
        bench.llama()
        error = bench.refused(errors.MemoryBoundError, "--memory", "1MiB", memory="1MiB", says=("1048576", "--memory"))
        smallest = error["expected"]
        assert str(smallest) in error["message"]
        code, _ = bench.convert("--memory", smallest - 1)
        assert code == 3
        assert bench.convert("--memory", smallest)[0] == 0

    def test_memory_that_the_remedy_names_works(self, bench: Bench) -> None:
        bench.llama()
        remedy = bench.refused(errors.MemoryBoundError, "--memory", "1MiB", memory="1MiB")["remedy"]
        size = next(word for word in remedy.split() if word.endswith("MiB"))
        assert bench.convert("--memory", size)[0] == 0


class TestSavedPlans:
    """A plan from yesterday."""

    @pytest.fixture
    def saved(self, bench: Bench) -> Path:
        file = bench.root / "plan.json"
        sw.plan(bench.llama(), bench.out, to="ranks").save(file)
        return file

    def refused(self, bench: Bench, file: Path, *says: object) -> None:
        code, found = run(bench.capsys, "convert", "--plan", file)
        print(found["error"]["message"])
        assert (code, found["error"]["type"]) == (3, "PlanError")
        for text in says:
            assert str(text) in found["error"]["message"]
        with pytest.raises(errors.PlanError) as caught:
            sw.load_plan(file).execute()
        assert str(caught.value) == found["error"]["message"]
        assert not bench.out.exists()
        assert not bench.out.with_name("out.partial").exists()

    def test_it_runs(self, bench: Bench, saved: Path) -> None:
        assert run(bench.capsys, "convert", "--plan", saved)[0] == 0
        assert run(bench.capsys, "verify", bench.out, bench.src)[0] == 0

    def test_source_was_touched(self, bench: Bench, saved: Path) -> None:
        found = (bench.src / TWO).stat()
        os.utime(bench.src / TWO, ns=(found.st_atime_ns, found.st_mtime_ns + 10**9))
        self.refused(bench, saved, TWO, "changed since it was planned", "modified", "UTC", "Plan again")

    def test_source_grew(self, bench: Bench, saved: Path) -> None:
        size = (bench.src / ONE).stat().st_size
        with (bench.src / ONE).open("ab") as file:
            file.write(b"more")
        self.refused(bench, saved, ONE, f"expected {size} bytes", f"actual {size + 4} bytes", "Plan again")

    def test_source_is_gone(self, bench: Bench, saved: Path) -> None:
        (bench.src / ONE).unlink()
        self.refused(bench, saved, ONE, "Plan again")

    @pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"plan_format": 1}', "\x00", "[" * 100_000])
    def test_garbage(self, bench: Bench, saved: Path, text: str) -> None:
        saved.write_text(text)
        self.refused(bench, saved)

    def test_edited(self, bench: Bench, saved: Path) -> None:
        edit_json(saved, lambda p: p["tiles"].update(hi0=[1]))
        self.refused(bench, saved)

    def test_not_there(self, bench: Bench, saved: Path) -> None:
        saved.unlink()
        self.refused(bench, saved, saved)

    def test_a_choice_beside_it(self, bench: Bench, saved: Path) -> None:
        code, found = run(bench.capsys, "convert", "--plan", saved, "--tp", 2)
        assert (code, found["error"]["type"]) == (2, "UsageError")
        assert "--tp" in found["error"]["message"]


class TestUsage:
    """Calls that make no sense exit with 2, and write nothing either."""

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (("--to", "rank"), ("'rank'", "ranks", "huggingface")),
            ((), ("--to",)),
            (("--to", "ranks", "--dialect", "megatrom"), ("'megatrom'", "megatron")),
            (("--to", "ranks", "--container", "tar"), ("'tar'", "safetensors")),
            (("--to", "huggingface", "--container", "zarr"), ("'zarr'", "safetensors")),
            (("--to", "megatron-legacy", "--megatron-spec", "tee"), ("'tee'", "te")),
            (("--to", "ranks", "--megatron-spec", "te"), ("te", "huggingface")),
            (("--to", "huggingface", "--tp", "2"), ("huggingface", "--to ranks")),
            (("--to", "ranks", "--tp", "0"), ("--tp",)),
            (("--to", "ranks", "--tp", "two"), ("--tp", "'two'")),
            (("--to", "ranks", "--nonsense"), ("--nonsense",)),
            (("--to", "ranks", "--dtype", "float15"), ("'float15'", "float16")),
            (("--to", "ranks", "--dtype", "int8"), ("int8",)),
            (("--to", "ranks", "--quantize", "int7"), ("'int7'", "int8")),
            (("--to", "megatron-legacy", "--quantize", "int8"), ("megatron", "quantised")),
            (("--to", "ranks", "--memory", "much"), ("'much'", "GiB")),
            (("--to", "huggingface", "--max-shard-size", "5XB"), ("'5XB'",)),
            (("--to", "ranks", "--pp", "2", "--pp-layers", "1;1"), ("--pp-layers", "1;1")),
            (("--to", "ranks", "--layout", "nowhere.json"), ("nowhere.json",)),
            (("--to", "ranks", "--scheduler", "tcp://127.0.0.1:1"), ("127.0.0.1:1",)),
            (("--to", "ranks", "--workers", "0"), ("--workers",)),
        ],
    )
    def test_convert(self, bench: Bench, options: tuple[str, ...], says: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("shardwright.executors.cluster._PATIENCE", 1)
        bench.llama()
        code, found = run(bench.capsys, "convert", bench.src, bench.out, *options)
        print(found["error"]["message"])
        assert (code, found["error"]["type"]) == (2, "UsageError")
        for text in says:
            assert text in found["error"]["message"]
        assert sorted(p.name for p in bench.root.iterdir()) == ["src"]

    @pytest.mark.parametrize(
        "args", [("inspect",), ("nonsense",), ("convert",), ("plan", "x"), ("verify",), ("explain", "x"), ("synth", "x")]
    )
    def test_arguments(self, bench: Bench, args: tuple[str, ...]) -> None:
        code, found = run(bench.capsys, *args)
        assert (code, found["error"]["type"]) == (2, "UsageError")

    def test_layout_file_and_sizes(self, bench: Bench) -> None:
        bench.llama()
        (bench.root / "layout.json").write_text('{"tp": 2}')
        code, found = bench.convert("--layout", bench.root / "layout.json", "--tp", 2)
        assert (code, found["error"]["type"]) == (2, "UsageError")

    def test_a_word_that_api_does_not_know(self, bench: Bench) -> None:
        with pytest.raises(errors.UsageError, match="nonsense"):
            sw.plan(bench.llama(), bench.out, to="ranks", nonsense=1)

    def test_a_config_that_is_not_there(self, bench: Bench) -> None:
        code, found = run(bench.capsys, "inspect", bench.llama(), "--config", bench.root / "nope.json")
        assert (code, found["error"]["type"], bool(found["error"]["remedy"])) == (2, "UsageError", True)
        assert "nope.json" in found["error"]["message"]

    def test_a_saved_plan_has_a_target(self, bench: Bench) -> None:
        code, found = run(bench.capsys, "plan", bench.llama(), "--to", "ranks", "--save", bench.root / "plan.json")
        assert (code, found["error"]["type"], found["error"]["remedy"]) == (2, "UsageError", "Give OUT as well")
        assert not (bench.root / "plan.json").exists()

    @pytest.mark.parametrize("option", ["--save", "--html"])
    def test_plan_cannot_be_written(self, bench: Bench, option: str) -> None:
        bench.llama()
        code, found = run(bench.capsys, "plan", bench.src, bench.out, "--to", "ranks", option, bench.root / "not/there.file")
        assert (code, found["error"]["type"]) == (2, "UsageError")
        assert "there.file" in found["error"]["message"]
