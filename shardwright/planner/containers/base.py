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
from typing import Any, NamedTuple, Protocol

from ..store import Store

__all__ = ["Container", "ContainerIndex", "Crc", "FileLayout", "Placement", "StoredTensor", "TensorSpec", "UnitLayout"]

Shape = tuple[int, ...]


class StoredTensor(NamedTuple):
    """A tensor that lies in a file.

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
    """

    name: str
    dtype: str
    shape: Shape
    file: str
    offset: int
    strides: Shape | None = None


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
