"""The arena is the semaphore: first come, first served, never above its limit."""

import threading
import time

import pytest

from shardwright.errors import MemoryBoundError
from shardwright.executors.arena import Arena


def test_the_whole_arena_may_be_taken_but_not_more():
    arena = Arena(1 << 20)
    with arena.take(1 << 20) as slab:
        assert slab.nbytes == 1 << 20
    with pytest.raises(MemoryBoundError) as caught, arena.take((1 << 20) + 1):
        pass
    assert caught.value.expected == (1 << 20) + 1


def test_buffers_are_page_aligned_and_used_again():
    arena = Arena(1 << 16)
    with arena.take(5000) as first:
        address = first.ctypes.data
        assert address % 4096 == 0
    with arena.take(5000) as second:
        assert second.ctypes.data == address


def test_other_sizes_give_way_when_their_bytes_are_needed():
    arena = Arena(3 << 12)
    with arena.take(1 << 12), arena.take(1 << 12):
        pass
    with arena.take(3 << 12) as slab:
        assert slab.nbytes == 3 << 12
        assert not arena._idle


def test_waiting_is_first_come_first_served():
    arena = Arena(100)
    order, ready = [], []
    hold = arena.take(60)
    hold.__enter__()

    def ask(name, nbytes):
        with arena.take(nbytes):
            order.append(name)

    for name, nbytes in (("large", 100), ("small", 10), ("medium", 50)):
        thread = threading.Thread(target=ask, args=(name, nbytes))
        thread.start()
        ready.append(thread)
        while len(arena._queue) < len(ready):
            time.sleep(0.001)
    # 40 bytes are free, yet the small request waits behind the large one.
    assert order == []
    hold.__exit__(None, None, None)
    for thread in ready:
        thread.join(5)
    assert order[0] == "large" and sorted(order[1:]) == ["medium", "small"]


def test_never_above_the_limit():
    arena, now, most = Arena(1000), [0], [0]
    lock = threading.Lock()

    def work(nbytes):
        for _ in range(50):
            with arena.take(nbytes):
                with lock:
                    now[0] += nbytes
                    most[0] = max(most[0], now[0])
                with lock:
                    now[0] -= nbytes

    threads = [threading.Thread(target=work, args=(n,)) for n in (300, 500, 700, 1000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert 0 < most[0] <= 1000 and now[0] == 0
