"""The container of `torch.save`: a zip archive of a pickle and one stored member per storage.

Reading: `_zip` says where each member's bytes are, `_unpickle` what the pickle means without running any of it,
`_torch_tree` what the tensors are called. Here each tensor is bound to its storage: the member must exist, be stored
plainly and be as long as the storage says, and every element that the tensor addresses must lie in it.

Writing: `_pickle_writer` writes the pickle, and storages are numbered in the order in which it first mentions them, which
is the order of the members: torch relies on that when it computes offsets without reading local headers. The members are
those of torch 2.13, in its order. Nothing needs torch.

Boundary: pure but for the headers that a store is asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from ...errors import ContainerError, UnsupportedError, UsageError
from ..store import Store
from ..tensor.dtypes import BY_NAME, DType
from ._pickle_names import RawTensor, Storage
from ._pickle_writer import dump, torch_dtype
from ._torch_objects import Inert, Namespace, TensorRef, TensorValue, TorchDtype, TorchSize
from ._torch_tree import grow
from ._unpickle import unpickle
from ._zip import ALIGNMENT, Directory, Layout, Member, read_directory
from .base import ContainerIndex, Placement, StoredTensor, TensorSpec, UnitLayout

__all__ = ["Inert", "Namespace", "TensorRef", "TensorValue", "TorchDtype", "TorchSize", "TorchZip"]

MAX_PICKLE = 1 << 28
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_RESAVE = "Load it with torch and save it again with torch.save"


class TorchZip:
    """``.pt``, ``.bin``, ``.ckpt``: what `torch.save` has written since 1.6."""

    name = "torch"
    suffix = ".pt"

    def lays_out_alike(self, one: str, other: str) -> bool:
        """Whether two paths give equal files for equal tensors and objects: the archive's folder is named like the file."""
        return _archive(one) == _archive(other)

    def read(self, store: Store, path: str) -> ContainerIndex:
        """Parse the directory and the pickle of one file.

        `objects` is the saved tree with a `TensorRef` for each tensor; a saved value that is no dict is found under ``""``.

        Raises
        ------
        ContainerError
            Truncated, overlapping, malformed: names the file and the tensor or zip entry.
        UnsafePickleError
            The pickle names something outside the allow-list.
        UnsupportedError
            An older format, big-endian data, or a tensor that is not plain and dense.
        """
        _refuse_legacy(store, path)
        directory = read_directory(store, path)
        folder = _folder(directory, path)
        _check_byte_order(store, path, directory, folder)
        pickled = _payload(store, path, directory, f"{folder}/data.pkl", MAX_PICKLE)
        binder = _Binder(directory, f"{folder}/data/", path)
        tree = grow(unpickle(pickled, path), binder.bind, file=path, nbytes=len(pickled))
        digest = hashlib.sha256(pickled + directory.raw).hexdigest()
        return ContainerIndex(binder.tensors, tree if isinstance(tree, dict) else {"": tree}, header_digest=digest)

    def lay_out(
        self,
        path: str,
        tensors: Sequence[TensorSpec],
        *,
        objects: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> UnitLayout:
        """Lay out one file at `path`.

        `objects` is the tree to save, each tensor a `TensorRef` or a `TensorValue`; without it, one flat dict of all tensors. A
        tensor that the tree mentions twice is stored once. What lies under ``""`` alone is saved itself, as it would be read.
        """
        if metadata:
            raise UnsupportedError("a torch file has no metadata of its own", file=path, remedy="Put it into the tree")
        numbering = _Numbering(tensors, path)
        tree: Any = dict(objects) if objects is not None else {spec.name: TensorRef(spec.name) for spec in tensors}
        pickled = dump(tree[""] if list(tree) == [""] else tree, numbering.place, file=path, keep=numbering.keep)
        numbering.check()
        layout = Layout(path, _archive(path))
        layout.add("data.pkl", pickled)
        layout.add(".format_version", b"1")
        layout.add(".storage_alignment", str(ALIGNMENT).encode())
        layout.add("byteorder", b"little")
        offsets = {}
        for number, stored in enumerate(numbering.stored):
            if isinstance(stored, TensorValue):
                layout.add(f"data/{number}", stored.data)
            else:
                offsets[stored] = layout.reserve(f"data/{number}", _nbytes(numbering.specs[stored], path))
        layout.add("version", b"3\n")
        # torch derives it from the checksums of the data, which are not known yet; it only has to be there and to differ.
        layout.add(".data/serialization_id", f"{int(hashlib.sha256(pickled).hexdigest(), 16) % 10**40:040}".encode())
        return UnitLayout((layout.finish(),), tuple(Placement(0, offsets[spec.name]) for spec in tensors))


def _archive(path: str) -> str:
    """The folder that all members of the file at `path` lie in."""
    stem = path.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    return stem if stem.isascii() and stem.strip(".") else "archive"


def _refuse_legacy(store: Store, path: str) -> None:
    head = store.read(path, 0, min(store.stat(path).nbytes, 512))
    if not head:
        raise ContainerError("the file is empty", file=path, expected="a torch file", actual="0 bytes", remedy="Copy or download it again")
    if head.startswith(_LEGACY) or head[257:262] == b"ustar":
        raise UnsupportedError("a torch file in the format from before torch 1.6, which is no zip archive", file=path, remedy=_RESAVE)
    if not head.startswith(b"PK\3\4"):
        raise ContainerError("not a torch file: it does not begin with a zip entry", file=path, remedy="Copy or download it again")


def _folder(directory: Directory, path: str) -> str:
    """The folder that all members lie in; torch takes it from the first."""
    first = next(iter(directory.members), "")
    folder = first.split("/", 1)[0]
    if f"{folder}/data.pkl" not in directory.members:
        raise ContainerError("not a torch file: the archive has no data.pkl", file=path, actual=f"first entry {first!r}")
    if f"{folder}/constants.pkl" in directory.members:
        raise UnsupportedError("a TorchScript archive, not a checkpoint", file=path, remedy="Save the module's state_dict with torch.save")
    return folder


def _check_byte_order(store: Store, path: str, directory: Directory, folder: str) -> None:
    if f"{folder}/byteorder" in directory.members:
        order = _payload(store, path, directory, f"{folder}/byteorder", 64)
        if order != b"little":
            raise UnsupportedError("the data is not little-endian", file=path, expected="little", actual=repr(order)[2:-1], remedy=_RESAVE)


def _payload(store: Store, path: str, directory: Directory, name: str, limit: int) -> bytes:
    member = directory.members[name]
    _require_plain(member, path)
    if member.nbytes > limit:
        raise ContainerError(f"the zip entry {name!r} is too large", file=path, expected=f"<= {limit} bytes", actual=member.nbytes)
    return store.read(path, member.offset, member.nbytes)


def _require_plain(member: Member, path: str, tensor: str | None = None) -> None:
    if not member.plain:
        raise ContainerError(f"the zip entry {member.name!r} is compressed or encrypted", file=path, tensor=tensor, remedy=_RESAVE)


class _Binder:
    """Binds tensors to the members that hold their bytes."""

    def __init__(self, directory: Directory, prefix: str, path: str) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        self._members = directory.members
        self._prefix = prefix
        self._path = path

    def bind(self, raw: RawTensor, name: str) -> None:
        dtype, shape, strides = self._describe(raw, name)
        member = self._member(raw.storage, name)
        offset = self._locate(raw, member, dtype.itemsize or 1, name)
        if name in self.tensors:
            raise ContainerError("two tensors have this name once nested keys are joined", file=self._path, tensor=name)
        self.tensors[name] = StoredTensor(name, dtype.name, shape, self._path, offset, strides)

    def _describe(self, raw: RawTensor, name: str) -> tuple[DType, tuple[int, ...], tuple[int, ...] | None]:
        strides = None if _is_row_major(raw.shape, raw.strides) else raw.strides
        if raw.dtype == "float4_e2m1fn_x2" and raw.shape and strides is None:
            return BY_NAME["float4_e2m1fn"], (*raw.shape[:-1], raw.shape[-1] * 2), None  # torch counts pairs
        dtype = BY_NAME.get(raw.dtype)
        if dtype is None:
            raise UnsupportedError(f"tensors of dtype {raw.dtype} with these strides are not offered", file=self._path, tensor=name)
        return dtype, raw.shape, strides

    def _member(self, storage: Storage, name: str) -> Member:
        member = self._members.get(self._prefix + storage.key)
        if member is None:
            raise ContainerError(f"the archive has no storage {storage.key[:200]!r}", file=self._path, tensor=name)
        _require_plain(member, self._path, name)
        if storage.dtype is not None and storage.dtype not in BY_NAME:
            raise UnsupportedError(f"storages of dtype {storage.dtype} are not offered", file=self._path, tensor=name)
        expected = storage.count * (1 if storage.dtype is None else BY_NAME[storage.dtype].itemsize)
        if expected != member.nbytes:
            raise ContainerError(
                f"storage {storage.key!r} is not as long as the pickle says",
                file=self._path,
                tensor=name,
                expected=f"{expected} bytes",
                actual=f"{member.nbytes} bytes",
            )
        return member

    def _locate(self, raw: RawTensor, member: Member, itemsize: int, name: str) -> int:
        begin = raw.offset * itemsize
        count = prod(raw.shape)
        last = raw.offset + sum((extent - 1) * stride for extent, stride in zip(raw.shape, raw.strides, strict=True))
        end = begin if count == 0 else (last + 1) * itemsize
        if max(begin, end) > member.nbytes or count >= 1 << 63:
            raise ContainerError(
                "the tensor reaches past the end of its storage",
                file=self._path,
                tensor=name,
                expected=f"<= {member.nbytes} bytes",
                actual=f"{max(begin, end)} bytes",
                remedy="Copy the file again, or save it again",
            )
        return member.offset + begin


def _is_row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    step = 1
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent > 1 and stride != step:
            return 0 in shape
        step *= extent
    return True


class _Numbering:
    """Storage keys in the order in which the pickle first mentions their tensors."""

    def __init__(self, tensors: Sequence[TensorSpec], path: str) -> None:
        self.specs = {spec.name: spec for spec in tensors}
        self.stored: list[str | TensorValue] = []
        """By key: a tensor's name, or its value."""
        self._keys: dict[str, str] = {}
        self._path = path
        if len(self.specs) != len(tensors):
            names = [spec.name for spec in tensors]
            raise UsageError("two tensors of one file have the same name", file=path, tensor=next(n for n in names if names.count(n) > 1))

    def place(self, name: str) -> tuple[TensorSpec, str]:
        if name not in self.specs:
            raise UsageError("the tree mentions a tensor that is not laid out", file=self._path, tensor=name)
        if name not in self._keys:
            self._keys[name] = str(len(self.stored))
            self.stored.append(name)
        return self.specs[name], self._keys[name]

    def keep(self, value: TensorValue) -> str:
        self.stored.append(value)
        return str(len(self.stored) - 1)

    def check(self) -> None:
        if missing := next((name for name in self.specs if name not in self._keys), None):
            raise UsageError("the tree does not mention a tensor that is to be stored", file=self._path, tensor=missing)


def _nbytes(spec: TensorSpec, path: str) -> int:
    dtype = BY_NAME[spec.dtype]
    if torch_dtype(spec.dtype, file=path, tensor=spec.name) != spec.dtype and (not spec.shape or spec.shape[-1] % 2):
        raise UnsupportedError(f"torch stores {spec.dtype} in pairs along the last axis", file=path, tensor=spec.name, actual=spec.shape)
    return dtype.nbytes(prod(spec.shape))
