"""From an unpickled value to a tree of plain values and the tensors in it.

1. The value is walked depth first, in the file's own order, and copied: containers as themselves, stand-ins as
   `Namespace`, `Inert` or Python scalars, each tensor as `TensorRef` under its path's keys joined with ``.``.
2. Each tensor is handed to `place`, which checks it against the file, under that name.
3. Depth, number of visits and the memory that the copy takes are bounded: a pickle may share and contain itself, a tree
   does not.

Boundary: pure, no IO.
"""

from __future__ import annotations

import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from ...errors import ContainerError, ShardwrightError, UnsupportedError
from ._pickle_names import Global, Ordered, RawTensor, Refused, Stand, Storage
from ._torch_objects import Inert, Namespace, TensorRef, TorchDtype, TorchSize
from ._unpickle import MALFORMED

__all__ = ["grow"]

MAX_DEPTH = 128
MAX_NAME = 4096
"""Characters of a tensor's name; longer prefixes repeated under many keys would add up to gigabytes."""
MAX_VISITS = 1 << 25
_PER_BYTE, _ALLOWANCE = 64, 1 << 20
"""Bytes that the tree may take: so many for each byte of the pickle, and so many more. An honest tree shares little."""
_TENSOR = 400
"""Bytes that a tensor takes here and with whoever places it, its name aside; in a pickle it takes at least 40."""

_LEAVES = frozenset({str, int, float, complex, bool, bytes, bytearray, type(None), TorchDtype, TorchSize})
_NAMESPACES = ("argparse.Namespace", "types.SimpleNamespace")


def grow(value: Any, place: Callable[[RawTensor, str], None], *, file: str, nbytes: int) -> Any:
    """Walk `value`, call `place` for each tensor, return the tree.

    Parameters
    ----------
    nbytes
        Length of the pickle; an honest tree has fewer nodes than that.

    Raises
    ------
    ContainerError
        Two tensors of one name, or a structure that no tree has.
    UnsupportedError
        A sparse, quantised, nested or subclassed tensor.
    """
    try:
        return _Walk(place, file, nbytes).visit(value, None, 0)
    except ShardwrightError:
        raise
    except MALFORMED as error:
        raise ContainerError(f"data.pkl is malformed: {type(error).__name__} in its tree", file=file) from None


