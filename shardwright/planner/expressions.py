"""The one little language of the tables: arithmetic and comparison over config fields and ``layer``.

1. The text is parsed with `ast` and every node is checked against a closed list: names, numbers, strings, ``+ - * // %``,
   comparisons (``in`` a literal tuple too), ``and or not``, and ``a if c else b``. No calls, no attributes, no subscripts;
   and arithmetic is for numbers: ``'a' * 10**9`` in Python would be a gigabyte.
2. The checked tree becomes nested functions once; nothing is handed to Python's `eval`, and evaluation sees the given fields
   and nothing else.

Boundary: pure. Errors name the text and the fields that exist.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..errors import ConfigError, TableError, short

__all__ = ["Expression", "parse"]

_ALLOWED = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.BinOp, ast.Add, ast.Sub, ast.Mult,
    ast.FloorDiv, ast.Mod, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn, ast.IfExp,
    ast.Name, ast.Load, ast.Constant, ast.Tuple, ast.List,
)  # fmt: skip
_WORDS = {"true": True, "false": False, "none": None}
_LONGEST = 500
_DEEPEST = 100
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda one, several: one in several,
    ast.NotIn: lambda one, several: one not in several,
}


@dataclass(frozen=True, slots=True)
class Expression:
    """A checked expression.

    >>> parse("hidden_size // num_attention_heads")({"hidden_size": 64, "num_attention_heads": 8})
    8
    """

    text: str
    names: frozenset[str]
    numbers: frozenset[str]
    value: Callable[[Mapping[str, Any]], Any] = field(repr=False, compare=False)

    def __call__(self, fields: Mapping[str, Any]) -> Any:
        """The value over `fields`.

        Raises
        ------
        ConfigError
            A field is missing or has a type that the expression cannot use.
        """
        try:
            if wrong := next((n for n in self.numbers if n in fields and not isinstance(fields[n], int | float | None)), None):
                raise TypeError(f"{wrong} is no number")
            return self.value({n: fields[n] if n in fields else _WORDS[n] for n in self.names})
        except KeyError as error:
            known = ", ".join(sorted(map(str, fields)))
            raise ConfigError(f"{self.text!r} needs the field {error.args[0]!r}", remedy=f"Known: {known}") from None
        except (TypeError, ZeroDivisionError, OverflowError, ValueError) as error:
            values = {n: fields.get(n) for n in sorted(self.names)}
            raise ConfigError(f"{self.text!r} cannot be computed ({error})", actual=short(values, 400)) from None


def parse(text: object, where: str = "") -> Expression:
    """Check and compile an expression; plain numbers and booleans of a TOML table are expressions too.

    Raises
    ------
    TableError
        Not an expression of this language; names `where` and the offending text.
    """
    if not isinstance(text, str | int | float) or (isinstance(text, int) and abs(text) >= 1 << 64):
        raise TableError("not an expression", file=where, actual=short(text))
    source = str(text).lower() if isinstance(text, bool) else str(text)
    if len(source) > _LONGEST:
        raise TableError(f"an expression is longer than {_LONGEST} characters", file=where, actual=source[:60] + "…")
    if not source.isascii():
        raise TableError("an expression is ASCII", file=where, actual=repr(source))
    if (known := _parsed.get(source)) is not None:
        return known
    try:
        with warnings.catch_warnings():
            # What Python would only warn of, such as ``1if x else 2``, is no expression here.
            warnings.simplefilter("error")
            tree = ast.parse(source.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise TableError(f"not an expression ({getattr(error, 'msg', error)})", file=where, actual=repr(source)) from None
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED) or (isinstance(node, ast.Constant) and not isinstance(node.value, str | int | float | None)):
            raise TableError(
                f"{type(node).__name__} is not allowed in an expression", file=where, actual=repr(source),
                remedy="Allowed: names, numbers, strings, + - * // %, comparisons, and/or/not, a if c else b",
            )  # fmt: skip
    operands = [leaf for node in ast.walk(tree) for leaf in _operands(node)]
    for leaf in operands:
        if isinstance(leaf, ast.Tuple | ast.List) or (isinstance(leaf, ast.Constant) and not isinstance(leaf.value, int | float)):
            raise TableError("arithmetic is for numbers", file=where, actual=repr(source))
    names = frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
    numbers = frozenset(leaf.id for leaf in operands if isinstance(leaf, ast.Name))
    if _depth(tree) > _DEEPEST:
        raise TableError(f"an expression is nested more than {_DEEPEST} times", file=where, actual=source[:60] + "…")
    found = Expression(source, names, numbers, _compiled(tree.body))
    if len(_parsed) < _MOST_PARSED:
        _parsed[source] = found
    return found


_MOST_PARSED = 4096
_parsed: dict[str, Expression] = {}
"""Tables say few things many times: ``true``, ``hidden_size``."""


def _depth(tree: ast.AST) -> int:
    """Levels of the tree."""
    depth, level = 0, [tree]
    while level:
        depth, level = depth + 1, [child for node in level for child in ast.iter_child_nodes(node)]
    return depth


def _compiled(node: ast.expr) -> Callable[[Mapping[str, Any]], Any]:
    """The value of a checked node over named values."""
    match node:
        case ast.Constant(value=constant):
            return lambda values: constant
        case ast.Name(id=name):
            return operator.itemgetter(name)
        case ast.Tuple(elts=members) | ast.List(elts=members):
            parts = [_compiled(member) for member in members]
            kind = tuple if isinstance(node, ast.Tuple) else list
            return lambda values: kind(part(values) for part in parts)
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            one = _compiled(inner)
            return lambda values: not one(values)
        case ast.UnaryOp(operand=inner):
            one = _compiled(inner)
            return lambda values: -one(values)
        case ast.BinOp(left=left, op=op, right=right):
            apply, one, two = _BINARY[type(op)], _compiled(left), _compiled(right)
            return lambda values: apply(one(values), two(values))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            condition, one, two = map(_compiled, (test, body, orelse))
            return lambda values: one(values) if condition(values) else two(values)
        case ast.BoolOp(op=op, values=members):
            return partial(_first_that, isinstance(op, ast.Or), [_compiled(member) for member in members])
        case ast.Compare(left=left, ops=ops, comparators=others):
            return partial(_chain, _compiled(left), [(_COMPARE[type(op)], _compiled(other)) for op, other in zip(ops, others, strict=True)])
    raise AssertionError(f"{type(node).__name__} passed the check")


def _first_that(settles: bool, parts: Sequence[Callable[[Mapping[str, Any]], Any]], values: Mapping[str, Any]) -> Any:
    """``or`` and ``and``: the first part whose truth settles it, else the last."""
    found = None
    for part in parts:
        found = part(values)
        if bool(found) is settles:
            break
    return found


def _chain(
    first: Callable[[Mapping[str, Any]], Any],
    links: Sequence[tuple[Callable[[Any, Any], bool], Callable[[Mapping[str, Any]], Any]]],
    values: Mapping[str, Any],
) -> bool:
    """``a < b < c``, each compared with the one before it until one fails."""
    left = first(values)
    for holds, part in links:
        right = part(values)
        if not holds(left, right):
            return False
        left = right
    return True


def _operands(node: ast.AST) -> list[ast.expr]:
    """The leaves whose values arithmetic at `node` itself may meet; arithmetic below it speaks for its own."""
    match node:
        case ast.BinOp():
            pending = [node.left, node.right]
        case ast.UnaryOp(op=ast.USub()):
            pending = [node.operand]
        case _:
            return []
    found = []
    while pending:
        match value := pending.pop():
            case ast.IfExp():
                pending += [value.body, value.orelse]
            case ast.BoolOp():
                pending += value.values
            case ast.BinOp() | ast.UnaryOp() | ast.Compare():
                pass
            case _:
                found.append(value)
    return found
