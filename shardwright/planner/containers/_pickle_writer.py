"""A pickle of a torch file's tree, written opcode by opcode: protocol 2, as `torch.save` writes it.

1. The tree of plain values and stand-ins is walked once, depth first; each kind of value has one emitter.
2. What torch or argparse would have reduced to a global and its arguments is written so, by name: nothing is imported.
3. A `TensorRef` becomes a rebuild call on a persistent id; `place` says which tensor it is and under which key it lies. A
   `TensorValue` becomes the same, and `keep` stores its bytes.
4. Strings and globals are memoised; nothing else is, so equal trees give equal bytes.

Boundary: pure, no IO.
"""

from __future__ import annotations

import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from math import prod
from typing import Any

from ...errors import UnsupportedError, UsageError
from ..tensor.dtypes import BY_NAME
from ._pickle_names import STORAGES
from ._torch_objects import Inert, Namespace, TensorRef, TensorValue, TorchDtype, TorchSize
from .base import TensorSpec

__all__ = ["dump", "torch_dtype"]

_STORAGE_OF = {dtype: f"{name}Storage" for name, dtype in STORAGES.items()}
_SCALERS = tuple(("deepspeed.runtime.fp16.loss_scaler", name) for name in ("LossScaler", "DynamicLossScaler"))
"""Objects that may be written as they were read: plain attributes of a class that the reader of the file has anyway."""
_TORCH_NAMES = {"float4_e2m1fn": "float4_e2m1fn_x2", "float6_e2m3": None, "float6_e3m2": None}


def dump(
    tree: Any, place: Callable[[str], tuple[TensorSpec, str]], *, file: str, keep: Callable[[TensorValue], str] | None = None
) -> bytes:
    """The pickle of `tree`.

    Parameters
    ----------
    place
        From a `TensorRef`'s name to the tensor and its storage key.
    keep
        From a `TensorValue` to its storage key.

    Raises
    ------
    UnsupportedError
        The tree holds something that is no plain value; names its path.
    """
    writer = _Writer(place, keep, file)
    writer.out += pickle.PROTO + b"\x02"
    try:
        writer.emit(tree, "")
    except RecursionError:
        raise UsageError("the tree to be saved nests too deeply or contains itself", file=file) from None
    return bytes(writer.out + pickle.STOP)


def torch_dtype(name: str, *, file: str, tensor: str | None) -> str:
    """torch's name of a dtype of the table; four-bit floats come in pairs there, six-bit ones not at all."""
    found = _TORCH_NAMES.get(name, name)
    if found is None:
        raise UnsupportedError(f"torch has no dtype {name}", file=file, tensor=tensor, remedy="Choose --dtype, or a safetensors target")
    return found


