"""Every error shardwright raises, one tree.

::

    ShardwrightError
    ├── UsageError (ValueError)                     exit 2: the call itself makes no sense
    ├── Refusal                                     exit 3: nothing was written
    │   ├── CheckpointError (ValueError)            the source is no checkpoint, or not a whole one
    │   │   ├── ContainerError (ValueError)         a file is truncated, overlapping or malformed
    │   │   ├── UnsafePickleError (UnpicklingError) a pickle asks for something outside the allow-list
    │   │   ├── MissingTensorError (KeyError)       a tensor that the tables require is absent
    │   │   ├── UnknownTensorError (KeyError)       a tensor that no rule names
    │   │   └── ShapeMismatchError (ValueError)     shape or dtype is not what the config implies
    │   ├── ConfigError (ValueError)                a config lacks or contradicts something
    │   │   └── UnknownFamilyError (LookupError)
    │   ├── TableError (ValueError)                 a family or dialect table is wrong
    │   ├── LayoutError (ValueError)                heads, rows or stages that do not divide
    │   │   └── BlockAlignmentError (ValueError)    a cut inside a storage or quantisation block
    │   ├── UnsupportedError (NotImplementedError)  understood, but not offered
    │   ├── PlanError (ValueError)                  a plan that contradicts itself, its file or its source
    │   ├── ModuleMismatchError (ValueError)        a module's parameters are not what the rank holds
    │   ├── MemoryBoundError (MemoryError)          the bound is too small; carries the smallest that works
    │   └── TargetError (OSError)                   the target cannot be put where it should go
    │       ├── TargetExistsError (FileExistsError)
    │       └── DiskSpaceError (OSError)
    ├── ContradictionError (ValueError)             exit 4: the data contradicts the plan; target unpublished
    │   ├── PaddingError
    │   ├── ReplicaMismatchError
    │   └── VerificationError (AssertionError)
    └── RunError (RuntimeError)                     exit 5: failed or stopped while running
        └── StoppedError

Each is also the built-in that a caller would expect, and carries what it knows as attributes: ``file``, ``tensor``,
``expected``, ``actual``, ``remedy``. The message is composed from them, always in that order.
"""

from __future__ import annotations

import pickle

__all__ = [
    "BlockAlignmentError",
    "CheckpointError",
    "ConfigError",
    "ContainerError",
    "ContradictionError",
    "DiskSpaceError",
    "LayoutError",
    "MemoryBoundError",
    "MissingTensorError",
    "ModuleMismatchError",
    "PaddingError",
    "PlanError",
    "Refusal",
    "ReplicaMismatchError",
    "RunError",
    "ShapeMismatchError",
    "ShardwrightError",
    "StoppedError",
    "TableError",
    "TargetError",
    "TargetExistsError",
    "UnknownFamilyError",
    "UnknownTensorError",
    "UnsafePickleError",
    "UnsupportedError",
    "UsageError",
    "VerificationError",
    "short",
]


def short(value: object, longest: int = 80) -> str:
    """A value out of a file in few words, whatever it is: an integer may have too many digits to print, a list too many levels.

    >>> short("x"), short(10**5000)
    ("'x'", 'a int too large to print')
    """
    try:
        return repr(value)[:longest]
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to print"


