"""What a container is: where each tensor's bytes are in a file, and where they will be.

Reading: `read` parses one file's header through a `Store` and returns a `ContainerIndex`: a `StoredTensor` per tensor
(its bytes' place) and, where the container can hold them, plain objects. Tensor data is never read.

Writing: `lay_out` is handed one unit (the tensors and objects of one file, or of one rank for containers that spread a
unit over files) and decides every byte that is not tensor data before any data moves: file sizes, headers, directories,
and where each tensor's row-major bytes go. Checksums over data that a container must hold are declared as `Crc`
patches; the executor fills them in. No container needs code on the executor's side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple, Protocol

from ..store import Store

__all__ = [
    "Container",
    "ContainerIndex",
    "Crc",
    "Cut",
    "FileLayout",
    "Fragment",
    "Placement",
    "StoredTensor",
    "TensorSpec",
    "UnitLayout",
]

Shape = tuple[int, ...]


class Fragment(NamedTuple):
    """A run of elements that lie one after the other in a file: its path, the byte offset of the first, how many they are."""

    file: str
    offset: int
    elements: int


class Cut(NamedTuple):
    """How a tensor lies that is no single run: elements of each fragment, and of each region of padding beside it."""

    sizes: tuple[int, ...]
    blanks: tuple[int, ...]


class StoredTensor(NamedTuple):
    """A tensor that lies in a file, or in pieces of several.

    Attributes
    ----------
    name
        Key under which the container holds it (nested dictionaries joined with ``.``).
    dtype
        torch's spelling.
    shape
        In elements.
    file
        Path relative to the store.
    offset
        Byte offset in the file of element ``[0, …, 0]``.
    strides
        In elements, or None when row-major contiguous.
    fragments
        Where the tensor is not in one place: runs that follow one another in its row-major order and make it up; `file` and
        `offset` are the first one's then, and `strides` is None.
    blanks
        Padding that belongs to it and must be zero: the run refuses the checkpoint where it is not.
    """

    name: str
    dtype: str
    shape: Shape
    file: str
    offset: int
    strides: Shape | None = None
    fragments: tuple[Fragment, ...] = ()
    blanks: tuple[Fragment, ...] = ()

    @property
    def form(self) -> Shape | Cut | None:
        """How it lies: None for one row-major run, its strides, or how it is cut."""
        if not self.fragments and not self.blanks:
            return self.strides
        return Cut(tuple(f.elements for f in self.runs), tuple(b.elements for b in self.blanks))

    @property
    def runs(self) -> tuple[Fragment, ...]:
        """Its fragments; the one that a tensor in one place is, too."""
        return self.fragments or (Fragment(self.file, self.offset, prod(self.shape)),)


@dataclass(frozen=True, slots=True)
class ContainerIndex:
    """What one file (or one unit) holds.

    Attributes
    ----------
    tensors
        By name, in the file's own order.
    objects
        Everything that is not a tensor, as plain Python values (torch zip: the unpickled tree without tensors).
    metadata
        The container's own string metadata (safetensors ``__metadata__``, zarr group attributes).
    header_digest
        SHA-256 hex of the bytes that say where data lies; a plan is refused when it changes.
    """

    tensors: Mapping[str, StoredTensor]
    objects: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    header_digest: str = ""


class TensorSpec(NamedTuple):
    """A tensor to be stored: its key, torch dtype name and shape."""

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class Crc:
    """A CRC-32 (zip's polynomial) of ``[offset, offset + nbytes)``, little-endian into 4 bytes at each of `patches`."""

    offset: int
    nbytes: int
    patches: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FileLayout:
    """One target file, laid out before data.

    Attributes
    ----------
    path
        Relative to the target root, POSIX.
    nbytes
        Final size.
    static
        ``(offset, bytes)`` of everything that is not tensor data, ascending, disjoint.
    crcs
        Checksums of data to patch in once the data is complete.
    """

    path: str
    nbytes: int
    static: tuple[tuple[int, bytes], ...] = ()
    crcs: tuple[Crc, ...] = ()


class Placement(NamedTuple):
    """Where a tensor's row-major bytes begin: index into `UnitLayout.files`, byte offset.

    `grain` is the number of axis-0 rows that one tile must own whole (a chunk of a chunked container); 1 when free.
    """

    file: int
    offset: int
    grain: int = 1


@dataclass(frozen=True, slots=True)
class UnitLayout:
    """The files of one unit, and the place of each tensor, in the order the tensors were given."""

    files: tuple[FileLayout, ...]
    places: tuple[Placement, ...]


class Container(Protocol):
    """One container: registered under `name`."""

    name: str
    suffix: str
    """Appended to a unit's stem to name its file or folder, e.g. ``".safetensors"``."""

    def read(self, store: Store, path: str) -> ContainerIndex:
        """Parse the header of the unit at `path`.

        Raises
        ------
        ContainerError
            Truncated, overlapping, malformed: names the file and the tensor.
        """

    def lay_out(
        self,
        path: str,
        tensors: Sequence[TensorSpec],
        *,
        objects: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> UnitLayout:
        """Lay out one unit at `path` (relative, with suffix).

        `objects` is only for containers that can hold them; others refuse anything but None.
        """
