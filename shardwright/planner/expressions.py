"""The one little language of the tables: arithmetic and comparison over config fields and ``layer``.

1. The text is parsed with `ast` and every node is checked against a closed list: names, numbers, strings, ``+ - * // %``,
   comparisons (``in`` a literal tuple too), ``and or not``, and ``a if c else b``. No calls, no attributes, no subscripts;
   and arithmetic is for numbers: ``'a' * 10**9`` in Python would be a gigabyte.
2. The checked tree is compiled once; evaluation sees the given fields and nothing else.

Boundary: pure. Errors name the text and the fields that exist.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from ..errors import ConfigError, TableError

__all__ = ["Expression", "parse"]

_ALLOWED = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.BinOp, ast.Add, ast.Sub, ast.Mult,
    ast.FloorDiv, ast.Mod, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn, ast.IfExp,
    ast.Name, ast.Load, ast.Constant, ast.Tuple, ast.List,
)  # fmt: skip
_WORDS = {"true": True, "false": False, "none": None}
_LONGEST = 500


@dataclass(frozen=True, slots=True)
class Expression:
    """A checked expression.

    >>> parse("hidden_size // num_attention_heads")({"hidden_size": 64, "num_attention_heads": 8})
    8
    """

    text: str
    names: frozenset[str]
    numbers: frozenset[str]
    code: CodeType = field(repr=False, compare=False)

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
            return eval(self.code, {"__builtins__": {}}, {n: fields[n] if n in fields else _WORDS[n] for n in self.names})
        except KeyError as error:
            known = ", ".join(sorted(map(str, fields)))
            raise ConfigError(f"{self.text!r} needs the field {error.args[0]!r}", remedy=f"Known: {known}") from None
        except (TypeError, ZeroDivisionError) as error:
            values = {n: fields.get(n) for n in sorted(self.names)}
            raise ConfigError(f"{self.text!r} cannot be computed ({error})", actual=values) from None


def parse(text: object, where: str = "") -> Expression:
    """Check and compile an expression; plain numbers and booleans of a TOML table are expressions too.

    Raises
    ------
    TableError
        Not an expression of this language; names `where` and the offending text.
    """
    source = str(text).lower() if isinstance(text, bool) else str(text)
    if len(source) > _LONGEST:
        raise TableError(f"an expression is longer than {_LONGEST} characters", file=where, actual=source[:60] + "…")
    try:
        tree = ast.parse(source.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise TableError(f"not an expression ({getattr(error, 'msg', error)})", file=where, actual=repr(source)) from None
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED):
            raise TableError(
                f"{type(node).__name__} is not allowed in an expression", file=where, actual=repr(source),
                remedy="Allowed: names, numbers, strings, + - * // %, comparisons, and/or/not, a if c else b",
            )  # fmt: skip
    operands = [leaf for node in ast.walk(tree) if isinstance(node, ast.BinOp | ast.UnaryOp) for leaf in _operands(node)]
    for leaf in operands:
        if isinstance(leaf, ast.Tuple | ast.List) or (isinstance(leaf, ast.Constant) and not isinstance(leaf.value, int | float)):
            raise TableError("arithmetic is for numbers", file=where, actual=repr(source))
    names = frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
    numbers = frozenset(leaf.id for leaf in operands if isinstance(leaf, ast.Name))
    return Expression(source, names, numbers, compile(tree, where or "<table>", "eval"))


def _operands(node: ast.expr) -> Iterator[ast.expr]:
    """The values that arithmetic at `node` may meet."""
    match node:
        case ast.BinOp():
            yield from (*_operands(node.left), *_operands(node.right))
        case ast.UnaryOp(op=ast.USub()):
            yield from _operands(node.operand)
        case ast.IfExp():
            yield from (*_operands(node.body), *_operands(node.orelse))
        case ast.BoolOp():
            for value in node.values:
                yield from _operands(value)
        case ast.UnaryOp() | ast.Compare():
            return
        case _:
            yield node
