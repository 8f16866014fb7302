"""Processes that load together: each byte of the source is read by one of them, and everyone gets what it holds.

Most tests run the processes as threads, each with its own checkpoint, sockets and shared memory; some as real processes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright import Layout, Together, errors
from shardwright.executors import mates as mates_module
from shardwright.executors import system
from shardwright.executors.mates import SLOT_BYTES, Mates, Meeting
from shardwright.executors.stopping import Stop
from tests.unit.tiny import tiny_llama

OPTIONS: dict[str, Any] = {"to": "megatron-legacy", "layout": Layout(tp=2, pp=2), "pad_vocab_to": 4}


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("together") / "src")


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Empty, with a short path."""
    return tmp_path_factory.mktemp("m")


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """What each gives or raises, in threads of their own."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        return [future.exception() or future.result() for future in futures]


def load(src: Path, folder: Path, index: int, ranks: list[list[int]], **options: Any) -> dict[int, dict[str, torch.Tensor]]:
    return sw.open(src).state_dicts(ranks[index], together=Together(folder, index, ranks), **{**OPTIONS, **options})


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in expected.items())


@pytest.mark.parametrize(
    "ranks",
    [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[1], [0]], [[0], [1], [0], [1]], [[2], [2], [2]], [[3]], [[0], []]],
    ids=str,
)
def test_everyone_gets_its_ranks_and_no_byte_is_read_twice(
    src: Path, folder: Path, ranks: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where processes load the same rank, as data-parallel ones do, and where one has nothing to load."""
    expected = sw.open(src).state_dicts(**OPTIONS)
    reads, lock, real = [], threading.Lock(), system.preadv

    def counting(fd: int, buffers: Any, offset: int) -> int:
        got = real(fd, buffers, offset)
        with lock:
            reads.append((os.fstat(fd).st_ino, offset, got))
        return got

    monkeypatch.setattr(system, "preadv", counting)
    found = at_once([lambda i=i: load(src, folder, i, ranks) for i in range(len(ranks))])
    for own, held in zip(ranks, found, strict=True):
        assert held.keys() == set(own)
        assert all(equal(held[rank], expected[rank]) for rank in own)
    reads.sort()
    assert not any(a[0] == b[0] and a[1] + a[2] > b[1] for a, b in pairwise(reads))
    if {rank for own in ranks for rank in own} == {0, 1, 2, 3}:
        assert sum(got for _, _, got in reads) == sw.open(src).nbytes
    assert list(folder.iterdir()) == []


def test_a_cast_another_dtype_and_another_stride(src: Path, folder: Path) -> None:
    """Takers put what they are handed where theirs is, cast to what theirs has."""
    ranks = [[0], [1]]
    expected = sw.open(src).state_dicts([0, 1], dtype="bfloat16", **OPTIONS)

    def into(index: int) -> nn.Module:
        module = nn.Module()
        for name, tensor in expected[index].items():
            room = torch.zeros(*tensor.shape, 2, dtype=torch.float64 if index else torch.bfloat16)
            module.register_parameter(name.replace(".", "/"), nn.Parameter(room[..., 0] if index else room[..., 0].contiguous()))
        holder = nn.ModuleDict()
        for name in expected[index]:
            at: nn.Module = holder
            *path, last = name.split(".")
            for part in path:
                if part not in at._modules:
                    at.add_module(part, nn.Module())
                at = at.get_submodule(part)
            at.register_parameter(last, module._parameters[name.replace(".", "/")])
        sw.open(src).load_into(holder, rank=index, dtype="bfloat16", together=Together(folder, index, ranks), **OPTIONS)
        return holder

    for index, module in enumerate(at_once([lambda i=i: into(i) for i in (0, 1)])):
        assert equal({n: t.bfloat16() for n, t in module.state_dict().items()}, expected[index])


def test_those_who_ask_for_different_things_are_refused(src: Path, folder: Path) -> None:
    ranks = [[0], [1]]
    found = at_once([lambda: load(src, folder, 0, ranks), lambda: load(src, folder, 1, ranks, dtype="float16")])
    assert all(isinstance(error, errors.ShardwrightError) for error in found)
    assert any("must ask for the same" in str(error) for error in found)


def test_those_who_do_not_come_are_named(src: Path, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mates_module, "MEET_SECONDS", 0.05)
    with pytest.raises(errors.RunError, match=r"did not come; actual missing: \[1, 2\]"):
        load(src, folder, 0, [[0], [1], [2]])
    with pytest.raises(errors.RunError, match="did not come; actual missing: 0"):
        load(src, folder / ".." / folder.name, 1, [[0], [1]])


def test_a_folder_that_is_in_use_or_not_there(src: Path, tmp_path: Path, folder: Path) -> None:
    (folder / "0").touch()
    with pytest.raises(errors.UsageError, match=r"cannot meet .*Give each load a new folder"):
        load(src, folder, 0, [[0], [1]])
    with pytest.raises(errors.UsageError, match="cannot meet"):
        load(src, tmp_path / "nothing", 0, [[0], [1]])
    with pytest.raises(errors.UsageError, match="cannot meet"):
        load(src, tmp_path / ("long" * 30), 0, [[0], [1]])


