"""A real scheduler with two worker processes: equal results, small messages, the first cause, nothing written afterwards."""

import os
import pickle
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest

from shardwright.errors import PlanError, ReplicaMismatchError, RunError, UsageError
from shardwright.executors import cluster as cluster_module
from shardwright.executors.cluster import PAYLOAD_BYTES, Cluster, payload
from shardwright.executors.execute import compare, execute, fit_plan
from shardwright.executors.worker import RECEIPT_BYTES, active, close, halt, run_tile
from shardwright.planner.containers.base import Crc
from shardwright.planner.tensor.lazy import leaf
from shardwright.planner.tensor.pieces import Piece
from tests.unit.hand_made import Maker, copy_program, fit_of, split_plan

ROOMY = 1 << 30


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    from distributed import LocalCluster

    with warnings.catch_warnings():
        # dask's own housekeeping of its sockets and loops is not what is tested here.
        warnings.simplefilter("ignore")
        with LocalCluster(
            processes=True,
            n_workers=2,
            threads_per_worker=1,
            dashboard_address=None,
            resources={"bytes": 64 << 20},
            local_directory=str(tmp_path_factory.mktemp("dask")),
            silence_logs=50,
        ) as found:
            yield found.scheduler_address


def checksummed(root, **more):
    """A plan whose files want a CRC of each tensor."""
    plan, arrays = split_plan(root, rows=64, width=8, layers=4, axis=1, step=8, **more)
    nbytes = 64 * 4 * 2
    crcs = [tuple(Crc(8 + n * nbytes, nbytes, (f.nbytes + 4 * n,)) for n in range(4)) for f in plan.target_files]
    files = tuple(
        replace(f, nbytes=f.nbytes + 16, crcs=c, static=(*f.static, (f.nbytes, bytes(16))))
        for f, c in zip(plan.target_files, crcs, strict=True)
    )
    return replace(plan, target_files=files), arrays


def test_a_cluster_writes_what_threads_write(tmp_path, address):
    (tmp_path / "src").mkdir()
    plan, arrays = checksummed(tmp_path / "src")
    here = execute(plan, tmp_path / "here", memory=ROOMY)
    there = execute(plan, tmp_path / "there", memory=ROOMY, scheduler=address)
    for part in range(2):
        data = (tmp_path / "there" / f"rank{part}.bin").read_bytes()
        assert data == (tmp_path / "here" / f"rank{part}.bin").read_bytes()
        assert data[8:-16] == b"".join(np.split(a, 2, 1)[part].tobytes() for a in arrays)
    assert (here.bytes_read, here.bytes_written) == (there.bytes_read, there.bytes_written)
    assert compare(plan, tmp_path / "there", memory=ROOMY) == []
    assert sorted(os.listdir(tmp_path)) == ["here", "src", "there"]


def test_a_client_is_taken_as_it_is_and_left_open(tmp_path, address):
    from distributed import Client

    (tmp_path / "src").mkdir()
    plan, _ = split_plan(tmp_path / "src")
    with Client(address, set_as_default=False) as client:
        execute(plan, tmp_path / "out", memory=ROOMY, scheduler=client)
        assert client.status == "running"


def test_the_first_cause_comes_back_and_no_worker_writes_afterwards(tmp_path, address):
    root = tmp_path / "src"
    root.mkdir()
    shape = (256, 8)
    data = np.arange(2048, dtype=np.uint16).reshape(shape)
    maker = Maker(root)
    wrong = data.copy()
    wrong[200, 3] ^= 1
    sources = [(maker.source("a", data.tobytes()), 0), (maker.source("b", wrong.tobytes()), 0)]
    out = maker.target("out", data.nbytes)
    pieces = leaf(0, shape).pieces
    program = copy_program("w", "bfloat16", shape, pieces, pieces, replicas=(leaf(1, shape).pieces,))
    maker.tiles(maker.program(program, [(sources, [(out, 0)])]), 0, step=2)
    with pytest.raises(ReplicaMismatchError, match=r"first at element \(200, 3\): tensor 'w.0', file a and b"):
        execute(maker.plan(), tmp_path / "out", memory=ROOMY, scheduler=address)
    assert os.listdir(tmp_path) == ["src"]
    time.sleep(0.2)
    assert os.listdir(tmp_path) == ["src"]


