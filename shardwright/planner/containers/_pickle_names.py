"""What a pickle may name, and what calling it means: the closed table behind `_unpickle`.

1. `find` looks a global up by its spelled name. Nothing is imported and no attribute is looked up, so a dotted name is
   only a string.
2. A name in the table has a builder: a rebuild function makes a `RawTensor` or a `Refused`, a plain container makes that
   container, a known library object a `Stand`. Builders check every argument they are handed.
3. A name below a framework's package becomes a `Stand`; anything else is `UnsafePickleError`.

Boundary: pure, no IO.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from ...errors import UnsafePickleError
from ._torch_objects import TorchDtype, TorchSize

__all__ = [
    "STORAGES",
    "Global",
    "Malformed",
    "Ordered",
    "RawTensor",
    "Refused",
    "Stand",
    "Storage",
    "StorageType",
    "find",
    "key",
    "rebuild_tensor",
]

MAX_RANK = 64
MAX_KEY = 8
"""Items of a tuple that is a key: what it costs to tell apart two whose hashes were made to collide."""


class Malformed(ValueError):
    """The pickle contradicts itself; `unpickle` adds the file."""


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """A name the pickle mentions; `build` is what REDUCE and NEWOBJ do with it."""

    module: str
    name: str
    build: Callable[[Global, tuple[Any, ...]], Any]


@dataclass(frozen=True, slots=True)
class StorageType:
    """A storage class; `dtype` is None for untyped storage, counted in bytes."""

    dtype: str | None


@dataclass(frozen=True, slots=True)
class Storage:
    """A persistent id: member ``data/<key>``, of `count` elements."""

    key: str
    dtype: str | None
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class RawTensor:
    """A tensor as its rebuild function was told; not yet checked against the file."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Refused:
    """A tensor of a kind that is not offered; refused where its name is known."""

    what: str


class Ordered(dict[Any, Any]):
    """An OrderedDict; `attributes` is where torch keeps ``_metadata``."""

    __slots__ = ("attributes",)

    def __init__(self) -> None:
        super().__init__()
        self.attributes: dict[Any, Any] = {}


class Stand:
    """A framework object under construction."""

    __slots__ = ("args", "items", "made_by", "state")

    def __init__(self, made_by: Global, args: tuple[Any, ...]) -> None:
        self.made_by = made_by
        self.args = args
        self.state: Any = None
        self.items: list[Any] = []


# Builders: what a call means. Each takes the global and the arguments, and checks both.

_SCALARS = frozenset({str, int, float, bool, bytes, type(None), TorchDtype})


def _hashable(value: Any) -> bool:
    # 64 bits: larger integers can share one hash, and cost more to hash the longer they are.
    return type(value) in _SCALARS and (type(value) is not int or -(1 << 63) <= value < 1 << 64)


def _dims(value: Any) -> tuple[int, ...]:
    # A tuple, not a `TorchSize`: that would be copied for every tensor, and torch does not write it here.
    if type(value) is not tuple or len(value) > MAX_RANK:
        raise Malformed("a tensor's size or stride is not a tuple of dimensions")
    for extent in value:
        if type(extent) is not int or not 0 <= extent < 1 << 63:
            raise Malformed("a tensor's size or stride is not made of non-negative 63-bit integers")
    return value


def _tensor(place: tuple[Any, ...], dtype: str | None, bits: Any) -> RawTensor | Refused:
    storage, offset, size, stride = place
    shape, strides = _dims(size), _dims(stride)
    if type(storage) is not Storage or dtype is None:
        raise Malformed("a tensor has no storage or no dtype")
    if type(offset) is not int or not 0 <= offset < 1 << 63 or len(shape) != len(strides):
        raise Malformed("a tensor's offset, size and stride do not fit together")
    if bits is not None and (type(bits) is not dict or len(bits) > 8 or any(v is not False for v in bits.values())):
        return Refused("a tensor with the conjugate or negative bit set")
    if dtype.startswith("q"):
        return Refused(f"a quantised tensor ({dtype})")
    return RawTensor(storage, dtype, offset, shape, strides)


def rebuild_tensor(_: Global, args: tuple[Any, ...]) -> RawTensor | Refused:
    # v1 (storage, offset, size, stride); v2 adds (requires_grad, hooks[, bits]).
    if len(args) not in (4, 6, 7):
        raise Malformed(f"a tensor is rebuilt from {len(args)} arguments")
    storage = args[0]
    return _tensor(args[:4], storage.dtype if type(storage) is Storage else None, args[6] if len(args) == 7 else None)


