"""Publishing: nothing half-written can be opened, and nothing finished is done twice.

``OUT.partial/`` beside OUT holds ``lock`` (held with `flock` for as long as the run lives, so that a crash releases it),
``plan.json``, ``data/`` (files under their final names) and ``journal``.

1. `prepare` refuses what cannot work before anything is written: a target that holds something, a target that is the
   working directory or a mount point, an unwritable parent, source and target inside each other, too little space, a
   second run on the same OUT.
2. If an earlier run left a journal (`resume`), its plan and its finished tiles are taken over; what never came as far
   is cleared away. Otherwise the plan is saved, and the journal begins when every file is laid out (`begin`).
3. `publish` is called when everything in ``data/`` is whole and synced. It notes the inode of ``data/`` in the journal,
   renames ``data/`` to OUT, syncs the parent and removes OUT.partial. No file ever changes its name. A crash at any
   point is found by the next run, which goes on from there.
4. With `overwrite` the two folders are swapped in one step, where kernel and file system can; the old OUT exists until
   the new one is whole. Where they cannot, the old one is first renamed to ``OUT.partial/old``: between the two renames
   there is no OUT, and a crash there is repaired by the next run.
5. A run that ends early keeps OUT.partial to be resumed, unless it has not begun, or the data contradicts the plan.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from ..errors import ContradictionError, DiskSpaceError, Refusal, RunError, ShardwrightError, TargetError, TargetExistsError
from ..planner import codec
from ..planner.fingerprint import plan_hash
from ..planner.plan import Plan
from . import system
from .descriptors import failed, sync_path
from .journal import Journal, publish_line
from .resume import Left, inspect
from .stopping import as_ours
from .tile import Receipt

__all__ = ["Publication", "partial_of", "prepare", "refuse", "tidy"]

SPARE_BYTES = 16 << 20
"""Free space that is left alone: folders, headers, the journal, the file system's own."""
_OURS = {"lock", "plan.json", "plan.json.new", "data", "journal", "old"}


class Publication:
    """An unpublished target, locked; a context manager that keeps or discards it when the run ends early.

    Attributes
    ----------
    plan
        What to run: the plan that was asked for, or its saved twin.
    data
        Where its files are written.
    left
        What an earlier run left, if this one resumes.
    finished
        Tiles that this run has journaled.
    notes
        What the user should be told.
    """

    def __init__(self, out: Path, lock: int, plan: Plan) -> None:
        self.out = out
        self.partial = partial_of(out)
        self.data = self.partial / "data"
        self.plan = plan
        self.left: Left | None = None
        self.finished = 0
        self.notes: tuple[str, ...] = ()
        self._lock = lock
        self._journal: Journal | None = None
        self._begun = self._ended = False

    @property
    def done(self) -> dict[int, Receipt]:
        """Finished tiles of earlier runs."""
        return {} if self.left is None else self.left.recorded.tiles

    def __enter__(self) -> Publication:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._ended:
            return
        if self._journal is not None:
            self._journal.close()
        if not self._begun or isinstance(error, ContradictionError):
            # The journal goes first: without it nobody resumes what is left by a crash in here.
            self._end("journal", "data", "old")
            return
        if isinstance(error, RunError):
            error.partial = str(self.partial)
            error.tiles = len(self.done) + self.finished, len(self.plan.tiles)
        os.close(self._lock)
        self._ended = True

    def examine(self, *, overwrite: bool, fresh: bool) -> None:
        """Find out what is to be done, and make an empty ``data/`` and the saved plan unless that is there."""
        # Whatever is wrong with what an earlier run left: it stays.
        self._begun = True
        left = None if fresh else inspect(self.partial, self.out, self.plan)
        if left is not None:
            self.left, self.plan = left, left.plan
            if not left.published:
                _refuse_existing(self.out, overwrite)
                _refuse_space(self.out.parent, self.plan, _allocated(self.data, self.plan))
            return
        try:
            self.notes = _clear(self.partial, self.out)
            self._begun = False
            refuse(self.out, self.plan, overwrite=overwrite)
            self.data.mkdir()
            codec.save(self.plan, self.partial / "plan.json", target_root=str(self.out))
            sync_path(self.partial)  # before there is a journal, which means nothing without its plan
        except ShardwrightError:
            raise
        except OSError as error:
            raise as_ours(error) from error

    def tidy(self) -> None:
        """Remove what is left, if OUT is published or nobody can resume it."""
        self._begun = True
        left = inspect(self.partial, self.out, self.plan)
        self._begun = left is not None
        if left is not None and left.published:
            self.left = left
            self.publish()

    def begin(self) -> Journal:
        """The journal, once every file is laid out: from here on the run can be resumed."""
        path = self.partial / "journal"
        if self.left is None:
            self._journal = Journal.create(path, plan_hash(self.plan))
            sync_path(self.out.parent)  # where OUT.partial itself is an entry
        else:
            self._journal = Journal.resume(path, self.left.recorded.nbytes)
        self._begun = True
        return self._journal

    def publish(self) -> None:
        """Make the whole and synced files OUT.

        Raises
        ------
        RunError
            The system reports an error; the next run tries again.
        """
        try:
            if self._journal is not None:
                self._journal.append([publish_line(os.stat(self.data).st_ino)])
                self._journal.close()
                self._journal = None
            if self.left is None or not self.left.published:
                self._move()
        except OSError as error:
            raise failed(error, self.out, "publishing") from error
        # The journal goes last: as long as anything is there, it says that OUT is whole.
        self._end("data", "old", "journal")

    def _move(self) -> None:
        if not self.out.exists() or not any(self.out.iterdir()):
            system.rename(self.data, self.out)
        elif not system.exchange(self.data, self.out):
            old = self.partial / "old"
            system.rename(self.out, old)
            try:
                system.rename(self.data, self.out)
            except OSError:
                system.rename(old, self.out)
                raise
            self.notes += (f"{self.out.name} was away for an instant: this file system cannot swap two folders in one step",)
        sync_path(self.out.parent)

    def _end(self, *first: str) -> None:
        """Remove OUT.partial, these entries first; the lock last, so that no other run sees a folder without one."""
        try:
            for name in (*first, "plan.json", "plan.json.new", "lock"):
                _delete(self.partial / name)
            os.rmdir(self.partial)
        except OSError as error:
            self.notes += (f"{self.partial} cannot be removed: {error.strerror}",)
        finally:
            os.close(self._lock)
            self._ended = True


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        system.unlink(path)


