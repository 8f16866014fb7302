"""Doing harm to a run, and what must come of it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardwright.errors import RunError, ShardwrightError
from shardwright.executors import system
from shardwright.executors.execute import execute
from tests.faults.scenes import MEMORY, Scene, journal_of, vouched

__all__ = ["Fault", "convert", "interrupted", "partial_of", "raising", "refused", "resumes"]


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def convert(scene: Scene, out: Path, **options: Any) -> Any:
    return execute(scene.plan, out, **{"memory": MEMORY, "workers": 2, **options})


def resumes(scene: Scene, out: Path, **options: Any) -> int:
    """The next run finishes it with what the journal vouches for; how many tiles that were."""
    kept = len(vouched(journal_of(out)))
    outcome = convert(scene, out, **options)
    scene.done(out)
    assert outcome.tiles_resumed == kept
    assert outcome.padding == scene.padding
    return kept


class Fault:
    """Stands in for one system call: the `number`-th that concerns `path` goes wrong."""

    def __init__(
        self, patch: pytest.MonkeyPatch, name: str, path: str, number: int, wrong: Callable[..., Any], *, after: bool = False
    ) -> None:
        self.real, self.path, self.left, self.wrong, self.after = getattr(system, name), path, number, wrong, after
        self.lock = threading.Lock()
        patch.setattr(system, name, self)

    def __call__(self, fd: int, *args: Any) -> Any:
        if self.path not in os.readlink(f"/proc/self/fd/{fd}"):
            return self.real(fd, *args)
        with self.lock:
            self.left -= 1
            hit = self.left == 0 or (self.after and self.left < 0)
        return self.wrong(self.real, fd, *args) if hit else self.real(fd, *args)


def raising(code: int) -> Callable[..., Any]:
    def wrong(real: Callable[..., Any], *args: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return wrong


def interrupted(scene: Scene, out: Path, *, writes: int = 60, **options: Any) -> None:
    """A run that fails when some of it is journaled and some is not."""
    with pytest.MonkeyPatch.context() as patch:
        Fault(patch, "pwrite", "/data/", writes, raising(errno.EIO))
        refused(RunError, 5, scene, out, "writing failed: Input/output error", **options)
    assert 0 < len(vouched(journal_of(out))) < len(scene.plan.tiles)


def refused(kind: type[ShardwrightError], code: int, scene: Scene, out: Path, match: str, **options: Any) -> ShardwrightError:
    with pytest.raises(kind, match=match) as caught:
        convert(scene, out, **options)
    assert type(caught.value) is kind and caught.value.exit_code == code
    print(caught.value)
    return caught.value
