"""Processes of one host that run one plan together: each byte is read by one of them and handed over to those that hold it.

1. **Meeting.** In a folder that all can reach, process i listens on the socket ``i`` and calls those before it. Both sides
   send their number, the plan's digest and their *outbox*: a file of memory, cut into slots of 1 MiB, which the other maps.
2. **Handing over.** A sender copies a run of bytes into a free slot of its own outbox, once, and tells every taker which slot
   and what it is. A taker copies it to its tensors and says that it is done; when all have, the slot is free again. A sender
   without a free slot waits. So the shared memory is `slots` MiB for each process, whatever is loaded.
3. A thread for each other process takes what comes from it, so takers never wait for senders and no one waits in a circle.
4. **The end.** Who has read all its tiles says so, and returns when all have said so and its slots are free.
5. A process that fails says why; one that dies closes its sockets. Either ends the others with that as the cause.

Boundary: numbers, offsets and bytes; knows no plan, tensor or file.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Lock, Thread
from types import TracebackType

from ..errors import RunError, UsageError
from .stopping import Stop, as_ours

__all__ = ["SLOT_BYTES", "Mates", "Meeting"]

SLOT_BYTES = 1 << 20
MEET_SECONDS = 300.0
"""How long to wait for the others to come."""

_HELLO = struct.Struct("<IIQ32s")
_WORD = struct.Struct("<cIQQI")
_SLOT, _FREE, _DONE, _FAILED = b"s", b"f", b"d", b"x"
_LONGEST = 4096
"""Bytes of the text of a failure."""

Place = Callable[[int, int, memoryview], None]


@dataclass(frozen=True)
class Meeting:
    """Where, and who.

    Attributes
    ----------
    folder
        A folder for this load alone, which all processes can reach; its path is short, as sockets demand.
    index, count
        This process among them.
    digest
        SHA-256 of what all must agree on.
    slots
        Slots of 1 MiB of each outbox.
    """

    folder: str
    index: int
    count: int
    digest: bytes
    slots: int = 8

    @property
    def shared_bytes(self) -> int:
        """Of this process's outbox."""
        return self.slots * SLOT_BYTES if self.count > 1 else 0


class _Mate:
    """Another process: its socket, its outbox, and what it still has of ours."""

    def __init__(self, link: socket.socket, outbox: mmap.mmap) -> None:
        self.link, self.outbox = link, outbox
        self.lock = Lock()
        self.done = False
        self.holds: Counter[int] = Counter()

    def tell(self, kind: bytes, slot: int = 0, number: int = 0, offset: int = 0, nbytes: int = 0, text: bytes = b"") -> None:
        with self.lock:
            self.link.sendall(_WORD.pack(kind, slot, number, offset, nbytes) + text)


