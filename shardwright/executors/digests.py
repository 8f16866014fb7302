"""Checksums of whole files: each file is read once, several files at a time, whatever sums are wanted of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import system
from .checksums import crc32
from .descriptors import failed, open_regular
from .progress import NullProgress, Progress
from .stopping import Stop

__all__ = ["digests_of", "file_digests"]

BLOCK_BYTES = 1 << 20


def digests_of(
    root: Path, wanted: Mapping[str, Collection[str]], *, workers: int, stop: Stop, progress: Progress | None = None
) -> dict[str, dict[str, str]]:
    """Sums of files, by path below `root` and kind; `wanted` are the kinds of each.

    Raises
    ------
    StoppedError
        A signal came.
    RunError
        A file cannot be read.
    """
    progress = progress or NullProgress()
    progress.start(sum((root / path).stat().st_size for path in wanted))

    def one(path: str) -> dict[str, str]:
        return file_digests(root / path, wanted[path], stop, progress.advance)

    try:
        with stop.on_signals(), ThreadPoolExecutor(max(1, workers), thread_name_prefix="digest") as pool:
            return dict(zip(wanted, pool.map(one, wanted), strict=True))
    finally:
        progress.stop()


def file_digests(path: Path, kinds: Collection[str], stop: Stop, advance: Callable[[int], None] = lambda nbytes: None) -> dict[str, str]:
    """``"crc32"`` (8 digits) and ``"sha256"`` (64) of a file, those that are asked for, in lower-case hexadecimal."""
    crc, sha = 0, hashlib.sha256()
    block = memoryview(bytearray(BLOCK_BYTES))
    at = 0
    try:
        fd = open_regular(path)
        try:
            while got := system.preadv(fd, (block,), at):
                stop.raise_cause()
                if "crc32" in kinds:
                    crc = crc32(block[:got], crc)
                if "sha256" in kinds:
                    sha.update(block[:got])
                at += got
                advance(got)
        finally:
            os.close(fd)
    except OSError as error:
        raise failed(error, path, "reading") from error
    sums = {"crc32": f"{crc:08x}", "sha256": sha.hexdigest()}
    return {kind: sums[kind] for kind in kinds}
