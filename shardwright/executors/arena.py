"""The arena: all working memory of a run, handed out first come, first served.

`Arena.take` blocks until the bytes are free; it *is* the semaphore that bounds memory. Buffers are page-aligned private
anonymous maps, allocated once and used again by whoever next asks for that size; a buffer of another size is given back
to the system only when its bytes are needed.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition

import numpy as np
import numpy.typing as npt

from ..errors import MemoryBoundError

__all__ = ["Arena", "Buffer"]

Buffer = npt.NDArray[np.uint8]


class Arena:
    """Working memory of `nbytes` bytes.

    >>> arena = Arena(1 << 16)
    >>> with arena.take(1 << 16) as slab:
    ...     slab.nbytes
    65536
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._taken = 0
        self._idle: list[Buffer] = []
        self._queue: deque[object] = deque()
        self._changed = Condition()

    @contextmanager
    def take(self, nbytes: int) -> Iterator[Buffer]:
        """A buffer of that size, once everyone who asked before has theirs and the bytes are free.

        Raises
        ------
        MemoryBoundError
            The arena can never give that much.
        """
        if nbytes > self.nbytes:
            raise MemoryBoundError("a buffer is larger than the arena", expected=nbytes, actual=self.nbytes)
        buffer = self._acquire(nbytes)
        try:
            yield buffer
        finally:
            with self._changed:
                self._taken -= nbytes
                self._idle.append(buffer)
                self._changed.notify_all()

    def release(self) -> None:
        """Give the buffers that no one has back to the system, whoever still refers to the arena."""
        with self._changed:
            self._idle.clear()

    def _acquire(self, nbytes: int) -> Buffer:
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                self._changed.wait_for(lambda: self._queue[0] is ticket and self._taken + nbytes <= self.nbytes)
                buffer = self._reuse(nbytes)
                self._taken += nbytes
                return buffer
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def _reuse(self, nbytes: int) -> Buffer:
        for index, buffer in enumerate(self._idle):
            if buffer.nbytes == nbytes:
                return self._idle.pop(index)
        while self._idle and self._taken + sum(b.nbytes for b in self._idle) + nbytes > self.nbytes:
            self._idle.pop()
        if not nbytes:
            return np.empty(0, np.uint8)
        # Private: a shared anonymous map is no anonymous memory to the kernel, and escapes whoever counts that.
        return np.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