class Mates:
    """The other processes; a context manager that meets them. See the module."""

    def __init__(self, meeting: Meeting, stop: Stop) -> None:
        self._meeting, self._stop = meeting, stop
        self._mates: dict[int, _Mate] = {}
        self._threads: list[Thread] = []
        self._changed = Condition()
        self._free = list(range(meeting.slots))
        self._takers = [0] * meeting.slots
        self._file = _memory_file(meeting.slots * SLOT_BYTES)
        self._outbox = mmap.mmap(self._file, meeting.slots * SLOT_BYTES)

    def __enter__(self) -> Mates:
        try:
            self._meet()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            text = f"{type(error).__name__}: {error}".encode(errors="replace")[:_LONGEST]
            for mate in self._mates.values():
                with suppress(OSError):  # it has ended, too
                    mate.tell(_FAILED, nbytes=len(text), text=text)
        self._close()

    def begin(self, place: Place) -> None:
        """Take what others hand over, from now on."""
        for number, mate in self._mates.items():
            thread = Thread(target=self._take, args=(number, mate, place), name=f"mate-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def hand(self, takers: Sequence[int], number: int, offset: int, data: memoryview) -> None:
        """Hand bytes of tensor `number` to these processes; waits for a free slot.

        Raises
        ------
        RunError
            The run was stopped meanwhile.
        """
        for at in range(0, len(data) if takers else 0, SLOT_BYTES):
            part = data[at : at + SLOT_BYTES]
            slot = self._slot(takers)
            self._outbox[slot * SLOT_BYTES : slot * SLOT_BYTES + len(part)] = part
            for taker in takers:
                try:
                    self._mates[taker].tell(_SLOT, slot, number, offset + at, len(part))
                except OSError as error:
                    raise RunError(f"process {taker}, which loads together with this one, has ended") from error

    def finish(self) -> None:
        """This process has read its share: wait until everyone has, and has taken everything.

        Raises
        ------
        RunError
            Another one failed or ended.
        """
        for number, mate in self._mates.items():
            try:
                mate.tell(_DONE)
            except OSError as error:
                raise RunError(f"process {number}, which loads together with this one, has ended") from error
        with self._changed:
            while not self._stop.is_set() and (any(self._takers) or not all(mate.done for mate in self._mates.values())):
                self._changed.wait(0.2)
        self._stop.raise_cause()

    def _slot(self, takers: Sequence[int]) -> int:
        with self._changed:
            while not self._free:
                if self._stop.at_once():
                    self._stop.raise_cause()
                    raise RunError("the run was stopped")
                self._changed.wait(0.2)
            slot = self._free.pop()
            self._takers[slot] = len(takers)
            for taker in takers:
                self._mates[taker].holds[slot] += 1
            return slot

    def _take(self, number: int, mate: _Mate, place: Place) -> None:
        """What comes from one process, until it ends."""
        try:
            with memoryview(mate.outbox) as outbox:
                while word := _receive(mate.link, _WORD.size):
                    kind, slot, target, offset, nbytes = _WORD.unpack(word)
                    if kind == _SLOT:
                        with outbox[slot * SLOT_BYTES : slot * SLOT_BYTES + nbytes] as data:
                            place(target, offset, data)
                        try:
                            mate.tell(_FREE, slot)
                        except OSError as error:
                            raise RunError(f"process {number}, which loads together with this one, has ended") from error
                    elif kind == _FAILED:
                        text = _receive(mate.link, nbytes).decode(errors="replace")
                        raise RunError(f"process {number}, which loads together with this one, failed: {text}")
                    else:
                        self._hear(mate, kind, slot)
            with self._changed:
                if not mate.done or mate.holds.total():
                    raise RunError(f"process {number}, which loads together with this one, has ended")
        except BaseException as error:
            self._stop.set(as_ours(error))
        with self._changed:
            self._changed.notify_all()

    def _hear(self, mate: _Mate, kind: bytes, slot: int) -> None:
        with self._changed:
            if kind == _DONE:
                mate.done = True
            else:
                mate.holds[slot] -= 1
                self._takers[slot] -= 1
                if not self._takers[slot]:
                    self._free.append(slot)
            self._changed.notify_all()

    def _meet(self) -> None:
        meeting, until = self._meeting, time.monotonic() + MEET_SECONDS
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            path = Path(meeting.folder) / str(meeting.index)
            try:
                listener.bind(str(path))
            except OSError as error:
                raise UsageError(
                    f"the processes cannot meet ({error})", file=path, remedy="Give each load a new folder, with a path below 100 letters"
                ) from None
            listener.listen(meeting.count)
            for other in range(meeting.index):
                self._greet(_call(Path(meeting.folder) / str(other), until))
            while len(self._mates) < meeting.count - 1:
                listener.settimeout(max(0.0, until - time.monotonic()) or 0.001)
                try:
                    link, _ = listener.accept()
                except TimeoutError:
                    missing = sorted(set(range(meeting.count)) - set(self._mates) - {meeting.index})
                    raise RunError("processes that load together did not come", actual=f"missing: {missing}") from None
                self._greet(link)
            path.unlink()

    def _greet(self, link: socket.socket) -> None:
        """Say who we are and hear who they are."""
        meeting = self._meeting
        link.settimeout(MEET_SECONDS)
        socket.send_fds(link, [_HELLO.pack(meeting.index, meeting.count, meeting.slots, meeting.digest)], [self._file])
        data, files, _, _ = socket.recv_fds(link, _HELLO.size, 1)
        try:
            if len(data) != _HELLO.size or len(files) != 1:
                raise RunError("a process that was to load together with this one has ended")
            index, count, slots, digest = _HELLO.unpack(data)
            self._mates[index] = _Mate(link, mmap.mmap(files[0], slots * SLOT_BYTES))
        finally:
            for file in files:
                os.close(file)
        link.settimeout(None)
        if (count, digest) != (meeting.count, meeting.digest):
            raise UsageError(
                "processes that load together must ask for the same: checkpoint, format, layout, patterns and ranks",
                actual=f"process {index} and process {meeting.index} differ",
            )

    def _close(self) -> None:
        for mate in self._mates.values():
            with suppress(OSError):  # the other side was faster
                mate.link.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for mate in self._mates.values():
            mate.link.close()
            mate.outbox.close()
        self._outbox.close()
        os.close(self._file)


def _call(path: Path, until: float) -> socket.socket:
    """A connection to who listens there, once it does."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    while True:
        try:
            link.connect(str(path))
            return link
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > until:
                link.close()
                raise RunError("processes that load together did not come", actual=f"missing: {path.name}") from None
            time.sleep(0.01)


def _receive(link: socket.socket, nbytes: int) -> bytes:
    """That many bytes; none at the end."""
    found = bytearray()
    while len(found) < nbytes:
        try:
            part = link.recv(nbytes - len(found))
        except ConnectionError:
            return b""
        if not part:
            return b""
        found += part
    return bytes(found)


def _memory_file(nbytes: int) -> int:
    """A file without a name, in memory where the system has such."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("shardwright", os.MFD_CLOEXEC)
    else:
        fd, path = tempfile.mkstemp()
        os.unlink(path)
    os.ftruncate(fd, nbytes)
    return fd