def _rebuild_tensor_v3(_: Global, args: tuple[Any, ...]) -> RawTensor | Refused:
    if len(args) not in (7, 8) or type(args[6]) is not TorchDtype:
        raise Malformed("a tensor of a newer dtype is rebuilt without its dtype")
    return _tensor(args[:4], args[6].name, args[7] if len(args) == 8 else None)


def _rebuild_parameter(_: Global, args: tuple[Any, ...]) -> RawTensor | Refused:
    if len(args) not in (3, 4) or type(args[0]) not in (RawTensor, Refused):
        raise Malformed("a parameter is rebuilt from something that is no tensor")
    return args[0]  # type: ignore[no-any-return]


def _rebuild_from_type(_: Global, args: tuple[Any, ...]) -> RawTensor | Refused:
    if len(args) != 4 or type(args[0]) is not Global or type(args[1]) is not Global or type(args[2]) is not tuple:
        raise Malformed("a tensor subclass is rebuilt from something else than (function, type, arguments, state)")
    func, kind, inner, _state = args
    if f"{kind.module}.{kind.name}" not in _PLAIN_TENSORS:
        return Refused(f"a tensor subclass ({kind.module}.{kind.name})"[:200])
    tensor = func.build(func, inner)
    if type(tensor) not in (RawTensor, Refused):
        raise Malformed("a tensor subclass is rebuilt from something that is no tensor")
    return tensor  # type: ignore[no-any-return]


def _refuse_tensor(made_by: Global, _: tuple[Any, ...]) -> Refused:
    return Refused(f"a tensor made by {made_by.module}.{made_by.name}")


def _stand(made_by: Global, args: tuple[Any, ...]) -> Stand:
    return Stand(made_by, args)


def _no_call(made_by: Global, _: tuple[Any, ...]) -> NoReturn:
    raise Malformed(f"{made_by.module}.{made_by.name} is called, and only stands here as a type")


def _ordered(_: Global, args: tuple[Any, ...]) -> Ordered:
    made = Ordered()
    for pair in _one(args, list, default=[]):
        name, value = pair
        made[key(name)] = value
    return made


def _default_dict(_: Global, args: tuple[Any, ...]) -> dict[Any, Any]:
    if len(args) > 1:
        raise Malformed("a defaultdict is made with contents")
    return {}


def _counter(_: Global, args: tuple[Any, ...]) -> dict[Any, Any]:
    return dict(_one(args, dict, default={}))


def _set(_: Global, args: tuple[Any, ...]) -> set[Any]:
    return {key(v) for v in _one(args, list, tuple, default=[])}


def _frozenset(made_by: Global, args: tuple[Any, ...]) -> frozenset[Any]:
    return frozenset(_set(made_by, args))


def _size(_: Global, args: tuple[Any, ...]) -> TorchSize:
    return TorchSize(_dims(_one(args, tuple, list, default=())))


def _complex(_: Global, args: tuple[Any, ...]) -> complex:
    real, imaginary = args
    if type(real) is not float or type(imaginary) is not float:
        raise Malformed("a complex number is not made of two floats")
    return complex(real, imaginary)


def _encode(_: Global, args: tuple[Any, ...]) -> bytes:
    text, encoding = args
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise Malformed("_codecs.encode is asked for something else than latin1")
    return text.encode("latin1")


def _bytes(_: Global, args: tuple[Any, ...]) -> bytes:
    return bytes(_one(args, bytes, default=b""))  # never a number: bytes(n) allocates n


def _bytearray(made_by: Global, args: tuple[Any, ...]) -> bytearray:
    return bytearray(_encode(made_by, args) if len(args) == 2 else _bytes(made_by, args))


def _getattr(_: Global, args: tuple[Any, ...]) -> Global:
    # How Python 3.11.0 to 3.11.3 pickled enum members. No attribute is looked up: the two names are joined.
    owner, name = args
    if type(owner) is not Global or owner.build is not _stand or type(name) is not str:
        raise Malformed("builtins.getattr is used for something else than a framework's enum member")
    return Global(owner.module, f"{owner.name}.{name}", _no_call)


def _reconstructor(_: Global, args: tuple[Any, ...]) -> Stand:
    kind, _base, state = args
    if type(kind) is not Global or kind.build is not _stand:
        raise Malformed("copyreg._reconstructor is used for something else than a framework's class")
    return Stand(kind, () if state is None else (state,))


def _one(args: tuple[Any, ...], *kinds: type, default: Any) -> Any:
    """The only argument, of one of `kinds`; `default` when there is none."""
    if not args:
        return default
    if len(args) > 1 or not isinstance(args[0], kinds):
        raise Malformed(f"a {kinds[0].__name__} is expected as the only argument")
    return args[0]