def prepare(out: Path, plan: Plan, *, overwrite: bool = False, fresh: bool = False) -> Publication:
    """Refuse, or lock OUT.partial and find out what is to be done in it.

    Parameters
    ----------
    fresh
        Forget what an earlier run left.

    Raises
    ------
    TargetError, TargetExistsError, DiskSpaceError, PlanError, RunError
    """
    out = Path(os.path.abspath(out))
    partial = partial_of(out)
    _refuse_place(out, Path(plan.source_root))
    if not partial.exists():
        refuse(out, plan, overwrite=overwrite)
    _refuse_strange(partial)
    try:
        partial.mkdir(exist_ok=True)
    except OSError as error:
        raise failed(error, partial, "creating") from error
    publication = Publication(out, _lock(partial, out), plan)
    with ExitStack() as stack:
        stack.enter_context(publication)
        publication.examine(overwrite=overwrite, fresh=fresh)
        stack.pop_all()
    return publication


def tidy(out: Path, plan: Plan) -> None:
    """Remove what a run that ended between publishing OUT and cleaning up has left; anything else stays."""
    out = Path(os.path.abspath(out))
    partial = partial_of(out)
    if not partial.exists():
        return
    try:
        _refuse_strange(partial)
        with Publication(out, _lock(partial, out), plan) as publication:
            publication.tidy()
    except Refusal:
        return  # somebody else's folder, or another conversion that is running or can be resumed


def partial_of(out: Path) -> Path:
    """The folder in which OUT is made."""
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


def _clear(partial: Path, out: Path) -> tuple[str, ...]:
    """Remove what a dead run left and nobody can resume; its lock is ours now."""
    entries = sorted(name for name in os.listdir(partial) if name != "lock")
    if "old" in entries and not out.exists():
        system.rename(partial / "old", out)
    for name in sorted(entries, key=lambda name: name != "journal"):
        _delete(partial / name)
    return (f"removed {partial.name}, which an earlier run left unfinished",) if entries else ()


def refuse(out: Path, plan: Plan, *, overwrite: bool = False) -> None:
    """Everything that can be refused without writing."""
    parent = out.parent
    if not parent.is_dir():
        raise TargetError("the target's parent folder does not exist", file=parent, remedy="Create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise TargetError("the target's parent folder is not writable", file=parent, remedy="Choose another target")
    _refuse_existing(out, overwrite)
    _refuse_place(out, Path(plan.source_root))
    _refuse_space(parent, plan, 0)


def _refuse_strange(partial: Path) -> None:
    """OUT.partial may be anybody's folder: only what looks like ours is touched."""
    if not partial.exists() and not partial.is_symlink():
        return
    if partial.is_symlink() or not partial.is_dir():
        raise TargetError("what should be the folder for the unfinished target is no folder", file=partial, remedy="Move it away")
    strange = sorted(set(os.listdir(partial)) - _OURS)
    if strange:
        raise TargetError(
            "the folder for the unfinished target holds something else", file=partial, actual=strange[0], remedy="Move it away"
        )


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


def _refuse_space(parent: Path, plan: Plan, allocated: int) -> None:
    needed = sum(file.nbytes for file in plan.target_files) + plan.copied_bytes + SPARE_BYTES - allocated
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


def _allocated(data: Path, plan: Plan) -> int:
    """Bytes that the files of an earlier run hold on the disk already."""
    found = 0
    for file in plan.target_files:
        path = data / file.path
        if path.is_file():
            found += min(file.nbytes, path.stat().st_blocks * 512)
    return found