def test_what_one_cannot_read_ends_all(src: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls, lock = system.preadv, [0], threading.Lock()

    def failing(fd: int, buffers: Any, offset: int) -> int:
        with lock:
            calls[0] += 1
            if calls[0] == 20:
                raise OSError(5, "Input/output error")
        return real(fd, buffers, offset)

    monkeypatch.setattr(system, "preadv", failing)
    ranks = [[0], [1], [2], [3]]
    found = at_once([lambda i=i: load(src, folder, i, ranks) for i in range(4)])
    assert all(isinstance(error, errors.RunError) for error in found)
    assert sum("failed: RunError" in str(error) or "has ended" in str(error) for error in found) == 3
    assert any("Input/output error" in str(error) for error in found)


def meeting(folder: Path, index: int, **changes: Any) -> Meeting:
    return Meeting(**{"folder": str(folder), "index": index, "count": 2, "digest": b"d" * 32, "slots": 2, **changes})


def test_shared_memory_is_bounded_and_slots_come_back(folder: Path) -> None:
    """Two slots and 40 MiB to hand over, both ways at once: nobody waits for ever, and every byte arrives once."""
    size = 20 * SLOT_BYTES + 17

    def run(index: int) -> bytearray:
        place, stop = bytearray(size), Stop()

        def put(number: int, offset: int, data: memoryview) -> None:
            assert number == 1 - index and len(data) <= SLOT_BYTES
            place[offset : offset + len(data)] = (
                bytes(a ^ 1 for a in place[offset : offset + len(data)]) if any(place[offset : offset + 1]) else data
            )

        with Mates(meeting(folder, index), stop) as mates:
            mates.begin(put)
            mates.hand([1 - index], index, 0, memoryview(bytes([index + 1]) * size))
            mates.finish()
        return place

    one, two = at_once([lambda: run(0), lambda: run(1)])
    assert one == bytes([2]) * size and two == bytes([1]) * size


def test_one_that_dies_ends_the_other(folder: Path) -> None:
    """Its sockets close without a word, whether it had said that it was done or not."""

    def dying() -> None:
        link = None
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "0"))
            listener.listen()
            link, _ = listener.accept()
        fd = mates_module._memory_file(2 * SLOT_BYTES)
        socket.send_fds(link, [mates_module._HELLO.pack(0, 2, 2, b"d" * 32)], [fd])
        os.close(fd)
        link.sendall(mates_module._WORD.pack(b"d", 0, 0, 0, 0))  # done, but what we hand over is never taken
        link.recv(1)
        link.close()

    def left() -> None:
        with Mates(meeting(folder, 1), Stop()) as mates:
            mates.begin(lambda number, offset, data: None)
            for _ in range(3):
                mates.hand([0], 0, 0, memoryview(bytes(SLOT_BYTES)))
            mates.finish()

    _, error = at_once([dying, left])
    assert isinstance(error, errors.RunError)


CHILD = """
import json, sys, torch
import shardwright as sw
src, index, folder, store = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
layout = sw.Layout(tp=2)
options = dict(to="megatron-legacy", layout=layout, pad_vocab_to=4, rank=index, lazy=False, memory="64MiB", workers=2)

def read_chars():
    return int(open("/proc/self/io").read().split()[1])

ckpt = sw.open(src)
ckpt.state_dict(include="embedding.*", **options)  # every import and first call
if store:
    import torch.distributed as dist
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=index, world_size=2)
    together = sw.Together.of_group([index])
else:
    together = sw.Together(folder, index, [[0], [1]])
before = read_chars()
found = ckpt.state_dict(together=together, **options)
read = read_chars() - before
alone = ckpt.state_dict(**options)
same = all(torch.equal(found[n].view(torch.uint8), t.view(torch.uint8)) for n, t in alone.items()) and found.keys() == alone.keys()
if store:
    dist.destroy_process_group()
print(json.dumps({"read": read, "same": same}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says what a process reads")
@pytest.mark.parametrize("group", [False, True], ids=["folder", "torch.distributed"])
def test_two_processes_by_the_kernels_own_count(tmp_path: Path, folder: Path, group: bool) -> None:
    """Together they read the source once, of which each needs more than half."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 512, "intermediate_size": 1024,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 64, "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    sw.synth(tmp_path / "config.json", tmp_path / "src")
    store = str(folder / "store") if group else ""
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(tmp_path / "src")]
    children = [
        subprocess.Popen([*command, str(i), str(folder), store], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in (0, 1)
    ]
    answers = [child.communicate(timeout=120) for child in children]
    assert all(child.returncode == 0 for child in children), answers
    found = [json.loads(out) for out, _ in answers]
    assert all(one["same"] for one in found)
    needed = sw.open(tmp_path / "src").nbytes
    total = sum(one["read"] for one in found)
    print(f"{needed:,} bytes of weights, {total:,} bytes read by both: {[one['read'] for one in found]}")
    # What is read besides: a few lines of /proc.
    assert needed <= total < needed + 100_000
    assert min(one["read"] for one in found) > needed * 0.3