def key(value: Any) -> Any:
    """`value`, if it may be a key: cheap to hash whatever the file says."""
    if _hashable(value) or type(value) is Stand:
        return value
    if isinstance(value, tuple) and len(value) <= MAX_KEY and all(_hashable(v) for v in value):
        return value
    raise Malformed(f"a {type(value).__name__} is used as a key")


# The closed table of names.

STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "BFloat16": "bfloat16",
    "ComplexDouble": "complex128",
    "ComplexFloat": "complex64",
    "QUInt8": "quint8",
    "QInt8": "qint8",
    "QInt32": "qint32",
    "QUInt4x2": "quint4x2",
    "QUInt2x4": "quint2x4",
}
_DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
    *("complex32", "complex64", "complex128", "float4_e2m1fn_x2"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("qint8", "quint8", "qint32", "quint4x2", "quint2x4", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"),
)
_PLAIN_TENSORS = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
_BUILDERS: dict[str, Callable[[Global, tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    **{
        f"torch._utils.{name}": _refuse_tensor
        for name in (
            "_rebuild_qtensor",
            "_rebuild_sparse_tensor",
            "_rebuild_nested_tensor",
            "_rebuild_wrapper_subclass",
            "_rebuild_meta_tensor_no_storage",
            "_rebuild_device_tensor_from_numpy",
            "_rebuild_device_tensor_from_cpu_tensor",
        )
    },
    **dict.fromkeys(_PLAIN_TENSORS, _no_call),
    "torch.Size": _size,
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": _default_dict,
    "collections.Counter": _counter,
    **{f"builtins.{name}": _no_call for name in ("list", "dict", "tuple", "str", "int", "float", "bool", "object")},
    "builtins.set": _set,
    "builtins.frozenset": _frozenset,
    "builtins.complex": _complex,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytearray,
    "builtins.getattr": _getattr,
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstructor,
    "argparse.Namespace": _stand,
    "types.SimpleNamespace": _stand,
    "io.BytesIO": _stand,
    "torch.device": _stand,
    "torch.serialization._get_layout": _stand,
    **{f"torch.{name}": _no_call for name in ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")},
    **{f"torch.per_{name}": _no_call for name in ("tensor_affine", "tensor_symmetric", "channel_affine", "channel_symmetric")},
    "torch.per_channel_affine_float_qparams": _no_call,
    **{f"numpy.{core}.multiarray.{name}": _stand for core in ("core", "_core") for name in ("_reconstruct", "scalar")},
    **{f"numpy.{core}.numeric._frombuffer": _stand for core in ("core", "_core")},
    "numpy.dtype": _stand,
    "numpy.ndarray": _no_call,
    **{f"pathlib.{name}": _stand for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")},
    **{f"datetime.{name}": _stand for name in ("date", "datetime", "time", "timedelta", "timezone")},
    "signal.Signals": _stand,
}
_FRAMEWORKS = ("megatron", "transformer_engine", "torch._C", "torch.nn.functional", "deepspeed", "apex", "nemo", "numpy.dtypes")
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "_io": "io"}
_OLD_NAMES = {"__builtin__.long": "int", "__builtin__.unicode": "str"}
"""Protocol 2, torch's default, spells two built-in types as Python 2 did."""


def _known() -> dict[str, Any]:
    table: dict[str, Any] = {f"torch.{name}": TorchDtype(name) for name in _DTYPES}
    for name, dtype in STORAGES.items():
        table[f"torch.{name}Storage"] = table[f"torch.cuda.{name}Storage"] = StorageType(dtype)
    for name in ("torch.UntypedStorage", "torch.storage.UntypedStorage", "torch.storage._UntypedStorage"):
        table[name] = StorageType(None)
    for full, build in _BUILDERS.items():
        module, _, name = full.rpartition(".")
        table[full] = Global(module, name, build)
    return table


_KNOWN = _known()


def find(module: str, name: str, file: str) -> Any:
    """What stands for ``module.name``; nothing is imported."""
    name = _OLD_NAMES.get(f"{module}.{name}", name)
    module = _OLD_MODULES.get(module, module)
    full = f"{module}.{name}"
    if (found := _KNOWN.get(full)) is not None:
        return found
    if any(module == package or module.startswith(package + ".") for package in _FRAMEWORKS):
        return Global(module, name, _stand)
    raise UnsafePickleError(
        f"the pickle asks for {full[:200]!r}, which is no tensor, plain value or known framework object; it was not run",
        file=file,
        remedy="If you trust the file, load it where it was made and save only tensors and plain values with torch.save",
    )
