"""A pickle machine that cannot run anything: ``data.pkl`` of a torch file as plain values and stand-ins.

1. The opcodes of protocols 2 to 5 are interpreted one by one over the bytes; text opcodes (protocols 0 and 1), extension
   codes and out-of-band buffers are refused.
2. A global is never imported. It is looked up by its spelled name in the closed table of `_pickle_names`; what is not
   there is `UnsafePickleError`.
3. REDUCE and NEWOBJ call only that table's builders; BUILD, SETITEMS and APPENDS reach only dicts, lists and
   stand-ins that this machine made. No attribute is ever looked up or set on anything else.
4. Nothing is sized by a number from the file, keys are small and cheap to hash, and the number of steps is bounded, so a
   hostile file costs bounded time and memory.

Boundary: pure, no IO. The result still shares and may contain itself; `_torch_tree` resolves that.
"""

from __future__ import annotations

import pickle
import struct
import sys
from collections.abc import Callable
from itertools import repeat
from typing import Any

from ...errors import ContainerError, ShardwrightError, UnsafePickleError
from ._pickle_names import Global, Malformed, Ordered, Stand, Storage, StorageType, find, key, rebuild_tensor

__all__ = ["MALFORMED", "unpickle"]

MAX_STEPS = 1 << 24
"""Opcodes; a tensor takes about 35, so this is some 400,000 tensors in one file."""
MAX_ODD_KEYS = 4096
"""Tuples as keys. Unlike strings, their hashes can be made to collide on purpose."""
MAX_NAME = 256
"""Characters of a global's module and of its name."""

MALFORMED = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError, MemoryError, struct.error)
"""What interpreting hostile bytes may raise; callers turn it into `ContainerError`."""

_PER_BYTE, _ALLOWANCE = 64, 1 << 16
"""Bytes that calls and empty sets may take: so many for each byte of the pickle, and so many more. No honest value takes as many."""
_SIZED = frozenset({str, bytes, bytearray, list, tuple, dict, set, frozenset, Ordered})


