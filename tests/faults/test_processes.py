"""The real command, from outside: signals, killed at any time, failing library calls, few descriptors.

The plan is saved beforehand with small tiles, so that a short run has many; `shim.c`, preloaded, makes library calls slow
or wrong.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shardwright as sw
from shardwright.errors import Refusal
from shardwright.executors.execute import execute
from shardwright.planner import codec
from shardwright.planner.identity import FILE_NAME
from shardwright.planner.passes.build import build
from shardwright.planner.request import Request
from tests.faults.scenes import MEMORY, Scene, digests, journal_of, make_scene, vouched
from tests.unit.tiny import tiny_llama

COMMAND = [str(Path(sys.executable).parent / "shardwright")]
IMPATIENT = "import sys; from shardwright.executors import ledger; ledger.BATCH_BYTES = 1 << 20; from shardwright.cli import main; main()"
"""The command with batches that a short run closes many of."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scenes") / "ranks", "ranks")


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library to preload."""
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("the shim needs Linux and gcc")
    made = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", made, Path(__file__).with_name("shim.c"), "-ldl"], check=True)
    return made


class Command:
    """``shardwright convert --plan`` on one target."""

    def __init__(self, scene: Scene, folder: Path, shim: Path | None = None) -> None:
        self.scene, self.folder, self.out, self.shim = scene, folder, folder / "out", shim
        self.command, self.partial = COMMAND, folder / "out.partial"
        self.plan, self.hit = folder / "plan.json", folder / "hit"
        codec.save(scene.plan, self.plan, target_root=str(self.out))

    def start(self, *words: str, **faults: Any) -> subprocess.Popen[str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith("FAULT_")}
        env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
        if faults:
            env |= {
                "LD_PRELOAD": str(self.shim),
                "FAULT_HIT": str(self.hit),
                **{f"FAULT_{name.upper()}": str(value) for name, value in faults.items()},
            }
        words = words or ("--plan", str(self.plan))
        return subprocess.Popen(
            [*self.command, "convert", *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder
        )

    def run(self, *words: str, **faults: Any) -> tuple[int, str, str]:
        with self.start(*words, **faults) as process:
            out, err = process.communicate(timeout=120)
        print(err)
        return process.returncode, out, err

    def working(self, process: subprocess.Popen[str]) -> None:
        """Wait until tiles are being written."""
        self.until(process, (self.partial / "journal").exists)
        before = digests(self.partial / "data")
        self.until(process, lambda: digests(self.partial / "data") != before)

    def until(self, process: subprocess.Popen[str], true: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not true():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.005)

    def finish(self) -> None:
        status, _, err = self.run()
        assert status == 0, err
        self.scene.done(self.out)


@pytest.fixture
def command(scene: Scene, tmp_path: Path, shim: Path) -> Command:
    return Command(scene, tmp_path, shim)


class TestSignals:
    """Ctrl-C and SIGTERM."""

    SLOW = {"call": "pwrite", "path": "/data/", "delay": 4000}  # noqa: RUF012

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_running_tiles_are_finished_and_the_command_to_resume_is_printed(self, command: Command, number: signal.Signals) -> None:
        with command.start(**self.SLOW) as process:
            command.working(process)
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
        print(err)
        assert process.returncode == 5 and number.name in err
        kept = vouched(journal_of(command.out))
        assert 0 < len(kept) < len(command.scene.plan.tiles)
        command.scene.look(command.out)
        found = re.search(r"^.*?(shardwright convert .*)$", err, re.MULTILINE)
        assert found and "resume" in err.lower(), err
        resumed = subprocess.run(
            [*COMMAND, *shlex.split(found[1])[1:], "--json"], cwd=command.folder, capture_output=True, text=True, check=False
        )
        assert resumed.returncode == 0, resumed.stderr
        assert json.loads(resumed.stdout)["tiles_resumed"] == len(kept)
        command.scene.done(command.out)

    def test_the_plain_command_resumes_what_the_saved_plan_began(self, command: Command) -> None:
        with command.start(**self.SLOW) as process:
            command.working(process)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
        assert process.returncode == 5
        kept = vouched(journal_of(command.out))
        source = command.scene.plan.source_root
        status, text, err = command.run(
            source, str(command.out), "--to", "ranks", "--dialect", "megatron", "--tp", "2", "--pp", "2", "--json"
        )
        assert status == 0, err
        assert json.loads(text)["tiles_resumed"] == len(kept) > 0
        command.scene.done(command.out)

    def test_a_second_ctrl_c_ends_it_at_once(self, command: Command) -> None:
        """One tile of many slow writes: a first signal would wait for its end."""
        request = Request("ranks", sw.Layout(tp=2, pp=2), dialect="megatron")
        one = build(sw.open(command.scene.plan.source_root).source, request)
        assert len(one.tiles) == 1
        codec.save(one, command.plan, target_root=str(command.out))
        with command.start("--plan", str(command.plan), "--workers", "1", call="pwrite", path="/data/", delay=200_000) as process:
            command.working(process)
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            began = time.monotonic()
            process.communicate(timeout=60)
        assert process.returncode in (5, -2, 130) and time.monotonic() - began < 2
        assert not vouched(journal_of(command.out))
        command.scene.look(command.out)
        status, _, err = command.run()
        assert status == 0, err
        # Another plan: only its name in shardwright.json is different.
        assert {**digests(command.out), FILE_NAME: None} == {**command.scene.whole, FILE_NAME: None}

    def test_json_says_where_and_how_to_go_on(self, command: Command) -> None:
        with command.start("--plan", str(command.plan), "--json", **self.SLOW) as process:
            command.working(process)
            process.send_signal(signal.SIGTERM)
            text, _ = process.communicate(timeout=60)
        error = json.loads(text)["error"]
        assert process.returncode == 5 and error["type"] == "StoppedError"
        assert error["partial"] == str(command.partial)
        command.finish()


class TestLibraryCalls:
    """The device fails under the real command."""

    @pytest.mark.parametrize(
        ("call", "path", "number", "code"),
        [
            ("fsync", "/data/", 12, errno.EIO),
            ("pwrite", "/data/", 60, errno.ENOSPC),
            ("preadv", "/source/", 30, errno.EIO),
            pytest.param("fsync", "/data/", 2, errno.EIO, marks=pytest.mark.soak),
            pytest.param("fsync", "/journal", 2, errno.EIO, marks=pytest.mark.soak),
            pytest.param("pwrite", "/data/", 60, errno.EIO, marks=pytest.mark.soak),
            pytest.param("pwrite", "/data/", 60, errno.EDQUOT, marks=pytest.mark.soak),
        ],
    )
    def test_fails(self, command: Command, call: str, path: str, number: int, code: int) -> None:
        status, _, err = command.run(call=call, path=path, number=number, errno=code)
        assert status == 5 and os.strerror(code) in err and "Traceback" not in err
        command.scene.look(command.out)
        command.finish()

    @pytest.mark.parametrize(("call", "path"), [("pwrite", "/data/"), ("preadv", "/source/")])
    def test_is_short(self, command: Command, call: str, path: str) -> None:
        assert command.run(call=call, path=path, number=30, errno=0)[0] == 0
        assert command.hit.exists()
        command.scene.done(command.out)

    @pytest.mark.parametrize(
        ("call", "path", "number"),
        [
            ("pwrite", "/data/", 70),
            pytest.param("fsync", "/journal", 2, marks=pytest.mark.soak),
            pytest.param("fsync", "/data/", 3, marks=pytest.mark.soak),
        ],
    )
    def test_kills(self, command: Command, call: str, path: str, number: int) -> None:
        assert command.run(call=call, path=path, number=number, errno=-1)[0] == -9
        command.scene.look(command.out)
        command.finish()


@pytest.mark.parametrize("layers", [100, pytest.param(1111, marks=pytest.mark.soak)])
def test_few_descriptors_and_many_files(tmp_path: Path, shim: Path, layers: int) -> None:
    """64 descriptors and a file for each of 903 (10,002) tensors, interrupted once and resumed."""
    tensors, stages = 9 * layers + 3, layers if layers < 200 else 101
    source = tiny_llama(tmp_path / "source", layers=layers, hidden=8, heads=2, kv=1, vocab=16, shards=tensors)
    plan = build(sw.open(source).source, Request("ranks", sw.Layout(pp=stages)), tile_bytes=16384)
    execute(plan, tmp_path / "whole", memory=MEMORY)
    few = Command(Scene(plan, digests(tmp_path / "whole"), {}), tmp_path, shim)
    few.command = ["bash", "-c", 'ulimit -n 64; exec "$0" "$@"', *COMMAND]
    status, _, err = few.run(call="pwrite", path="/data/", number=2 * tensors // 3, errno=errno.EIO)
    assert status == 5 and "Input/output error" in err
    assert 0 < len(vouched(journal_of(few.out))) < len(plan.tiles)
    few.finish()


class Reader(threading.Thread):
    """Opens OUT again and again while it is being made: whatever opens is whole."""

    def __init__(self, out: Path, whole: dict[str, str]) -> None:
        super().__init__(daemon=True)
        self.out, self.whole, self.ended = out, whole, threading.Event()
        self.opened = self.refused = 0
        self.wrong: list[str] = []

    def run(self) -> None:
        while not self.ended.is_set():
            try:
                sw.open(self.out)
            except (Refusal, OSError):
                self.refused += 1
                continue
            self.opened += 1
            if digests(self.out) != self.whole:
                self.wrong.append(f"after {self.refused} refusals")

    def __enter__(self) -> Reader:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """About 100 MB in a hundred tiles."""
    root = tmp_path_factory.mktemp("large")
    source = tiny_llama(root / "source", layers=12, hidden=768, heads=12, kv=4, vocab=8192, dtype="bfloat16")
    plan = build(sw.open(source).source, Request("megatron-legacy", sw.Layout(tp=2, pp=2)), tile_bytes=1 << 20)
    assert len(plan.tiles) > 60
    outcome = execute(plan, root / "whole", memory=MEMORY)
    return Scene(plan, digests(root / "whole"), outcome.padding)


def impatient(large: Scene, folder: Path) -> Command:
    command = Command(large, folder)
    command.command = [sys.executable, "-c", IMPATIENT]
    return command


@pytest.fixture(scope="module")
def seconds(large: Scene, tmp_path_factory: pytest.TempPathFactory) -> float:
    """How long an undisturbed run takes from its journal on."""
    command = impatient(large, tmp_path_factory.mktemp("undisturbed"))
    with command.start() as process:
        command.until(process, (command.partial / "journal").exists)
        began = time.monotonic()
        process.communicate(timeout=120)
    shutil.rmtree(command.out)
    return time.monotonic() - began


def strike(large: Scene, folder: Path, number: signal.Signals, chance: random.Random, seconds: float) -> int:
    """Stop a run at a random time, perhaps twice, then let it finish; the tiles that were resumed."""
    command = impatient(large, folder)
    with Reader(command.out, large.whole) as reader:
        for _ in range(chance.choice((1, 1, 2))):
            with command.start() as process:
                while process.poll() is None and not (command.partial / "journal").exists():
                    time.sleep(0.002)
                time.sleep(chance.random() * seconds)
                process.send_signal(number)
                _, err = process.communicate(timeout=60)
            assert process.returncode in (0, -number, 5), err
            assert (process.returncode == 0) <= command.out.exists()
        kept = len(vouched(journal_of(command.out)))
        command.finish()
    assert not reader.wrong
    return kept


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_at_a_random_time(large: Scene, seconds: float, tmp_path: Path, number: signal.Signals) -> None:
    strike(large, tmp_path, number, random.Random(number), seconds)


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_at_fifty_random_times(large: Scene, seconds: float, tmp_path: Path, number: signal.Signals) -> None:
    chance, resumed = random.Random(f"{number}"), []
    for round in range(50):
        (tmp_path / str(round)).mkdir()
        resumed.append(strike(large, tmp_path / str(round), number, chance, seconds))
        shutil.rmtree(tmp_path / str(round))
    print(sorted(resumed))
    assert len(set(resumed)) >= 10  # at different times indeed