def test_workers_with_too_few_bytes_are_refused_with_the_command(tmp_path, address):
    (tmp_path / "src").mkdir()
    plan, _ = split_plan(tmp_path / "src")
    connection = Cluster(address)
    try:
        large = replace(fit_plan(plan, ROOMY, 2), slab_bytes=1 << 30)
        with pytest.raises(UsageError, match=r'dask worker tcp://.* --nthreads 2 --resources "bytes=2147483648"'):
            connection.check(large)
        assert connection.check(fit_plan(plan, ROOMY, 1)) == {"bytes": fit_plan(plan, ROOMY, 1).slab_bytes}
        assert connection.lanes == 1
    finally:
        connection.close()


def test_no_scheduler_is_refused(tmp_path, monkeypatch):
    (tmp_path / "src").mkdir()
    plan, _ = split_plan(tmp_path / "src")
    monkeypatch.setattr(cluster_module, "_PATIENCE", 0.5)
    with pytest.raises(UsageError, match=r"no dask scheduler answers at tcp://127\.0\.0\.1:9"):
        execute(plan, tmp_path / "out", memory=ROOMY, scheduler="tcp://127.0.0.1:9")
    assert os.listdir(tmp_path) == ["src"]


def test_a_payload_holds_only_what_its_tile_needs(tmp_path):
    plan, _ = checksummed(tmp_path)
    fit = fit_of(plan, 4096, 1)
    sent = pickle.loads(payload(plan, 9, fit, "token", str(tmp_path / "data")))
    assert list(sent.programs) == [0] and len(sent.jobs) == 1 and sorted(sent.targets) == [0, 1]
    assert all(not file.static for file in sent.targets.values())
    assert len(payload(plan, 9, fit, "token", "/x")) < 4096 < PAYLOAD_BYTES


def test_a_payload_that_is_too_large_is_refused(tmp_path):
    shape = (1 << 17,)
    maker = Maker(tmp_path)
    source, out = maker.source("a", bytes(1 << 18)), maker.target("out", 1 << 18)
    ragged = tuple(Piece(0, at, at, ((2, 1, 1),)) for at in range(0, 1 << 17, 2))
    maker.tiles(maker.program(copy_program("w", "bfloat16", shape, ragged, leaf(0, shape).pieces), [([(source, 0)], [(out, 0)])]), 0)
    plan = maker.plan()
    with pytest.raises(PlanError, match="too large to send"):
        payload(plan, 0, fit_of(plan, 4096, 1), "token", "/x")


def test_a_receipt_is_small_and_carries_the_checksums(tmp_path):
    plan, _ = checksummed(tmp_path / "src")
    from shardwright.executors.extents import Checksums
    from shardwright.executors.targets import TargetFiles

    targets = TargetFiles(tmp_path / "data", plan.target_files)
    targets.create()
    checksums = Checksums(targets.files)
    for tile in range(len(plan.tiles)):
        receipt = run_tile(payload(plan, tile, fit_of(plan, 64, 1), "small", str(tmp_path / "data")))
        assert len(pickle.dumps(receipt)) <= RECEIPT_BYTES
        # Strips are joined: one extent for each of the two targets.
        assert len(receipt.extents) == 2 and receipt.bytes_written == 8 * 8 * 2
        checksums.absorb(receipt.extents)
    for number in targets.files:
        with targets.writing(number) as write:
            for offset, patch in checksums.seal(number)[1]:
                write(offset, memoryview(patch))
    targets.close()
    close("small")
    assert active("small") == 0
    halt("small", False)
    with pytest.raises(RunError, match="stopped"):
        run_tile(payload(plan, 0, fit_of(plan, 64, 1), "small", str(tmp_path / "data")))
    assert compare(plan, tmp_path / "data", memory=ROOMY) == []
