"""The ledger: sync, then check, then the line; batches by bytes and time; nothing is vouched for after an error."""

import threading
import time

import pytest

from shardwright.errors import RunError
from shardwright.executors import ledger as module
from shardwright.executors.extents import Checksums
from shardwright.executors.ledger import Ledger
from shardwright.executors.stopping import Stop
from shardwright.executors.tile import Receipt
from shardwright.planner.plan import TargetFile


class Log:
    """A journal, a sync and a check that write down their order."""

    def __init__(self, fail=None):
        self.said, self.fail, self.gate = [], fail, threading.Event()
        self.gate.set()

    def append(self, lines):
        self.said.append(("line", len(list(lines))))

    def sync(self, numbers):
        self.gate.wait()
        self.said.append(("sync", tuple(numbers)))
        if self.fail == "sync":
            raise RunError("injected")

    def check(self, numbers):
        self.said.append(("check", tuple(numbers)))
        if self.fail == "check":
            raise RunError("injected")


def receipt(tile, nbytes=10):
    return Receipt(nbytes, nbytes, {}, [(tile % 2, 100 * tile, nbytes, 7)], frozenset({tile % 3}))


def ledger_of(log, stop=None):
    checksums = Checksums({0: TargetFile("a", 10_000), 1: TargetFile("b", 10_000)})
    return Ledger(log, checksums, stop or Stop(), sync=log.sync, check=log.check)


def test_the_order_is_sync_check_line(monkeypatch):
    monkeypatch.setattr(module, "BATCH_BYTES", 30)
    log = Log()
    with ledger_of(log) as ledger:
        for tile in range(3):
            ledger.finished(tile, receipt(tile))
        while len(log.said) < 3:
            time.sleep(0.001)
        ledger.finished(3, receipt(3))
    assert log.said == [("sync", (0, 1)), ("check", (0, 1, 2)), ("line", 3), ("sync", (1,)), ("check", (0,)), ("line", 1)]
    assert ledger.tiles == 4 and ledger.total.bytes_written == 40


def test_a_batch_closes_with_time(monkeypatch):
    monkeypatch.setattr(module, "BATCH_SECONDS", 0.05)
    log = Log()
    with ledger_of(log) as ledger:
        ledger.finished(0, receipt(0))
        began = time.monotonic()
        while not log.said:
            assert time.monotonic() - began < 5
            time.sleep(0.005)


def test_who_hands_in_a_tile_waits_while_two_batches_are_behind(monkeypatch):
    monkeypatch.setattr(module, "BATCH_BYTES", 10)
    log = Log()
    log.gate.clear()
    with ledger_of(log) as ledger:
        ledger.finished(0, receipt(0))  # taken by the thread, which waits in sync
        time.sleep(0.05)
        ledger.finished(1, receipt(1))
        late = threading.Thread(target=ledger.finished, args=(2, receipt(2)))
        late.start()
        late.join(0.1)
        assert late.is_alive()
        log.gate.set()
        late.join(5)
        assert not late.is_alive()
    assert ledger.tiles == 3


@pytest.mark.parametrize("fail", ["sync", "check"])
def test_after_an_error_nothing_more_is_vouched_for_and_nobody_waits(monkeypatch, fail):
    monkeypatch.setattr(module, "BATCH_BYTES", 10)
    log, stop = Log(fail), Stop()
    with ledger_of(log, stop) as ledger:
        for tile in range(20):
            ledger.finished(tile, receipt(tile))
    assert isinstance(stop.cause, RunError) and stop.at_once()
    assert ledger.tiles == 0 and not any(what == "line" for what, _ in log.said)
    assert sum(what == "sync" for what, _ in log.said) == 1