class _Machine:
    __slots__ = ("data", "file", "globals", "marks", "memo", "odd_keys", "pos", "spent", "stack")

    def __init__(self, data: bytes, file: str) -> None:
        self.data = data
        self.file = file
        self.pos = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[tuple[str, str], Any] = {}
        self.odd_keys = 0
        self.spent = 0

    def run(self) -> Any:
        data, table = self.data, _TABLE
        for _ in repeat(None, MAX_STEPS):
            op = data[self.pos]
            self.pos += 1
            if op == _STOP:
                return self.stack.pop()
            table[op](self)
        raise Malformed(f"it takes more than {MAX_STEPS} steps")

    def take(self, nbytes: int) -> bytes:
        end = self.pos + nbytes
        if end > len(self.data):
            raise Malformed("it ends in the middle of a value")
        part = self.data[self.pos : end]
        self.pos = end
        return part

    def number(self, nbytes: int) -> int:
        # Unchecked, for speed: past the end there is no next opcode either, and `run` finds that.
        at = self.pos
        self.pos = at + nbytes
        return int.from_bytes(self.data[at : at + nbytes], "little")

    def byte(self) -> int:
        at = self.pos
        self.pos = at + 1
        return self.data[at]

    def line(self) -> str:
        end = self.data.index(b"\n", self.pos)
        part = self.data[self.pos : end]
        self.pos = end + 1
        return part.decode()

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def push_global(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise Malformed("a global's name is not text")
        if len(module) > MAX_NAME or len(name) > MAX_NAME:
            raise Malformed(f"a global's name is longer than {MAX_NAME} characters")
        found = self.globals.get((module, name))
        if found is None:
            found = self.globals[module, name] = find(module, name, self.file)
        self.stack.append(found)

    def call(self, func: Any, args: Any) -> None:
        if type(func) is not Global or type(args) is not tuple:
            raise Malformed(f"a {type(func).__name__} is called")
        made = func.build(func, args)
        if args and func.build is not rebuild_tensor:
            # A builder may copy its arguments: what is memoised once must not be copied a million times.
            self.spend(sys.getsizeof(made) + sum(len(a) for a in (args, *args) if type(a) in _SIZED and len(a) > 64))
        self.stack.append(made)

    def spend(self, nbytes: int) -> None:
        """Count memory that a few opcodes can ask for out of proportion to their own length."""
        self.spent += nbytes
        if self.spent > _PER_BYTE * len(self.data) + _ALLOWANCE:
            raise Malformed("a few bytes ask for much memory, over and over")

    def key(self, value: Any) -> Any:
        if type(value) is str:
            return value
        if isinstance(value, tuple):
            self.odd_keys += 1
            if self.odd_keys > MAX_ODD_KEYS:
                raise Malformed(f"more than {MAX_ODD_KEYS} tuples are used as keys")
        return key(value)

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is Stand:
            target.items.extend(items)
        else:
            raise Malformed(f"something is appended to a {type(target).__name__}")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if len(items) % 2:
            raise Malformed("a key has no value")
        pairs = ((self.key(items[i]), items[i + 1]) for i in range(0, len(items), 2))
        if isinstance(target, dict):
            for key, value in pairs:
                target[key] = value
        elif type(target) is Stand:
            target.items.extend(pairs)
        else:
            raise Malformed(f"an item is set on a {type(target).__name__}")

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is Stand:
            target.state = state
        elif type(target) is Ordered and type(state) is dict:
            target.attributes = state
        else:
            raise Malformed(f"state is set on a {type(target).__name__}")

    def persistent(self) -> None:
        match self.stack.pop():
            case ("storage", StorageType() as kind, str() as key, str(), int() as count) if 0 <= count < 1 << 63:
                self.stack.append(Storage(key, kind.dtype, count))
            case _:
                raise Malformed("a persistent id is not ('storage', type, key, location, count)")


def unpickle(data: bytes, file: str) -> Any:
    """The value that `data` pickles, made of plain values and the stand-ins of this module.

    Raises
    ------
    UnsafePickleError
        It names something outside the table.
    ContainerError
        It is malformed.
    """
    try:
        return _Machine(data, file).run()
    except ShardwrightError:
        raise
    except MALFORMED as error:
        text = str(error) if isinstance(error, Malformed) else type(error).__name__
        raise ContainerError(f"data.pkl is malformed: {text}", file=file, remedy="Copy the file again, or save it again") from None


# One function per opcode.

_Handler = Callable[[_Machine], None]
_STOP = pickle.STOP[0]
_UNSAFE = {
    pickle.EXT1[0]: "an extension code",
    pickle.EXT2[0]: "an extension code",
    pickle.EXT4[0]: "an extension code",
    pickle.NEXT_BUFFER[0]: "an out-of-band buffer",
    pickle.READONLY_BUFFER[0]: "an out-of-band buffer",
}


def _unknown(m: _Machine) -> None:
    op = m.data[m.pos - 1]
    if op in _UNSAFE:
        raise UnsafePickleError(f"the pickle asks for {_UNSAFE[op]}", file=m.file, remedy="Save it again with torch.save")
    raise Malformed(f"opcode 0x{op:02x} at byte {m.pos - 1} is not one of protocols 2 to 5")


def _proto(m: _Machine) -> None:
    if m.number(1) > pickle.HIGHEST_PROTOCOL:
        raise Malformed("its protocol is newer than 5")


def _frame(m: _Machine) -> None:
    m.take(8)  # how far a stream may read ahead; the bytes are all here


def _constant(value: Any) -> _Handler:
    return lambda m: m.stack.append(value)


def _unsigned(nbytes: int) -> _Handler:
    return lambda m: m.stack.append(m.number(nbytes))


def _byte(m: _Machine) -> None:
    m.stack.append(m.byte())


def _text(width: int) -> _Handler:
    return lambda m: m.stack.append(m.take(m.number(width)).decode("utf-8", "surrogatepass"))


def _old_text(width: int) -> _Handler:
    return lambda m: m.stack.append(m.take(m.number(width)).decode("utf-8", "surrogateescape"))


def _raw(width: int) -> _Handler:
    return lambda m: m.stack.append(m.take(m.number(width)))


def _long(width: int) -> _Handler:
    return lambda m: m.stack.append(int.from_bytes(m.take(m.number(width)), "little", signed=True))


def _get(m: _Machine) -> None:
    m.stack.append(m.memo[m.byte()])


def _long_get(m: _Machine) -> None:
    m.stack.append(m.memo[m.number(4)])


def _put(m: _Machine) -> None:
    m.memo[m.byte()] = m.stack[-1]


def _long_put(m: _Machine) -> None:
    m.memo[m.number(4)] = m.stack[-1]


def _memoize(m: _Machine) -> None:
    m.memo[len(m.memo)] = m.stack[-1]


def _mark(m: _Machine) -> None:
    m.marks.append(m.stack)
    m.stack = []


def _tuple(m: _Machine) -> None:
    items = m.pop_mark()
    m.stack.append(tuple(items))


def _short_tuple(count: int) -> _Handler:
    def build(m: _Machine) -> None:
        if len(m.stack) < count:
            raise Malformed("a tuple has too few items")
        m.stack[-count:] = [tuple(m.stack[-count:])]

    return build


def _append(m: _Machine) -> None:
    m.extend([m.stack.pop()])


def _set_item(m: _Machine) -> None:
    value = m.stack.pop()
    m.set_items([m.stack.pop(), value])


def _empty_set(m: _Machine) -> None:
    m.spend(216)  # an empty set is by far the largest thing that one opcode makes
    m.stack.append(set())


def _add_items(m: _Machine) -> None:
    items = m.pop_mark()
    if type(m.stack[-1]) is not set:
        raise Malformed(f"something is added to a {type(m.stack[-1]).__name__}")
    m.stack[-1].update(m.key(v) for v in items)


def _frozen(m: _Machine) -> None:
    items = m.pop_mark()
    m.stack.append(frozenset(m.key(v) for v in items))


def _new_object(m: _Machine) -> None:
    args = m.stack.pop()
    m.call(m.stack.pop(), args)


def _new_object_with_keywords(m: _Machine) -> None:
    keywords, args = m.stack.pop(), m.stack.pop()
    if type(keywords) is not dict or type(args) is not tuple:
        raise Malformed("an object is made from something else than arguments and keywords")
    m.call(m.stack.pop(), (*args, keywords) if keywords else args)


def _stack_global(m: _Machine) -> None:
    name = m.stack.pop()
    m.push_global(m.stack.pop(), name)


def _pop(m: _Machine) -> None:
    # A pickler pops a mark when a tuple turns out to contain itself.
    if m.stack:
        m.stack.pop()
    else:
        m.pop_mark()


def _pop_mark(m: _Machine) -> None:
    m.pop_mark()


_HANDLERS: dict[bytes, _Handler] = {
    pickle.PROTO: _proto,
    pickle.FRAME: _frame,
    pickle.MARK: _mark,
    pickle.POP: _pop,
    pickle.POP_MARK: _pop_mark,
    pickle.DUP: lambda m: m.stack.append(m.stack[-1]),
    pickle.NONE: _constant(None),
    pickle.NEWTRUE: _constant(True),
    pickle.NEWFALSE: _constant(False),
    pickle.BININT: lambda m: m.stack.append(int.from_bytes(m.take(4), "little", signed=True)),
    pickle.BININT1: _byte,
    pickle.BININT2: _unsigned(2),
    pickle.LONG1: _long(1),
    pickle.LONG4: _long(4),
    pickle.BINFLOAT: lambda m: m.stack.append(struct.unpack(">d", m.take(8))[0]),
    pickle.SHORT_BINSTRING: _old_text(1),
    pickle.BINSTRING: _old_text(4),
    pickle.SHORT_BINUNICODE: _text(1),
    pickle.BINUNICODE: _text(4),
    pickle.BINUNICODE8: _text(8),
    pickle.SHORT_BINBYTES: _raw(1),
    pickle.BINBYTES: _raw(4),
    pickle.BINBYTES8: _raw(8),
    pickle.BYTEARRAY8: lambda m: m.stack.append(bytearray(m.take(m.number(8)))),
    pickle.EMPTY_TUPLE: _constant(()),
    pickle.EMPTY_LIST: lambda m: m.stack.append([]),
    pickle.EMPTY_DICT: lambda m: m.stack.append({}),
    pickle.EMPTY_SET: _empty_set,
    pickle.TUPLE: _tuple,
    pickle.TUPLE1: _short_tuple(1),
    pickle.TUPLE2: _short_tuple(2),
    pickle.TUPLE3: _short_tuple(3),
    pickle.APPEND: _append,
    pickle.APPENDS: lambda m: m.extend(m.pop_mark()),
    pickle.SETITEM: _set_item,
    pickle.SETITEMS: lambda m: m.set_items(m.pop_mark()),
    pickle.ADDITEMS: _add_items,
    pickle.FROZENSET: _frozen,
    pickle.BINGET: _get,
    pickle.LONG_BINGET: _long_get,
    pickle.BINPUT: _put,
    pickle.LONG_BINPUT: _long_put,
    pickle.MEMOIZE: _memoize,
    pickle.GLOBAL: lambda m: m.push_global(m.line(), m.line()),
    pickle.STACK_GLOBAL: _stack_global,
    pickle.REDUCE: _new_object,
    pickle.NEWOBJ: _new_object,
    pickle.NEWOBJ_EX: _new_object_with_keywords,
    pickle.BUILD: lambda m: m.build(),
    pickle.BINPERSID: lambda m: m.persistent(),
}
_TABLE: list[_Handler] = [_HANDLERS.get(bytes([op]), _unknown) for op in range(256)]
