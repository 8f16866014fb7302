"""Limits held: memory by the kernel's own measure, cgroups, and the watchdog that stops before the kernel does.

The large runs are in child processes, under limits that the kernel enforces.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import shardwright as sw
from shardwright.errors import RunError
from shardwright.executors import execute as execute_module
from shardwright.executors import system, watchdog
from tests.unit.tiny import tiny_llama

CLI = [sys.executable, "-c", "from shardwright.cli import main; main()"]
GROUPS = Path("/sys/fs/cgroup/memory")


def run_of(gigabytes: int, folder: Path) -> Path:
    """A sparse bfloat16 llama of about that many GB."""
    layers = max(1, round(gigabytes * 1e9 / 2 / (4 * 8192 * 8192 + 3 * 8192 * 22016)))
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8192, "intermediate_size": 22016,
        "num_hidden_layers": layers, "num_attention_heads": 64, "num_key_value_heads": 64, "vocab_size": 32000, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 4096,
        "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "bfloat16",
    }  # fmt: skip
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    sw.synth(file, folder / "src", sparse=True)
    return folder / "src"


def room_for(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        pytest.skip(f"needs {nbytes / 1e9:.0f} GB of free disk, {folder} has {free / 1e9:.0f} GB")


def under_data_limit(limit: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts nothing elsewhere")
@pytest.mark.parametrize("gigabytes", [pytest.param(1, id="1GB"), pytest.param(40, id="40GB", marks=pytest.mark.soak)])
def test_a_run_under_a_hard_limit_on_its_data(tmp_path: Path, gigabytes: int) -> None:
    """A sparse source, a dense target, and no more than 300 MiB of private memory, said by the kernel."""
    room_for(tmp_path, int((gigabytes * 1.1 + 1) * 1e9))
    source = run_of(gigabytes, tmp_path)
    done = subprocess.run(
        [*CLI, "convert", str(source), str(tmp_path / "out"), "--to", "megatron-legacy", "--tp", "8", "--memory", "200MiB", "--json"],
        capture_output=True, text=True, check=False, preexec_fn=lambda: under_data_limit(300 << 20),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["target_bytes"] > gigabytes * 0.95e9 and found["read_amplification"] == 1.0
    print(f"{found['target_bytes'] / 1e9:.1f} GB in {found['seconds']:.0f} s, peak RSS {found['peak_rss_bytes'] >> 20} MiB")
    assert found["peak_rss_bytes"] < 300 << 20
    shutil.rmtree(tmp_path / "out")


@pytest.fixture
def cgroup():
    """A memory cgroup of our own, of version 1 or 2, or a skip."""
    folder = (GROUPS if GROUPS.is_dir() else GROUPS.parent) / f"shardwright-test-{os.getpid()}"
    limit = folder / ("memory.limit_in_bytes" if GROUPS.is_dir() else "memory.max")
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    if not limit.exists():
        folder.rmdir()
        pytest.skip("cgroups have no memory controller here")
    yield folder, limit
    for _ in range(50):
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.1)


@pytest.mark.parametrize("gigabytes", [pytest.param(1, id="1GB"), pytest.param(40, id="40GB", marks=pytest.mark.soak)])
def test_a_run_in_a_small_cgroup_respects_it(tmp_path: Path, cgroup: tuple[Path, Path], gigabytes: int) -> None:
    """300 MiB for everything, pages of files included: the default bound is a quarter of it, and nothing is killed."""
    room_for(tmp_path, int((gigabytes * 1.1 + 1) * 1e9))
    source = run_of(gigabytes, tmp_path)
    folder, limit = cgroup
    limit.write_text(str(300 << 20))
    done = subprocess.run(
        [*CLI, "convert", str(source), str(tmp_path / "out"), "--to", "ranks", "--tp", "4", "--memory", "4GiB", "--json"],
        capture_output=True, text=True, check=False, preexec_fn=lambda: (folder / "cgroup.procs").write_text(str(os.getpid())),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert any("memory bound lowered" in warning for warning in found["warnings"])
    assert found["target_bytes"] > gigabytes * 0.95e9
    shutil.rmtree(tmp_path / "out")


def test_the_watchdog_stops_a_run_that_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_llama(tmp_path / "src")
    job = sw.plan(source, tmp_path / "out", to="ranks", memory="256MiB")
    written, real = [0], system.pwrite

    def slow(fd: int, data: memoryview, offset: int) -> int:
        written[0] += 1
        time.sleep(0.01)
        return real(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(watchdog, "INTERVAL", 0.001)
        patch.setattr(watchdog, "anonymous_bytes", lambda: 300 << 20 if written[0] > 8 else 0)
        patch.setattr(system, "pwrite", slow)
        with pytest.raises(RunError, match=r"than its bound; expected at most 268435456 bytes, actual 314572800 bytes") as caught:
            job.execute()
    assert caught.value.partial is not None
    job.execute()
    assert sw.verify(tmp_path / "out", source).ok


def test_what_the_process_held_before_is_not_counted(tmp_path: Path) -> None:
    """A program that imports shardwright may hold much; the bound is for what a run adds."""
    source = tiny_llama(tmp_path / "src")
    job = sw.plan(source, tmp_path / "out", to="ranks", memory="72MiB")
    ballast = bytearray(os.urandom(1 << 20) * 200)
    assert execute_module.watched is watchdog.watched
    job.execute()
    assert len(ballast) == 200 << 20 and watchdog.anonymous_bytes() > 200 << 20


def test_a_bound_beyond_the_machine_is_lowered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_llama(tmp_path / "src")
    monkeypatch.setattr(execute_module, "memory_room", lambda: 500 << 20)
    outcome = sw.plan(source, tmp_path / "out", to="ranks", memory="64GiB").execute()
    assert any(note.startswith("memory bound lowered to ") for note in outcome.notes)