class _Walk:
    def __init__(self, place: Callable[[RawTensor, str], None], file: str, nbytes: int) -> None:
        self.place = place
        self.file = file
        self.visits = min(4 * nbytes + 1000, MAX_VISITS)
        self.room = _PER_BYTE * nbytes + _ALLOWANCE
        self.handlers: dict[type, Callable[[Any, str | None, int], Any]] = {
            dict: self._dict,
            Ordered: self._ordered,
            list: self._list,
            tuple: self._tuple,
            set: lambda v, p, d: set(self._each(v, p, d)),
            frozenset: lambda v, p, d: frozenset(self._each(v, p, d)),
            Stand: self._stand,
            RawTensor: self._tensor,
            Refused: self._refuse,
            Storage: self._storage,
            Global: lambda v, p, d: Inert(v.module, v.name),
        }

    def visit(self, value: Any, path: str | None, depth: int) -> Any:
        self.visits -= 1
        kind = type(value)
        if kind in _LEAVES:
            return value
        if depth > MAX_DEPTH or self.visits < 0:
            raise ContainerError(
                "data.pkl nests too deeply, contains itself or shares its parts too often", file=self.file, expected=f"{MAX_DEPTH} levels"
            )
        made = self.handlers[kind](value, path, depth + 1)
        self.spend(sys.getsizeof(made))
        return made

    def spend(self, nbytes: int) -> None:
        self.room -= nbytes
        if self.room < 0:
            raise ContainerError("data.pkl shares its parts so often that its tree would take much memory", file=self.file)

    def child(self, value: Any, path: str | None, key: Any, depth: int) -> Any:
        if type(value) in _LEAVES:
            self.visits -= 1
            return value
        text = key if type(key) is str else f"{key.module}.{key.name}" if type(key) is Inert else str(key)
        name = text if path is None else f"{path}.{text}"
        if len(name) > MAX_NAME:
            raise ContainerError("a tensor's name is too long", file=self.file, expected=f"{MAX_NAME} characters", actual=len(name))
        return self.visit(value, name, depth)

    def _pairs(self, pairs: Iterable[tuple[Any, Any]], path: str | None, depth: int) -> Iterable[tuple[Any, Any]]:
        for given, value in pairs:
            key = given if type(given) is str else self.visit(given, path, depth)
            yield key, self.child(value, path, key, depth)

    def _each(self, values: Iterable[Any], path: str | None, depth: int) -> Iterable[Any]:
        return (self.child(value, path, index, depth) for index, value in enumerate(values))

    def _dict(self, value: dict[Any, Any], path: str | None, depth: int) -> dict[Any, Any]:
        return dict(self._pairs(value.items(), path, depth))

    def _ordered(self, value: Ordered, path: str | None, depth: int) -> OrderedDict[Any, Any]:
        made = OrderedDict(self._pairs(value.items(), path, depth))
        if unknown := set(value.attributes) - {"_metadata"}:
            raise UnsupportedError(f"an OrderedDict carries the attributes {sorted(map(str, unknown))[:5]}", file=self.file, tensor=path)
        if "_metadata" in value.attributes:
            made._metadata = self.child(value.attributes["_metadata"], path, "_metadata", depth)  # type: ignore[attr-defined]
        return made

    def _list(self, value: list[Any], path: str | None, depth: int) -> list[Any]:
        return list(self._each(value, path, depth))

    def _tuple(self, value: tuple[Any, ...], path: str | None, depth: int) -> tuple[Any, ...]:
        return tuple(self._each(value, path, depth))

    def _stand(self, value: Stand, path: str | None, depth: int) -> Any:
        made_by = value.made_by
        full = f"{made_by.module}.{made_by.name}"
        if full in _NAMESPACES:
            fields = {} if value.state is None else value.state
            if type(fields) is not dict:
                raise ContainerError("a Namespace is filled with something else than a dict", file=self.file, actual=type(fields).__name__)
            return Namespace(self._dict(fields, path, depth))
        if full == "io.BytesIO":
            return Inert("io", "BytesIO", (self._contents(value),))
        if made_by.name == "scalar" and made_by.module.startswith("numpy.") and (number := _numpy_scalar(value)) is not None:
            return number
        args = self._tuple(value.args, path, depth)
        state = None if value.state is None else self.visit(value.state, path, depth)
        return Inert(made_by.module, made_by.name, args, state, self._tuple(tuple(value.items), path, depth))

    def _contents(self, value: Stand) -> bytes:
        match value.args, value.state:
            case (bytes() as contents,), None:
                return contents
            case (), None:
                return b""
            case (), (bytes() as contents, int(), _):
                return contents
        raise ContainerError("an io.BytesIO is not made of bytes", file=self.file)

    def _tensor(self, value: RawTensor, path: str | None, depth: int) -> TensorRef:
        name = "" if path is None else path
        if not name.isprintable() and any(0xD800 <= ord(c) < 0xE000 for c in name):
            raise ContainerError("a tensor's name is not text", file=self.file, tensor=ascii(name))
        self.spend(_TENSOR + len(name))
        self.place(value, name)
        return TensorRef(name)

    def _refuse(self, value: Refused, path: str | None, depth: int) -> Any:
        raise UnsupportedError(
            f"{value.what} is not offered", file=self.file, tensor=path, remedy="Save it as a plain dense tensor, or leave it out"
        )

    def _storage(self, value: Storage, path: str | None, depth: int) -> Any:
        raise UnsupportedError("a bare storage is not offered", file=self.file, tensor=path, remedy="Save it as a tensor, or leave it out")


def _numpy_scalar(value: Stand) -> bool | int | float | None:
    """The number that ``numpy…scalar(dtype, bytes)`` makes, for the plain types; None for any other."""
    match value.args, value.state:
        case (Stand(args=(str() as code, *_), state=state), bytes() as raw), None:
            order = state[1] if type(state) is tuple and len(state) > 1 else "|"
            letter = {"b1": "?", "f2": "e", "f4": "f", "f8": "d"}.get(code)
            if order not in ("<", "|", "=") or len(raw) > 8:
                return None
            if letter is not None:
                return struct.unpack("<" + letter, raw)[0]  # type: ignore[no-any-return]
            if code in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"):
                return int.from_bytes(raw, "little", signed=code[0] == "i")
    return None
