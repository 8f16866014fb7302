"""Publishing: nothing half-written can be opened.

1. `prepare` refuses what cannot work before anything is written: a target that holds something, a target that is the
   working directory or a mount point, an unwritable parent, source and target inside each other, too little space.
2. It makes ``OUT.partial/`` beside OUT: ``data/`` (files under their final names), ``plan.json``, ``lock`` (held with
   `flock` for as long as the run lives; ``journal`` will have its place here). A second run on the same OUT is refused;
   what a dead run left is removed.
3. `Publication.publish` syncs files and folders, renames ``data/`` to OUT, syncs the parent and removes OUT.partial. No
   file ever changes its name.
4. With `overwrite` the old OUT is first renamed to ``OUT.partial/old`` and removed last. Between the two renames there
   is no OUT; a crash there leaves both trees whole inside OUT.partial, and the next run puts the old one back.
5. `discard` removes OUT.partial after any failure, errors in flight included: resuming needs the journal.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ..errors import DiskSpaceError, RunError, TargetError, TargetExistsError
from ..planner.plan import Plan
from .descriptors import failed, sync_path
from .stopping import as_ours

__all__ = ["Publication", "prepare", "refuse"]

SPARE_BYTES = 16 << 20
"""Free space that is left alone: folders, headers, the file system's own."""


class Publication:
    """An unpublished target, locked.

    Attributes
    ----------
    data
        Where its files are written.
    notes
        What the user should be told.
    """

    def __init__(self, out: Path, lock: int) -> None:
        self.out = out
        self.partial = _partial(out)
        self.data = self.partial / "data"
        self.notes: tuple[str, ...] = ()
        self._lock = lock

    def publish(self) -> None:
        """Make the synced files OUT."""
        old = self.partial / "old"
        try:
            if self.out.exists():
                os.rename(self.out, old)
            os.rename(self.data, self.out)
        except OSError as error:
            if old.exists() and not self.out.exists():
                os.rename(old, self.out)
            if not old.exists():
                self._remove()
            raise failed(error, self.out, "publishing") from error
        sync_path(self.out.parent)
        self._remove()

    def discard(self) -> None:
        """Remove everything that was written."""
        self._remove()

    def _remove(self) -> None:
        # The lock file goes with the folder, the lock itself last, so that no other run sees a folder without one.
        shutil.rmtree(self.partial, ignore_errors=True)
        os.close(self._lock)


def prepare(out: Path, plan: Plan, *, overwrite: bool = False, plan_text: str | None = None) -> Publication:
    """Refuse, or lock and make an empty ``OUT.partial/data``.

    Parameters
    ----------
    plan_text
        The plan as JSON, kept beside the data.

    Raises
    ------
    TargetError, TargetExistsError, DiskSpaceError, RunError
    """
    out = Path(os.path.abspath(out))
    refuse(out, plan, overwrite=overwrite)
    partial = _partial(out)
    stale = partial.exists()
    try:
        partial.mkdir(exist_ok=True)
    except OSError as error:
        raise failed(error, partial, "creating") from error
    lock = _lock(partial, out)
    publication = Publication(out, lock)
    try:
        if stale:
            publication.notes = (_clean(partial, out),)
            refuse(out, plan, overwrite=overwrite)
        publication.data.mkdir()
        if plan_text is not None:
            (partial / "plan.json").write_text(plan_text, encoding="utf-8")
    except BaseException as error:
        publication.discard()
        raise as_ours(error) from None
    return publication


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _lock(partial: Path, out: Path) -> int:
    fd = os.open(partial / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever removed the folder meanwhile held the lock on a file that is gone.
        if not os.fstat(fd).st_nlink:
            raise BlockingIOError
    except BlockingIOError:
        os.close(fd)
        raise TargetExistsError("another run is writing this target", file=out, remedy="Wait for it, or stop it") from None
    return fd


def _clean(partial: Path, out: Path) -> str:
    """Remove what a dead run left; its lock is ours now."""
    note = f"removed {partial.name}, which an earlier run left unfinished"
    if (partial / "old").exists() and not out.exists():
        os.rename(partial / "old", out)
        note = f"put {out.name} back, which an earlier run was replacing when it ended"
    for entry in partial.iterdir():
        if entry.name == "lock":
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    return note


def refuse(out: Path, plan: Plan, *, overwrite: bool = False) -> None:
    """Everything that can be refused without writing."""
    parent = out.parent
    checks: list[Callable[[], None]] = [
        lambda: _refuse_existing(out, overwrite),
        lambda: _refuse_place(out, Path(plan.source_root)),
        lambda: _refuse_space(parent, plan),
    ]
    if not parent.is_dir():
        raise TargetError("the target's parent folder does not exist", file=parent, remedy="Create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise TargetError("the target's parent folder is not writable", file=parent, remedy="Choose another target")
    for check in checks:
        check()


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise TargetExistsError("the target exists and is not a folder", file=out, remedy="Choose another target")
    if os.path.ismount(out):
        raise TargetError("the target is a mount point, which cannot be renamed", file=out, remedy="Name a folder inside it")
    if out.samefile(Path.cwd()) or out in Path.cwd().parents:
        raise TargetError("the target is the working directory", file=out, remedy="Run from elsewhere, or name a folder inside it")
    if not overwrite and any(out.iterdir()):
        raise TargetExistsError("the target exists and holds something", file=out, remedy="Pass --overwrite to replace it")


def _refuse_place(out: Path, source: Path) -> None:
    here, there = out.resolve(), source.resolve()
    if here == there or there in here.parents or here in there.parents:
        how = "is the source" if here == there else "lies inside the source" if there in here.parents else "holds the source"
        raise TargetError(f"the target {how}", file=out, actual=f"source {source}", remedy="Choose a target elsewhere")


def _refuse_space(parent: Path, plan: Plan) -> None:
    needed = sum(file.nbytes for file in plan.target_files) + plan.copied_bytes + SPARE_BYTES
    try:
        found = os.statvfs(parent)
    except OSError as error:
        raise RunError(f"the target's file system does not answer: {error.strerror}", file=parent) from error
    free = found.f_bavail * found.f_frsize
    if needed > free:
        raise DiskSpaceError(
            "the target's disk has too little room",
            file=parent,
            expected=f"{needed} bytes free",
            actual=f"{free} bytes",
            remedy="Free some space or choose another disk",
        )