class _Writer:
    def __init__(self, place: Callable[[str], tuple[TensorSpec, str]], store: Callable[[TensorValue], str] | None, file: str) -> None:
        self.out = bytearray()
        self.place = place
        self.store = store
        self.file = file
        self.memo: dict[str | tuple[str, str], int] = {}
        self.emitters: dict[type, Callable[[Any, str], None]] = {
            type(None): lambda v, p: self.op(pickle.NONE),
            bool: lambda v, p: self.op(pickle.NEWTRUE if v else pickle.NEWFALSE),
            int: lambda v, p: self.integer(v),
            float: lambda v, p: self.op(pickle.BINFLOAT, struct.pack(">d", v)),
            complex: lambda v, p: self.call("__builtin__", "complex", (v.real, v.imag), p),
            str: lambda v, p: self.text(v),
            bytes: lambda v, p: self.octets(v, p),
            bytearray: lambda v, p: self.call("__builtin__", "bytearray", (bytes(v),), p),
            list: self.sequence,
            tuple: self.fixed,
            dict: self.mapping,
            OrderedDict: self.ordered,
            # A set has no order of its own; files should not differ from run to run.
            set: lambda v, p: self.call("__builtin__", "set", (sorted(v, key=repr),), p),
            frozenset: lambda v, p: self.call("__builtin__", "frozenset", (sorted(v, key=repr),), p),
            TorchSize: lambda v, p: self.call("torch", "Size", (tuple(v),), p),
            TorchDtype: lambda v, p: self.name("torch", v.name),
            Namespace: self.namespace,
            Inert: self.inert,
            TensorRef: lambda v, p: self.rebuild(*self.place(v.name), p),
            TensorValue: self.value,
        }

    def emit(self, value: Any, path: str) -> None:
        emitter = self.emitters.get(type(value))
        if emitter is None:
            raise UnsupportedError(
                f"a {type(value).__name__} at {path!r} cannot be saved", file=self.file, remedy="Convert it to a plain value, or drop it"
            )
        emitter(value, path)

    def op(self, *parts: bytes) -> None:
        for part in parts:
            self.out += part

    def recall(self, key: str | tuple[str, str]) -> bool:
        """Fetch `key` from the memo, or say that it must be written and `keep` called."""
        index = self.memo.get(key)
        if index is None:
            return False
        self.out += pickle.BINGET + bytes([index]) if index < 256 else pickle.LONG_BINGET + struct.pack("<I", index)
        return True

    def keep(self, key: str | tuple[str, str]) -> None:
        index = self.memo[key] = len(self.memo)
        self.out += pickle.BINPUT + bytes([index]) if index < 256 else pickle.LONG_BINPUT + struct.pack("<I", index)

    def text(self, value: str) -> None:
        if not self.recall(value):
            raw = value.encode("utf-8", "surrogatepass")
            self.op(pickle.BINUNICODE, struct.pack("<I", len(raw)), raw)
            self.keep(value)

    def name(self, module: str, name: str) -> None:
        if not self.recall((module, name)):
            self.op(pickle.GLOBAL, module.encode(), b"\n", name.encode(), b"\n")
            self.keep((module, name))

    def integer(self, value: int) -> None:
        if 0 <= value < 1 << 8:
            self.op(pickle.BININT1, bytes([value]))
        elif 0 <= value < 1 << 16:
            self.op(pickle.BININT2, struct.pack("<H", value))
        elif -(1 << 31) <= value < 1 << 31:
            self.op(pickle.BININT, struct.pack("<i", value))
        else:
            raw = pickle.encode_long(value)
            head = pickle.LONG1 + bytes([len(raw)]) if len(raw) < 256 else pickle.LONG4 + struct.pack("<i", len(raw))
            self.op(head, raw)

    def octets(self, value: bytes, path: str) -> None:
        # Protocol 2 has no bytes: they travel as Latin-1 text, empty ones as a bare call.
        if value:
            self.call("_codecs", "encode", (value.decode("latin1"), "latin1"), path)
        else:
            self.call("__builtin__", "bytes", (), path)

    def sequence(self, value: list[Any], path: str) -> None:
        self.op(pickle.EMPTY_LIST, pickle.MARK)
        for index, item in enumerate(value):
            self.emit(item, f"{path}.{index}")
        self.op(pickle.APPENDS)

    def fixed(self, value: tuple[Any, ...], path: str) -> None:
        self.op(pickle.MARK if len(value) > 3 else b"")
        for index, item in enumerate(value):
            self.emit(item, f"{path}.{index}")
        self.op((pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)[len(value)] if len(value) <= 3 else pickle.TUPLE)

    def mapping(self, value: dict[Any, Any], path: str) -> None:
        self.op(pickle.EMPTY_DICT)
        self.items(value, path)

    def items(self, value: dict[Any, Any], path: str) -> None:
        if value:
            self.op(pickle.MARK)
            for key, item in value.items():
                self.emit(key, path)
                self.emit(item, f"{path}.{key}" if path else f"{key}")
            self.op(pickle.SETITEMS)

    def ordered(self, value: OrderedDict[Any, Any], path: str) -> None:
        self.call("collections", "OrderedDict", (), path)
        self.items(value, path)
        if vars(value):  # where a state dict keeps _metadata
            self.emit(vars(value), path)
            self.op(pickle.BUILD)

    def namespace(self, value: Namespace, path: str) -> None:
        self.name("argparse", "Namespace")
        self.op(pickle.EMPTY_TUPLE, pickle.NEWOBJ)
        self.mapping(value.fields, path)
        self.op(pickle.BUILD)

    def inert(self, value: Inert, path: str) -> None:
        if (value.module, value.name) in _SCALERS and not value.args and isinstance(value.state, dict):
            self.name(value.module, value.name)
            self.op(pickle.EMPTY_TUPLE, pickle.NEWOBJ)
            self.mapping(value.state, path)
            self.op(pickle.BUILD)
            return
        if (value.module, value.name) != ("io", "BytesIO") or value.args is None:
            # Handing on what a pickle asked for would put our name under somebody else's code.
            raise UnsupportedError(
                f"the {value.module}.{value.name} at {path!r} is not written into a new file",
                file=self.file,
                remedy="Convert it to a plain value, or drop it",
            )
        self.call("_io", "BytesIO", value.args, path)

    def value(self, value: TensorValue, path: str) -> None:
        if self.store is None or len(value.data) != BY_NAME[value.dtype].nbytes(prod(value.shape)):
            raise UsageError(f"the tensor at {path!r} has other bytes than its shape says", file=self.file)
        self.rebuild(TensorSpec(path, value.dtype, value.shape), self.store(value), path)

    def rebuild(self, spec: TensorSpec, key: str, path: str) -> None:
        known = torch_dtype(spec.dtype, file=self.file, tensor=spec.name)
        typed = _STORAGE_OF.get(spec.dtype)
        shape = spec.shape if known == spec.dtype else (*spec.shape[:-1], spec.shape[-1] // 2)
        count = prod(shape) if typed else BY_NAME[spec.dtype].nbytes(prod(spec.shape))
        self.name("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
        self.op(pickle.MARK, pickle.MARK)
        self.text("storage")
        self.name(*(("torch", typed) if typed else ("torch.storage", "UntypedStorage")))
        self.text(key)
        self.text("cpu")
        self.integer(count)
        self.op(pickle.TUPLE, pickle.BINPERSID)
        self.integer(0)
        self.fixed(shape, path)
        self.fixed(_row_major(shape), path)
        self.op(pickle.NEWFALSE)
        self.call("collections", "OrderedDict", (), path)
        if not typed:
            self.name("torch", known)
        self.op(pickle.TUPLE, pickle.REDUCE)

    def call(self, module: str, name: str, args: tuple[Any, ...], path: str) -> None:
        self.name(module, name)
        self.fixed(args, path)
        self.op(pickle.REDUCE)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))
