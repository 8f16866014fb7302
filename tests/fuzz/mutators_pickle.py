"""Mutations of pickles, opcode by opcode.

A pickle is cut into its instructions (opcode and argument together); edits delete, repeat, swap, insert and replace them,
change arguments with their lengths kept true or made to lie, and plant what attacks are made of: globals by every
spelling, calls, memo tricks, marks. Half of the edits leave a machine's stack as it was, so the pickle stays valid.
"""

from __future__ import annotations

import pickle
import pickletools
import random
import struct
from collections.abc import Callable, Sequence

from .mutators import EDGES, TEXTS, edge, mutate_bytes

__all__ = ["GLOBALS", "instructions", "mutate_pickle"]

GLOBALS: tuple[tuple[str, str], ...] = (
    *(("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3"), ("torch._utils", "_rebuild_parameter")),
    *(("torch._utils", "_rebuild_tensor"), ("torch._tensor", "_rebuild_from_type_v2"), ("torch.nn.parameter", "Parameter")),
    *(("torch", "FloatStorage"), ("torch.storage", "UntypedStorage"), ("torch", "QInt8Storage"), ("torch", "BFloat16Storage")),
    *(("torch", "float32"), ("torch", "float4_e2m1fn_x2"), ("torch", "complex32"), ("torch", "Size"), ("torch", "device")),
    *(("torch._utils", "_rebuild_qtensor"), ("torch._utils", "_rebuild_sparse_tensor"), ("torch.serialization", "_get_layout")),
    *(("collections", "OrderedDict"), ("collections", "defaultdict"), ("collections", "Counter"), ("argparse", "Namespace")),
    *(("builtins", "set"), ("builtins", "frozenset"), ("builtins", "complex"), ("builtins", "bytes"), ("builtins", "bytearray")),
    *(("builtins", "getattr"), ("__builtin__", "getattr"), ("builtins", "list"), ("builtins", "dict"), ("_codecs", "encode")),
    *(("copyreg", "_reconstructor"), ("copy_reg", "_reconstructor"), ("types", "SimpleNamespace"), ("io", "BytesIO"), ("_io", "BytesIO")),
    *(("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "scalar"), ("numpy", "dtype"), ("numpy", "ndarray")),
    *(("megatron.core.enums", "ModelType"), ("transformer_engine.x", "Recipe"), ("pathlib", "PosixPath"), ("datetime", "timedelta")),
    *(("signal", "Signals"), ("nemo.a", "B"), ("apex.b", "C"), ("numpy.dtypes", "Float32DType"), ("deepspeed.x", "Y.Z")),
    *(("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "exec"), ("subprocess", "Popen"), ("torch", "load")),
    *(
        ("megatron", "__builtins__"),
        ("torch._C", "_nn"),
        ("megatron.core", "os.system"),
        ("", ""),
        ("torch", "nn.Module"),
        ("é", "x\udc80"),
    ),
)
"""Names that the allow-list knows, and some that it must not."""

_SIMPLE = (
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.EMPTY_TUPLE, pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.EMPTY_SET, pickle.DUP),
    *(pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.APPEND, pickle.APPENDS),
    *(
        pickle.SETITEM,
        pickle.SETITEMS,
        pickle.ADDITEMS,
        pickle.FROZENSET,
        pickle.MEMOIZE,
        pickle.STACK_GLOBAL,
        pickle.REDUCE,
        pickle.NEWOBJ,
    ),
    *(pickle.NEWOBJ_EX, pickle.BUILD, pickle.BINPERSID, pickle.STOP, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.OBJ, pickle.LIST),
)
_WIDE = {
    pickle.BINUNICODE: 4,
    pickle.SHORT_BINUNICODE: 1,
    pickle.BINUNICODE8: 8,
    pickle.BINBYTES: 4,
    pickle.SHORT_BINBYTES: 1,
    pickle.BINBYTES8: 8,
    pickle.BYTEARRAY8: 8,
    pickle.BINSTRING: 4,
    pickle.SHORT_BINSTRING: 1,
    pickle.LONG1: 1,
    pickle.LONG4: 4,
}
"""Opcodes whose argument is a length and so many bytes: the width of the length."""
_FIXED = {
    pickle.BININT: 4,
    pickle.BININT1: 1,
    pickle.BININT2: 2,
    pickle.BINGET: 1,
    pickle.LONG_BINGET: 4,
    pickle.BINPUT: 1,
    pickle.LONG_BINPUT: 4,
}

Instructions = list[bytes]


def instructions(data: bytes) -> Instructions:
    """`data` cut before each opcode; what cannot be cut stays whole at the end."""
    cuts = []
    try:
        for _, _, at in pickletools.genops(data):
            cuts.append(at or 0)
    except (ValueError, UnicodeDecodeError, struct.error, OverflowError, IndexError):
        pass
    cuts = cuts or [0]
    return [data[begin:end] for begin, end in zip(cuts, [*cuts[1:], len(data)], strict=True)]


def text_op(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw


def global_op(module: str, name: str, rng: random.Random) -> bytes:
    """A global by one of its spellings, on the stack in the end."""
    draw = rng.random()
    if draw < 0.5 and "\n" not in module + name:
        return pickle.GLOBAL + f"{module}\n{name}\n".encode("utf-8", "surrogatepass")
    if draw < 0.8:
        return text_op(module) + text_op(name) + pickle.STACK_GLOBAL
    slot = struct.pack("<I", rng.randrange(1 << 20))
    return text_op(module) + pickle.LONG_BINPUT + slot + pickle.POP + pickle.LONG_BINGET + slot + text_op(name) + pickle.STACK_GLOBAL


def _int_op(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return pickle.BININT + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return pickle.LONG1 + bytes([len(raw)]) + raw


def constant(rng: random.Random) -> bytes:
    """Instructions that push one plain value."""
    return rng.choice(
        (
            *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.EMPTY_TUPLE, pickle.EMPTY_SET),
            *(_int_op(edge(rng)), _int_op(-edge(rng)), text_op(rng.choice(TEXTS)), pickle.BINFLOAT + struct.pack(">d", rng.uniform(-9, 9))),
            *(pickle.SHORT_BINBYTES + b"\x02ab", pickle.BYTEARRAY8 + struct.pack("<Q", 1) + b"z", pickle.SHORT_BINSTRING + b"\x01\xff"),
            *(pickle.EMPTY_TUPLE + pickle.TUPLE1, pickle.MARK + pickle.FROZENSET, pickle.NONE * 3 + pickle.TUPLE3),
            *(
                global_op(*rng.choice(GLOBALS), rng),
                pickle.MARK + pickle.NONE + _int_op(1) + pickle.TUPLE,
                pickle.BINBYTES8 + struct.pack("<Q", 0),
            ),
        )
    )


def call(rng: random.Random) -> bytes:
    """Instructions that call a global, and so push one value if they may."""
    arguments = b"".join(constant(rng) for _ in range(rng.choice((0, 0, 1, 1, 2, 3, 4))))
    made = global_op(*rng.choice(GLOBALS), rng) + pickle.MARK + arguments + pickle.TUPLE
    made += rng.choice((pickle.REDUCE, pickle.REDUCE, pickle.NEWOBJ, pickle.EMPTY_DICT + pickle.NEWOBJ_EX))
    if rng.random() < 0.3:
        made += constant(rng) + rng.choice((pickle.BUILD, pickle.APPEND, text_op("k") + pickle.SETITEM))
    return made


def _delete(ops: Instructions, at: int, rng: random.Random) -> Instructions:
    return ops[:at] + ops[at + rng.choice((1, 1, 1, 2, 5)) :]


def _swap(ops: Instructions, at: int, rng: random.Random) -> Instructions:
    other = rng.randrange(len(ops))
    ops[at], ops[other] = ops[other], ops[at]
    return ops


def _copy(ops: Instructions, at: int, rng: random.Random) -> Instructions:
    begin = rng.randrange(len(ops))
    return ops[:at] + ops[begin : begin + rng.choice((1, 1, 2, 6, 20))] + ops[at:]


def _simple(ops: Instructions, at: int, rng: random.Random) -> Instructions:
    return [*ops[:at], rng.choice(_SIMPLE), *ops[at + (rng.random() < 0.5) :]]


def _discarded(ops: Instructions, at: int, rng: random.Random) -> Instructions:
    """Push something and take it off again: valid wherever it lands."""
    pushed = constant(rng) if rng.random() < 0.7 else call(rng)
    around = (pickle.MARK + pushed, pickle.POP_MARK) if rng.random() < 0.3 else (pushed, pickle.POP)
    memo = pickle.LONG_BINPUT + struct.pack("<I", rng.choice((0, 1, 5, 200, 1 << 31))) if rng.random() < 0.2 else b""
    return [*ops[:at], around[0], memo, around[1], *ops[at:]]


def _wrapped(ops: Instructions, at: int, rng: random.Random) -> Instructions:
    """The last value in a tuple, a list or a dict of its own."""
    wrap = rng.choice((pickle.TUPLE1, pickle.DUP + pickle.TUPLE2, pickle.TUPLE1 * rng.choice((3, 100, 300)), constant(rng) + pickle.TUPLE2))
    end = next((i for i in range(len(ops) - 1, -1, -1) if ops[i] == pickle.STOP), len(ops)) if rng.random() < 0.3 else at
    return [*ops[:end], wrap, *ops[end:]]


def _replaced_constant(ops: Instructions, at: int, rng: random.Random) -> Instructions:
    """A value that is one instruction for another value."""
    spots = [i for i, op in enumerate(ops) if op[:1] in (*_WIDE, *_FIXED, *_SIMPLE[:7], pickle.GLOBAL) and op[:1] not in b"hjqr"]
    if spots:
        ops[rng.choice(spots)] = constant(rng) if rng.random() < 0.7 else call(rng)
    return ops


def _argument(ops: Instructions, at: int, rng: random.Random) -> Instructions:
    """One argument changed, its length true."""
    spots = [i for i, op in enumerate(ops) if op[:1] in _WIDE or op[:1] in _FIXED or op[:1] == pickle.GLOBAL]
    if not spots:
        return ops
    at = rng.choice(spots)
    kind, value = ops[at][:1], ops[at][1:]
    if kind == pickle.GLOBAL:
        ops[at] = global_op(*rng.choice(GLOBALS), rng)
    elif kind in _FIXED:
        width = _FIXED[kind]
        near = int.from_bytes(value, "little")
        ops[at] = kind + (edge(rng, (near,)) & (1 << 8 * width) - 1).to_bytes(width, "little")
    else:
        width = _WIDE[kind]
        raw = rng.choice((mutate_bytes(value[width:], rng), rng.choice(TEXTS).encode("utf-8", "surrogatepass")))
        raw = raw[: (1 << 8 * min(width, 4)) - 1]
        ops[at] = kind + len(raw).to_bytes(width, "little") + raw
    return ops


def _lie(ops: Instructions, at: int, rng: random.Random) -> Instructions:
    """A length that is not so."""
    spots = [i for i, op in enumerate(ops) if op[:1] in _WIDE or op[:1] == pickle.FRAME]
    if spots:
        at = rng.choice(spots)
        width = _WIDE.get(ops[at][:1], 8)
        value = edge(rng, (len(ops[at]), len(ops))) & (1 << 8 * width) - 1
        ops[at] = ops[at][:1] + value.to_bytes(width, "little") + ops[at][1 + width :]
    return ops


def _widened(ops: Instructions, at: int, rng: random.Random) -> Instructions:
    """Text or bytes by a longer or shorter form of the same opcode."""
    forms = rng.choice(
        ((pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8), (pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8))
    )
    spots = [i for i, op in enumerate(ops) if op[:1] in forms]
    if spots:
        at = rng.choice(spots)
        raw, form = ops[at][1 + _WIDE[ops[at][:1]] :], rng.choice(forms)
        if len(raw) < 1 << 8 * _WIDE[form]:
            ops[at] = form + len(raw).to_bytes(_WIDE[form], "little") + raw
    return ops


def _header(ops: Instructions, at: int, rng: random.Random) -> Instructions:
    extra = rng.choice(
        (pickle.PROTO + bytes([rng.choice((0, 2, 3, 4, 5, 6, 255))]), pickle.FRAME + struct.pack("<Q", rng.choice(EDGES) & (1 << 64) - 1))
    )
    return [extra, *ops] if rng.random() < 0.5 else [*ops[:at], extra, *ops[at:]]


def _forbidden(ops: Instructions, at: int, rng: random.Random) -> Instructions:
    odd = (
        b"\x82\x01",
        b"\x83\x01\x00",
        b"\x84\x01\0\0\0",
        b"I1\n",
        b"S'x'\n",
        b"P0\n",
        b"(ios\nsystem\n",
        b"(cos\nsystem\no",
        b"\x97",
        b"d",
        b"l",
        b"p0\n",
        b"L1L\n",
    )
    return [*ops[:at], rng.choice(odd), *ops[at:]]


def _raw(ops: Instructions, at: int, rng: random.Random) -> Instructions:
    return [mutate_bytes(b"".join(ops), rng)]


_EDITS: tuple[Callable[[Instructions, int, random.Random], Instructions], ...] = (
    *(_delete, _swap, _copy, _simple, _wrapped, _lie, _forbidden, _raw, _header),
    *(_discarded, _discarded, _discarded, _replaced_constant, _replaced_constant, _argument, _argument, _argument, _widened),
)


def mutate_pickle(data: bytes, rng: random.Random) -> bytes:
    """One edit of a pickle's instructions, or a few."""
    ops = instructions(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        ops = rng.choice(_EDITS)(ops, rng.randrange(len(ops)), rng) or [pickle.STOP]
    return b"".join(ops)


def compose(parts: Sequence[bytes]) -> bytes:
    """A protocol 4 pickle of instructions that leave one value."""
    return pickle.PROTO + b"\x04" + b"".join(parts) + pickle.STOP