class ShardwrightError(Exception):
    """Root of the tree.

    Parameters
    ----------
    message
        What is wrong, one clause.
    file, tensor
        Where: a path as the user gave it or relative to the source, and a tensor's name.
    expected, actual
        The two values that disagree.
    remedy
        What to do about it.

    >>> str(ShapeMismatchError("wrong shape", file="m.safetensors", tensor="w", expected=(4, 4), actual=(4, 3)))
    "wrong shape: tensor 'w', file m.safetensors; expected (4, 4), actual (4, 3)"
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        file: object = None,
        tensor: str | None = None,
        expected: object = None,
        actual: object = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = None if file is None else str(file)
        self.tensor = tensor
        self.expected = expected
        self.actual = actual
        self.remedy = remedy

    def __str__(self) -> str:
        where = [f"tensor {self.tensor!r}"] if self.tensor is not None else []
        where += [f"file {self.file}"] if self.file is not None else []
        facts = [f"expected {self.expected}"] if self.expected is not None else []
        facts += [f"actual {self.actual}"] if self.actual is not None else []
        text = self.message
        if where:
            text += ": " + ", ".join(where)
        if facts:
            text += "; " + ", ".join(facts)
        if self.remedy:
            text += f". {self.remedy}"
        return text

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process boundaries on a cluster; keyword-only fields need their own way through pickle.
        return (_rebuild, (type(self), self.message, {k: v for k, v in self.__dict__.items() if k != "message"}))


def _rebuild(kind: type[ShardwrightError], message: str, fields: dict[str, object]) -> ShardwrightError:
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    error.message = message
    error.__dict__.update(fields)
    return error


class UsageError(ShardwrightError, ValueError):
    """The call contradicts itself or names something that does not exist."""

    exit_code = 2


class Refusal(ShardwrightError):
    """Refused before anything was written."""

    exit_code = 3


class CheckpointError(Refusal, ValueError):
    """The source is not a checkpoint, or not a whole one."""


class ContainerError(CheckpointError):
    """A file's own structure is broken."""


class UnsafePickleError(CheckpointError, pickle.UnpicklingError):
    """A pickle asks for a class or function outside the allow-list; it was not run."""


class MissingTensorError(CheckpointError, KeyError):
    """A tensor that the family and layout require is not in the source."""

    __str__ = ShardwrightError.__str__


class UnknownTensorError(CheckpointError, KeyError):
    """The source holds a tensor that no rule names."""

    __str__ = ShardwrightError.__str__


class ShapeMismatchError(CheckpointError):
    """A stored shape or dtype is not what the config and layout imply."""


class ConfigError(Refusal, ValueError):
    """A config lacks a field, or contradicts itself or the headers."""


class UnknownFamilyError(ConfigError, LookupError):
    """No family table names this model type."""


class TableError(Refusal, ValueError):
    """A family or dialect table is wrong; names the file, the entry and the text."""


class LayoutError(Refusal, ValueError):
    """The layout does not fit the model: heads, rows, experts or stages that do not divide."""


class BlockAlignmentError(LayoutError):
    """A cut would go through a storage or quantisation block."""


class UnsupportedError(Refusal, NotImplementedError):
    """Understood, but not offered by this version."""


class PlanError(Refusal, ValueError):
    """A plan contradicts itself, its file or its source."""


class ModuleMismatchError(Refusal, ValueError):
    """A module's parameters or buffers are not those that the rank of the layout holds: names, shapes or dtypes differ."""


class MemoryBoundError(Refusal, MemoryError):
    """The memory bound is too small; ``expected`` is the smallest bound that works, in bytes."""


class TargetError(Refusal, OSError):
    """The target cannot be put where it should go: a mount point, the working directory, beside nothing, inside the source."""

    __str__ = ShardwrightError.__str__


class TargetExistsError(TargetError, FileExistsError):
    """The target holds something already."""


class DiskSpaceError(TargetError):
    """The target disk has too little room."""


class ContradictionError(ShardwrightError, ValueError):
    """The data contradicts the plan, found while running; the target was not published."""

    exit_code = 4


class ReplicaMismatchError(ContradictionError):
    """Two copies that the format says are equal differ; `places` are their (file number, offset) in the plan."""

    places: tuple[tuple[int, int], ...] = ()


class PaddingError(ContradictionError):
    """What the format says is padding is not zero: the tensors do not end where their shapes say."""


class VerificationError(ContradictionError, AssertionError):
    """Verification found a difference."""


class RunError(ShardwrightError, RuntimeError):
    """Failed while running; the target was not published.

    `partial` is the folder from which the same conversion can be resumed, once there is one, and `tiles` how many of its
    tiles are done, of how many.
    """

    exit_code = 5
    partial: str | None = None
    tiles: tuple[int, int] = (0, 0)


class StoppedError(RunError):
    """Stopped by a signal."""
